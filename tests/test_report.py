"""`finetune report`, loss.png, and the terminal during a run."""

import contextlib
import copy
import html
import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import forks
import pytest
from conftest import ROOT

from finetune.cli.commands import main
from finetune.system import charts
from finetune.system.terminal import interactive_console

Copy = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a real run that was trained on a pseudo-terminal, and everything that was written to that."""
    work = tmp_path_factory.mktemp("trained")
    (work / "data").symlink_to(ROOT / "data")
    shutil.copy(ROOT / "recipes" / "cpu_smoke.yaml", work)
    often = ["training.eval_strategy=steps", "training.eval_steps=2", "training.logging_steps=1"]
    command = ["train", "cpu_smoke.yaml", "training.max_steps=6", "training.save_steps=2", *often]
    master, interactive_console = pty.openpty()
    process = forks.Popen(
        [sys.executable, "-m", "finetune", *command, "training.per_device_train_batch_size=2"],
        cwd=work,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80"},
        stdin=interactive_console,
        stdout=interactive_console,
        stderr=interactive_console,
    )
    os.close(interactive_console)
    said = shown_on(master)
    assert process.wait() == 0, said
    return work / "runs" / "cpu_smoke", said


def shown_on(master: int) -> str:
    """Everything that is written to a pseudo-terminal until its last writer closes it."""
    said = b""
    with contextlib.suppress(OSError):  # how it ends
        while piece := os.read(master, 65536):
            said += piece
    os.close(master)
    return said.decode()


@pytest.fixture
def copied(trained: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of that run, which a test may change."""
    return Path(shutil.copytree(trained[0], tmp_path / "run", ignore=shutil.ignore_patterns("report.html")))


def page_of(run: Path) -> str:
    assert main(["report", str(run), "--quiet"]) == 0
    return (run / "report.html").read_text(encoding="utf-8")


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def text_of(page: str) -> str:
    """The visible text of a page, with white space collapsed."""
    parts: list[str] = []

    class Reader(HTMLParser):
        unread = 0

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.unread += tag in ("style", "script")

        def handle_endtag(self, tag: str) -> None:
            self.unread -= tag in ("style", "script")

        def handle_data(self, data: str) -> None:
            if not self.unread:
                parts.append(data)

    Reader().feed(page)
    return re.sub(r"\s+", " ", " ".join(parts))


# ---------------------------------------------------------------------------------------------------------------
# The terminal


BAR = r"step +\d/6 [━╸╺ ]+ (loss \d\.\d{3}, [\d,]+ tokens/s)? +(\d:\d\d:\d\d|-:--:--) left *"
SPOKEN = ("recipe: ", "data: ", "evaluation: ", "chosen: ", "model: ", "memory: ", "saved: ")
SPOKEN += ("a LoRA adapter is trained", "done in ")


@pytest.mark.slow
def test_a_terminal_shows_one_bar_and_nothing_of_upstream(trained: tuple[Path, str]) -> None:
    said = re.sub(r"\x1b\[\?25[lh]|\x1b\[[\d;]*m", "", trained[1])
    lines = [line for line in re.split(r"[\r\n]+|\x1b\[2K", said) if line]
    bars = [line for line in lines if re.fullmatch(BAR, line)]
    rest = [line for line in lines if line not in bars]
    assert [line for line in rest if not line.startswith(SPOKEN)] == [
        f"evaluation at step {record['step']}: loss {record['eval_loss']:.3f}"
        for record in metrics_of(trained[0])
        if "eval_loss" in record
    ]
    assert re.match(r"step 6/6 ━+ loss .* 0:00:00 left", bars[-1])
    # The cursor is hidden once and comes back.
    assert trained[1].count("\x1b[?25l") == trained[1].count("\x1b[?25h") == 1


@pytest.mark.slow
def test_elsewhere_there_are_plain_lines(
    write_recipe: Copy, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as notebooks and CI do
    path = write_recipe(training={"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1})
    assert main(["train", str(path), "data.eval_fraction=0.1"]) == 0
    out, err = capfd.readouterr()
    assert out == ""
    step = r"step \d/2: loss \d\.\d{3}, [\d,]+ tokens/s, \d:\d\d left"
    told = [line for line in err.splitlines() if not line.startswith(SPOKEN)]
    shapes = [step, r"evaluation at step 1: loss \d\.\d{3}", step, r"evaluation at step 2: loss \d\.\d{3}"]
    assert len(told) == 4, told
    assert [line for line, shape in zip(told, shapes, strict=True) if not re.fullmatch(shape, line)] == []


@pytest.mark.parametrize(
    ("environment", "drawn"),
    [
        ({"TERM": "xterm-256color"}, True),
        ({"TERM": "xterm-color"}, True),
        ({"TERM": "dumb"}, False),
        # What a notebook tells the commands of its cells.
        ({"TERM": "xterm-color", "CLICOLOR_FORCE": "1", "FORCE_COLOR": "1"}, False),
        ({"TERM": "xterm-256color", "TTY_COMPATIBLE": "0"}, False),
    ],
)
def test_where_a_bar_is_drawn(environment: dict[str, str], drawn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import rich.console  # noqa: F401

    # As datasets 5.2 leaves it after a `map` with several processes: rich was imported with another object.
    monkeypatch.setattr(os, "environ", copy.deepcopy(os.environ))
    for name in ("TERM", "CLICOLOR_FORCE", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    master, screen = pty.openpty()
    with os.fdopen(master, "rb"), os.fdopen(screen, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        assert (interactive_console() is not None) is drawn


def test_the_terminal_comes_back_after_a_fault(write_recipe: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    master, interactive_console = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    path = write_recipe(training={"learning_rate": 1e30, "max_grad_norm": 1e30, "optim": "sgd"})
    with ThreadPoolExecutor() as threads:
        shown = threads.submit(shown_on, master)
        with os.fdopen(interactive_console, "w") as screen:
            monkeypatch.setattr(sys, "stderr", screen)
            assert main(["train", str(path)]) == 2
        said = shown.result()
    assert said.count("\x1b[?25l") == 1
    [_, after] = said.split("\x1b[?25h")
    assert after.startswith("error: the loss is ")


# ---------------------------------------------------------------------------------------------------------------
# Curves


def test_points_are_the_finite_values_that_were_logged() -> None:
    records = [{"step": 1, "a": None}, {"step": 2, "a": math.nan}, {"step": 3}, {"step": 4, "a": 0.5}]
    assert charts.points([*records, {"step": 5, "a": math.inf}], "a") == [(4, 0.5)]


def test_a_smoothed_line_bends_no_slope_and_takes_half_the_noise() -> None:
    slope = [100.0 - 3 * i for i in range(50)]
    assert charts.smoothed(slope)[:48] == pytest.approx(slope[:48], abs=1e-12)
    assert charts.smoothed([1.0, 3.0, 5.0, 1.0, 3.0]) == [1.0, 3.0, 3.0, 3.0, 2.0]
    assert charts.smoothed([1.0, 9.0, 1.0, 9.0]) == [1.0, 9.0, 1.0, 9.0]
    assert charts.smoothed([]) == []


def test_a_thinned_line_keeps_its_extremes_and_its_ends() -> None:
    line = [(float(i), math.sin(i)) for i in range(10_000)]
    line[4321] = (4321.0, 99.0)
    found = charts.thinned(line, 100)
    assert len(found) <= 100
    assert found == sorted(found)
    assert {(4321.0, 99.0), line[0], line[-1], min(line, key=lambda p: p[1])} <= set(found)
    assert charts.thinned(line[:100], 100) == line[:100]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 60, [0, 10, 20, 30, 40, 50, 60]),
        (6.82, 6.96, [6.82, 6.84, 6.86, 6.88, 6.9, 6.92, 6.94, 6.96]),
        (0, 0.001, [0, 0.0002, 0.0004, 0.0006, 0.0008, 0.001]),
        (-3, 1e6, [0, 200_000, 400_000, 600_000, 800_000, 1_000_000]),
    ],
)
def test_ticks_are_round_numbers_within(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high, 7) == pytest.approx(expected)


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [-2.0, -2.0], [1e-9, 3e-9], [1e30, -1e30]])
def test_any_values_can_be_drawn(values: list[float]) -> None:
    drawn = charts.chart("a", [charts.Line("a", list(enumerate(values)), smooth=True)])
    assert drawn
    places = [float(n) for n in re.findall(r"-?[\d.]+", drawn["lines"][0]["strong"].removesuffix("h0"))]
    assert all(58 <= x <= 466 and 10 <= y <= 214 for x, y in zip(places[::2], places[1::2], strict=True))
    assert drawn["up"]
    assert charts.chart("a", [charts.Line("a", [])]) is None


def test_the_picture_has_both_losses_and_leaves_out_what_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    from finetune.train.callbacks.metrics import draw_losses

    shown: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (shown.append(self), save(self, *a, **k)))
    losses = [5.0, None, math.nan, 4.0, 6.0, 2.0, 3.0]
    records = [{"step": i, "loss": loss, "eval_loss": None} for i, loss in enumerate(losses)]
    records += [{"step": 3, "eval_loss": 4.5}, {"step": 6, "eval_loss": 3.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    draw_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    [axes] = shown[0].axes
    drawn = {str(line.get_label()): line.get_xydata().tolist() for line in axes.lines}
    assert drawn == {
        "training, as logged": [[0, 5], [3, 4], [4, 6], [5, 2], [6, 3]],
        "training, smoothed": [[0, 5], [3, 5], [4, 4], [5, pytest.approx(11 / 3)], [6, 2.5]],
        "evaluation": [[3, 4.5], [6, 3.5]],
    }
    (tmp_path / "metrics.jsonl").write_text("")
    draw_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")  # nothing was logged


# ---------------------------------------------------------------------------------------------------------------
# The page


def readings(page: str) -> dict[str, list[str]]:
    """The readings that each curve shows under a pointer, by its title."""
    found = re.findall(r'aria-label="([^"]*?), step [^"]*" data-readings="([^"]*)"', page)
    return {html.unescape(title): [text for _, text in json.loads(html.unescape(data))] for title, data in found}


def test_the_page_holds_the_runs_own_numbers(trained: tuple[Path, str]) -> None:
    run = trained[0]
    page, records = page_of(run), metrics_of(run)
    losses = [r for r in records if "loss" in r]
    evaluated = {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r}
    told = readings(page)
    assert list(told) == [
        "Loss (nats per trained token)",
        "Learning rate",
        "Gradient norm",
        "Tokens per second",
        "Peak memory (GiB)",
    ]
    means = charts.smoothed([r["loss"] for r in losses])
    assert told["Loss (nats per trained token)"] == [
        f"step {r['step']}: training {r['loss']:.4g}, smoothed {mean:.4g}"
        + (f"; evaluation {evaluated[r['step']]:.4g}" if r["step"] in evaluated else "")
        for r, mean in zip(losses, means, strict=True)
    ]
    assert told["Learning rate"] == [f"step {r['step']}: learning rate {r['learning_rate']:.4g}" for r in losses]
    text = text_of(page)
    ledger = json.loads((run / "ledger.json").read_text())["train"]
    [(why, count)] = ledger["dropped"].items()
    for part in (
        "cpu_smoke random:gemma3, LoRA Finished at step 6. 6 steps",
        f"{losses[-1]['loss']:.3f} training loss at step 6",
        f"{evaluated[6]:.3f} evaluation loss at step 6; {evaluated[2]:.3f} at step 2",
        f"{losses[-1]['trained_tokens']:,} tokens trained on, repetitions included",
        f"Training rows {ledger['rows']['read']} rows read {ledger['rows']['kept']} rows kept",
        f"{ledger['trained_tokens']:,} tokens trained on ({ledger['trained_share']:.0%})",
        f"{count} dropped: {why} (first: {ledger['first'][why]})",
        "Evaluation rows 14 rows read",
        "max_steps: 6 # command line",
        "learning_rate: 0.001 # cpu_smoke.yaml:24",
        "device CPU (x86_64)" if "x86_64" in text else "device CPU (",
    ):
        assert part in text, part
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert page.count("<article>") == len({s["prompt"] for s in samples}) == 4
    assert [int(n) for n in re.findall(r"<h3>step (\d+)</h3>", page)] == [2, 4, 6] * 4


def test_the_page_needs_nothing_else(trained: tuple[Path, str]) -> None:
    page = page_of(trained[0])
    assert re.findall(r"https?:|\bsrc=|\bhref=|url\(|@import|<link", page) == []
    assert "Content-Security-Policy\" content=\"default-src 'none';" in page


def test_a_run_that_goes_on_or_was_stopped(copied: Path) -> None:
    (copied / "adapter_model.safetensors").unlink()
    shutil.rmtree(copied / "checkpoint-6")
    lines = (copied / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if b'"step": 5' in line)
    (copied / "metrics.jsonl").write_bytes(b"".join(lines[:at]) + lines[at][:30])
    text = text_of(page_of(copied))
    assert "Not finished: in progress, or stopped. Step 4 of 6. The last record was written at 20" in text
    assert "training.resume_from_checkpoint=true resumes from checkpoint-4, the newest complete checkpoint." in text
    assert "from its last start to its end" not in text

    (copied / "checkpoint-4" / "complete.json").unlink()
    assert "resumes from checkpoint-2, the newest" in text_of(page_of(copied))
    (copied / "metrics.jsonl").unlink()  # what the trainer keeps in its checkpoint
    text = text_of(page_of(copied))
    assert "Step 2 of 6. training.resume_from_checkpoint=true resumes from checkpoint-2" in text
    shutil.rmtree(copied / "checkpoint-2")
    text = text_of(page_of(copied))
    assert "Step 0. It has no complete checkpoint." in text
    assert "Nothing was logged yet." in text


@pytest.mark.parametrize("alone", ["metrics.jsonl", "recipe.yaml"])
def test_a_run_of_which_little_is_left(trained: tuple[Path, str], tmp_path: Path, alone: str) -> None:
    shutil.copy(trained[0] / alone, tmp_path)
    page = page_of(tmp_path)
    assert "Samples" not in text_of(page)
    assert len(readings(page)) == (5 if alone == "metrics.jsonl" else 0)


def test_many_evaluations_are_shown_by_some_of_them(copied: Path) -> None:
    samples = [{"step": step, "prompt": "p", "answer": f"answer {step}", "stopped": step > 5} for step in range(101)]
    (copied / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    page = page_of(copied)
    assert re.findall(r"<h3>step (\d+)</h3>", page) == ["0", "20", "40", "60", "80", "100"]
    assert "6 of 101 evaluations, samples.jsonl has all" in text_of(page)
    assert "answer 0 cut off step 20 answer 20 ended" in text_of(page)


def test_what_was_made_of_the_run_is_shown(copied: Path) -> None:
    share = {"right": 1, "judged": 2, "low": 0.1, "high": 0.9}
    model = {
        "name": "run",
        "loss": {"all": {"all": {"tokens": 1234, "perplexity": 15.01, "accuracy": 0.5}}},
        "answers": {"language": share, "languages": {}, "stopped": 0.8, "repetition": 0.1, "tokens": 9.0}
        | {"count": 10},
        "tasks": {},
    }
    report = {"models": [model], "answers": [{}], "limit": None, "max_new_tokens": 8, "same_tokens": True}
    report |= {"prompts": "p.jsonl", "recipe": "r.yaml"}
    merged = {"base": "b/c", "base_weights": "original", "dtype": "bfloat16"}
    merged["adapters"] = [{"path": "/home/somebody/run", "weight": 0.5}]
    formats = [
        {"name": "merged", "bytes": 2_000_000, "perplexity": 15.0, "stopped": 8, "answered": 10}
        | {"against": None, "kl": None},
        {"name": "nf4", "bytes": 1_000_000, "perplexity": 20.3, "stopped": 3, "against": "merged", "kl": 0.37}
        | {"top1": 0.6497, "kept": False},
        {"name": "int8", "bytes": 5, "error": "it does not load"},
    ]
    exported = {"models": formats, "notes": ["A note."], "missed": ["nf4: mean KL is 0.37"]}
    for folder, name, value in (
        ("evaluation", "report.json", report),
        ("merged", "merge.json", merged),
        ("exports", "report.json", exported),
    ):
        (copied / folder).mkdir()
        (copied / folder / name).write_text(json.dumps(value))
    text = text_of(page_of(copied))
    assert "rows run: tokens perplexity accuracy all 1,234 15.01 50.0%" in text
    assert "Merged model in merged/ base b/c merged into the original weights adapters run × 0.5" in text
    assert "/home/somebody" not in text
    assert (
        "merged 2.0 MB 15 8 of 10 nf4 (not kept) 1.0 MB 20.3 0.37 64.97% 3 merged int8 0.0 MB it does not load" in text
    )
    assert "Missed: nf4: mean KL is 0.37 A note." in text


HOSTILE = "</script><script>document.title = 'hit'</script><img src=x onerror=alert(1)>\u202e\x1b[2J&lt;{{ 7*7 }}"


@pytest.fixture
def hostile(copied: Path) -> Path:
    """That run with markup in every text that does not come from finetune."""
    sample = {"step": 2, "prompt": HOSTILE, "answer": HOSTILE, "stopped": True}
    (copied / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    ledger = json.loads((copied / "ledger.json").read_text())
    ledger["train"]["dropped"] = {HOSTILE: 1}
    ledger["train"]["sources"] = {HOSTILE: {"rows": 1, "tokens": 1, "trained_tokens": 1}}
    (copied / "ledger.json").write_text(json.dumps(ledger))
    environment = json.loads((copied / "environment.json").read_text()) | {"device": HOSTILE}
    (copied / "environment.json").write_text(json.dumps(environment))
    recipe = (copied / "recipe.yaml").read_text()
    (copied / "recipe.yaml").write_text(recipe + json.dumps(HOSTILE) + ": 1\n")
    return copied


def test_text_of_others_is_only_shown(hostile: Path) -> None:
    page = page_of(hostile)
    assert page.count("<script") == 1
    assert "<img" not in page
    assert not set(page) & set("\u202e\x1b")
    shown = HOSTILE.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")
    assert page.count(html.escape(shown, quote=False).replace("'", "&#39;")) >= 5


DAMAGED = [
    ("metrics.jsonl", "{\n", "metrics.jsonl:1 is damaged"),
    ("metrics.jsonl", '{"step": 1}\n{"loss": 1}\n', "metrics.jsonl:2 is damaged (it has no 'step')"),
    ("metrics.jsonl", '{"step": 1, "loss": "x"}\n', "metrics.jsonl:1 is damaged (it holds something else"),
    ("samples.jsonl", '{"step": 1, "prompt": "p"}\n', "samples.jsonl:1 is damaged (it has no 'answer')"),
    ("samples.jsonl", "[]\n", "samples.jsonl:1 is damaged (it holds something else"),
    ("ledger.json", "", "ledger.json is damaged (Expecting value"),
    ("ledger.json", '{"train": {}}', "ledger.json is damaged (it has no 'rows')"),
    ("environment.json", "[1]", "environment.json is damaged (it holds something else"),
    ("recipe.yaml", "model: [", "recipe.yaml is damaged (while parsing a flow"),
    ("evaluation/report.json", '{"answers": [], "models": []}', "report.json is damaged (it has no 'limit')"),
    ("exports/report.json", '{"missed": 1, "models": 3}', "report.json is damaged (it holds something else"),
    ("merged/merge.json", "\0", "merge.json is damaged (Expecting value"),
]


@pytest.mark.parametrize(("name", "text", "said"), DAMAGED)
def test_a_damaged_file_is_told_in_one_line(
    copied: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, said: str
) -> None:
    (copied / name).parent.mkdir(exist_ok=True)
    (copied / name).write_text(text)
    assert main(["report", str(copied)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {copied / name}".removesuffix(Path(name).name))
    assert said in line
    assert not (copied / "report.html").exists()


def test_bytes_that_are_no_text(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("recipe.yaml", "ledger.json", "metrics.jsonl"):
        old = (copied / name).read_bytes()
        (copied / name).write_bytes(b"\xff\xfe\n")
        assert main(["report", str(copied)]) == 2
        assert f"{name}{':1' * (name == 'metrics.jsonl')} is damaged" in capsys.readouterr().err
        (copied / name).write_bytes(old)


def test_where_it_is_written(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(copied), "--output", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().err == f"written: {tmp_path / 'page.html'}; open it in a browser\n"
    assert main(["report", str(copied)]) == 0
    assert (copied / "report.html").read_bytes() == (tmp_path / "page.html").read_bytes()
    assert main(["report", str(copied), "--output", str(tmp_path / "no" / "page.html")]) == 2
    assert "write the path of a file in a folder that exists" in capsys.readouterr().err
    os.mkfifo(tmp_path / "pipe")
    assert main(["report", str(copied), "--output", str(tmp_path / "pipe")]) == 2
    said = f"error: {tmp_path / 'pipe'} is a device, a pipe or a socket, and only a file is replaced; write the path "
    assert capsys.readouterr().err == f"{said}of a file\n"
    for nothing in (tmp_path / "none", tmp_path):
        assert main(["report", str(nothing)]) == 2
        said = f"error: {nothing} is not a run; write the training.output_dir of a recipe that was trained\n"
        assert capsys.readouterr().err == said


@pytest.mark.slow
def test_the_door_to_a_report_opens_without_torch(trained: tuple[Path, str]) -> None:
    code = (
        "import sys\nfrom finetune.cli.report import as_html\nfrom pathlib import Path\nas_html(Path(sys.argv[1]))\n"
        "print(sorted({'torch', 'transformers', 'trl', 'peft', 'datasets'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(trained[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


# ---------------------------------------------------------------------------------------------------------------
# In a browser


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# At a fifth of the first curve, a pointer.
POINT = """
<script>
const box = document.querySelector("svg").getBoundingClientRect();
const where = {clientX: box.left + box.width / 5, clientY: box.top + 20};
document.querySelector("svg").dispatchEvent(new PointerEvent("pointermove", where));
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_browser_draws_it_and_asks_for_nothing(hostile: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(page_of(hostile).replace("</body>", POINT + "</body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    logged = ["--enable-logging=stderr", "--window-size=1200,900"]
    done = subprocess.run(
        [str(CHROMIUM), *flags, *logged, "--dump-dom", f"file://{page}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    # A request would be refused by the page's policy, which the console tells as well.
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    assert "<title>run: report of the run</title>" in done.stdout
    assert done.stdout.count("<svg") == 5
    drawn = re.findall(r'<path d="M[\d. L]+h0">', done.stdout)
    assert len(drawn) == 6  # the training and evaluation losses in one
    steps = [text for _, text in json.loads(html.unescape(re.findall(r'data-readings="([^"]*)"', page.read_text())[0]))]
    told = re.findall(r"<output>([^<]*)</output>", done.stdout)
    assert told[0] in steps[:2]
    assert told[1].startswith("step 6: ")
