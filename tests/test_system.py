"""Used by every package: errors, fresh processes, complete files and folders, sizes and durations."""

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from finetune.system import errors, files, fresh_process, numbers
from finetune.system.cache import cache_dir, made_once
from finetune.system.errors import (
    FinetuneError,
    LabelError,
    MergeError,
    ModelError,
    RecipeError,
    RunError,
    first_line,
    reworded,
)
from finetune.system.files import (
    locked_folder,
    read_json,
    read_records,
    run_file,
    sha256,
    whole_file,
    whole_folder,
    write_together,
    write_whole,
)
from finetune.system.fresh_process import ProcessFailed, call

# ---------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("first\nsecond"), "first"),
        (ValueError("\n  \n  indented \nrest"), "indented"),
        (KeyError("name"), "'name'"),
        (MemoryError(), "MemoryError()"),
        (ValueError("\n"), "ValueError('\\n')"),
    ],
)
def test_the_first_line_of_an_error(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_an_upstream_error_becomes_one_of_ours() -> None:
    rewording = reworded(MergeError, "adapter", KeyError, ValueError)
    with pytest.raises(MergeError, match=r"^adapter: no such layer$") as raised, rewording:
        raise ValueError("no such layer\nTraceback and more")
    assert isinstance(raised.value.__cause__, ValueError)


@pytest.mark.parametrize("error", [ModelError("of ours"), TypeError("another type")])
def test_other_errors_pass_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, reworded(MergeError, "adapter", ValueError):
        raise error
    assert raised.value is error


def test_every_error_of_ours_can_be_told_from_a_defect() -> None:
    own = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(own) > 10
    assert all(issubclass(kind, FinetuneError) for kind in own)
    assert all(kind.__doc__ for kind in own)


# ---------------------------------------------------------------------------------------------------------------
# Fresh processes: `work` runs in a new Python, which imports this file


@dataclass(frozen=True)
class Job:
    """A task, and how often to do it."""

    what: str
    times: int = 1


@dataclass(frozen=True)
class Answer:
    """The result."""

    process: int
    texts: list[str]
    loss: float
    modules: list[str]


def work(job: Job) -> Answer:
    if job.what == "label":
        raise LabelError("row 3: é is not text")
    if job.what == "recipe":
        raise RecipeError(["r.yaml:1: a", "r.yaml:2: b"])
    if job.what == "missing":
        Path("/no/such/file").read_text(encoding="utf-8")
    if job.what == "defect":
        raise KeyError("name")
    if job.what == "kill":
        print("before it was killed", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if job.what == "exit":
        print("first\nlast words", file=sys.stderr, flush=True)
        os._exit(3)
    print("an upstream library prints this")
    for i in range(job.times):
        fresh_process.report(f"step {i}")
    texts = [os.environ.get("FINETUNE_TEST_WORD", ""), "日本"]
    return Answer(os.getpid(), texts, float("inf"), sorted({"torch", "transformers"} & set(sys.modules)))


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The new process finds this file."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.mark.usefixtures("importable", "cold")
def test_a_function_runs_in_a_fresh_process() -> None:
    lines: list[str] = []
    answer = call(work, Job("work", 3), lines.append, {"FINETUNE_TEST_WORD": "told"})
    assert lines == ["step 0", "step 1", "step 2"]
    assert answer == Answer(answer.process, ["told", "日本"], float("inf"), [])
    assert answer.process != os.getpid()
    fresh_process.report("nobody listens here")


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize(
    ("what", "kind", "text"),
    [
        ("label", LabelError, "row 3: é is not text"),
        ("recipe", RecipeError, "r.yaml:1: a\nr.yaml:2: b"),
        ("missing", FileNotFoundError, "[Errno 2] No such file or directory: '/no/such/file'"),
        ("defect", ProcessFailed, "KeyError: 'name'"),
        ("kill", ProcessFailed, "its process ended with code -9: it was killed, most likely because memory ran out"),
        ("exit", ProcessFailed, "its process ended with code 3: last words"),
    ],
)
def test_an_error_is_raised_again(what: str, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as raised:
        call(work, Job(what))
    assert (type(raised.value), str(raised.value)) == (kind, text)
    if isinstance(raised.value, RecipeError):
        assert raised.value.faults == ["r.yaml:1: a", "r.yaml:2: b"]
    if what in ("kill", "exit"):
        assert isinstance(raised.value, ProcessFailed)
        assert raised.value.stderr == {"kill": "before it was killed\n", "exit": "first\nlast words\n"}[what]
        assert raised.value.code == {"kill": -9, "exit": 3}[what]


@pytest.mark.usefixtures("importable")
def test_standard_error_may_reach_the_user(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ProcessFailed, match=r"code 3: it wrote nothing to standard error$") as raised:
        call(work, Job("exit"), keep_stderr=False)
    assert raised.value.stderr == ""
    assert capfd.readouterr().err == "first\nlast words\n"


@pytest.mark.usefixtures("importable")
def test_an_error_while_listening_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[fresh_process.subprocess.Popen[str]] = []
    begin = fresh_process._start

    def start(*args: object) -> object:
        started.append(begin(*args))  # type: ignore[arg-type]
        return started[-1]

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fresh_process, "_start", start)
    with pytest.raises(KeyboardInterrupt):
        call(work, Job("work", 100_000), stop)
    assert started[0].poll() is not None


# ---------------------------------------------------------------------------------------------------------------
# Files


def write_half(path: Path) -> None:
    path.write_text("half", encoding="utf-8")
    raise ModelError("no room")


def test_a_file_is_complete_or_what_it_was(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    write_whole(file, "日本\n")
    assert file.read_text(encoding="utf-8") == "日本\n"
    with pytest.raises(ModelError), whole_file(file) as part:
        write_half(part)
    assert file.read_text(encoding="utf-8") == "日本\n"
    assert list(tmp_path.iterdir()) == [file]


def test_only_a_file_is_replaced_and_no_link_is_followed(tmp_path: Path) -> None:
    pipe, link, other = tmp_path / "pipe", tmp_path / "link", tmp_path / "other"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        with pytest.raises(RunError) as raised:
            write_whole(path, "new")
        assert str(raised.value) == (
            f"{path} is a device, a pipe or a socket, and only a file is replaced; write the path of a file"
        )
    assert pipe.is_fifo()
    assert link.is_symlink()
    with pytest.raises(RunError, match=f"{tmp_path} is a folder, and only a file is replaced"):
        write_whole(tmp_path, "new")
    # A folder of somebody else may hold links under the names that we write to.
    other.write_text("old", encoding="utf-8")
    for name in ("page", ".page.part"):
        (tmp_path / name).symlink_to(other)
    write_whole(tmp_path / "page", "new")
    assert (tmp_path / "page").read_text(encoding="utf-8") == "new"
    assert not (tmp_path / "page").is_symlink()
    assert other.read_text(encoding="utf-8") == "old"
    os.mkfifo(tmp_path / ".page.part")
    write_whole(tmp_path / "page", "newer")
    assert (tmp_path / "page").read_text(encoding="utf-8") == "newer"


def test_files_are_replaced_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = dict.fromkeys("abc", "old")
    write_together(tmp_path, texts)
    write = Path.write_text

    def fill_up(path: Path, text: str, encoding: str) -> int:
        if path.name == ".c.part":
            write(path, text[:1], encoding=encoding)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, text, encoding=encoding)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fill_up)
        with pytest.raises(OSError, match="No space") as raised:
            write_together(tmp_path, dict.fromkeys("abc", "new"))
    assert raised.value.filename == str(tmp_path)
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == texts


def test_a_full_disk_is_told_with_the_place_that_is_written(tmp_path: Path) -> None:
    def fill_up() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the file that is copied")

    for writes in (whole_folder(tmp_path / "out", False), whole_file(tmp_path / "out")):
        with pytest.raises(OSError, match="No space") as raised, writes:
            fill_up()
        assert raised.value.filename == str(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_complete_or_what_it_was(tmp_path: Path) -> None:
    output = tmp_path / "new" / "merged"
    with pytest.raises(ModelError), whole_folder(output, False) as folder:
        write_half(folder / "merge.json")
    assert list(tmp_path.iterdir()) == []  # nor the folder that was made above it
    for text in ("1", "2"):
        with whole_folder(output, True, [tmp_path / "run"]) as folder:
            assert not any(folder.iterdir())
            (folder / "merge.json").write_text(text, encoding="utf-8")
            assert (output / "merge.json").exists() == (text == "2")
        assert (output / "merge.json").read_text(encoding="utf-8") == text
    assert list(output.parent.iterdir()) == [output]


def test_a_folder_that_is_not_replaced(tmp_path: Path) -> None:
    def fault(output: Path, overwrite: bool = True, inputs: tuple[Path, ...] = ()) -> str:
        with pytest.raises(RunError) as raised, whole_folder(output, overwrite, inputs):
            pytest.fail("it was given a folder")
        return str(raised.value).replace(str(tmp_path), "T")

    file, run, merged = tmp_path / "file", tmp_path / "run", tmp_path / "merged"
    write_whole(file, "x")
    for folder, name in ((run, "recipe.yaml"), (merged, "merge.json")):
        folder.mkdir()
        write_whole(folder / name, "")
    assert fault(file) == "--output: T/file is a file; write the path of a new folder"
    assert fault(merged, False) == "--output: T/merged exists; write another path, or add --overwrite to replace it"
    assert fault(run).startswith("--output: T/run was not written by merge or export, and is not replaced;")
    inside = (merged / "checkpoint-2",)
    assert fault(merged, inputs=inside) == (
        "--output: T/merged contains T/merged/checkpoint-2, which is read; write another path"
    )
    with whole_folder(merged, True):
        assert fault(merged) == "--output: T/merged is being written by another process"
    assert (file.read_text(encoding="utf-8"), (run / "recipe.yaml").exists()) == ("x", True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "finetune"


def test_a_cached_folder_is_made_once(cache: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        (folder / "model.safetensors").write_text("weights", encoding="utf-8")
        (folder.parent / "download").write_text("temporary", encoding="utf-8")
        made.append(folder)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: made_once("bases/model-v1", make), range(4)))
    assert found == [cache / "bases/model-v1"] * 4
    assert len(made) == 1
    names = sorted(path.relative_to(cache).as_posix() for path in (cache / "bases").rglob("*"))
    assert [name for name in names if not name.endswith(".lock")] == [
        "bases/model-v1",
        "bases/model-v1/model.safetensors",
    ]


def test_a_cached_folder_that_failed_is_made_anew(cache: Path) -> None:
    killed = cache / ".model-v1.part" / "folder"
    killed.mkdir(parents=True)
    (killed / "half").write_text("", encoding="utf-8")
    with pytest.raises(ModelError, match="no room"):
        made_once("model-v1", lambda folder: write_half(folder / "half"))
    assert not (cache / "model-v1").exists()
    assert list(made_once("model-v1", lambda folder: None).iterdir()) == []
    assert not (cache / ".model-v1.part").exists()


def test_a_cache_that_cannot_be_written_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("FINETUNE_STAND_IN_CACHE", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = [made_once(name, lambda folder: (folder / "x").touch()) for name in ("bases/a", "b", "bases/a")]
    assert made[0] == made[2]
    assert all((folder / "x").is_file() for folder in made)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"the cache {tmp_path}/file/finetune cannot be written (Not a directory): {tmp_path}/finet")


def test_reading_json(tmp_path: Path) -> None:
    assert read_json(None) == read_json(tmp_path / "none.json") == {}
    for name, content, why in (
        ("cut.json", '{"a": ', r"^.*cut.json is damaged: Expecting value"),
        ("list.json", "[1]", r"^.*list.json is damaged: it holds no JSON object$"),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(RunError, match=why):
            read_json(tmp_path / name)
    write_whole(tmp_path / "a.json", '{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_reading_records(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_records(file) == []
    records = [{"step": 1, "text": "a\u2028b\x85c"}, {"step": 2}]
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records) + '{"step": 3', "utf-8")
    assert read_records(file) == records
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(RunError, match=r"metrics.jsonl:2 is damaged; remove the line$"):
        read_records(file)


def test_a_file_of_a_run_or_of_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    write_whole(tmp_path / "recipe.yaml", "")
    assert run_file(tmp_path, "recipe.yaml") == run_file(checkpoint, "recipe.yaml") == tmp_path / "recipe.yaml"
    write_whole(checkpoint / "recipe.yaml", "")
    assert run_file(checkpoint, "recipe.yaml") == checkpoint / "recipe.yaml"
    assert run_file(tmp_path, "ledger.json") is None
    (tmp_path / "exports").mkdir()
    assert run_file(tmp_path / "exports", "recipe.yaml") is None


def test_the_hash_of_a_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert cache_dir().name == "finetune"


# ---------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (numbers.memory(350 * 2**20), "350 MiB"),
        (numbers.memory(1), "1 MiB"),
        (numbers.memory(12.34 * numbers.GIB), "12.3 GiB"),
        (numbers.memory(2000 * numbers.GIB), "2,000.0 GiB"),
        (numbers.file_size(536_300_000), "536.3 MB"),
        (numbers.file_size(1_074_000_000), "1.07 GB"),
        (numbers.duration(0.352), "0.35 s"),
        (numbers.duration(42.4), "42 s"),
        (numbers.duration(119), "119 s"),
        (numbers.duration(210), "3.5 min"),
        (numbers.duration(3600), "60 min"),
        (numbers.duration(12 * 3600), "12 h"),
        (numbers.duration(6 * 86400), "6.0 days"),
        (numbers.duration(1500 * 86400), "1,500 days"),
        (numbers.clock(59.6), "1:00"),
        (numbers.clock(185), "3:05"),
        (numbers.clock(3753), "1:02:33"),
    ],
)
def test_sizes_and_durations(text: str, expected: str) -> None:
    assert text == expected


def test_a_markdown_table() -> None:
    assert numbers.markdown_table([["format", "KL"], ["a|b", 0.5]]) == [
        "| format | KL |",
        "|---|---|",
        "| a\\|b | 0.5 |",
    ]


# ---------------------------------------------------------------------------------------------------------------
# The packages' public names


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("cli", "main"),
        ("data", "Chat"),
        ("evaluate", "evaluate"),
        ("export", "export"),
        ("hub", "push"),
        ("merge", "merge"),
        ("model", "load_model"),
        ("model", "load_tokenizer"),
        ("plan", "plan"),
        ("recipe", "load_recipe"),
        ("train", "train"),
    ],
)
def test_a_package_has_its_public_names(package: str, name: str) -> None:
    module = importlib.import_module(f"finetune.{package}")
    assert callable(getattr(module, name))
    assert f"{name}(" in str(module.__doc__)
    with pytest.raises(AttributeError, match=f"^module 'finetune.{package}' has no attribute 'nothing'$"):
        module.nothing  # noqa: B018


# ---------------------------------------------------------------------------------------------------------------
# Bad days

WAITING = """
import os, sys, time
from finetune.system.fresh_process import call, report
def wait(seconds: int) -> int:
    report(str(os.getpid()))
    time.sleep(seconds)
    return seconds
"""
PARENT = "from waiting import *; call(wait, 60, on_line=lambda line: print(line, flush=True))"


@pytest.mark.slow
def test_a_fresh_process_does_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text(WAITING)
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-P", "-c", PARENT]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        os.kill(child, 0)  # it runs
        parent.kill()
    end = time.monotonic() + 1
    while time.monotonic() < end and Path(f"/proc/{child}").exists():
        time.sleep(0.02)
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"  # its new parent may not have looked yet


def test_a_locked_folder_is_for_one_process(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with locked_folder(folder, "training.output_dir"):
        with pytest.raises(RunError) as refused, locked_folder(folder, "training.output_dir"):
            pytest.fail("it was given the folder")
        assert str(refused.value) == (
            f"training.output_dir: another process is training into {folder}; wait for its end, or write another "
            "directory"
        )
    assert list(tmp_path.iterdir()) == []  # nothing was put there
    folder.mkdir(parents=True)
    (folder / files.LOCK).touch()  # of a killed process
    with locked_folder(folder, "training.output_dir"):
        (folder / "recipe.yaml").touch()
    assert list(folder.iterdir()) == [folder / "recipe.yaml"]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(28, "No space left on device"), True),
        (OSError(122, "Disk quota exceeded"), True),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (OSError(30, "Read-only file system"), False),
        (OSError(13, "Permission denied"), False),
        (RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"), False),
    ],
)
def test_a_full_disk_is_known_by_its_error(error: Exception, full: bool) -> None:
    assert files.is_full(error) == full
    with pytest.raises(ValueError, match="cannot be saved") as raised:
        raise ValueError("cannot be saved") from error
    assert files.is_full(raised.value) == full
