"""How often the language of an answer is judged rightly, and how quickly.

    FINETUNE_REAL_DATA=FOLDER python benchmarks/language.py [ROUNDS]

Precision and recall of both verdicts on 120 real answers of Gemma models, each labelled by reading it (they are in the
folder named by FINETUNE_REAL_DATA), on our own cases, and on those of them that were written only when the judge was
done. Then answers per second on the real answers (the median of ROUNDS, five), seconds to load the identifier, and MiB
that it takes. Prints rows for docs/benchmarks.md.
"""

import datetime
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from finetune.evaluate.language import language_of, language_verdict

TESTS = Path(__file__).parents[1] / "tests"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def share(part: int, whole: int) -> str:
    return f"{part / whole:.3f} ({part}/{whole})" if whole else "-"


def row(name: str, cases: list[dict[str, Any]]) -> str:
    """Precision and recall of `wrong` and of `right`; cases that hold nothing to judge count in neither recall."""
    found = [language_verdict(case["prompt"], case["answer"]).right for case in cases]
    cells = []
    for which in (False, True):
        both = sum(case["right"] is which and right is which for case, right in zip(cases, found, strict=True))
        cells.append(share(both, sum(right is which for right in found)))
        cells.append(share(both, sum(case["right"] is which for case in cases)))
    return f"| {name} | {len(cases)} | {' | '.join(cells)} |"


def resident() -> float:
    [line] = [each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def main(rounds: int) -> None:
    before, begun = resident(), time.perf_counter()
    assert language_of("The identifier is loaded by the first text that needs it.") == "en"
    load, memory = time.perf_counter() - begun, resident() - before
    cases = read(TESTS / "language_cases.jsonl")
    sets = {"own cases": cases, "of these, written blind": [case for case in cases if case["blind"]]}
    folder = os.environ.get("FINETUNE_REAL_DATA")
    if folder:
        answers = read(Path(folder, "gemma_japanese_answers.jsonl"))
        labels = read(TESTS / "language_labels.jsonl")
        real = [answers[label["row"]] | {"right": label["right"]} for label in labels]
        sets = {"real answers": real} | sets | {"all": real + cases}
    print("| cases | count | wrong: precision | recall | right: precision | recall |")
    for name, some in sets.items():
        print(row(name, some))
    timed = sets.get("real answers", cases)
    rates = []
    for _ in range(rounds):
        begun = time.perf_counter()
        for case in timed:
            language_verdict(case["prompt"], case["answer"])
        rates.append(len(timed) / (time.perf_counter() - begun))
    mean = statistics.mean(len(case["answer"]) for case in timed)
    print("| date | answers | mean characters | answers/s | load, s | MiB |")
    print(
        f"| {datetime.date.today()} | {len(timed)} | {mean:,.0f} | {statistics.median(rates):.0f} | {load:.2f} "
        f"| {memory:.0f} |"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 5)
