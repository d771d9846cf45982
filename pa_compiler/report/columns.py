"""The texts of the stages for a page: cut into functions, with syntax colours, and packed.

Colours are Pygments'. A page has some MB of marked text, which is packed by zlib; the browser unpacks what it shows.
"""

from __future__ import annotations

import base64
import functools
import html
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from pa_compiler.report.units import Units

TITLES = {
    "tensorir": ("TensorIR", "python"),
    "scheduled": ("scheduled", "python"),
    "cuda": ("CUDA C", "cuda"),
    "llvm": ("LLVM", "llvm"),
    "asm": ("assembly", "gas"),
    "ptx": ("PTX", "ptx"),
    "sass": ("SASS", "text"),
    "host": ("host", "cpp"),
}
"""The stages that a page shows, in order: what their columns are called, and Pygments' names of their languages."""

REST = "the rest"
"""What is called a function that is none: what a text has outside of them."""

_BEGINS = {
    "tensorir": re.compile(r" {4}def (\w+)\("),
    "scheduled": re.compile(r" {4}def (\w+)\("),
    "cuda": re.compile(r'extern "C" __global__ .*?(\w+)_kernel\('),
    "llvm": re.compile(r"define [^@]*@(?:__tvm_ffi_)?(\w+?)(?:_compute_)?\("),
    "asm": re.compile(r"(?:__tvm_ffi_)?([A-Za-z]\w*?)(?:_compute_)?:"),
    "ptx": re.compile(r"\.visible \.entry (\w+)_kernel\("),
    "sass": re.compile(r"\s*\.section\s+\.text\.(\w+)_kernel"),
}
"""What the first line of a function looks like, by the stage; what has none is not cut."""

_ENDS = {"llvm": "}"}
"""The line behind which there is no function, until another begins."""

_CLASSES = (
    ("Token.Comment", "c"),
    ("Token.Keyword", "k"),
    ("Token.Literal.Number", "m"),
    ("Token.Literal.String", "s"),
    ("Token.Name.Function", "f"),
    ("Token.Name.Builtin", "b"),
    ("Token.Name.Variable", "v"),
    ("Token.Name.Label", "f"),
    ("Token.Name.Decorator", "c"),
)
"""Kinds of Pygments' tokens, and the classes of a page that they get; others get none."""


def columns(sources: Mapping[str, str], units: Units) -> list[dict[str, Any]]:
    """What the script of a page shows, a record for each stage: its title, and its functions with their lines."""
    return [_column(stage, sources[stage], units) for stage in TITLES if stage in sources]


def _column(stage: str, text: str, units: Units) -> dict[str, Any]:
    lines = coloured(text, TITLES[stage][1])
    of_lines = units.of_lines.get(stage, [-1] * len(lines))
    functions: dict[str, list[dict[str, Any]]] = {}
    for name, begin, end in _functions(stage, text):
        units_of = [(unit, len(list(run))) for unit, run in itertools.groupby(of_lines[begin:end])]
        piece = {"first": begin + 1, "units": units_of, "lines": "\n".join(lines[begin:end])}
        functions.setdefault(name, []).append(piece)
    return {"stage": stage, "title": TITLES[stage][0], "linked": stage in units.of_lines, "functions": functions}


def _functions(stage: str, text: str) -> Iterable[tuple[str, int, int]]:
    """(function, begin, end) of pieces that follow each other and are the whole text."""
    lines = text.splitlines()
    found = [(0, REST)]
    for at, line in enumerate(lines):
        if stage in _BEGINS and (begins := _BEGINS[stage].match(line)):
            decorated = at > 0 and lines[at - 1].startswith("    @")
            found.append((at - decorated, begins[1]))
        elif line == _ENDS.get(stage):
            found.append((at + 1, REST))
    ends = [begin for begin, _ in found[1:]] + [len(lines)]
    for (begin, name), end in zip(found, ends, strict=True):
        if any(line.strip() for line in lines[begin:end]):
            yield name, begin, end


def coloured(text: str, language: str) -> list[str]:
    """The lines of a text as HTML, in which <i class=...> marks what Pygments tells apart.

    Line by line, but for C++, whose comments may be longer; in LLVM's text and TensorIR, whose words hardly depend on
    each other, word by word. What differs in digits alone has the same colours, and most of machine code does.
    """
    from pygments.lexers import get_lexer_by_name

    lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    if language in _LONGER:
        return "".join(_marked(value, name) for value, name in _runs(lexer, text)).split("\n")
    known: dict[str, list[tuple[int, str]]] = {}

    @functools.cache
    def piece(said: str) -> str:
        shape = _DIGIT.sub("0", said)
        if shape not in known:
            known[shape] = [(len(value), name) for value, name in _runs(lexer, shape)]
        begin, parts = 0, []
        for length, name in known[shape]:
            parts.append(_marked(said[begin : begin + length], name))
            begin += length
        return "".join(parts)

    def line_of(line: str) -> str:
        words = _WORDS.get(language)
        return piece(line) if words is None or _WHOLE.search(line) else "".join(map(piece, words.findall(line)))

    return [line_of(line) for line in text.splitlines()]


_LONGER = ("cpp", "cuda")
_DIGIT = re.compile(r"\d")
_WORDS = {"llvm": re.compile(r"\s+|\S+"), "python": re.compile(r'"[^"]*"|\w+|\s+|[^\w\s"]+')}
_WHOLE = re.compile(r"[;#@]|c\"|\bdef ")
"""What a line has in it whose words depend on each other: a comment, a string, a name that is defined."""


def _runs(lexer: Any, text: str) -> Iterable[tuple[str, str]]:
    """What stands together under one class, and the class."""
    for name, run in itertools.groupby(lexer.get_tokens(text), lambda token: _class(str(token[0]))):
        yield "".join(value for _, value in run), name


def _marked(value: str, name: str) -> str:
    said = html.escape(value, quote=False)
    if not name or not value.strip():
        return said
    return "\n".join(f"<i class={name}>{line}</i>" if line else "" for line in said.split("\n"))


_KNOWN: dict[str, str] = {}


def _class(kind: str) -> str:
    """The class of a kind of token, which is asked once for each kind."""
    if kind not in _KNOWN:
        _KNOWN[kind] = next((name for begin, name in _CLASSES if kind.startswith(begin)), "")
    return _KNOWN[kind]


def packed(value: Any) -> str:
    """A value as JSON, as DecompressionStream("deflate") and atob read it."""
    return base64.b64encode(zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 9)).decode()
