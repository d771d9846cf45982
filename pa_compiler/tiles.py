"""Tiling: the sizes that kernels and schedules agree on. A target's policy chooses them, without importing TVM."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from pa_compiler.kv_types import CODES_OF_BYTE
from pa_compiler.spec import ITEMSIZES, PACKED_TOKENS, PagedAttentionSpec

LINE_BYTES = 64
"""A line of the memory system."""

TILE_TOKENS = TILE_ROWS = 16
"""Rows of tokens that a matrix unit reads at once where they lie, from a multiple of it in a block on; and rows, or
columns, of a tile of sums."""

FEW_ROWS = "fused_attend_few"
"""The PrimFunc of attend that has the tiles of Tiling.few."""

CODES_OF_WORD = 8
"""Codes of 4 bits in a word of 32."""

LLVM_LEVEL = "pa.llvm_level"
"""The attribute of a PrimFunc that LLVM optimizes at another level than 3."""

LANES = "pa.lanes"
"""The mark of an sblock that reads words in vectors, of whose lanes each is an operand of a product."""


@dataclasses.dataclass(frozen=True)
class Element:
    """How the elements of keys, or of values, lie in the words in which a cache is read: see kernels/elements.py.

    Attributes:
        dtype: Type of an element in the cache.
        word: Elements of a word: 2 of bfloat16, wherever they come in pairs, and of int4, or 8 of int4, else 1.
        halves: Operands that a word is taken apart into, each for a vector of its own: as many as elements of one row
            where it is not multiplied as it is; 2 where four elements are an operand.
        terms: Products that one step of a matmul adds up: 2 where a pair of numbers is an operand, 4 where it is four.
        integers: Bits of the integers that the numbers of an operand are, 16 or 8, whose products are added up as those
            of 32 (kernels/integers.py); 0: they are of bfloat16, or float32.
        turned: Words of a row that are turned at a time (kernels/fours.py), and so the order in which a copy has its
            elements; 0 where they stay in order.
    """

    dtype: str
    word: int = 1
    halves: int = 1
    terms: int = 1
    integers: int = 0
    turned: int = 0

    @property
    def word_dtype(self) -> str:
        """The type of a word: dtype itself, or an integer for a pair, or for the codes of a byte, or of four."""
        if ITEMSIZES[self.dtype] == 1:
            return "int8" if self.word < CODES_OF_WORD else "int32"
        return self.dtype if self.word == 1 else "int32"

    @property
    def rows_of_line(self) -> int:
        """Rows of packed keys, of PACKED_TOKENS codes each, that a line of the memory system has room for; else 1."""
        return LINE_BYTES // PACKED_TOKENS if ITEMSIZES[self.dtype] == 1 else 1

    @property
    def apart(self) -> bool:
        """Whether a pair is made of two words: of elements that are converted first."""
        return self.terms > self.word

    @property
    def sum_dtype(self) -> str:
        """The type of a matmul's sums."""
        return "int32" if self.integers else "float32"

    @property
    def line_elements(self) -> int:
        """Elements of one line of the memory system."""
        return LINE_BYTES // ITEMSIZES[self.dtype] * CODES_OF_BYTE.get(self.dtype, 1)

    @property
    def line_words(self) -> int:
        """Words of one line of the memory system."""
        return self.line_elements // self.word

    @property
    def factor_dtype(self) -> str:
        """The type of an operand of a matmul: float32, or the word of a pair."""
        return "float32" if self.terms == 1 else "int32"


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes that kernels and schedules agree on. Each strategy has a class of its own, with what it tiles besides.

    Attributes:
        strategy: The schedule's name, by what lies in the lanes of a vector register: a file in schedules/.
        row_tile: Query heads of one kv head that a tile takes at once: the group in equal tiles of up to head_tile.
        kv_tile: Tokens of one step of the online softmax. In the staged pipeline: block_size.
        token_group: Tokens that the matmuls take at a time; a tile is padded to a multiple of it.
        keys, values: How the elements of each are read.
        copy_keys, copy_values: Whether they are converted into scratch first; where not, the matmuls read the caches.
        sweep: How a tile of tokens is taken through the heads. None: head tile after head tile, from scores to outputs,
            while instructions fetch what the next one reads. Otherwise all scores come first and then all outputs, in
            an order that the hardware's prefetchers follow: "tokens", a group of tokens through all heads before the
            next group, or "heads", a head through all tokens.
        streams: Places of a whole tile that its tokens are read from in turn, for the hardware's prefetchers to run
            ahead in each of them; 1 where they are read one after another.
        prefetches: Whether instructions fetch the tile of tokens that is read next.
        split_blocks: Blocks of one range of a long sequence.
        attends: Whether the tiles are for attend, where a query token need not be the last token of its sequence.
        many_tokens: Whether the rows of a tile are those of several query tokens, row_tile pairs of a token and a head:
            in the fused attend.
        few_rows: Rows of a tile up to which the matmuls take no more of it, and in tile registers the softmax; 0 where
            they take a tile whole.
        few_groups: Token groups that qk_matmul takes at a time for few_rows.
        weight_sums: In how many sums the weights of a tile are added up at first, of every so many tokens: the same in
            decode and attend where both give the same bits. 0: as a schedule has it, and decode steps as it likes.
        fetches_early: Whether the keys that an item with one tile of rows reads next are fetched before its matmuls.
        value_pairs: Pairs of tokens, all of one block, that a matrix unit adds up at a time where it multiplies packed
            values as they lie in the cache. 0: it does not.
        value_dims: Elements of value_dim whose sums it holds then.
        rows_in_place: Whether a matrix unit multiplies keys and values as they lie in the cache in rows of tokens.
        few: Tiles of work items with no more rows than a tile of these has: they have a kernel of their own, which
            gives a query token the same bits. None: the kernel is one for all items.
        weighs_values: Whether weights are multiplied by scales of values, one for each token, before they are rounded.
        llvm_level: LLVM's level of optimization of the kernel.
    """

    strategy: ClassVar[str]
    in_tile_registers: ClassVar[bool] = False
    """Whether matmuls multiply whole tiles of pairs by a matrix unit, with what a row does not see in them."""

    row_tile: int
    kv_tile: int
    token_group: int
    keys: Element
    values: Element
    copy_keys: bool
    copy_values: bool
    sweep: str | None
    streams: int
    prefetches: bool
    split_blocks: int
    attends: bool = dataclasses.field(default=False, kw_only=True)
    many_tokens: bool = dataclasses.field(default=False, kw_only=True)
    few_rows: int = dataclasses.field(default=0, kw_only=True)
    few_groups: int = dataclasses.field(default=1, kw_only=True)
    weight_sums: int = dataclasses.field(default=0, kw_only=True)
    fetches_early: bool = dataclasses.field(default=False, kw_only=True)
    value_pairs: int = dataclasses.field(default=0, kw_only=True)
    value_dims: int = dataclasses.field(default=0, kw_only=True)
    rows_in_place: bool = dataclasses.field(default=False, kw_only=True)
    few: Tiling | None = dataclasses.field(default=None, kw_only=True)
    weighs_values: bool = dataclasses.field(default=False, kw_only=True)
    llvm_level: int = dataclasses.field(default=3, kw_only=True)

    @property
    def rounds_weights(self) -> bool:
        """Whether the weights that are added up are rounded to bfloat16, as they are multiplied."""
        return self.values.terms == 2 and not self.weighs_values

    @property
    def pairs_weights(self) -> bool:
        """Whether weights are made for pairs at once: of bfloat16, with no more digits than these keep."""
        return self.rounds_weights and (self.many_tokens or self.weight_sums > 0)

    @property
    def padded_kv_tile(self) -> int:
        """kv_tile rounded up to whole token groups."""
        return -(-self.kv_tile // self.token_group) * self.token_group

    @property
    def num_offsets(self) -> int:
        """Tokens whose places in the cache are looked up at once: a padded tile, and what is fetched of the next."""
        return self.padded_kv_tile + (self.kv_tile if self.prefetches else 0)

    def of_kernel(self, name: str) -> Tiling:
        """The tiles of one of the PrimFuncs that these are for."""
        return self.few if self.few is not None and name == FEW_ROWS else self

    @property
    def tile_shape(self) -> tuple[int, int] | None:
        """Rows of sums in a tile register, and the pairs of tokens that a product adds up; None without them."""
        if not self.in_tile_registers:
            return None
        return (self.row_tile, self.value_pairs) if self.value_pairs else (16, 16)

    @staticmethod
    def fence(value: Any) -> Any:
        """The same expression of float32, of which nothing is known that could be simplified; no instruction."""
        from tvm.script import tirx as T

        return T.call_llvm_pure_intrin("float32", "llvm.arithmetic.fence", value)

    def row_tiles(self, spec: PagedAttentionSpec) -> int:
        """Tiles of rows that cover one group."""
        return -(-spec.group // self.row_tile)

    def scales_tiles(self, spec: PagedAttentionSpec) -> bool:
        """Whether what a tile of values adds has a factor besides the softmax's: a head's scale, or a unit."""
        return (spec.has_scales and not spec.token_scales) or (self.values.integers > 0 and not spec.has_zeros)

    def pass_tiles(self, spec: PagedAttentionSpec) -> int:
        """Head tiles that go from scores to outputs at once."""
        return spec.num_kv_heads * self.row_tiles(spec) if self.sweep else 1


@dataclasses.dataclass(frozen=True)
class VectorTiling(Tiling):
    """Sizes of schedules that put vectors into registers.

    Attributes:
        qk_lanes, pv_lanes: float32 elements of a key, and of a value, in one vector; divisors of their sizes.
        qk_rows, qk_tokens: Scores that qk_matmul sums in registers at once.
        pv_rows, pv_dims: Outputs that pv_matmul sums in registers at once; pv_dims divides value_dim.
        group_places: Places of a token group that a sweep reads values from in turn, where the table of offsets cannot
            say it.
        by_element: Whether an operand that is one number for all lanes is taken from a lane of a register.
        scores_in_lanes: Whether a vector of qk_matmul's sums is one of scores, and not of parts of one score.
    """

    scores_in_lanes: ClassVar[bool] = True

    qk_lanes: int
    pv_lanes: int
    qk_rows: int
    qk_tokens: int
    pv_rows: int
    pv_dims: int
    group_places: int = 1
    by_element: bool = False

    def qk_sums(self, vector_lanes: int) -> int:
        """Vector registers that the sums of qk_matmul take."""
        sums = self.qk_rows * self.qk_tokens
        return -(-sums // vector_lanes) if self.scores_in_lanes else sums

    def pv_sums(self, vector_lanes: int) -> int:
        """Vector registers that the sums of pv_matmul take."""
        return -(-self.pv_rows * self.pv_dims // self.pv_lanes)

    def of_merge(self) -> VectorTiling:
        """Sizes for partial results, alike in every strategy: value_dim lies in order and is gone through once.

        LLVM need not unroll it: its time goes to reading partial results, and at the second level it is compiled in
        half of the time.
        """
        values = dataclasses.replace(self.values, word=1, halves=1, terms=1)
        return dataclasses.replace(
            self, values=values, pv_rows=1, pv_dims=self.pv_lanes, many_tokens=False, llvm_level=2
        )


def equal_tile(group: int, limit: int) -> int:
    """Rows of each tile when a group is taken in equal tiles of up to limit: 24 as twice 12."""
    return -(-group // -(-group // limit))


def divisors(number: int) -> list[int]:
    """All divisors, in order."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of number that is at most limit."""
    return max(divisor for divisor in divisors(number) if divisor <= limit)
