"""Tensor intrinsics of AMX: the product of two matrices of pairs of bfloat16, with its sums in tile registers.

A tile register has 16 rows of 64 bytes. tdpbf16ps multiplies one of 16 rows of 16 pairs by one of 16 rows of pairs of
16 columns, and adds the products to 16 x 16 float32 sums: the even and the odd elements of the 16 pairs first add up by
themselves, from 0, with fused multiply-adds, and their two sums to the register (Intel's Instruction Set Extensions
Programming Reference, TDPBF16PS). Subnormal numbers count as 0.

The sums of a block lie in the registers from 0 on, and in no memory until they are stored: what a schedule calls their
buffer is never read or written.
"""

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from pa_compiler import tvmscript as script
from pa_compiler.kernels.elements import dot_pairs
from pa_compiler.schedules.intrinsics import registered

TILE = 16
"""Rows of a tile register, float32 sums or pairs in one of its rows, and columns of pairs."""
TILES = 4
"""Tile registers that a block's sums have: as many as hide the latency of tdpbf16ps, which is that of four."""
SCOPE = "local"
"""The storage scope of the sums, which needs no memory."""

_REGISTERS = 8


def _call(name: str, *arguments: Expr) -> None:
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *arguments))


def _shape(across: int) -> tuple[int, int]:
    """Rows and columns of a block of sums that has `across` tile registers side by side."""
    return TILES // across * TILE, across * TILE


def clear_tiles(across: int) -> str:
    """Register the intrinsic sums[m, n] = 0 for a block of `across` tile registers side by side; return its name."""
    return registered(f"pa_compiler.clear_tiles_{across}", lambda: _clear(*_shape(across)))


def add_tiles(across: int) -> str:
    """Register the intrinsic sums[m, n] += sum over 16 k of dot_pairs(right[k, n], left[m, k]); return its name."""
    return registered(f"pa_compiler.add_tiles_{across}", lambda: _add(*_shape(across)))


def store_tiles(across: int) -> str:
    """Register the intrinsic stored[m, n] = sums[m, n]; return its name."""
    return registered(f"pa_compiler.store_tiles_{across}", lambda: _store(*_shape(across)))


def _clear(rows: int, columns: int) -> tuple[PrimFunc, PrimFunc]:
    @script.prim_func(s_tir=True)
    def description(sums_handle: T.handle) -> None:
        sums_row = T.int32()
        sums = T.match_buffer(sums_handle, (rows, columns), strides=[sums_row, 1], offset_factor=1, scope=SCOPE)
        with T.sblock("root"):
            T.reads()
            T.writes(sums[0:rows, 0:columns])
            for m, n in T.grid(rows, columns):
                with T.sblock("sum"):
                    vm, vn = T.axis.remap("SS", [m, n])
                    sums[vm, vn] = T.float32(0)

    def clear() -> None:
        for i in range(TILES):
            _call("tilezero", T.int8(i))

    @script.prim_func(s_tir=True)
    def implementation(sums_handle: T.handle) -> None:
        sums_row = T.int32()
        sums = T.match_buffer(sums_handle, (rows, columns), strides=[sums_row, 1], offset_factor=1, scope=SCOPE)
        with T.sblock("root"):
            T.reads()
            T.writes(sums[0:rows, 0:columns])
            clear()

    return description, implementation


def _add(rows: int, columns: int) -> tuple[PrimFunc, PrimFunc]:
    across = columns // TILE

    @script.prim_func(s_tir=True)
    def description(sums_handle: T.handle, right_handle: T.handle, left_handle: T.handle) -> None:
        sums_row, right_row, left_row = T.int32(), T.int32(), T.int32()
        sums = T.match_buffer(sums_handle, (rows, columns), strides=[sums_row, 1], offset_factor=1, scope=SCOPE)
        right = T.match_buffer(right_handle, (TILE, columns), "int32", strides=[right_row, 1], offset_factor=1)
        left = T.match_buffer(left_handle, (rows, TILE), "int32", strides=[left_row, 1], offset_factor=1)
        with T.sblock("root"):
            T.reads(sums[0:rows, 0:columns], right[0:TILE, 0:columns], left[0:rows, 0:TILE])
            T.writes(sums[0:rows, 0:columns])
            for m, n, k in T.grid(rows, columns, TILE):
                with T.sblock("product"):
                    vm, vn, vk = T.axis.remap("SSR", [m, n, k])
                    sums[vm, vn] = sums[vm, vn] + dot_pairs(right[vk, vn], left[vm, vk])

    def add(right: Buffer, left: Buffer, right_row: Expr, left_row: Expr) -> None:
        right_bytes, left_bytes = (T.Cast("int64", row) * T.int64(4) for row in (right_row, left_row))
        lefts = range(TILES + across, _REGISTERS)
        for i in range(TILES // across):
            of_left = T.int8(lefts[i % len(lefts)])
            for j in range(across):
                of_right = T.int8(TILES + j)
                if i == 0:
                    _call("tileloadd64", of_right, T.address_of(right[0, j * TILE]), right_bytes)
                if j == 0:
                    _call("tileloadd64", of_left, T.address_of(left[i * TILE, 0]), left_bytes)
                _call("tdpbf16ps", T.int8(i * across + j), of_left, of_right)

    @script.prim_func(s_tir=True)
    def implementation(sums_handle: T.handle, right_handle: T.handle, left_handle: T.handle) -> None:
        sums_row, right_row, left_row = T.int32(), T.int32(), T.int32()
        sums = T.match_buffer(sums_handle, (rows, columns), strides=[sums_row, 1], offset_factor=1, scope=SCOPE)
        right = T.match_buffer(right_handle, (TILE, columns), "int32", strides=[right_row, 1], offset_factor=1)
        left = T.match_buffer(left_handle, (rows, TILE), "int32", strides=[left_row, 1], offset_factor=1)
        with T.sblock("root"):
            T.reads(sums[0:rows, 0:columns], right[0:TILE, 0:columns], left[0:rows, 0:TILE])
            T.writes(sums[0:rows, 0:columns])
            add(right, left, right_row, left_row)

    return description, implementation


def _store(rows: int, columns: int) -> tuple[PrimFunc, PrimFunc]:
    across = columns // TILE

    @script.prim_func(s_tir=True)
    def description(stored_handle: T.handle, sums_handle: T.handle) -> None:
        sums_row, stored_row = T.int32(), T.int32()
        sums = T.match_buffer(sums_handle, (rows, columns), strides=[sums_row, 1], offset_factor=1, scope=SCOPE)
        stored = T.match_buffer(stored_handle, (rows, columns), strides=[stored_row, 1], offset_factor=1)
        with T.sblock("root"):
            T.reads(sums[0:rows, 0:columns])
            T.writes(stored[0:rows, 0:columns])
            for m, n in T.grid(rows, columns):
                with T.sblock("stored"):
                    vm, vn = T.axis.remap("SS", [m, n])
                    stored[vm, vn] = sums[vm, vn]

    def store(stored: Buffer, stored_row: Expr) -> None:
        stored_bytes = T.Cast("int64", stored_row) * T.int64(4)
        for i in range(TILES):
            row, column = i // across * TILE, i % across * TILE
            _call("tilestored64", T.int8(i), T.address_of(stored[row, column]), stored_bytes)

    @script.prim_func(s_tir=True)
    def implementation(stored_handle: T.handle, sums_handle: T.handle) -> None:
        sums_row, stored_row = T.int32(), T.int32()
        sums = T.match_buffer(sums_handle, (rows, columns), strides=[sums_row, 1], offset_factor=1, scope=SCOPE)
        stored = T.match_buffer(stored_handle, (rows, columns), strides=[stored_row, 1], offset_factor=1)
        with T.sblock("root"):
            T.reads(sums[0:rows, 0:columns])
            T.writes(stored[0:rows, 0:columns])
            store(stored, stored_row)

    return description, implementation
