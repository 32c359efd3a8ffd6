"""The language of a row: Japanese, English or other."""

from __future__ import annotations

import re

_PUNCTUATION = re.compile(r"[\u2010-\u206f]+")


# Words that no text of a few sentences does without, and that other languages do not have.
_ENGLISH = re.compile(r"\b(?:the|and|you|your|with|that|this|from|what|how|who|which)\b", re.IGNORECASE)


_KANA = re.compile(r"[\u3041-\u30ff\uff66-\uff9f]+")


def language(text: str) -> str:
    """`Japanese`, `English` or `other`, by script and a few words.

    English is text of which at most one character in fifty is not ASCII and, from a hundred characters on, that has one
    of English's commonest words; Japanese is other text with at least one kana in ten such characters.
    """
    if text.isascii():
        return _english(text)
    text = _PUNCTUATION.sub("", text)  # English has its quotation marks and dashes
    foreign = len(text) - len(text.encode("ascii", "ignore"))
    if foreign * 50 <= len(text):
        return _english(text)
    return "Japanese" if sum(map(len, _KANA.findall(text))) * 10 >= foreign else "other"


def _english(text: str) -> str:
    known = text.strip() and (len(text) < 100 or _ENGLISH.search(text))
    return "English" if known else "other"
