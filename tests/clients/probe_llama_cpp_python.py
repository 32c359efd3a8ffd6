"""llama-cpp-python's `Llama`: its tokenizer, its own rendering of the file's chat template, and its logits."""

import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from protocol import ANSWER, Parts, answer


def read(job: dict) -> Parts:
    llm = llama_cpp.Llama(
        job["path"],
        lora_path=job["adapter"],
        n_ctx=512,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        # The default rounds keys and values to float16.
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        flash_attn=False,
        verbose=False,
    )
    template = llm.metadata["tokenizer.chat_template"]

    def prompt(messages):
        bos, eos = (llm._model.token_get_text(token) for token in (llm.token_bos(), llm.token_eos()))
        return Jinja2ChatFormatter(template=template, bos_token=bos, eos_token=eos)(messages=messages).prompt

    def logits(ids):
        llm.reset()
        llm.eval(ids)
        return np.array(llm.scores[: len(ids)])

    def greedy(ids):
        llm.reset()
        llm.eval(ids)
        made = []
        while len(made) < ANSWER:
            made.append(int(llm.scores[llm.n_tokens - 1].argmax()))
            llm.eval(made[-1:])
        return made

    return {
        "ids": lambda text: llm.tokenize(text.encode(), add_bos=True, special=True),
        "prompt": prompt,
        "logits": logits,
        "greedy": greedy,
    }


answer(read)
