"""Damaged files and replies, by the thousand: each ends with 0 or 2 and lines that a user can read, in bounded memory.

    .venv/bin/python -m pytest -m soak tests/test_fuzz.py -s
    FINETUNE_FUZZ_SECONDS=600 FINETUNE_FUZZ_SEED=7 ...    longer, and other inputs

Each input runs in a process that is forked for it, with limits of time and memory, so that one that hangs is a failure
like any other. The first bytes of a failing input stay in pytest's temporary folder.
"""

import gzip
import importlib
import json
import os
import random
import re
import resource
import shutil
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from gguf_tiny import make_model, make_tokenizer, write_gguf
from judge_server import Answer, says, serve

from finetune.cli.arguments import ExitCode
from finetune.cli.commands import main
from finetune.evaluate.judge import Judge, Pair, compare
from finetune.hub.card import folder_card
from finetune.system import limited
from finetune.system.errors import EvaluateError, FinetuneError
from finetune.system.pages import visible
from finetune.system.terminal import print_line

SECONDS = float(os.environ.get("FINETUNE_FUZZ_SECONDS", "15"))
SEED = int(os.environ.get("FINETUNE_FUZZ_SEED", "1"))
# The limits of an input's process: seconds of processor time, and bytes beyond those that the imports take.
CPU_SECONDS = 40
BYTES = 3 << 30
ABSURD = [
    *(0, -1, 1, 2**31, 2**63, 10**30, -(10**15), 0.5, 1e308, -0.0, float("inf"), float("nan"), True, False, None, ""),
    *("a", "\x1b[2J", "\u202e", "\ud800", "../../x", "nan", "x" * 5000, [], {}, [[]], [1], {"a": 1}, ["a", None]),
]


def mutate_json(value: Any, rng: random.Random) -> Any:
    """The value with one to three of its parts replaced, removed or repeated."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = [(None, None)]
        left = [value]
        while left:
            item = left.pop()
            if isinstance(item, dict | list):
                keys = list(item) if isinstance(item, dict) else range(len(item))
                places += [(item, key) for key in keys]
                left += item.values() if isinstance(item, dict) else item
        holder, key = rng.choice(places)
        new = rng.choice(ABSURD)
        if holder is None:
            value = new if rng.random() < 0.1 else value
        elif rng.random() < 0.2 and isinstance(holder, dict):
            del holder[key]
        elif rng.random() < 0.1 and isinstance(holder, dict):
            holder[str(new)[:20]] = holder[key]
        else:
            holder[key] = new
    return value


def mutate_bytes(data: bytes, rng: random.Random, within: int | None = None) -> bytes:
    """The bytes with one to four changes, all before `within`."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        end = max(1, min(len(made), within or len(made)))
        at = rng.randrange(end)
        size = rng.choice((1, 1, 2, 8, 40))
        kind = rng.randrange(6)
        if kind == 0:
            made[at : at + size] = rng.randbytes(size)
        elif kind == 1:
            del made[at : at + size]
        elif kind == 2:
            made[at:at] = made[max(0, at - size) : at]
        elif kind == 3:
            made[at:at] = rng.choice((b"\0", b"\xff\xfe", b"\x1b[2J", "\u202e".encode(), b"[" * 200, b"9" * 400, b"\n"))
        elif kind == 4 and end > 8:
            made[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1)))
        elif len(made) > 20:
            del made[rng.randrange(len(made) // 2, len(made)) :]
    return bytes(made)


def mutate_file(data: bytes, rng: random.Random) -> bytes:
    """A file of JSON with other values, or now and then with other bytes."""
    return json.dumps(mutate_json(json.loads(data), rng)).encode() if rng.random() < 0.8 else mutate_bytes(data, rng)


def in_a_process(call: Callable[[], int]) -> tuple[int, str, float, int]:
    """Exit code (negative: a limit), standard error, seconds and peak memory in KiB of a call in a forked process."""
    read, write = os.pipe()
    begun = time.monotonic()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.close(read)
            os.dup2(write, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            sys.stderr = os.fdopen(2, "w", closefd=False, errors="backslashreplace")
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + BYTES,) * 2)
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS,) * 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            code = call()
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException as error:
            print(f"raised {type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    with open(read, "rb") as pipe:
        said = pipe.read(1 << 20).decode("utf-8", "replace")
    _, status, used = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), said, time.monotonic() - begun, used.ru_maxrss


def fault_of(code: int, said: str) -> str:
    """Why an input's end is not one that a user can live with; empty if it is."""
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if code not in (ExitCode.OK, ExitCode.USER_ERROR, ExitCode.MISSED):
        return f"code {code}: {said.strip()[-300:]}"
    if code == 2 and not lines:
        return f"no line: {said[-300:]}"
    if code == 2 and any("bug in finetune" in line or len(line) > 3000 for line in lines):
        return f"line: {lines[-1][:300]}"
    if any(visible(line) != line for line in lines):
        return f"control characters: {lines!r}"
    return ""


# ---------------------------------------------------------------------------------------------------------------
# The inputs: each writes one into the working directory, and returns what runs it


Input = Callable[[random.Random], Callable[[], int]]
ROWS = [json.loads(line) for line in (ROOT / "data" / "chat_sample.jsonl").read_text().splitlines()[:6]]
RECIPE = """\
model: {name_or_path: "random:gemma3", dtype: float32}
data: &data
  train: [{path: rows.jsonl}, {<<: {path: rows.jsonl, weight: 2.0}}]
  on_overflow: drop
lora: {r: 4, target_modules: "all-linear", rank_pattern: {q_proj: 2}}
training: {output_dir: run, max_steps: 2, learning_rate: 2e-4, max_length: 128, logging_steps: 1}
evaluate: {limit: 3, max_new_tokens: 4}
"""


def quiet(*argv: str) -> Callable[[], int]:
    return lambda: main([*argv, "--quiet"])


def write_rows(rows: Any = ROWS, path: str = "rows.jsonl") -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_recipe(path: str = "rows.jsonl", template: str | None = None) -> None:
    text = RECIPE.replace("[{path: rows.jsonl}, {<<: {path: rows.jsonl, weight: 2.0}}]", f"[{{path: {path}}}]")
    Path("r.yaml").write_text(text.replace("dtype:", f"chat_template: {template}, dtype:") if template else text)


def recipe(rng: random.Random) -> Callable[[], int]:
    write_rows()
    Path("r.yaml").write_bytes(mutate_bytes(RECIPE.encode(), rng))
    return quiet("check", "r.yaml")


def override(rng: random.Random) -> Callable[[], int]:
    write_rows()
    Path("r.yaml").write_text(RECIPE)
    key = rng.choice(
        ("training.max_steps", "lora.r", "training.max_length", "lora.rank_pattern", "data.train", "model")
    )
    value = rng.choice(ABSURD)
    return quiet("plan", "r.yaml", f"{key}={json.dumps(value)}")


def rows(rng: random.Random) -> Callable[[], int]:
    name = rng.choice(("rows.jsonl", "rows.json", "rows.csv", "rows.jsonl.gz"))
    made = [mutate_json(row, rng) for row in ROWS] if rng.random() < 0.6 else ROWS
    text = "".join(json.dumps(row) + "\n" for row in made)
    text = json.dumps(made) if name == "rows.json" else text
    text = "prompt,completion\n" + "a,b\n" * 5 if name == "rows.csv" else text
    data = text.encode()
    data = gzip.compress(data) if name.endswith(".gz") else data
    Path(name).write_bytes(data if made is not ROWS and name != "rows.csv" else mutate_bytes(data, rng))
    write_recipe(name)
    return quiet("inspect", "r.yaml", "--rows", "1")


def template(rng: random.Random) -> Callable[[], int]:
    write_rows()
    source = (
        ROOT / "finetune" / "data" / "chat_templates" / f"{rng.choice(('gemma3', 'chatml', 'llama3'))}.jinja"
    ).read_bytes()
    Path("t.jinja").write_bytes(mutate_bytes(source, rng))
    write_recipe(template="t.jinja")
    return quiet("inspect", "r.yaml", "--rows", "1")


def model_file(*names: str) -> Input:
    def made(rng: random.Random) -> Callable[[], int]:
        name = rng.choice([name for name in names if Path("base", name).is_file()])
        data = Path("base", name).read_bytes()
        shutil.rmtree("model", ignore_errors=True)
        shutil.copytree("base", "model")
        if name.endswith(".json"):
            data = (
                json.dumps(mutate_json(json.loads(data), rng)).encode()
                if rng.random() < 0.8
                else mutate_bytes(data, rng)
            )
        else:
            size = int.from_bytes(data[:8], "little")
            if rng.random() < 0.6:
                head = json.dumps(mutate_json(json.loads(data[8 : 8 + size]), rng)).encode()
                data = len(head).to_bytes(8, "little") + head + data[8 + size :]
            else:
                data = mutate_bytes(data, rng, 8 + size)
        Path("model", name).write_bytes(data)
        return lambda: main(["generate", "model", "--prompt", "Hi", "--max-new-tokens", "1", "--device", "cpu"])

    return made


def adapter_file(rng: random.Random) -> Callable[[], int]:
    name = rng.choice(("adapter_config.json", "adapter_config.json", "recipe.yaml", "tokenizer_config.json"))
    data = Path("trained", name).read_bytes()
    shutil.rmtree("copy", ignore_errors=True)
    shutil.copytree("trained", "copy")
    whole = (
        json.dumps(mutate_json(json.loads(data), rng)).encode() if name.endswith(".json") else mutate_bytes(data, rng)
    )
    Path("copy", name).write_bytes(whole)
    verb = rng.random()
    if verb < 0.2:
        return lambda: main(["check-adapter", "copy", "--for", "vllm"])
    if verb < 0.25:
        shutil.rmtree("merged", ignore_errors=True)
        return quiet("merge", "copy", "--output", "merged")
    return lambda: main(["generate", "copy", "--prompt", "Hi", "--max-new-tokens", "1", "--device", "cpu"])


def run_record(rng: random.Random) -> Callable[[], int]:
    names = [file.name for file in Path("trained").iterdir() if file.suffix in (".json", ".jsonl")]
    name = rng.choice(sorted(names))
    data = Path("trained", name).read_bytes()
    shutil.rmtree("copy", ignore_errors=True)
    shutil.copytree("trained", "copy")
    if name.endswith(".jsonl"):
        made = "".join(json.dumps(mutate_json(json.loads(line), rng)) + "\n" for line in data.splitlines()).encode()
    else:
        made = json.dumps(mutate_json(json.loads(data), rng)).encode()
    Path("copy", name).write_bytes(made)
    return quiet("report", "copy") if rng.random() < 0.5 else card


def card() -> int:
    try:
        return 0 if folder_card(Path("copy")) else 1
    except FinetuneError as error:
        print_line(f"error: {error}")
        return 2


def checkpoint(rng: random.Random) -> Callable[[], int]:
    name = rng.choice(sorted(file.name for file in Path("trained/checkpoint-1").iterdir()))
    shutil.rmtree("copy", ignore_errors=True)
    shutil.copytree("trained", "copy")
    file = Path("copy/checkpoint-1", name)
    data = file.read_bytes()
    whole = mutate_file(data, rng) if name.endswith(".json") else mutate_bytes(data, rng, rng.choice((None, 400)))
    # A checkpoint counts only if its files have the sizes that they were saved with.
    file.write_bytes(whole if name.endswith(".json") else whole[: len(data)].ljust(len(data), b"\0"))
    write_rows()
    write_recipe()
    return quiet("train", "r.yaml", "training.output_dir=copy", "training.resume_from_checkpoint=copy/checkpoint-1")


def gguf_file(rng: random.Random) -> Callable[[], int]:
    Path("m.gguf").write_bytes(mutate_bytes(Path("tiny.gguf").read_bytes(), rng, rng.choice((40, 400, 4000))))
    shutil.rmtree("cache2", ignore_errors=True)
    os.environ["XDG_CACHE_HOME"] = str(Path("cache2").resolve())
    return lambda: main(["generate", "m.gguf", "--prompt", "Hi", "--max-new-tokens", "1", "--device", "cpu"])


def reply(rng: random.Random) -> Callable[[], int]:
    body = says('Reasons.\n{"grade": "BetterThan"}').body
    data = (
        json.dumps(mutate_json(body, rng)).encode()
        if rng.random() < 0.7
        else mutate_bytes(json.dumps(body).encode(), rng)
    )
    status = rng.choice((200, 200, 200, 400, 404, 429, 500))

    def call() -> int:
        import finetune.evaluate.endpoint as endpoint

        endpoint._wait = lambda stop, seconds: False
        endpoint._MAX_TRIES = 2
        os.environ["NO_PROXY"] = "127.0.0.1"
        pair = Pair([{"role": "user", "content": "Hi"}], "a", "b", "p")
        with serve(lambda request: Answer(status, data)) as server:
            try:
                result = compare([pair], Judge(server.url, "m", key="k" * 20), Path("judged"))
                json.dumps(result.as_dict(), ensure_ascii=False).encode()
                return 0
            except EvaluateError as error:
                print_line(f"error: {error}")
                return 2

    shutil.rmtree("judged", ignore_errors=True)
    return call


INPUTS: dict[str, Input] = {
    "recipe": recipe,
    "override": override,
    "rows": rows,
    "template": template,
    "config": model_file("config.json", "generation_config.json"),
    "tokenizer": model_file("tokenizer.json", "tokenizer_config.json"),
    "safetensors": model_file("model.safetensors"),
    "adapter": adapter_file,
    "record": run_record,
    "checkpoint": checkpoint,
    "gguf": gguf_file,
    "judge": reply,
}


def make_gguf() -> int:
    tokenizer = make_tokenizer()
    write_gguf(make_model(len(tokenizer)), tokenizer, Path("tiny.gguf"))
    return 0


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tiny base, a run and a GGUF file, all sound."""
    from finetune.model.locate import locate

    folder = tmp_path_factory.mktemp("fuzz")
    before = Path.cwd()
    os.chdir(folder)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    try:
        shutil.copytree(locate("random:gemma3"), "base")
        write_rows()
        write_recipe()
        for name in (
            "trl.trainer.sft_trainer",
            "peft.tuners.lora.bnb",
            "gguf",
            "transformers.models.qwen2.modeling_qwen2",
        ):
            importlib.import_module(name)
        # In processes of their own: nothing may have started threads before the forks.
        saves = ("training.output_dir=trained", "training.save_strategy=steps", "training.save_steps=1")
        for call in (make_gguf, quiet("train", "r.yaml", *saves), quiet("inspect", "r.yaml")):
            code, said, *_ = in_a_process(call)
            assert code == 0, said
        yield folder
    finally:
        os.chdir(before)


@pytest.mark.soak
@pytest.mark.parametrize("kind", INPUTS)
def test_damaged_input_is_told(
    kind: str, material: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(limited, "run", request.getfixturevalue("_trusted"))
    monkeypatch.chdir(material)
    monkeypatch.setenv("XDG_CACHE_HOME", os.environ["XDG_CACHE_HOME"])
    failures: dict[str, str] = {}
    codes: Counter[int] = Counter()
    longest, most, tried, end = 0.0, 0, 0, time.monotonic() + SECONDS
    while time.monotonic() < end:
        rng = random.Random(f"{SEED} {kind} {tried}")
        code, said, seconds, memory = in_a_process(INPUTS[kind](rng))
        codes[code] += 1
        longest, most, tried = max(longest, seconds), max(most, memory), tried + 1
        if why := fault_of(code, said):
            failures.setdefault(re.sub(r"\d+|0x\w+", "N", why)[-120:], f"{kind} {tried - 1}: {why}")
    print(f"\n{kind}: {tried} inputs, seed {SEED}, codes {dict(codes)}, longest {longest:.1f} s, most {most >> 10} MiB")
    assert not failures, "\n".join(failures.values())
