"""A command of this tree against the same command of an earlier commit, in turns.

    python benchmarks/commands.py --before COMMIT [--rounds N] COMMAND ...
    python benchmarks/commands.py --before 5230b89 check recipes/quickstart.yaml

Both are run once before they are measured, so that both find a filled cache. Relative paths are those of each tree;
`{output}` in an argument is a path that does not exist. Prints a row for docs/benchmarks.md: medians of seconds, then
of processor seconds, each with the median of the pairs' ratios.
"""

import argparse
import datetime
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def timed(tree: Path, command: list[str]) -> tuple[float, float]:
    """Seconds and processor seconds of one run of the command, which must end with 0."""
    with tempfile.TemporaryDirectory() as folder:
        words = [word.replace("{output}", f"{folder}/output") for word in command]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "finetune", *words],
            check=True,
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(before: str, rounds: int, command: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        earlier = Path(folder) / "earlier"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(earlier), before], check=True)
        try:
            trees = (earlier, ROOT)
            for tree in trees:
                timed(tree, command)
            pairs = [tuple(timed(tree, command) for tree in trees) for _ in range(rounds)]
        finally:
            subprocess.run([*git, "remove", "--force", str(earlier)], check=True)
    row = [str(datetime.date.today()), f"`{' '.join(command)}`", before]
    for kind in range(2):  # seconds, processor seconds
        was, now = ([pair[i][kind] for pair in pairs] for i in range(2))
        ratio = statistics.median(b / a for a, b in zip(was, now, strict=True))
        row += [f"{statistics.median(was):.2f}", f"{statistics.median(now):.2f}", f"{ratio:.2f}"]
    print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A command against that of an earlier commit.")
    parser.add_argument("--before", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    settings = parser.parse_args()
    main(settings.before, settings.rounds, settings.command)
