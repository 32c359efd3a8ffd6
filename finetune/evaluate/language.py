"""Checks that an answer is in the language that its prompt asks for.

The script decides first; single characters tell Japanese from Chinese; py3langid tells languages of one script apart.
From 20 letters on py3langid was right as often as lingua, thirty times as fast, and with 5 MB in place of 96.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

# The share of an answer's length that must be in the wanted language; a kana or Chinese character counts as 2 letters.
MIN_SHARE = 0.75

# The languages: ISO 639-1 code, script where it is not Latin (the first word of its characters' names in Unicode), then
# English names, Japanese names and some Chinese ones.
_TABLE = """
af Afrikaans アフリカーンス語; ar/ARABIC Arabic アラビア語; be/CYRILLIC Belarusian ベラルーシ語;
bg/CYRILLIC Bulgarian ブルガリア語; bn/BENGALI Bengali ベンガル語; ca Catalan カタルーニャ語 カタロニア語;
cs Czech チェコ語; cy Welsh ウェールズ語; da Danish デンマーク語; de German ドイツ語 德语 德語 独;
el/GREEK Greek ギリシャ語 ギリシア語; en English 英語 英文 英语 英; es Spanish スペイン語 西班牙语 西;
et Estonian エストニア語; eu Basque バスク語; fa/ARABIC Persian Farsi ペルシャ語 ペルシア語; fi Finnish フィンランド語;
fr French フランス語 法语 法語 仏; ga Irish アイルランド語; gu/GUJARATI Gujarati グジャラート語;
he/HEBREW Hebrew ヘブライ語; hi/DEVANAGARI Hindi ヒンディー語; hr Croatian クロアチア語; hu Hungarian ハンガリー語;
hy/ARMENIAN Armenian アルメニア語; id Indonesian インドネシア語; is Icelandic アイスランド語; it Italian イタリア語 伊;
ja/CJK Japanese 日本語 日本文 日语 日文 和文 和 日; ka/GEORGIAN Georgian ジョージア語 グルジア語;
kk/CYRILLIC Kazakh カザフ語; km/KHMER Khmer クメール語; kn/KANNADA Kannada カンナダ語;
ko/HANGUL Korean 韓国語 朝鮮語 韩语 韓語 ハングル 韓; la Latin ラテン語; lo/LAO Lao ラオス語;
lt Lithuanian リトアニア語; lv Latvian ラトビア語; mk/CYRILLIC Macedonian マケドニア語;
ml/MALAYALAM Malayalam マラヤーラム語; mn/CYRILLIC Mongolian モンゴル語; mr/DEVANAGARI Marathi マラーティー語;
ms Malay マレー語; my/MYANMAR Burmese ビルマ語 ミャンマー語; ne/DEVANAGARI Nepali ネパール語; nl Dutch オランダ語;
no Norwegian ノルウェー語; pa/GURMUKHI Punjabi パンジャブ語; pl Polish ポーランド語; pt Portuguese ポルトガル語;
ro Romanian ルーマニア語; ru/CYRILLIC Russian ロシア語 俄语 露; si/SINHALA Sinhala シンハラ語; sk Slovak スロバキア語;
sl Slovenian スロベニア語; sq Albanian アルバニア語; sr/CYRILLIC Serbian セルビア語; sv Swedish スウェーデン語;
sw Swahili スワヒリ語; ta/TAMIL Tamil タミル語; te/TELUGU Telugu テルグ語; th/THAI Thai タイ語;
tl Tagalog Filipino タガログ語; tr Turkish トルコ語; uk/CYRILLIC Ukrainian ウクライナ語; ur/ARABIC Urdu ウルドゥー語;
uz Uzbek ウズベク語; vi Vietnamese ベトナム語;
zh/CJK Chinese Mandarin Cantonese 中国語 中文 汉语 北京語 広東語 普通話 簡体字 繁体字 中; sr/LATIN
"""
_NAMES: dict[str, str] = {}
_SCRIPTS: dict[str, list[str]] = {}
for _key, *_names in map(str.split, _TABLE.split(";")):
    _code, _, _script_name = _key.partition("/")
    _SCRIPTS.setdefault(_script_name or "LATIN", []).append(_code)
    _NAMES |= {name.lower(): _code for name in _names}


@dataclass(frozen=True)
class LanguageVerdict:
    """The languages of a prompt and its answer, as ISO 639-1 codes.

    Attributes:
        right: True if the answer is in the wanted language; None if the answer has no text to judge, or if any
            language is right.
        wanted: The language that the prompt asks for; None if it leaves the language open.
        found: The language of most of the answer; None if it is not recognised.
        why: The reason, in words.
    """

    right: bool | None
    wanted: str | None
    found: str | None
    why: str


def language_verdict(prompt: str, answer: str) -> LanguageVerdict:
    """Compares the language of an answer with the one that its prompt asks for; an empty answer is wrong."""
    wanted = wanted_language(prompt)
    if not answer.strip():
        return LanguageVerdict(False, wanted, None, "the answer is empty")
    lengths = _lengths(answer, wanted)
    found = _most(lengths)
    if wanted is None:
        return LanguageVerdict(None, None, found, "the prompt leaves the language open")
    if not lengths:
        return LanguageVerdict(None, wanted, None, "nothing to judge: code, formulas, numbers or names alone")
    share = lengths[wanted] / lengths.total()
    return LanguageVerdict(share >= MIN_SHARE, wanted, found, f"{share:.0%} of it is {wanted}")


def language_of(text: str) -> str | None:
    """The ISO 639-1 code of the language of most of a text; None if the text is too short or not recognised."""
    return _most(_lengths(text, None))


def _most(lengths: Counter[str]) -> str | None:
    found = max(lengths, key=lambda code: lengths[code], default="und")
    return found if found != "und" else None


# ---------------------------------------------------------------------------------------------------------------
# The language that a prompt asks for


def wanted_language(prompt: str) -> str | None:
    """The ISO 639-1 code of the language that an answer should be in; None if the prompt leaves it open.

    It is the language that the prompt names when it asks for a translation or an answer, or else the prompt's own.
    """
    text = _NOT.sub(" ", _QUOTED.sub("", _LEFT_OUT.sub(" ", unicodedata.normalize("NFKC", prompt))))
    if len(text) > 2 * _READ:
        text = f"{text[:_READ]}\n{text[-_READ:]}"
    matches = [match for rule in _REQUESTS for match in rule.finditer(text)]
    requests = [match for match in matches if not _ABOUT.search(match.groupdict().get("about") or "")]
    # The text to work on comes after the colon of a request.
    end = text.find(":", min((match.end() for match in requests), default=0))
    named = {_NAMES[match["to"].lower()] for match in requests if end < 0 or match.start() < end}
    if len(named) == 1:
        return named.pop()
    if named or any(rule.search(text) for rule in _OPEN):
        return None
    parts = [(part, code) for part in re.split(r"\n+|(?<=[:：])", prompt) if (code := language_of(part))]
    if len({code for _, code in parts}) < 2:
        return language_of(prompt)
    # The request comes before the text to work on, or after it.
    return next((code for part, code in (parts[0], parts[-1]) if _ASKING.search(part.strip())), parts[0][1])


def _rules(*rules: str) -> list[re.Pattern[str]]:
    """Patterns, with each <NAME> in them replaced by its part."""
    for name, part in _PARTS.items():
        rules = tuple(rule.replace(f"<{name}>", part) for rule in rules)
    return [re.compile(rule, re.IGNORECASE) for rule in rules]


_PARTS = {
    "IN": r"\b(?:in|into|using)\s+(?:(?!the\b|an?\b)[\w-]+\s+){0,2}?<EN>",  # simple English, Brazilian Portuguese
    "END": r"(?=\s*(?:[^\w\s]|$|(?:<JOIN>)\b))",  # not "in English literature"
    "JOIN": "and|but|with|about|for|to|please|on|that|which|what|why|how|only|language|text|so|as|if",
    # The start of an imperative.
    "ORDER": r"(?:^|[.!?:;,\n]\s*|\b(?:please|(?:can|could|would|will) you|must|should|you to|and|then|now)\s+)"
    r"(?:please\s+)?",
    "SAY": "answer|reply|respond|(?:re)?write|summari[sz]e|compose|draft|continue|(?:para|re)?phrase|output|speak|say|"
    "put|express|generate|translate|return|repeat|introduce",
    "TELL": "explain|describe|tell|give|list|name|provide|define|suggest|make|create|state|discuss|talk|show|outline",
    "EN": r"(?P<to><ENS>)\b",
    "ENS": "|".join(name for name in _NAMES if name.isascii()),
    "PIECES": "(?:word|greeting|phrase|expression|sentence|idiom|proverb|number|name|term|day|example)s?",
    "ASK": "(?:(?:<DONE>)<PLEASE>|(?:<DO>|答え|書き|述べ|訳)<MUST>)",
    "DONE": "(?:<DO>|訳|話|返|示|直|出)し|答え|応え|書い|述べ|教え|まとめ|作っ|言っ|考え|挙げ|描い|続け|変え|つけ|見せ",
    "DO": "説明|要約|出力|作成|紹介|返信|返答|回答|返事|解説|記述|表現|記載|執筆|列挙|描写|案内|翻訳|生成|提案",
    "PLEASE": r"て(?:ください|下さい|くれ|ほし|欲し|もらえ|もらい|いただ|頂|ちょうだい|ね|みて|[。!:\n「」、]|\s*$)",
    "MUST": "(?:し?なさい|せよ|しろ|を?お?願|をください)",
    "JA": "(?P<to><JAS>)",
    "JAS": "|".join(name for name in _NAMES if not name.isascii() and len(name) > 1),
    "SHORT": "".join(name for name in _NAMES if not name.isascii() and len(name) == 1),
}
# Prompts that name the language of the answer.
_REQUESTS = _rules(
    r"\btranslat(?:e|ion)\b[^?!\n]*?\b(?:in)?to\s+(?:(?!the\b|an?\b)[\w-]+\s+)?<EN>",
    r"\b(?:in)?to (?:<ENS>)(?:,| and| or) <EN>",
    r"<ORDER>(?:<SAY>)\b[^.?!:\n]*?<IN><END>",
    r"<ORDER>(?:<TELL>)\b(?P<about>[^.?!:\n]*?)<IN><END>",
    r"(?:^|[.!?\n]\s*)(?:please,?\s+)?in\s+(?:[\w-]+\s+)?<EN>[,:]?\s+(?:please\s+)?(?:<SAY>|<TELL>)\b",
    r"\b(?:must|should|has to|needs to|shall)\s+be\s+(?:\w+\s+){0,2}?in\s+(?:\w+\s+)?<EN><END>",
    r"<ORDER>(?:use|speak)\s+(?:only\s+)?<EN><END>",
    r"\b(?:give|provide|write|produce|make)\b[^.?!\n]*\b<EN>\s+(?:translation|version|summary|rendering)",
    r"(?:^|\n)\s*<EN>(?:\s+translation)?:\s*$",
    r"^(?:<ENS>)\s+to\s+<EN>[^.?!\n]{0,20}:",
    r"<JA>[にへ][^。?!\n]{0,6}?(?:翻訳|訳|直|変換|変え|し|(?:置き|言い|書き)換え)[しえを]?(?:<PLEASE>|<MUST>|せ?。|\s*:|\s*$)",
    r"<JA>[と、](?:<JAS>)[にで][^。?!\n]{0,6}?<ASK>",
    r"(?P<to><JAS>|[<SHORT>])訳[をに]?(?:し?<PLEASE>|<MUST>|示|書|つけ|付け|教え|\s*:|\s*$)",
    "[<SHORT>](?P<to>[<SHORT>])翻訳",
    "<JA>(?:だけ|のみ)?で(?!は)(?P<about>[^。?!\n]{0,40}?)<ASK>",
    "<JA>(?:だけ|のみ)?で(?:お願い|よろしく|頼|の(?:回答|返答|答え|説明|出力|返信|要約))",
    "(?:回答|返答|答え|出力|返信|要約|説明|言語)は[^。?!\n]{0,8}?<JA>(?:だけ|のみ)?で",
    "<JA>の(?:メール|手紙|文章|作文|詩|記事|スピーチ|要約|エッセイ|自己紹介文?)を[^。?!\n]{0,10}?<ASK>",
    "(?:用|[译譯][成为為])(?:[简簡繁][体體])?<JA>(?![^。?!,\n]{0,4}的)",
)
# Words that show that a request is about a language, not for an answer in it.
[_ABOUT] = _rules(
    r"\b(?:<PIECES>|verbs?|nouns?|adjectives?|grammar|particles?|tenses?|plurals?|articles?|kanji|characters?|alphabet|"
    r"letters?|pronunciation|pronouns?|how|why|who|differences?|mean\w*|used?|written|called|vocabulary)\b|"
    "使わ|使う|呼ば|言わ|言う|いう|何と|なん|どう|意味|書かれ|話され|違い|発音"
)
# Questions about a language, which may be answered in that language or in the prompt's.
_OPEN = _rules(
    r"\bhow (?:do|does|would|can|should|to)\b[^.?!\n]*\b(?:say|write|spell|pronounce|express|translate)\b[^.?!\n]*<IN>",
    r"\bwhat(?:'s| is| are)\b[^.?!\n]*\b(?:translation|<PIECES>)\b[^.?!\n]*\b(?:in|for)\b[^.?!\n]*<EN>",
    r"\b(?:what(?:'s| is)|give|provide|tell)\b[^.?!\n]*\b<EN> (?:translation|equivalent|<PIECES>)",
    r"\b(?:<TELL>|teach)\b[^.?!\n]*\b<PIECES>\b[^.?!\n]*<IN>",
    "<JA>[でに][^。?!\n]*(?:何|なん|どう|どの)[^。?!\n]*(?:言|い|書|表|発音|訳|呼|なり)",
    "(?:<JAS>)(?:(?:に訳すと|に直すと|にすると|だと|では)[^。?!\n]*(?:何|なん|どう)|で[^。?!\n]*使わ[^。?!\n]*<ASK>)",
    "<JA>の(?:例文|単語|挨拶|あいさつ|ことわざ|表現|フレーズ|慣用句|早口言葉|数字|名前)[^。?!\n]*<ASK>",
    r"\b(?:another|a different|a foreign) language|(?:別|他|ほか)の言語|ローマ字|ピンイン|romaji|pinyin|transliterat",
)
# Negations, which name a language that is not wanted.
[_NOT] = _rules(
    r"\b(?:do not|don't|never|not|without)\b.*?(?=\bbut\b|[.,;!?\n]|$)|\w{2,8}(?:(?:では|じゃ)なくて?|以外)"
)
# Questions and requests, in contrast to a text to work on.
[_ASKING] = _rules(
    r"(?:ください|下さい|なさい|教えて|せよ|して|ですか|ますか|とは|は|か)[。？！?!:：]*$|[?？:：]$|^(?:<SAY>|<TELL>|please|can|could|what"
    r"|why|how|who|when|where|which|is|are|do|does|correct|read|based|proofread|classify|extract|find|identify|analy|complete)"
)

# ---------------------------------------------------------------------------------------------------------------
# The language of a text

# Parts of a text that are in no language.
_LEFT_OUT = re.compile(
    r"(?:^|\n)[ \t]*(?P<fence>```|~~~)[\s\S]*?(?:\n[ \t]*(?P=fence)[^\n]*|\Z)|`[^`\n]+`"  # code
    r"|\$\$[\s\S]{1,999}?\$\$|\\[\[(][\s\S]{1,999}?\\[\])]|\\begin\{(\w+)\*?\}[\s\S]{,999}?\\end\{\2\*?\}"  # formulas
    r"|\$(?=\S)[^$\n]{0,200}?[\\^_={}+*/<>][^$\n]*?\S?\$|\$\w\$|\\[a-zA-Z]+"
    r"|(?:https?://|www\.)[^\s)\]>」]+|(?<![\w.+-])[\w.+-]+@[\w-]+\.[\w.]+|</?[a-zA-Z][^<>\n]*>|&[a-z]+;"
    r"|(?<![A-Za-z0-9.~-])[A-Za-z0-9.~-]*[/_][A-Za-z0-9_./-]+|\"[\w-]+\"\s*:"  # paths, keys of JSON
)
_CODE_LINE = re.compile(
    r"(?:def|class|import|from|return|for|while|if|elif|else|function|const|let|var|public|private|static|print"
    r"|echo|#include|SELECT|INSERT|UPDATE|DELETE|CREATE|FROM|WHERE)\b.*(?:\w\(|[{}=;<>*]|:$).*"
    r"|[A-Za-z_][A-Za-z0-9_.]*(?:\s*[-+*/]?=\s.*|\(.*\)[;:]?)|[^\"]*[{}]|[^(){}=<>]*[(){}=<>].*;"
)
_QUOTED = re.compile(
    r"\([^()\n]*\)|「[^「」\n]*」|『[^『』\n]*』|“[^“”\n]*”|\"[^\"\n]*\"|《[^《》\n]*》|【[^【】\n]*】|\[[^\[\]\n]*\]"
)
_SENTENCE = re.compile(r"(?<=[。!?])|(?<=[.])\s")
# A Latin word followed by a Japanese particle, such as Webで.
_JOINED = re.compile(r"[a-zA-Z0-9)」\"](?:[はがをにでとのもや]|から|など|って|です|だ|という)")
# Words in names that are not capitalised.
_PARTICLES = {"da", "de", "del", "della", "der", "di", "do", "du", "la", "le", "of", "van", "von"}


def _lengths(text: str, wanted: str | None) -> Counter[str]:
    """The length of the parts of a text in each language; parts in an unknown one count as `und`."""
    for strict in (True, False):
        runs = list(_runs(text, strict))
        if (wanted and wanted not in _SCRIPTS["LATIN"]) or len({script for script, _ in runs}) > 1:
            runs = [(script, run) for script, run in runs if script != "LATIN" or not _is_name(run)]
        # Without runs there are only names; what stands beside them in brackets decides in the second round.
        if runs:
            break
    lengths: Counter[str] = Counter()
    kana = bool(_KANA.search(text))
    for script in dict.fromkeys(script for script, _ in runs):
        own = [run for other, run in runs if other == script]
        if script == "CJK":
            parts = [(_japanese_or_chinese(run, kana, wanted), run) for run in own]
        else:
            parts = _identified(own, _SCRIPTS.get(script, ["und"]), wanted)
        for code, run in parts:
            lengths[code] += _length(run)
    return lengths


def _runs(text: str, strict: bool) -> Iterator[tuple[str, str]]:
    """The parts of a text by script; `strict` leaves out single and quoted words in another script."""
    for line in _LEFT_OUT.sub(" ", unicodedata.normalize("NFKC", text)).splitlines():
        if _CODE_LINE.fullmatch(line.strip()):
            continue
        for sentence in _SENTENCE.split(_without_quotes(line) if strict else line):
            most = "CJK" if _JOINED.search(sentence) else _main_script(sentence)
            yield from (run for run in _pieces(sentence) if run[0] == most or not strict or _is_long(*run))


def _is_long(script: str, run: str) -> bool:
    """True for more than a name or a few words."""
    return len(run.split()) > 3 and not _is_name(run) if script == "LATIN" else _length(run) > 12


def _is_name(run: str) -> bool:
    """True for at most four words, all capitalised, that do not end a sentence."""
    words = [word for word in re.findall(r"[^\W\d_]+", run) if word not in _PARTICLES]
    capitals = all(word[0].isupper() or len(word) == 1 for word in words)
    return capitals and len(words) <= 4 and not re.search(r"[.!?]\s*$", run)


def _without_quotes(line: str) -> str:
    """A line without quotations in another script, unless they are most of it."""
    around = _QUOTED.sub(" ", line)
    script, long = _main_script(around), 4 * _length(around)

    def kept(match: re.Match[str]) -> str:
        return match[0] if _main_script(match[0]) == script or _length(match[0]) > long else " "

    return _QUOTED.sub(kept, line)


def _main_script(text: str) -> str:
    lengths = Counter[str]()
    for script, run in _pieces(text):
        lengths[script] += _length(run)
    return max(lengths, key=lambda script: lengths[script], default="")


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    """The script and the text of each longest part in one script; other characters stay with the part before them."""
    start, script = 0, ""
    for i, char in enumerate(text):
        now = _script(char) or script
        if script and now != script:
            yield script, text[start:i]
            start = i
        script = now
    if script:
        yield script, text[start:]


@cache
def _script(char: str) -> str:
    """The script of a letter, CJK for both kana and Chinese characters; empty for any other character."""
    if not char.isalpha() and unicodedata.category(char) not in ("Mc", "Mn"):
        return ""
    word = re.split("[ -]", unicodedata.name(char, ""))[0]
    return {"HIRAGANA": "CJK", "KATAKANA": "CJK", "IDEOGRAPHIC": "CJK", "COMBINING": ""}.get(word, word)


def _length(text: str) -> int:
    """The number of letters; wide ones count twice."""
    return sum(2 if script in ("CJK", "HANGUL") else 1 for script in map(_script, text) if script)


_KANA = re.compile("[ぁ-ヺ]")
_HAN = re.compile("[々㐀-鿿\U00020000-\U0003ffff]")
# Chinese function words.
_GRAMMAR = set("是的了也我你他她它很不們们這这")
# From this many letters on, py3langid made no more errors when it was measured.
_BLOCK = 80
# The most characters that are read of a text.
_READ = 1000


@cache
def _misfit(char: str) -> tuple[float, int, int]:
    """How badly a character fits Japanese, simplified Chinese and traditional Chinese, from 0 to 1.

    A character fits if the standard character set has it. The second level of JIS X 0208 (from 0xD0 on in EUC) holds
    old forms, which are rare in modern Japanese.
    """
    simplified, traditional, odd = (len(char.encode(c, "ignore")) != 2 for c in ("gb2312", "big5", "sjis"))
    if odd:
        return (0.0, 0, 0) if simplified and traditional else (1.0, simplified, traditional)
    old = simplified and char.encode("euc_jp")[:1] >= b"\xd0"
    return 0.25 if old else 0.0, simplified, traditional


def _japanese_or_chinese(run: str, next_to_kana: bool, wanted: str | None) -> str:
    """ja or zh; where the characters do not decide, ja next to kana, or else the wanted one."""
    kana, han = len(_KANA.findall(run)), _HAN.findall(run)
    japanese, *chinese = map(sum, zip((0.0, 0, 0), *map(_misfit, han), strict=True))
    if kana + min(chinese) > 2 * japanese:
        return "ja"
    if japanese >= 1 or (japanese and len(han) > 8):  # a few old forms alone may be a Japanese name
        return "zh"
    if next_to_kana:
        return "ja"
    if "是" in han or len(_GRAMMAR.intersection(han)) > 1:
        return "zh"
    # A Japanese sentence of ten characters has kana.
    return wanted if wanted in ("ja", "zh") else "ja" if len(han) < 10 else "zh"


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(set(_NAMES.values()))
    return identifier


def _identified(runs: list[str], codes: list[str], wanted: str | None) -> list[tuple[str, str]]:
    """The runs joined into blocks, each with its language; a block that does not decide gets that of all runs."""
    if len(codes) == 1:
        return [(codes[0], run) for run in runs]
    blocks: list[list[str]] = [[]]
    for run in runs:
        if sum(map(len, blocks[-1])) >= _BLOCK:
            blocks.append([])
        blocks[-1].append(run.strip())
    overall, _ = _most_likely(runs, codes, wanted)
    identified = []
    for block in blocks:
        code, sure = _most_likely(block, codes, wanted)
        identified.append((code if sure else overall, " ".join(block)))
    return identified


def _most_likely(runs: list[str], codes: list[str], wanted: str | None) -> tuple[str, bool]:
    """The language of the runs, the wanted one unless another is far more likely; and true if that is certain."""
    probability = {code: float(p) for code, p in _identifier().rank(" ".join(runs)[:_READ]) if code in codes}
    if wanted is None and "en" in probability:
        probability["en"] *= 4  # the most common language where nothing else is known
    best = max(probability, key=lambda code: probability[code])
    # A name says little about the language around it.
    sure = probability[best] >= (0.9 if all(map(_is_name, runs)) else 0.5)
    if wanted is None or wanted not in probability:
        return best if probability[best] >= 0.4 else "und", sure
    near = probability[wanted] > probability[best] / 5
    return (wanted, near) if near or not sure else (best, True)
