"""Rewords errors of the Hub so that they say what to do, and hides its client's log lines and progress bars."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


def hub_problem(repo: str, error: BaseException) -> str | None:
    """The problem with a repository, as a phrase that follows its name; None if the error is not from the Hub.

    Libraries raise their own errors from those of the Hub's client, so the whole chain is searched.

    Args:
        repo: The repository: `owner/name`, or `datasets/owner/name`.
        error: Any error.

    Source: huggingface_hub 2.4 `utils/_http.py`, `hf_raise_for_status`; `errors.py`.
    """
    import httpx2
    from huggingface_hub import constants, errors

    chain = list(_chain(error))
    for one in chain:
        if isinstance(one, errors.GatedRepoError):
            return (
                f"is gated: accept its terms on {constants.ENDPOINT}/{repo}, and log in to the account that did so "
                "(hf auth login, or HF_TOKEN)"
            )
        if isinstance(one, errors.RevisionNotFoundError):
            return "has no such revision; write a branch, tag or commit that it has"
        if isinstance(one, errors.RemoteEntryNotFoundError):
            return f"has no {str(one.response.url.path).rpartition('/')[2]}"
        if isinstance(one, errors.HfHubHTTPError):
            return _http_problem(one)
    if any(isinstance(one, errors.OfflineModeIsEnabled) for one in chain) or (
        constants.is_offline_mode() and any(isinstance(one, errors.LocalEntryNotFoundError) for one in chain)
    ):
        return (
            "is not in this machine's cache, and HF_HUB_OFFLINE is set; unset it, or run "
            f"hf download {repo.replace('datasets/', '--repo-type dataset ')} where there is a network"
        )
    for one in chain:
        if isinstance(one, httpx2.TransportError | errors.LocalEntryNotFoundError | ConnectionError):
            return (
                f"cannot be reached: {constants.ENDPOINT} does not answer; check the network (a proxy: HTTPS_PROXY; "
                "another Hub: HF_ENDPOINT)"
            )
    return None


def _http_problem(error: HfHubHTTPError) -> str:
    """The meaning of an HTTP status for which the Hub's client has no error."""
    from huggingface_hub import constants, errors, get_token

    status, message = error.response.status_code, (error.server_message or "").strip()
    logged_in = get_token() is not None
    if status == 401 and logged_in:
        return (
            "is refused: the token is not valid or has expired; make one on "
            f"{constants.ENDPOINT}/settings/tokens and run hf auth login (or set HF_TOKEN)"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return (
            f"is not on {constants.ENDPOINT}, or is private; check the name"
            + ("" if logged_in else ", and log in if it is yours (hf auth login, or HF_TOKEN)")
            + (", and whether this account may see it" if logged_in else "")
        )
    if status == 403:
        return (
            f"is not allowed for this token ({message or 'forbidden'}); check the owner's name, or make a token that "
            f"may write there on {constants.ENDPOINT}/settings/tokens"
        )
    if status == 412:
        return "was changed by somebody else at the same moment"
    if status == 429:
        return "is rate-limited by the Hub; wait some minutes and try again"
    if status >= 500:
        return f"is not available: the Hub answers with {status}; try again later"
    return f"is refused by the Hub ({status}): {message.splitlines()[0] if message else 'it gives no reason'}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and all those that it was raised from."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__


@contextlib.contextmanager
def quiet_hub_client(bars: bool) -> Iterator[None]:
    """Hides the log lines of the Hub's client, of retries above all, and without `bars` its progress bars too."""
    from huggingface_hub import utils

    level, shown = utils.logging.get_verbosity(), not utils.are_progress_bars_disabled()  # type: ignore[attr-defined]
    utils.logging.set_verbosity(logging.ERROR)
    if not bars:
        utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        utils.logging.set_verbosity(level)
        if shown and not bars:
            utils.enable_progress_bars()  # type: ignore[attr-defined]
