"""The commands show and verify, which look at a library where it is to run: without what the others are made with."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import tvm_ffi

from pa_compiler.cli import functions, text
from pa_compiler.runtime import load as modules
from pa_compiler.runtime import manifest, versions
from pa_compiler.words import counted

if TYPE_CHECKING:
    from pa_compiler.runtime.module import Module
    from pa_compiler.verification.verify import Verification

_SHOWN_FAILURES = 5
_SECONDS = (
    "Time to spend on draws. One is made at least; one that has begun is finished, and one of long contexts takes up "
    "to a minute. [default: 10]"
)


def main(words: Sequence[str]) -> None:
    """Run show or verify, the first of the words, with the options and the library that the others name.

    Raises:
        SystemExit: a bad argument (2), or a draw that fails, or an error that the words of a message tell (1).
        OSError: the library cannot be read, or stdout not written.
    """
    parser, parsers = _parsers()
    arguments = vars(parser.parse_args(words))
    name, library = arguments.pop("command"), arguments["library"]
    if not library.exists() or library.is_dir():
        parsers[name].error(f"argument library: expected a file, got {str(library)!r}, which is none")
    try:
        COMMANDS[name](**arguments)
    except (TypeError, ValueError) as error:  # of an argument, whose name comes first
        argument, _, rest = str(error).partition(": ")
        if argument in arguments:
            parsers[name].error(f"argument {text.flag(argument)}: {rest}")
        if argument in os.environ:
            fail(str(error))
        raise
    except (ImportError, RuntimeError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted")


def fail(message: str) -> NoReturn:
    """End the command with a message, and the status 1."""
    print(f"Error: {message}", file=sys.stderr)
    sys.exit(1)


def show(library: Path) -> None:
    """Print what a library says of itself. Its checksum is checked; nothing of it is loaded."""
    contents = library.read_bytes()
    about = manifest.read(contents, library)
    unfit = about.unfit() or _unfit_runtime()
    _print(
        *text.spec_rows(about.spec),
        ("pipeline", about.pipeline),
        ("lse", about.lse),
        ("empty", about.empty_rows),
        ("target", f"{text.target_text(about.target)}, {about.machine}"),
        ("features", " ".join(about.features) or "none"),
        ("versions", ", ".join(f"{name} {version}" for name, version in sorted(about.versions.items()))),
        ("here", f"apache-tvm-ffi {tvm_ffi.__version__}; libraries are tested with {versions.runs_with()}"),
        ("kernels", f"SHA-256 {about.kernels}"),
        ("library", f"SHA-256, as it should be, {manifest.checksum(contents)}"),
        ("loads", f"no: {unfit}" if unfit else "yes"),
    )


def _unfit_runtime() -> str:
    """Why libraries do not run with this tvm-ffi, or ""."""
    try:
        versions.check_runtime()
    except RuntimeError as error:
        return str(error)
    return ""


def verify(
    library: Path, seconds: float, seed: int | None, draw: int | None, score_mod: str | None, mask_mod: str | None
) -> None:
    """Compare a library with NumPy in float64, on random calls that its spec allows.

    The exit status is 1 if a draw fails; each that does is shown with the command that makes it again.
    """
    module = modules.load(library)
    named = {field: name for field, name in (("score_mod", score_mod), ("mask_mod", mask_mod)) if name}
    given = {field: _imported(field, name) for field, name in named.items()}
    with _progress("Verifying", seconds) as advance:
        found = module.verify(seconds, seed=seed, draw=draw, advance=advance, **given)
    _print(*_verification_rows(module, found))
    for failure in found.failures[:_SHOWN_FAILURES]:  # in whole lines, to be copied
        options = [f"{text.flag(field)}={name}" for field, name in named.items()]
        words = [str(library), "--seed", str(failure.seed), "--draw", str(failure.draw), *options]
        print(f"pa-compiler verify {shlex.join(words)}")
    if not found.passed:
        sys.exit(1)


def _imported(field: str, name: str) -> Callable[..., Any]:
    try:
        return functions.imported(name)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error


def _verification_rows(module: Module, found: Verification) -> list[tuple[str, str]]:
    draws = counted(found.draws, "draw")
    return [
        *text.spec_rows(module.spec),
        ("target", text.target_text(module.target)),
        ("pipeline", module.pipeline),
        ("draws", f"{found.draws:,} in {found.seconds:.1f} s, seed {found.seed}"),
        ("error", f"{found.out.absolute:.2e} of the largest value at most, against NumPy in float64"),
        ("bounds", f"{found.out.of_tolerance:.2g} of out's is used, {found.lse.of_tolerance:.2g} of lse's"),
        *((f"draw {failure.draw}", failure.message) for failure in found.failures[:_SHOWN_FAILURES]),
        ("result", "PASS" if found.passed else f"FAIL: {len(found.failures):,} of {draws}"),
    ]


COMMANDS: dict[str, Callable[..., None]] = {"show": show, "verify": verify}
"""What needs no compiler, by name. The arguments of each are those of its parser."""


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The command's parser, and those of COMMANDS."""
    parser = argparse.ArgumentParser(
        "pa-compiler",
        description="Look at a library and verify it.",
        epilog=f"The other commands compile: {versions.INSTALL}",
    )
    version = importlib.metadata.version("pa-compiler")
    parser.add_argument("--version", action="version", version=f"%(prog)s, version {version}")
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {}
    for name, function in COMMANDS.items():
        said = function.__doc__ or ""
        parsers[name] = commands.add_parser(name, help=said.partition("\n")[0], description=said, allow_abbrev=False)
        parsers[name].add_argument("library", type=Path, help="What Module.save or pa-compiler build wrote.")
    option = parsers["verify"].add_argument
    option("--seconds", type=float, default=10, help=_SECONDS)
    option("--seed", type=int, help="Seed of the draws. [default: a new one]")
    option("--draw", type=int, help="The one draw of the seed to make. [default: all]")
    for field, said in functions.FIELDS.items():
        option(text.flag(field), metavar="MODULE:FUNCTION", help=f"That of the spec: {said}")
    return parser, parsers


def _print(*rows: tuple[str, str]) -> None:
    print(text.facts(rows, shutil.get_terminal_size().columns))


@contextlib.contextmanager
def _progress(label: str, seconds: float) -> Iterator[Callable[[int], None]]:
    """Say on stderr what is going on: on a terminal by a line that counts, and is gone in the end.

    Yields a function that takes milliseconds which have passed.
    """
    if not sys.stderr.isatty():
        print(f"{label} ...", file=sys.stderr)
        yield lambda milliseconds: None
        return
    passed = 0

    def advance(milliseconds: int) -> None:
        nonlocal passed
        passed += milliseconds
        print(f"\r{label}: {passed // 1000} of {seconds:g} s ", end="", file=sys.stderr, flush=True)

    advance(0)
    try:
        yield advance
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
