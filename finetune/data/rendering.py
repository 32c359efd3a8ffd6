"""Renders conversations with a tokenizer's chat template, its variables and one date."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from datetime import time as time_of_day
from functools import cached_property, lru_cache, partial
from typing import Any

from jinja2.exceptions import TemplateError as JinjaError
from jinja2.exceptions import TemplateSyntaxError
from transformers.utils import chat_template_utils

from finetune.data.template import family_template, shipped_templates
from finetune.data.template_variables import variable_fault
from finetune.data.turns import Message, Tool, is_text_only, without_train_key
from finetune.system.errors import LabelError, TemplateError
from finetune.system.terminal import print_line

# Seconds after which a conversation that is still being rendered is told, and the starts of renderings by thread.
_SLOW = 30.0
_started: dict[int, float] = {}


@contextlib.contextmanager
def _named_if_slow() -> Iterator[None]:
    """Tells once that the chat template works, if it does so for `_SLOW` seconds: it may never end."""
    ident = threading.get_ident()
    _started[ident] = time.monotonic()
    _start_watch()
    try:
        yield
    finally:
        del _started[ident]


@lru_cache(maxsize=1)
def _start_watch() -> None:
    threading.Thread(target=_watch, name="slow-template", daemon=True).start()


def _watch() -> None:
    told: set[float] = set()
    while True:
        time.sleep(_SLOW / 10)
        _tell_slow(list(_started.values()), told)


def _tell_slow(started: Iterable[float], told: set[float]) -> None:
    for since in started:
        if since not in told and time.monotonic() - since > _SLOW:
            told.add(since)
            print_line(f"the chat template has been rendering one conversation for {_SLOW:g} s")


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A rendered conversation that is not tokenised yet, with its turns in characters."""

    text: str
    messages: Sequence[Message]
    train_on: str
    # For each turn: index of its message, of its first character, of the character after its end-of-turn token.
    turns: list[tuple[int, int, int]]
    trained: frozenset[int]  # the indices of the messages that are trained on
    tools: Sequence[Tool] | None = None
    variables: Mapping[str, Any] | None = None
    # The (start, end) in characters of each thinking text of a message that is trained on.
    thinking: Sequence[tuple[int, int]] = ()


class Renderer:
    """Renders conversations as `tokenizer.apply_chat_template` does.

    Args:
        tokenizer: Its `chat_template` is used.
        day: The day that a template is told which asks for the date, at midnight; None: the time of each rendering.
    """

    def __init__(self, tokenizer: Any, day: date | None = None) -> None:
        self.tokenizer, self.day = tokenizer, day
        self._variable_fault = lru_cache(maxsize=64)(partial(variable_fault, tokenizer))

    def __call__(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Tool] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the template writes it.

        Args:
            messages: The conversation.
            add_generation_prompt: Whether the start of an assistant turn follows.
            tools: The functions that may be called.
            variables: Variables of the template, `chat_template_kwargs`.

        Raises:
            LabelError: The template refuses these messages, fails on them, or reads no such variable.
            TemplateError: The tokenizer has no chat template.
        """
        if self.tokenizer.chat_template is None:
            family = family_template(self.tokenizer)
            cure = f"chat_template: {family}" if family else f"one of {shipped_templates()}"
            raise TemplateError(
                f"model.chat_template: this model has no chat template of its own; write {cure}, or a .jinja file"
            )
        if not messages:
            raise LabelError("no message stands before it, and a chat template renders no empty conversation")
        if variables and (fault := self._variable_fault(tuple(variables))):
            raise LabelError(f"chat_template_kwargs: {fault}")
        try:
            shown = [without_train_key(message) for message in messages]
            with _named_if_slow(), self._clock():
                if tools is None and all(map(is_text_only, messages)):
                    # As apply_chat_template renders such messages, which copies each of them at each call (5.23).
                    given = {"messages": shown, "add_generation_prompt": add_generation_prompt}
                    values = self.special_tokens | dict(variables or {})
                    return str(self._compiled.render(**given, tools=None, documents=None, **values))
                return str(
                    self.tokenizer.apply_chat_template(
                        shown,
                        tools=list(tools) if tools else None,
                        tokenize=False,
                        add_generation_prompt=add_generation_prompt,
                        **variables or {},
                    )
                )
        except TemplateSyntaxError as error:
            # No conversation can be rendered. A filter that Jinja lacks is such an error, too.
            raise TemplateError(f"chat template: line {error.lineno}: {error.message}") from error
        except JinjaError as error:
            # The part after a semicolon is taken as the detail of this conversation.
            reason, _, detail = (error.message or "").partition("; ")
            raise LabelError(f"the chat template refuses it: {reason}", detail) from error
        except Exception as error:
            # A template is anybody's program: it may divide by a length of 0 as well.
            reason, _, detail = str(error).partition("; ")
            raise LabelError(f"the chat template fails on it: {reason}", detail) from error

    @cached_property
    def template(self) -> str:
        """The source of the chat template that renders conversations without tools."""
        return str(self.tokenizer.get_chat_template())

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """The tokenizer's special tokens by the names under which templates know them."""
        return dict(self.tokenizer.special_tokens_map)

    @cached_property
    def special_texts(self) -> frozenset[str]:
        """The texts of all special tokens of the tokenizer."""
        return frozenset(token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)

    @cached_property
    def asks_for_date(self) -> bool:
        """True if the template writes today's date."""
        return "strftime_now" in json.dumps(self.tokenizer.chat_template)

    @cached_property
    def _compiled(self) -> Any:
        return chat_template_utils._compile_jinja_template(self.template)

    @contextlib.contextmanager
    def _clock(self) -> Iterator[None]:
        """Lets a template that asks for the date be told `day`."""
        if self.day is None or not self.asks_for_date:
            yield
            return
        midnight = datetime.combine(self.day, time_of_day())
        # transformers compiles each template once, so apply_chat_template renders this one, too (5.23).
        known = self._compiled.globals
        before = known["strftime_now"]
        known["strftime_now"] = midnight.strftime
        try:
            yield
        finally:
            known["strftime_now"] = before
