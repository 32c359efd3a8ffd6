"""CTranslate2, from its own converter of transformers' folders."""

import tempfile
from pathlib import Path

import ctranslate2
import numpy as np
import transformers
from protocol import ANSWER, Parts, answer


def read(job: dict) -> Parts:
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["path"])
    folder = str(Path(tempfile.mkdtemp(dir=".")) / "converted")
    ctranslate2.converters.TransformersConverter(job["path"]).convert(folder)
    generator = ctranslate2.Generator(folder, compute_type="float32", intra_threads=1)

    def greedy(ids):
        options = {"max_length": ANSWER, "min_length": ANSWER, "sampling_topk": 1, "include_prompt_in_result": False}
        return generator.generate_batch([tokenizer.convert_ids_to_tokens(ids)], **options)[0].sequences_ids[0]

    return {
        "logits": lambda ids: np.array(generator.forward_batch([tokenizer.convert_ids_to_tokens(ids)]))[0],
        "greedy": greedy,
    }


answer(read)
