"""Files for llama.cpp and Ollama: written, quantised by an importance matrix, and measured by llama.cpp itself."""
