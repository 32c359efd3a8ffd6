"""Messages to `input_ids` and `labels`: the only place that knows what is trained on.

A conversation is rendered and tokenised once, whole. Where its assistant turns lie is asked of the template itself:
what inference would feed before a turn (`add_generation_prompt=True`) must be a prefix of the conversation, in
characters (`turns`) and in tokens (here), so training and use cannot drift apart. No template is known by name and
none is rewritten. A row on which this cannot be shown raises `LabelError` with the message and the reason.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2.exceptions import TemplateError as JinjaError
from transformers.utils import chat_template_utils

from finetune.data.turns import Message as Message
from finetune.data.turns import (
    authored_texts,
    check_all_rendered,
    check_unicode,
    is_text_only,
    message_holding,
    special_spans,
    texts_in,
    trained_messages,
    turn_end,
    turn_start,
    without_train_key,
)
from finetune.system.errors import LabelError as LabelError
from finetune.system.errors import TemplateError

Ids = npt.NDArray[np.int32]

IGNORE = -100  # the label that torch's cross entropy passes over


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant turn that is trained on: `input_ids[start:end]` is its text and its end-of-turn token."""

    start: int
    end: int
    message: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as the trainer takes it, in int32; `labels[i]` is `input_ids[i]` where it is trained on, else -100."""

    input_ids: Ids
    labels: Ids
    turns: tuple[Turn, ...] = ()
    characters: int = 0  # of the text that became these tokens
    cut: bool = False  # whether the end of the row, or an exchange of it, had to be left out

    @property
    def trained_tokens(self) -> int:
        """How many tokens have a label."""
        return int(np.count_nonzero(self.labels != IGNORE))


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A rendered conversation whose turns are known in characters; its tokens are still to come."""

    text: str
    messages: Sequence[Message]
    train_on: str
    # Message, first character of the turn, character behind its end-of-turn token.
    turns: list[tuple[int, int, int]]
    trained: frozenset[int]  # the messages that are trained on
    tools: Sequence[dict[str, Any]] | None = None


class Chat:
    """A tokenizer and its chat template.

    Args:
        tokenizer: A fast tokenizer whose `chat_template` is the one that is saved.

    Raises:
        TemplateError: The tokenizer is not a fast one, or its template needs a token that it lacks.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if not tokenizer.is_fast:
            raise TemplateError(
                f"{type(tokenizer).__name__} is a slow tokenizer, whose pieces of text cannot be told apart; "
                "save a fast tokenizer (tokenizer.json) beside the model"
            )
        self._special = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        # The unknown token stands for all that the vocabulary lacks, so it marks no place in the text.
        self._is_edge = np.zeros(max(len(tokenizer), *self._special, 0) + 1, bool)
        self._is_edge[[i for i in self._special if i != tokenizer.unk_token_id]] = True
        self._tail_ids = functools.lru_cache(maxsize=256)(self._tokenize_one)

    # -----------------------------------------------------------------------------------------------------------
    # Text

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> str:
        """The conversation as the template writes it.

        Raises:
            LabelError: The template refuses these messages.
            TemplateError: There is no template.
        """
        if self.tokenizer.chat_template is None:
            raise TemplateError(
                "model.chat_template: this model has no chat template of its own; write the one of its family "
                "(chatml, gemma, gemma2_system, gemma3, llama3) or a .jinja file"
            )
        if not messages:
            raise LabelError("no message stands before it, and a chat template renders no empty conversation")
        try:
            if tools is None and all(map(is_text_only, messages)):
                # What apply_chat_template does for plain messages, without copying each at each call (5.23).
                return str(
                    self._compiled.render(
                        messages=[without_train_key(m) for m in messages],
                        tools=None,
                        documents=None,
                        add_generation_prompt=add_generation_prompt,
                        **self._variables,
                    )
                )
            return str(
                self.tokenizer.apply_chat_template(
                    [without_train_key(m) for m in messages],
                    tools=list(tools) if tools else None,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except JinjaError as error:
            raise LabelError(f"the chat template refuses it: {error.message}") from error
        except Exception as error:
            # A template is a program of somebody else's: it may divide by a length of 0 as well.
            raise LabelError(f"the chat template fails on it: {error}") from error

    @cached_property
    def _compiled(self) -> Any:
        return chat_template_utils._compile_jinja_template(self.tokenizer.get_chat_template())

    @cached_property
    def _variables(self) -> dict[str, str]:
        return dict(self.tokenizer.special_tokens_map)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides which tokens a text becomes: the tokenizer and its template."""
        template = json.dumps(self.tokenizer.chat_template)
        parts = [self.tokenizer.backend_tokenizer.to_str(), template, self._variables]
        parts += [importlib.metadata.version(name) for name in ("tokenizers", "transformers", "jinja2")]
        with contextlib.suppress(LabelError, TemplateError):
            parts.append(self.render(self._probe))  # some templates write the date
        return hashlib.blake2b(repr(parts).encode("utf-8", "replace"), digest_size=16).hexdigest()

    # -----------------------------------------------------------------------------------------------------------
    # Conversations

    def encode(
        self,
        messages: Sequence[Message],
        train_on: str = "assistant",
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> Encoded:
        """`input_ids` and `labels` of a conversation.

        `train_on` is `assistant`, `last_assistant` or `all`; a message's own `train` goes before it. With
        `train_on="assistant"` and Gemma's template (each column a token, `^` = has a label):

            <bos> <start_of_turn> user ⏎ Hi <end_of_turn> ⏎ <start_of_turn> model ⏎ Hello ! <end_of_turn> ⏎
                                                                                    ^     ^ ^

        Raises:
            LabelError: Text and labels of this row cannot be proved to be what inference meets.
        """
        draft = self.draft(messages, train_on, tools)
        return self.label(draft, self._tokenize_one(draft.text))

    def draft(
        self,
        messages: Sequence[Message],
        train_on: str = "assistant",
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> RenderedChat:
        """The first half of `encode`, before the text is tokenised.

        Raises:
            LabelError: As `encode`.
        """
        trained = trained_messages(messages, train_on)
        render = partial(self.render, tools=tools)
        text = render(messages)
        check_unicode(messages, text)
        check_all_rendered(messages, text)
        turns = []
        for i, message in enumerate(messages):
            # With `all`, a turn that says `train: false` must be found too, to be left out.
            if i in trained or (train_on == "all" and message.get("train") is False):
                start = turn_start(render, messages, i, text)
                end = turn_end(render, self._special.values(), self._endings, messages, i, text, start)
                turns.append((i, start, end))
        return RenderedChat(text, messages, train_on, turns, frozenset(trained), tools)

    def tokenize(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, as it stands."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def label(self, draft: RenderedChat, ids: Ids) -> Encoded:
        """The second half of `encode`: `ids` are the tokens of the draft's text.

        Raises:
            LabelError: As `encode`.
        """
        places = np.flatnonzero(self._is_edge[ids]).tolist()
        edges = self._edges(draft, ids, places)
        self._check_bos(ids)
        turns = []
        starts = [start for start, _ in edges]
        ends = {end: place for (_, end), place in zip(edges, places, strict=True)}
        for i, first, behind in draft.turns:
            # Special tokens cut a text into pieces that are tokenised each for itself. So the tokens before the turn
            # are those of the prefix alone when the piece at its end is.
            before = bisect_left(starts, first)
            at, tail = (places[before - 1], starts[before - 1]) if before else (0, 0)
            start = self._behind(ids, at, self._tail_ids(draft.text[tail:first]))
            start = start or self._behind(ids, 0, self._tokenize_one(draft.text[:first]))
            if not start:
                raise LabelError(
                    f"message {i + 1}: a token straddles the start of the turn; the text begins with "
                    f"{draft.messages[i]['content'][:12]!r}"
                )
            if behind not in ends:
                raise LabelError(f"message {i + 1}: its end-of-turn token cannot be found among the tokens")
            turns.append(Turn(start, ends[behind] + 1, i))
        labels = ids.copy() if draft.train_on == "all" else np.full_like(ids, IGNORE)
        for turn in turns:
            here = slice(turn.start, turn.end)
            labels[here] = ids[here] if turn.message in draft.trained else IGNORE
        labels[:1] = IGNORE  # nothing comes before it that could predict it
        trained = tuple(turn for turn in turns if turn.message in draft.trained)
        return Encoded(ids, labels, trained, len(draft.text))

    @staticmethod
    def _behind(ids: Ids, at: int, part: Ids) -> int:
        """The place behind `part`, if that stands at place `at`; else 0."""
        end = at + len(part)
        return end if np.array_equal(ids[at:end], part) else 0

    # -----------------------------------------------------------------------------------------------------------
    # Text without turns

    def encode_text(self, prompt: str, completion: str) -> Encoded:
        """A row without chat turns: the tokenizer's own BOS, the text, EOS; labels on the completion and EOS.

        Raises:
            LabelError: The prompt's tokens are not those of the prompt alone, or the text holds a special token.
        """
        if not completion:
            raise LabelError("the text to train on is empty")
        check_unicode([], prompt + completion)
        ids, before = self.tokenizer([prompt + completion, prompt])["input_ids"]
        inside = self.tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
        self._check_plain({i for i in inside if i in self._special}, [], prompt + completion)
        eos = self.tokenizer.eos_token_id
        if before and before[-1] == eos:
            before = before[:-1]
        if ids[: len(before)] != before:
            raise LabelError("a token straddles the edge between prompt and completion")
        if eos is not None and ids[-1] != eos:
            ids = [*ids, eos]
        self._check_bos(np.asarray(ids), rendered=False)
        start = max(1, len(before))  # nothing comes before the first token that could predict it
        row = np.asarray(ids, np.int32)
        labels = row.copy()
        labels[:start] = IGNORE
        return Encoded(row, labels, (Turn(start, len(row), 0),), len(prompt + completion))

    # -----------------------------------------------------------------------------------------------------------
    # What the template writes around a turn

    @cached_property
    def turn_token_ids(self) -> list[int]:
        """The special tokens, but for BOS, that the template puts around a user's and an assistant's text."""
        ids = self._tokenize_one(self.render(self._probe)).tolist()
        return sorted({i for i in ids if i in self._special} - {self.tokenizer.bos_token_id})

    @cached_property
    def end_of_turn_id(self) -> int:
        """The token that ends an assistant turn, and so generation.

        Raises:
            TemplateError: The template ends its turns with no token of this tokenizer, or writes one that it lacks.
        """
        try:
            text = self.render(self._probe)
            encoded = self.encode(self._probe)
        except LabelError as error:
            raise TemplateError(f"chat template: {error}") from error
        vocabulary = self.tokenizer.get_vocab()
        for token in re.findall(r"<\|?\w+\|?>", text):
            if token not in vocabulary:
                raise TemplateError(
                    f"chat template: it writes {token}, a token that this tokenizer lacks; "
                    "choose a template of the model's own family"
                )
        return int(encoded.input_ids[encoded.turns[-1].end - 1])

    _probe: tuple[Message, ...] = (
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "Good day"},
    )

    @cached_property
    def _endings(self) -> list[str]:
        """The texts that end a plain turn, followed by another and at the end of a conversation."""
        talk, found = [*self._probe, *self._probe], set()
        for i in (1, 3):
            with contextlib.suppress(LabelError):
                text = self.render(talk)
                start = turn_start(self.render, talk, i, text)
                end = turn_end(self.render, self._special.values(), (), talk, i, text, start)
                found.add(text[text.index("Good day", start) + len("Good day") : end])
        return sorted(found, key=len, reverse=True)

    # -----------------------------------------------------------------------------------------------------------
    # Checks

    def _edges(self, draft: RenderedChat, ids: Ids, places: list[int]) -> list[tuple[int, int]]:
        """First and last character of each special token of the row, which must be the template's own."""
        found = ids[places].tolist()
        distinct = set(found)
        unknown = self.tokenizer.unk_token
        spelt = distinct | ({self.tokenizer.unk_token_id} if unknown and unknown in draft.text else set())
        self._check_plain(spelt, draft.messages, "\0".join(texts_in(draft.tools)))
        names = [self._special[i] for i in distinct]
        spans = special_spans(names, draft.text)
        if [draft.text[first:end] for first, end in spans] != [self._special[i] for i in found]:
            raise LabelError("its special tokens are not those that its text spells out")
        return spans

    def _check_plain(self, special_ids: Iterable[int], messages: Sequence[Message], text: str) -> None:
        """Text is data: what would be read as a special token inside it makes the row a bad one."""
        whole = "\0".join([text, *(part for message in messages for part in authored_texts(message))])
        for i in special_ids:
            if self._special[i] in whole:
                where = message_holding(messages, self._special[i]) or (
                    "the tools" if messages else "the text"
                )
                raise LabelError(
                    f"{where}: its text holds {self._special[i]}, which is a special token of this tokenizer"
                )

    @cached_property
    def _adds_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]

    def _check_bos(self, ids: Any, rendered: bool = True) -> None:
        """Exactly one BOS where the tokenizer uses one, and at the front; behind an EOS a template may begin anew."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is None or bos == eos:
            return
        places = np.flatnonzero(ids == bos)
        first = 0 in places or not (self._adds_bos or len(places))
        if not first or any(ids[place - 1] != eos for place in places if place):
            writes = f"the {'chat template' if rendered else 'tokenizer'} writes {len(places)} BOS tokens"
            raise LabelError(f"{writes} ({self.tokenizer.bos_token}); exactly one must come first")

    @cached_property
    def _backend(self) -> Any:
        self.tokenizer("a", padding=False, truncation=False)  # a tokenizer.json may ask for either
        return self.tokenizer.backend_tokenizer

    def _tokenize_one(self, text: str) -> Ids:
        return self.tokenize([text])[0]
