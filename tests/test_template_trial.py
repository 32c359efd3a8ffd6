"""A chat template is rendered in a process with limits before this one uses it, and named if it goes on and on."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.cli.commands import main
from finetune.data import rendering, template_trial
from finetune.data.template import load_template
from finetune.data.template_trial import try_template
from finetune.system import limited
from finetune.system.errors import LabelError, TemplateError

# Ordinary work of two seconds, and an ordinary text of 100 MB: the limits are lowered for it.
BUSY = "{% for i in range(5000) %}{% for j in range(5000) %}{% endfor %}{% endfor %}"
LARGE = "{% set text = messages[0].content * 10000000 %}"


@pytest.fixture(autouse=True)
def _tried(_trusted: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(limited, "run", _trusted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("template", "lower", "reached"),
    [
        (BUSY, {"seconds": 1}, "does not end within 1 s"),
        (LARGE, {"memory": 100 << 20}, "takes more than 100 MiB of memory"),
        ("{{ 'a' * 110000000 }}", {"memory": 100 << 20}, "takes more than 100 MiB of memory"),
    ],
    ids=["time", "rendered", "compiled"],
)
def test_a_template_that_reaches_a_limit(
    template: str, lower: dict[str, int], reached: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_trial, "_LIMITS", replace(template_trial._LIMITS, **lower))
    with pytest.raises(TemplateError) as caught:
        try_template({"default": load_template("gemma"), "tool_use": template}, "owner/x")
    assert str(caught.value) == (
        f"chat template of owner/x: it {reached} for a conversation of three messages; write another into "
        "model.chat_template"
    )


@pytest.mark.parametrize(
    "template",
    [
        load_template("gemma3") + " ",
        "{% generation %}{{ messages[0].content | tojson(indent=1) }}{{ strftime_now('%d') }}{% endgeneration %}",
        "{{ raise_exception('not these') }}",
        "{% for %}",
        "{{ messages[9].content.x }}{% break %}",
    ],
    ids=["gemma3", "all that transformers has", "refuses", "syntax", "undefined"],
)
def test_a_template_that_ends_passes_and_is_not_tried_again(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try_template(template, "x")
    monkeypatch.setattr(limited, "run", lambda *_: pytest.fail("tried again"))
    try_template(template, "y")
    for trusted in (None, load_template("gemma3")):
        try_template(trusted, "z")


def test_no_torch_is_imported_for_it() -> None:
    import subprocess
    import sys

    from finetune.system.fresh_process import child_environment

    code = (
        "import sys; from finetune.data import template_trial; list(template_trial.rendered('{{ messages }}'));"
        "sys.exit(bool({'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=child_environment(), check=False).returncode == 0


@pytest.mark.slow
def test_transformers_renders_the_trials_conversations_alike() -> None:
    """Each shipped template takes the same way through its text."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    seen: list[str] = []
    text = load_template("gemma4")
    for conversation in template_trial._CONVERSATIONS:
        values: Any = conversation | {"bos_token": "<s>", "eos_token": "</s>", "documents": None}
        seen.append(_compile_jinja_template(text).render(**values))
    assert list(template_trial.rendered(text)) == seen


def test_the_command_line_names_the_file(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(template_trial, "_LIMITS", replace(template_trial._LIMITS, memory=100 << 20))
    recipe = write_recipe(model={"name_or_path": "random:gemma3", "chat_template": "large.jinja"})
    Path("large.jinja").write_text(LARGE)
    assert main(["train", "--quiet", str(recipe)]) == 2
    assert capsys.readouterr().err == (
        "error: chat template of large.jinja: it takes more than 100 MiB of memory for a conversation of three "
        "messages; write another into model.chat_template\n"
    )


def test_a_template_that_works_for_long_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    now, told = time.monotonic(), set[float]()
    for _ in range(2):
        rendering._tell_slow([now - 31, now], told)
    assert capsys.readouterr().err == "the chat template has been rendering one conversation for 30 s\n"


def test_a_rendering_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = SimpleNamespace(
        chat_template="{{ 1 // 0 }}", special_tokens_map={}, get_chat_template=lambda: "{{ 1 // 0 }}"
    )
    watched: list[int] = []
    monkeypatch.setattr(rendering, "_start_watch", lambda: watched.append(len(rendering._started)))
    with pytest.raises(LabelError):
        rendering.Renderer(tokenizer)([{"role": "user", "content": "Hi"}])
    assert (watched, rendering._started) == ([1], {})
