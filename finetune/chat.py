"""Messages to `input_ids` and `labels`: the only place that knows what is trained on.

A conversation is rendered and tokenised once, whole. Which tokens belong to an assistant turn is found by asking the
template itself: the text that inference would feed before the turn (`add_generation_prompt=True`) must be a prefix of
the conversation, in characters and in tokens, so training and use cannot drift apart. No template is known by name
and none is rewritten. A row on which this cannot be shown raises `LabelError` with the message and the reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError as JinjaError

Message = dict[str, Any]

IGNORE = -100  # the label that torch's cross entropy passes over
ROLES = ("system", "user", "assistant", "tool")
SHIPPED_TEMPLATES = Path(__file__).parent / "chat_templates"


class LabelError(ValueError):
    """The labels of one row could not be proved; the text says which message and why."""


class TemplateError(ValueError):
    """The chat template cannot be used with this tokenizer at all."""


def load_template(name_or_path: str) -> str:
    """The text of a shipped template (`gemma`, `gemma3`, `chatml`) or of a `.jinja` file.

    Raises:
        TemplateError: There is no such template, or it is not UTF-8 text.
    """
    own = name_or_path.endswith(".jinja")
    path = Path(name_or_path).expanduser() if own else SHIPPED_TEMPLATES / f"{name_or_path}.jinja"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        shipped = ", ".join(sorted(file.stem for file in SHIPPED_TEMPLATES.glob("*.jinja")))
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise TemplateError(
            f"chat template {name_or_path}: {reason}; write a .jinja file or one of {shipped}"
        ) from error


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant turn that is trained on: `input_ids[start:end]` is its text and its end-of-turn token."""

    start: int
    end: int
    message: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as the trainer takes it; `labels[i]` is `input_ids[i]` where it is trained on, else -100."""

    input_ids: list[int]
    labels: list[int]
    turns: tuple[Turn, ...] = ()
    cut: bool = False  # whether the end of the row, or an exchange of it, had to be left out

    @property
    def trained_tokens(self) -> int:
        """How many tokens have a label."""
        return sum(label != IGNORE for label in self.labels)


class Chat:
    """A tokenizer and its chat template.

    Args:
        tokenizer: A fast tokenizer (labels rest on its offsets) whose `chat_template` is the one that is saved.

    Raises:
        TemplateError: The tokenizer has no offsets, or its template needs a token that it lacks.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if not tokenizer.is_fast:
            raise TemplateError(
                f"{type(tokenizer).__name__} gives no character offsets, on which labels rest; "
                "save a fast tokenizer (tokenizer.json) beside the model"
            )
        special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = set(special)
        self._special_first = {text[:1] for text in special.values()}

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as the template writes it.

        Raises:
            LabelError: The template refuses these messages.
            TemplateError: There is no template.
        """
        if self.tokenizer.chat_template is None:
            raise TemplateError(
                "model.chat_template: this model has no chat template of its own; write the one of its family "
                "(gemma, gemma3, chatml) or a .jinja file"
            )
        if not messages:
            raise LabelError("no message stands before it, and a chat template renders no empty conversation")
        plain = [{k: v for k, v in m.items() if k != "train"} for m in messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    plain, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except JinjaError as error:
            raise LabelError(f"the chat template refuses it: {error.message}") from error
        except Exception as error:
            # A template is a program of somebody else's: it may divide by a length of 0 as well.
            raise LabelError(f"the chat template fails on it: {error}") from error

    def encode(self, messages: Sequence[Message], train_on: str = "assistant") -> Encoded:
        """`input_ids` and `labels` of a conversation.

        `train_on` is `assistant`, `last_assistant` or `all`; a message's own `train` goes before it. With
        `train_on="assistant"` and Gemma's template (each column a token, `^` = has a label):

            <bos> <start_of_turn> user ⏎ Hi <end_of_turn> ⏎ <start_of_turn> model ⏎ Hello ! <end_of_turn> ⏎
                                                                                    ^     ^ ^

        Raises:
            LabelError: Text and labels of this row cannot be proved to be what inference meets.
        """
        trained = self._trained_messages(messages, train_on)
        # With `all`, a turn that says `train: false` must be found too, to be left out.
        silent = [i for i, m in enumerate(messages) if train_on == "all" and m.get("train") is False]
        text = self.render(messages)
        prefixes = {
            i: self.render(messages[:i], add_generation_prompt=True) for i in sorted(trained + silent)
        }
        batch = self.tokenizer(
            [text, *prefixes.values()], add_special_tokens=False, return_offsets_mapping=True
        )
        ids, offsets = batch["input_ids"][0], batch["offset_mapping"][0]
        self._check_bos(ids)
        turns = []
        for (i, prefix), prefix_ids in zip(prefixes.items(), batch["input_ids"][1:], strict=True):
            if not text.startswith(prefix):
                raise LabelError(
                    f"message {i + 1}: what inference would feed before this turn is not what stands before it in "
                    "the whole conversation"
                )
            start = len(prefix_ids)
            if ids[:start] != prefix_ids:
                raise LabelError(
                    f"message {i + 1}: a token straddles the start of the turn; the text begins with "
                    f"{messages[i]['content'][:12]!r}"
                )
            turns.append(Turn(start, self._end(messages, i, text, len(prefix), ids, offsets), i))
        labels = list(ids) if train_on == "all" else [IGNORE] * len(ids)
        for turn in turns:
            here = slice(turn.start, turn.end)
            labels[here] = ids[here] if turn.message in trained else [IGNORE] * (turn.end - turn.start)
        labels[:1] = [IGNORE]  # nothing comes before it that could predict it
        return Encoded(ids, labels, tuple(turn for turn in turns if turn.message in trained))

    def encode_text(self, prompt: str, completion: str) -> Encoded:
        """A row without chat turns: the tokenizer's own BOS, the text, EOS; labels on the completion and EOS.

        Raises:
            LabelError: The prompt's tokens are not those of the prompt alone, or the text holds a special token.
        """
        if not completion:
            raise LabelError("the text to train on is empty")
        self._check_plain(prompt + completion, "the text")
        ids, before = self.tokenizer([prompt + completion, prompt])["input_ids"]
        eos = self.tokenizer.eos_token_id
        if before and before[-1] == eos:
            before = before[:-1]
        if ids[: len(before)] != before:
            raise LabelError("a token straddles the edge between prompt and completion")
        if eos is not None and ids[-1] != eos:
            ids = [*ids, eos]
        self._check_bos(ids, rendered=False)
        start = max(1, len(before))  # nothing comes before the first token that could predict it
        labels = [IGNORE] * start + ids[start:]
        return Encoded(ids, labels, (Turn(start, len(ids), 0),))

    @cached_property
    def turn_token_ids(self) -> list[int]:
        """The special tokens, but for BOS, that the template puts around a user's and an assistant's text."""
        ids = self.tokenizer(self.render(self._probe), add_special_tokens=False)["input_ids"]
        return sorted({i for i in ids if i in self._special_ids} - {self.tokenizer.bos_token_id})

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
        return encoded.input_ids[encoded.turns[-1].end - 1]

    _probe: tuple[Message, ...] = (
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "Good day"},
    )

    def _trained_messages(self, messages: Sequence[Message], train_on: str) -> list[int]:
        """The places of the messages to train on; checks roles and texts on the way."""
        for i, message in enumerate(messages):
            role, content = message.get("role"), message.get("content")
            if role not in ROLES:
                raise LabelError(f"message {i + 1}: unknown role {role!r}; known are {', '.join(ROLES)}")
            if not isinstance(content, str):
                raise LabelError(f"message {i + 1}: its content is {type(content).__name__}, not text")
            if role == "assistant" and not content.strip():
                raise LabelError(f"message {i + 1}: the assistant's text is empty")
            if role != "assistant" and (message.get("train") or (train_on == "all" and "train" in message)):
                raise LabelError(
                    f"message {i + 1}: `train` on a {role} message; only an assistant's can be chosen or left out"
                )
            self._check_plain(content, f"message {i + 1}")
        assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not assistant:
            raise LabelError("there is no assistant message")
        wanted = assistant[-1:] if train_on == "last_assistant" else assistant
        return [i for i in assistant if messages[i].get("train", i in wanted)]

    def _check_plain(self, text: str, where: str) -> None:
        """Text is data: what would be read as a special token inside it makes the row a bad one."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise LabelError(
                f"{where}: its text holds half a character ({text[error.start]!r}), not Unicode"
            ) from error
        if any(first in text for first in self._special_first):
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            # The unknown token stands for all that the vocabulary lacks; special is it only where it is spelt out.
            unknown = self.tokenizer.unk_token
            harmless = {self.tokenizer.unk_token_id} if unknown is None or unknown not in text else set()
            found = next((i for i in ids if i in self._special_ids - harmless), None)
            if found is not None:
                token = self.tokenizer.convert_ids_to_tokens(found)
                raise LabelError(
                    f"{where}: its text holds {token}, which is a special token of this tokenizer"
                )

    @cached_property
    def _adds_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]

    def _check_bos(self, ids: list[int], rendered: bool = True) -> None:
        """Exactly one BOS where the tokenizer uses one, and at the front."""
        bos = self.tokenizer.bos_token_id
        if bos is None or bos == self.tokenizer.eos_token_id:
            return
        count = ids.count(bos)
        if count > 1 or (self._adds_bos and ids[:1] != [bos]):
            source = "chat template" if rendered else "tokenizer"
            raise LabelError(
                f"the {source} writes {count} BOS tokens ({self.tokenizer.bos_token}); exactly one must come first"
            )

    def _end(
        self,
        messages: Sequence[Message],
        i: int,
        text: str,
        start: int,
        ids: list[int],
        offsets: list[tuple[int, int]],
    ) -> int:
        """The token index just behind the end-of-turn token of message `i`, whose turn starts at character `start`."""
        # A template may write more at the end of a conversation than between turns: what both share is the turn.
        stop = len(text)
        if i + 1 < len(messages):
            stop = len(commonprefix([text, self.render(messages[: i + 1])]))  # noqa: RUF071 - characters are meant
        content = messages[i]["content"].strip()
        found = text.find(content, start, stop)
        if found < 0:
            raise LabelError(
                f"message {i + 1}: the chat template changes the assistant's text, so its tokens cannot be told"
            )
        behind = found + len(content)
        for place, (token, (first, last)) in enumerate(zip(ids, offsets, strict=True)):
            if first >= behind and last <= stop and token in self._special_ids:
                return place + 1
        raise LabelError(
            f"message {i + 1}: the template ends the turn with {text[behind:stop]!r}, in which this tokenizer has no "
            "special token, so the model could not learn to stop"
        )
