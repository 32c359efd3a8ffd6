"""The files of a push: those of a run, a merged model or an export that are on a list, and the model card.

In text files the base is named by its id on the Hub; absolute paths become relative to the working directory, or keep
only their last part. A file that holds a secret stops the push.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from finetune.hub import card
from finetune.model import provenance
from finetune.model.attach import check_adapter_files
from finetune.recipe.checks import is_hub_id
from finetune.system import hub_errors, secret_scan
from finetune.system.cache import cache_dir
from finetune.system.errors import PushError
from finetune.system.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_WEIGHTS, WEIGHTS_INDEX, read_json
from finetune.system.terminal import Say

# The files of a full model's weights.
MODEL_FILES = (MODEL_WEIGHTS, "model-*-of-*.safetensors")
_WEIGHTS = (*MODEL_FILES, ADAPTER_WEIGHTS, "*.gguf")
# The only files that are pushed. All others stay: checkpoints, optimizer states, sampled answers, pickles, caches.
_PUSHED = (
    *_WEIGHTS,
    *(ADAPTER_CONFIG, "config.json", "generation_config.json", WEIGHTS_INDEX),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("recipe.yaml", "environment.json", "ledger.json", "metrics.jsonl", "loss.png", "README.md"),
    *("evaluation/report.json", "evaluation/report.md", "evaluation/answers.html"),
    *("merge.json", "report.json", "report.md", "imatrix.dat", "test.log", "Modelfile"),
)
# The files of the run that a model was merged or exported from: its card is made from them.
_RUN_FILES = ("recipe.yaml", "environment.json", "ledger.json", "metrics.jsonl", "loss.png")
# Files with answers of the model.
_ANSWER_FILES = ("evaluation/", "test.log")
_TEXT_FILES = (".json", ".jsonl", ".yaml", ".md", ".html", ".log", ".txt", ".jinja", "Modelfile")
# Vocabularies hold no paths, and are large: they are pushed unchanged.
_VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
# An absolute path in a recipe, where every value of that form is a path.
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~}<-])/(?:[^\s/\"'#:,<>]+/)+[^\s/\"'#:,<>]*")
# Files in which `..._token` names a token of the vocabulary.
_OF_TOKENS = re.compile(r"token|processor")
# The first bytes of a binary file that are searched for secrets. The metadata of a GGUF file, with its vocabulary, come
# before the weights, and have 5 to 15 MB.
_SEARCHED_BYTES, _SEARCHED_GGUF_BYTES = 2**20, 2**25


@dataclass(frozen=True)
class Payload:
    """The files of one commit, by their name in the repository: the content, or the path of the file to send."""

    files: dict[str, bytes | Path]
    title: str


def make_payload(
    folder: Path, repo_id: str, base_model: str | None = None, say: Say = lambda line: None, ask: bool = True
) -> Payload:
    """The commit that holds a folder.

    Args:
        folder: A run, one of its checkpoints, a merged model, an export, or one of its formats.
        repo_id: The repository, owner/name.
        base_model: The Hub id of the base; by default the one that the folder's files name.
        say: Called with a line for a missing license or an edited card.
        ask: Reads the license of the base from the Hub if its id does not imply one.

    Raises:
        PushError: The folder holds nothing to push, its base has no id on the Hub, or a file holds a secret.
        ModelError: Its adapter is not PEFT's, or a pointer of Git LFS.
        RunError: A file of the folder is damaged.
    """
    if not folder.is_dir():
        raise PushError(f"{folder}: the folder does not exist; write a run, a merged model or an export")
    if provenance.is_adapter(folder):
        check_adapter_files(folder)
    formats = _format_folders(folder)
    if len(formats) == 1 and not any(path for weights in _WEIGHTS for path in folder.glob(weights)):
        # Programs expect a model's files at the root of a repository.
        folder = formats[0]
    found = dict(_pushed_files(folder))
    if not any(fnmatchcase(Path(name).name, weights) for name in found for weights in _WEIGHTS):
        raise PushError(
            f"{folder} holds nothing to push (an adapter, model.safetensors or GGUF files); "
            "write a finished run, a merged model or an export"
        )
    base = _base_on_hub(folder, base_model)
    assert base.hub
    if (run := provenance.source_run(folder)) and run != folder:
        found |= {name: path for name, path in _pushed_files(run) if name in _RUN_FILES and name not in found}

    terms = provenance.license_of(base.hub) or (_license_on_hub(base.hub) if ask else {})
    if not terms and ask:
        say(f"license: {base.hub} names no license, so the model card names none")
    paths, readme = _LocalPaths(folder, run, base), found.pop("README.md", None)
    text = _read_text(readme) if readme else ""
    if text and not (card.is_generated(text) or card.is_of_peft(text)):
        say(f"{readme} was edited, and is pushed as it is")
        page = paths.rewritten("README.md", text)
    else:
        page = card.mark_generated(paths.rewritten("README.md", card.folder_card(folder, repo_id, base, terms)))
    files: dict[str, bytes | Path] = {"README.md": page.encode()}
    for name, path in sorted(found.items()):
        files[name] = _file_content(name, path, paths, base)
    for name, content in files.items():
        _refuse_secrets(folder, name, content, paths)
    step = f", {folder.name}" if folder.name.startswith("checkpoint-") else ""
    return Payload(files, f"{_commit_title(found)}{step}")


def _base_on_hub(folder: Path, base_model: str | None) -> provenance.BaseReference:
    """The base of a folder; without an id on the Hub it is refused."""
    base = provenance.base_reference(folder, base_model)
    if base.hub is None:
        known = f"is {base.name}, which is only on this machine" if base.name else "is not known"
        raise PushError(
            f"{folder}: its base {known}; write --base-model with its id on the Hub (in a recipe: hub.base_model)"
        )
    if not is_hub_id(base.hub) and "/" in base.hub:
        raise PushError(f"--base-model is {base.hub!r}; write owner/name")
    return base


def _pushed_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of a folder, and of an export's formats, that are on the list, with their names in the repository.

    Raises:
        PushError: One of them is a link out of the folder.
    """
    real_folder = Path(os.path.realpath(folder))
    for place in (folder, *_format_folders(folder)):
        # The model of a config with `auto_map` cannot be loaded without its code.
        code = ("*.py",) if place == folder and "auto_map" in read_json(folder / "config.json") else ()
        for pattern in (*_PUSHED, *code):
            for path in sorted(place.glob(pattern)):
                if path.is_file() and not (place != folder and path.name == "README.md"):
                    if not (target := Path(os.path.realpath(path))).is_relative_to(real_folder):
                        raise PushError(
                            f"{path} is a link to {target}, out of the folder, and nothing is pushed; remove the link, "
                            "or put the file in its place"
                        )
                    yield path.relative_to(folder).as_posix(), path


def _format_folders(folder: Path) -> list[Path]:
    """The folders of an export's formats; empty for any other folder."""
    if not (folder / "report.json").is_file():
        return []
    inner = [path.parent for path in sorted(folder.glob("*/config.json"))]
    inner += [path.parent for path in sorted(folder.glob(f"*/{ADAPTER_CONFIG}"))]
    inner += [path.parent for path in sorted(folder.glob("*/*.gguf"))]
    return list(dict.fromkeys(inner))


def _commit_title(found: dict[str, Path]) -> str:
    if ADAPTER_WEIGHTS in found:
        return "Adapter"
    return "GGUF files" if any(name.endswith(".gguf") for name in found) else "Model"


def _file_content(name: str, path: Path, paths: _LocalPaths, base: provenance.BaseReference) -> bytes | Path:
    """The file to send: its path, or its text with the paths of this machine rewritten."""
    if path.name in _VOCABULARY_FILES or not path.name.endswith(_TEXT_FILES):
        return path
    text = _read_text(path)
    if path.name == ADAPTER_CONFIG:
        config = json.loads(text) | {"base_model_name_or_path": base.hub, "revision": base.revision}
        text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    elif name.endswith(".json") and "\\u" in text:
        # JSON escapes could hide a path.
        text = json.dumps(json.loads(text), ensure_ascii=False, indent=1) + "\n"
    return paths.rewritten(name, text).encode()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PushError(f"{path} is damaged: {error}") from error


class _LocalPaths:
    """Rewrites the paths of this machine that a run's files name."""

    def __init__(self, folder: Path, run: Path | None, base: provenance.BaseReference) -> None:
        self.base = base
        here = {os.path.realpath(path) for path in (folder, run or folder, Path.cwd())}
        here |= {os.path.dirname(path) for path in here} | {str(Path.home()), str(cache_dir())}
        # Paths of one part, such as /content, may be ordinary text: of these only the home directory is rewritten.
        self.deep = sorted((path for path in here if path.count("/") > 1), key=len, reverse=True)
        self.all = sorted({*self.deep, str(Path.home())} - {"/"}, key=len, reverse=True)
        named: set[str] = set()
        for _, path in (*_pushed_files(folder), *(_pushed_files(run) if run else ())):
            if path.name in _VOCABULARY_FILES:
                continue
            if path.suffix == ".json":
                named |= set(_paths_in(read_json(path)))
            elif path.name == "recipe.yaml":
                named |= set(_paths_in(provenance.recipe_sections(path.parent)))
        self.named = sorted(named, key=len, reverse=True)

    def rewritten(self, name: str, text: str) -> str:
        """A text without paths of this machine."""
        if self.base.hub and self.base.name.startswith(("/", "~", ".")):
            text = text.replace(self.base.name, self.base.hub)
        for path in self.named:
            if path in text:
                text = re.sub(rf"{re.escape(path)}(?![\w-])", lambda match: _shortened(match[0]), text)
        if name.endswith("recipe.yaml"):
            text = _ABSOLUTE_PATH.sub(lambda match: _shortened(match[0]), text)
        # Prompts and answers may name a path such as /root that many machines have.
        for path in self.deep if name.startswith(_ANSWER_FILES) else self.all:
            if path in text:
                rest = r"(?![\w.-])(?:/[^\s\"'`,;)<>|]*)?"
                text = re.sub(rf"(?<![\w.]){re.escape(path)}{rest}", lambda match: _shortened(match[0]), text)
        return text

    def find_in(self, data: bytes) -> str | None:
        """A path of this machine that occurs in the bytes; None if none does."""
        return next((path for path in self.deep if f"{path}/".encode() in data), None)


def _shortened(path: str) -> str:
    """A path relative to the working directory, or only its last part if it lies outside."""
    inside = os.path.relpath(path) if os.path.isabs(path) else path
    return Path(path).name if inside.startswith("..") else inside


def _paths_in(value: Any) -> Iterator[str]:
    """The texts in JSON data, keys included, that are absolute paths."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _paths_in(key)
            yield from _paths_in(child)
    elif isinstance(value, list):
        for child in value:
            yield from _paths_in(child)
    elif isinstance(value, str) and re.fullmatch(r"/[^\n]*[^/\n]/[^\n]+", value):
        yield value


def _refuse_secrets(folder: Path, name: str, content: bytes | Path, paths: _LocalPaths) -> None:
    """Refuses a file that holds a secret, or a path that could not be rewritten."""
    from huggingface_hub import get_token

    head = content
    if isinstance(content, Path):
        most = _SEARCHED_GGUF_BYTES if content.suffix == ".gguf" else _SEARCHED_BYTES
        with content.open("rb") as file:
            head = file.read(-1 if content.name in _VOCABULARY_FILES else most)
    assert isinstance(head, bytes)
    variables = (value for key, value in os.environ.items() if secret_scan.SECRET_NAME_PATTERN.search(key))
    secrets = [value for value in variables if len(value) > 7]
    if isinstance(content, bytes):
        searched = content.decode("utf-8", "replace")
    elif content.name in _VOCABULARY_FILES:
        searched = secret_scan.long_words(head.decode("utf-8", "replace"))
    else:
        searched = _printable(head)
    found = secret_scan.find_secret(searched)
    if any(token and os.fsencode(token) in head for token in (get_token(), *secrets)):
        found = "the token in use, or the value of a variable that holds one"
    if isinstance(content, bytes) and name.endswith((".json", "recipe.yaml")) and not _OF_TOKENS.search(name):
        found = found or secret_scan.find_named_secret(
            (json.loads if name.endswith(".json") else yaml.safe_load)(searched)
        )
    if found:
        raise PushError(
            f"{folder / name} holds a secret ({found}), and nothing is pushed; remove it from the file, and revoke it"
        )
    if isinstance(content, Path) and content.name not in _VOCABULARY_FILES and (path := paths.find_in(head)):
        raise PushError(
            f"{folder / name} names {path}, a path of this machine, and nothing is pushed; write the file without it"
        )


def _printable(data: bytes) -> str:
    """The texts in binary data, each on a line."""
    return b"\n".join(re.findall(rb"[\x20-\x7e]{16,}", data)).decode()


def _license_on_hub(base: str) -> dict[str, str]:
    """The license that the base's own card on the Hub names; empty if it cannot be read."""
    from huggingface_hub import HfApi

    with hub_errors.quiet_hub_client(bars=False):
        try:
            data = HfApi().model_info(base, timeout=10).card_data
        # The base may be gated or gone, or its card unreadable.
        except Exception:
            return {}
    metadata: dict[str, str] = data.to_dict() if data else {}  # type: ignore[no-untyped-call]
    return {key: metadata[key] for key in ("license", "license_name", "license_link") if metadata.get(key)}


def linked_copy(payload: Payload, folder: Path) -> Payload:
    """The payload with its files hard-linked into a folder, so that it can be sent after the originals are removed."""
    files: dict[str, bytes | Path] = {}
    for name, content in payload.files.items():
        if isinstance(content, Path):
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(os.path.realpath(content), place)
            # Not every filesystem has hard links.
            except OSError:
                shutil.copyfile(content, place)
            content = place
        files[name] = content
    return replace(payload, files=files)
