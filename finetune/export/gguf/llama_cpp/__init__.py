"""llama.cpp in a process of its own: token ids, logits, its server."""
