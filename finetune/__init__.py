"""From one YAML recipe to a fine-tuned language model that can be trusted and used."""

__version__ = "0.1.0"
