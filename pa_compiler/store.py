"""Where built modules live on disk: one directory an entry, published by one rename, checked by a digest.

An entry is <cache>/<name>/ with pa.so, the texts of the stages, and digests.json. Its name is a key of what is built,
and one of the programs that build it. It is made in a temporary directory beside it and renamed into place, so a reader
sees a whole entry or none; what it gets is the bytes that it has checked, so nothing that becomes of the entry
afterwards matters to it. A lock file per name keeps two processes from building one spec twice; it is advisory and dies
with its process. Lock files are never removed: who waits for one that is gone, and who makes it anew, would both have
it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pa_compiler import interrupts

_DIGESTS = "digests.json"
_OURS = re.compile(r"\.?([0-9a-f]{32}(?:-[0-9a-f]{32})?)(\..+)?")
"""The names of entries, of their locks, and of the directories that they are made in, and the entry's in them."""


def is_chosen() -> bool:
    """Whether the user has said where the cache is. Otherwise nothing depends on there being one."""
    return bool(os.environ.get("PA_CACHE_DIR"))


def directory() -> Path:
    """The cache directory: PA_CACHE_DIR, or pa_compiler in the user's cache directory. Made with mode 0700.

    Libraries in it are loaded and run, so nobody else may write there.

    Raises:
        PermissionError: it belongs to somebody else, is a symbolic link, or is open to others.
        OSError: it cannot be made.
    """
    with _saying_where():
        return _directory()


@contextlib.contextmanager
def _saying_where(root: Path | None = None) -> Iterator[None]:
    """What the file system refuses, below root if that is given, is an error that says what else there is to do."""
    try:
        yield
    except OSError as error:
        if root and error.filename and not str(error.filename).startswith(str(root)):
            raise
        if is_chosen():
            says = "PA_CACHE_DIR: expected a directory to keep libraries in, or compile(cache=False)"
        else:
            says = "the user's cache directory: expected one to keep libraries in, or PA_CACHE_DIR to name another"
        if error.errno:
            raise OSError(error.errno, f"{says}, got: {error.strerror}", error.filename) from error
        raise type(error)(f"{says}, got: {error}") from error


def _directory() -> Path:
    path = Path(os.environ["PA_CACHE_DIR"]).absolute() if is_chosen() else _of_the_user()
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


def _of_the_user() -> Path:
    import platformdirs

    try:
        path = platformdirs.user_cache_path("pa_compiler")
    except RuntimeError:  # as of newer versions where ~ stands for nothing
        path = Path("~/.cache/pa_compiler")
    if not path.is_absolute():
        raise FileNotFoundError(f"{path}: expected an absolute path, by XDG_CACHE_HOME, by HOME or by the user's name")
    return path


def key(inputs: dict[str, object]) -> str:
    """The name of the entry for these inputs, which must say all that the build depends on."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]


def get_or_build(name: str, build: Callable[[Path], None]) -> dict[str, bytes]:
    """The entry's files by name, built by build(empty directory) if it is missing or does not match its digests.

    Raises:
        OSError: the file system refuses something; with the path.
    """
    entry = directory() / name
    if files := _checked(entry):
        return files
    import filelock  # 8 ms, which an entry that is there does without

    with _saying_where(entry.parent):
        try:
            with filelock.FileLock(entry.with_name(f"{name}.lock")):
                return _checked(entry) or interrupts.shielded(lambda: _built(entry, build))
        except OSError as error:
            if error.errno and not error.filename:  # as of a write to a full disk
                error.filename = str(entry)
            raise


def find(key: str) -> dict[str, bytes] | None:
    """The files of the newest entry of a key, whichever programs have built it; None where there is none.

    Raises:
        OSError: as of directory.
    """
    with os.scandir(directory()) as found:
        entries = [each for each in found if each.name.startswith(f"{key}-") and each.is_dir(follow_symlinks=False)]
    with contextlib.suppress(FileNotFoundError):  # somebody else has removed one
        entries.sort(key=lambda each: each.stat().st_mtime, reverse=True)
    return next((files for each in entries if (files := _checked(Path(each)))), None)


def with_library(library: bytes) -> dict[str, bytes] | None:
    """The files of an entry whose library has these bytes; None where there is none.

    Raises:
        OSError: as of directory.
    """
    digest = hashlib.sha256(library).hexdigest()
    for path in sorted(directory().glob(f"*/{_DIGESTS}")):
        with contextlib.suppress(OSError, ValueError):  # somebody else has removed it, or it is damaged
            if json.loads(path.read_text()).get("pa.so") == digest and (files := _checked(path.parent)):
                return files
    return None


def _built(entry: Path, build: Callable[[Path], None]) -> dict[str, bytes]:
    """Build an entry; to be called with its lock."""
    _remove(entry)  # a damaged one, and what killed builds left
    workspace = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    try:
        build(workspace)
        files = contents(workspace)
        (workspace / _DIGESTS).write_text(json.dumps(_digests(files), indent=1))
        workspace.rename(entry)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return files


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a directory by name."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def clear() -> None:
    """Remove every entry, once it is built; nothing else that may be there, and not the empty lock files.

    Modules already loaded go on working.
    """
    import filelock

    root = directory()
    for name in {match[1] for path in root.iterdir() if (match := _OURS.fullmatch(path.name))}:
        with filelock.FileLock(root / f"{name}.lock"):
            _remove(root / name)


def _remove(entry: Path) -> None:
    """Remove an entry and the directories that it was being made in; to be called with its lock."""
    for path in (entry, *entry.parent.glob(f".{entry.name}.*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _checked(entry: Path) -> dict[str, bytes] | None:
    """The files of an entry, or None if it is missing, no directory of its own, or does not match its digests."""
    try:
        if entry.is_symlink():
            return None
        files = contents(entry)
        digests = json.loads(files.pop(_DIGESTS))
    except (OSError, KeyError, ValueError):
        return None
    return files if digests == _digests(files) else None


def _digests(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
