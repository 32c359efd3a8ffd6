"""Turns messages into `input_ids` and `labels`: decides which tokens of a message are trained on.

A conversation is rendered and tokenised once, whole. The prompt that inference would feed before an assistant turn
(`add_generation_prompt=True`) must be a prefix of the conversation, in characters (`turns`) and in tokens (here), so
that training and inference cannot differ. No template is known by name and none is rewritten. A row for which this
cannot be shown raises `LabelError` with the message and the reason.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cached_property, partial
from typing import Any

import numpy as np

from finetune.data.encoded import IGNORE, Encoded, Ids, Turn
from finetune.data.probes import ANSWER, PLAIN, probes, spelt_tokens
from finetune.data.rendering import RenderedChat, Renderer
from finetune.data.special_tokens import SpecialTokens
from finetune.data.thinking import check_thinking_apart, thinking_spans
from finetune.data.tool_calls import with_arguments_as_rendered
from finetune.data.turn_ends import turn_end
from finetune.data.turns import (
    Message,
    Tool,
    after_closed_thought,
    check_all_rendered,
    check_unicode,
    thought_fault,
    trained_messages,
    turn_start,
)
from finetune.system.errors import LabelError, TemplateError, TurnRewrittenLater


class Chat:
    """Renders, tokenises and labels conversations with a tokenizer and its chat template.

    Args:
        tokenizer: A fast tokenizer; its `chat_template` is the one that is saved with the model.
        day: The date, at midnight, for templates that ask for it; None: the time of each rendering.

    Attributes:
        render: Renders a conversation with the template.

    Raises:
        TemplateError: The tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any, day: date | None = None) -> None:
        self.tokenizer, self.day = tokenizer, day
        self.render = Renderer(tokenizer, day)
        if not tokenizer.is_fast:
            raise TemplateError(
                f"{type(tokenizer).__name__} is a slow tokenizer, and labels need a fast one; "
                "save a fast tokenizer (tokenizer.json) next to the model"
            )
        self._special = SpecialTokens(tokenizer)
        self._tokenize_tail = functools.lru_cache(maxsize=256)(self._tokenize_one)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides which tokens a conversation becomes: tokenizer, template, libraries."""
        template = json.dumps(self.tokenizer.chat_template)
        parts = [self.tokenizer.backend_tokenizer.to_str(), template, self.render.special_tokens]
        parts += [importlib.metadata.version(name) for name in ("tokenizers", "transformers", "jinja2")]
        if self.render.asks_for_date:
            parts.append(str(self.day or date.today()))
        return hashlib.blake2b(repr(parts).encode("utf-8", "replace"), digest_size=16).hexdigest()

    # -----------------------------------------------------------------------------------------------------------
    # Conversations

    def encode(
        self,
        messages: Sequence[Message],
        train_on: str = "assistant",
        tools: Sequence[Tool] | None = None,
        variables: Mapping[str, Any] | None = None,
        train_on_thinking: bool = True,
    ) -> Encoded:
        """`input_ids` and `labels` of a conversation.

        With `train_on="assistant"` and Gemma's template (each column is a token, `^` has a label):

            <bos> <start_of_turn> user ⏎ Hi <end_of_turn> ⏎ <start_of_turn> model ⏎ Hello ! <end_of_turn> ⏎
                                                                                    ^     ^ ^

        Args:
            messages: The conversation; a message's `train` goes before `train_on`.
            train_on: `assistant`, `last_assistant` or `all`.
            tools: The functions that may be called.
            variables: Variables of the template, `chat_template_kwargs`.
            train_on_thinking: False removes the labels of `reasoning_content`.

        Raises:
            LabelError: It cannot be proved that the tokens before each turn are those that inference would feed.
            TemplateError: The tokenizer has no chat template.
        """
        rendered = self.render_turns(messages, train_on, tools, variables)
        return self.label(rendered, self._tokenize_one(rendered.text), train_on_thinking)

    def render_turns(
        self,
        messages: Sequence[Message],
        train_on: str = "assistant",
        tools: Sequence[Tool] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> RenderedChat:
        """The rendered conversation with its turns: the first half of `encode`, with the same arguments.

        Raises:
            LabelError: As for `encode`.
            TemplateError: As for `encode`.
        """
        trained = trained_messages(messages, train_on)
        render = partial(self.render, tools=tools, variables=variables)
        # A variable may change what ends a turn.
        endings = () if variables else self._endings
        messages = with_arguments_as_rendered(render, messages)
        text = render(messages)
        check_unicode(messages, text)
        check_all_rendered(render, messages, text, self.render.template)
        whole, turns = text, []
        for i, message in enumerate(messages):
            # With `all`, a turn with `train: false` must be found as well, so that its labels can be removed.
            if i in trained or (train_on == "all" and message.get("train") is False):
                fed = ""
                try:
                    start = turn_start(render, messages, i, text)
                except LabelError as error:
                    found = None if train_on == "all" else after_closed_thought(render, messages, i, text)
                    if found is None:
                        raise
                    if i + 1 < len(messages):
                        raise TurnRewrittenLater(error.reason, error.detail, i) from error
                    fed, start = found
                end = turn_end(render, self._special.known, endings, messages, i, text, start)
                if fed:
                    # The row is the prompt as it is fed, and the turn behind it.
                    text = fed + text[start:]
                    start, end = len(fed), end + len(fed) - start
                turns.append((i, start, end))
        # A turn that was moved behind a closed thought has no thinking, and comes last.
        thinking = thinking_spans(render, messages, trained, whole)
        return RenderedChat(text, messages, train_on, turns, frozenset(trained), tools, variables, thinking)

    def tokenize(self, texts: Sequence[str]) -> list[Ids]:
        """The token ids of each text; no special token is added."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def label(self, rendered: RenderedChat, ids: Ids, train_on_thinking: bool = True) -> Encoded:
        """The labels of a rendered conversation: the second half of `encode`.

        Args:
            rendered: The conversation.
            ids: The token ids of its text, of shape (T,).
            train_on_thinking: As for `encode`.

        Raises:
            LabelError: As for `encode`.
        """
        places = self._special.places(ids)
        spans = self._special.spans(rendered, ids, places)
        self._special.check_bos(ids)
        turns = []
        starts = [start for start, _ in spans]
        place_of_end = {end: place for (_, end), place in zip(spans, places, strict=True)}
        for i, first, behind in rendered.turns:
            # Special tokens split a text into pieces, each tokenised alone. So the tokens before the turn are those of
            # the prefix alone if this holds for the last piece of the prefix.
            before = bisect_left(starts, first)
            at, tail = (places[before - 1], starts[before - 1]) if before else (0, 0)
            start = self._end_of(ids, at, self._tokenize_tail(rendered.text[tail:first]))
            start = start or self._end_of(ids, 0, self._tokenize_one(rendered.text[:first]))
            if not start:
                if fault := thought_fault(rendered.messages[i], rendered.text[:first]):
                    raise LabelError(*fault, i)
                text = rendered.messages[i]["content"][:12]
                detail = f"the text begins with {text!r}"
                raise LabelError("a token straddles the start of the turn", detail, i)
            if behind not in place_of_end:
                raise LabelError("its end-of-turn token cannot be found among the tokens", message=i)
            turns.append(Turn(start, place_of_end[behind] + 1, i))
        labels = ids.copy() if rendered.train_on == "all" else np.full_like(ids, IGNORE)
        for turn in turns:
            span = slice(turn.start, turn.end)
            labels[span] = ids[span] if turn.message in rendered.trained else IGNORE
        thinking = self._thinking_tokens(rendered, ids)
        if not train_on_thinking:
            check_thinking_apart(rendered.messages, rendered.trained)
            for first, end in thinking:
                labels[first:end] = IGNORE
        labels[:1] = IGNORE  # no token comes before it from which it could be predicted
        trained = tuple(turn for turn in turns if turn.message in rendered.trained)
        return Encoded(ids, labels, trained, len(rendered.text), thinking=thinking)

    def _thinking_tokens(self, rendered: RenderedChat, ids: Ids) -> tuple[tuple[int, int], ...]:
        """The (start, end) in tokens of each thinking text; a token at its edge belongs to it."""
        if not rendered.thinking:
            return ()
        encoding = self._backend.encode(rendered.text, add_special_tokens=False)
        if encoding.ids != ids.tolist():
            raise LabelError("the tokenizer makes other tokens of it the second time")
        starts, ends = np.array(encoding.offsets).T
        spans = [np.flatnonzero((starts < end) & (ends > start)) for start, end in rendered.thinking]
        return tuple((int(span[0]), int(span[-1]) + 1) for span in spans)

    @staticmethod
    def _end_of(ids: Ids, at: int, part: Ids) -> int:
        """The index behind `part` in `ids` if it stands at index `at`; else 0."""
        end = at + len(part)
        return end if np.array_equal(ids[at:end], part) else 0

    # -----------------------------------------------------------------------------------------------------------
    # Text without turns

    def encode_text(self, prompt: str, completion: str, special_tokens: bool = False) -> Encoded:
        """A row without chat turns: the tokenizer's BOS, prompt, completion, EOS; labels on completion and EOS.

        Args:
            prompt: The text that is not trained on.
            completion: The text that is trained on.
            special_tokens: Whether the text may spell special tokens. A BOS or an EOS that it spells at its ends is not
                added again.

        Raises:
            LabelError: The completion is empty, the tokens of the prompt are not those of the prompt alone, the text
                holds a special token or a lone surrogate, or the tokenizer does not put exactly one BOS first.
        """
        if not completion:
            raise LabelError("the text to train on is empty")
        text = prompt + completion
        check_unicode([], text)
        ids, before = self.tokenizer([text, prompt])["input_ids"]
        inside, prompt_inside = self.tokenizer([text, prompt], add_special_tokens=False)["input_ids"]
        eos = self.tokenizer.eos_token_id
        if special_tokens:
            bos = [self.tokenizer.bos_token_id]
            if self._special.adds_bos and (inside[:1] == bos or prompt_inside[:1] == bos):
                ids, before = inside, prompt_inside
            elif inside and inside[-1] == eos and ids[-2:] == [eos, eos]:
                ids = ids[:-1]
        else:
            self._special.check_absent({i for i in inside if i in self._special.texts}, [], text)
        if before and before[-1] == eos:
            before = before[:-1]
        if ids[: len(before)] != before:
            raise LabelError("a token straddles the boundary of prompt and completion")
        if eos is not None and ids[-1] != eos:
            ids = [*ids, eos]
        self._special.check_bos(np.asarray(ids), rendered=False)
        start = max(1, len(before))  # no token comes before the first one from which it could be predicted
        row = np.asarray(ids, np.int32)
        labels = row.copy()
        labels[:start] = IGNORE
        return Encoded(row, labels, (Turn(start, len(row), 0),), len(text))

    # -----------------------------------------------------------------------------------------------------------
    # Tokens that the template writes around a turn

    @cached_property
    def turn_token_ids(self) -> list[int]:
        """The ids of the special tokens, but for BOS, that the template writes around a user's and an assistant's text.

        It is empty if the template refuses every conversation of `probes.py`.

        Raises:
            TemplateError: The tokenizer has no chat template.
        """
        for messages, tools in probes(self.render):
            with contextlib.suppress(LabelError):
                ids = self._tokenize_one(self.render(messages, tools=tools)).tolist()
                return sorted({i for i in ids if i in self._special.texts} - {self.tokenizer.bos_token_id})
        return []

    @cached_property
    def end_of_turn_id(self) -> int:
        """The id of the token that ends an assistant turn, and so generation.

        Raises:
            TemplateError: There is no template; it writes a token that the tokenizer lacks, or ends its turns with
                none; or it refuses every conversation of `probes.py`.
        """
        fault: LabelError | None = None
        for messages, tools in probes(self.render):
            try:
                encoded = self.encode(messages, tools=tools)
            except LabelError as error:
                fault = fault or error
                continue
            self.check_tokens()
            return int(encoded.input_ids[encoded.turns[-1].end - 1])
        raise TemplateError(f"chat template: {fault}") from fault

    @property
    def finds_end_of_turn(self) -> bool:
        """True if the template takes a conversation that shows which token ends an assistant turn."""
        try:
            _ = self.end_of_turn_id
        except TemplateError:
            return False
        return True

    def check_tokens(self) -> None:
        """Checks that the template writes no token of a turn that the tokenizer lacks, as far as it can be asked.

        Raises:
            TemplateError: It does, or there is no template.
        """
        if self._lacking_token:
            raise TemplateError(
                f"chat template: it writes {self._lacking_token}, a token that this tokenizer lacks; "
                "choose a template of the model's own family"
            )

    @cached_property
    def _lacking_token(self) -> str:
        for messages, tools in probes(self.render):
            with contextlib.suppress(LabelError):
                spelt = spelt_tokens(self.render(messages, tools=tools))
                vocabulary = self.tokenizer.get_vocab()
                return next((token for token in spelt if token not in vocabulary), "")
        return ""

    @cached_property
    def _endings(self) -> list[str]:
        """The texts that end a turn, in the middle of a conversation and at its end; longest first."""
        talk, endings = [*PLAIN, *PLAIN], set()
        for i in (1, 3):
            with contextlib.suppress(LabelError):
                text = self.render(talk)
                start = turn_start(self.render, talk, i, text)
                end = turn_end(self.render, self._special.known, (), talk, i, text, start)
                endings.add(text[text.index(ANSWER, start) + len(ANSWER) : end])
        return sorted(endings, key=len, reverse=True)

    # -----------------------------------------------------------------------------------------------------------
    # Token ids

    @cached_property
    def _backend(self) -> Any:
        self.tokenizer("a", padding=False, truncation=False)  # a tokenizer.json may ask for either
        return self.tokenizer.backend_tokenizer

    def _tokenize_one(self, text: str) -> Ids:
        return self.tokenize([text])[0]
