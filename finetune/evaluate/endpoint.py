"""Requests to an OpenAI-compatible chat endpoint: repeated when they fail, and every reply kept on disk.

A reply is kept under a hash of the request, so an interrupted evaluation resumes and no reply is paid for twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import socket
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx2

from finetune.system.errors import EvaluateError, RefusedReply
from finetune.system.files import write_whole
from finetune.system.terminal import Say

# The attempts before a request fails, and the most seconds between two attempts.
_MAX_TRIES = 6
_MAX_WAIT = 60.0
# The most bytes of a response's body, and the time from a request to the response's end in multiples of
# `Endpoint.timeout`.
_MAX_BYTES = 1 << 23
_MAX_TIMEOUTS = 5
# Shorter keys are not removed from replies: local servers take any word as a key, such as "no".
_MIN_KEY_LENGTH = 8
# Waits for that many seconds, or until the event is set; true if it was set.
_wait: Callable[[threading.Event, float], bool] = threading.Event.wait


@dataclass(frozen=True)
class Usage:
    """The tokens and the cost of some replies.

    Attributes:
        replies: The number of replies.
        input_tokens: The sum of their input tokens.
        output_tokens: The sum of their output tokens.
        untold: The number of replies without token counts, which are in neither sum.
        cost: In USD; None if the prices or the tokens of a reply are not known.
    """

    replies: int
    input_tokens: int
    output_tokens: int
    untold: int
    cost: float | None

    def __str__(self) -> str:
        if self.cost is not None:
            return f"{self.cost:.2f} USD"
        untold = f" (without {self.untold:,} replies that do not say)" if self.untold else ""
        return f"{self.input_tokens:,} tokens in and {self.output_tokens:,} out{untold}"


@dataclass(frozen=True)
class Reply:
    """A reply of the model.

    Attributes:
        text: The text.
        cut: True if `max_tokens` cut it off.
        calls: The functions that it calls, as JSON; empty if it calls none.
        tokens: The numbers of input and output tokens; None if the endpoint does not report them.
        cached: True if the reply was read from the cache.
    """

    text: str
    cut: bool
    tokens: tuple[int, int] | None
    cached: bool
    calls: str = ""


def usage(replies: Sequence[Reply], prices: tuple[float, float] | None) -> Usage:
    """The tokens and the cost of replies, at prices in USD for a million input and a million output tokens."""
    counts = [reply.tokens for reply in replies if reply.tokens]
    input_tokens, output_tokens = (sum(tokens[i] for tokens in counts) for i in (0, 1))
    untold = len(replies) - len(counts)
    cost = None if prices is None or untold else (input_tokens * prices[0] + output_tokens * prices[1]) / 1e6
    return Usage(len(replies), input_tokens, output_tokens, untold, cost)


def check_address(base_url: str, key: str, place: str = "evaluate.judge", variable: str = "OPENAI_API_KEY") -> None:
    """Refuses an address or a key that cannot be used for requests.

    Raises:
        EvaluateError: The address is not that of an API or may hold a secret, or the key has a character that an HTTP
            header cannot have.
    """
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL:
        url = httpx2.URL("")
    # The message does not show the address, which may hold a secret.
    if url.userinfo or url.query or url.fragment:
        raise EvaluateError(
            f"{place}.base_url: it holds more than an address; write it without user, password, ? and #, and put "
            f"a key into the environment variable {variable}"
        )
    if url.scheme not in ("http", "https") or not url.host or url.path.rstrip("/").endswith("/chat/completions"):
        raise EvaluateError(
            f"{place}.base_url: {base_url!r} is not the base URL of an API; write the part before "
            "/chat/completions, such as http://localhost:8000/v1"
        )
    if not all("!" <= character <= "~" for character in key):
        raise EvaluateError(f"{variable}: it holds a character that no key has, such as a space; set it anew")


@dataclass
class Endpoint:
    """A model at an address, with the settings that the endpoint accepts; threads share it.

    Attributes:
        base_url: The start of the API, such as http://localhost:8000/v1.
        model: The model's name at the endpoint.
        key: Sent to `base_url` and nowhere else; empty for an endpoint that needs none.
        timeout: Seconds without a byte after which a request fails; all of it may take five times as long.
        max_tokens: The longest reply.
        cache: An existing folder for the replies; None: they are not kept.
        say: Called with a line when a request is repeated or a setting is left out.
        place: The recipe's section, for messages.
        variable: The environment variable of the key, for messages.
        stop: Set when no more requests may be sent.
        requests: The number of requests sent, failed ones included.
    """

    base_url: str
    model: str
    key: str = field(repr=False)
    timeout: float
    max_tokens: int
    cache: Path | None
    say: Say
    place: str = "evaluate.judge"
    variable: str = "OPENAI_API_KEY"
    stop: threading.Event = field(default_factory=threading.Event)
    requests: int = 0

    def __post_init__(self) -> None:
        self._url = self.base_url.rstrip("/") + "/chat/completions"
        self._settings = {"temperature": 0, "max_tokens": self.max_tokens}
        self._name = self.place.rpartition(".")[2]
        self._said_lines: set[str] = set()
        self._lock = threading.Lock()
        self._connection = threading.local()

    def client(self) -> httpx2.Client:
        """An HTTP client for one thread; it follows no redirects, which would send the key elsewhere."""
        # Not compressed: a small response could become a large one.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        return httpx2.Client(headers=headers, timeout=self.timeout)

    def reply(self, messages: Sequence[Mapping[str, Any]], client: httpx2.Client, **fields: Any) -> Reply:
        """The model's reply to messages, from the cache or by a request.

        Args:
            messages: The conversation, in the API's form.
            client: Sends the request.
            fields: Further fields of the request, such as `tools`; replies to such requests are not kept.

        Raises:
            RefusedReply: The endpoint refuses these messages.
            EvaluateError: The endpoint cannot be reached, or refuses every request.
        """
        if self.cache is None or fields:
            return self._send(messages, client, fields)
        # The cache's key has all settings of the recipe; which the endpoint accepts is known only after a request.
        request = [self._url, self.model, 0, self.max_tokens, messages]
        path = self.cache / f"{hashlib.sha256(json.dumps(request).encode()).hexdigest()}.json"
        with contextlib.suppress(FileNotFoundError, ValueError, LookupError, TypeError, RecursionError):
            kept = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(kept["text"], str):
                return Reply(kept["text"], kept["cut"] is True, _token_counts(kept["tokens"]), cached=True)
        reply = self._send(messages, client, fields)
        write_whole(path, json.dumps({"text": reply.text, "cut": reply.cut, "tokens": reply.tokens}))
        return reply

    def model_ids(self, client: httpx2.Client) -> list[str]:
        """The names of the models that the endpoint lists.

        Raises:
            EvaluateError: The endpoint cannot be reached, or lists none.
        """
        url = self.base_url.rstrip("/") + "/models"
        try:
            with self._deadline() as extensions, client.stream("GET", url, extensions=extensions) as response:
                text = self._read(response)
        except httpx2.RequestError as error:
            fault = self._error_text(str(error)) or type(error).__name__
            raise EvaluateError(f"{self.place}.base_url: {self.base_url} cannot be reached: {fault}") from error
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            if response.status_code == 200 and (found := [str(model["id"]) for model in json.loads(text)["data"]]):
                return found
        if response.status_code == 401:
            raise EvaluateError(self._permanent_error(401, ""))
        raise EvaluateError(
            f"{self.place}.base_url: {url} lists no models (HTTP {response.status_code}); write {self.place}.model"
        )

    def _send(self, messages: Sequence[Mapping[str, Any]], client: httpx2.Client, fields: Mapping[str, Any]) -> Reply:
        settings = self._settings
        tries = 0
        while True:
            with self._lock:
                self.requests += 1
            pause = None
            body = {"model": self.model, "messages": messages, **settings, **fields}
            try:
                with (
                    self._deadline() as extensions,
                    client.stream("POST", self._url, content=json.dumps(body), extensions=extensions) as response,
                ):
                    text = self._read(response)
            except httpx2.RequestError as error:
                fault = self._error_text(str(error)) or type(error).__name__
            else:
                status = response.status_code
                if status in (400, 422) and (fewer := _settings_without(settings, text)):
                    settings = fewer
                    continue
                if status == 200 and (reply := self._parsed(text)):
                    if settings != self._settings:
                        gone = " or ".join(name for name in self._settings if name not in settings)
                        self._say_once(
                            f"{self._name}: {self.model} does not take {gone}; requests are sent with "
                            f"{', '.join(settings)}"
                        )
                        self._settings = settings
                    return reply
                fault = f"HTTP {status} {self._error_text(text)}".rstrip()
                if status in (400, 413, 422):
                    raise RefusedReply(f"the endpoint refused it: {fault}")
                # Some endpoints answer 200 with an error of their upstream service in the body.
                if status != 429 and status < 500 and not (status == 200 and _error_in(text)):
                    raise EvaluateError(self._permanent_error(status, fault))
                pause = _retry_after(response.headers.get("Retry-After", ""))
            tries += 1
            if tries == _MAX_TRIES:
                raise EvaluateError(
                    f"{self.place}.base_url: {self.base_url} failed {tries} times: {fault}; "
                    + ("the replies so far are kept, so run it again later" if self.cache else "run it again later")
                )
            self._say_once(f"{self._name}: {fault}; the request is sent again")
            if pause is None:
                pause = random.uniform(0.5, 1) * min(_MAX_WAIT, 2.0**tries)
            if _wait(self.stop, pause):
                raise EvaluateError("stopped")

    @contextlib.contextmanager
    def _deadline(self) -> Iterator[dict[str, Any]]:
        """Ends this thread's connection if a request and its response take too long; yields the request's extensions.

        httpx's own timeouts hold for each piece that arrives, of the head as of the body.

        Raises:
            EvaluateError: It took too long.
        """
        connection, late, seconds = self._connection, threading.Event(), _MAX_TIMEOUTS * self.timeout

        def keep_socket(event: str, info: Mapping[str, Any]) -> None:
            # A later request may use the same connection.
            if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
                current[:] = [info["return_value"].get_extra_info("socket")]

        def end() -> None:
            late.set()
            for one in current:
                with contextlib.suppress(OSError):  # it has ended
                    one.shutdown(socket.SHUT_RDWR)

        current = connection.__dict__.setdefault("sockets", [])
        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield {"trace": keep_socket}
        except httpx2.RequestError:
            if not late.is_set():
                raise
        finally:
            timer.cancel()
        if late.is_set():
            raise EvaluateError(f"{self.place}.base_url: {self.base_url} was still sending a reply after {seconds:g} s")

    def _read(self, response: httpx2.Response) -> str:
        """The text of a response.

        Raises:
            EvaluateError: It is too large.
        """
        body = bytearray()
        for piece in response.iter_raw():
            body += piece
            if len(body) > _MAX_BYTES:
                raise EvaluateError(
                    f"{self.place}.base_url: {self.base_url} sent more than {_MAX_BYTES:,} bytes in one reply"
                )
        return body.decode("utf-8", "replace")

    def _parsed(self, text: str) -> Reply | None:
        """The reply in a chat completion; None if the text is something else."""
        try:
            body = json.loads(text)
            choice = body["choices"][0]
            content = choice["message"].get("content") or ""
            if not isinstance(content, str):
                return None
            functions = [call["function"] for call in choice["message"].get("tool_calls") or ()]
            counts = body.get("usage") or {}
            tokens = _token_counts([counts.get("prompt_tokens"), counts.get("completion_tokens")])
            # JSON can hold half a surrogate pair, which no file of text can.
            content, calls = (
                self._without_key(part.encode("utf-8", "replace").decode())
                for part in (content, json.dumps(functions, ensure_ascii=False) if functions else "")
            )
            return Reply(content, choice.get("finish_reason") == "length", tokens, cached=False, calls=calls)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None

    def _permanent_error(self, status: int, fault: str) -> str:
        """The message of an error that repeating the request cannot mend: what to change."""
        url, model, key = self.base_url, self.model, f"the environment variable {self.variable}"
        if status == 401:
            what = "does not accept this key" if self.key else "needs a key"
            return f"{self.place}.base_url: {url} {what} (HTTP 401); put one from its provider into {key}"
        if status == 403:
            return (
                f"{self.place}.model: {url} does not let you use {model} (HTTP 403); choose another, or put "
                f"another key into {key}"
            )
        if status == 404:
            return (
                f"{self.place}: {self._url} is not there, or knows no model {model} (HTTP 404); base_url is what "
                "stands before /chat/completions, such as http://localhost:8000/v1"
            )
        return f"{self.place}.base_url: {url} gives no chat completion: {fault}"

    def _error_text(self, text: str) -> str:
        """An error's text on one line of at most 200 characters."""
        return textwrap.shorten(self._without_key(_error_in(text) or text)[:2000], 200, placeholder=" ...")

    def _without_key(self, text: str) -> str:
        """A text with the key masked, in case the endpoint repeats it."""
        return text.replace(self.key, "***") if len(self.key) >= _MIN_KEY_LENGTH else text

    def _say_once(self, line: str) -> None:
        with self._lock:
            if line in self._said_lines:
                return
            self._said_lines.add(line)
        self.say(line)


def _settings_without(settings: dict[str, int], refusal: str) -> dict[str, int] | None:
    """Settings that avoid the one that a refusal names; newer models call `max_tokens` `max_completion_tokens`."""
    if "temperature" in settings and "temperature" in refusal:
        return {name: value for name, value in settings.items() if name != "temperature"}
    if "max_tokens" in settings and "max_tokens" in refusal:
        others = {name: value for name, value in settings.items() if name != "max_tokens"}
        return others | {"max_completion_tokens": settings["max_tokens"]}
    return None


def _error_in(text: str) -> str:
    """The message of an error in a JSON body; empty if there is none."""
    with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    return ""


def _retry_after(value: str) -> float | None:
    """The seconds of a Retry-After header, a number or a date; None if it cannot be read."""
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return min(float(value), _MAX_WAIT)
    with contextlib.suppress(ValueError, TypeError):
        seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        return min(max(seconds, 0.0), _MAX_WAIT)
    return None


def _token_counts(counts: object) -> tuple[int, int] | None:
    """Input and output tokens; None if the endpoint does not say."""
    if isinstance(counts, list) and len(counts) == 2 and all(type(n) is int and 0 <= n < 1 << 53 for n in counts):
        return counts[0], counts[1]
    return None
