"""Names and texts on pages, in cards and on a terminal: shown as they are, never interpreted."""

import html
import io
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from finetune.cli.commands import main
from finetune.evaluate import report as evaluation
from finetune.hub.card import folder_card
from finetune.system import pages
from finetune.system.errors import RunError
from finetune.system.terminal import print_line, print_text

# Escape sequences, a C1 control, marks of direction, an end of line; then what is markup in Markdown and in HTML.
CONTROL = "a\x1b]0;b\x07\x9b31m\u202ec\u2066\u061c\u2028d"
MARKUP = 'x\n# y <b>z</b> `q` [l](http://a.b "t") ![i](u) *s* _u_ &lt; ``` $(v) "w\' \\'
NAME = CONTROL + MARKUP


def interpreted(text: str) -> list[str]:
    """The characters of a text that a terminal or a browser would not show."""
    return [c for c in text if c != "\n" and not c.isprintable()]


@pytest.mark.parametrize("name", [NAME, "#1", "> x", "a_b", "_a_", "data/x[train]", "< 1e-6", "a ~~b~~", "`", "a`b``"])
def test_a_name_in_markdown_is_that_name(name: str) -> None:
    shown = pages.one_line(name)
    parser = MarkdownIt("gfm-like", {"linkify": False})
    for text in (pages.markdown(name), pages.code(name)):
        page = parser.render(text)
        for tag in ("p", "code"):
            page = page.strip().removeprefix(f"<{tag}>").removesuffix(f"</{tag}>")
        assert html.unescape(page) == shown
    row = parser.render(f"| a | b |\n|---|---|\n| {pages.table_cell(name + '|')} | 1 |")
    assert html.unescape(row).count(f"<td>{shown}|</td>") == 1


def test_a_name_in_code_is_one_word() -> None:
    assert shlex.split(pages.shell_word(NAME)) == [pages.one_line(NAME)]
    assert eval(pages.python_text(NAME)) == pages.one_line(NAME)
    page = MarkdownIt("commonmark").render(pages.fenced("a\n```\n````\nb", "yaml"))
    assert page == '<pre><code class="language-yaml">a\n```\n````\nb\n</code></pre>\n'


def test_lines_of_a_log_are_lines_and_text_on_a_terminal_is_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    print_line("\x1b[2Jone\ntwo\u202e")
    print_text("\x1b[2Jone\n\ttwo\x9b")
    assert capsys.readouterr() == ("\x1b[2Jone\n\ttwo\x9b\n", "\\x1b[2Jone\\ntwo\\u202e\n")
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdout", terminal)
    print_text("\x1b[2Jone\n\ttwo\x9b", end="")
    assert terminal.getvalue() == "\\x1b[2Jone\n\ttwo\\x9b"


def test_a_file_name_and_a_word_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "a\x1b[31m\u202eb\n.yaml"
    bad.write_text("model: 3\n")
    for argv in (["check", str(bad)], ["check", f"{bad}x"], ["train", str(bad)], ["report", str(bad)]):
        assert main(argv) == 2
    with pytest.raises(SystemExit):
        main(["check", "--\x1b[31m\n"])
    assert main(["\x1b[31m\n"]) == 2
    said = capsys.readouterr()
    assert not interpreted(said.err + said.out)
    strange = [
        line for line in said.err.splitlines() if not re.match(r"error: |usage: |finetune.*: error: |\[INFO\]| ", line)
    ]
    assert not strange


def test_names_in_a_card(tmp_path: Path) -> None:
    """A card's YAML is read back as it was meant; nothing in its Markdown is markup but the card's own."""
    run = tmp_path / f"{CONTROL}\n# <b>"
    (run / "evaluation").mkdir(parents=True)
    (run / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": NAME, "r": 4}))
    recipe = {"model": {"name_or_path": NAME}, "data": {"train": [{"path": NAME}]}, "lora": {"r": 4}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    counts = {"rows": 1, "tokens": 2, "trained_tokens": 1}
    rows = {"read": 1, "kept": 1, "cut": 0, "split": 0}
    ledger = {**counts, "rows": rows, "dropped": {NAME: 1}, "answers": {}, "sources": {NAME: counts}}
    (run / "ledger.json").write_text(json.dumps({"train": ledger}))
    (run / "evaluation/report.json").write_text(json.dumps(report(NAME)))
    card = folder_card(run)
    assert not interpreted(card)
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["model-index"][0]["name"] == pages.one_line(run.name)
    page = MarkdownIt("gfm-like", {"linkify": False}).render(body)
    assert "<b>" not in page
    assert "<img" not in page
    assert 'http://a.b"' not in page
    assert page.count("<h1>") == 1


def test_a_damaged_record_makes_no_card(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b", "r": 4}')
    (tmp_path / "recipe.yaml").write_text("model: {name_or_path: a/b}\n")
    (tmp_path / "ledger.json").write_text('{"train": {"rows": 3}}')
    with pytest.raises(RunError, match="no card can be made of its files, one of which is damaged: "):
        folder_card(tmp_path)


def report(name: str) -> Any:
    """The report of an evaluation in which every name and text is `name`."""
    answer = {
        "text": name,
        "tokens": 3,
        "stopped": True,
        "language": {"right": True, "wanted": "en", "found": "en", "why": ""},
    }
    share = {"right": 1, "judged": 1, "low": 0.2, "high": 1.0}
    answers = {
        "count": 1,
        "language": share,
        "languages": {name: share},
        "stopped": 1.0,
        "repetition": 0.0,
        "tokens": 1.0,
    }
    part = {"tokens": 3, "perplexity": 2.0, "accuracy": 0.5}
    model = {"name": name, "loss": {"all": {"all": part}, "source": {name: part, "b": part}}, "answers": answers}
    return {
        "recipe": name,
        "prompts": name,
        "max_new_tokens": 5,
        "limit": None,
        "same_tokens": True,
        "models": [model | {"tasks": {name: 0.5}}],
        "answers": [{"prompt": name, "asked": [{"role": "user", "content": name}], "models": [answer]}],
    }


def test_names_in_the_report_of_an_evaluation() -> None:
    text, page = evaluation.as_markdown(report(NAME)), evaluation.as_html(report(NAME))
    assert not interpreted(text.replace("\u00a0", " "))
    assert not interpreted(page)
    for shown in (MarkdownIt("gfm-like", {"linkify": False}).render(text), page):
        assert "<b>" not in shown
        assert "<img" not in shown
        assert html.unescape(shown).count("<b>z</b>") > 8


Write = Callable[..., Path]


@pytest.mark.parametrize("terminal", [True, False])
def test_an_answer_is_text_on_a_terminal_and_bytes_elsewhere(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("finetune.model.generate.Generator.stream", lambda *_: iter(["one\x1b[2J", "\u202e two\n"]))
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    assert main(["generate", "random:gemma3", "--prompt", "Hi"]) == 0
    shown = "one\\x1b[2J\\u202e two\n\n" if terminal else "one\x1b[2J\u202e two\n\n"
    assert capsys.readouterr().out == shown


class _Latin(io.TextIOWrapper):
    """A standard input whose bytes are not UTF-8."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")


@pytest.mark.parametrize(
    ("argv", "stdin", "line"),
    [
        ([], None, "--prompt: standard input is closed; write --prompt TEXT"),
        ([], _Latin(), "standard input: not UTF-8 text: byte 0xe9"),
        (["--prompt", "a\udce9"], None, "--prompt: it is not UTF-8 text"),
        (["--prompt", "a", "--system", "\udce9"], None, "--system: it is not UTF-8 text"),
    ],
    ids=["closed", "latin", "prompt", "system"],
)
def test_what_standard_input_and_the_flags_cannot_hold(
    argv: list[str], stdin: Any, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["generate", "random:gemma3", *argv]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
