"""Write a small paged cache and a query into files for the programs beside this: python make_cache.py DIRECTORY."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 8, 2, 64, 16
SPEC = "f32_nhd_h8x2_d64_b16"
OPTIONS = "--num-heads 8 --num-kv-heads 2 --head-dim 64 --block-size 16 --dtype float32"
"""Of this spec, for pa-compiler bundle."""


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """The arrays of a call of decode: three sequences, of 40, 1 and 17 tokens, in blocks that lie in any order."""
    rng = np.random.default_rng(seed)
    lens = np.array([40, 1, 17], np.int32)
    table = np.array([[5, 0, 3], [2, -1, -1], [4, 1, -1]], np.int32)
    shape = (6, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    return {
        "query": rng.standard_normal((3, HEADS, HEAD_DIM), np.float32),
        "key_cache": rng.standard_normal(shape, np.float32),
        "value_cache": rng.standard_normal(shape, np.float32),
        "block_table": table,
        "context_lens": lens,
    }


def attention(given: dict[str, np.ndarray]) -> np.ndarray:
    """What NumPy gets in float64: [3, 8, 64]."""
    outs = []
    for query, blocks, length in zip(given["query"], given["block_table"], given["context_lens"], strict=True):
        keys, values = (
            np.concatenate(given[name][blocks[blocks >= 0]])[:length].repeat(HEADS // KV_HEADS, axis=1)
            for name in ("key_cache", "value_cache")
        )
        scores = np.einsum("hd,thd->ht", query, keys, dtype=np.float64) / np.sqrt(HEAD_DIM)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        outs.append(np.einsum("ht,thd->hd", weights, values))
    return np.stack(outs)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays().items():
        array.tofile(folder / f"{name}.bin")
