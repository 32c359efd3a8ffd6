"""Writes plain LoRA as a GGUF file, which llama.cpp and Ollama add to a GGUF file of its base.

A product is scaled by alpha / rank.

Source: llama.cpp of October 2026, `convert_lora_to_gguf.py` and `src/llama-adapter.cpp`.
"""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFWriter, Keys
from safetensors.numpy import load_file

from finetune.export.gguf.metadata import read_config
from finetune.export.gguf.tensors import ARCHITECTURES, converted_values, gguf_names
from finetune.system.errors import ExportError
from finetune.system.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json, whole_file

# The layers to which each family's graph adds LoRA, and those of Gemma 4; its per_layer_model_projection gets none.
_LAYERS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_OF_GEMMA4 = ("inp_gate", "proj")


def write_gguf_adapter(lora: Path, base: Path, file: Path) -> None:
    """Writes the matrices of an adapter in float32, under llama.cpp's names and with its order of rows.

    Args:
        lora: A folder that `write_adapter` wrote: LoRA of linear layers, one rank and one alpha.
        base: The folder of its base.
        file: The file to write; it appears when it is complete.

    Raises:
        ExportError: llama.cpp does not add LoRA to one of the layers.
        RunError: The adapter's config is damaged.
    """
    config = read_config(base)
    allowed = _LAYERS + (_OF_GEMMA4 if config.model_type == "gemma4_text" else ())
    name_of = gguf_names(config.to_dict())
    with whole_file(file) as part:
        writer = GGUFWriter(part, ARCHITECTURES[config.model_type])
        writer.add_type("adapter")
        writer.add_name(file.stem)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, float(read_json(lora / ADAPTER_CONFIG)["lora_alpha"]))
        for key, matrix in load_file(lora / ADAPTER_WEIGHTS).items():
            module, _, role = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
            name, values = name_of(f"{module}.weight"), matrix.astype("float32")
            if name is None:
                continue  # keys and values that nobody reads
            if name.split(".")[-2] not in allowed:
                raise ExportError(
                    f"--format gguf:adapter: the adapter changes {module}, and llama.cpp passes over LoRA of it "
                    "without a message; write --format gguf:Q4_K_M, which merges it"
                )
            # Rows of B are rows of the weight.
            values = converted_values(name, values, config) if role == "B" else values
            writer.add_tensor(f"{name}.lora_{role.lower()}", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
