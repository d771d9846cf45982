"""What attention has of a row, (row_max, row_sum, acc), and all that is done with it: start, rescale, merge, normalize.

row_max is the largest score so far, row_sum the sum of the weights exp(score - row_max), and acc the sum of the values
times their weights. A row that has had no score, or none but -inf, has -inf, 0 and 0: it weighs nothing beside others.
Two states are added up once both are brought to the larger maximum; acc / row_sum is the row's output. All weights of a
sequence have the same headroom (kernels/headroom.py), which lse alone takes back.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx import Buffer

from pa_compiler.cuda.kernels.plan import ALL_LANES
from pa_compiler.cuda.tiles import WARP
from pa_compiler.kernels.headroom import lifted
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tvmscript import inline

NEGATIVE_INFINITY = float("-inf")

LOG2_E = 1.4426950216293335
"""log2(e) in float32: exp(x) is 2 ** (x * LOG2_E), and the GPU has an instruction for powers of 2."""

EXP2 = "ex2.approx.ftz.f32"
"""That instruction."""


class State(NamedTuple):
    """The states of some rows, float32: in the registers of a lane, in shared memory, or in the GPU's memory."""

    row_max: Buffer
    row_sum: Buffer
    acc: Buffer


Row = Any
"""What a strategy names a row of a lane by: a number, or several."""


class Registers(NamedTuple):
    """In which registers a lane has the states of its rows, or its part of them.

    Attributes:
        rows: Of which the lane has something.
        sums: Registers of row_sum.
        elements: Of acc, that the lane has of a row.
        row_of: (number of a register of row_max, lane) -> which row of the row tile it is of.
        max_of: A row, as a strategy names it, -> its register of row_max.
        sum_of: Row -> its register of row_sum.
        element_of: (row, number of an element) -> its register of acc.
    """

    rows: int
    sums: int
    elements: int
    row_of: Callable[[Expr, Expr], Expr]
    max_of: Callable[[Row], Expr]
    sum_of: Callable[[Row], Expr]
    element_of: Callable[[Row, Expr], Expr]


def shift_of(row_max: Expr) -> Expr:
    """What is subtracted from scores before exp: the maximum, or 0 where there is none and -inf - -inf would be NaN."""
    return T.Select(row_max == T.float32(NEGATIVE_INFINITY), T.float32(0), row_max)


def exponent(spec: PagedAttentionSpec, below: Expr, headroom: Expr) -> Expr:
    """log2 of the weight of a score that is `below`, 0 or less, from the row's maximum: with headroom (headroom.py)."""
    return below * T.float32(LOG2_E) - headroom if spec.wide_range else below * T.float32(LOG2_E)


@inline
def weigh(weight, row_max, shift):
    """weight = what a state of this maximum is multiplied by, to be one of the maximum that shift is of."""
    T.ptx[EXP2](weight, (row_max - shift) * T.float32(LOG2_E))


def exchange(value: Expr, distance: Expr) -> Expr:
    """The value of the lane whose number differs in the bit `distance`."""
    return T.cuda.__shfl_xor_sync(T.uint32(ALL_LANES), value, distance, WARP)


def over_lanes(combine: Callable[[Expr, Expr], Expr], first: int) -> Callable[..., None]:
    """value = the values of all lanes whose numbers modulo `first` are the same, combined: the same in each of them."""
    levels = (WARP // first).bit_length() - 1

    @inline
    def stage(value):
        for level in T.unroll(levels):
            value = combine(value, exchange(value, first << level))

    return stage


def allocate(registers: Registers) -> State:
    """Such registers, with nothing in them."""
    sizes = {"row_max": registers.rows, "row_sum": registers.sums, "acc": registers.rows * registers.elements}
    buffers = {name: T.alloc_buffer((size,), "float32", scope="local") for name, size in sizes.items()}
    return State(*(IRBuilder.name(name, buffer) for name, buffer in buffers.items()))


def start(registers: Registers) -> Callable[..., None]:
    """The states of rows that have had no score."""

    @inline
    def stage(state):
        for i in T.unroll(registers.rows):
            state.row_max[i] = T.float32(NEGATIVE_INFINITY)
        for i in T.unroll(registers.sums):
            state.row_sum[i] = T.float32(0)
        for i in T.unroll(registers.rows * registers.elements):
            state.acc[i] = T.float32(0)

    return stage


def rescale(registers: Registers) -> Callable[..., None]:
    """Bring a row to the maximum `highest`, its own or a higher one, before what has that maximum is added to it."""

    @inline
    def stage(state, row, highest, shift):
        alpha: T.float32 = T.float32(0)
        weigh(alpha, state.row_max[registers.max_of(row)], shift)
        state.row_max[registers.max_of(row)] = highest
        state.row_sum[registers.sum_of(row)] = state.row_sum[registers.sum_of(row)] * alpha
        for i in T.unroll(registers.elements):
            element = T.meta_var(registers.element_of(row, i))
            state.acc[element] = state.acc[element] * alpha

    return stage


def merge_lanes(registers: Registers, first: int) -> Callable[..., None]:
    """The states that lanes with the same number modulo `first` have of a row, of other tokens each, as one in each."""
    max_over_lanes, sum_over_lanes = over_lanes(T.max, first), over_lanes(operator.add, first)

    @inline
    def stage(state, row):
        highest: T.float32 = state.row_max[registers.max_of(row)]
        max_over_lanes(highest)
        weight: T.float32 = T.float32(0)
        weigh(weight, state.row_max[registers.max_of(row)], shift_of(highest))
        state.row_max[registers.max_of(row)] = highest
        total: T.float32 = state.row_sum[registers.sum_of(row)] * weight
        sum_over_lanes(total)
        state.row_sum[registers.sum_of(row)] = total
        for i in T.unroll(registers.elements):
            value: T.float32 = state.acc[registers.element_of(row, i)] * weight
            sum_over_lanes(value)
            state.acc[registers.element_of(row, i)] = value

    return stage


def merge(each: Callable[[Expr], Iterable[Expr]], pitch: int) -> Callable[..., None]:
    """Add `count` states of one row that lie in memory to the state (row_max, row_sum, element d of acc) of variables.

    The variables are as `start` leaves them. States are numbered: first, first + step, ...

    Args:
        each: The loop over them, T.serial or T.unroll.
        pitch: Elements of acc from a state to the next.
    """

    @inline
    def stage(states, first, step, count, d, row_max, row_sum, element):
        for i in each(count):
            row_max = T.max(row_max, states.row_max[first + i * step])
        shift: T.float32 = shift_of(row_max)
        for i in each(count):
            weight: T.float32 = T.float32(0)
            weigh(weight, states.row_max[first + i * step], shift)
            row_sum = row_sum + weight * states.row_sum[first + i * step]
            element = element + weight * states.acc[(first + i * step) * pitch + d]

    return stage


def normalize(spec: PagedAttentionSpec) -> Callable[..., None]:
    """out[out_at] = an element of a row's output, and where d == 0 lse[lse_at] = the row's, without the headroom.

    With sinks the row's sink, float32, comes to the sum first: a score of a state without a value. A row without a
    weight gives 0 and -inf. row_max, row_sum and element are variables.
    """

    @inline
    def stage(row_max, row_sum, element, d, headroom, out, out_at, lse, lse_at, sink):
        if spec.sinks:
            peak: T.float32 = T.max(row_max, sink)
            kept: T.float32 = T.float32(0)
            weight: T.float32 = T.float32(0)
            weigh(kept, row_max, shift_of(peak))
            T.ptx[EXP2](weight, exponent(spec, sink - shift_of(peak), T.Cast("float32", headroom)))
            row_max = peak
            row_sum = row_sum * kept + weight
            element = element * kept
        out[out_at] = T.Cast(spec.result_dtype, T.Select(row_sum == T.float32(0), element, element / row_sum))
        if d == 0:
            lse[lse_at] = T.Select(
                row_sum == T.float32(0),
                T.float32(NEGATIVE_INFINITY),
                row_max + T.log(lifted(spec, row_sum, headroom)),
            )

    return stage
