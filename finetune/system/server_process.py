"""Runs an HTTP server as a child process: waits until it answers, hands on its output, ends it with this process."""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence

from finetune.system.errors import ServeError
from finetune.system.terminal import Say

# The seconds that a server has to end by itself before it is killed, and those between two requests to one that starts.
_GRACE, _PAUSE = 0.6, 0.2
# Addresses that stand for all of a machine's, and the one to ask there.
_ANY = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
# Kills a group of processes once nobody holds the other end of standard input.
_KILL_AT_END = 'read -r line; kill -s KILL -- "-$0"'


def base_url(host: str, port: int) -> str:
    """The base URL for OpenAI clients on this machine of a server that listens on `host` and `port`."""
    host = _ANY.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def check_address(host: str, port: int) -> None:
    """Refuses an address that no server can listen on.

    Raises:
        ServeError: The port is in use, or the host is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ServeError(f"--port {port}: another program listens there; write another port") from None
        cure = "another port" if error.errno == errno.EACCES else "127.0.0.1, or an address of this machine"
        flag = f"--port {port}" if error.errno == errno.EACCES else f"--host {host}"
        raise ServeError(f"{flag}: {error.strerror}; write {cure}") from None


def run_server(
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    host: str,
    port: int,
    on_line: Say,
    on_ready: Callable[[], object],
) -> None:
    """Runs a server until this process is interrupted; the server and all processes that it started end with it.

    Args:
        name: The program, as an error names it.
        command: Its command line.
        environment: Its environment.
        host: The address that it listens on.
        port: The port that it listens on.
        on_line: Called with each line that it prints, in a thread.
        on_ready: Called once, when it answers `GET /health`.

    Raises:
        ServeError: The address is taken, the program cannot be started, or it ended by itself.
        KeyboardInterrupt: On SIGINT, or what a handler of this process raises; after the server has ended.
    """
    check_address(host, port)
    try:
        # A session of its own: Ctrl-C on a terminal reaches this process alone, which ends the group.
        server = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise ServeError(f"{name} cannot be started: {command[0]}: {error.strerror}") from None
    guard = None
    try:
        # Ends the server if this process is killed and cannot.
        guard = subprocess.Popen(
            ["/bin/sh", "-c", _KILL_AT_END, str(server.pid)], stdin=subprocess.PIPE, start_new_session=True
        )
        last = [""]
        reader = threading.Thread(target=_read_lines, args=(server, on_line, last), daemon=True)
        reader.start()
        while server.poll() is None and not _answers(host, port):
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(_PAUSE)
        if server.poll() is None:
            on_ready()
        began = "" if server.poll() is None else " before it answered"
        code = server.wait()
        reader.join(_GRACE)
        raise ServeError(f"{name} ended with code {code}{began}: {last[0] or 'it printed nothing'}")
    finally:
        if guard:
            guard.kill()
            guard.communicate()
        _end(server)


def _read_lines(server: subprocess.Popen[bytes], on_line: Say, last: list[str]) -> None:
    """Hands on the lines of a server; of a progress bar, which goes back to a line's start, its last state."""
    assert server.stdout
    for line in server.stdout:
        text = line.decode("utf-8", "replace").rstrip().rpartition("\r")[2]
        if text:
            last[0] = text
            on_line(text)


def _answers(host: str, port: int) -> bool:
    """True if a server says that it is ready. A proxy that the environment names is not asked."""
    connection = http.client.HTTPConnection(_ANY.get(host, host), port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _end(server: subprocess.Popen[bytes]) -> None:
    """Ends a server and its group: by SIGTERM, and whatever of it is still there a moment later by SIGKILL."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(_GRACE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
