"""The runs of a sweep: each combination of some values as a checked recipe, with a folder of its own."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import re
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune.cli.sweep_report import RunRow, as_html, as_json, differ_in_held_out_rows
from finetune.recipe.load import Recipe, load_recipe
from finetune.recipe.yaml_scalars import list_items, quoted
from finetune.recipe.yaml_tree import COMMAND_LINE
from finetune.system.errors import RecipeError
from finetune.system.files import LOCK, write_json, write_whole

# Values that the sweep itself gives each run.
_OWN_KEYS = ("extends", "training.output_dir", "training.resume_from_checkpoint", "training.run_name", "hub")
# The longest name of a run's folder, and of one value in it.
_LONGEST_NAME, _LONGEST_VALUE = 80, 24


@dataclass(frozen=True)
class SweepRun:
    """One combination of values.

    Attributes:
        name: The name of its folder in that of the sweep.
        values: The values that differ between runs as they were written, by key.
        overrides: The words of the command line with this combination.
        recipe: The recipe with them; `training.output_dir` is still that of all runs.
    """

    name: str
    values: dict[str, str]
    overrides: list[str]
    recipe: Recipe

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.recipe.training["output_dir"], self.name)

    def own_overrides(self) -> list[str]:
        """The values that the sweep gives the run: its folder, and a name of its own where the recipe has one."""
        own = [f"training.output_dir={_text(str(self.folder))}"]
        if run_name := self.recipe.training.get("run_name"):
            own.append(f"training.run_name={_text(f'{run_name}-{self.name}')}")  # trackers take one name for one run
        if self.recipe.hub.repo_id:
            own.append("hub=null")  # each run would replace the one before
        if self.folder.is_dir() and any(path.name != LOCK for path in self.folder.iterdir()):
            own.append("training.resume_from_checkpoint=true")
        return own


def _text(value: str) -> str:
    return quoted(value.replace("${", "$${"))


@dataclass
class Sweep:
    """The runs of one command, and what is known of earlier ones.

    Attributes:
        path: The recipe's file.
        output: The recipe's own `training.output_dir`, which holds the folders of the runs.
        runs: All combinations, in the order of the command line.
        group: The name under which wandb shows the runs together.
        sources: The fingerprint of each file of rows, by its path.
        errors: Why a run failed the last time, by its name.
        notes: Lines about the comparison, for the terminal and the page.
    """

    path: Path
    output: Path
    runs: list[SweepRun]
    group: str
    sources: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @functools.cached_property
    def keys(self) -> list[str]:
        """The keys that differ between runs."""
        return list(self.runs[0].values)

    def rows(self) -> list[RunRow]:
        """The state and the figures of each run, read from its folder."""
        return [RunRow.of(run.name, run.values, run.folder, self.errors.get(run.name)) for run in self.runs]

    def write(self) -> None:
        """Writes `sweep.json` and `sweep.html`."""
        rows = self.rows()
        saved = {"recipe": str(self.path), "group": self.group, "sources": self.sources, "notes": self.all_notes(rows)}
        write_json(self.output / "sweep.json", as_json(rows, saved))
        write_whole(self.output / "sweep.html", as_html(self.output, rows, self.all_notes(rows)))

    def all_notes(self, rows: Sequence[RunRow]) -> list[str]:
        """The notes, and one that only finished runs can give."""
        differ = ["the held-out rows or their tokens differ between runs, so that their losses cannot be compared"]
        return [*self.notes, *(differ if differ_in_held_out_rows(rows) else [])]


def plan_sweep(path: Path, words: Sequence[str], most: int) -> Sweep:
    """The runs that a command line asks for, each checked as by `finetune check`.

    Args:
        path: The recipe.
        words: `section.key=value`. The items of a list are values to try, any other value is that of all runs.
        most: The most runs.

    Raises:
        RecipeError: A value is refused, there is nothing to try, or there are too many combinations.
    """
    keys = [word.partition("=")[0] for word in words]
    choices = [_choices(word) for word in words]
    swept = {key: items for key, items in zip(keys, choices, strict=True) if len(items) > 1}
    _check_words(words, keys, swept)
    count = math.prod(map(len, swept.values()))
    if count > most:
        raise _refused(f"{count:,} combinations are more than {most}; write fewer values, or --max-runs {count}")
    combinations = list(itertools.product(*choices))
    values = [{key: text for key, text in zip(keys, chosen, strict=True) if key in swept} for chosen in combinations]
    faults: dict[str, None] = {}
    runs = []
    for name, value, chosen in zip(run_names(values), values, combinations, strict=True):
        # A word without "=" stays as it is, for the message.
        overrides = [
            f"{key}={text}" if "=" in word else word for word, key, text in zip(words, keys, chosen, strict=True)
        ]
        try:
            runs.append(SweepRun(name, value, overrides, load_recipe(path, overrides)))
        except RecipeError as error:
            faults |= dict.fromkeys(error.faults)
    if faults:
        raise RecipeError(list(faults))
    _check_runs(runs)
    output = runs[0].folder.parent
    sweep = Sweep(path, output, runs, f"{output.resolve().name}-{secrets.token_hex(4)}")
    if any(run.recipe.hub.repo_id for run in runs):
        sweep.notes.append(
            "hub.repo_id: the runs of a sweep are not pushed; finetune push RUN --repo-id ... pushes one"
        )
    if not any(run.recipe.data.eval or run.recipe.data.eval_fraction for run in runs):
        sweep.notes.append(
            "no rows are held out, so that the runs are compared by their training loss, which says little about new "
            "rows; data.eval_fraction=0.05 holds some out"
        )
    return sweep


def _choices(word: str) -> list[str]:
    """The values that a word of the command line gives its key, as they are written."""
    value = word.partition("=")[2]
    items = list_items(value)
    return [value] if items is None else items


def _refused(line: str) -> RecipeError:
    return RecipeError([f"{COMMAND_LINE}: {line}"])


def _check_words(words: Sequence[str], keys: Sequence[str], swept: Mapping[str, list[str]]) -> None:
    """Refuses keys that the sweep sets itself, keys without a value or given twice, and a sweep over nothing."""
    for key, times in Counter(keys).items():
        if times > 1:
            raise _refused(f"{key}: is given {times} times; write it once, with a list of its values")
        if key in swept and (key in _OWN_KEYS or key.startswith("hub.")):
            raise _refused(f"{key}: is the sweep's own for each run; write one value, or leave it out")
    for word, key in zip(words, keys, strict=True):
        if list_items(word.partition("=")[2]) == []:
            raise _refused(f"{key}: is an empty list; write the values to try, such as {key}=[1, 2]")
    if not swept:
        raise _refused("no key has several values to try; write them as a list: training.learning_rate=[1e-4,2e-4]")


def run_names(values: Sequence[Mapping[str, str]]) -> list[str]:
    """A name for each run's folder, from the values that differ: `learning_rate-1e-4_r-8`.

    It has letters, digits and `._+-` alone. A value that has other characters, or is long, adds a hash.

    Args:
        values: The values of each run as they are written, by key.
    """
    lasts = Counter(key.rpartition(".")[2] for key in values[0])
    names = []
    for one in values:
        parts, lossy = [], False
        for key, text in one.items():
            last = key.rpartition(".")[2]
            plain = re.sub(r",\s*", "-", re.sub(r"[\[\]'\"]", "", text))
            kept = re.sub(r"[^A-Za-z0-9._+-]+", "-", plain)[:_LONGEST_VALUE]
            lossy = lossy or kept != plain
            parts.append(f"{re.sub('[^A-Za-z0-9_]+', '-', last if lasts[last] == 1 else key)}-{kept}")
        name = "_".join(parts).rstrip(".")
        names.append(_hashed(name, one) if lossy or len(name) > _LONGEST_NAME else name)
    same = Counter(name.casefold() for name in names)
    return [_hashed(n, one) if same[n.casefold()] > 1 else n for n, one in zip(names, values, strict=True)]


def _hashed(name: str, values: Mapping[str, str]) -> str:
    return f"{name[:_LONGEST_NAME]}-{hashlib.blake2b(json.dumps(values).encode(), digest_size=4).hexdigest()}"


def _check_runs(runs: Sequence[SweepRun]) -> None:
    """Refuses two combinations that are one recipe, such as learning rates 1e-4 and 0.0001, and a given checkpoint."""
    if any(run.recipe.training.get("resume_from_checkpoint") for run in runs):
        raise _refused("training.resume_from_checkpoint: a sweep resumes its runs by itself; leave it out")
    seen: dict[str, SweepRun] = {}
    for run in runs:
        if run.folder.parent != runs[0].folder.parent:
            raise _refused("training.output_dir: differs between runs; write one folder, which will hold them all")
        text = json.dumps(run.recipe.sections(), sort_keys=True, default=str)
        if (first := seen.setdefault(text, run)) is not run:
            pairs = (", ".join(f"{key}={value}" for key, value in one.values.items()) for one in (first, run))
            raise _refused(f"{' and '.join(pairs)} are one and the same run; leave one of them out")
