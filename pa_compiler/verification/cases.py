"""Named cases with their inputs: what `pa-compiler run` and the tests run.

The cases, their inputs and the rule for lengths are those of hw-native-sys/simpler#136, batch paged attention with
chunking. Imports no TVM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.verification import comparison
from pa_compiler.verification import inputs as inputs_of
from pa_compiler.verification.codes import CODE_DTYPES, random_codes, scale_arrays
from pa_compiler.verification.comparison import Errors
from pa_compiler.verification.inputs import fill


@dataclasses.dataclass(frozen=True)
class Case:
    """A spec together with the size of one call.

    Attributes:
        spec: What is compiled.
        batch: Number of sequences.
        seq_lens: Context lengths in tokens. A list shorter than the batch is repeated to fill it, a longer one is cut.
        max_model_len: Tokens that one row of block_table can name; None is the longest length.
        scale: Factor of the scores; None is 1 / sqrt(head_dim).
        query_lens: Query tokens of each sequence, a list like seq_lens: a call of attend. None: one of each, of decode.
    """

    spec: PagedAttentionSpec
    batch: int
    seq_lens: tuple[int, ...]
    max_model_len: int | None = None
    scale: float | None = 1.0
    query_lens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.max_model_len is not None and self.longest > self.max_model_len:
            raise ValueError(f"seq_lens: expected at most max_model_len = {self.max_model_len}, got {self.longest}")
        too_many = self.query_counts > self.context_lens
        if self.query_lens is not None and too_many.any():
            at = int(too_many.argmax())
            count, length = int(self.query_counts[at]), int(self.context_lens[at])
            raise ValueError(f"query_lens: expected at most the {length} tokens of sequence {at}, got {count}")

    @property
    def query_counts(self) -> np.ndarray:
        """int32 [batch]: the query tokens of each sequence."""
        return np.resize(np.array(self.query_lens or (1,), dtype=np.int32), self.batch)

    @property
    def query_start_loc(self) -> np.ndarray | None:
        """int32 [batch + 1], as attend takes it; None for a call of decode."""
        if self.query_lens is None:
            return None
        return np.concatenate([[0], np.cumsum(self.query_counts)]).astype(np.int32)

    @property
    def context_lens(self) -> np.ndarray:
        """int32 [batch], by the rule for seq_lens."""
        return np.resize(np.array(self.seq_lens, dtype=np.int32), self.batch)

    @property
    def longest(self) -> int:
        """The largest of context_lens."""
        return int(self.context_lens.max(initial=0))

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences together."""
        return int(self.context_lens.sum(dtype=np.int64))

    @property
    def num_blocks(self) -> int:
        """Blocks of the caches: as many as the sequences use, at least one."""
        return max(1, int((-(-self.context_lens.astype(np.int64) // self.spec.block_size)).sum()))

    @property
    def max_blocks(self) -> int:
        """Width of block_table."""
        return -(-(self.max_model_len or self.longest) // self.spec.block_size)

    @property
    def seen_tokens(self) -> int:
        """Tokens of all sequences together that some query token sees, of which there is a first and a last."""
        reach = (self.spec.window or self.longest) + self.query_counts.astype(np.int64) - 1
        return int(np.where(self.query_counts > 0, np.minimum(self.context_lens, reach), 0).sum(dtype=np.int64))

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that one call has to read: each token that a sequence sees once."""
        return self.seen_tokens * self.spec.token_bytes

    @property
    def cache_bytes(self) -> int:
        """Bytes of key_cache and value_cache together."""
        return self.num_blocks * self.spec.block_size * self.spec.token_bytes

    @property
    def flops(self) -> int:
        """Multiplications and additions of both matmuls for the keys that are seen; the softmax is not counted."""
        seen, window = 0, self.spec.window or self.longest
        for length, count in zip(self.context_lens.tolist(), self.query_counts.tolist(), strict=True):
            seen += int(np.minimum(np.arange(length - count, length) + 1, window).sum(dtype=np.int64))
        return seen * self.spec.token_flops


def _spec(num_heads: int, head_dim: int, block_size: int) -> PagedAttentionSpec:
    return PagedAttentionSpec(num_heads, 1, head_dim, block_size, "bfloat16", "float32")


CASES = {
    "Case1": Case(_spec(16, 128, 128), 256, (8192,), 32768),
    "Case2": Case(_spec(64, 128, 64), 64, (8192,), 32768),
    "Case3": Case(_spec(64, 256, 64), 64, (8192,), 32768),
    "CaseSmall1": Case(_spec(16, 16, 16), 1, (33,), 256),
    "CaseVarSeq4": Case(_spec(16, 16, 16), 4, (33, 64, 128, 15), 256),
}
"""The seed's cases by their names there. All have one kv head, bfloat16 inputs, float32 out and scale 1."""

DEFAULT = Case(_spec(16, 128, 128), 4, (1024, 33, 4096, 515), scale=None)
"""What `pa-compiler run` runs: it has a ragged last block, a very short sequence, and one that is split."""


class Inputs(NamedTuple):
    """The arrays of one call, in decode's order; value_cache is None for shared_kv.

    Those of score functions are head_arrays(). A case with query_lens has its query_start_loc beside them.
    """

    query: np.ndarray
    key_cache: np.ndarray
    value_cache: np.ndarray | None
    block_table: np.ndarray
    context_lens: np.ndarray


def make_inputs(
    case: Case,
    seed: int = 0,
    advance: Callable[[int], object] = lambda elements: None,
    caches: tuple[np.ndarray, np.ndarray | None] | None = None,
) -> Inputs:
    """Make a case's inputs as the seed does.

    query and key_cache are uniform in [-0.5, 0.5), value_cache in [-1, 1), block_table in [0, num_blocks), so blocks
    may be shared by sequences.

    Args:
        case: What to make inputs for.
        seed: Seed of NumPy's default generator.
        advance: Called with the number of elements that were just written, for a progress bar.
        caches: key_cache and value_cache to fill, as Module.empty_cache makes them for case.num_blocks; new ones where
            it is None.
    """
    rng = np.random.default_rng(seed)
    spec = case.spec
    dtype = CODE_DTYPES.get(spec.cache_dtype, spec.dtype)
    keys, values = caches or (
        np.empty((case.num_blocks, *spec.key_cache_shape[1:]), dtype),
        None if spec.shared_kv else np.empty((case.num_blocks, *spec.value_cache_shape[1:]), dtype),
    )
    rows = int(case.query_counts.sum())
    query = fill(rng, np.empty((rows, spec.num_heads, spec.head_dim), spec.dtype), 0.5, advance)
    write = fill if not spec.has_scales else random_codes
    write(rng, keys, 0.5, advance)
    if values is not None:
        write(rng, values, 1.0, advance)
    block_table = rng.integers(0, case.num_blocks, (case.batch, case.max_blocks), dtype=np.int32)
    return Inputs(query, keys, values, block_table, case.context_lens)


def head_arrays(case: Case, seed: int = 0) -> dict[str, Any]:
    """alibi_slopes, sinks, scales and inputs, as far as the case's spec has them: keywords of decode and compare."""
    scales = scale_arrays(np.random.default_rng((2, seed)), case.spec, case.num_blocks)
    return scales | inputs_of.head_arrays(np.random.default_rng((1, seed)), case.spec, case.batch)


def distinct_blocks(case: Case, seed: int = 0) -> np.ndarray:
    """A block_table that uses every block once, in random order; entries that no token needs are -1.

    So a call reads all of the case's kv_bytes from memory that no other sequence has just read.
    """
    is_needed = np.arange(case.max_blocks) * case.spec.block_size < case.context_lens[:, None]
    table = np.full((case.batch, case.max_blocks), -1, np.int32)
    table[is_needed] = np.random.default_rng(seed).permutation(case.num_blocks)[: is_needed.sum()]
    return table


def call(module: Any, case: Case, arrays: Inputs, out: np.ndarray | None = None, **heads: Any) -> Any:
    """What decode, or attend, of a module returns for a case and its arrays."""
    if case.query_lens is None:
        return module.decode(*arrays, case.scale, out, **heads)
    return module.attend(*arrays, case.query_start_loc, case.scale, out, **heads)


def compare(
    out: np.ndarray,
    case: Case,
    arrays: Inputs,
    advance: Callable[[int], object] = lambda sequences: None,
    **heads: Any,
) -> Errors:
    """Compare a result of decode, or of attend, with the float64 reference, under pa_compiler.verification.tolerances.

    Args:
        out: [batch or query tokens, num_heads, result_dim], what call() returned for arrays.
        case: What they were made for.
        arrays: What decode was given.
        advance: Called with the number of sequences that the reference has just done, for a progress bar.
        **heads: The head_arrays() that decode was given.
    """
    fields: dict[str, Any] = heads | {"query_start_loc": case.query_start_loc}
    expected = comparison.oracle(case.spec, *arrays, case.scale, case.spec.kv_layout, advance, **fields)
    errors, _ = comparison.compare("out", out, *expected["out"], np.repeat(arrays.context_lens, case.query_counts))
    return errors
