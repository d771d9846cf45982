"""What was measured of machines: by core where LLVM names it, else by instruction sets. The tiles are chosen by it.

What a row does not give is as it was measured on Zen 1, and has not been measured again. How figures were found is in
docs/measurements.md. For a spec on the CPU of this machine, `pa-compiler tune` measures what is best, and a target says
it: {"kind": "llvm", "tuned": {"decode": {"kv_tile": 256}}}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pa_compiler.cpu.target import CpuTarget


class Machine(NamedTuple):
    """Measured constants of a kind of core.

    Attributes:
        second_level: Bytes of the second-level cache for one head's tile of keys and values; the next tile, which is
            fetched meanwhile, takes as many again. Half of it in a sweep through several kv heads.
        shared_sets: What it is divided by with several kv heads, whose lines share sets, where there is no sweep.
        attend_bytes: Bytes of a tile of keys and values of a head in attend, as they are multiplied.
        kv_tile: Tokens whose scores are held at once in the fused kernel, at most: long enough to amortise the rescale
            of acc, short enough that scores and probabilities of 16 rows stay in the first-level cache.
        heads_in_lanes: Rows from which on heads lie in the lanes.
        sweep_intensity: FLOPs for a byte of the caches up to which the memory is the limit.
        sweep_rows: The most rows of a tile for which packed caches are swept: one number for all types, or one for each
            type of a cache, and 0 for types that are not named. With more rows decode goes in the steps of attend
            where it can; where it cannot, one row is always swept.
        sweep_bytes: Scores and probabilities of all heads and a tile of tokens in a sweep, at most.
        streams: Places of a tile that a sweep reads in turn, for the hardware's prefetchers to run ahead in each.
        paired_streams: The same where a row of the cache holds pairs of tokens.
        load_costs: What a vector of the cache costs beside a broadcast operand, in loads from the first-level cache:
            where it is an operand as it lies, and where it is converted to float32 first.
        attend_vectors: Vectors of rows of a tile of attend where float32 numbers are multiplied. Two where a core
            multiplies two vectors of 16 in a cycle, as it loads no more than two operands: a broadcast serves both.
        broadcast_registers: Registers that an element of a row and the mask of a pair take, where instructions do not
            broadcast an operand in memory themselves.
        pairs_codes: Whether codes of 8 bits become pairs of bfloat16 where there is vdpbf16ps: not where that does half
            of the products that float32's multiply-add does.
        llvm_level: LLVM's level of optimization. At 3 it unrolls loops of twice the length that it does at 2, whole
            ones too, beyond what schedules unroll.
    """

    second_level: int
    shared_sets: int = 2
    attend_bytes: int = 1 << 17
    kv_tile: int = 128
    heads_in_lanes: int = 16
    sweep_intensity: float = 2
    sweep_rows: int | tuple[tuple[str, int], ...] = 0
    sweep_bytes: int = 1 << 18
    streams: int = 8
    paired_streams: int = 2
    load_costs: tuple[float, float] = (2, 3)
    attend_vectors: int = 1
    broadcast_registers: int = 2
    pairs_codes: bool = True
    llvm_level: int = 3


AVX2 = Machine(second_level=1 << 17, sweep_rows=(("bfloat16", 1),))
"""Zen 1, with 512 KB of second-level cache; and what has no AVX."""
AVX512 = Machine(
    second_level=1 << 17,
    shared_sets=4,
    attend_bytes=1 << 16,
    heads_in_lanes=32,
    sweep_intensity=3,
    attend_vectors=2,
    broadcast_registers=0,
)
"""Ice Lake, which loads two operands while it multiplies two vectors of 16, and fewer while its other thread runs. So
heads lie in lanes where there are two vectors of them, and a broadcast serves both."""
AVX512_BF16 = Machine(second_level=1 << 17, broadcast_registers=0)
"""Zen 4, with 1 MB of second-level cache, of which no more has been tried."""
AMX = Machine(second_level=1 << 17, attend_vectors=2, broadcast_registers=0, pairs_codes=False)
"""Emerald Rapids, with 2 MB of second-level cache, of which no more has been tried."""

NEON = Machine(second_level=1 << 17, sweep_intensity=1, broadcast_registers=0)
"""Of AArch64 no core was measured. What is not Zen 1's follows from what its instructions do: a lane of a register is
an operand by itself; and a group of a sweep is of as many tokens as a vector has lanes, four, and its sums are added to
memory after it, so that only what a core has time for is swept. Neoverse N1 and V2 have 1 MB of second-level cache or
more.
"""


CORES: Mapping[str, dict[str, Any]] = {
    "znver3": {
        "sweep_intensity": 8,
        "sweep_rows": (
            ("float32", 8),
            ("float16", 2),
            ("bfloat16", 7),
            ("float8_e4m3fn", 1),
            ("int4", 1),
        ),
        "second_level": 1 << 18,
        "attend_bytes": 1 << 16,
    },
}
"""What cores have otherwise than the row of their instruction sets, by LLVM's names of them.

Zen 3 (EPYC 7003) was measured by `pa-compiler tune` and, packed, by hand; the figures are in docs/measurements.md. Its
own prefetchers are worth more than prefetches in the order of heads, except where a sweep of packed keys converts them
again for each row, and that costs more.
"""


def machine_of(target: CpuTarget, kernel: str = "decode") -> Machine:
    """The row of a target, with what it says is tuned in a kernel of choices.CHOICES."""
    tuned = dict(target.tuned.get(kernel, {}))
    tuned = {name: tuple(value) if isinstance(value, list) else value for name, value in tuned.items()}
    return row_of(target)._replace(**tuned)


def row_of(target: CpuTarget) -> Machine:
    """The row of a target as it is in the table, with what is known of its core."""
    return kind_of(target)._replace(**CORES.get(target.of_tvm.get("mcpu", ""), {}))


def kind_of(target: CpuTarget) -> Machine:
    """The row of its instruction sets; without AVX-512 and NEON it is AVX2's."""
    if target.by_element:
        return NEON
    if target.vector_lanes < 16:
        return AVX2
    if target.tile_registers:
        return AMX
    return AVX512_BF16 if target.dot_pairs else AVX512
