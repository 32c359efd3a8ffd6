"""A Hub on this machine: folders served as model repositories to the real huggingface_hub client."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """`repos` are folders by their names, such as tiny/llama; every one has the one commit `COMMIT`."""

    repos: dict[str, Path]
    url: str = ""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, `repo/file` and Range of each request for a file that is there, in order."""
    watch: Callable[[str, str], None] = lambda method, file: None
    """Called with method and `repo/file` before such a request is answered."""

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs in its environment, from the start, to take this for the Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def fetched(self, repo: str) -> list[str]:
        """The files of a repository that were asked for whole, in order."""
        return [
            file.removeprefix(f"{repo}/")
            for method, file, part in self.requests
            if method == "GET" and part is None and file.startswith(f"{repo}/")
        ]


@contextmanager
def serve(repos: dict[str, Path]) -> Iterator[Hub]:
    """A Hub for as long as the block lasts."""
    hub = Hub(repos)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/[^/]+)?(/.+)?", path):
                if match[3]:  # a folder of the repository; there are none
                    self.missing("EntryNotFound")
                else:
                    self.describe(match[1], match[2])
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(?:main|[0-9a-f]{40})/(.+)", path):
                self.send_file(match[1], match[2])
            else:
                self.missing("RepoNotFound")

        def describe(self, repo: str, view: str | None) -> None:
            if repo not in hub.repos:
                self.missing("RepoNotFound")
                return
            files = sorted(path for path in hub.repos[repo].iterdir() if path.is_file())
            if view == "tree":
                found = [
                    {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": digest(path)}
                    for path in files
                ]
                self.reply(200, json.dumps(found).encode())
                return
            siblings = [{"rfilename": path.name} for path in files]
            info = {"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "siblings": siblings}
            self.reply(200, json.dumps(info).encode())

        def send_file(self, repo: str, name: str) -> None:
            path = hub.repos.get(repo, Path("/nowhere")) / name
            if not path.is_file():
                self.missing("EntryNotFound" if repo in hub.repos else "RepoNotFound")
                return
            part = self.headers["Range"]
            hub.watch(self.command, f"{repo}/{name}")
            hub.requests.append((self.command, f"{repo}/{name}", part))
            data = path.read_bytes()
            headers = {"ETag": f'"{digest(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if part:
                first, _, last = part.removeprefix("bytes=").partition("-")
                start, stop = int(first), min(len(data), int(last or len(data)) + 1)
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
                self.reply(206, data[start:stop], headers)
            else:
                self.reply(200, data, headers)

        def missing(self, code: str) -> None:
            self.reply(404, b"", {"X-Error-Code": code, "X-Repo-Commit": COMMIT})

        def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def digest(path: Path) -> str:
    """What the Hub names the content of a file by."""
    return hashlib.sha1(path.read_bytes()).hexdigest()
