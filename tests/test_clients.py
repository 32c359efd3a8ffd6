"""Real programs read what we write, and compute what our own transformers computes: tier `clients`, by hand.

`make clients` runs it, and needs a package index: each program gets an environment of its own, once, under the cache
directory. What was seen is written to docs/clients.json, from which docs/reference.py makes the tables of
docs/clients.md.
"""

import datetime
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clients.artefacts import ARTEFACTS, BASES, Artefact, artefact, make
from clients.cases import CLIENTS, IGNORES, REFUSES, SERVERS, TAKES, Client, server_takes
from clients.compare import Comparison, compare
from clients.environments import ask, python_with
from clients.protocol import CONVERSATIONS, TEXTS
from conftest import ROOT, USER_CACHE
from transformers import AutoConfig, AutoTokenizer

from finetune.model.adapter_readers import READERS, check_adapter

# The name of an artefact, and of its base.
Case = tuple[str, str]
# A probe's answer to each case, and the file of its logits.
Answers = dict[Case, tuple[dict[str, Any], Path]]
RESULTS = ROOT / "docs" / "clients.json"
CASES = [
    pytest.param(client, name, base, id=f"{client.name}-{name}-{base}")
    for client in CLIENTS
    for name in ARTEFACTS
    for base in BASES
    if client.expected(name, base)
]

pytestmark = pytest.mark.clients


SERVER_CASES = [(program, name, base) for program, parts in SERVERS.items() for name in parts for base in BASES]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artefacts; those in the folder that FINETUNE_CLIENTS names are used again."""
    given = os.environ.get("FINETUNE_CLIENTS")
    place = Path(given) if given else tmp_path_factory.mktemp("clients") / "artefacts"
    if not place.is_dir():
        make(place)
    return place


@pytest.fixture(scope="session")
def reference(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """The answers of our own transformers, about the artefacts that the chosen tests need."""
    chosen = [item.callspec.params for item in request.session.items if "client" in item.fixturenames]
    cases = {(artefact(folder, params["name"], params["base"]).reference, params["base"]) for params in chosen}
    own = {case: artefact(folder, *case) for case in sorted(cases)}
    return _ask(sys.executable, "probe_transformers.py", own, own, tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="session")
def answers(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Client], Answers]:
    """A function of a program: its answers about all artefacts that it is asked about."""

    @functools.cache
    def of(client: Client) -> Answers:
        with pytest.MonkeyPatch.context() as patch:
            if USER_CACHE:
                patch.setenv("XDG_CACHE_HOME", USER_CACHE)
            else:
                patch.delenv("XDG_CACHE_HOME", raising=False)
            python = python_with(client.packages)
        cases = [(name, base) for name in ARTEFACTS for base in BASES if client.expected(name, base)]
        places = {case: artefact(folder, *case) for case in cases}
        sources = {case: artefact(folder, place.reference, case[1]) for case, place in places.items()}
        return _ask(python, client.probe, places, sources, tmp_path_factory.mktemp("answers"))

    return of


@pytest.fixture(scope="session")
def record() -> Iterator[Any]:
    """A function that notes a result; earlier ones of the same case are replaced."""
    found: dict[str, dict[str, Any]] = {}

    def note(program: str, name: str, base: str, verdict: str, why: str, seen: Comparison) -> None:
        found[f"{program} | {name} | {base}"] = {
            "verdict": verdict,
            "largest": seen.largest,
            "kl": seen.kl,
            "greedy": seen.greedy,
            "error": seen.error,
            "why": why,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }

    yield note
    earlier = json.loads(RESULTS.read_text(encoding="utf-8"))
    known = [f"{client.name} | {name} | {base}" for client, name, base in (case.values for case in CASES)]
    known += [f"{_server(program)} | {name} | {base}" for program, name, base in SERVER_CASES]
    kept = {key: (earlier | found)[key] for key in known if key in earlier | found}
    RESULTS.write_text(json.dumps(kept, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _ask(
    python: str | Path, probe: str, places: dict[Case, Artefact], sources: dict[Case, Artefact], work: Path
) -> Answers:
    """A probe's answer to each case, and the file of its logits.

    Args:
        python: The Python to run it with.
        probe: A script in tests/clients.
        places: The artefacts that it reads.
        sources: The models whose tokenizers, read by our own transformers, give the token ids to ask about.
        work: An empty folder.
    """
    files = {case: work / f"{number}.npz" for number, case in enumerate(places)}
    jobs = [
        _questions(sources[case])
        | {"name": " ".join(case), "path": str(place.path), "adapter": place.adapter and str(place.adapter)}
        | {"quantised": place.quantised, "logits": str(files[case])}
        for case, place in places.items()
    ]
    found = ask(python, probe, jobs, work)
    return {case: (found[" ".join(case)], files[case]) for case in places}


@functools.cache
def _questions(source: Artefact) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(source.adapter or source.path)
    prompt = tokenizer.apply_chat_template(CONVERSATIONS[0], tokenize=True, add_generation_prompt=True)
    return {
        "texts": [tokenizer(text)["input_ids"] for text in TEXTS],
        "prompt": list(prompt["input_ids"]),
        "bos": tokenizer.bos_token,
        "vocabulary": AutoConfig.from_pretrained(source.path).vocab_size,
    }


@pytest.mark.parametrize(("client", "name", "base"), CASES)
def test_it_is_read_as_expected(
    client: Client,
    name: str,
    base: str,
    folder: Path,
    reference: Answers,
    answers: Callable[[Client], Answers],
    record: Callable[..., None],
) -> None:
    expected = client.expected(name, base)
    assert expected
    seen = compare(*reference[artefact(folder, name, base).reference, base], *answers(client)[name, base])
    verdict = seen.verdict(expected.max_kl)
    record(client.name, name, base, verdict, expected.why, seen)
    assert verdict == expected.verdict, seen
    if verdict == REFUSES:
        assert expected.says in seen.error


def _server(program: str) -> str:
    return f"{READERS[program].name} (not run: by its source)"


@pytest.mark.parametrize(("program", "name", "base"), SERVER_CASES)
def test_a_server_takes_it_by_its_source(
    program: str, name: str, base: str, folder: Path, record: Callable[..., None]
) -> None:
    place = artefact(folder, name, base)
    if place.adapter:
        problems = check_adapter(place.adapter, program, str(place.path)).problems
    else:
        config = json.loads((place.path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        problems = [] if server_takes(config) else [f"it {REFUSES} such a quantization_config"]
    verdict = TAKES if not problems else REFUSES if REFUSES in problems[0] else IGNORES
    record(
        _server(program),
        name,
        base,
        verdict,
        "; ".join(problems).removeprefix(f"{READERS[program].name} "),
        Comparison({}, None, None, None, ""),
    )
    assert verdict == SERVERS[program][name]
