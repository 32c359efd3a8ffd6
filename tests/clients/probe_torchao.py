"""torchao's int8 weights, quantised while transformers loads a folder, saved and loaded again."""

import tempfile

import torch
from protocol import Parts, answer
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig


def read(job: dict) -> Parts:
    options = {"dtype": torch.float32, "quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    folder = tempfile.mkdtemp(dir=".")
    AutoModelForCausalLM.from_pretrained(job["path"], **options).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def logits(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0]

    return {"logits": logits}


torch.set_num_threads(1)
answer(read)
