"""An OpenAI-compatible chat endpoint, asked with patience, and every reply of it kept on disk.

A reply is kept under all that decides it, so what was interrupted goes on, and nothing is paid for twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import textwrap
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx2

from finetune.system.errors import EvaluateError, RefusedReply
from finetune.system.files import write_whole
from finetune.system.terminal import Say

_MAX_TRIES = 6  # how often a request is sent that comes to nothing
_MAX_WAIT = 60.0  # seconds between two of them
_MIN_KEY_LENGTH = (
    8  # characters; what local servers are given for a key may be shorter, and a word of any reply
)
# Waits, but not beyond the event; true if that was set.
_wait: Callable[[threading.Event, float], bool] = threading.Event.wait


@dataclass(frozen=True)
class Usage:
    """What some replies took; `cost` in USD, None where the prices or the tokens of a reply are not known."""

    replies: int
    input_tokens: int
    output_tokens: int
    untold: int
    """Replies whose tokens the endpoint does not tell; they are in neither sum."""
    cost: float | None

    def __str__(self) -> str:
        if self.cost is not None:
            return f"{self.cost:.2f} USD"
        untold = f" (without {self.untold:,} replies that do not tell)" if self.untold else ""
        return f"{self.input_tokens:,} tokens in and {self.output_tokens:,} out{untold}"


@dataclass(frozen=True)
class Reply:
    """What the model said."""

    text: str
    cut: bool
    """Whether `max_tokens` ended it."""
    tokens: tuple[int, int] | None
    """Of input and output, where the endpoint tells."""
    cached: bool


def usage(replies: Sequence[Reply], prices: tuple[float, float] | None) -> Usage:
    """What replies took, at prices in USD for a million input and a million output tokens."""
    told = [reply.tokens for reply in replies if reply.tokens]
    given, made = (sum(tokens[i] for tokens in told) for i in (0, 1))
    untold = len(replies) - len(told)
    cost = None if prices is None or untold else (given * prices[0] + made * prices[1]) / 1e6
    return Usage(len(replies), given, made, untold, cost)


def check_address(base_url: str, key: str) -> None:
    """Refuses what no request can be sent with.

    Raises:
        JudgeError: The address is none, or holds what may be a secret; the key cannot stand in a header.
    """
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL:
        url = httpx2.URL("")
    if url.userinfo or url.query or url.fragment:  # not shown
        raise EvaluateError(
            "evaluate.judge.base_url: it holds more than an address; write it without user, password, ? and #, and put "
            "a key into the environment variable OPENAI_API_KEY"
        )
    if (
        url.scheme not in ("http", "https")
        or not url.host
        or url.path.rstrip("/").endswith("/chat/completions")
    ):
        raise EvaluateError(
            f"evaluate.judge.base_url: {base_url!r} is not where an API begins; write what stands before "
            "/chat/completions, such as http://localhost:8000/v1"
        )
    if not all("!" <= character <= "~" for character in key):
        raise EvaluateError(
            "OPENAI_API_KEY: it holds a space, a line break or a letter that no key has; set it anew"
        )


@dataclass
class Endpoint:
    """One model at one address, and what was learned of both on the way; threads share it.

    Attributes:
        key: Sent to `base_url` and nowhere else; empty for an endpoint that wants none.
        timeout: Seconds in which nothing comes.
        max_tokens: Of one reply.
        cache: A folder that is there.
        say: Takes a line on whatever has to be waited for or left out.
        stop: Set once nothing more shall be sent.
        requests: Sent so far, those that came to nothing included.
    """

    base_url: str
    model: str
    key: str = field(repr=False)
    timeout: float
    max_tokens: int
    cache: Path
    say: Say
    stop: threading.Event = field(default_factory=threading.Event)
    requests: int = 0

    def __post_init__(self) -> None:
        self._url = self.base_url.rstrip("/") + "/chat/completions"
        self._settings = {"temperature": 0, "max_tokens": self.max_tokens}
        self._said_lines: set[str] = set()
        self._lock = threading.Lock()

    def client(self) -> httpx2.Client:
        """A connection of one thread's own; it follows no redirection, which would take the key elsewhere."""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        return httpx2.Client(headers=headers, timeout=self.timeout)

    def reply(self, messages: list[dict[str, str]], client: httpx2.Client) -> Reply:
        """What the model says to messages: from the cache, or asked for and put there.

        Raises:
            RefusedError: The endpoint refuses these messages.
            JudgeError: It cannot be reached, or refuses everything.
        """
        # Not the settings as they were sent: which of them the endpoint takes is known only once it was asked.
        decides = [self._url, self.model, 0, self.max_tokens, messages]
        path = self.cache / f"{hashlib.sha256(json.dumps(decides).encode()).hexdigest()}.json"
        with contextlib.suppress(FileNotFoundError, ValueError, LookupError, TypeError):
            kept = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(kept["text"], str):
                return Reply(kept["text"], kept["cut"] is True, _token_counts(kept["tokens"]), cached=True)
        reply = self._send(messages, client)
        write_whole(path, json.dumps({"text": reply.text, "cut": reply.cut, "tokens": reply.tokens}))
        return reply

    def _send(self, messages: list[dict[str, str]], client: httpx2.Client) -> Reply:
        settings = self._settings
        tries = 0
        while True:
            with self._lock:
                self.requests += 1
            pause = None
            body = {"model": self.model, "messages": messages, **settings}
            try:
                response = client.post(self._url, content=json.dumps(body))
            except httpx2.RequestError as error:
                fault = self._error_text(str(error)) or type(error).__name__
            else:
                status, text = response.status_code, response.content.decode("utf-8", "replace")
                if status in (400, 422) and (fewer := _settings_without(settings, text)):
                    settings = fewer
                    continue
                if status == 200 and (reply := self._parsed(text)):
                    if settings != self._settings:
                        gone = " nor ".join(name for name in self._settings if name not in settings)
                        self._say_once(
                            f"judge: {self.model} takes no {gone}; it is asked with {', '.join(settings)}"
                        )
                        self._settings = settings
                    return reply
                fault = f"HTTP {status} {self._error_text(text)}".rstrip()
                if status in (400, 413, 422):
                    raise RefusedReply(f"the endpoint refused it: {fault}")
                # Some answer 200 with an error of the service behind them.
                if status != 429 and status < 500 and not (status == 200 and _error_in(text)):
                    raise EvaluateError(self._permanent_error(status, fault))
                pause = _retry_after(response.headers.get("Retry-After", ""))
            tries += 1
            if tries == _MAX_TRIES:
                raise EvaluateError(
                    f"evaluate.judge.base_url: {self.base_url} failed {tries} times: {fault}; what was answered "
                    "until now is kept, so run it again later"
                )
            self._say_once(f"judge: {fault}; it is asked again")
            if pause is None:
                pause = random.uniform(0.5, 1) * min(_MAX_WAIT, 2.0**tries)
            if _wait(self.stop, pause):
                raise EvaluateError("stopped")

    def _parsed(self, text: str) -> Reply | None:
        """A chat completion; None where the text is something else."""
        try:
            body = json.loads(text)
            choice = body["choices"][0]
            content = choice["message"]["content"] or ""
            if not isinstance(content, str):
                return None
            usage = body.get("usage") or {}
            tokens = _token_counts([usage.get("prompt_tokens"), usage.get("completion_tokens")])
            return Reply(
                self._without_key(content), choice.get("finish_reason") == "length", tokens, cached=False
            )
        except (ValueError, LookupError, TypeError, AttributeError):
            return None

    def _permanent_error(self, status: int, fault: str) -> str:
        """What a person has to change, in one line."""
        url, model, key = self.base_url, self.model, "the environment variable OPENAI_API_KEY"
        if status == 401:
            what = "does not take this key" if self.key else "wants a key"
            return f"evaluate.judge.base_url: {url} {what} (HTTP 401); put one that it gave out into {key}"
        if status == 403:
            return (
                f"evaluate.judge.model: {url} does not let you use {model} (HTTP 403); choose another, or put "
                f"another key into {key}"
            )
        if status == 404:
            return (
                f"evaluate.judge: {self._url} is not there, or knows no model {model} (HTTP 404); base_url is what "
                "stands before /chat/completions, such as http://localhost:8000/v1"
            )
        return f"evaluate.judge.base_url: {url} gives no chat completion: {fault}"

    def _error_text(self, text: str) -> str:
        """What an error says, on one line."""
        return textwrap.shorten(self._without_key(_error_in(text) or text), 200, placeholder=" ...")

    def _without_key(self, text: str) -> str:
        """A text without the key, should an endpoint say it back."""
        return text.replace(self.key, "***") if len(self.key) >= _MIN_KEY_LENGTH else text

    def _say_once(self, line: str) -> None:
        """Says a line once."""
        with self._lock:
            new = line not in self._said_lines
            self._said_lines.add(line)
        if new:
            self.say(line)


def _settings_without(settings: dict[str, int], refusal: str) -> dict[str, int] | None:
    """Settings without the one that a refusal names; newer models call `max_tokens` otherwise."""
    if "temperature" in settings and "temperature" in refusal:
        return {name: value for name, value in settings.items() if name != "temperature"}
    if "max_tokens" in settings and "max_tokens" in refusal:
        others = {name: value for name, value in settings.items() if name != "max_tokens"}
        return others | {"max_completion_tokens": settings["max_tokens"]}
    return None


def _error_in(text: str) -> str:
    """The message of an error in JSON; empty where there is none."""
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, TypeError):
        return ""


def _retry_after(value: str) -> float | None:
    """Seconds to wait as the header says, which are a number or a date; None without one that can be read."""
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return min(float(value), _MAX_WAIT)
    try:
        seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return None
    return min(max(seconds, 0.0), _MAX_WAIT)


def _token_counts(numbers: Any) -> tuple[int, int] | None:
    """Input and output tokens; None where they are not told."""
    given = isinstance(numbers, list) and len(numbers) == 2 and all(isinstance(n, int) for n in numbers)
    return (numbers[0], numbers[1]) if given else None
