"""What was measured of machines, by the instruction sets that tell them apart. The tiles are chosen by it.

Figures are those of the cores that a row names, and stand for all that have the same instruction sets. How they were
found is in docs/measurements.md.
"""

from __future__ import annotations

from typing import NamedTuple

from pa_compiler.cpu.target import CpuTarget


class Machine(NamedTuple):
    """Measured constants of a kind of core.

    Attributes:
        name: The instruction sets, and the core that was measured.
        second_level: Bytes of the second-level cache that a tile of keys and values of one head may take, with the tile
            that is fetched meanwhile in another share of the same size. A head's tokens lie some KB apart where there
            are several kv heads, and its lines then share a part of the cache's sets: half as many bytes are taken.
        kv_tile: Tokens whose scores are held at once in the fused kernel, at most: long enough to amortise the rescale
            of acc, short enough that scores and probabilities of 16 rows stay in the first-level cache.
        heads_in_lanes: Rows from which on heads lie in the lanes.
        sweep_intensity: FLOPs for a byte of the caches up to which the memory is the limit.
        sweep_rows: Rows up to which packed caches are swept.
        sweep_bytes: Scores and probabilities of all heads and a tile of tokens in a sweep, at most.
        streams: Places of a tile that a sweep reads in turn, for the hardware's prefetchers to run ahead in each.
        paired_streams: The same where a row of the cache holds pairs of tokens.
        load_costs: What a vector of the cache costs beside a broadcast operand, in loads from the first-level cache:
            where it is an operand as it lies, and where it is converted to float32 first.
        broadcast_registers: Registers that an element of a row and the mask of a pair take, where instructions do not
            broadcast an operand in memory themselves.
    """

    name: str
    second_level: int
    kv_tile: int = 128
    heads_in_lanes: int = 16
    sweep_intensity: float = 2
    sweep_rows: int = 1
    sweep_bytes: int = 1 << 18
    streams: int = 8
    paired_streams: int = 2
    load_costs: tuple[float, float] = (2, 3)
    broadcast_registers: int = 2


AVX2 = Machine("AVX2 (Zen 1, 512 KB of second-level cache)", second_level=1 << 17)
AVX512 = Machine("AVX-512 (with 1 MB of second-level cache)", second_level=1 << 17, broadcast_registers=0)
AVX512_BF16 = Machine(
    "AVX-512 with BF16 (Zen 4, 1 MB of second-level cache)", second_level=1 << 17, broadcast_registers=0
)


def machine_of(target: CpuTarget) -> Machine:
    """The row of a target: the first whose instruction sets it has. Without AVX-512 it is AVX2's."""
    if target.vector_lanes < 16:
        return AVX2
    return AVX512_BF16 if target.dot_pairs else AVX512
