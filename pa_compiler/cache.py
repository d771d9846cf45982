"""Where built modules live on disk: one directory an entry, published by one rename, checked by a digest.

An entry is <cache>/<key>/ with pa.so, the texts of the stages, and digests.json. It is made in a temporary directory
beside it and renamed into place, so a reader sees a whole entry or none. A lock file per key keeps two processes from
building one spec twice; it is advisory and dies with its process.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import filelock
import platformdirs

_DIGESTS = "digests.json"
_OURS = re.compile(r"\.?[0-9a-f]{32}(\..+)?")
"""The names of entries, of their locks, and of the directories that they are made in."""


def directory() -> Path:
    """The cache directory: PA_CACHE_DIR, or pa_compiler in the user's cache directory. Made with mode 0700.

    Libraries in it are loaded and run, so nobody else may write there.

    Raises:
        PermissionError: it belongs to somebody else, is a symbolic link, or is open to others.
    """
    path = Path(os.environ.get("PA_CACHE_DIR") or platformdirs.user_cache_path("pa_compiler"))
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.lstat()
    if path.is_symlink():
        raise PermissionError(f"{path}: expected a cache directory, got a symbolic link to {path.readlink()}")
    if status.st_uid != os.getuid():
        raise PermissionError(f"{path}: expected a cache directory owned by user {os.getuid()}, got {status.st_uid}")
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise PermissionError(f"{path}: expected a cache directory of mode 0700, got {mode:04o}; chmod 700 closes it")
    return path


def key(inputs: dict[str, object]) -> str:
    """The name of the entry for these inputs, which must say all that the build depends on."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]


def get_or_build(name: str, build: Callable[[Path], None]) -> Path:
    """The directory of the entry, built by build(empty directory) if it is missing or does not match its digests."""
    root = directory()
    entry = root / name
    if _is_whole(entry):
        return entry
    with filelock.FileLock(root / f"{name}.lock"):
        if _is_whole(entry):
            return entry
        for stale in (entry, *root.glob(f".{name}.*")):  # a damaged entry, and what killed builds left
            _remove(stale)
        workspace = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
        try:
            build(workspace)
            digests = {path.name: _digest(path) for path in sorted(workspace.iterdir())}
            (workspace / _DIGESTS).write_text(json.dumps(digests, indent=1))
            workspace.rename(entry)
        finally:
            shutil.rmtree(workspace, ignore_errors=True)
    return entry


def clear() -> None:
    """Remove every entry, and nothing else that may be there. Modules already loaded go on working."""
    for path in directory().iterdir():
        if _OURS.fullmatch(path.name):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_whole(entry: Path) -> bool:
    try:
        digests = json.loads((entry / _DIGESTS).read_text())
        return {path.name for path in entry.iterdir()} == {*digests, _DIGESTS} and all(
            _digest(entry / file) == digest for file, digest in digests.items()
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
