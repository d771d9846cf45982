"""How much scratch a thread's kernels take at most, for callers that give the memory themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pa_compiler.statements import sblocks
from pa_compiler.tiles import Tiling

if TYPE_CHECKING:
    from tvm import IRModule
    from tvm.tirx import Buffer, PrimFunc

_LINE = _HEAD = 64  # ScratchStack in templates/cpu/scratch.h: what it aligns to, and what lies before each buffer


def scratch_bytes(mod: IRModule, *tilings: Tiling) -> int:
    """Bytes that any one of the scheduled kernels takes at a time, at most.

    All buffers of a kernel count as if they were there at once. An extent that is no number is one of the tokens of a
    tile, of which there are kv_tile at most, in whole groups.
    """
    tokens = max(tiles.padded_kv_tile for tiles in tilings)
    return max(_of_kernel(function, tokens) for function in mod.functions.values())


def _of_kernel(function: PrimFunc, tokens: int) -> int:
    return sum(_bytes(buffer, tokens) for sblock in sblocks(function.body) for buffer in sblock.alloc_buffers)


def _bytes(buffer: Buffer, tokens: int) -> int:
    from tvm.runtime import DataType

    count = 1
    for extent in buffer.shape:
        count *= _most(extent, tokens)
    dtype = DataType(str(buffer.dtype))
    return -(-max(count * dtype.lanes * -(-dtype.bits // 8), 1) // _LINE) * _LINE + _HEAD


def _most(extent: object, tokens: int) -> int:
    from tvm import tirx
    from tvm.sym import Analyzer

    analyzer = Analyzer()
    if not isinstance(extent, tirx.IntImm):
        for variable in tirx.analysis.undefined_vars(extent):
            analyzer.bind(variable, tirx.const(tokens, str(variable.ty)))
    return int(analyzer.simplify(extent))
