"""A Modelfile with the chat template in Go's syntax."""
