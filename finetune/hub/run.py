"""`push`: puts a run, a merged model or an export into a repository on the Hub, in one commit."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.hub import card
from finetune.hub.payload import MODEL_FILES, Payload, make_payload
from finetune.model import provenance
from finetune.recipe.checks import is_hub_id
from finetune.recipe.yaml_tree import expanded
from finetune.system import hub_errors
from finetune.system.errors import PushError
from finetune.system.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, WEIGHTS_INDEX, is_full
from finetune.system.terminal import Say

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def push(
    folder: str | Path,
    repo_id: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
    say: Say = lambda line: None,
    progress: bool = False,
) -> str:
    """Pushes a folder to the Hub and returns the address of the commit.

    Args:
        folder: A run, one of its checkpoints, a merged model, an export, or one of its formats.
        repo_id: The repository, owner/name; by default the recipe's. It is created if it does not exist.
        private: Creates a private repository; by default `hub.private` of the recipe.
        revision: The branch; it is created if it does not exist.
        create_pr: Opens a pull request with the commit in place of changing the branch.
        base_model: The Hub id of the base; by default the one that the folder's files name.
        say: Called with a line for each thing that differs from a plain push.
        progress: Shows progress bars on a terminal.

    Raises:
        PushError: There is nothing to push, a file holds a secret, or the Hub refuses it.
        RunError: A file of the folder is damaged.
    """
    folder = Path(folder)
    section = expanded(provenance.recipe_sections(folder).get("hub") or {})
    repo_id = repo_id or section.get("repo_id")
    if not repo_id:
        raise PushError("no repository is named; write --repo-id owner/name, or hub.repo_id in the recipe")
    if not is_hub_id(repo_id):
        raise PushError(f"--repo-id is {repo_id!r}; write owner/name")
    check_access()
    payload = make_payload(folder, repo_id, base_model, say)
    private = section.get("private", False) if private is None else private
    return send(payload, repo_id, private, revision, create_pr, say, progress)


def check_access() -> None:
    """Refuses a push that would fail, before any request.

    Raises:
        PushError: Nobody is logged in, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        raise PushError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
    if not get_token():
        raise PushError(
            "nobody is logged in to the Hub; run hf auth login, or set HF_TOKEN, with a token that has write access "
            f"({constants.ENDPOINT}/settings/tokens)"
        )


def send(
    payload: Payload,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    say: Say = lambda line: None,
    progress: bool = False,
) -> str:
    """Commits a payload and returns the address of the commit. Files that the Hub has already are not sent again.

    Args:
        payload: The files.
        repo_id: The repository, owner/name; it is created if it does not exist.
        private: Creates a private repository, and refuses an existing public one.
        revision: The branch; it is created if it does not exist.
        create_pr: Opens a pull request with the commit in place of changing the branch.
        say: Called with a line for files that are kept or removed in the repository.
        progress: Shows progress bars on a terminal.

    Raises:
        PushError: The Hub refuses it; the repository is unchanged.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with hub_errors.quiet_hub_client(bars=progress), _one_line_errors(repo_id):
        if not create_pr:
            api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise PushError(
                f"{repo_id} exists and is public; make it private on its page "
                f"({api.endpoint}/{repo_id}/settings), or leave private out"
            )
        if revision and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.model_info(repo_id, revision=revision)
        existing = {file.rfilename for file in before.siblings or ()}
        files = dict(payload.files)
        if "README.md" in existing and _edited_on_hub(api, repo_id, before.sha, files["README.md"]):
            del files["README.md"]
            say(f"{repo_id}: its model card was edited on the Hub and is kept; delete it there to replace it")
        stale = sorted(_stale_weights(existing, files))
        if stale:
            say(f"{repo_id}: removed files of another model: {', '.join(stale)}")
        done = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in files.items()]
            + [CommitOperationDelete(name) for name in stale],
            commit_message=payload.title,
            revision=revision,
            create_pr=create_pr,
        )
    if done.oid == before.sha:
        say(f"{repo_id} is up to date already")
    return str(done.pr_url or done.commit_url)


def _stale_weights(existing: set[str], files: Mapping[str, bytes | Path]) -> set[str]:
    """Files of another model in the repository that programs would load in place of the full model in `files`.

    transformers prefers an adapter to a model, and one file to shards; vLLM follows an index if there is one.
    """
    if not any(fnmatchcase(name, weights) for name in files for weights in MODEL_FILES):
        return set()
    others = (*MODEL_FILES, WEIGHTS_INDEX, ADAPTER_WEIGHTS, ADAPTER_CONFIG)
    top = {name for name in existing - set(files) if "/" not in name}
    return {name for name in top if any(fnmatchcase(name, other) for other in others)}


def _edited_on_hub(api: HfApi, repo_id: str, commit: str | None, new_card: bytes | Path) -> bool:
    """True if a person has edited the card on the Hub and the new one is generated."""
    assert isinstance(new_card, bytes)
    if not card.is_generated(new_card.decode()):
        return False
    with tempfile.TemporaryDirectory() as place:
        file = api.hf_hub_download(repo_id, "README.md", revision=commit, local_dir=place)
        text = Path(file).read_text(encoding="utf-8", errors="replace")
    # The card that the Hub creates itself has only metadata.
    body = re.sub(r"\A---\n.*?^---\s*$", "", text, count=1, flags=re.DOTALL | re.MULTILINE)
    return bool(body.strip()) and not card.is_generated(text)


@contextlib.contextmanager
def _one_line_errors(repo_id: str) -> Iterator[None]:
    """Raises any failure again as a PushError, one line that says what to do."""
    try:
        yield
    except PushError:
        raise
    # Upstream has no common class for its errors of HTTP, Xet and YAML.
    except Exception as error:
        again = "nothing was committed; push again, files that have arrived are not sent again"
        if is_full(error):  # the card on the Hub is all that a push writes here
            raise PushError(
                f"{repo_id}: the disk of {tempfile.gettempdir()} is full, to which its card is fetched; free some "
                f"space, or set TMPDIR ({again})"
            ) from error
        # Upstream's own message says what is wrong with a card.
        if "README.md" not in str(error) and (problem := hub_errors.hub_problem(repo_id, error)):
            raise PushError(f"{repo_id} {problem} ({again})") from error
        cause = error.__cause__ if isinstance(error, RuntimeError) else None
        reason = " ".join(f"{error} {cause or ''}".split()) or type(error).__name__
        raise PushError(f"{repo_id}: {reason} ({again})") from error
