"""A training step's matrix products with torch's own way to wait for a thread, and with ours, in turns.

    python benchmarks/waiting.py [--rounds N] [--seconds S]

Each round measures both on the machine as it is, and beside one busy process a core. Two threads; the products are
those of a layer of Gemma 3 270M, forward and backward, on 512 tokens. Prints a row for docs/benchmarks.md: medians of
iterations a second, and the medians of the ratios of the pairs.
"""

import argparse
import contextlib
import datetime
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator

_LOOP = """
import sys, time, torch
torch.set_num_threads(2)
x = torch.randn(512, 640, requires_grad=True)
weights = [torch.randn(2048, 640), torch.randn(2048, 640), torch.randn(640, 2048)]
count, end = 0, None
while end is None or time.monotonic() < end:
    gate, up, down = weights
    (torch.nn.functional.gelu(x @ gate.t()) * (x @ up.t()) @ down.t()).sum().backward()
    count += 1
    if end is None and count == 5:
        count, end = 0, time.monotonic() + float(sys.argv[1])
print(count / float(sys.argv[1]))
"""


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` processes that compute without end."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def rate(policy: str | None, seconds: float) -> float:
    """Iterations a second of a fresh process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    if policy:
        environment["OMP_WAIT_POLICY"] = policy
    command = [sys.executable, "-c", _LOOP, str(seconds)]
    return float(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main(rounds: int, seconds: float) -> None:
    row = [str(datetime.date.today())]
    for load in (0, os.cpu_count() or 1):
        with busy(load):
            pairs = [(rate(None, seconds), rate("passive", seconds)) for _ in range(rounds)]
        medians = [statistics.median(pair[i] for pair in pairs) for i in range(2)]
        row += [f"{median:.1f}" for median in medians]
        row.append(f"{statistics.median(passive / own for own, passive in pairs):.2f}")
    print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Ways to wait for a thread.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5)
    settings = parser.parse_args()
    main(settings.rounds, settings.seconds)
