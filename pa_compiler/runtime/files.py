"""Writing files for the user: nothing that is there is harmed, and nobody sees a half-written file."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path


def write(path: str | os.PathLike[str], contents: bytes) -> None:
    """Write a file so that a reader sees what was there before or all of contents.

    Symbolic links are followed and stay: what they lead to is written. A regular file is replaced by one rename and
    keeps its permissions, and its owner where the system allows that. Pipes and character devices are written into, as
    every command does that is told to write to /dev/null or /dev/stdout; so is an open file that has no name any more.

    Raises:
        OSError: path is a directory, a block device or a socket, none of which is touched; or the file system refuses
            something. It names the path.
    """
    try:
        target = Path(os.path.realpath(path))
        status, named = _status(path), _status(target)
        if status and not any(is_kind(status.st_mode) for is_kind in (stat.S_ISREG, stat.S_ISFIFO, stat.S_ISCHR)):
            raise OSError(f"{os.fspath(path)}: expected a file to write, got {_kind(status)}")
        if status and not (stat.S_ISREG(status.st_mode) and named and os.path.samestat(status, named)):
            _write_into(path, contents)
        else:
            _replace(target, contents, status)
    except OSError as error:
        if error.errno:
            error.filename, error.filename2 = os.fspath(path), None
        raise


def _status(path: str | os.PathLike[str]) -> os.stat_result | None:
    """What is at the end of all links; None where that is yet to be made."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _write_into(path: str | os.PathLike[str], contents: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_NOCTTY), "wb") as file:
        file.write(contents)


def _replace(target: Path, contents: bytes, replaced: os.stat_result | None) -> None:
    """Make the file under another name beside it, which a rename then takes to its own."""
    partial = target.with_name(f".pa_compiler.{secrets.token_hex(8)}")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            if replaced:
                for user, group in ((-1, replaced.st_gid), (replaced.st_uid, -1)):
                    with contextlib.suppress(PermissionError):  # only root gives files away
                        os.fchown(file.fileno(), user, group)
                os.fchmod(file.fileno(), replaced.st_mode & 0o777)
            file.write(contents)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _kind(status: os.stat_result) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFBLK: "a block device", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(status.st_mode), f"a file of type {stat.S_IFMT(status.st_mode):o}")
