"""What is said of specs, targets and numbers, and how it stands in columns: plain text, by the standard library."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.words import counted

_VECTOR_EXTENSIONS = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "sse4.2": "SSE4.2"}
_LABEL_WIDTH = 8


def flag(name: str) -> str:
    """The option that gives an argument or a field."""
    return f"--{name.replace('_', '-')}"


def facts(rows: Sequence[tuple[str, str]], width: int) -> str:
    """Labels, and beside each its text, wrapped to width columns in all; below it where a first word has no room."""
    indent = 2 + max(_LABEL_WIDTH, *(len(label) for label, _ in rows))
    said = "\n".join(f"{label:{indent}}{wrapped(said, width, indent)}" for label, said in rows)
    return "\n".join(map(str.rstrip, said.split("\n")))


def table(heads: Sequence[str], rows: Sequence[Sequence[str] | str], gap: int = 1) -> str:
    """Cells below their heads, at the right of columns; a row that is one text stands as it is, as a heading.

    The columns are as wide as what is in them, however wide the terminal is, so that nothing is cut.
    """
    cells = [heads, *(row for row in rows if not isinstance(row, str))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        return (" " * gap).join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))

    rule = "-" * len(line(heads))
    return "\n".join([line(heads), rule, *(row if isinstance(row, str) else line(row) for row in rows)])


def wrapped(said: str, width: int, indent: int) -> str:
    """A paragraph that begins at a column, its further lines below that.

    Words are never broken: one that is too long for a line has it alone, below what stands before the paragraph, and
    further to the left as far as that helps.
    """
    room = max(width - indent, 1)
    lines = textwrap.wrap(said, room, break_long_words=False, break_on_hyphens=False)
    if lines and indent and len(lines[0]) > room:
        lines = ["", *lines]
    return "\n".join([*lines[:1], *(" " * min(indent, max(width - len(line), 0)) + line for line in lines[1:])])


def spec_rows(spec: PagedAttentionSpec) -> list[tuple[str, str]]:
    """What is said of a spec: rows of facts()."""
    heads = f"{counted(spec.num_heads, 'query head')} on {counted(spec.num_kv_heads, 'kv head')} of {spec.head_dim}"
    values = "" if spec.result_dim == spec.head_dim else f", values of {spec.result_dim}"
    shared = ", a token's value being the first elements of its key" if spec.shared_kv else ""
    return [
        ("spec", f"{heads}{values}, {spec.dtype} in, {spec.result_dtype} out"),
        ("cache", f"{spec.kv_layout}, blocks of {counted(spec.block_size, 'token')}{shared}{_codes(spec)}"),
        ("tiles", f"head_tile {spec.head_tile}, batch_chunk {spec.batch_chunk}"),
        *([("bits", "the same of a token that is decoded and of one among others")] if spec.invariant else []),
        *_score_rows(spec),
    ]


def _codes(spec: PagedAttentionSpec) -> str:
    """What is said of the codes in a cache, if it has such."""
    of = {"tensor": "each cache", "head": "each kv head", "token_head": "each kv head of each token"}
    if not spec.has_scales:
        return ""
    rotated = ", of rotated keys and values" if spec.rotates else ""
    rotated += f", which decode multiplies by {spec.kv_dots}" if spec.kv_dots else ""
    scale = "a scale and a zero point" if spec.has_zeros else "a scale"
    numbers = f"{spec.kv_dtype} with {scale} for {of[str(spec.scales_of)]}{rotated}"
    return f", {numbers}: {counted(spec.token_bytes, 'byte')} a token"


def _score_rows(spec: PagedAttentionSpec) -> list[tuple[str, str]]:
    """What is said of score functions, and of the keys that a window leaves: nothing of a spec without them."""
    functions = [] if spec.softcap is None else [f"capped at {spec.softcap:g}"]
    functions += [] if spec.score_mod is None else [spec.score_mod.text]
    functions += ["ALiBi, a slope for each head"] if spec.alibi else []
    functions += ["a sink for each head"] if spec.sinks else []
    rows = [("scores", "; ".join(functions))] if functions else []
    if spec.window is not None:
        last = "the last one" if spec.window == 1 else f"the last {spec.window:,}"
        rows.append(("keys", f"{last} of a sequence; blocks before them are neither looked up nor read"))
    if spec.mask_mod is not None:
        rows.append(("mask", spec.mask_mod.text))
    arrays = [f"{name} {dtype} [{', '.join(map(str, shape))}]" for name, dtype, shape, *_ in _arrays(spec)]
    if arrays:
        rows.append(("arrays", "; ".join(arrays)))
    return rows


def _arrays(spec: PagedAttentionSpec) -> list[tuple[Any, ...]]:
    """What functions read: the inputs of a call, and the tensors in the library, which a manifest does not list."""
    return [*spec.inputs, *spec.constants]


def target_text(target: Mapping[str, Any]) -> str:
    """What is said of a TVM target."""
    names = [str(target[key]) for key in ("kind", "mcpu", "arch") if key in target]
    return ", ".join([*names, *_vector_extension(target)])


def _vector_extension(target: Mapping[str, Any]) -> list[str]:
    """The widest vector extension that a target states; none where its mcpu implies it."""
    stated = target.get("mattr", ())
    return [name for feature, name in _VECTOR_EXTENSIONS.items() if f"+{feature}" in stated][:1]
