"""The interface of the command line: verbs, flags and exit codes. It imports nothing heavy."""

from __future__ import annotations

import argparse
import math
from enum import IntEnum
from pathlib import Path

from finetune import __version__
from finetune.recipe.export_formats import FORMATS, FORMATS_HELP


class ExitCode(IntEnum):
    """The exit codes of every verb."""

    OK = 0
    INTERNAL_ERROR = 1  # a bug in finetune
    USER_ERROR = 2  # one line on standard error for each thing to mend; `doctor` found something wrong
    MISSED = 3  # `export`: a gate is missed; `plan`: the recipe does not fit
    INTERRUPTED = 130  # SIGINT; 143 after SIGTERM. `train` has saved a checkpoint.


EXIT_CODES = (
    "Exit codes: 0: done; 1: a bug in finetune; 2: something to mend in the recipe, the command or this machine, one "
    "line for each; 3: export missed a gate, or plan found that the recipe does not fit; 130, 143: ended by SIGINT or "
    "SIGTERM."
)


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; `verb` of its result names the command."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--traceback", action="store_true", help="show Python's traceback and the warnings of libraries"
    )
    common.add_argument("--quiet", action="store_true", help="errors only")
    recipe = argparse.ArgumentParser(add_help=False)
    recipe.add_argument("recipe", metavar="RECIPE", help="a YAML recipe")
    recipe.add_argument(
        "overrides", metavar="section.key=value", nargs="*", help="replaces a value of the recipe"
    )

    command = argparse.ArgumentParser(
        prog="finetune", description="Fine-tunes language models from YAML recipes.", epilog=EXIT_CODES
    )
    command.add_argument("--version", action="version", version=__version__)
    verbs = command.add_subparsers(metavar="VERB", dest="verb", required=True)

    verb = verbs.add_parser("train", parents=[recipe, common], help="train a recipe (also: finetune RECIPE)")
    verb.add_argument(
        "--force", action="store_true", help="train even if the memory check says that it does not fit"
    )

    verb = verbs.add_parser("check", parents=[recipe, common], help="check a recipe without training")
    verb.add_argument("--json", action="store_true", help="print the resolved recipe as JSON")

    verb = verbs.add_parser(
        "plan",
        parents=[recipe, common],
        help="compute the memory and time that a run needs, and whether it fits",
    )
    verb.add_argument(
        "--gpu",
        metavar="NAME",
        help="t4, l4, a10, 4090, a100-40, a100-80, h100, h200 or a size in GB (default: this machine)",
    )
    verb.add_argument("--gpus", type=_positive, default=1, metavar="N", help="how many of them (default: 1)")
    verb.add_argument("--measure", action="store_true", help="time three real steps on this machine")
    verb.add_argument("--json", action="store_true", help="print the plan as JSON")

    verb = verbs.add_parser(
        "inspect", parents=[recipe, common], help="show which tokens of the data are trained on"
    )
    which = verb.add_mutually_exclusive_group()
    which.add_argument(
        "--rows",
        type=_whole_number,
        metavar="N",
        help="how many training rows (default: 3; 50 with --html, all with --json); 0: the ledger only",
    )
    which.add_argument(
        "--row", metavar="ID", help="the row with this name, or the one whose name ends with it"
    )
    how = verb.add_mutually_exclusive_group()
    how.add_argument("--tokens", action="store_true", help="print one token per line, with its id")
    how.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object per row (row, input_ids, labels), then the ledger",
    )
    how.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained HTML page")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument(
        "model", metavar="RUN_OR_MODEL", help="a run, a directory with a model, or a base model's name"
    )

    verb = verbs.add_parser("generate", parents=[model, common], help="answer prompts with a run or a model")
    verb.add_argument("--prompt", help="default: each line of standard input; on a terminal, a chat")
    verb.add_argument("--system", help="a system message before each prompt")
    verb.add_argument(
        "--no-adapter", action="store_true", help="answer with the run's base model, without its adapter"
    )
    verb.add_argument(
        "--max-new-tokens",
        type=_positive,
        default=256,
        metavar="N",
        help="the longest answer (default: 256)",
    )
    verb.add_argument(
        "--temperature",
        type=_temperature,
        default=0.0,
        metavar="T",
        help="0 (default): always the most likely token",
    )
    verb.add_argument(
        "--top-p",
        type=_top_p,
        default=1.0,
        metavar="P",
        help="nucleus sampling: draw from the most likely tokens with this total probability (default: 1)",
    )
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampling (default: 0)")
    verb.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: the dtype of the run"
    )
    verb.add_argument("--quantize", choices=("int8", "nf4"), help="load the weights in 8 or 4 bit")
    verb.add_argument("--attn", metavar="NAME", help="attn_implementation, such as sdpa or eager")
    verb.add_argument(
        "--device", metavar="NAME", help="such as cpu or cuda:1; auto: spread the layers over all GPUs"
    )
    verb.add_argument(
        "--compile",
        action="store_true",
        help="compile the model: the first answer is slow, later ones are faster",
    )

    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    output.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier output of merge or export, after the new one is complete",
    )

    verb = verbs.add_parser(
        "merge", parents=[output, common], help="merge a run's adapter into its base's weights"
    )
    verb.add_argument(
        "folder", metavar="RUN", help="a run, one of its checkpoints, or a folder with a PEFT adapter"
    )
    verb.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: the dtype of the run"
    )
    verb.add_argument(
        "--base",
        choices=("original", "dequantised"),
        default="original",
        help="dequantised: the rounded weights that a 4- or 8-bit run trained on (default: original)",
    )
    verb.add_argument(
        "--adapter",
        type=_adapter_and_weight,
        action="append",
        default=[],
        metavar="PATH=WEIGHT",
        help="another adapter of the same base, or RUN itself, with its weight; repeatable",
    )
    verb.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="the largest file of weights (default: 5GB)"
    )
    verb.add_argument(
        "--stream-base",
        action="store_true",
        help="fetch the base from the Hub one file at a time, and keep none",
    )

    verb = verbs.add_parser(
        "export",
        parents=[output, common],
        help="write bf16, fp16, int8, nf4, GGUF or Ollama files, and measure how much each one lost",
    )
    verb.add_argument(
        "model", metavar="RUN_OR_MERGED", help="a run, which is merged first, or a folder with a whole model"
    )
    verb.add_argument(
        "--format",
        choices=FORMATS,
        metavar="FORMAT",
        action="append",
        default=[],
        help=f"{FORMATS_HELP}; repeatable",
    )
    verb.add_argument("--base", choices=("original", "dequantised"), help="as in merge")
    verb.add_argument(
        "--gate",
        type=_gate,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="exit with 3 if a format misses it: max_kl, max_kl_p99, min_top1, max_perplexity_ratio; repeatable",
    )

    verb = verbs.add_parser(
        "evaluate",
        parents=[model, common],
        help="measure the perplexity and the answers of a model",
    )
    verb.add_argument(
        "--recipe",
        type=Path,
        help="the recipe with the held-out rows and the evaluate section (default: the run's own)",
    )
    verb.add_argument(
        "--compare", metavar="BASE", help="another run or model to compare with; base: the run's own base"
    )
    verb.add_argument("--limit", type=_positive, metavar="N", help="the most rows and prompts to evaluate")
    verb.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="default: the folder evaluation in the run's folder, or in the current one",
    )
    verb.add_argument("--json", action="store_true", help="print the report as JSON")

    verb = verbs.add_parser("report", parents=[common], help="show a run, finished or not, as one HTML page")
    verb.add_argument("run", metavar="RUN", type=Path, help="a run's directory")
    verb.add_argument(
        "--output", type=Path, metavar="FILE.html", help="default: report.html in the run's folder"
    )

    verb = verbs.add_parser("doctor", parents=[common], help="check this machine and say what to mend")
    verb.add_argument("--json", action="store_true", help="print the results as JSON")

    verb = verbs.add_parser(
        "push", parents=[common], help="put a run, a merged model or an export on the Hub"
    )
    verb.add_argument(
        "folder",
        metavar="RUN_OR_EXPORT",
        help="a run, one of its checkpoints, or an output of merge or export",
    )
    verb.add_argument("--repo-id", metavar="OWNER/NAME", help="default: hub.repo_id of the run's recipe")
    verb.add_argument(
        "--private", action="store_true", default=None, help="make the repository private if it is new"
    )
    verb.add_argument("--revision", metavar="BRANCH", help="the branch, which is made if it is missing")
    verb.add_argument("--create-pr", action="store_true", help="open a pull request")
    verb.add_argument(
        "--base-model",
        metavar="OWNER/NAME",
        help="the base's id on the Hub, if the run read it from a local folder",
    )
    return command


def _adapter_and_weight(text: str) -> tuple[str, float]:
    path, _, weight = text.rpartition("=")
    try:
        return (path, float(weight)) if path else (text, 1.0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}; write PATH=WEIGHT, such as runs/a=0.7") from None


def _gate(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}; write NAME=VALUE, such as max_kl=0.05") from None


def _whole_number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"is {text!r}; write a whole number")
    return int(text)


def _positive(text: str) -> int:
    if not _whole_number(text):
        raise argparse.ArgumentTypeError(f"is {text!r}; write a whole number above 0")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}; write a number") from None


def _temperature(text: str) -> float:
    if not 0 <= _number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"is {text!r}; write 0 or more")
    return float(text)


def _top_p(text: str) -> float:
    if not 0 < _number(text) <= 1:
        raise argparse.ArgumentTypeError(f"is {text!r}; write a number above 0, and 1 at most")
    return float(text)
