"""A run, a merged model or an export to a repository on the Hub, in one commit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from finetune import hub, origin
from finetune.checks import is_repo
from finetune.parcel import Parcel, PushError, Say, pack


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
    section = origin.sections_of(folder).get("hub") or {}
    repo_id = repo_id or section.get("repo_id")
    if not repo_id:
        raise PushError("no repository is named; write --repo-id owner/name, or hub.repo_id in the recipe")
    if not is_repo(repo_id):
        raise PushError(f"--repo-id is {repo_id!r}; write owner/name")
    check_access()
    parcel = pack(folder, repo_id, base_model, say)
    private = section.get("private", False) if private is None else private
    return send(parcel, repo_id, private, revision, create_pr, say, progress)


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
    parcel: Parcel,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    say: Say = lambda line: None,
    progress: bool = False,
) -> str:
    """The address of the commit that holds a parcel. What the Hub has already is not sent again.

    Raises:
        PushError: The Hub does not take it; nothing of it is to be seen there.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    operations = [CommitOperationAdd(name, content) for name, content in parcel.files.items()]
    with hub.quiet(bars=progress), _told(repo_id):
        if not create_pr:
            api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise PushError(
                f"{repo_id} is there already, and everybody can see it; make it private on its page "
                f"({api.endpoint}/{repo_id}/settings), or leave private out"
            )
        if revision and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.model_info(repo_id, revision=revision).sha
        done = api.create_commit(
            repo_id, operations, commit_message=parcel.title, revision=revision, create_pr=create_pr
        )
    if done.oid == before:
        say(f"{repo_id} has all of it already")
    return str(done.pr_url or done.commit_url)


@contextlib.contextmanager
def _told(repo_id: str) -> Iterator[None]:
    """A failure in one line that says what to do."""
    try:
        yield
    except PushError:
        raise
    except Exception as error:  # Xet, HTTP, YAML: upstream has no error for all of them
        again = "nothing was committed, and what has arrived is not sent again: push once more"
        # What is wrong with a page, upstream tells itself.
        if "README.md" not in str(error) and (words := hub.trouble(repo_id, error)):
            raise PushError(f"{repo_id} {words} ({again})") from error
        cause = error.__cause__ if isinstance(error, RuntimeError) else None
        reason = " ".join(f"{error} {cause or ''}".split()) or type(error).__name__
        raise PushError(f"{repo_id}: {reason} ({again})") from error
