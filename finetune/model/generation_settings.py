"""Generation configs: the settings that are refused, and those that count when one answer is generated."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from finetune.model.attach import base_of
from finetune.system.errors import ModelError, first_line

# The settings of a generation config that say where answers end, or change the probabilities of tokens.
_KEPT_SETTINGS = (
    *("eos_token_id", "bos_token_id"),
    *("repetition_penalty", "no_repeat_ngram_size", "sequence_bias", "bad_words_ids"),
    *("suppress_tokens", "begin_suppress_tokens"),
)


def check_generation_config(path: str, settings: Any, text_config: Any) -> None:
    """Refuses settings on which transformers 5.23 fails at the first answer, by its own processors of logits.

    Args:
        path: The model's path or id, for the message.
        settings: Its generation config.
        text_config: The config of its text model.

    Raises:
        ModelError: A setting cannot be used.
    """
    import torch
    from transformers.generation import logits_process

    where = f"model.name_or_path: {path}"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(settings, name, None)
        ids = value if isinstance(value, list) else [value]
        # -1 is what some configs have in place of null.
        if not all(i is None or (type(i) is int and -1 <= i < 1 << 31) for i in ids):
            raise ModelError(
                f"{where}: the {name} of its generation config is {str(value)[:40]!r}; write the id of a token"
            )
    processors: dict[str, Callable[[Any], Any]] = {
        "repetition_penalty": logits_process.RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": lambda size: size > 0 and logits_process.NoRepeatNGramLogitsProcessor(size),
        "sequence_bias": logits_process.SequenceBiasLogitsProcessor,
        "bad_words_ids": logits_process.NoBadWordsLogitsProcessor,
        "suppress_tokens": logits_process.SuppressTokensLogitsProcessor,
        "begin_suppress_tokens": lambda ids: logits_process.SuppressTokensAtBeginLogitsProcessor(ids, 1),
    }
    for name, make in processors.items():
        if (value := getattr(settings, name, None)) is None:
            continue
        try:
            if process := make(value):
                process(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, text_config.vocab_size))
        except Exception as error:  # of many types
            words = textwrap.shorten(first_line(error), 200, placeholder=" ...")
            raise ModelError(f"{where}: the {name} of its generation config cannot be used: {words}") from error


def _plain_generation_config(config: Any) -> Any:
    """A `GenerationConfig` with the ends of answers and the penalties of another, and nothing else of it.

    Beams, several answers, stop strings or a dict as the result would change what `generate` returns, or make it fail.
    """
    from transformers import GenerationConfig

    return GenerationConfig(
        **{key: value for key in _KEPT_SETTINGS if (value := getattr(config, key, None)) is not None}
    )


@contextmanager
def one_answer_settings(model: Any) -> Iterator[None]:
    """Lets `generate` return one sequence of ids for each prompt, whatever the model's configs say.

    The router's logits of a model with experts are turned off, because `generate` fails with them on a padded batch:
    its load balancing loss takes the mask of all tokens so far and the logits of the new one.

    Source: transformers 5.23 `models/mixtral/modeling_mixtral.py`, `load_balancing_loss_func`;
    `generation/utils.py`, `_prepare_generation_config`, where the model's settings replace those that are None.
    """
    inner = base_of(model)
    config = inner.config.get_text_config()
    wanted, settings = getattr(config, "output_router_logits", False), inner.generation_config
    if wanted:
        config.output_router_logits = False
    inner.generation_config = _plain_generation_config(settings)
    try:
        yield
    finally:
        inner.generation_config = settings
        if wanted:
            config.output_router_logits = wanted
