"""A digest of the installed packages and of code of ours, by which results that depend on both are cached."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from pathlib import Path


@functools.cache
def installed_digest(code: Path) -> str:
    """32 hexadecimal digits for Python's release, the packages that can be imported, and the Python files in a folder.

    Args:
        code: The folder; its subfolders count.
    """
    digest = hashlib.sha256(sys.version.encode())
    for place in dict.fromkeys(sys.path):
        try:
            entries = [entry for entry in os.scandir(place or ".") if entry.name.endswith((".dist-info", ".egg-info"))]
        except OSError:
            continue
        for entry in sorted(entries, key=lambda entry: entry.name):
            digest.update(f"{entry.name} {entry.stat().st_mtime_ns}\n".encode())
    for file in sorted(code.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]
