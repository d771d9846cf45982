"""The numbers of a drawn call: ordinary ones, huge scores, and those towards the ends of their types."""

from __future__ import annotations

import numpy as np

from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.verification.inputs import noise

LARGEST = {"float32": 3.4e38, "float16": 65280.0, "bfloat16": 2.0**128 - 2.0**120}
"""Values up to which averages are promised; of float16, up to the largest that bfloat16 has too."""
_POWERS = {"query": (-30, 91), "keys": (-30, 91), "values": (-60, 1)}
"""Powers of two that ordinary numbers are multiplied by, from and to. Results are then as exact as without."""
_POWERS_OF_FLOAT16 = {"query": (-6, 13), "keys": (-6, 16), "values": (-6, 1)}
"""The same where float16 is among the types."""


def ordinary(
    rng: np.random.Generator, spec: PagedAttentionSpec, batch: int, num_blocks: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float | None]:
    """query, keys, values and a scale that give scores of about 1; or of 0, where every token weighs the same."""
    query = noise(rng, (batch, spec.num_heads, spec.head_dim), 4, spec.dtype)
    slots = (num_blocks, spec.block_size, spec.num_kv_heads)
    keys, values = (noise(rng, (*slots, dim), 1, spec.dtype) for dim in (spec.head_dim, spec.result_dim))
    scale = rng.choice(np.array([None, -1 / np.sqrt(spec.head_dim), 0.0], object), p=[0.6, 0.2, 0.2])
    return query, keys, values, scale


def huge_scores(
    rng: np.random.Generator, spec: PagedAttentionSpec, batch: int, num_blocks: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float | None]:
    """As ordinary, with scores up to 4e34 that are exact in float32: ties weigh the same, and nothing cancels.

    A query is a power of two in one of its elements and 0 in the others, keys are small whole numbers. Where these are
    values too they are not 0: if the value of the only token that weighs anything is, the result is of the others.
    """
    query = np.zeros((batch, spec.num_heads, spec.head_dim), np.float32)
    element = rng.integers(0, spec.head_dim, query.shape[:2])
    np.put_along_axis(query, element[..., None], 2.0 ** rng.integers(0, 9, (*query.shape[:2], 1)), axis=-1)
    keys = rng.integers(-8, 9, (num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim))
    if spec.shared_kv:
        keys[keys == 0] = 1
    keys = keys.astype(spec.dtype)
    values = noise(rng, (*keys.shape[:-1], spec.result_dim), 1, spec.dtype)
    return query.astype(spec.dtype), keys, values, float(2.0 ** rng.integers(0, 105))


def ends(
    rng: np.random.Generator, spec: PagedAttentionSpec, batch: int, num_blocks: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float | None]:
    """As ordinary, with numbers towards the ends of their types, and ordinary scores.

    Queries and keys are small or large, and the scale takes it back: their products overflow, or vanish, if it comes
    after them. Values are small, or as large as averages may be. In some draws many scores are -inf, or all.
    """
    query, keys, values, _ = ordinary(rng, spec, batch, num_blocks)
    types = {spec.dtype, spec.result_dtype}
    types_of_keys = types if spec.shared_kv else {spec.dtype}
    powers = _POWERS_OF_FLOAT16 if "float16" in types_of_keys else _POWERS
    of_query, of_keys = (int(rng.integers(*powers[name])) for name in ("query", "keys"))
    scale = float(rng.choice([-1, 1]) * 2.0 ** -(of_query + of_keys) / np.sqrt(spec.head_dim))
    query, keys = query * query.dtype.type(2.0**of_query), keys * keys.dtype.type(2.0**of_keys)
    unseen = -1 if spec.shared_kv else 0  # an element of the keys that is none of the values
    has_infinite = rng.random() < 0.5 and not (spec.shared_kv and spec.result_dim == spec.head_dim)
    if has_infinite and not spec.has_scales:  # codes have no infinity
        query[..., unseen], scale = 2.0**of_query, abs(scale)
        keys[rng.random(keys.shape[:-1]) < rng.choice([0.1, 1.0]), unseen] = -np.inf
    if rng.random() < 0.5:
        size = min(LARGEST[name] for name in types) / (2 if spec.has_scales else 1)  # a code may be larger by an eighth
        if spec.rotates:  # sums of all elements
            size /= spec.result_dim
        values = np.where(rng.random(values.shape) < 0.5, values, np.sign(values))
    else:
        size = 2.0 ** int(rng.integers(*(_POWERS_OF_FLOAT16 if "float16" in types else _POWERS)["values"]))
    return query, keys, (values.astype(np.float32) * np.float32(size)).astype(spec.dtype), scale
