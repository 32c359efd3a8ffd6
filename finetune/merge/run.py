"""A base and adapters to merged weights, one tensor at a time: never the model, never more than one product in memory.

Every number is what PEFT's `merge_and_unload()` gives, but for one thing: where PEFT changes both sides of tied
embeddings though one was trained, the other is left alone here and the two are stored apart. What counts is that the
merged model answers as its adapter does.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from finetune import __version__
from finetune.merge.plan import MergeRequest, adapters_of, plan_in_fresh_process
from finetune.merge.write import write_weights
from finetune.system.errors import MergeError
from finetune.system.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_apart, run_file, sha256, whole_folder
from finetune.system.terminal import Say


def merge(
    run: str | Path,
    output: str | Path,
    dtype: str | None = None,
    base: str = "original",
    adapters: Sequence[tuple[str, float]] = (),
    max_shard_size: str = "5GB",
    stream_base: bool = False,
    overwrite: bool = False,
    say: Say = lambda line: None,
    progress: bool = False,
) -> Path:
    """The merged model of a run, in `output`: weights, config, tokenizer and template, ready for `from_pretrained`.

    Args:
        run: A run directory, one of its checkpoints, or any folder with a PEFT adapter.
        output: A folder that does not exist yet.
        dtype: float32, bfloat16 or float16; absent, the type that the run trained in, and only then every number is
            what PEFT gives.
        base: original, or dequantised: the rounded weights that a 4- or 8-bit run trained against.
        adapters: Further adapters of the same base with their weights; the run's own weighs 1 unless it is among them.
        max_shard_size: Such as 5GB or 500MB.
        stream_base: Fetches a base on the Hub file by file, and removes each when it is used up.
        overwrite: Replaces what an earlier merge or export left in `output`, once all is done.
        say: Gets a line for each thing that a person may want to know.
        progress: Whether a terminal shows a bar.

    Raises:
        MergeError: The adapter is of another base, is not finite, or holds what cannot be merged.
        ShardError, ModelError, RunError: A file is damaged, the base is not there, the output is in use.
    """
    run, output = Path(run), Path(output)
    if not (run / ADAPTER_CONFIG).is_file():
        whole = (run / "config.json").is_file()
        why = (
            "it is a whole model already; finetune export makes other types of it"
            if whole
            else "no finished run"
        )
        raise MergeError(f"{run} holds no adapter (adapter_config.json): {why}")
    if len({os.path.realpath(path) for path, _ in adapters}) < len(adapters):
        raise MergeError("--adapter: one of them is given twice; add its weights up")
    for path, weight in adapters:
        if not math.isfinite(weight):
            raise MergeError(f"--adapter {path}={weight}: write a number")
        if not (Path(path) / ADAPTER_CONFIG).is_file():
            raise MergeError(f"--adapter {path}={weight:g}: {path} holds no adapter (adapter_config.json)")
    max_bytes = _bytes_of(max_shard_size)
    inputs = [run, *(Path(path) for path, _ in adapters)]
    with whole_folder(output, overwrite, inputs) as beside:
        request = MergeRequest(str(run), adapters_of(run, adapters), str(beside), dtype, stream=stream_base)
        plan = plan_in_fresh_process(request)
        if plan.folder:
            check_apart(output, [Path(plan.folder)])
        if base == "dequantised" and not any(item.quantised for item in plan.tensors):
            raise MergeError(f"--base dequantised: {run} was not trained on a quantised base; leave it out")
        write_weights(plan, beside, max_bytes, dequantise=base == "dequantised", progress=progress)
        record = plan.record | {
            "finetune": __version__,
            "run": os.path.abspath(run),
            "adapters": [
                {"path": path, "weight": weight, "sha256": sha256(Path(path) / ADAPTER_WEIGHTS)}
                for path, weight in plan.adapters
            ],
            "base_weights": base,
            "dtype": plan.dtype,
        }
        (beside / "merge.json").write_text(
            json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
        if recipe := run_file(run, "recipe.yaml"):
            shutil.copy(recipe, beside / "recipe.yaml")
    if plan.untied:
        say("input and output embeddings were tied, and only one was trained: they are stored apart")
    say(f"merged: {output}")
    return output


def _bytes_of(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", size.strip(), re.IGNORECASE)
    count = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if not count:
        raise MergeError(f"--max-shard-size is {size!r}; write such as 5GB or 500MB")
    return count


# ---------------------------------------------------------------------------------------------------------------
# Weights, one after the other


# ---------------------------------------------------------------------------------------------------------------
# Where weights are read from
