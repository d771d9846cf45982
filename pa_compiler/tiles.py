"""Tiling: the sizes that kernels and schedules agree on. A target's policy chooses them."""

from __future__ import annotations

import dataclasses
import math

from pa_compiler.spec import PagedAttentionSpec

STREAMS = 8
"""Places of a tile that a sweep reads in turn, for the hardware's prefetchers to run ahead in each. In HND one place
has measured 60 % of a core's bandwidth, 4 places 70 %, and 8 places 90 %."""

PAIRED_STREAMS = 2
"""The same where a row of the cache holds pairs of tokens: 8 have measured three quarters of the speed of 2."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes that kernels and schedules agree on.

    Attributes:
        strategy: The schedule, named by what lies in the lanes of a vector register: a file in schedules/.
        row_tile: Query heads of one kv head that a tile takes at once: the group in equal tiles of up to head_tile.
        kv_tile: Tokens of one step of the online softmax. In the staged pipeline: block_size.
        token_group: Tokens that the matmuls take at a time; a tile is padded to a multiple of it.
        lanes: float32 elements of head_dim in one vector; divides head_dim.
        qk_rows, qk_tokens: Scores that qk_matmul sums in registers at once.
        pv_rows, pv_dims: Outputs that pv_matmul sums in registers at once; pv_dims divides head_dim.
        copy_keys, copy_values: Whether they are converted into scratch first; where not, the matmuls read the caches.
        dot_pairs: Whether the matmuls multiply pairs of bfloat16 numbers, probabilities too, as one instruction of the
            target does; where not, float32.
        sweep: How a tile of tokens is taken through the heads. None: head tile after head tile, from scores to outputs,
            while instructions fetch what the next one reads. Otherwise all scores come first and then all outputs, in
            an order that the hardware's prefetchers follow: "tokens", a group of tokens through all heads before the
            next group, or "heads", a head through all tokens.
        word_elements: Cache elements that are read as one word: 2 of bfloat16, wherever they come in pairs.
        line_elements: Cache elements of one line of the memory system, the step of the prefetches.
        split_blocks: Blocks of one range of a long sequence.
    """

    strategy: str
    row_tile: int
    kv_tile: int
    token_group: int
    lanes: int
    qk_rows: int
    qk_tokens: int
    pv_rows: int
    pv_dims: int
    copy_keys: bool
    copy_values: bool
    dot_pairs: bool
    sweep: str | None
    word_elements: int
    line_elements: int
    split_blocks: int

    @property
    def dim_pair(self) -> int:
        """Elements of head_dim in a word of the cache. Even and odd ones go to vectors of their own."""
        return 1 if self.strategy == "tokens_in_lanes" else self.word_elements

    @property
    def dot_elements(self) -> int:
        """Elements of a query or a key, and tokens, that one step of a matmul takes."""
        return 2 if self.dot_pairs else 1

    @property
    def key_pair(self) -> int:
        """Elements of head_dim in a word of a key, if it is taken apart for qk_matmul."""
        return 1 if self.dot_pairs else self.dim_pair

    @property
    def prefetches(self) -> bool:
        """Whether instructions fetch what the matmuls read next."""
        return self.sweep is None and self.strategy != "cuda_threads"

    @property
    def padded_kv_tile(self) -> int:
        """kv_tile rounded up to whole token groups."""
        return -(-self.kv_tile // self.token_group) * self.token_group

    @property
    def num_offsets(self) -> int:
        """Tokens whose places in the cache are looked up at once: a padded tile, and what is fetched of the next."""
        return self.padded_kv_tile + (self.kv_tile if self.prefetches else 0)

    @property
    def streams(self) -> int:
        """Places of a whole tile that its tokens are read from in turn."""
        return math.gcd(self.kv_tile, STREAMS) if self.sweep and self.strategy == "head_dim_in_lanes" else 1

    @property
    def group_places(self) -> int:
        """Places of a token group that a sweep reads values from in turn, where the table of offsets cannot say it."""
        if self.sweep and self.strategy == "tokens_in_lanes":
            return math.gcd(self.token_group, STREAMS if self.word_elements == 1 else PAIRED_STREAMS)
        return 1

    def qk_sums(self, vector_lanes: int) -> int:
        """Vector registers that the sums of qk_matmul take."""
        if self.strategy == "head_dim_in_lanes":
            return self.qk_rows * self.qk_tokens
        return -(-self.qk_rows * self.qk_tokens // vector_lanes)

    def pv_sums(self, vector_lanes: int) -> int:
        """Vector registers that the sums of pv_matmul take."""
        lanes = vector_lanes if self.strategy == "heads_in_lanes" else self.lanes
        return -(-self.pv_rows * self.pv_dims // lanes)

    def pv_passes(self, spec: PagedAttentionSpec) -> int:
        """Register tiles of pv_matmul, each of which goes through a tile of tokens."""
        return self.row_tile // self.pv_rows * (spec.head_dim // self.pv_dims)

    def copy_shape(self, spec: PagedAttentionSpec, copied: bool) -> tuple[int, int]:
        """The shape of a tile of keys or values that is converted into scratch; of nothing, where none is."""
        return (self.padded_kv_tile // self.dot_elements, spec.head_dim) if copied else (1, 1)

    def row_tiles(self, spec: PagedAttentionSpec) -> int:
        """Tiles of rows that cover one group."""
        return -(-spec.group // self.row_tile)

    def pass_tiles(self, spec: PagedAttentionSpec) -> int:
        """Head tiles that go from scores to outputs at once."""
        return spec.num_kv_heads * self.row_tiles(spec) if self.sweep else 1


def equal_tile(group: int, limit: int) -> int:
    """Rows of each tile when a group is taken in equal tiles of up to limit: 24 as twice 12."""
    return -(-group // -(-group // limit))


def divisors(number: int) -> list[int]:
    """All divisors, in order."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of number that is at most limit."""
    return max(divisor for divisor in divisors(number) if divisor <= limit)
