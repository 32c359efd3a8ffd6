"""Merges adapters into their base, one tensor at a time: at most one tensor and one product are in memory.

Every number equals that of PEFT's `merge_and_unload()`, which `tests/test_merge.py` compares bit for bit, with one
exception: if only one of two tied embeddings was trained, PEFT changes both, unlike the run itself. Here the other one
keeps its values, and both are stored.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import __version__
from finetune.merge.request import CONVERTED, MergeRequest, adapters_of
from finetune.model.provenance import MergeRecord, adapter_below, is_adapter
from finetune.system import fresh_process
from finetune.system.errors import MergeError
from finetune.system.files import ADAPTER_WEIGHTS, MERGE_RECORD, check_apart, run_file, sha256, whole_folder
from finetune.system.terminal import Say

if TYPE_CHECKING:
    from finetune.merge.plan import MergePlan


def merge(
    run: str | Path,
    output: str | Path,
    dtype: str | None = None,
    base: str = "original",
    adapters: Sequence[tuple[str, float]] = (),
    max_shard_size: str = "5GB",
    stream_base: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    say: Say = lambda line: None,
    progress: bool = False,
) -> Path:
    """Merges a run into its base: writes weights, config, tokenizer and template that `from_pretrained` loads.

    Args:
        run: A run directory, one of its checkpoints, or any folder with a PEFT adapter.
        output: The folder to write, which must not exist yet.
        dtype: `float32`, `bfloat16` or `float16`. By default the dtype that the run trained in, in which every number
            equals PEFT's.
        base: `original`; `dequantised`: the rounded weights that a 4- or 8-bit run trained on; or the path or id of the
            original base, in place of the one that the run's files name.
        adapters: Further adapters of the same base and their weights; the run's own has weight 1 unless it is listed.
        max_shard_size: The size at which a new weight file begins, such as 5GB or 500MB.
        stream_base: Fetches the weight files of a base on the Hub one by one, and removes each when it is used up.
        overwrite: Replaces the result of an earlier merge or export in `output`, once the new one is complete.
        trust_remote_code: True if the user lets Python files of the model's repository run.
        say: Called with each line for the user.
        progress: Shows a progress bar on a terminal.

    Returns:
        `output`.

    Raises:
        MergeError: An adapter was trained on another base, is not finite, or has a part that cannot be merged.
        ModelError: The base is missing or damaged.
        RunError: A file of the run is damaged, or `output` exists or is being written by another process.
    """
    run, output = Path(run), Path(output)
    _check_adapters(run, adapters)
    max_bytes = _parse_size(max_shard_size)
    inputs = [run, *(Path(path) for path, _ in adapters)]
    given, base = (None, base) if base in ("original", "dequantised") else (base, "original")
    with whole_folder(output, overwrite, inputs) as folder:
        request = MergeRequest(
            model=str(run),
            adapters=adapters_of(run, adapters),
            into=str(folder),
            dtype=dtype,
            stream=stream_base,
            base=given,
            dequantised=base == "dequantised",
            trust_remote_code=trust_remote_code,
        )
        plan = plan_in_fresh_process(request)
        from finetune.merge.write import write_weights  # it imports torch: not before the other process has begun

        if plan.folder:
            check_apart(output, [Path(plan.folder)])
        rounded_here = any(item.quantised for item in plan.tensors)
        if base == "dequantised" and not (rounded_here or plan.rounded):
            raise MergeError(f"--base dequantised: {run} was not trained on a quantised base; leave it out")
        write_weights(plan, folder, max_bytes, dequantise=base == "dequantised" and rounded_here, progress=progress)
        shutil.rmtree(folder / CONVERTED, ignore_errors=True)
        text = json.dumps(_record(request, plan), ensure_ascii=False, indent=1)
        (folder / MERGE_RECORD).write_text(text + "\n", encoding="utf-8")
        if recipe := run_file(run, "recipe.yaml"):
            shutil.copy(recipe, folder / "recipe.yaml")
    if plan.untied:
        say("input and output embeddings were tied, and only one was trained: they are stored apart")
    say(f"merged: {output}")
    return output


def _record(request: MergeRequest, plan: MergePlan) -> MergeRecord:
    """The content of `merge.json`."""
    return {
        "base": plan.base,
        "revision": plan.revision,
        "dtype_of_training": plan.held,
        "finetune": __version__,
        "run": os.path.abspath(request.model),
        "adapters": [
            {"path": path, "weight": weight, "sha256": sha256(Path(path) / ADAPTER_WEIGHTS)}
            for path, weight in request.adapters
        ],
        "base_weights": "dequantised" if request.dequantised else "original",
        "dtype": plan.dtype,
    }


def plan_in_fresh_process(request: MergeRequest) -> MergePlan:
    """The plan of a merge or an export, made in another process: transformers and PEFT leave nothing in this one.

    While that process works, this one imports torch.

    Raises:
        MergeError: An adapter was trained on another base or cannot be merged, or the process failed.
        ModelError: The base cannot be found or read.
        RunError: A file of the run is damaged.
    """
    try:
        plan: MergePlan = fresh_process.call("finetune.merge.plan:make_plan", request, keep_stderr=False)
        return plan
    except fresh_process.ProcessFailed as failure:
        raise MergeError(f"{request.model}: planning failed: {failure}") from failure


def _check_adapters(run: Path, others: Sequence[tuple[str, float]]) -> None:
    """Refuses folders without an adapter, one that is listed twice, and weights that are not finite."""
    if not is_adapter(run):
        whole = "it is a whole model already; finetune export makes other types of it"
        reason = whole if (run / "config.json").is_file() else f"no finished run{adapter_below(run)}"
        raise MergeError(f"{run} holds no adapter (adapter_config.json): {reason}")
    if len({os.path.realpath(path) for path, _ in others}) < len(others):
        raise MergeError("--adapter: an adapter is given twice; give it once, with the sum of its weights")
    for path, weight in others:
        if not math.isfinite(weight):
            raise MergeError(f"--adapter {path}={weight}: write a number")
        if not is_adapter(Path(path)):
            raise MergeError(f"--adapter {path}={weight:g}: {path} holds no adapter (adapter_config.json)")


def _parse_size(text: str) -> int:
    """The bytes of a size such as 5GB or 500MB, in decimal units."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    count = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if not count:
        raise MergeError(f"--max-shard-size is {text!r}; write such as 5GB or 500MB")
    return count
