"""Specs drawn at random, with the pipeline and the CPU they are compiled for: what nobody thought of writing down."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from pa_compiler import PagedAttentionSpec
from pa_compiler.score import BATCH
from pa_compiler.spec import DTYPES, KV_LAYOUTS

DRAWS_VALUE_DIMS = True
"""Whether some specs have a value_dim and shared_kv of their own: where targets have kernels for them."""
DRAWS_SCORES = True
"""Whether some specs have a window, a soft cap, ALiBi, sinks and a function of scores with an input: where targets have
kernels for them."""
WINDOWS = (1, 7, 16, 100, 128, 129, 1024)
SOFTCAPS = (0.5, 5.0, 30.0, 50.0)
MAX_HEADS = 128
MAX_WIDTH = 1 << 13
"""Elements of a query, at most: a draw of a wider spec would take seconds."""
HEAD_DIMS = (1, 7, 8, 16, 24, 32, 40, 64, 64, 80, 96, 100, 112, 128, 128, 192, 256, 509, 576)
VALUE_DIMS = (1, 7, 8, 16, 33, 64, 100, 128, 512)
BLOCK_SIZES = (1, 2, 5, 8, 16, 16, 32, 48, 64, 100, 128, 256)
CPUS = ("x86-64", "x86-64-v2", "x86-64-v3")
"""What any CPU since 2017 runs, so that a test may call what is compiled for them."""


def drawn_spec(
    number: int, value_dims: bool = DRAWS_VALUE_DIMS, scores: bool = DRAWS_SCORES
) -> tuple[PagedAttentionSpec, str, str | dict[str, str]]:
    """The spec, pipeline and target of a number, always the same ones.

    With value_dims there are values of other sizes too, with scores windows, soft caps, ALiBi, sinks and inputs.
    """
    rng = np.random.default_rng((4, number))
    dtype, out_dtype = rng.choice(DTYPES, 2)
    layout = rng.choice(KV_LAYOUTS)
    kv_heads = int(rng.choice([1, 1, 2, 3, 4, 8, 12]))
    head_dim = int(rng.choice(HEAD_DIMS) if rng.random() < 0.8 else rng.integers(1, 161))
    block_size = int(rng.choice(BLOCK_SIZES))
    if layout == "packed":
        block_size = -(-block_size // 16) * 16
        head_dim += head_dim % 2 if dtype == "bfloat16" else 0
    spec = PagedAttentionSpec(
        num_heads=kv_heads * min(_group(rng), max(1, MAX_WIDTH // (kv_heads * head_dim)), MAX_HEADS // kv_heads),
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=str(dtype),
        out_dtype=str(rng.choice([dtype, out_dtype])),
        kv_layout=str(layout),
        head_tile=int(rng.choice([16, 2 ** rng.integers(0, 7)])),
        batch_chunk=int(rng.choice([16, rng.integers(1, 40)])),
    )
    target = "llvm" if rng.random() < 0.6 else {"kind": "llvm", "mcpu": str(rng.choice(CPUS))}
    pipeline = str(rng.choice(["fused", "fused", "staged"]))
    if value_dims:
        spec = _with_values(spec, np.random.default_rng((5, number)))
    if scores:
        spec = _with_scores(spec, np.random.default_rng((6, number)))
        spec = _with_input(spec, np.random.default_rng((7, number)))
    return spec, pipeline, target


def _with_values(spec: PagedAttentionSpec, rng: np.random.Generator) -> PagedAttentionSpec:
    """In one of four, values of another size than the keys; in one of eight, values that are part of the keys."""
    fitting = [dim for dim in VALUE_DIMS if dim * spec.num_heads <= MAX_WIDTH]
    kind, dim = rng.random(), int(rng.choice(fitting))
    if kind < 0.125 and spec.kv_layout != "packed":
        return dataclasses.replace(spec, value_dim=min(dim, spec.head_dim), shared_kv=True)
    return dataclasses.replace(spec, value_dim=dim) if kind < 0.375 else spec


def _with_scores(spec: PagedAttentionSpec, rng: np.random.Generator) -> PagedAttentionSpec:
    """In half of them nothing; otherwise each score function by a chance of one half."""
    if rng.random() < 0.5:
        return spec
    window, softcap = int(rng.choice(WINDOWS)), float(rng.choice(SOFTCAPS))
    has_window, has_softcap, alibi, sinks = (rng.random(4) < 0.5).tolist()
    return dataclasses.replace(
        spec,
        window=window if has_window else None,
        softcap=softcap if has_softcap else None,
        alibi=alibi,
        sinks=sinks,
    )


def _with_input(spec: PagedAttentionSpec, rng: np.random.Generator) -> PagedAttentionSpec:
    """In one of four, a function of scores that reads an input by the sequence and more, its axes in any order."""
    if rng.random() < 0.75:
        return spec
    extents = {"batch": BATCH, "head": spec.num_heads, "key": 4}
    orders = [order for count in (1, 2, 3) for order in itertools.permutations(extents, count) if "batch" in order]
    axes = orders[int(rng.integers(len(orders)))]

    def biased(score, batch, head, query_pos, key_pos, *, bias):
        places = {"batch": batch, "head": head, "key": key_pos % extents["key"]}
        return score + bias[tuple(places[axis] for axis in axes)]

    shape = tuple(extents[axis] for axis in axes)
    return dataclasses.replace(spec, score_mod=biased, inputs={"bias": ("float32", shape)})


def _group(rng: np.random.Generator) -> int:
    """Query heads of a kv head: few, as many as fill tiles, or one more."""
    common = [1, 1, 2, 4, 7, 8, 16, 24, 32, 33, 64, 65]
    group = rng.choice(common) if rng.random() < 0.7 else rng.integers(1, 40)
    return int(group)
