"""Compilers as commands: which one an environment variable names, which program that is, and what became of it."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from pa_compiler import interrupts


def words(variable: str, default: str) -> list[str]:
    """The command that a variable such as CXX names, in words, as make, CMake and setuptools take it.

    Words may be quoted as in a shell. A variable that is empty counts as not set. One that is a program's path as a
    whole may have spaces in it.

    Raises:
        RuntimeError: a quote is not closed.
    """
    text = os.environ.get(variable, "").strip() or default
    if shutil.which(text):
        return [text]
    try:
        return shlex.split(text)
    except ValueError as error:
        raise RuntimeError(f"{variable}: expected a command, got {text!r}: {error}") from error


def identity(command: Sequence[str]) -> list[object]:
    """What tells a command apart in a cache key: its words, and of those that are programs the path, size and time.

    Of `ccache g++`, both: another version of either is another file.
    """
    return [[word, *_file(shutil.which(word))] for word in command]


def _file(path: str | None) -> list[object]:
    if path is None:
        return []
    status = os.stat(path)
    return [path, status.st_size, status.st_mtime_ns]


def start(
    command: Sequence[str], cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Begin to run a command, whose words finish() returns.

    Raises:
        RuntimeError: the system cannot run it.
    """
    try:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise RuntimeError(f"{shlex.join(command)}: expected a program, got one that does not run: {error}") from error


def finish(process: subprocess.Popen[str], what: str, made: Path) -> str:
    """Wait for a command that was started, which must succeed and leave a file; return all that it printed.

    Args:
        process: What start() returned.
        what: Names the command in messages.
        made: The file.

    Raises:
        RuntimeError: it failed, with what it printed; or there is no such file.
        KeyboardInterrupt: it was interrupted by Ctrl-C, or this work is to stop.
    """
    printed, _ = process.communicate()
    interrupts.check()
    if process.returncode == -signal.SIGINT:
        raise KeyboardInterrupt
    if process.returncode:
        raise RuntimeError(f"{what} failed with status {process.returncode}:\n{printed}")
    if not made.exists():
        raise RuntimeError(f"{what} left no {made.name}, and printed:\n{printed}")
    return printed
