"""argv to a verb. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import signal
import sys
import textwrap
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.cli.arguments import parser
from finetune.system import distributed
from finetune.system.errors import FinetuneError, RecipeError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code is 0, 1 (our own fault), 2 (the user's), 3 (a gate), 130 or 143 (a signal)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] not in _VERBS and arguments[0].endswith((".yaml", ".yml")):
        arguments.insert(0, "train")
    reader = parser()
    args, rest = reader.parse_known_args(arguments)
    # An override may stand behind an option as well.
    if any(word.startswith("-") or "=" not in word or "overrides" not in args for word in rest):
        reader.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    if not args.traceback:
        _silence()
    if distributed.world_size() > 1 and args.verb != "train":
        # Each would do all of it, into the same files.
        if not distributed.rank():
            _say(
                f"error: {distributed.world_size()} processes were launched, and only train shares its work; "
                f"write python -m finetune {shlex.join(arguments)}"
            )
        return 2
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)
    try:
        return int(_VERBS[args.verb](args) or 0)
    except KeyboardInterrupt as stop:
        if not distributed.rank():
            _say(str(stop) or "stopped")
        return int(getattr(stop, "exit_code", 130))
    except BrokenPipeError:
        # Whoever read the answers has read enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        faults = _faults(error)
        code = 2 if faults else 1
        if args.traceback:
            distributed.end_all_ranks(traceback.format_exception(error), code)
            raise
        if distributed.is_lost_rank(error):
            faults = [f"{distributed.LOST_RANK} ({textwrap.shorten(str(error), 100, placeholder=' ...')})"]
        faults = faults or [f"{type(error).__name__}: {error} (a fault of ours; --traceback shows where)"]
        lines = [f"error: {fault}" for fault in faults]
        distributed.end_all_ranks(lines, code)
        for line in lines:
            _say(line)
        return code


def _terminated(signum: int, frame: Any) -> None:
    """What is half written is removed, as at Ctrl-C; training puts its own in place of this."""
    stop = KeyboardInterrupt("terminated")
    stop.exit_code = 128 + signum  # type: ignore[attr-defined]
    raise stop


# ---------------------------------------------------------------------------------------------------------------
# Verbs


def _train(args: argparse.Namespace) -> None:
    from finetune.recipe.load import load_recipe
    from finetune.train.checkpoint import check_output

    distributed.check_launcher()
    # transformers 5.23 greets for wandb when it is imported.
    with contextlib.redirect_stdout(io.StringIO()):
        recipe = load_recipe(args.recipe, args.overrides)
    training = recipe.training
    # Said at once, not after the seconds that torch and trl take to load.
    check_output(Path(training["output_dir"]), training.get("resume_from_checkpoint") or False)
    say = _quiet if args.quiet or distributed.rank() else _say
    say(f"recipe: {recipe.path}")
    from finetune.train.run import train

    if args.force:
        train(recipe, say)
    else:
        from finetune.plan import preflight

        train(recipe, say, preflight.check)


def _plan(args: argparse.Namespace) -> int:
    # Standard output is the plan's alone.
    with contextlib.redirect_stdout(sys.stderr):
        from finetune.plan import configs, run, timing
        from finetune.plan.report import as_json, as_text
        from finetune.recipe.load import load_recipe

        recipe = load_recipe(args.recipe, args.overrides)
        card = configs.gpu_named(args.gpu) if args.gpu else None
        made = run.plan(recipe, card, args.gpus, say=_quiet if args.quiet else _say)
        if args.measure:
            made.measured = timing.measure(args.recipe, args.overrides, _quiet if args.quiet else _say)
    if args.json:
        print(json.dumps(as_json(made), ensure_ascii=False, indent=1))
    else:
        print("\n".join(as_text(made)))
    return 0 if made.fits else 3


def _check(args: argparse.Namespace) -> None:
    from finetune.recipe.load import load_recipe

    # Standard output is ours alone: trackers greet on it when they are imported.
    with contextlib.redirect_stdout(sys.stderr):
        recipe = load_recipe(args.recipe, args.overrides)
    if args.json:
        print(json.dumps(recipe.sections(), ensure_ascii=False, indent=1))
    elif not args.quiet:
        print(f"{recipe.path}: ok")
        print(recipe.to_yaml(), end="")


def _inspect(args: argparse.Namespace) -> None:
    from finetune.cli import inspect
    from finetune.recipe.load import load_recipe
    from finetune.system.errors import RunError
    from finetune.system.files import write_whole

    if args.html and (args.html.is_dir() or not args.html.parent.is_dir()):
        raise RunError(f"--html {args.html}: write the path of a file in a folder that exists")
    with contextlib.redirect_stdout(sys.stderr):
        view = inspect.load(load_recipe(args.recipe, args.overrides), _quiet if args.quiet else _say)
    count = args.rows
    if count is None and not args.json:
        count = 50 if args.html else 3
    rows = view.rows(count, args.row)
    if args.html:
        write_whole(args.html, inspect.as_html(view, rows))
        if not args.quiet:
            _say(f"written: {args.html}")
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What this terminal's encoding lacks is written out, too.
        sys.stdout.reconfigure(errors="backslashreplace")
    text = inspect.as_text(view, rows, sys.stdout, args.tokens)
    for line in inspect.as_json(view, rows) if args.json else text:
        print(line)
    sys.stdout.flush()


def _generate(args: argparse.Namespace) -> None:
    from finetune.model.generate import Sampling, load_generator

    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    generator = load_generator(
        args.model,
        adapter=not args.no_adapter,
        dtype=args.dtype,
        quantize=args.quantize,
        attn=args.attn,
        device=args.device,
        compiled=args.compile,
    )
    system = [{"role": "system", "content": args.system}] if args.system else []
    if args.prompt is not None:
        _answer(generator, [*system, {"role": "user", "content": args.prompt}], sampling)
    elif sys.stdin.isatty():
        _chat(generator, system, sampling)
    else:
        for line in _lines():
            print(f"> {line}")
            _answer(generator, [*system, {"role": "user", "content": line}], sampling)
            print(flush=True)


def _merge(args: argparse.Namespace) -> None:
    from finetune.merge.run import merge

    merge(
        args.folder,
        args.output,
        dtype=args.dtype,
        base=args.base,
        adapters=args.adapter,
        max_shard_size=args.max_shard_size,
        stream_base=args.stream_base,
        overwrite=args.overwrite,
        say=_quiet if args.quiet else _say,
        progress=not args.quiet,
    )


def _export(args: argparse.Namespace) -> int:
    from finetune.export.run import export, shortfalls

    output = export(
        args.model,
        args.output,
        args.format,
        args.base,
        dict(args.gate),
        overwrite=args.overwrite,
        say=_quiet if args.quiet else _say,
        progress=not args.quiet,
    )
    print((output / "report.md").read_text(encoding="utf-8"), end="")
    missed = shortfalls(output)
    for line in missed:
        _say(f"gate: {line}")
    return 3 if missed else 0


def _evaluate(args: argparse.Namespace) -> None:
    # Standard output is the report's alone.
    with contextlib.redirect_stdout(sys.stderr):
        from finetune.evaluate.report import as_markdown
        from finetune.evaluate.run import evaluate

        folder = Path(args.model)
        report = evaluate(
            args.model,
            args.output or (folder if folder.is_dir() else Path()) / "evaluation",
            args.recipe,
            args.compare,
            args.limit,
            say=_quiet if args.quiet else _say,
            progress=not args.quiet,
        )
    print(json.dumps(report, ensure_ascii=False, indent=1) if args.json else as_markdown(report), end="")


def _report(args: argparse.Namespace) -> None:
    from finetune.cli.report import as_html
    from finetune.system.errors import RunError
    from finetune.system.files import write_whole

    file = args.output or args.run / "report.html"
    if args.output and (file.is_dir() or not file.parent.is_dir()):
        raise RunError(f"--output {file}: write the path of a file in a folder that exists")
    write_whole(file, as_html(args.run))
    if not args.quiet:
        _say(f"written: {file}")


def _doctor(args: argparse.Namespace) -> int:
    from finetune.cli import doctor

    findings, out = [], sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for finding in doctor.examine():
            findings.append(finding)
            if not args.json and (not args.quiet or finding.state == doctor.WRONG):
                print(doctor.as_text(finding), file=out, flush=True)
    if args.json:
        print(doctor.as_json(findings))
    return 2 if any(finding.state == doctor.WRONG for finding in findings) else 0


def _push(args: argparse.Namespace) -> None:
    from finetune.hub.run import push

    print(
        push(
            args.folder,
            args.repo_id,
            args.private,
            args.revision,
            args.create_pr,
            args.base_model,
            say=_quiet if args.quiet else _say,
            progress=not args.quiet and sys.stderr.isatty(),
        )
    )


_VERBS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "train": _train,
    "check": _check,
    "plan": _plan,
    "inspect": _inspect,
    "generate": _generate,
    "merge": _merge,
    "export": _export,
    "evaluate": _evaluate,
    "report": _report,
    "doctor": _doctor,
    "push": _push,
}


def _lines() -> Iterator[str]:
    for line in sys.stdin:
        if text := line.strip():
            yield text


def _chat(generator: Any, system: list[dict[str, str]], sampling: Any) -> None:
    """A conversation on the terminal, with its history, until an empty line or the end of input."""
    _say("an empty line ends the chat")
    messages = list(system)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return
        if not text:
            return
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": _answer(generator, messages, sampling)})


def _answer(generator: Any, messages: list[dict[str, str]], sampling: Any) -> str:
    """Prints an answer as it comes; says on standard error where the limit cut it off."""
    from finetune.model.generate import CUT_OFF

    answer = ""
    for piece in generator.stream(messages, sampling):
        if piece == CUT_OFF:
            print(flush=True)
            _say(f"(did not stop within {sampling.max_new_tokens} tokens)")
            return answer
        answer += piece
        print(piece, end="", flush=True)
    print(flush=True)
    return answer


# ---------------------------------------------------------------------------------------------------------------
# What a person sees


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _quiet(line: str) -> None:
    pass


def _silence() -> None:
    """Upstream's warnings and loading notes, about which a user can do nothing, stay off the screen."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its notes on each retry
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("WANDB_QUIET", "true")  # where its run is, but no table of it
    import logging

    logging.basicConfig(level=logging.ERROR)


def _faults(error: Exception) -> list[str]:
    """The lines to show for an error that the user can mend; none for an error of ours."""
    if isinstance(error, FinetuneError):
        return list(error.faults) if isinstance(error, RecipeError) else [str(error)]
    if isinstance(error, OSError):
        return [f"{error.filename or 'input or output'}: {error.strerror or error}"]
    return []
