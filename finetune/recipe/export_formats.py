"""The names of the formats that a model can be exported in.

The formats in `TRANSFORMERS_FORMATS` are written by `export/transformers.py`, those for mlx-lm by `export/mlx.py`, GGUF
files and Ollama's folder by `export/gguf/`. `export/verify.py` measures folders, `export/gguf/llama_cpp/measure.py`
GGUF files.
"""

from collections.abc import Sequence

# bitsandbytes' 8 and 4 bit.
QUANTIZED_FORMATS = ("int8", "nf4")
# compressed-tensors': 8-bit floating point, and 4-bit weights with 16-bit activations.
W4A16 = "w4a16"
COMPRESSED_FORMATS = ("fp8", W4A16)
TRANSFORMERS_FORMATS = ("bf16", "fp16", *QUANTIZED_FORMATS, *COMPRESSED_FORMATS)
# For mlx-lm: the bits of a weight; 8 and 4 bit in groups of 64 numbers.
MLX_BITS = {"mlx-bf16": 16, "mlx-8bit": 8, "mlx-4bit": 4}
# Each in a folder of its name, with safetensors.
WEIGHT_FORMATS = (*TRANSFORMERS_FORMATS, *MLX_BITS)
# llama.cpp's types, and those of `gguf:all`.
GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL", "Q3_K_M", "IQ3_S", "Q2_K")
GGUF_ALL = ("IQ3_S", "IQ4_NL", "Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
# Plain LoRA for servers, by `export/adapter.py`.
ADAPTER = "adapter"
# The same as a GGUF file.
GGUF_ADAPTER = "gguf:adapter"
FORMATS = (*WEIGHT_FORMATS, ADAPTER, "ollama", "gguf:all", GGUF_ADAPTER, *(f"gguf:{kind}" for kind in GGUF_TYPES))
# `FORMATS` in a sentence, for messages.
FORMATS_HELP = (
    f"{', '.join(WEIGHT_FORMATS)}, adapter, gguf:TYPE (such as gguf:Q4_K_M), gguf:all, gguf:adapter or ollama"
)


def needs_gguf(formats: Sequence[str]) -> bool:
    """True if one of the formats is a GGUF file."""
    return bool(gguf_types(formats)) or GGUF_ADAPTER in formats


def gguf_types(formats: Sequence[str]) -> list[str]:
    """The GGUF types that formats stand for, each once; for `ollama` alone Q4_K_M, which fits most machines."""
    types: list[str] = []
    for name in formats:
        if name.startswith("gguf:") and name != GGUF_ADAPTER:
            types += GGUF_ALL if name == "gguf:all" else [name.removeprefix("gguf:")]
    return list(dict.fromkeys(types)) or (["Q4_K_M"] if "ollama" in formats else [])
