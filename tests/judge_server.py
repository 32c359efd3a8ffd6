"""An OpenAI-compatible endpoint on this machine: chat completions, answered by a function."""

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Answer:
    """The response; `drop` closes the connection instead.

    A `body` that is an iterator is sent piece by piece; with a `status` of 0 it is the head, too.
    """

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False


def says(text: str | None, tokens: tuple[int, int] | None = (100, 10), finish: str = "stop") -> Answer:
    """A chat completion."""
    body: dict[str, Any] = {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
    }
    if tokens:
        body["usage"] = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
    return Answer(body=body)


def grades(grade: str) -> Answer:
    """A completion that names a grade."""
    return says(f'There are reasons.\n{{"grade": "{grade}"}}')


def error(status: int, message: str = "no", headers: dict[str, str] | None = None) -> Answer:
    """An error as such endpoints write it."""
    return Answer(status, {"error": {"message": message, "type": "error"}}, headers or {})


@dataclass(frozen=True)
class Request:
    """A request; `turn` counts from 0 the requests with these messages."""

    body: dict[str, Any]
    headers: dict[str, str]
    turn: int

    @property
    def question(self) -> str:
        """The first message, which holds the texts."""
        return str(self.body["messages"][0]["content"])

    @property
    def mark(self) -> str:
        """The code of the tags."""
        return re.findall(r"^</(?:answer-B|回答B) (\w+)>$", self.question, re.MULTILINE)[-1]

    def between(self, tag: str) -> str:
        """The text between the tags that carry the code."""
        _, opened, rest = self.question.partition(f"\n<{tag} {self.mark}>\n")
        text, closed, after = rest.partition(f"\n</{tag} {self.mark}>\n")
        assert opened
        assert closed
        assert f"{tag} {self.mark}" not in after
        return text

    @property
    def answers(self) -> tuple[str, str]:
        """The answers in the first and in the second place."""
        names = ("回答A", "回答B") if "回答A" in self.question else ("answer-A", "answer-B")
        return self.between(names[0]), self.between(names[1])


@dataclass
class Server:
    """`requests` are those that came, in order, over so many `connections`; `reply` answers each."""

    reply: Callable[[Request], Answer]
    url: str = ""
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    models: Any = ()


@contextmanager
def serve(reply: Callable[[Request], Answer], models: Any = ()) -> Iterator[Server]:
    """A server for as long as the block lasts; `models` is the `data` of its list of models."""
    here = Server(reply, models=models)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one packet; a second would wait for the first one's receipt

        def setup(self) -> None:
            super().setup()
            with lock:
                here.connections += 1

        def do_GET(self) -> None:
            self.send(Answer(200, {"data": here.models}) if self.path == "/v1/models" else error(404))

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path != "/v1/chat/completions":
                self.send(error(404))
                return
            body = json.loads(data)
            with lock:
                turn = sum(body["messages"] == before.body["messages"] for before in here.requests)
                request = Request(body, {name.lower(): value for name, value in self.headers.items()}, turn)
                here.requests.append(request)
            self.send(here.reply(request))

        def send(self, answer: Answer) -> None:
            if answer.drop:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if isinstance(answer.body, Iterator):
                self.close_connection = True
                if answer.status:
                    self.send_response(answer.status)
                    self.end_headers()
                for piece in answer.body:
                    self.wfile.write(piece)
                    self.wfile.flush()
                return
            data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(data)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, address: Any) -> None:
            """A client that did not wait for its answer is no fault."""

    server = Quiet(("127.0.0.1", 0), Handler)
    here.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield here
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
