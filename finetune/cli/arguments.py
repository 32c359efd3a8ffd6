"""What may be written behind `finetune`. Nothing heavy is imported."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from finetune import __version__
from finetune.recipe.export_formats import FORMATS, SHOWN


def parser() -> argparse.ArgumentParser:
    """What `finetune` understands; `verb` names the command."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--traceback", action="store_true", help="show Python's traceback and upstream's warnings"
    )
    common.add_argument("--quiet", action="store_true", help="errors only")
    recipe = argparse.ArgumentParser(add_help=False)
    recipe.add_argument("recipe", metavar="RECIPE", help="a YAML recipe")
    recipe.add_argument(
        "overrides", metavar="section.key=value", nargs="*", help="goes before the recipe's own value"
    )

    whole = argparse.ArgumentParser(
        prog="finetune", description="From one YAML recipe to a model that can be trusted."
    )
    whole.add_argument("--version", action="version", version=__version__)
    verbs = whole.add_subparsers(metavar="VERB", dest="verb", required=True)

    verb = verbs.add_parser("train", parents=[recipe, common], help="train a recipe (also: finetune RECIPE)")
    verb.add_argument("--force", action="store_true", help="also where the plan says that memory will not do")

    verb = verbs.add_parser("check", parents=[recipe, common], help="check a recipe and stop")
    verb.add_argument("--json", action="store_true", help="print the resolved recipe as JSON")

    verb = verbs.add_parser(
        "plan", parents=[recipe, common], help="say what a run will take, and whether it fits"
    )
    verb.add_argument(
        "--gpu",
        metavar="NAME",
        help="t4, l4, a10, 4090, a100-40, a100-80, h100, h200 or a size in GB; absent: this machine",
    )
    verb.add_argument("--gpus", type=_positive, default=1, metavar="N", help="how many of them (default: 1)")
    verb.add_argument("--measure", action="store_true", help="time three real steps on this machine")
    verb.add_argument("--json", action="store_true", help="print the plan as JSON")

    verb = verbs.add_parser("inspect", parents=[recipe, common], help="show what of the data is trained on")
    which = verb.add_mutually_exclusive_group()
    which.add_argument(
        "--rows",
        type=_count,
        metavar="N",
        help="how many training rows (default: 3; 50 with --html, all with --json); 0: the ledger alone",
    )
    which.add_argument("--row", metavar="ID", help="the row of this name, or the one whose name ends so")
    how = verb.add_mutually_exclusive_group()
    how.add_argument("--tokens", action="store_true", help="a token a line, each with its id")
    how.add_argument(
        "--json", action="store_true", help="an object a row: row, input_ids, labels; at last ledger"
    )
    how.add_argument("--html", type=Path, metavar="FILE", help="write one page that needs nothing else")

    asked = argparse.ArgumentParser(add_help=False)
    asked.add_argument(
        "model", metavar="RUN_OR_MODEL", help="a run, a directory of weights, or a base model's name"
    )

    verb = verbs.add_parser("generate", parents=[asked, common], help="answer prompts with a run or a model")
    verb.add_argument("--prompt", help="absent: each line of standard input; on a terminal, a chat")
    verb.add_argument("--system", help="a system message before each prompt")
    verb.add_argument("--no-adapter", action="store_true", help="answer with the run's base model alone")
    verb.add_argument(
        "--max-new-tokens",
        type=_positive,
        default=256,
        metavar="N",
        help="where an answer is cut off (default: 256)",
    )
    verb.add_argument(
        "--temperature", type=_heat, default=0.0, metavar="T", help="0 (default): the likeliest token"
    )
    verb.add_argument(
        "--top-p",
        type=_share,
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens that hold this share together (default: 1, all)",
    )
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)")
    verb.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: as the run was trained"
    )
    verb.add_argument("--quantize", choices=("int8", "nf4"), help="load the weights in 8 or 4 bit")
    verb.add_argument("--attn", metavar="NAME", help="attn_implementation, such as sdpa or eager")
    verb.add_argument("--device", metavar="NAME", help="such as cpu or cuda:1; auto: spread over all GPUs")
    verb.add_argument(
        "--compile",
        action="store_true",
        help="compile the model first: slow to begin with, quicker after that",
    )

    output = argparse.ArgumentParser(add_help=False)
    output.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet"
    )
    output.add_argument(
        "--overwrite", action="store_true", help="replace what merge or export left there, once all is done"
    )

    verb = verbs.add_parser(
        "merge", parents=[output, common], help="put a run's adapter into its base's weights"
    )
    verb.add_argument(
        "folder", metavar="RUN", help="a run, one of its checkpoints, or a folder with a PEFT adapter"
    )
    verb.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: as the run trained"
    )
    verb.add_argument(
        "--base",
        choices=("original", "dequantised"),
        default="original",
        help="dequantised: the rounded weights that a 4- or 8-bit run trained against (default: original)",
    )
    verb.add_argument(
        "--adapter",
        type=_weighted,
        action="append",
        default=[],
        metavar="PATH=WEIGHT",
        help="a further adapter of the same base, or RUN itself to weigh it; repeatable",
    )
    verb.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of each file of weights (default: 5GB)"
    )
    verb.add_argument(
        "--stream-base", action="store_true", help="fetch a base on the Hub file by file, and keep none of it"
    )

    verb = verbs.add_parser(
        "export",
        parents=[output, common],
        help="write bf16, fp16, int8, nf4, GGUF or Ollama's, and measure what each one lost",
    )
    verb.add_argument(
        "model", metavar="RUN_OR_MERGED", help="a run (merged first), or a folder with a whole model"
    )
    verb.add_argument(
        "--format",
        choices=FORMATS,
        metavar="FORMAT",
        action="append",
        default=[],
        help=f"{SHOWN}; repeatable",
    )
    verb.add_argument("--base", choices=("original", "dequantised"), help="as in merge")
    verb.add_argument(
        "--gate",
        type=_limit,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="exit with 3 where a format falls short: max_kl, max_kl_p99, min_top1, max_perplexity_ratio; repeatable",
    )

    verb = verbs.add_parser(
        "evaluate",
        parents=[asked, common],
        help="ask a model, and say how good its answers and predictions are",
    )
    verb.add_argument(
        "--recipe", type=Path, help="whose held-out rows and evaluate section to use (default: the run's own)"
    )
    verb.add_argument(
        "--compare", metavar="BASE", help="another run or model beside it; base: the run's own base"
    )
    verb.add_argument("--limit", type=_positive, metavar="N", help="how many rows and prompts at most")
    verb.add_argument(
        "--output", type=Path, metavar="DIR", help="default: evaluation in the run's folder, or in this one"
    )
    verb.add_argument("--json", action="store_true", help="print the report as JSON")

    verb = verbs.add_parser("report", parents=[common], help="show a run, finished or not, as one HTML page")
    verb.add_argument("run", metavar="RUN", type=Path, help="a run's directory")
    verb.add_argument(
        "--output", type=Path, metavar="FILE.html", help="default: report.html in the run's folder"
    )

    verb = verbs.add_parser(
        "doctor", parents=[common], help="look at this machine: what is right, what to mend"
    )
    verb.add_argument("--json", action="store_true", help="print the findings as JSON")

    verb = verbs.add_parser(
        "push", parents=[common], help="put a run, a merged model or an export on the Hub"
    )
    verb.add_argument(
        "folder", metavar="RUN_OR_EXPORT", help="a run, one of its checkpoints, or what merge or export wrote"
    )
    verb.add_argument("--repo-id", metavar="OWNER/NAME", help="default: hub.repo_id of the run's recipe")
    verb.add_argument(
        "--private", action="store_true", default=None, help="let nobody else see a repository that is made"
    )
    verb.add_argument("--revision", metavar="BRANCH", help="the branch; it is made if it is not there")
    verb.add_argument("--create-pr", action="store_true", help="open a pull request")
    verb.add_argument(
        "--base-model",
        metavar="OWNER/NAME",
        help="the base's id on the Hub, where it was trained from this machine",
    )
    return whole


def _weighted(text: str) -> tuple[str, float]:
    path, _, weight = text.rpartition("=")
    try:
        return (path, float(weight)) if path else (text, 1.0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}; write PATH=WEIGHT, such as runs/a=0.7") from None


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}; write NAME=VALUE, such as max_kl=0.05") from None


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"is {text!r}; write a whole number")
    return int(text)


def _heat(text: str) -> float:
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"is {text!r}; write 0 or more")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"is {text!r}; write a number above 0, and 1 at most")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}; write a number") from None


def _positive(text: str) -> int:
    if not _count(text):
        raise argparse.ArgumentTypeError(f"is {text!r}; write a whole number above 0")
    return int(text)
