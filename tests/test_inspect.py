"""`finetune inspect`: the whole text of rows, their trained tokens, the ledger; the HTML page in a browser."""

import html
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetune.cli.commands import main
from finetune.cli.inspect import InspectedData, as_text, pieces
from finetune.data.encoded import IGNORE
from finetune.data.ledger import Ledger, PieceCounts
from finetune.data.mixture import Prepared
from finetune.model.locate import locate

Write = Callable[..., Path]
Capture = pytest.CaptureFixture[str]
ROWS = [
    ("Red: \x1b[31m\r\n<script>alert(1)</script></span>", "</mark> & {{ 7*7 }}\t\u202eabc"),
    ("絵文字は？", "𠮷野家の👧\n\n\ufffd 🏳‍🌈"),
    ("Say hello.", "Hello!"),
]


@pytest.fixture
def recipe(write_recipe: Write) -> str:
    """Three rows, two of them with characters that are hard to print."""
    Path("rows.jsonl").write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": u}, {"role": "assistant", "content": a}]}) + "\n"
            for u, a in ROWS
        )
    )
    return str(write_recipe(model={"name_or_path": "random:gemma"}, data={"train": [{"path": "rows.jsonl"}]}))


@cache
def tokenizers() -> tuple[Any, Any]:
    """A byte-level tokenizer, and one like Llama 2's with byte tokens, which strips the leading space of a text."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "あ"]
    backend = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    llama = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
    return AutoTokenizer.from_pretrained(locate("random:gemma")), llama


@pytest.mark.parametrize("which", [0, 1], ids=["byte-level", "byte fallback"])
@settings(deadline=None)  # the first example loads the tokenizers
@given(text=st.text(st.sampled_from("ab é\nあ鬱𠮷👧\u200d\ufffd\x1b"), min_size=1, max_size=12))
def test_pieces_are_the_whole_text(which: int, text: str) -> None:
    tokenizer = tokenizers()[which]
    ids = tokenizer(text)["input_ids"]
    parts = list(pieces(tokenizer, {"input_ids": ids, "labels": ids}))
    assert [i for part in parts for i in part.ids] == ids
    assert "".join(part.text for part in parts) == tokenizer.decode(ids) == "<bos>" * (which == 0) + text
    assert "\ufffd" in text or not any("\ufffd" in part.text for part in parts)


def test_a_replacement_character_of_the_data_keeps_to_its_side() -> None:
    tokenizer = tokenizers()[0]
    before, behind = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("x\ufffd", "y"))
    row = {"input_ids": before + behind, "labels": [IGNORE] * len(before) + behind}
    parts = [("x", False), ("\ufffd", False), ("y", True)]
    assert [(part.text, part.trained) for part in pieces(tokenizer, row)] == parts


def counts(user: str, assistant: str) -> tuple[int, int]:
    """The numbers of tokens and of trained tokens of a row."""

    def n(text: str) -> int:
        return len(tokenizers()[0](text, add_special_tokens=False)["input_ids"])

    trained = n(f"{assistant}<end_of_turn>")
    return n(f"<bos><start_of_turn>user\n{user}<end_of_turn>\n<start_of_turn>model\n") + trained + n("\n"), trained


def headline(i: int) -> str:
    tokens, trained = counts(*ROWS[i])
    return f"rows.jsonl:{i + 1}: {tokens} tokens, {trained} trained on ({trained / tokens:.0%})"


def test_text(recipe: str, capsys: Capture) -> None:
    assert main(["inspect", recipe]) == 0
    rows, ledger = capsys.readouterr().out.split("\n== training rows\n")
    assert rows == (
        "⟦like this⟧: trained on\n"
        "\n"
        f"== {headline(0)}\n"
        "<bos><start_of_turn>user\n"
        "Red: \\x1b[31m\\r\n"
        "<script>alert(1)</script></span><end_of_turn>\n"
        "<start_of_turn>model\n"
        "⟦</mark> & {{ 7*7 }}\t\\u202eabc<end_of_turn>⟧\n"
        "\n"
        f"== {headline(1)}\n"
        "<bos><start_of_turn>user\n"
        "絵文字は？<end_of_turn>\n"
        "<start_of_turn>model\n"
        "⟦𠮷野家の👧\n"
        "\n"
        "\ufffd 🏳‍🌈<end_of_turn>⟧\n"
        "\n"
        f"== {headline(2)}\n"
        "<bos><start_of_turn>user\n"
        "Say hello.<end_of_turn>\n"
        "<start_of_turn>model\n"
        "⟦Hello!<end_of_turn>⟧\n"
    )
    tokens, trained = map(sum, zip(*(counts(*row) for row in ROWS), strict=True))
    assert ledger.splitlines()[:8] == [
        "  3  rows read",
        "  3  rows kept",
        f"{tokens}  tokens",
        f" {trained}  tokens trained on ({trained / tokens:.0%})",
        "  3  turns trained on, all with their end-of-turn token",
        "",
        "rows  tokens  trained tokens  sources",
        f"   3     {tokens}              {trained}  rows.jsonl",
    ]


def test_tokens(recipe: str, capsys: Capture) -> None:
    assert main(["inspect", recipe, "--row", "3", "--tokens"]) == 0
    lines = capsys.readouterr().out.split("\n\n")[:2]
    ids = tokenizers()[0]("<bos><start_of_turn>user\nSay hello.<end_of_turn>\n<start_of_turn>model\n")["input_ids"][1:]
    assert lines[0] == "*: trained on"
    head, *shown = lines[1].splitlines()
    assert head == f"== {headline(2)}"
    assert shown[:2] == [f"{2:>8}   '<bos>'", f"{4:>8}   '<start_of_turn>'"]
    assert shown[-2:] == [f"{5:>8} * '<end_of_turn>'", f"{ids[-1]:>8}   '\\n'"]
    assert [line for line in shown if "*" in line] == shown[len(ids) : -1]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("rows.jsonl:2", None),
        ("2", None),
        (":2", None),
        ("9", "no training row has this name; write one such as rows.jsonl:1 or rows.jsonl:2"),
    ],
)
def test_row(row: str, said: str | None, recipe: str, capsys: Capture) -> None:
    assert main(["inspect", recipe, "--row", row]) == (2 if said else 0)
    shown = capsys.readouterr()
    assert shown.err == (f"error: --row {row}: {said}\n" if said else f"next: finetune train {recipe}\n")
    assert re.findall(r"^== (rows.jsonl:\d)", shown.out, re.M) == ([] if said else ["rows.jsonl:2"])


def test_a_row_of_several_names(recipe: str, capsys: Capture) -> None:
    shutil.copy("rows.jsonl", "more.jsonl")
    both = "data.train=[{path: rows.jsonl}, {path: more.jsonl, weight: 2}]"
    assert main(["inspect", recipe, both, "data.deduplicate=false", "--row", "2"]) == 2
    assert capsys.readouterr().err == (
        "error: --row 2: several rows have names that end so; write one such as more.jsonl:2 or rows.jsonl:2\n"
    )
    assert main(["inspect", recipe, both, "data.deduplicate=false", "--row", "more.jsonl:2"]) == 0
    # Used twice, it is shown twice.
    assert capsys.readouterr().out.count("\n== more.jsonl:2: ") == 2


def test_json(recipe: str, capsys: Capture) -> None:
    assert main(["inspect", recipe, "data.eval_fraction=0.34", "--json"]) == 0
    *rows, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(rows) == 2
    for row in rows:
        assert list(row) == ["row", "input_ids", "labels"]
        user, assistant = ROWS[int(row["row"].removeprefix("rows.jsonl:")) - 1]
        trained = [label for label in row["labels"] if label != IGNORE]
        decode = tokenizers()[0].decode
        assert decode(trained) == f"{assistant}<end_of_turn>"
        assert decode(row["input_ids"]) == (
            f"<bos><start_of_turn>user\n{user}<end_of_turn>\n<start_of_turn>model\n{assistant}<end_of_turn>\n"
        )
    assert list(last) == ["ledger"]
    assert {name: ledger["rows"]["kept"] for name, ledger in last["ledger"].items()} == {"train": 2, "eval": 1}
    assert main(["inspect", recipe, "data.eval_fraction=0.34", "--json", "--rows", "0"]) == 0
    assert json.loads(capsys.readouterr().out) == last


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--html", "nowhere/page.html"], "--html nowhere/page.html: write the path of a file in a folder that exists"),
        (["--html", "."], "--html .: write the path of a file in a folder that exists"),
        (
            ["--html", "pipe"],
            "pipe is a device, a pipe or a socket, and only a file is replaced; write the path of a file",
        ),
        (["model.chat_template=none"], None),
    ],
)
def test_faults(overrides: list[str], said: str | None, recipe: str, capsys: Capture) -> None:
    os.mkfifo("pipe")
    assert main(["inspect", recipe, *overrides]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert said is None or shown.err == f"error: {said}\n"


def test_bad_rows_stop_it_as_they_stop_training(recipe: str, capsys: Capture) -> None:
    with Path("rows.jsonl").open("a") as file:
        file.write('{"messages": []}\n')
    said = []
    for verb in ("train", "inspect"):
        assert main([verb, recipe, "--quiet"]) == 2
        said.append(capsys.readouterr().err)
    line = "error: rows.jsonl:4: it has no messages; mend the row, or write data.on_bad_row: skip\n"
    assert said == [line, line]


# ---------------------------------------------------------------------------------------------------------------
# On what it is shown


class Out(io.StringIO):
    """A text stream with an encoding, which may be a terminal."""

    def __init__(self, encoding: str, terminal: bool) -> None:
        super().__init__()
        self._encoding, self._terminal = encoding, terminal

    @property
    def encoding(self) -> str:
        return self._encoding

    def isatty(self) -> bool:
        return self._terminal


def inspected(dataset: Any = ()) -> InspectedData:
    train, evaluation = Ledger(read=2_000, repeated=3, cut=4, split=5, lost_tokens=500), Ledger()
    train.mended["two messages of one role merged"] = 7
    train.dropped["exact duplicates"] = 1_000
    train.bad["unknown role '\x1b'"] = 2
    for length, ends in ((10, 0), (12, 1), (1_000, 1)):
        counts = PieceCounts(length, length // 2, 1, ends, characters=2 * length, language="Japanese")
        train.keep("data/a.jsonl", counts)
    train.keep("日本語.jsonl", PieceCounts(20, 8, characters=90, language="English"))
    recipe: Any = SimpleNamespace(path=Path("r.yaml"))
    return InspectedData(recipe, tokenizers()[0], Prepared(dataset, train), Prepared(None, evaluation))


ROW = {"row": "a:1", "input_ids": [4, 206, 42, 206, 206, 43], "labels": [IGNORE, IGNORE, 42, 206, 206, IGNORE]}


@pytest.mark.parametrize(
    ("out", "no_color", "shown"),
    [
        (Out("utf-8", True), "", "<start_of_turn>\n\x1b[1;32mC\x1b[0m\n\nD"),
        (Out("utf-8", True), "1", "<start_of_turn>\n⟦C\n\n⟧D"),
        (Out("utf-8", False), "", "<start_of_turn>\n⟦C\n\n⟧D"),
        (Out("ascii", False), "", "<start_of_turn>\n[[C\n\n]]D"),
    ],
    ids=["terminal", "terminal without colour", "file", "ASCII"],
)
def test_marks(out: Out, no_color: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    lines = list(as_text(inspected(), [ROW], out))
    assert lines[1:3] == ["\n== a:1: 6 tokens, 3 trained on (50%)", shown]
    assert ("#" * 40 in "\n".join(lines)) == (out.encoding == "ascii")


def test_ledger() -> None:
    assert "\n".join(as_text(inspected(), [], Out("utf-8", False))) == LEDGER


LEDGER = """
== training rows
2,000  rows read
    4  rows kept
    3  rows repeated
    4  rows cut
    5  rows split
1,042  tokens
  519  tokens trained on (50%)
  500  tokens to train on are lost to training.max_length (49%)
    3  turns trained on, 2 with their end-of-turn token
    7  mended: two messages of one role merged
1,000  dropped: exact duplicates
    2  bad: unknown role '\\x1b'

rows  tokens  trained tokens  sources
   3   1,022             511  data/a.jsonl
   1      20               8  日本語.jsonl

rows  tokens  tokens per character  languages
   1      20                  0.22  English
   3   1,022                  0.50  Japanese

tokens  in a row
    10  at most, in 5% of the rows
    10  at most, in 25% of the rows
    12  at most, in 50% of the rows
    20  at most, in 75% of the rows
 1,000  at most, in 95% of the rows
 1,000  at most, in 100% of the rows

tokens in a row  rows
          1-100     3  ▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇
        101-200     0
        201-300     0
        301-400     0
        401-500     0
        501-600     0
        601-700     0
        701-800     0
        801-900     0
      901-1,000     1  ▇▇▇▇▇▇▇▇▇▇▇▇▇"""


def test_streamed_rows_are_taken_only_as_they_are_shown(recipe: str, capsys: Capture) -> None:
    command = ["inspect", recipe, "data.train=[{path: rows.jsonl, streaming: true}]", "training.max_steps=1"]
    assert main([*command, "--row", "2"]) == 2
    said = "error: --row 2: streamed rows have no index; write --rows N, which shows the first N\n"
    assert capsys.readouterr().err == said
    assert main([*command, "--rows", "2"]) == 0
    shown = capsys.readouterr().out
    assert len(set(re.findall(r"^== (rows.jsonl:\d): ", shown, re.M))) == 2
    assert "\n== training rows, so far (streamed)\n" in shown


# ---------------------------------------------------------------------------------------------------------------
# Pairs

PAIR = {"prompt": "空は青い？", "chosen": "はい、そうです。", "rejected": "Yes, it is."}


@pytest.fixture
def pairs(write_recipe: Write) -> list[str]:
    """The words of `inspect` for two pairs."""
    rows = [PAIR, {"prompt": "Why?", "chosen": "So.", "rejected": "<b>"}]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write_recipe(model={"name_or_path": "random:gemma"}, data={"train": [{"path": "pairs.jsonl"}]})
    return ["inspect", str(recipe), "method=dpo"]


def answers(row: dict[str, str]) -> tuple[int, int, int]:
    """The numbers of tokens of a pair's prompt, chosen answer and rejected answer."""
    asked, *said = (f"{row['prompt']}<end_of_turn>\n", row["chosen"], row["rejected"])
    encode = tokenizers()[0].encode
    before = f"<start_of_turn>user\n{asked}<start_of_turn>model\n"
    return len(encode(before)), *(len(encode(f"{text}<end_of_turn>")) - 1 for text in said)


def test_text_of_pairs(pairs: list[str], capsys: Capture) -> None:
    assert main(pairs) == 0
    rows, ledger = capsys.readouterr().out.split("\n== training rows\n")
    prompt, chosen, rejected = answers(PAIR)
    assert rows.split("\n\n")[1] == (
        f"== pairs.jsonl:1: {prompt} tokens of the prompt, {chosen} chosen, {rejected} rejected\n"
        "<bos><start_of_turn>user\n空は青い？<end_of_turn>\n<start_of_turn>model\n"
        "-- chosen\n⟦はい、そうです。<end_of_turn>⟧\n"
        "-- rejected\n⟦Yes, it is.<end_of_turn>⟧"
    )
    assert [line.split("  ")[-1] for line in ledger.splitlines()[:2]] == ["pairs read", "pairs kept"]
    [head, *table] = [line.split() for line in ledger.splitlines() if "answers" in line or "%  " in line]
    assert " ".join(head) == "pairs mean tokens chosen mean tokens rejected chosen is longer answers"
    assert table[1] == ["1", f"{chosen}.0", f"{rejected}.0", f"{100 * (chosen > rejected)}%", "Japanese"]
    assert [row[-1] for row in table] == ["English", "Japanese", "all"]


def test_tokens_of_pairs(pairs: list[str], capsys: Capture) -> None:
    assert main([*pairs, "--row", "1", "--tokens"]) == 0
    _, *shown = capsys.readouterr().out.split("\n\n")[1].splitlines()
    first, second = shown.index("-- chosen"), shown.index("-- rejected")
    blocks = (shown[:first], shown[first + 1 : second], shown[second + 1 :])
    assert tuple(sum(len(line.partition("'")[0].replace("*", "").split()) for line in block) for block in blocks) == (
        answers(PAIR)
    )
    assert shown[0] == f"{2:>8}   '<bos>'"
    assert shown[second - 1] == shown[-1] == f"{5:>8} * '<end_of_turn>'"
    assert [line for line in shown if " * '" in line] == [*blocks[1], *blocks[2]]


def test_json_of_pairs(pairs: list[str], capsys: Capture) -> None:
    assert main([*pairs, "--json"]) == 0
    row, _, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert list(row) == ["row", "input_ids", "labels", "rejected_input_ids", "rejected_labels"]
    trained = [[label for label in row[name] if label != IGNORE] for name in ("labels", "rejected_labels")]
    assert [tokenizers()[0].decode(ids) for ids in trained] == [
        f"{PAIR[name]}<end_of_turn>" for name in ("chosen", "rejected")
    ]
    assert last["ledger"]["train"]["answers"]["Japanese"]["pairs"] == 1
    assert main([*pairs[:2], "method=kto", "--json", "--rows", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()][:-1]
    assert [list(row) for row in rows] == [["row", "input_ids", "labels", "desirable"]] * 2
    assert main([*pairs[:2], "method=kto", "--rows", "2"]) == 0
    assert re.findall(r"^== (\S+ \w+), \d+ tokens", capsys.readouterr().out, re.M) == [
        "pairs.jsonl:1: desirable",
        "pairs.jsonl:1: undesirable",
    ]


def test_page_of_pairs(pairs: list[str], capsys: Capture) -> None:
    assert main([*pairs, "--html", "page.html", "--quiet"]) == 0
    text = Path("page.html").read_text(encoding="utf-8")
    page = Page(text)
    prompt = "<bos><start_of_turn>user\n空は青い？<end_of_turn>\n<start_of_turn>model\n"
    assert page.rows[:3] == [prompt, "はい、そうです。<end_of_turn>", "Yes, it is.<end_of_turn>"]
    assert page.rows[5] == "<b><end_of_turn>"
    assert page.marks == ["Like this", *page.rows[1:3], *page.rows[4:]]
    assert page.names == [
        f"pairs.jsonl:{i} {n} tokens of the prompt, {a} chosen, {b} rejected"
        for i, (n, a, b) in enumerate(
            [answers(PAIR), answers({"prompt": "Why?", "chosen": "So.", "rejected": "<b>"})], 1
        )
    ]
    assert re.findall(r"<h4>(\w+)</h4>", text) == ["chosen", "rejected"] * 2
    assert [bool(lang) for lang in re.findall(r"<pre( lang=\"ja\")?>", text)] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    assert "chosen is longer" in text


# ---------------------------------------------------------------------------------------------------------------
# The page


class Page(HTMLParser):
    """The text of each row's heading, of its tokens and of its marks; the tags that are there."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.rows: list[str] = []
        self.marks: list[str] = []
        self.tags: list[str] = []
        self.ids: list[list[int]] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "input", "img", "br", "link"):
            self._open.append(tag)
        if tag in ("pre", "mark", "h3"):
            {"pre": self.rows, "mark": self.marks, "h3": self.names}[tag].append("")
        if tag == "pre":
            self.ids.append([])
        if "pre" in self._open and tag == "span":
            self.ids[-1] += map(int, str(dict(attrs)["data-id"]).split())

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag, texts in (("pre", self.rows), ("mark", self.marks), ("h3", self.names)):
            if tag in self._open:
                texts[-1] += data


TEXTS = [
    "<bos><start_of_turn>user\nRed: \\x1b[31m\\r\n<script>alert(1)</script></span><end_of_turn>\n"
    "<start_of_turn>model\n</mark> & {{ 7*7 }}\t\\u202eabc<end_of_turn>\n",
    "<bos><start_of_turn>user\n絵文字は？<end_of_turn>\n<start_of_turn>model\n𠮷野家の👧\n\n\ufffd 🏳‍🌈<end_of_turn>\n",
    "<bos><start_of_turn>user\nSay hello.<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n",
]
MARKS = ["Like this", "</mark> & {{ 7*7 }}\t\\u202eabc<end_of_turn>", "𠮷野家の👧\n\n\ufffd 🏳‍🌈<end_of_turn>"]


def test_page(recipe: str, capsys: Capture) -> None:
    assert main(["inspect", recipe, "--rows", "2", "--html", "page.html"]) == 0
    assert capsys.readouterr() == ("", f"written: page.html; open it in a browser; next: finetune train {recipe}\n")
    assert [path.name for path in Path().glob("*page*")] == ["page.html"]
    text = Path("page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.rows == TEXTS[:2]
    assert page.marks == MARKS
    assert page.names == [headline(i).replace(": ", " ") for i in range(2)]
    assert main(["inspect", recipe, "--rows", "2", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()][:-1]
    assert page.ids == [row["input_ids"] for row in rows]
    # The one script and the one style are the page's own, and it asks nobody for anything.
    assert [page.tags.count(tag) for tag in ("script", "style", "link", "img", "iframe")] == [1, 1, 0, 0, 0]
    assert re.findall(r"https?:|\bsrc=|url\(|@import", text.replace("<img src=x", "")) == []


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# What a person does, and what the page then is; all of it undone again.
ACTS = """<script>
const said = {}, set = (id, value) => { byId(id).value = value; byId(id).dispatchEvent(new Event("input")); };
const texts = () => [...document.querySelectorAll("pre")].map(pre => pre.textContent);
const seen = () => rows.filter(row => row.checkVisibility()).length;
const shownText = () => document.querySelector("pre").innerText;
byId("spaces").click(); said.spaces = texts()[2]; byId("spaces").click();
byId("trained").click(); said.trained = shownText(); byId("trained").click();
byId("tokens").click();
said.id = getComputedStyle(document.querySelector("pre span"), "::before").content;
byId("tokens").click();
said.noid = getComputedStyle(document.querySelector("pre span"), "::before").content;
set("filter", "jsonl:2"); said.found = [seen(), byId("matching").textContent]; set("filter", ""); said.all = seen();
document.querySelector("pre span").click(); said.told = byId("status").textContent;
document.querySelector("mark span:last-child").click(); said.toldTrained = byId("status").textContent;
said.underlined = getComputedStyle(document.querySelector("pre mark")).textDecorationLine;
said.requests = performance.getEntriesByType("resource").length;
document.body.dataset.said = JSON.stringify(said);
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_page_in_a_browser(recipe: str, tmp_path: Path) -> None:
    assert main(["inspect", recipe, "--html", "page.html", "--quiet"]) == 0
    page = Path("page.html")
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", ACTS + "</body>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [
        f"--user-data-dir={tmp_path / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        page.absolute().as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    # A script's error and what the page's own policy forbids are told on the console.
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    dom = Page(done.stdout)
    assert dom.rows == TEXTS
    assert dom.marks[:3] == MARKS
    said = json.loads(html.unescape(re.search(r'data-said="([^"]*)"', done.stdout)[1]))
    assert said == {
        "spaces": TEXTS[2].replace(" ", "·").replace("\n", "↵\n"),
        "trained": "</mark> & {{ 7*7 }}\t\\u202eabc<end_of_turn>",
        "id": '"2"',
        "noid": "none",
        "found": [1, "1 of 3"],
        "all": 3,
        "told": '"<bos>": token 2, not trained on',
        "toldTrained": '"<end_of_turn>": token 5, trained on',
        "underlined": "underline",
        "requests": 0,
    }
