"""A trained tokenizer as GGUF metadata."""
