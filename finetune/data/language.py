"""The language of a row: Japanese, English or other."""

from __future__ import annotations

import re

_PUNCTUATION = re.compile(r"[\u2010-\u206f]+")
# Words of which every English text of a few sentences has one, and that other languages lack.
_ENGLISH = re.compile(r"\b(?:the|and|you|your|with|that|this|from|what|how|who|which)\b", re.IGNORECASE)
_KANA = re.compile(r"[\u3041-\u30ff\uff66-\uff9f]+")


def language(text: str) -> str:
    """`Japanese`, `English` or `other`, by script and a few words.

    English is text with at most one character in fifty that is not ASCII and, from a hundred characters on, one of the
    commonest English words. Japanese is other text in which a tenth of the characters that are not ASCII are kana.
    """
    if text.isascii():
        return _english(text)
    text = _PUNCTUATION.sub("", text)  # English has quotation marks and dashes as well
    foreign = len(text) - len(text.encode("ascii", "ignore"))
    if foreign * 50 <= len(text):
        return _english(text)
    return "Japanese" if sum(map(len, _KANA.findall(text))) * 10 >= foreign else "other"


def _english(text: str) -> str:
    known = text.strip() and (len(text) < 100 or _ENGLISH.search(text))
    return "English" if known else "other"
