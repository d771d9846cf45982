"""A tensor intrinsic: rows of tokens as pairs of these, turned, so that a row has one element of all pairs."""

from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from pa_compiler import tvmscript as script
from pa_compiler.kernels.elements import HIGH, LOW, pair_halves
from pa_compiler.schedules.intrinsics import registered
from pa_compiler.schedules.intrinsics.transpose import turned_vectors

LANES = 16


def turn_pairs() -> str:
    """Register the intrinsic turned[d, p] = pair_halves(rows[2p, d // 2], rows[2p + 1, d // 2], d); return its name.

    For 16 pairs p of tokens and 32 elements d, of words of two.
    """
    return registered("pa_compiler.turn_pairs", _turn_pairs)


def _turn_pairs() -> tuple[PrimFunc, PrimFunc]:
    @script.prim_func(s_tir=True)
    def description(turned_handle: T.handle, rows_handle: T.handle) -> None:
        rows_row, turned_row = T.int32(), T.int32()
        rows = T.match_buffer(rows_handle, (2 * LANES, LANES), "int32", strides=[rows_row, 1], offset_factor=1)
        turned = T.match_buffer(turned_handle, (2 * LANES, LANES), "int32", strides=[turned_row, 1], offset_factor=1)
        with T.sblock("root"):
            T.reads(rows[0 : 2 * LANES, 0:LANES])
            T.writes(turned[0 : 2 * LANES, 0:LANES])
            for p, d in T.grid(LANES, 2 * LANES):
                with T.sblock("pair"):
                    vp, vd = T.axis.remap("SS", [p, d])
                    turned[vd, vp] = pair_halves(
                        rows[2 * vp, T.floordiv(vd, 2)], rows[2 * vp + 1, T.floordiv(vd, 2)], vd
                    )

    def store(turned: Buffer, rows: Buffer) -> None:
        words = [T.bind(rows[t, T.ramp(0, 1, LANES)]) for t in range(2 * LANES)]
        couples = list(zip(words[::2], words[1::2], strict=True))
        low, high, half = (T.broadcast(each, LANES) for each in (LOW, HIGH, 16))
        evens = [T.bitwise_or(T.bitwise_and(a, low), T.shift_left(b, half)) for a, b in couples]
        odds = [T.bitwise_or(T.bitwise_and(T.shift_right(a, half), low), T.bitwise_and(b, high)) for a, b in couples]
        for which, pairs in enumerate((evens, odds)):
            for i, vector in enumerate(turned_vectors([T.bind(each) for each in pairs], LANES)):
                T.buffer_store(turned, vector, [2 * i + which, T.ramp(0, 1, LANES)])

    @script.prim_func(s_tir=True)
    def implementation(turned_handle: T.handle, rows_handle: T.handle) -> None:
        rows_row, turned_row = T.int32(), T.int32()
        rows = T.match_buffer(rows_handle, (2 * LANES, LANES), "int32", strides=[rows_row, 1], offset_factor=1)
        turned = T.match_buffer(turned_handle, (2 * LANES, LANES), "int32", strides=[turned_row, 1], offset_factor=1)
        with T.sblock("root"):
            T.reads(rows[0 : 2 * LANES, 0:LANES])
            T.writes(turned[0 : 2 * LANES, 0:LANES])
            store(turned, rows)

    return description, implementation
