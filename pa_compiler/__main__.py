"""The pa-compiler command: all of it where the compiler is installed, and elsewhere what a library needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from pa_compiler.cli import library as library_cli
from pa_compiler.runtime import versions


def main(words: Sequence[str] | None = None) -> None:
    """Run the command with these words, or with those of the process. It may end by SystemExit.

    An OSError, as of a disk that is full, is one line of stderr, whichever command it comes from, and so is Ctrl-C
    while the command is imported.
    """
    try:
        try:
            _command(list(sys.argv[1:] if words is None else words))
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        if sys.stdout is sys.__stdout__ and sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more in the end
        library_cli.fail(str(error))
    except KeyboardInterrupt:
        library_cli.fail("interrupted")


def _command(words: Sequence[str]) -> None:
    if words and words[0] in library_cli.COMMANDS:
        library_cli.main(words)
    elif not (absent := versions.absent()):
        from pa_compiler.cli import main as cli

        cli.main(words, prog_name="pa-compiler")
    elif words and not words[0].startswith("-"):
        library_cli.fail(
            f"{words[0]}: expected one of {', '.join(library_cli.COMMANDS)} in an environment without "
            f"{', '.join(absent)}; for the other commands: {versions.INSTALL}"
        )
    else:
        library_cli.main(words)  # its help


if __name__ == "__main__":
    main()
