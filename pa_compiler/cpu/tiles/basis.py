"""What the strategies of the CPU choose from alike: the sizes that no strategy decides, and register tiles."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from pa_compiler.cpu.machines import Machine, machine_of
from pa_compiler.cpu.target import CpuTarget
from pa_compiler.key_ranges import split_blocks
from pa_compiler.spec import ITEMSIZES, PagedAttentionSpec
from pa_compiler.tiles import CODES_OF_WORD, Element, VectorTiling, divisors, equal_tile

DOT_DIMS = 8
"""What head_dim and value_dim are multiples of where pairs of bfloat16 are multiplied: words fill vectors of 4."""

INTEGER_DIMS = 512
"""The largest head_dim whose sums of products of integers int32 has room for: of 2**15 - 1 and 2**7. So has it for the
tokens of a tile, of which there are no more."""

TILES = 4
"""Tile registers that a block of sums has."""


class CpuTiling(VectorTiling):
    """A strategy of the CPU: the tiles of a schedule, and what chooses them."""

    @classmethod
    def takes(cls, basis: Basis) -> tuple[bool, str]:
        """Whether the strategy is for a spec, and the reason in one sentence. The last strategy is not asked."""
        raise NotImplementedError

    @classmethod
    def choose(cls, basis: Basis) -> CpuTiling:
        """The tiles of a spec that the strategy takes."""
        raise NotImplementedError


class Basis(NamedTuple):
    """A spec on a target, and the sizes that follow before a strategy is chosen."""

    spec: PagedAttentionSpec
    target: CpuTarget
    pipeline: str
    machine: Machine
    rows: int
    keys: Element
    values: Element

    @property
    def fused(self) -> bool:
        """Whether it is for the fused pipeline."""
        return self.pipeline == "fused"

    @property
    def dot_pairs(self) -> bool:
        """Whether the matmuls multiply pairs of numbers: of bfloat16, or integers of 16 bits."""
        return self.keys.terms == 2

    @property
    def dot_fours(self) -> bool:
        """Whether decode multiplies four codes of 4 bits at a time by integers of 8 bits."""
        return self.keys.terms == 4

    @property
    def qk_lanes(self) -> int:
        """VectorTiling.qk_lanes: of vectors of whole words, whether they are taken apart or not."""
        if self.dot_fours:
            return math.gcd(self.spec.head_dim // self.keys.word, self.target.vector_lanes)
        steps = self.keys.terms if self.keys.apart else self.values.halves
        return math.gcd(self.spec.head_dim // steps, self.target.vector_lanes)

    @property
    def pv_lanes(self) -> int:
        """VectorTiling.pv_lanes: two vectors of what is converted in words of 16 bits, of which one has as many."""
        if self.values.turned:
            return self.values.turned
        return math.gcd(self.spec.result_dim // self.values.halves, self.target.vector_lanes * self._converted_at_once)

    @property
    def _converted_at_once(self) -> int:
        """Vectors of float32 that one of float8_e4m3fn's words of 16 bits becomes."""
        return 2 if self.values.dtype == "float8_e4m3fn" and self.values.terms == 1 else 1

    @property
    def load_cost(self) -> float:
        """Machine.load_costs of this type."""
        return self.machine.load_costs[0 if self.as_they_lie else 1]

    @property
    def as_they_lie(self) -> bool:
        """Whether the matmuls multiply what lies in the caches, and convert nothing."""
        return self.keys.dtype == "float32" or (self.dot_pairs and not self.keys.apart)

    def kv_tile(self, token_group: int, sweep: str | None = None) -> int:
        """Tokens of one step: what fits in the second-level cache, in whole groups; in the staged pipeline a block."""
        spec = self.spec
        if not self.fused:
            return spec.block_size
        parts = 2 if sweep else self.machine.shared_sets
        share = self.machine.second_level // (1 if spec.num_kv_heads == 1 else parts)
        elements = spec.head_dim if spec.shared_kv else spec.head_dim + spec.result_dim
        tokens = min(self.machine.kv_tile, share // spec.cache_bytes(elements))
        return max(1, tokens // token_group) * token_group

    def sweep(self, most_rows: int | None = None) -> str | None:
        """Tiling.sweep: for work that the memory limits, in the order in which a block lies there.

        Codes are swept for as many rows as bfloat16 is: what is gained is the order, and they are no less work.
        """
        spec = self.spec
        read = spec.head_dim if spec.shared_kv else spec.head_dim + spec.result_dim
        intensity = 2 * self.rows * (spec.head_dim + spec.result_dim) / max(spec.cache_bytes(read), 2 * read)
        scratch = 2 * self.machine.kv_tile * spec.num_heads * ITEMSIZES["float32"]
        if not self.fused or intensity > self.machine.sweep_intensity or scratch > self.machine.sweep_bytes:
            return None
        if most_rows is not None and self.rows > most_rows:
            return None
        return "tokens" if spec.kv_layout == "NHD" else "heads"

    def pv_tile(self) -> tuple[int, int]:
        """pv_rows and pv_dims, where value_dim lies in the lanes."""
        halves, lanes = self.values.halves, self.pv_lanes
        each = max(1, lanes // self.target.vector_lanes)
        vectors = [halves * each * count for count in divisors(self.spec.result_dim // (halves * lanes))]
        rows, count = register_tile(self.rows, vectors, self.target, self.load_cost, 1)
        return rows, count * lanes // each

    def common(self, token_group: int, sweep: str | None) -> dict[str, Any]:
        """The fields that every strategy fills alike."""
        return {
            "row_tile": self.rows,
            "kv_tile": self.kv_tile(token_group, sweep),
            "token_group": token_group,
            "keys": self.keys,
            "values": self.values,
            "sweep": sweep,
            "prefetches": self.fused and sweep is None,
            "split_blocks": split_blocks(self.spec),
            "qk_lanes": self.qk_lanes,
            "pv_lanes": self.pv_lanes,
            "weighs_values": self.spec.token_scales,
            "by_element": self.target.by_element,
            "llvm_level": self.machine.llvm_level,
        }


def basis(spec: PagedAttentionSpec, target: CpuTarget, pipeline: str, kernel: str = "decode") -> Basis:
    """What is known of a spec on a target before a strategy is chosen, for decode or for attend."""
    machine = machine_of(target, kernel)
    if spec.kv_dtype is not None:
        return _of_codes(spec, target, pipeline, machine, kernel)
    packed = spec.kv_layout == "packed"
    pairs = spec.head_dim % 2 == 0 and (packed or spec.result_dim % 2 == 0)
    in_pairs = spec.dtype == "bfloat16" and pairs
    word = 2 if in_pairs and (pipeline == "fused" or packed) else 1
    whole_words = spec.head_dim % DOT_DIMS == spec.result_dim % DOT_DIMS == 0
    dot_pairs = in_pairs and pipeline == "fused" and target.dot_pairs and whole_words
    halves, terms = 1 if packed else word, 2 if dot_pairs else 1
    keys = Element(spec.dtype, word, 1 if dot_pairs else halves, terms)
    values = Element(spec.dtype, word, halves, terms)
    return Basis(spec, target, pipeline, machine, rows(spec), keys, values)


def _of_codes(spec: PagedAttentionSpec, target: CpuTarget, pipeline: str, machine: Machine, kernel: str) -> Basis:
    """The same of caches of codes, each a word, which become bfloat16 where pairs are multiplied, else float32.

    Or integers of 16 bits, where multiplies_integers.

    Two to a byte they become float32, and where queries are rotated, which are no numbers of bfloat16 then. Of a spec
    with kv_dots decode multiplies four at a time, in words of eight, of which attend makes float32.
    """
    if spec.byte_dots and pipeline == "fused":
        return _of_bytes(spec, target, machine, kernel)
    whole_words = spec.head_dim % (2 * DOT_DIMS) == spec.result_dim % DOT_DIMS == 0
    pairs = target.dot_pairs and machine.pairs_codes and pipeline == "fused"
    dot_pairs = spec.dtype == "bfloat16" and pairs and whole_words
    element = Element(spec.cache_dtype, terms=2 if dot_pairs and not spec.rotates else 1)
    if pipeline == "fused" and whole_words and multiplies_integers(spec, target):
        element = Element(spec.cache_dtype, terms=2, integers=16)
    if spec.codes_of_byte == 2:
        element = Element(spec.cache_dtype, word=2, halves=1 if spec.kv_layout == "packed" else 2)
    return Basis(spec, target, pipeline, machine, rows(spec), element, element)


def _of_bytes(spec: PagedAttentionSpec, target: CpuTarget, machine: Machine, kernel: str) -> Basis:
    """The same of a spec with kv_dots."""
    keys = values = Element(spec.cache_dtype, CODES_OF_WORD, CODES_OF_WORD)
    if kernel == "decode":
        lanes = math.gcd(spec.result_dim // CODES_OF_WORD, target.vector_lanes)
        keys = Element(spec.cache_dtype, CODES_OF_WORD, halves=2, terms=4, integers=8)
        values = dataclasses.replace(keys, halves=1, turned=lanes)
    return Basis(spec, target, "fused", machine, rows(spec), keys, values)


def multiplies_integers(spec: PagedAttentionSpec, target: CpuTarget) -> bool:
    """Whether matmuls multiply codes of int8 by queries and weights of 16 bits, with sums that int32 has room for."""
    has = spec.kv_dtype == "int8" and spec.dtype != "float32" and not spec.rotates
    return has and bool(target.integer_dots) and spec.head_dim <= INTEGER_DIMS


def rows(spec: PagedAttentionSpec) -> int:
    """row_tile of a spec."""
    return equal_tile(spec.group, spec.head_tile)


def register_tile(
    rows: int, columns: list[int], target: CpuTarget, load_cost: float, held: int, of_row: int = 0
) -> tuple[int, int]:
    """How many rows and columns of vectors of an outer product have their sums in registers at once.

    A divisor of rows and one of the given numbers of columns, with the fewest loads for an FMA: a row costs one, a
    column load_cost. A column is loaded once for all rows, and takes `held` registers meanwhile; rows take of_row.
    """

    def fits(r: int, c: int) -> bool:
        operands = held * c + of_row if r > 1 else 0
        return r * c <= target.vector_sums and r * c + operands <= target.vector_registers

    tiles = [
        ((r + load_cost * c) / (r * c), -r, (r, c))
        for r in divisors(rows)
        for c in columns
        if fits(r, c) or (r == 1 and c == min(columns))
    ]
    return min(tiles)[2]
