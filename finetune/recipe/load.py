"""A recipe, one YAML file that decides everything about a run, loaded and checked before anything is downloaded."""

import functools
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from finetune.recipe.checks import adapter_lora, check_evaluate, check_hub, check_model, check_rules, check_source
from finetune.recipe.paths import resolve_paths
from finetune.recipe.peers import peer_of
from finetune.recipe.preferences import check_method, check_preferences
from finetune.recipe.schema import (
    DEFAULT_MAX_LENGTH,
    DataSection,
    DataSource,
    EarlyStoppingSection,
    EvaluateSection,
    ExportSection,
    HubSection,
    ImatrixDataSection,
    JudgeSection,
    LmEvalSection,
    Method,
    ModelSection,
    PricesSection,
)
from finetune.recipe.unknown_keys import Keys, unknown_key
from finetune.recipe.upstream import check_quantization, check_section
from finetune.recipe.upstream_objects import check_objects
from finetune.recipe.upstream_types import INNER, upstream_keys
from finetune.recipe.yaml_scalars import quoted, scalar_text
from finetune.recipe.yaml_tree import Node, RecipeTree, Section, Sections, override, read_file
from finetune.system.errors import RecipeError

# The sections that are not an upstream configuration.
OWN_SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelSection,
    "data": DataSection,
    "early_stopping": EarlyStoppingSection,
    "export": ExportSection,
    "evaluate": EvaluateSection,
    "hub": HubSection,
}


@dataclass(frozen=True)
class Recipe:
    """A recipe that has passed every check.

    `training`, `lora` and `quantization` are keyword arguments of `schema.CONFIGS[method]`, `peft.LoraConfig` and
    `transformers.BitsAndBytesConfig`, but for `lora["trainable_token_indices"]`, which may be "auto".
    `lora` is None where all weights are trained: a recipe without the section trains an adapter with peft's defaults.
    `early_stopping` is None where the training runs to its end.
    `origins` maps the dotted key of each value that is not a default to `FILE:LINE` or "command line". Recipes with
    equal values are equal, whatever the origins.
    """

    method: Method
    model: ModelSection
    data: DataSection
    export: ExportSection
    evaluate: EvaluateSection
    hub: HubSection
    training: Section
    lora: Section | None
    quantization: Section | None
    origins: dict[str, str] = field(compare=False)
    path: Path = field(compare=False)
    early_stopping: EarlyStoppingSection | None = None
    # The nodes of values from the environment, by key; their templates, such as `${NAME}`, are saved and shown.
    _from_environment: dict[str, Node] = field(default_factory=dict, compare=False, repr=False)

    @property
    def max_length(self) -> int | None:
        """The most tokens of a row, `training.max_length`; None if there is no limit."""
        length: int | None = self.training.get("max_length", DEFAULT_MAX_LENGTH)
        return length

    def to_yaml(self) -> str:
        """The recipe with all defaults, and each value's origin as a comment; `${NAME}` stays as it was written.

        `load_recipe` loads an equal recipe from it, in the same working directory and environment.
        """
        return "\n".join(self._lines(self.sections(), "", "")) + "\n"

    def given_yaml(self) -> str:
        """The values that are not defaults, each with its origin as a comment."""
        given = self._given(self.sections(), "")
        return "\n".join(self._lines(given, "", "")) + "\n"

    def _given(self, value: Any, key: str) -> Any:
        """The parts of a value that were written; None where nothing was."""
        if key in self.origins or not isinstance(value, dict | list):
            return value if key in self.origins else None
        if isinstance(value, list):
            items = [self._given(child, f"{key}.{i}") for i, child in enumerate(value)]
            return items if any(item is not None for item in items) else None
        parts = {name: self._given(child, f"{key}.{name}".lstrip(".")) for name, child in value.items()}
        kept = {name: part for name, part in parts.items() if part is not None or f"{key}.{name}" in self.origins}
        return kept or None

    @property
    def templates(self) -> dict[str, str]:
        """The dotted key of each value from the environment, and the text that is shown in its place."""
        return {key: node.template for key, node in self._from_environment.items() if node.template}

    def environment_values(self) -> dict[str, Any]:
        """The values from the environment that are no secrets, by dotted key. They are kept in memory alone."""
        return {key: node.value for key, node in self._from_environment.items() if not node.secret}

    def shown_sections(self) -> Section:
        """`sections`, with `${NAME}` as it was written."""
        shown: Section = self._shown(self.sections(), "")
        return shown

    def _shown(self, value: Any, key: str) -> Any:
        if key in self._from_environment:
            return self._from_environment[key].template
        if isinstance(value, dict):
            return {name: self._shown(child, f"{key}.{name}".lstrip(".")) for name, child in value.items()}
        return [self._shown(child, f"{key}.{i}") for i, child in enumerate(value)] if isinstance(value, list) else value

    def sections(self) -> Section:
        """The method and the sections as plain data; `lora` is null if all weights are trained."""
        names = ("method", "model", "data", "training", "early_stopping", "lora", "quantization")
        values = {name: getattr(self, name) for name in (*names, "export", "evaluate", "hub")}
        values |= {name: values[name].model_dump() for name in OWN_SECTIONS if values[name] is not None}
        return {name: section for name, section in values.items() if section is not None or name == "lora"}

    def _lines(self, value: Any, key: str, indent: str) -> Iterator[str]:
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for name, child in entries:
            dotted = f"{key}.{name}".lstrip(".")
            head = f"{indent}{scalar_text(name)}:" if isinstance(value, dict) else f"{indent}-"
            if isinstance(child, dict | list) and child:
                lines = self._lines(child, dotted, indent + "  ")
                yield head if isinstance(value, dict) else f"{head} {next(lines).lstrip()}"
                yield from lines
                continue
            # Only in values: `${` in a key is not expanded.
            escaped = child.replace("${", "$${") if isinstance(child, str) else child
            node = self._from_environment.get(dotted)
            text = scalar_text(escaped)
            if node and node.template:
                text = node.template if node.unquoted else quoted(node.template)
            origin = "".join(c if c.isprintable() else "?" for c in self.origins.get(dotted, "default"))
            yield f"{head} {text}  # {origin}"


@functools.cache
def known_keys(method: str = "sft") -> Keys:
    """The keys of every section; computed at the first call, because it imports trl and peft.

    Args:
        method: The recipe's method.
    """
    own: Section = {name: typing.get_type_hints(section, include_extras=True) for name, section in OWN_SECTIONS.items()}
    sections = own | upstream_keys(method)
    inner: dict[str, type[BaseModel]] = {
        "source": DataSource,
        "judge": JudgeSection,
        "lm_eval": LmEvalSection,
        "imatrix_data": ImatrixDataSection,
        "prices": PricesSection,
        **INNER,
    }
    within = {name: section.model_fields for name, section in inner.items()}
    return {"": {"method": Method, **sections}, "method": {}, **within, **sections}


def _checked_sections(tree: RecipeTree, keys: Keys) -> Sections:
    """The valid keys and values of every section; adds the faults of all checks to the tree."""
    for name in tree.root.value:
        if name not in keys[""]:
            unknown_key(tree, name, "", keys)
    for section, required in (("model", "name_or_path"), ("data", "train")):
        node = tree.root.child(section)
        if node is None or (isinstance(node.value, dict) and required not in node.value):
            tree.fault(section, f"has no {required}; write {section}: {{{required}: ...}}")
    sections = {section: check_section(tree, section, keys) for section in keys[""] if section != "method"}
    if not any(message.startswith("training") for _, message in tree.faults):
        check_objects(tree, sections["training"])
    check_model(tree, sections["model"])
    for key in ("data.train", "data.eval"):
        sources = tree.at(key).plain()
        for i, source in enumerate(sources if isinstance(sources, list) else []):
            if isinstance(source, dict):
                check_source(tree, f"{key}.{i}", source)
    check_evaluate(tree, sections["evaluate"])
    check_hub(tree, sections["hub"], sections["model"])
    check_rules(tree, sections)
    check_preferences(tree, sections)
    if "quantization" in tree.root.value:
        check_quantization(tree, sections["quantization"])
    return sections


def _lora_section(tree: RecipeTree, sections: Sections, keys: Keys) -> Section | None:
    """The `lora` section with its defaults, or that of `model.adapter`; None if all weights are trained.

    Raises:
        RecipeError: The section contradicts the adapter's.
    """
    if adapter := sections["model"].get("adapter"):
        lora = adapter_lora(tree, adapter, sections["lora"], keys["lora"])
        if tree.faults:
            raise RecipeError(tree.report())
    elif tree.trains_all_weights:
        return None
    else:
        lora = {"target_modules": "all-linear", "trainable_token_indices": "auto", **sections["lora"]}
    if lora.get("trainable_token_indices") == "none":
        lora["trainable_token_indices"] = None
    return lora


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, after all checks that need no weights, rows or network.

    Args:
        path: The YAML file. `extends` and the paths of files to read are relative to it; files that are not there are
            looked for in the working directory, to which `training.output_dir` and paths in `overrides` are relative.
        overrides: `section.key=value`, the value in YAML. A map is merged, everything else is replaced.

    Raises:
        RecipeError: The recipe has faults. Each is a line `FILE:LINE: section.key: what is there; what to write`.
    """
    path = Path(path)
    tree = RecipeTree(Node({}, str(path)))
    root = read_file(path, tree)
    if root is None:
        raise RecipeError(tree.report())
    tree.root = root
    if peer := peer_of(root.plain()):
        instead = f"finetune convert {path} > recipe.yaml"
        raise RecipeError([f"{path}: looks like a configuration of {peer}, not a recipe; write {instead}"])
    for text in overrides:
        override(tree, text)
    resolve_paths(tree)
    tree.trains_all_weights = "lora" in root.value and root.value["lora"].value is None
    # A section that is null is removed.
    root.value = {name: node for name, node in root.value.items() if node.value is not None}

    check_method(tree)
    if any(message.startswith("method:") for _, message in tree.faults):
        raise RecipeError(tree.report())  # the method decides which keys there are
    keys = known_keys(tree.method)
    sections = _checked_sections(tree, keys)
    if tree.faults:
        raise RecipeError(tree.report())

    lora = _lora_section(tree, sections, keys)
    leaves = dict(root.leaves())
    data = DataSection.model_validate(sections["data"])
    for name in ("train", "eval"):
        for i, source in enumerate(getattr(data, name)):
            source._template = leaves[f"data.{name}.{i}.path"].template or ""
    return Recipe(
        method=typing.cast("Method", tree.method),
        model=ModelSection.model_validate(sections["model"]),
        data=data,
        early_stopping=(
            EarlyStoppingSection.model_validate(sections["early_stopping"]) if "early_stopping" in root.value else None
        ),
        export=ExportSection.model_validate(sections["export"]),
        evaluate=EvaluateSection.model_validate(sections["evaluate"]),
        hub=HubSection.model_validate(sections["hub"]),
        training={"output_dir": f"runs/{path.stem}", "report_to": "none", **sections["training"]},
        lora=lora,
        quantization=sections["quantization"] if "quantization" in root.value else None,
        origins={key: leaf.origin for key, leaf in leaves.items()},
        path=path,
        _from_environment={key: leaf for key, leaf in leaves.items() if leaf.template},
    )
