"""The formats that a model can be exported in."""

# llama.cpp's types, and those of `gguf:all`.
GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_NL", "Q3_K_M", "IQ3_S", "Q2_K")
GGUF_ALL = ("IQ3_S", "IQ4_NL", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
# All formats in words, for messages.
FORMATS_HELP = "bf16, fp16, int8, nf4, gguf:TYPE (such as gguf:Q4_K_M), gguf:all or ollama"
FORMATS = ("bf16", "fp16", "int8", "nf4", "ollama", "gguf:all", *(f"gguf:{kind}" for kind in GGUF_TYPES))
