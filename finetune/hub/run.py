"""A run, a merged model or an export to a repository on the Hub, in one commit."""

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
from finetune.system import hub_errors
from finetune.system.errors import PushError
from finetune.system.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, WEIGHTS_INDEX
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
    """The address of the commit that has put a folder on the Hub.

    Args:
        folder: A run, one of its checkpoints, a merged model, an export, or one of its formats.
        repo_id: owner/name; absent, as the recipe says. It is made if it is not there.
        private: Whether it is private when it is made; absent, as the recipe says.
        revision: The branch; it is made if it is not there.
        create_pr: Opens a pull request with the commit in place of changing the branch.
        base_model: The Hub id of the base.
        say: Gets a line for each thing that a person may want to know.
        progress: Whether a terminal shows bars.

    Raises:
        PushError: There is nothing to push, a token is in it, or the Hub does not take it.
        RunError: A file of the folder is damaged.
    """
    folder = Path(folder)
    section = provenance.recipe_sections(folder).get("hub") or {}
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
    """Refuses what can be known to fail before the Hub is asked.

    Raises:
        PushError: Nobody is logged in, or the Hub may not be asked.
    """
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        raise PushError("HF_HUB_OFFLINE is set, so nothing can be put on the Hub; unset it")
    if not get_token():
        raise PushError(
            "nobody is logged in to the Hub; run hf auth login, or set HF_TOKEN, with a token that may write "
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
    """The address of the commit that holds a payload. What the Hub has already is not sent again.

    Raises:
        PushError: The Hub does not take it; nothing of it is to be seen there.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with hub_errors.quiet_hub_client(bars=progress), _one_line_errors(repo_id):
        if not create_pr:
            api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise PushError(
                f"{repo_id} is there already, and everybody can see it; make it private on its page "
                f"({api.endpoint}/{repo_id}/settings), or leave private out"
            )
        if revision and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.model_info(repo_id, revision=revision)
        there = {file.rfilename for file in before.siblings or ()}
        files = dict(payload.files)
        if "README.md" in there and _edited_on_hub(api, repo_id, before.sha, files["README.md"]):
            del files["README.md"]
            say(
                f"{repo_id}: its page was changed there, and stays; delete it there to have the one of finetune"
            )
        gone = sorted(_replaced_weights(there, files))
        if gone:
            say(f"{repo_id}: removed there, since it is of another model: {', '.join(gone)}")
        done = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in files.items()]
            + [CommitOperationDelete(name) for name in gone],
            commit_message=payload.title,
            revision=revision,
            create_pr=create_pr,
        )
    if done.oid == before.sha:
        say(f"{repo_id} has all of it already")
    return str(done.pr_url or done.commit_url)


def _replaced_weights(there: set[str], files: Mapping[str, bytes | Path]) -> set[str]:
    """What a repository holds of another model, which programs would load in place of a whole one that comes now.

    transformers takes an adapter before a model, and one file before shards; vLLM goes by an index that is there.
    """
    if not any(fnmatchcase(name, weights) for name in files for weights in MODEL_FILES):
        return set()
    others = (*MODEL_FILES, WEIGHTS_INDEX, ADAPTER_WEIGHTS, ADAPTER_CONFIG)
    top = {name for name in there - set(files) if "/" not in name}
    return {name for name in top if any(fnmatchcase(name, other) for other in others)}


def _edited_on_hub(api: HfApi, repo_id: str, commit: str | None, ours: bytes | Path) -> bool:
    """Whether a person has written or changed the page on the Hub, and not the one that is to come."""
    assert isinstance(ours, bytes)
    if not card.is_generated(ours.decode()):
        return False
    with tempfile.TemporaryDirectory() as place:
        file = api.hf_hub_download(repo_id, "README.md", revision=commit, local_dir=place)
        text = Path(file).read_text(encoding="utf-8", errors="replace")
    # The Hub's own first page has metadata alone.
    words = re.sub(r"\A---\n.*?^---\s*$", "", text, count=1, flags=re.DOTALL | re.MULTILINE)
    return bool(words.strip()) and not card.is_generated(text)


@contextlib.contextmanager
def _one_line_errors(repo_id: str) -> Iterator[None]:
    """A failure in one line that says what to do."""
    try:
        yield
    except PushError:
        raise
    except Exception as error:  # Xet, HTTP, YAML: upstream has no error for all of them
        again = "nothing was committed, and what has arrived is not sent again: push once more"
        # What is wrong with a page, upstream tells itself.
        if "README.md" not in str(error) and (words := hub_errors.hub_problem(repo_id, error)):
            raise PushError(f"{repo_id} {words} ({again})") from error
        cause = error.__cause__ if isinstance(error, RuntimeError) else None
        reason = " ".join(f"{error} {cause or ''}".split()) or type(error).__name__
        raise PushError(f"{repo_id}: {reason} ({again})") from error
