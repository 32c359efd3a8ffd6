"""The interface of the command line: verbs, flags and exit codes. It imports nothing heavy."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import NoReturn, TypeVar

from finetune import __version__
from finetune.recipe.export_formats import FORMATS, FORMATS_HELP, QUANTIZED_FORMATS, TRANSFORMERS_FORMATS
from finetune.system.pages import one_line

T = TypeVar("T", int, float)


class ExitCode(IntEnum):
    """The exit codes of every verb."""

    OK = 0
    INTERNAL_ERROR = 1  # a bug in finetune
    USER_ERROR = 2  # one line on standard error for each thing to mend; `doctor` found something wrong
    MISSED = 3  # `export`: a gate is missed; `plan`: the recipe does not fit; `check-adapter`: a part is not taken
    INTERRUPTED = 130  # SIGINT; 143 after SIGTERM. `train` has saved a checkpoint.


EXIT_CODES = (
    "Exit codes: 0: done; 1: a bug in finetune; 2: something to mend in the recipe, the command or this machine, one "
    "line for each; 3: export missed a gate, plan found that the recipe does not fit, or check-adapter a part that the "
    "program does not take; 130, 143: ended by SIGINT or SIGTERM."
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Ends the process as argparse does; control characters in a word of the command line are written out."""
        super().error(one_line(message))


# Adds a verb: its name, its help, and the parsers whose flags it shares.
AddVerb = Callable[..., argparse.ArgumentParser]
_ELSEWHERE = "the run's base, if it is elsewhere than the run's files say"


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; `verb` of its result names the command."""
    common = _Parser(add_help=False)
    common.add_argument(
        "--traceback", action="store_true", help="show Python's traceback and the warnings of libraries"
    )
    common.add_argument("--quiet", action="store_true", help="errors only")
    command = _Parser(prog="finetune", description="Fine-tunes language models from YAML recipes.", epilog=EXIT_CODES)
    command.add_argument("--version", action="version", version=__version__)
    verbs = command.add_subparsers(metavar="VERB", dest="verb", required=True)

    def verb(name: str, help: str, *parents: _Parser) -> argparse.ArgumentParser:
        return verbs.add_parser(name, parents=[*parents, common], help=help)

    _add_verbs_that_make_recipes(verb)
    _add_verbs_of_recipes(verb)
    _add_verbs_of_models(verb)
    _add_verbs_of_folders(verb)
    return command


def _add_verbs_that_make_recipes(verb: AddVerb) -> None:
    flag = verb("init", "look at rows and write a recipe that trains on them").add_argument
    flag("data", metavar="DATA", help="a file of rows (JSONL, JSON, CSV, Parquet), a glob, or a dataset on the Hub")
    flag(
        "--model",
        metavar="NAME",
        help="the base (default: the embedded Gemma 3 270M on a CPU, google/gemma-4-E2B-it on a GPU)",
    )
    flag(
        "--output", type=Path, default=Path("recipe.yaml"), metavar="FILE", help="the new recipe (default: recipe.yaml)"
    )

    flag = verb("convert", "convert another trainer's configuration to a recipe").add_argument
    flag(
        "file",
        metavar="FILE",
        type=Path,
        help="YAML of axolotl, LLaMA-Factory, ms-swift, trl or alignment-handbook; a notebook or Python text of "
        "unsloth, which is not run",
    )
    flag("--output", type=Path, metavar="RECIPE", help="the new recipe (default: standard output)")


def _add_verbs_of_recipes(verb: AddVerb) -> None:
    recipe = _Parser(add_help=False)
    recipe.add_argument("recipe", metavar="RECIPE", help="a YAML recipe")
    _add_overrides(recipe, "replaces a value of the recipe; sweep tries each item of a list")

    flag = verb("train", "train a recipe (also: finetune RECIPE)", recipe).add_argument
    flag("--force", action="store_true", help="train even if the memory check says that it does not fit")

    flag = verb("sweep", "train each combination of some values, and compare the runs", recipe).add_argument
    flag("--max-runs", type=_positive, default=64, metavar="N", help="refuse more combinations (default: 64)")
    flag("--force", action="store_true", help="train even if the memory check says that a run does not fit")
    flag("--json", action="store_true", help="print the comparison as JSON, as in sweep.json")

    flag = verb("check", "check a recipe without training", recipe).add_argument
    flag("--json", action="store_true", help="print the resolved recipe as JSON")
    flag("--all", action="store_true", help="print the defaults, too")

    verb("schema", "print the JSON schema of a recipe, for editors")

    flag = verb("plan", "predict the memory and time of a run, and whether it fits", recipe).add_argument
    flag(
        "--gpu",
        metavar="NAME",
        help="t4, l4, a10, 4090, a100-40, a100-80, h100, h200, another card's name (RTX 3090, V100, A6000, L40S, B200, "
        "...) or a size in GB (default: this machine)",
    )
    flag("--gpus", type=_positive, default=1, metavar="N", help="how many of them (default: 1)")
    flag("--measure", action="store_true", help="time three real steps on this machine")
    flag("--json", action="store_true", help="print the plan as JSON")

    inspect = verb("inspect", "show which tokens of the data are trained on", recipe)
    flag = inspect.add_mutually_exclusive_group().add_argument
    flag(
        "--rows",
        type=_whole_number,
        metavar="N",
        help="how many training rows (default: 3; 50 with --html, all with --json); 0: the ledger only",
    )
    flag("--row", metavar="ID", help="the row with this name, or whose name ends so")
    flag = inspect.add_mutually_exclusive_group().add_argument
    flag("--tokens", action="store_true", help="print one token per line, with its id")
    flag("--json", action="store_true", help="print a JSON object per row (row, input_ids, labels), then the ledger")
    flag("--html", type=Path, metavar="FILE", help="write one self-contained HTML page")


def _add_verbs_of_models(verb: AddVerb) -> None:
    model = _Parser(add_help=False)
    model.add_argument("model", metavar="RUN_OR_MODEL", help="a run, a directory with a model, or a base model's name")
    trust = _Parser(add_help=False)
    trust.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let Python files that come with the model run; read them first",
    )
    output = _Parser(add_help=False)
    output.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    output.add_argument("--overwrite", action="store_true", help="replace an output of merge or export, once complete")

    _add_generate(verb("generate", "answer prompts with a run or a model", model, trust))
    _add_merge(verb("merge", "merge a run's adapter into its base's weights", output, trust))
    formats = f"{', '.join(TRANSFORMERS_FORMATS)}, MLX, GGUF or Ollama files"
    _add_export(verb("export", f"write {formats} and measure their loss", output, trust))

    flag = verb("check-adapter", "check whether a program loads a run's adapter without a merge").add_argument
    flag("folder", metavar="RUN", type=Path, help="a run, one of its checkpoints, or a folder with a PEFT adapter")
    flag("--for", required=True, dest="program", metavar="PROGRAM", help="vllm, sglang, llama.cpp or peft==RELEASE")
    flag("--base", metavar="PATH_OR_ID", help=_ELSEWHERE)

    _add_evaluate(verb("evaluate", "measure the perplexity and the answers of a model", model, trust))

    flag = verb("serve", "start an OpenAI-compatible server for a run or a model", model, trust).add_argument
    flag("--base", metavar="PATH_OR_ID", help=_ELSEWHERE)
    flag("--host", default="127.0.0.1", metavar="ADDRESS", help="default: 127.0.0.1, this machine alone")
    flag("--port", type=_port, default=8000, metavar="N", help="default: 8000")
    flag("--print", action="store_true", dest="print_only", help="print the server's command, do not start it")


def _add_merge(merge: argparse.ArgumentParser) -> None:
    flag = merge.add_argument
    flag("folder", metavar="RUN", help="a run, one of its checkpoints, or a folder with a PEFT adapter")
    flag("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the dtype of the run")
    flag(
        "--base",
        default="original",
        metavar="BASE",
        help="original (default); dequantised: the rounded weights that a 4- or 8-bit run trained on; or the path or "
        "id of the base, if it is elsewhere than the run's files say",
    )
    flag(
        "--adapter",
        type=_adapter_and_weight,
        action="append",
        default=[],
        metavar="PATH=WEIGHT",
        help="another adapter of the same base, or RUN itself, with its weight; repeatable",
    )
    flag("--max-shard-size", default="5GB", metavar="SIZE", help="the largest file of weights (default: 5GB)")
    flag("--stream-base", action="store_true", help="fetch the base from the Hub file by file, and keep none")


def _add_export(export: argparse.ArgumentParser) -> None:
    flag = export.add_argument
    flag("model", metavar="RUN_OR_MERGED", help="a run (merged first), or a folder with a whole model")
    flag("--format", type=_format, metavar="FORMAT", action="append", default=[], help=f"{FORMATS_HELP}; repeatable")
    flag("--base", metavar="BASE", help="as in merge")
    flag(
        "--gate",
        type=_gate,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="exit with 3 if a format misses it: max_kl, max_kl_p99, min_top1, max_perplexity_ratio; repeatable",
    )


def _add_evaluate(evaluate: argparse.ArgumentParser) -> None:
    flag = evaluate.add_argument
    _add_overrides(evaluate, "replaces a value of the recipe")
    flag("--recipe", type=Path, help="held-out rows and evaluate section (default: the run's recipe)")
    flag("--base", metavar="PATH_OR_ID", help=_ELSEWHERE)
    flag("--compare", metavar="BASE", help="another run or model to compare with; base: the run's own base")
    flag("--server", metavar="URL", help="a server of the model (OpenAI's chat API) that answers the prompts too")
    flag("--server-model", metavar="NAME", help="the model's name there (default: the only one, or that of the run)")
    flag("--limit", type=_positive, metavar="N", help="the most rows and prompts to evaluate")
    flag("--output", type=Path, metavar="DIR", help="default: evaluation in the folder of the run, or here")
    flag("--json", action="store_true", help="print the report as JSON")


def _add_overrides(command: argparse.ArgumentParser, help: str) -> None:
    command.add_argument("overrides", metavar="section.key=value", nargs="*", default=[], help=help)


def _add_generate(command: argparse.ArgumentParser) -> None:
    flag = command.add_argument
    flag("--prompt", help="default: each line of standard input; on a terminal, a chat")
    flag("--system", help="a system message before each prompt")
    flag(
        "--tools",
        type=Path,
        metavar="FILE",
        help="functions that the model may call: a list in JSON, as in a row of data",
    )
    flag(
        "--chat-template-kwargs",
        metavar="JSON",
        help="variables of the chat template, such as '{\"enable_thinking\": true}'",
    )
    flag("--base", metavar="PATH_OR_ID", help=_ELSEWHERE)
    flag("--no-adapter", action="store_true", help="answer with the run's base model, without its adapter")
    flag("--max-new-tokens", type=_positive, default=256, metavar="N", help="longest answer (default: 256)")
    flag("--temperature", type=_temperature, default=0.0, metavar="T", help="0 (default): the most likely token")
    flag(
        "--top-p",
        type=_top_p,
        default=1.0,
        metavar="P",
        help="nucleus sampling: draw from the most likely tokens with this total probability (default: 1)",
    )
    flag("--seed", type=int, default=0, metavar="N", help="seed of the sampling (default: 0)")
    flag("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the dtype of the run")
    flag("--quantize", choices=QUANTIZED_FORMATS, help="load the weights in 8 or 4 bit")
    flag("--attn", metavar="NAME", help="attn_implementation, such as sdpa or eager")
    flag("--device", metavar="NAME", help="such as cpu or cuda:1; auto: spread the layers over all GPUs")
    flag("--compile", action="store_true", help="compile the model: slow first, then faster")


def _add_verbs_of_folders(verb: AddVerb) -> None:
    flag = verb("report", "show a run, finished or not, as one HTML page").add_argument
    flag("run", metavar="RUN", type=Path, help="a run's directory")
    flag("--output", type=Path, metavar="FILE.html", help="default: report.html in the run's folder")

    flag = verb("doctor", "check this machine and say what to mend").add_argument
    flag("--json", action="store_true", help="print the results as JSON")

    flag = verb("push", "put a run, a merged model or an export on the Hub").add_argument
    flag("folder", metavar="RUN_OR_EXPORT", help="a run, a checkpoint of it, or an output of merge or export")
    flag("--repo-id", metavar="OWNER/NAME", help="default: hub.repo_id of the run's recipe")
    flag("--private", action="store_true", default=None, help="make the repository private if it is new")
    flag("--revision", metavar="BRANCH", help="the branch, which is made if it is missing")
    flag("--create-pr", action="store_true", help="open a pull request")
    flag("--base-model", metavar="OWNER/NAME", help="the base's id on the Hub, if it was read from a local folder")


def _format(text: str) -> str:
    if text in FORMATS:
        return text
    if text.startswith("gguf"):
        raise argparse.ArgumentTypeError(f"is {text!r}; write gguf:Q4_K_M, gguf:Q8_0, another gguf:TYPE, or gguf:all")
    near = difflib.get_close_matches(text, FORMATS, n=1, cutoff=0.6)
    cure = f"perhaps {near[0]}" if near else f"write one of {FORMATS_HELP}"
    raise argparse.ArgumentTypeError(f"is {text!r}; {cure}")


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


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}; write a number") from None


def _checked(read: Callable[[str], T], allowed: Callable[[T], bool], wanted: str) -> Callable[[str], T]:
    """A type of a flag: the value that `read` makes, where it is allowed; `wanted` says what to write."""

    def convert(text: str) -> T:
        value = read(text)
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"is {text!r}; write {wanted}")
        return value

    return convert


_positive = _checked(_whole_number, lambda number: number > 0, "a whole number above 0")
_port = _checked(_whole_number, lambda number: 0 < number < 65536, "a number from 1 to 65535")
_temperature = _checked(_number, lambda number: 0 <= number < math.inf, "0 or more")
_top_p = _checked(_number, lambda number: 0 < number <= 1, "a number above 0, and 1 at most")
