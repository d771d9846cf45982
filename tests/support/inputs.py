"""Inputs for decode: random data in shuffled blocks, with poison wherever a kernel has no business."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

from pa_compiler.verification.codes import coded
from pa_compiler.verification.inputs import GARBAGE_IDS, head_arrays, needed_entries, noise, place, used_slots

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

INT32 = np.iinfo(np.int32)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The five arrays of one decode call. Blocks lie in any order; everything that is not used holds poison.

    value_cache is None for shared_kv. out_dtype and out_dim are those of out. heads are the arrays by head that the
    spec's score functions read, by keyword. given are the arrays of inputs, by name, which tests add.
    """

    query: np.ndarray
    key_cache: np.ndarray
    value_cache: np.ndarray | None
    block_table: np.ndarray
    context_lens: np.ndarray
    out_dtype: np.dtype
    out_dim: int
    heads: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    given: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def arguments(self) -> tuple[np.ndarray, ...]:
        """The arrays in decode's order."""
        return self.query, self.key_cache, self.value_cache, self.block_table, self.context_lens

    @property
    def out(self) -> np.ndarray:
        """A fresh out, all NaN, so that an element nobody wrote is seen."""
        return np.full((*self.query.shape[:2], self.out_dim), np.nan, self.out_dtype)

    @property
    def lse(self) -> np.ndarray:
        """A fresh lse, all NaN."""
        return np.full(self.query.shape[:2], np.nan, np.float32)

    def replace(self, **arrays: np.ndarray) -> Inputs:
        """Inputs with other arrays in place of some."""
        return dataclasses.replace(self, **arrays)

    def take(self, order) -> Inputs:
        """Sequences picked, repeated or reordered by index; the caches stay as they are."""
        rows = {name: getattr(self, name)[order] for name in ("query", "block_table", "context_lens")}
        return self.replace(**rows)


def make_inputs(spec, context_lens, *, seed=0, poison="nan", placement=None, spare_blocks=3, surplus=2) -> Inputs:
    """Draw the inputs of one call.

    Args:
        spec: The PagedAttentionSpec.
        context_lens: Tokens of each sequence.
        seed: Seed of the data; query and key are uniform(-0.5, 0.5), value is uniform(-1, 1).
        poison: A name in POISONS, for slots and blocks without a token that is seen; "none" leaves 0 there.
        placement: Seed of the blocks' places in the cache. It moves blocks and changes nothing else.
        spare_blocks: Blocks that no sequence uses.
        surplus: Entries of block_table past what the longest sequence needs. They hold garbage, as those before a
            window do.
    """
    rng = np.random.default_rng(seed)
    context_lens = np.asarray(context_lens, np.int32)
    dtype = DTYPES[spec.dtype]
    longest = -(-int(context_lens.max(initial=0)) // spec.block_size)
    used = int(needed_entries(spec, context_lens, longest).sum())
    num_blocks = used + spare_blocks
    blocks = np.random.default_rng(seed if placement is None else placement).permutation(num_blocks)[:used]
    garbage = np.resize(GARBAGE_IDS, (len(context_lens), longest + surplus))
    block_table = place(spec, blocks, context_lens, garbage)
    valid = used_slots(spec, block_table, context_lens, num_blocks)

    query = noise(rng, (len(context_lens), spec.num_heads, spec.head_dim), 0.5, dtype)
    caches = []
    for bound, dim in ((0.5, spec.head_dim), (1.0, spec.result_dim)):
        logical = noise(rng, (used, spec.block_size, spec.num_kv_heads, dim), bound, dtype)
        cache = np.empty((num_blocks, *logical.shape[1:]), dtype)
        cache[blocks] = logical
        cache[~valid] = poison_value(poison, dtype)
        caches.append(cache)
    if spec.shared_kv:
        caches[1] = None
    heads = head_arrays(np.random.default_rng((1, seed)), spec, len(context_lens))
    if spec.has_scales:  # poison is any of those that codes and scales have
        codes = coded(np.random.default_rng((2, seed)), spec, *caches, valid)
        caches, heads = [codes.keys, codes.values], heads | codes.scales
    laid_out = lay_out(spec, *caches)
    return Inputs(query, *laid_out, block_table, context_lens, DTYPES[spec.result_dtype], spec.result_dim, heads)


def lay_out(spec, key: np.ndarray, value: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Caches of spec.kv_layout from caches [num_blocks, block_size, num_kv_heads, head_dim or value_dim]."""
    if spec.kv_layout == "NHD":
        return key, value
    if spec.kv_layout == "HND":
        return tuple(cache if cache is None else np.ascontiguousarray(cache.swapaxes(1, 2)) for cache in (key, value))
    if key.dtype == np.uint8:  # bytes of two elements, which are in pairs as those of bfloat16
        both = (
            np.stack([each & 15, each >> 4], axis=-1).reshape(*each.shape[:3], 2 * each.shape[3])
            for each in (key, value)
        )
        return tuple(each[..., 0::2] | each[..., 1::2] << np.uint8(4) for each in _packed(spec, *both))
    return _packed(spec, key, value)


def _packed(spec, key: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    num_blocks, block_size, num_kv_heads, head_dim = key.shape
    pair = spec.packed_pair
    key_cache = np.empty((num_blocks, num_kv_heads, head_dim // pair, pair * block_size), key.dtype)
    value_cache = np.empty((num_blocks, num_kv_heads, block_size // pair, pair * value.shape[3]), value.dtype)
    block, slot, head, d = np.indices(key.shape, sparse=True)
    key_cache[block, head, d // pair, pair * slot + d % pair] = key
    block, slot, head, d = np.indices(value.shape, sparse=True)
    value_cache[block, head, slot // pair, pair * d + slot % pair] = value
    return key_cache, value_cache


POISONS = ("nan", "signalling_nan", "inf", "negative_inf", "huge", "all_ones")


def poison_value(name: str, dtype: np.dtype) -> np.ndarray:
    """A scalar of dtype that spoils any sum it gets into."""
    info = ml_dtypes.finfo(dtype)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    infinity = np.array(np.inf, dtype).view(unsigned)
    return {
        "none": np.zeros((), dtype),
        "nan": np.array(np.nan, dtype),
        "signalling_nan": (infinity + unsigned.type(1)).astype(unsigned).view(dtype),
        "inf": np.array(np.inf, dtype),
        "negative_inf": np.array(-np.inf, dtype),
        "huge": np.array(info.max, dtype),
        "all_ones": np.array(np.iinfo(unsigned).max, unsigned).view(dtype),
    }[name]
