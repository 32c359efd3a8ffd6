"""mlx-lm on a CPU."""

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.generate import generate_step
from protocol import ANSWER, Parts, answer

mx.set_default_device(mx.cpu)


def read(job: dict) -> Parts:
    model, tokenizer = load(job["path"], adapter_path=job["adapter"])
    model.set_dtype(mx.float32)

    def prompt(messages):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return tokenizer.decode(ids, skip_special_tokens=False)

    return {
        "ids": tokenizer.encode,
        "prompt": prompt,
        "logits": lambda ids: np.array(model(mx.array([ids]))[0]),
        "greedy": lambda ids: [int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=ANSWER)],
    }


answer(read)
