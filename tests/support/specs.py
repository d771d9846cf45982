"""Specs that many tests share: compiling one takes seconds, so each test takes these where it can."""

from __future__ import annotations

import itertools
import math

import pytest

from pa_compiler import PagedAttentionSpec
from pa_compiler.compiler import PIPELINES
from pa_compiler.cpu import target
from pa_compiler.cpu import tiles as tiling

SPECS = {  # every strategy, layout and type
    "float32": PagedAttentionSpec(6, 2, 24, 5, "float32"),  # blocks that no tile is a multiple of
    "float32_MQA": PagedAttentionSpec(16, 1, 16, 128, "float32"),  # heads in lanes, read in place
    "float16": PagedAttentionSpec(31, 1, 24, 16, "float16", "float32"),  # heads in lanes, a ragged second tile
    "bfloat16_HND": PagedAttentionSpec(8, 8, 32, 8, "bfloat16", kv_layout="HND"),
    "bfloat16_packed": PagedAttentionSpec(10, 2, 32, 16, "bfloat16", kv_layout="packed"),  # tokens in lanes
}
BASE = SPECS["float32"]

OUT_DTYPE_SPECS = {  # with the other sizes of heads' tiles and sequences' chunks
    "float32_to_float16_tile_1": PagedAttentionSpec(5, 1, 16, 8, "float32", "float16", head_tile=1),
    "float32_to_bfloat16_tile_4": PagedAttentionSpec(20, 1, 16, 8, "float32", "bfloat16", head_tile=4),
    "float16_to_bfloat16_tile_64": PagedAttentionSpec(20, 1, 16, 8, "float16", "bfloat16", head_tile=64),
    "bfloat16_to_float16_chunk_1": PagedAttentionSpec(6, 2, 16, 8, "bfloat16", "float16", batch_chunk=1),
}

DTYPE_SPECS = {spec.dtype: spec for name, spec in SPECS.items() if name in ("float32", "float16", "bfloat16_HND")}

every_pipeline = pytest.mark.parametrize("pipeline", PIPELINES)


def parametrize(specs):
    """Mark a test to take each of the named specs, as spec, and each pipeline."""
    pairs = itertools.product(specs.items(), PIPELINES)
    params = [pytest.param(spec, pipeline, id=f"{name}-{pipeline}") for (name, spec), pipeline in pairs]
    return pytest.mark.parametrize(("spec", "pipeline"), params)


every_spec = parametrize(SPECS)


def in_turn(names, *axes):
    """Mark a test to take all combinations of some axes, most of them in `make slow` alone.

    In the default run each combination of the other axes is there once, and the values of the last axis take turns. All
    of these are there, so that there must be as many combinations of the others.
    """
    axes, params = [list(axis) for axis in axes], []
    assert math.prod(map(len, axes[:-1])) >= len(axes[-1])
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        is_due = sum(places[:-1]) % len(axes[-1]) == places[-1]
        values = [axis[place] for axis, place in zip(axes, places, strict=True)]
        name = "-".join("-".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in values)
        params.append(pytest.param(*values, id=name, marks=() if is_due else pytest.mark.slow))
    return pytest.mark.parametrize(names, params)


def range_tokens(spec):
    """Tokens after which decode cuts a sequence into ranges, the same for every target."""
    tiles = tiling.choose(spec, target.CpuTarget('{"kind": "llvm"}', frozenset()), "fused")
    return tiles.split_blocks * spec.block_size


def lengths_around_the_splits(spec):
    """A token and a block to either side of each length from which on the cut is another one, up to four ranges.

    Past n times range_tokens there is a range more, and past n ranges of equally many blocks a block more in each.
    """
    split, size = range_tokens(spec) // spec.block_size, spec.block_size
    blocks = {ranges * split for ranges in (1, 2, 3)}
    blocks |= {-(-((ranges - 1) * split + 1) // ranges) * ranges for ranges in (2, 3, 4)}
    return sorted({count * size + offset for count in blocks for offset in (-size, -1, 0, 1, size)})
