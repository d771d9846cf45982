"""The CUDA target's policy: what it takes, what it refuses, and that its sizes fit each other and the GPU."""

from __future__ import annotations

import re

import pytest
from tvm.script import tirx as T

from pa_compiler import PagedAttentionSpec
from pa_compiler.cuda import gpus
from pa_compiler.cuda import tiling as cuda_tiling
from pa_compiler.cuda.kernels.ring import chunk_offset
from pa_compiler.cuda.tiling import WARP

ARCHS = ("sm_80", "sm_86", "sm_90", "sm_90a", "sm_100", "sm_120")
HEAD_DIMS = range(16, 257, 16)

ONE_HEAD = [PagedAttentionSpec(1, 1, d, 16, dtype) for d in HEAD_DIMS for dtype in ("float32", "float16")]
IN_FLOAT32 = [spec for spec in ONE_HEAD if cuda_tiling.choose_strategy(spec)[0] == "fma"]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_spec_has_a_tiling_that_fits(dtype, arch):
    for head_dim in HEAD_DIMS:
        for group in (*range(1, 40), 64, 128):
            spec = PagedAttentionSpec(group, 1, head_dim, 16, dtype)
            tiling = cuda_tiling.choose(spec, arch)
            assert tiling.shared_bytes(spec) <= gpus.shared_limit(arch)
            assert 0 <= tiling.row_tile * tiling.row_tiles(spec) - group < tiling.row_tile
            assert tiling.tile_tokens % (WARP // cuda_tiling.copy_lanes(tiling.chunks(spec))) == 0
            assert tiling.min_range_steps * tiling.step_tokens >= cuda_tiling.MIN_RANGE_TOKENS
            if tiling.strategy == "fma":
                assert tiling.chunks(spec) % tiling.lanes == 0
                assert tiling.tile_tokens % (WARP // tiling.lanes) == 0
            else:
                assert tiling.row_tile <= 16


@pytest.mark.parametrize(
    ("group", "dtype", "head_dim", "strategy"),
    [
        (1, "bfloat16", 128, "fma"),
        (3, "float16", 64, "fma"),
        (3, "bfloat16", 80, "tensor_cores"),  # whose registers would not do
        (4, "bfloat16", 128, "tensor_cores"),
        (16, "float32", 128, "fma"),
    ],
)
def test_strategy(group, dtype, head_dim, strategy):
    spec = PagedAttentionSpec(group, 1, head_dim, 16, dtype)
    assert cuda_tiling.choose(spec, "sm_90").strategy == strategy


def test_a_group_of_16_bit_heads_is_one_tile():
    """So that the caches are read once for it."""
    for dtype in ("float16", "bfloat16"):
        for head_dim in HEAD_DIMS:
            for group in range(1, 17):
                spec = PagedAttentionSpec(group, 1, head_dim, 16, dtype)
                assert cuda_tiling.choose(spec, "sm_80").row_tiles(spec) == 1


@pytest.mark.parametrize(
    ("kilobytes", "archs"),
    [
        (163, "sm_80 sm_80a sm_87"),
        (99, "sm_86 sm_88 sm_89 sm_120 sm_120a sm_120f sm_121"),
        (227, "sm_90 sm_90a sm_100 sm_100a sm_100f sm_103 sm_103f sm_110"),
    ],
)
def test_shared_memory_of_a_thread_block(kilobytes, archs):
    """As the CUDA programming guide has it, of an architecture's variants and of later ones of its generation too."""
    assert {arch: gpus.shared_limit(arch) for arch in archs.split()} == dict.fromkeys(archs.split(), kilobytes * 1024)


def test_up_to_192_elements_fit_on_every_later_gpu():
    """Code for one architecture runs on later ones, of which some have less shared memory."""
    least = min(gpus.shared_limit(arch) for arch in ARCHS)
    for head_dim in HEAD_DIMS:
        for dtype in ("float32", "float16", "bfloat16"):
            for group in (1, 3, 4, 16):
                spec = PagedAttentionSpec(group, 1, head_dim, 16, dtype)
                for arch in ("sm_80", "sm_90"):
                    fits = cuda_tiling.choose(spec, arch).shared_bytes(spec) <= least
                    assert fits == (head_dim <= 192), (spec, arch)


def place(spec, tiling, row, chunk):
    """Of a chunk in the ring, in chunks."""
    return int(chunk_offset(spec, tiling, T.int32(row), T.int32(chunk))) // 4


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_eight_rows_never_meet_in_a_bank(head_dim):
    """Of one chunk of eight rows, as ldmatrix reads them, and each row has its own place for each chunk."""
    spec = PagedAttentionSpec(8, 1, head_dim, 16, "bfloat16")
    tiling = cuda_tiling.choose(spec, "sm_90")
    chunks = tiling.chunks(spec)
    places = [[place(spec, tiling, row, chunk) for row in range(8)] for chunk in range(chunks)]
    for column in places:
        assert len({place % 8 for place in column}) == 8
    assert len({place for column in places for place in column}) == 8 * chunks
    assert max(map(max, places)) < 8 * tiling.pitch(spec)


@pytest.mark.parametrize("spec", IN_FLOAT32, ids=lambda spec: f"{spec.dtype}_{spec.head_dim}")
def test_eight_lanes_never_meet_in_a_bank(spec):
    """Of a warp that multiplies in float32: of each eight lanes, whatever rows and chunks they read."""
    tiling = cuda_tiling.choose(spec, "sm_90")
    for first in range(0, WARP, 8):
        for chunk in range(0, tiling.chunks(spec), tiling.lanes):
            lanes = [divmod(lane, tiling.lanes) for lane in range(first, first + 8)]
            assert len({place(spec, tiling, row, chunk + number) % 8 for row, number in lanes}) == 8


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            PagedAttentionSpec(2, 2, 64, 16, "float32", kv_layout="packed"),
            "kv_layout: expected NHD or HND for target cuda, got 'packed'",
        ),
        (
            PagedAttentionSpec(2, 2, 72, 16, "float16"),
            "head_dim: expected a multiple of 16 up to 256 for target cuda, got 72",
        ),
        (
            PagedAttentionSpec(2, 2, 272, 16, "float16"),
            "head_dim: expected a multiple of 16 up to 256 for target cuda, got 272",
        ),
    ],
    ids=["packed", "72", "272"],
)
def test_refuses(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cuda_tiling.choose(spec, "sm_90")


@pytest.mark.parametrize(
    ("tiles", "resident", "extra"),
    [(8, 396, 99), (1, 264, 528), (5, 396, 158), (6, 264, 88), (7, 396, 113), (1000, 264, 1)],
)
def test_extra_items_fill_the_gpu_twice_and_no_more(tiles, resident, extra):
    assert cuda_tiling.extra_items(tiles, resident) == extra
    assert extra == 1 or extra * tiles <= 2 * resident < (extra + 1) * tiles
