"""The Hadamard matrix that keys and values are multiplied by before they become codes, and queries and outputs too.

H has 1 and -1 alone, its rows are orthogonal, and H / sqrt(dim) is its own inverse: scores of rotated queries and keys
are those of the queries and keys, and outputs of rotated values become outputs when they are rotated again. What one
element of a head has is spread over all of them, so that a code of few bits need not reach as far. H is that of
Sylvester, H[i, j] = -1 to the number of ones that i and j have in common, and a product with it log2(dim) additions
for each element.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from pa_compiler.kernels.kept import allocate
from pa_compiler.spec import PagedAttentionSpec


def unit(dim: int) -> float:
    """What a product with H is multiplied by: 1 / sqrt(dim)."""
    return 1 / math.sqrt(dim)


Element = Callable[[Expr, Expr], tuple[Expr, list[Any]]]
"""(row, d) -> a number, and what it reads, for T.reads."""


def rotate(of: str, element: Element, rows: int, dim: int) -> Buffer:
    """A buffer [rows, dim], float32, of H @ element(r, :): additions and no products.

    Each sblock, whose name begins with `of`, adds and subtracts elements that are so far apart, the nearest first. It
    writes memory of its own, which TVM takes again when it is read no more.
    """
    for places in range(dim.bit_length() - 1):
        target = allocate(f"{of}_rotated", (rows, dim), "float32")
        _step(f"{of}_apart_{1 << places}", element, target, rows, dim, 1 << places)
        element = _of_buffer(target)
    return target if dim > 1 else _copy(of, element, rows)


def rotated_back(
    spec: PagedAttentionSpec, element: Callable[[Expr, Expr], Expr], rows: int
) -> Callable[[Expr, Expr], Expr]:
    """(row, d) -> element(row, d), rotated where values were."""
    if not spec.rotates:
        return element
    dim = spec.result_dim
    rotated = rotate("out", lambda row, d: (element(row, d), [element(row, d)]), rows, dim)
    return lambda row, d: rotated[row, d] * T.float32(unit(dim))


def _of_buffer(buffer: Buffer) -> Element:
    return lambda row, d: (buffer[row, d], [buffer[row, d]])


def _copy(of: str, element: Element, rows: int) -> Buffer:
    """The same of one element, which H leaves."""
    target = allocate(f"{of}_rotated", (rows, 1), "float32")
    with T.grid(rows, 1) as (r, d), T.sblock(f"{of}_copy"):
        row, column = T.axis.spatial(rows, r), T.axis.spatial(1, d)
        number, reads = element(row, column)
        T.reads(*reads)
        T.writes(target[row, column])
        T.buffer_store(target, number, [row, column])
    return target


def _step(name: str, element: Element, target: Buffer, rows: int, dim: int, apart: int) -> None:
    """The sblock of the elements that are `apart`: their sum in the place of the first, and their difference."""
    with T.grid(rows, dim // (2 * apart), 2, apart) as (r, i, h, j), T.sblock(name):
        row = T.axis.spatial(rows, r)
        column = T.axis.spatial(dim, i * (2 * apart) + h * apart + j)
        lower = T.floordiv(column, 2 * apart) * (2 * apart) + T.floormod(column, apart)
        (first, of_first), (second, of_second) = element(row, lower), element(row, lower + apart)
        T.reads(*of_first, *of_second)
        T.writes(target[row, column])
        is_second = T.floormod(T.floordiv(column, apart), 2) == 1
        T.buffer_store(target, T.Select(is_second, first - second, first + second), [row, column])
