"""KerasHub on JAX, from its own converters of transformers' folders."""

import json
import os
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

import keras_hub
import numpy as np
from protocol import ANSWER, Parts, answer

PREFIXES = {"llama": "Llama3", "gemma3_text": "Gemma3"}


def read(job: dict) -> Parts:
    config = json.loads(Path(job["path"], "config.json").read_text(encoding="utf-8"))
    prefix = PREFIXES[config["model_type"]]
    backbone = getattr(keras_hub.models, f"{prefix}Backbone").from_preset(job["path"], dtype="float32")
    tokenizer = getattr(keras_hub.tokenizers, f"{prefix}Tokenizer").from_preset(job["path"])

    def logits(ids):
        hidden = backbone({"token_ids": np.array([ids]), "padding_mask": np.ones((1, len(ids)), bool)})
        return np.array(backbone.token_embedding(hidden, reverse=True))[0]

    def greedy(ids):
        # One length, so that JAX compiles once; a causal model does not see the padding.
        row = np.array([[*ids, *[0] * ANSWER]])
        for place in range(len(ids), len(ids) + ANSWER):
            hidden = backbone({"token_ids": row, "padding_mask": np.arange(row.shape[1])[None] < place})
            scores = backbone.token_embedding(hidden[:, place - 1 : place], reverse=True)
            row[0, place] = int(np.array(scores).argmax())
        return row[0, len(ids) :].tolist()

    # Its preprocessor puts the BOS in front.
    return {
        "ids": lambda text: [config["bos_token_id"], *map(int, tokenizer(text))],
        "logits": logits,
        "greedy": greedy,
    }


answer(read)
