"""Prepares datasets: reads rows, renders and tokenises them, labels the tokens to train on.

>>> chat = Chat(tokenizer)
>>> chat.encode([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]).labels
"""

from typing import TYPE_CHECKING

from finetune.system.lazy import lazy_names

if TYPE_CHECKING:
    from finetune.data.chat import Chat as Chat
    from finetune.data.mixture import build_datasets as build_datasets

__getattr__ = lazy_names(__name__, Chat="chat", build_datasets="mixture")
