"""The errors that a user can mend; the command line prints their lines and exits with 2.

Any other exception is a bug of this package. `str(error)` is one line (`RecipeError`: one for each fault): where, what
was there, what to write instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class FinetuneError(ValueError):
    """An error that the user can mend; `str()` says how in one line."""


class RecipeError(FinetuneError):
    """A recipe is not valid; `faults` has a line for each thing to mend."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = list(faults)


class DataError(FinetuneError):
    """A source of rows cannot be read."""


class LabelError(FinetuneError):
    """One row cannot be rendered, or its labels cannot be proved.

    Args:
        reason: The fault in a few words that are the same for each row with this fault; the ledger counts by them.
        detail: A part that differs from row to row, or what to write instead.
        message: The index of the message at fault; None: the row as a whole.
    """

    def __init__(self, reason: str, detail: str = "", message: int | None = None) -> None:
        where = "" if message is None else f"message {message + 1}: "
        super().__init__(f"{where}{reason}{detail and f'; {detail}'}")
        self.reason, self.detail, self.message = reason, detail, message


class TurnRewrittenLater(LabelError):
    """The template renders a turn differently once a user speaks after it; as the last turn it may be proved."""


class TemplateError(FinetuneError):
    """A chat template cannot be read or used."""


class ModelError(FinetuneError):
    """A base model, its weights, its tokenizer or its adapter cannot be used as the recipe asks."""


class MergeError(FinetuneError):
    """An adapter cannot be merged into its base."""


class RunError(FinetuneError):
    """A run cannot start, resume or be saved."""


class EvaluateError(FinetuneError):
    """A model cannot be evaluated, or its judge cannot be asked."""


class RefusedReply(EvaluateError):
    """The judge's service refused one request; others may be answered."""


class ExportError(FinetuneError):
    """A model cannot be exported in the format that was asked for."""


class LlamaCppError(ExportError):
    """llama.cpp cannot load or run a GGUF file."""


class OllamaError(ExportError):
    """A chat template has no form in Ollama's syntax."""


class ServeError(FinetuneError):
    """A model cannot be served, or its server does not start."""


class PushError(FinetuneError):
    """A folder cannot be pushed to the Hub."""


class PlanError(FinetuneError):
    """A plan cannot be made."""


class Stopped(KeyboardInterrupt):
    """A signal stopped the command; its text is the line to print.

    Args:
        signum: The signal.
        message: The line.

    Attributes:
        exit_code: 128 and the signal's number, as a shell reports it.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not blank; its `repr` where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


@contextmanager
def reworded(as_type: type[FinetuneError], prefix: str, *types: type[BaseException]) -> Iterator[None]:
    """Raises an upstream error of `types` again as `as_type`: `prefix` and the first line of its text.

    Args:
        as_type: The error to raise.
        prefix: What comes before the line, such as `model.adapter: runs/a does not fit the base`.
        *types: The errors that are caught; errors of ours pass.
    """
    try:
        yield
    except FinetuneError:
        raise
    except types as error:
        raise as_type(f"{prefix}: {first_line(error)}") from error
