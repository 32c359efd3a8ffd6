"""The verbs of the command line, a function each, which imports what it needs when it is called."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.cli.arguments import ExitCode
from finetune.cli.recipe_notes import notes, what_is_trained
from finetune.system import distributed
from finetune.system.errors import RecipeError, RunError
from finetune.system.files import check_replaceable
from finetune.system.numbers import clock
from finetune.system.pages import shell_word, visible
from finetune.system.terminal import Say, print_line, print_text

if TYPE_CHECKING:
    from finetune.recipe.load import Recipe


def _say_unless_quiet(args: argparse.Namespace) -> Say:
    """Prints lines to standard error; nothing with --quiet, and on other ranks than the first."""
    return (lambda line: None) if args.quiet or distributed.rank() else print_line


def _trust(args: argparse.Namespace) -> bool:
    """True if Python files of models may run, by --trust-remote-code; says so."""
    if args.trust_remote_code:
        _say_unless_quiet(args)("--trust-remote-code: Python files that come with the model may run, with your rights")
    return bool(args.trust_remote_code)


def _load_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe that the command line names; says if it lets Python files of its base run."""
    from finetune.recipe.load import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    if recipe.model.trust_remote_code:
        origin = recipe.origins.get("model.trust_remote_code", recipe.path)
        _say_unless_quiet(args)(
            f"{origin}: model.trust_remote_code: Python files that come with {recipe.model.name_or_path} may run, with "
            "your rights"
        )
    return recipe


def _check_file(flag: str, file: Path) -> None:
    if file.is_dir() or not file.parent.is_dir():
        raise RunError(f"{flag} {file}: write the path of a file in a folder that exists")
    check_replaceable(file)


# ---------------------------------------------------------------------------------------------------------------
# Verbs


def _init(args: argparse.Namespace) -> None:
    from finetune.cli.init import init

    with contextlib.redirect_stdout(sys.stderr):
        seen = init(args.data, args.model, args.output, _say_unless_quiet(args))
    print_text(f"{args.data}: {seen.summary}")
    if seen.bad:
        print_text(f"rows that cannot be used: {seen.bad.total():,}; the first is {seen.first_bad}")
    if args.quiet:
        return
    print_line(f"written: {args.output}; next:")
    for command, why in (
        (f"finetune inspect {args.output}", "which tokens are trained on"),
        (f"finetune train {args.output}", ""),
        (f"finetune generate runs/{args.output.stem}", "talk to it"),
    ):
        print_line(f"  {command}{f'  # {why}' if why else ''}")


def _convert(args: argparse.Namespace) -> None:
    from finetune.recipe.convert import convert

    with contextlib.redirect_stdout(sys.stderr):
        if args.output and args.output.exists():
            raise RecipeError([f"--output: {args.output} exists; write another"])
        conversion = convert(args.file)
    if args.output:
        from finetune.system.files import write_whole

        write_whole(args.output, conversion.as_yaml())
    else:
        print_text(conversion.as_yaml(), end="")
    if not args.quiet:
        left = f"; {len(conversion.left)} of them left out, see its end" if conversion.left else ""
        recipe = shell_word(str(args.output)) if args.output else "RECIPE"
        print_line(f"{args.file}: {conversion.peer}, {len(conversion.given)} keys{left}; next: finetune check {recipe}")


def _train(args: argparse.Namespace) -> None:
    from finetune.train.checkpoint import check_output

    distributed.check_launcher()
    # wandb, which transformers 5.23 imports, prints to standard output.
    with contextlib.redirect_stdout(io.StringIO()):
        recipe = _load_recipe(args)
    training = recipe.training
    # Checked before torch and trl are imported, which takes seconds.
    check_output(Path(training["output_dir"]), training.get("resume_from_checkpoint") or False)
    say = _say_unless_quiet(args)
    say(f"recipe: {recipe.path}")
    for line in what_is_trained(recipe):
        say(line)
    from finetune.train.run import train

    began = time.monotonic()
    if args.force:
        output = train(recipe, say)
    else:
        from finetune.plan import preflight

        output = train(recipe, say, preflight.check_memory)
    _say_done(say, began, f"talk to it: finetune generate {shell_word(str(output))}", _last_losses(output))


def _sweep(args: argparse.Namespace) -> ExitCode:
    from finetune.cli import sweep, sweep_plan, sweep_report

    say, began = _say_unless_quiet(args), time.monotonic()
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the comparison alone
        planned = sweep_plan.plan_sweep(Path(args.recipe), args.overrides, args.max_runs)
        say(f"recipe: {planned.path}; {len(planned.runs)} runs below {planned.output}, each on one device")
        for note in planned.notes:
            say(note)
        try:
            sweep.run_sweep(planned, args.force, say)
        except KeyboardInterrupt as stop:
            stop.args = (f"{stop or 'stopped'}; the same command goes on",)
            raise
    rows = planned.rows()
    if args.json:
        print_text((planned.output / "sweep.json").read_text(encoding="utf-8"), end="")
    else:
        print_text("\n".join(sweep_report.as_text(rows)))
    for note in planned.all_notes(rows)[len(planned.notes) :]:
        say(note)
    say(f"written: {planned.output / 'sweep.html'}, sweep.json")
    last = sweep.last_line(planned, rows) or "no run is finished"
    say(f"done in {clock(time.monotonic() - began)}; {last}")
    return ExitCode.USER_ERROR if planned.errors else ExitCode.OK


def _say_done(say: Say, began: float, then: str, figures: str = "") -> None:
    """The last line of a command: how long it took, and the next command."""
    say(f"done in {clock(time.monotonic() - began)}{figures}; {then}")


def _last_losses(output: Path) -> str:
    """The last losses that a run logged, an early stop, and which weights are saved if not simply the last ones."""
    from finetune.system.files import read_records
    from finetune.train.outcome import Outcome

    outcome = Outcome.of(read_records(output / "metrics.jsonl"))
    losses = (("loss", outcome.loss), ("held out", outcome.held_out))
    parts = [f"{name} {loss:.3g}" for name, loss in losses if loss is not None]
    return "".join(f", {part}" for part in [*parts, *outcome.notes()])


def _plan(args: argparse.Namespace) -> ExitCode:
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the plan alone
        from finetune.plan import configs, run, timing
        from finetune.plan.report import as_json, as_text

        recipe = _load_recipe(args)
        hardware = configs.gpu_named(args.gpu) if args.gpu else None
        plan = run.plan(recipe, hardware, args.gpus, say=_say_unless_quiet(args))
        if args.measure:
            plan.measured = timing.measure(args.recipe, args.overrides, _say_unless_quiet(args))
    if args.json:
        print_text(json.dumps(as_json(plan), ensure_ascii=False, indent=1))
    else:
        print_text("\n".join(as_text(plan)))
    return ExitCode.OK if plan.fits else ExitCode.MISSED


def _check(args: argparse.Namespace) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # trackers print when they are imported
        recipe = _load_recipe(args)
    if args.json:
        print_text(json.dumps(recipe.shown_sections(), ensure_ascii=False, indent=1))
    elif not args.quiet:
        print_text(f"{recipe.path}: ok")
        print_text(recipe.to_yaml() if args.all else recipe.given_yaml(), end="")
        for line in notes(recipe):
            print_text(line)


def _schema(args: argparse.Namespace) -> None:
    from finetune.recipe.json_schema import recipe_schema

    with contextlib.redirect_stdout(sys.stderr):
        schema = recipe_schema()
    print_text(json.dumps(schema, indent=1))


def _inspect(args: argparse.Namespace) -> None:
    from finetune.cli import inspect
    from finetune.system.files import write_whole

    if args.html:
        _check_file("--html", args.html)
    with contextlib.redirect_stdout(sys.stderr):
        data = inspect.load(_load_recipe(args), _say_unless_quiet(args))
    count = args.rows
    if count is None and not args.json:
        count = 50 if args.html else 3
    rows = data.rows(count, args.row)
    then = f"next: finetune train {shlex.join([str(args.recipe), *args.overrides])}"
    if args.html:
        write_whole(args.html, inspect.as_html(data, rows))
        _say_unless_quiet(args)(f"written: {args.html}; open it in a browser; {then}")
        return
    text = inspect.as_text(data, rows, sys.stdout, args.tokens)
    for line in inspect.as_json(data, rows) if args.json else text:
        print(line)
    sys.stdout.flush()
    if not args.json:
        _say_unless_quiet(args)(then)


def _generate(args: argparse.Namespace) -> None:
    from finetune.cli.generate import generate

    _trust(args)
    generate(args, print_line)


def _merge(args: argparse.Namespace) -> None:
    from finetune.merge.run import merge

    say, began = _say_unless_quiet(args), time.monotonic()
    output = merge(
        args.folder,
        args.output,
        dtype=args.dtype,
        base=args.base,
        adapters=args.adapter,
        max_shard_size=args.max_shard_size,
        stream_base=args.stream_base,
        overwrite=args.overwrite,
        trust_remote_code=_trust(args),
        say=say,
        progress=not args.quiet,
    )
    word = shell_word(str(output))
    _say_done(say, began, f"talk to it: finetune generate {word}; serve it: finetune serve {word}")


def _export(args: argparse.Namespace) -> ExitCode:
    from finetune.export.run import export, shortfalls

    say, began = _say_unless_quiet(args), time.monotonic()
    output = export(
        args.model,
        args.output,
        args.format,
        args.base,
        dict(args.gate),
        overwrite=args.overwrite,
        trust_remote_code=_trust(args),
        say=say,
        progress=not args.quiet,
    )
    print_text((output / "report.md").read_text(encoding="utf-8"), end="")
    missed = shortfalls(output)
    for line in missed:
        print_line(f"gate: {line}")
    ggufs = (file for file in output.glob("*/*.gguf") if not file.name.endswith("-adapter.gguf"))
    folder = min((file.parent for file in (*output.glob("*/config.json"), *ggufs)), default=None)
    word, serves = shell_word(str(output)), f"; finetune serve {shell_word(str(folder))}" if folder else ""
    _say_done(say, began, f"how each folder is loaded: {word}/*/README.md{serves}; finetune push {word} uploads them")
    return ExitCode.MISSED if missed else ExitCode.OK


def _check_adapter(args: argparse.Namespace) -> ExitCode:
    from finetune.model.adapter_readers import check_adapter

    verdict = check_adapter(args.folder, args.program, args.base)
    for line in verdict.problems or [f"{verdict.reader} takes it"]:
        print_text(line)
    if verdict.problems:
        print_text(f"finetune merge {args.folder} --output DIR writes a whole model, which needs no adapter")
    elif verdict.flags:
        print_text(f"start it with {' '.join(verdict.flags)}")
    print_text(f"by its source: {verdict.source}")
    return ExitCode.MISSED if verdict.problems else ExitCode.OK


def _evaluate(args: argparse.Namespace) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the report alone
        from finetune.evaluate.report import as_markdown
        from finetune.evaluate.run import evaluate

        folder, say, began = Path(args.model), _say_unless_quiet(args), time.monotonic()
        output = args.output or (folder if folder.is_dir() else Path()) / "evaluation"
        if output.is_symlink() and not args.output:
            raise RunError(f"{output} is a link, which may lead anywhere; write --output DIR")
        report = evaluate(
            args.model,
            output,
            args.recipe,
            args.compare,
            args.limit,
            args.server,
            args.server_model,
            base=args.base,
            overrides=args.overrides,
            trust_remote_code=_trust(args),
            say=say,
            progress=not args.quiet,
        )
    print_text(json.dumps(report, ensure_ascii=False, indent=1) if args.json else as_markdown(report), end="")
    _say_done(say, began, f"answers side by side: {shell_word(str(output))}/answers.html")


def _serve(args: argparse.Namespace) -> None:
    from finetune.cli.serve import serve

    _trust(args)
    serve(args, _say_unless_quiet(args))


def _report(args: argparse.Namespace) -> None:
    from finetune.cli.report import as_html
    from finetune.system.files import write_whole

    file = args.output or args.run / "report.html"
    if args.output:
        _check_file("--output", file)
    write_whole(file, as_html(args.run))
    _say_unless_quiet(args)(f"written: {file}; open it in a browser")


def _doctor(args: argparse.Namespace) -> ExitCode:
    from finetune.cli import doctor

    results, out = [], sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for result in doctor.run_checks():
            results.append(result)
            if not args.json and (not args.quiet or result.state == doctor.WRONG):
                print(visible(doctor.as_text(result)), file=out, flush=True)
    if args.json:
        print_text(doctor.as_json(results))
    return ExitCode.USER_ERROR if any(result.state == doctor.WRONG for result in results) else ExitCode.OK


def _push(args: argparse.Namespace) -> None:
    from finetune.hub.run import push

    say, began = _say_unless_quiet(args), time.monotonic()
    print_text(
        push(
            args.folder,
            args.repo_id,
            args.private,
            args.revision,
            args.create_pr,
            args.base_model,
            say=say,
            progress=not args.quiet and sys.stderr.isatty(),
        )
    )
    _say_done(say, began, "its page there says how it is loaded")


VERBS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "init": _init,
    "convert": _convert,
    "train": _train,
    "sweep": _sweep,
    "check": _check,
    "schema": _schema,
    "plan": _plan,
    "inspect": _inspect,
    "generate": _generate,
    "merge": _merge,
    "export": _export,
    "check-adapter": _check_adapter,
    "evaluate": _evaluate,
    "serve": _serve,
    "report": _report,
    "doctor": _doctor,
    "push": _push,
}
