"""The verdict on another program's reading of a model, which the tier `clients` rests on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clients.cases import CLIENTS, LOSSY, REFUSES, SAME, WRONG, server_takes
from clients.compare import compare

LOGITS = np.random.default_rng(0).normal(size=(6, 20)).astype(np.float32)
ANSWER: dict[str, Any] = {"errors": {}, "ids": [[1, 2]], "prompt": ["<s>Hi"], "logits": True, "greedy": [3, 4, 5]}


@pytest.mark.parametrize(
    ("changed", "logits", "max_kl", "verdict", "greedy"),
    [
        ({}, LOGITS, 0.0, SAME, (3, 3)),
        ({}, LOGITS + 7, 0.0, SAME, (3, 3)),  # the same probabilities
        ({}, LOGITS[-1:], 0.0, SAME, (3, 3)),  # a server that tells the last token's alone
        ({}, np.pad(LOGITS, ((0, 0), (0, 4))), 0.0, SAME, (3, 3)),  # a vocabulary that is filled up
        ({"errors": {}}, LOGITS[:, :18], 0.0, SAME, (3, 3)),  # or cut to the tokenizer's
        ({"ids": [[1, 1, 2]]}, LOGITS, 0.0, WRONG, (3, 3)),
        ({"prompt": ["Hi"]}, LOGITS, 0.0, WRONG, (3, 3)),
        ({"greedy": [3, 9, 5]}, LOGITS, 0.0, WRONG, (1, 3)),
        ({}, LOGITS * 1.1, 0.0, WRONG, (3, 3)),
        ({"greedy": [3, 9, 5]}, LOGITS * 1.1, 0.01, LOSSY, (1, 3)),
        ({"greedy": [3, 9, 5]}, LOGITS * 2, 0.01, WRONG, (1, 3)),
        ({"errors": {"ids": "ValueError: no"}}, LOGITS, 0.0, REFUSES, (3, 3)),
    ],
)
def test_the_verdict(
    changed: dict[str, Any], logits: Any, max_kl: float, verdict: str, greedy: tuple[int, int], tmp_path: Path
) -> None:
    np.savez(tmp_path / "own.npz", LOGITS)
    np.savez(tmp_path / "found.npz", logits)
    seen = compare(ANSWER, tmp_path / "own.npz", ANSWER | changed, tmp_path / "found.npz")
    assert (seen.verdict(max_kl), seen.greedy) == (verdict, greedy)


def test_a_program_that_does_not_load_it_refuses_it(tmp_path: Path) -> None:
    seen = compare(ANSWER, tmp_path / "own.npz", {"errors": {"load": "KeyError: 'x'"}}, tmp_path / "found.npz")
    assert (seen.verdict(0.0), seen.error, seen.largest) == (REFUSES, "KeyError: 'x'", None)


def test_each_case_says_why_it_is_not_the_same() -> None:
    for client in CLIENTS:
        for expected in client.reads.values():
            assert (expected.verdict == SAME) == (not expected.why)
            assert (expected.verdict == REFUSES) == bool(expected.says)
            assert (expected.verdict == LOSSY) == (expected.max_kl > 0)


@pytest.mark.parametrize(
    ("changed", "takes"),
    [({}, True), ({"dynamic": True}, False), ({"symmetric": False}, False), ({"strategy": "attn_head"}, False)],
)
def test_what_a_server_has_a_scheme_for(changed: dict[str, Any], takes: bool) -> None:
    weights = {"type": "int", "num_bits": 4, "dynamic": False, "symmetric": True, "strategy": "group"} | changed
    group = {"weights": weights, "input_activations": None, "targets": ["Linear"]}
    assert server_takes({"config_groups": {"group_0": group}, "format": "pack-quantized"}) == takes
