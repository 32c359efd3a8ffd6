"""What went wrong with the Hub, as words that say what to do; upstream's notes on it kept from the screen."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


def hub_problem(repo: str, error: BaseException) -> str | None:
    """What follows a repository's name in a line that tells of a failure; None where the Hub has no part in it.

    Upstream's libraries raise errors of their own from those of the Hub's client, which are looked for beneath them.

    Source: huggingface_hub 2.4 `utils/_http.py`, `hf_raise_for_status`; `errors.py`.
    """
    import httpx2
    from huggingface_hub import constants, errors

    chain = list(_beneath(error))
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
            return _answered(one)
    if any(isinstance(one, errors.OfflineModeIsEnabled) for one in chain) or (
        constants.is_offline_mode() and any(isinstance(one, errors.LocalEntryNotFoundError) for one in chain)
    ):
        return (
            "is not in this machine's cache, and HF_HUB_OFFLINE keeps from asking the Hub; unset it, or run "
            f"hf download {repo.replace('datasets/', '--repo-type dataset ')} where there is a network"
        )
    for one in chain:
        if isinstance(one, httpx2.TransportError | errors.LocalEntryNotFoundError | ConnectionError):
            return (
                f"cannot be reached: {constants.ENDPOINT} does not answer; look at the network (a proxy: HTTPS_PROXY; "
                "another Hub: HF_ENDPOINT)"
            )
    return None


def _answered(error: BaseException) -> str:
    """What a status means where the Hub names no reason that has an error of its own."""
    from huggingface_hub import constants, errors, get_token

    assert isinstance(error, errors.HfHubHTTPError)
    status, said = error.response.status_code, (error.server_message or "").strip()
    known = get_token() is not None
    if status == 401 and known:
        return (
            "is refused: the token is not valid, or no longer; make one on "
            f"{constants.ENDPOINT}/settings/tokens and run hf auth login (or set HF_TOKEN)"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return (
            f"is not on {constants.ENDPOINT}, or is private; look at the name"
            + ("" if known else ", and log in if it is yours (hf auth login, or HF_TOKEN)")
            + (", and whether this account may see it" if known else "")
        )
    if status == 403:
        return (
            f"is not for this token ({said or 'forbidden'}); look at its owner's name, or make one that may write "
            f"there on {constants.ENDPOINT}/settings/tokens"
        )
    if status == 429:
        return "is asked for too often; wait some minutes and try again"
    if status >= 500:
        return f"cannot be had: the Hub answers with {status}; try again later"
    return f"is refused by the Hub ({status}): {said.splitlines()[0] if said else 'it does not say why'}"


def _beneath(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it was raised from."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__


@contextlib.contextmanager
def quiet_hub_client(bars: bool) -> Iterator[None]:
    """Keeps the client's notes, of retries above all, from the screen, and its bars unless they are wanted."""
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
