"""Tensor intrinsics of bfmmla: the product of two blocks of pairs of bfloat16, with its four sums in a register.

A register has a block of 2 rows of 2 pairs. bfmmla multiplies each row of one block by each row of another, and adds
the 2 x 2 results to float32 sums: of each, first the dot product of the one pair and then that of the other, as bfdot
does. So the pairs of two rows, of a query or of weights, and of two tokens or elements of value_dim lie side by side.
"""

from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc, Shuffle

from pa_compiler import tvmscript as script
from pa_compiler.kernels.elements import dot_pairs
from pa_compiler.schedules.intrinsics import registered

ROWS = PAIRS = 2
"""Of a block."""
LANES = ROWS * PAIRS
STEPS = LANES // PAIRS

DOT_BLOCKS = "pa_dot_blocks"
"""The function of vectors that multiplies two blocks, which pa_compiler/cpu/instructions.py defines."""


def add_block(order: str) -> str:
    """Register the intrinsic sums[r, c] += sum over two k of dot_pairs(left[r, k], right[c, k]); return its name.

    order: That of r, c and k in loops around the product, and among the axes of its sblock, such as "crk".
    """
    return registered(f"pa_compiler.add_block_{order}", lambda: _add_block(order))


def split_rows() -> str:
    """Register the intrinsic blocks[k // 2, r, k % 2] = rows[r, k], for two rows of four words; return its name."""
    return registered("pa_compiler.split_rows", _split_rows)


def turn_halves() -> str:
    """Register the intrinsic blocks[d // 4, 0, d % 4, p] = words[p, d % 2, d // 2]; return its name.

    For two pairs p of tokens and eight elements d, of which the even ones lie side by side, and so do the odd ones.
    """
    return registered("pa_compiler.turn_halves", _turn_halves)


def _add_block(order: str) -> tuple[PrimFunc, PrimFunc]:
    kinds = "".join("R" if axis == "k" else "S" for axis in order)

    @script.prim_func(s_tir=True)
    def description(sums_handle: T.handle, left_handle: T.handle, right_handle: T.handle) -> None:
        sums_row, left_row, right_row = T.int32(), T.int32(), T.int32()
        sums = T.match_buffer(sums_handle, (ROWS, ROWS), strides=[sums_row, 1], offset_factor=1)
        left = T.match_buffer(left_handle, (ROWS, PAIRS), "int32", strides=[left_row, 1], offset_factor=1)
        right = T.match_buffer(right_handle, (ROWS, PAIRS), "int32", strides=[right_row, 1], offset_factor=1)
        with T.sblock("root"):
            T.reads(sums[0:ROWS, 0:ROWS], left[0:ROWS, 0:PAIRS], right[0:ROWS, 0:PAIRS])
            T.writes(sums[0:ROWS, 0:ROWS])
            for outer, middle, inner in T.grid(2, 2, 2):
                with T.sblock("product"):
                    first, second, third = T.axis.remap(kinds, [outer, middle, inner])
                    at = T.meta_var(dict(zip(order, (first, second, third), strict=True)))
                    vr, vc, vk = T.meta_var(at["r"]), T.meta_var(at["c"]), T.meta_var(at["k"])
                    sums[vr, vc] = sums[vr, vc] + dot_pairs(left[vr, vk], right[vc, vk])

    def add(sums: Buffer, left: Buffer, right: Buffer) -> None:
        block = [0, T.ramp(0, 1, LANES)]
        operands = [each[tuple(block)] for each in (sums, left, right)]
        T.buffer_store(sums, T.call_pure_extern(f"float32x{LANES}", DOT_BLOCKS, *operands), block)

    @script.prim_func(s_tir=True)
    def implementation(sums_handle: T.handle, left_handle: T.handle, right_handle: T.handle) -> None:
        sums_row, left_row, right_row = T.int32(), T.int32(), T.int32()
        sums = T.match_buffer(sums_handle, (ROWS, ROWS), strides=[sums_row, 1], offset_factor=1)
        left = T.match_buffer(left_handle, (ROWS, PAIRS), "int32", strides=[left_row, 1], offset_factor=1)
        right = T.match_buffer(right_handle, (ROWS, PAIRS), "int32", strides=[right_row, 1], offset_factor=1)
        with T.sblock("root"):
            T.reads(sums[0:ROWS, 0:ROWS], left[0:ROWS, 0:PAIRS], right[0:ROWS, 0:PAIRS])
            T.writes(sums[0:ROWS, 0:ROWS])
            add(sums, left, right)

    return description, implementation


def _split_rows() -> tuple[PrimFunc, PrimFunc]:
    @script.prim_func(s_tir=True)
    def description(blocks_handle: T.handle, rows_handle: T.handle) -> None:
        blocks_step, blocks_row, rows_row = T.int32(), T.int32(), T.int32()
        blocks = T.match_buffer(
            blocks_handle, (STEPS, ROWS, PAIRS), "int32", strides=[blocks_step, blocks_row, 1], offset_factor=1
        )
        rows = T.match_buffer(rows_handle, (ROWS, LANES), "int32", strides=[rows_row, 1], offset_factor=1)
        with T.sblock("root"):
            T.reads(rows[0:ROWS, 0:LANES])
            T.writes(blocks[0:STEPS, 0:ROWS, 0:PAIRS])
            for r, k in T.grid(ROWS, LANES):
                with T.sblock("word"):
                    vr, vk = T.axis.remap("SS", [r, k])
                    blocks[T.floordiv(vk, PAIRS), vr, T.floormod(vk, PAIRS)] = rows[vr, vk]

    def store(blocks: Buffer, rows: Buffer) -> None:
        vectors = [T.bind(rows[r, T.ramp(0, 1, LANES)]) for r in range(ROWS)]
        for step, chosen in enumerate(([0, 1, 4, 5], [2, 3, 6, 7])):
            T.buffer_store(blocks, Shuffle(vectors, chosen), [step, 0, T.ramp(0, 1, LANES)])

    @script.prim_func(s_tir=True)
    def implementation(blocks_handle: T.handle, rows_handle: T.handle) -> None:
        blocks_step, blocks_row, rows_row = T.int32(), T.int32(), T.int32()
        blocks = T.match_buffer(
            blocks_handle, (STEPS, ROWS, PAIRS), "int32", strides=[blocks_step, blocks_row, 1], offset_factor=1
        )
        rows = T.match_buffer(rows_handle, (ROWS, LANES), "int32", strides=[rows_row, 1], offset_factor=1)
        with T.sblock("root"):
            T.reads(rows[0:ROWS, 0:LANES])
            T.writes(blocks[0:STEPS, 0:ROWS, 0:PAIRS])
            store(blocks, rows)

    return description, implementation


def _turn_halves() -> tuple[PrimFunc, PrimFunc]:
    halves, dims = 2, 2 * LANES

    @script.prim_func(s_tir=True)
    def description(blocks_handle: T.handle, words_handle: T.handle) -> None:
        vector, step, words_pair, words_half = T.int32(), T.int32(), T.int32(), T.int32()
        blocks = T.match_buffer(
            blocks_handle, (halves, 1, LANES, PAIRS), "int32", strides=[vector, step, PAIRS, 1], offset_factor=1
        )
        words = T.match_buffer(
            words_handle, (PAIRS, halves, LANES), "int32", strides=[words_pair, words_half, 1], offset_factor=1
        )
        with T.sblock("root"):
            T.reads(words[0:PAIRS, 0:halves, 0:LANES])
            T.writes(blocks[0:halves, 0:1, 0:LANES, 0:PAIRS])
            for p, d in T.grid(PAIRS, dims):
                with T.sblock("word"):
                    vp, vd = T.axis.remap("SS", [p, d])
                    blocks[T.floordiv(vd, LANES), 0, T.floormod(vd, LANES), vp] = words[
                        vp, T.floormod(vd, halves), T.floordiv(vd, halves)
                    ]

    def store(blocks: Buffer, words: Buffer) -> None:
        low, high = [0, 4, 1, 5], [2, 6, 3, 7]
        loaded = [[T.bind(words[p, h, T.ramp(0, 1, LANES)]) for p in range(PAIRS)] for h in range(halves)]
        for vector, chosen in enumerate((low, high)):
            evens, odds = (T.bind(Shuffle(each, chosen)) for each in loaded)
            for block, side_by_side in enumerate(([0, 1, 4, 5], [2, 3, 6, 7])):
                turned = Shuffle([evens, odds], side_by_side)
                T.buffer_store(blocks, turned, [vector, 0, ROWS * block, T.ramp(0, 1, LANES)])

    @script.prim_func(s_tir=True)
    def implementation(blocks_handle: T.handle, words_handle: T.handle) -> None:
        vector, step, words_pair, words_half = T.int32(), T.int32(), T.int32(), T.int32()
        blocks = T.match_buffer(
            blocks_handle, (halves, 1, LANES, PAIRS), "int32", strides=[vector, step, PAIRS, 1], offset_factor=1
        )
        words = T.match_buffer(
            words_handle, (PAIRS, halves, LANES), "int32", strides=[words_pair, words_half, 1], offset_factor=1
        )
        with T.sblock("root"):
            T.reads(words[0:PAIRS, 0:halves, 0:LANES])
            T.writes(blocks[0:halves, 0:1, 0:LANES, 0:PAIRS])
            store(blocks, words)

    return description, implementation
