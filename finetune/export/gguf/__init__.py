"""GGUF files for llama.cpp: written, quantised with an importance matrix, measured by llama.cpp itself."""
