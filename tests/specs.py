"""Specs that many tests share: compiling one takes seconds, so each test takes these where it can."""

from __future__ import annotations

import itertools

import pytest

from pa_compiler import PagedAttentionSpec

PIPELINES = ("fused", "staged")

SPECS = {
    "float32": PagedAttentionSpec(6, 2, 24, 5, "float32"),  # blocks that no tile is a multiple of
    "float32_whole_tiles": PagedAttentionSpec(4, 1, 16, 128, "float32"),  # the matmuls may read the cache in place
    "float16": PagedAttentionSpec(17, 1, 24, 16, "float16", "float32"),  # a ragged second head tile
    "bfloat16_HND": PagedAttentionSpec(8, 8, 32, 8, "bfloat16", kv_layout="HND"),
}
BASE = SPECS["float32"]

OUT_DTYPE_SPECS = {  # with the other sizes of heads' tiles and sequences' chunks
    "float32_to_float16_tile_1": PagedAttentionSpec(5, 1, 16, 8, "float32", "float16", head_tile=1),
    "float32_to_bfloat16_tile_4": PagedAttentionSpec(20, 1, 16, 8, "float32", "bfloat16", head_tile=4),
    "float16_to_bfloat16_tile_64": PagedAttentionSpec(20, 1, 16, 8, "float16", "bfloat16", head_tile=64),
    "bfloat16_to_float16_chunk_1": PagedAttentionSpec(6, 2, 16, 8, "bfloat16", "float16", batch_chunk=1),
}

DTYPE_SPECS = {spec.dtype: spec for name, spec in SPECS.items() if name != "float32_whole_tiles"}

every_pipeline = pytest.mark.parametrize("pipeline", PIPELINES)


def parametrize(specs):
    """Mark a test to take each of the named specs, as spec, and each pipeline."""
    pairs = itertools.product(specs.items(), PIPELINES)
    params = [pytest.param(spec, pipeline, id=f"{name}-{pipeline}") for (name, spec), pipeline in pairs]
    return pytest.mark.parametrize(("spec", "pipeline"), params)


every_spec = parametrize(SPECS)
