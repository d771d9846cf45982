"""Rotary embeddings: of a model's queries and keys before they are stored, or, INLINE, of a copy when they are read."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from pa_compiler.integrations.relax.arrays import Array, Context, array, within
from pa_compiler.spec import PagedAttentionSpec


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotations of the two halves of a head (NeoX, Llama), by the position of a token times a frequency for each pair.

    Attributes:
        scaling: The "rope_type" of TVM's rope_scaling, "" for none. Only that is rotated here.
    """

    scaling: str

    def check(self) -> None:
        """Check that what is asked for is covered.

        Raises:
            ValueError: frequencies are scaled.
        """
        if self.scaling:
            raise ValueError(f"rope_scaling: expected none for RopeMode.INLINE, got {self.scaling!r}: use NORMAL")

    def rotated(self, vectors: Array, positions: Array, theta: float, scale: float) -> Array:
        """Rotated copies of vectors.

        Args:
            vectors: [num_tokens, heads, head_dim].
            positions: [num_tokens], of each token.
            theta: Base of the frequencies.
            scale: Factor on positions.
        """
        self.check()
        half = vectors.shape[-1] // 2
        last = int(positions.max()) if len(positions) else 0
        cos, sin = _turns(half, float(theta), float(scale), 1 << last.bit_length())[:, positions, None]
        low, high = vectors[..., :half].astype(np.float32), vectors[..., half:].astype(np.float32)
        out = np.empty_like(vectors, order="C")
        out[..., :half] = low * cos - high * sin
        out[..., half:] = high * cos + low * sin
        return out

    def positions(self, context: Context, offsets: Array) -> Array:
        """The position of each token of a context: that of its sequence's first, and those after it. [num_tokens]."""
        return np.repeat(offsets, context.lens) + within(context.lens)

    def gathered(
        self, keys: Array, values: Array, context: Context, offsets: Array, theta: float, scale: float
    ) -> tuple[tuple[Array, Array], Context]:
        """Copies of all keys of a paged context, rotated, and of its values, as blocks of one token, and their context.

        Args:
            keys: [num_pages, num_kv_heads, page_size, head_dim].
            values: The same.
            context: Sequences, with the inputs of windows or without.
            offsets: [batch], int32: the position of each sequence's first key that is seen.
            theta: Base of the frequencies.
            scale: Factor on positions.
        """
        self.check()
        lens, sinks, begins = context.lens, None, None
        if context.inputs is not None:
            sinks, begins = context.inputs["sinks"], context.inputs["begins"]
            lens = np.maximum(lens - begins + sinks, 0)
        rows, slots = np.repeat(np.arange(len(lens)), lens), within(lens)
        if sinks is not None and begins is not None:
            slots = np.where(slots < sinks[rows], slots, slots - sinks[rows] + begins[rows])
        page_size = keys.shape[2]
        blocks = context.indices[context.indptr[rows] + slots // page_size]
        found = keys[blocks, :, slots % page_size], values[blocks, :, slots % page_size]
        indptr = np.append(0, np.cumsum(lens)).astype(np.int32)
        tokens = Context(indptr, np.arange(indptr[-1], dtype=np.int32), lens.astype(np.int32))
        rotated = self.rotated(found[0], self.positions(tokens, offsets), theta, scale)
        return (rotated[:, None], found[1][:, None]), tokens


@functools.lru_cache(maxsize=8)
def _turns(half: int, theta: float, scale: float, size: int) -> Array:
    """Cosines and sines [2, size, half] of positions from 0 on, float32 of what float64 makes."""
    angles = np.arange(size)[:, None] * (scale * theta ** (np.arange(half) / -half))
    return np.stack((np.cos(angles), np.sin(angles))).astype(np.float32)


def split_rotary(spec: PagedAttentionSpec, rotary: Rotary, theta: float, scale: float) -> Any:
    """The function that takes a layer's queries, keys and values apart, and rotates queries and keys if it is told so.

    Args:
        spec: Heads and their size.
        rotary: What rotates.
        theta: Base of the frequencies.
        scale: Factor on positions.
    """

    def split(qkv: Any, position_map: Any, q: Any, k: Any, v: Any, apply_rope: int) -> None:
        """Copies qkv [num_tokens, num_heads + 2 * num_kv_heads, head_dim] to q, k and v."""
        fused, keys_at, values_at = array(qkv), spec.num_heads, spec.num_heads + spec.num_kv_heads
        queries, keys = fused[:, :keys_at], fused[:, keys_at:values_at]
        array(v)[:] = fused[:, values_at:]
        if apply_rope:
            rotated = rotary.rotated(fused[:, :values_at], array(position_map), theta, scale)
            queries, keys = rotated[:, :keys_at], rotated[:, keys_at:]
        array(q)[:], array(k)[:] = queries, keys

    return split
