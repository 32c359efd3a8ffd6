"""The special tokens of a tokenizer: where a conversation has them, and the rows that are refused for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from finetune.data.encoded import Ids
from finetune.data.rendering import RenderedChat
from finetune.data.turns import Message, Special, authored_texts, message_holding, special_spans, texts_in
from finetune.system.errors import LabelError


class SpecialTokens:
    """The special tokens of a tokenizer.

    Attributes:
        texts: The text of each special token, by its id.
        known: Their texts, as the search for turns takes them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.texts: dict[int, str] = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        outside = {tokenizer.bos_token, tokenizer.eos_token} - {None}
        self.known = Special(frozenset(self.texts.values()), frozenset(outside))
        # The unknown token stands for whatever the vocabulary lacks, so it splits no text.
        self._splits_text = np.zeros(max(len(tokenizer), *self.texts, 0) + 1, bool)
        self._splits_text[[i for i in self.texts if i != tokenizer.unk_token_id]] = True

    def places(self, ids: Ids) -> list[int]:
        """The indices in `ids` of the special tokens, each of which splits the text for the tokenizer."""
        places: list[int] = np.flatnonzero(self._splits_text[ids]).tolist()
        return places

    def spans(self, rendered: RenderedChat, ids: Ids, places: list[int]) -> list[tuple[int, int]]:
        """The (start, end) in characters of each special token, which stand at `places` of `ids`.

        Raises:
            LabelError: A message or a tool holds a special token in its own text, or the tokens are others than the
                rendered text spells.
        """
        found = ids[places].tolist()
        distinct = set(found)
        unknown = self._tokenizer.unk_token
        spelt = distinct | ({self._tokenizer.unk_token_id} if unknown and unknown in rendered.text else set())
        self.check_absent(spelt, rendered.messages, "\0".join(texts_in(rendered.tools)))
        spans = special_spans([self.texts[i] for i in distinct], rendered.text)
        if [rendered.text[start:end] for start, end in spans] != [self.texts[i] for i in found]:
            raise LabelError("its special tokens are not those that its text spells out")
        return spans

    def check_absent(self, special_ids: Iterable[int], messages: Sequence[Message], text: str) -> None:
        """Refuses a row whose own text holds a special token, which the tokenizer would not read as text.

        Raises:
            LabelError: One of `special_ids` stands in a message or in `text`.
        """
        whole = "\0".join([text, *(part for message in messages for part in authored_texts(message))])
        for token in (self.texts[i] for i in special_ids):
            if token in whole:
                i = message_holding(messages, token)
                whose = "" if i is not None else "the tools: " if messages else "the text: "
                reason = f"{whose}its text holds {token}, which is a special token of this tokenizer"
                raise LabelError(reason, message=i)

    @cached_property
    def adds_bos(self) -> bool:
        """True if the tokenizer puts BOS before a text."""
        bos = self._tokenizer.bos_token_id
        return bos is not None and self._tokenizer("a")["input_ids"][:1] == [bos]

    def check_bos(self, ids: Ids, rendered: bool = True) -> None:
        """Refuses all but one BOS at the front, where the tokenizer uses it; a template may write more behind EOS.

        Raises:
            LabelError: There is none or another; `rendered` is true if a chat template wrote the text.
        """
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if bos is None or bos == eos:
            return
        places = np.flatnonzero(ids == bos)
        first = 0 in places or not (self.adds_bos or len(places))
        if not first or any(ids[place - 1] != eos for place in places if place):
            writes = f"the {'chat template' if rendered else 'tokenizer'} writes {len(places)} BOS tokens"
            raise LabelError(f"{writes} ({self._tokenizer.bos_token}); exactly one must come first")
