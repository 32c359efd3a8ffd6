"""Matches the regular expressions of a LoRA config in a process with a limit of time, before PEFT matches them here.

A short expression can take longer than the age of the world on a module's name. The process imports nothing else.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from finetune.system import limited
from finetune.system.errors import ModelError
from finetune.system.limited import Limits, serve

_LIMITS = Limits(seconds=10, memory=1 << 30)
# How peft 0.21 matches the value of each key with the name of a module: `tuners/tuners_utils.py`, `utils/other.py`.
_FORMS = {
    "target_modules": r"(?:{})\Z",
    "exclude_modules": r"(?:{})\Z",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}
# Characters with which an expression may take long; a module's name has none of them.
_REPEATS = re.compile(r"[*+{]")


def check_patterns(config: Mapping[str, Any], model: Any, where: str) -> None:
    """Checks that the expressions of a LoRA config can be matched with the names of a model's modules in some seconds.

    Args:
        config: The options of `peft.LoraConfig`.
        model: The base.
        where: What comes before a key in the error, such as `lora.`.

    Raises:
        ModelError: One of them cannot.
    """
    patterns = [(key, pattern) for key in _FORMS for pattern in _texts(config.get(key)) if _REPEATS.search(pattern)]
    names = tuple(name for name, _ in model.named_modules()) if patterns else ()
    for key, pattern in patterns:
        if not _ends(_FORMS[key].format(pattern), names):
            raise ModelError(
                f"{where}{key}: {pattern!r} is not matched with the base's modules within {_LIMITS.seconds} s; write "
                "names, or a simpler expression"
            )


def _texts(value: Any) -> list[str]:
    """An expression, or those of a list or of a map's keys."""
    return [text for text in ([value] if isinstance(value, str) else value or ()) if isinstance(text, str)]


@functools.lru_cache(maxsize=16)
def _ends(pattern: str, names: tuple[str, ...]) -> bool:
    return limited.run("finetune.model.patterns", [pattern, names], _LIMITS) >= 0


def match_all(job: tuple[str, Iterable[str]]) -> None:
    """Matches an expression with names. One that is no expression is refused by PEFT."""
    pattern, names = job
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return
    for name in names:
        compiled.match(name)


if __name__ == "__main__":
    sys.exit(serve(match_all))
