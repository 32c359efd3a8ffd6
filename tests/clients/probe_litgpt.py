"""LitGPT's conversion of a Llama, and its tokenizer."""

from pathlib import Path

import torch
from litgpt import GPT, Config
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.tokenizer import Tokenizer
from protocol import ANSWER, Parts, answer
from safetensors.torch import load_file


def read(job: dict) -> Parts:
    # It has no form of config.json: sizes and rotary settings come from its own table, here with the tiny model's.
    sizes = {"block_size": 4096, "n_layer": 2, "n_embd": 256, "n_head": 4, "n_query_groups": 2, "head_size": 64}
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 64}
    vocabulary = {"vocab_size": job["vocabulary"], "padded_vocab_size": job["vocabulary"]}
    config = Config.from_name("Llama-3.1-8B", intermediate_size=512, rope_adjustments=scaling, **sizes, **vocabulary)
    weights = {}
    copy_weights_hf_llama(config, {}, weights, load_file(Path(job["path"]) / "model.safetensors"))
    model = GPT(config)
    model.load_state_dict(weights)
    model.float().eval()

    def logits(ids):
        with torch.no_grad():
            return model(torch.tensor([ids]))[0]

    def greedy(ids):
        ids, start = list(ids), len(ids)
        for _ in range(ANSWER):
            ids.append(int(logits(ids)[-1].argmax()))
        return ids[start:]

    return {"ids": Tokenizer(job["path"]).encode, "logits": logits, "greedy": greedy}


torch.set_num_threads(1)
answer(read)
