"""A Hub on this machine for the real huggingface_hub client: repositories that can be read, made and written to.

It speaks the Hub's protocol as far as the client uses it where Xet is off: repositories and branches made, their files
listed and fetched, whole or in parts, the metadata of a card looked at, files sent by git-lfs's batch protocol, one
commit for all of them, pull requests. What needs a token asks for one.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_" + "theTokenOfTheTests" * 2
# Each relation that the Hub knows.
RELATIONS = ("adapter", "finetune", "merge", "quantized")


@dataclass
class Repo:
    """Commits, each the whole of its files, and the branches that point to them."""

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    private: bool = False
    gated: bool = False
    titles: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path) -> "Repo":
        found = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        return cls({COMMIT: found}, {"main": COMMIT})

    def commit_of(self, revision: str) -> str | None:
        found = self.branches.get(revision, revision)
        return found if found in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]

    def add(self, revision: str, files: dict[str, bytes], title: str, gone: Set[str] = frozenset()) -> str:
        new = {**self.files(revision), **files}
        assert gone <= new.keys(), "what is not there cannot be deleted"
        new = {name: data for name, data in new.items() if name not in gone}
        text = f"{len(self.commits)} {revision} {sorted((k, digest(v)) for k, v in new.items())}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.branches[revision] = new, sha
        self.titles.append(title)
        return sha


@dataclass
class Hub:
    """The server's repositories and the requests that it got."""

    repos: dict[str, Repo]
    url: str = ""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, `repo/file` and Range of each request for a file that is there, in order."""
    log: list[str] = field(default_factory=list)
    """Method and path of every request, in order."""
    sent: list[str] = field(default_factory=list)
    """The SHA-256 of each large file that came in whole, in order."""
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files by their SHA-256, named by a commit or not."""
    valid: set[str] = field(default_factory=lambda: {TOKEN})
    """Tokens that are accepted; any other one is refused like an expired one."""
    watch: Callable[[str, str], None] = lambda method, file: None
    """Called with method and `repo/file` before a request for a file that is there is answered."""
    fault: Callable[[str, str, bytes], int | None] = lambda method, path, body: None
    """A status to answer a request with, in place of the right answer."""

    def environment(self, home: Path) -> dict[str, str]:
        """The environment variables of a process for which this server is the Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def fetched(self, repo: str) -> list[str]:
        """The files of a repository that were requested completely, in order."""
        return [
            file.removeprefix(f"{repo}/")
            for method, file, part in self.requests
            if method == "GET" and part is None and file.startswith(f"{repo}/")
        ]


class Answer(Exception):
    """The reply to a request that ends it there."""

    def __init__(self, status: int, code: str = "", message: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.body = status, json.dumps({"error": message} if message else {}).encode()
        self.headers = headers
        if code:
            self.headers["X-Error-Code"] = code
        if message:
            self.headers["X-Error-Message"] = message


@contextmanager
def serve(repos: dict[str, Path]) -> Iterator[Hub]:
    """A Hub for as long as the block lasts; every folder is a repository with the one commit `COMMIT`."""
    hub = Hub({name: Repo.of(folder) for name, folder in repos.items()})

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: object) -> None:
            pass  # a client that was killed

    class Bound(Handler):
        pass

    Bound.hub = hub
    server = Server(("127.0.0.1", 0), Bound)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = "/".join(map(unquote, url.path.split("/")))
        self.hub.log.append(f"{self.command} {path}")
        try:
            if status := self.hub.fault(self.command, path, body):
                raise Answer(status, message="not now")
            for method, pattern, act in ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, url.path)):
                    self.reply(200, act(self, *map(unquote, match.groups()), *([body] if body else [])))
                    return
            raise Answer(404, "RepoNotFound", "Repository not found")
        except Answer as refused:
            self.reply(refused.status, refused.body, refused.headers)

    def reply(self, status: int, found: Any, headers: dict[str, str] | None = None) -> None:
        if isinstance(found, tuple):
            status, found, headers = found
        data = found if isinstance(found, bytes) else json.dumps(found).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass

    # -----------------------------------------------------------------------------------------------------------
    # Access

    def user(self, needed: bool = False) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.valid:
            raise Answer(401, message="Invalid credentials in Authorization header")
        if needed and not token:
            raise Answer(401, message="Invalid username or password.")
        return "you" if token else None

    def find(self, name: str, files: bool = False) -> Repo:
        user, repo = self.user(), self.hub.repos.get(name)
        if repo is None or (repo.private and not user):
            # A private repository looks to others as if it did not exist.
            raise Answer(404 if user else 401, "RepoNotFound", "Repository not found")
        if files and repo.gated:
            raise Answer(403 if user else 401, "GatedRepo", f"Access to model {name} is restricted.")
        return repo

    def at(self, repo: Repo, revision: str) -> str:
        commit = repo.commit_of(revision)
        if commit is None:
            raise Answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # -----------------------------------------------------------------------------------------------------------
    # Reading

    def describe(self, name: str, revision: str = "main") -> Any:
        repo = self.find(name)
        commit = self.at(repo, revision)
        card = front_matter(repo.commits[commit].get("README.md", b"").decode())
        return {
            "id": name,
            "modelId": name,
            "sha": commit,
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
            "siblings": [{"rfilename": path} for path in sorted(repo.commits[commit])],
            **({"cardData": card} if card else {}),
        }

    def tree(self, name: str, revision: str, folder: str | None = None) -> Any:
        repo = self.find(name)
        files = repo.commits[self.at(repo, revision)]
        inside = f"{folder}/" if folder else ""
        if inside and not any(path.startswith(inside) for path in files):
            raise Answer(404, "EntryNotFound", f"{folder} does not exist")
        deep = self.query.get("recursive", "").lower() in ("true", "1")
        return [
            {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
            | ({"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 134}} if large(path) else {})
            for path, data in sorted(files.items())
            if path.startswith(inside) and (deep or "/" not in path.removeprefix(inside))
        ]

    def resolve(self, name: str, revision: str, path: str) -> Any:
        repo = self.find(name, files=True)
        commit = self.at(repo, revision)
        data = repo.commits[commit].get(path)
        if data is None:
            raise Answer(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
        part = self.headers["Range"]
        self.hub.watch(self.command, f"{name}/{path}")
        self.hub.requests.append((self.command, f"{name}/{path}", part))
        tag = sha256(data) if large(path) else git_oid(data)
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not part:
            return 200, data, headers
        first, _, last = part.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(len(data), int(last or len(data)) + 1)
        return 206, data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}

    # -----------------------------------------------------------------------------------------------------------
    # Writing

    def create(self, body: bytes) -> Any:
        user, asked = self.user(needed=True), json.loads(body)
        name = f"{asked['organization'] or user}/{asked['name']}"
        if asked["organization"] not in (None, user):
            raise Answer(403, message=f"You don't have the rights to create a model under {asked['organization']}")
        if name in self.hub.repos:
            there = {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
            return 409, json.dumps(there).encode(), {}
        first = {".gitattributes": b"*.safetensors filter=lfs\n"}
        self.hub.repos[name] = Repo({COMMIT: first}, {"main": COMMIT}, asked.get("visibility") == "private")
        return {"url": f"{self.hub.url}/{name}", "name": name}

    def branch(self, name: str, branch: str, body: bytes = b"") -> Any:
        repo = self.mine(name)
        if branch in repo.branches:
            raise Answer(409, message="Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        return {}

    def mine(self, name: str) -> Repo:
        self.user(needed=True)
        repo = self.find(name)
        if not name.startswith("you/"):
            raise Answer(403, message="you may not write here")
        return repo

    def validate(self, body: bytes) -> Any:
        """The rules of the Hub for what stands on top of a card, as far as our cards can break them."""
        asked = json.loads(body)
        try:
            data = front_matter(asked["content"])
        except yaml.YAMLError as error:
            data, wrong = {}, [f"not YAML: {error}"]
        else:
            wrong = faults(data or {})
        if wrong:
            errors = {"errors": [{"message": text} for text in wrong], "warnings": []}
            return 400, json.dumps(errors).encode(), {}
        empty = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
        return {"errors": [], "warnings": empty}

    def preupload(self, name: str, revision: str, body: bytes) -> Any:
        pull = self.query.get("create_pr") == "1"
        self.user(needed=True)
        repo = self.find(name) if pull else self.mine(name)
        there = repo.commits[self.at(repo, revision)]
        found = []
        for file in json.loads(body)["files"]:
            path, old = file["path"], there.get(file["path"])
            oid = None if old is None else sha256(old) if large(path) else git_oid(old)
            mode = "lfs" if large(path) else "regular"
            found.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": found, "commitOid": self.at(repo, revision)}

    def batch(self, name: str, body: bytes) -> Any:
        self.user(needed=True)
        asked = json.loads(body)
        assert (asked["operation"], asked["hash_algo"]) == ("upload", "sha256")
        return {
            "transfer": "basic",
            "objects": [
                {"oid": one["oid"], "size": one["size"]}
                | (
                    {}
                    if one["oid"] in self.hub.stored
                    else {"actions": {"upload": {"href": f"{self.hub.url}/storage/{one['oid']}"}}}
                )
                for one in asked["objects"]
            ],
        }

    def store(self, oid: str, body: bytes = b"") -> Any:
        assert "Authorization" not in self.headers, "the storage is another's: it is not shown the token"
        if sha256(body) != oid:
            raise Answer(400, message="the content is not what its name says")
        self.hub.stored[oid] = body
        self.hub.sent.append(oid)
        return b""

    def commit(self, name: str, revision: str, body: bytes) -> Any:
        pull = self.query.get("create_pr") == "1"
        self.user(needed=True)
        repo = self.find(name) if pull else self.mine(name)
        self.at(repo, revision)
        lines = [json.loads(line) for line in body.splitlines()]
        new, gone = {}, set()
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                gone.add(value["path"])
            elif line["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile"
                new[value["path"]] = self.hub.stored[value["oid"]]
        number = sum(branch.startswith("refs/pr/") for branch in repo.branches) + 1
        target = f"refs/pr/{number}" if pull else revision
        repo.branches.setdefault(target, self.at(repo, revision))
        sha = repo.add(target, new, lines[0]["value"]["summary"], gone)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"}
        return answer | ({"pullRequestUrl": f"{self.hub.url}/{name}/discussions/{number}"} if pull else {})


_REPO, _PART = r"([^/]+/[^/]+)", r"([^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", f"/api/models/{_REPO}", Handler.describe),
    ("GET", f"/api/models/{_REPO}/revision/{_PART}", Handler.describe),
    ("GET", f"/api/models/{_REPO}/tree/{_PART}", Handler.tree),
    ("GET", f"/api/models/{_REPO}/tree/{_PART}/(.+)", Handler.tree),
    ("GET", f"/{_REPO}/resolve/{_PART}/(.+)", Handler.resolve),
    ("HEAD", f"/{_REPO}/resolve/{_PART}/(.+)", Handler.resolve),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", f"/api/models/{_REPO}/branch/{_PART}", Handler.branch),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/models/{_REPO}/preupload/{_PART}", Handler.preupload),
    ("POST", f"/{_REPO}\\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", f"/storage/{_PART}", Handler.store),
    ("POST", f"/api/models/{_REPO}/commit/{_PART}", Handler.commit),
]


def front_matter(card: str) -> Any:
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


def faults(data: dict[str, Any]) -> list[str]:
    wrong = []
    for key in ("base_model", "datasets"):
        names = [data[key]] if isinstance(data.get(key), str) else data.get(key) or []
        strange = (name for name in names if not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", name))
        wrong += [f'"{key}" with value "{name}" is not valid. Use an id from https://hf.co.' for name in strange]
    if data.get("base_model_relation", "adapter") not in RELATIONS:
        wrong.append(f'"base_model_relation" must be one of {", ".join(RELATIONS)}')
    languages = [data["language"]] if isinstance(data.get("language"), str) else data.get("language") or []
    wrong += [f'"language" {code}: must be an ISO code' for code in languages if not re.fullmatch("[a-z]{2,3}", code)]
    for model in data.get("model-index") or []:
        for result in model["results"]:
            for key in ("task", "dataset", "metrics"):
                if key not in result:
                    wrong.append(f'"model-index[0].results[0].{key}" is required')
            wrong += [
                f'"model-index": {metric["type"]} has no value'
                for metric in result.get("metrics", [])
                if metric.get("value") is None
            ]
    return wrong


def large(path: str) -> bool:
    """True for a file that the Hub stores as a large file."""
    return path.endswith((".safetensors", ".gguf", ".png", ".dat"))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
