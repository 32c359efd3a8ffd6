"""lm-eval's models of transformers (`lm-eval run --model hf --model_args pretrained=FOLDER,peft=ADAPTER`)."""

import torch
from lm_eval.models.huggingface import HFLM
from protocol import ANSWER, Parts, answer


def read(job: dict) -> Parts:
    options = {"peft": job["adapter"], "tokenizer": job["adapter"]} if job["adapter"] else {}
    model = HFLM(pretrained=job["path"], device="cpu", batch_size=1, dtype="float32", **options)

    def greedy(ids):
        prompt, end = torch.tensor([ids]), len(ids) + ANSWER
        options = {"max_length": end, "min_length": end, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        return model.model.generate(input_ids=prompt, **options)[0][len(ids) :]

    return {
        "ids": model.tok_encode,
        "prompt": model.apply_chat_template,
        "logits": lambda ids: model._model_call(torch.tensor([ids]))[0],
        "greedy": greedy,
    }


torch.set_num_threads(1)
answer(read)
