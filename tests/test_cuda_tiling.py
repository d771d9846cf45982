"""The CUDA target's policy: what it takes, what it refuses, and that its sizes fit each other and the GPU."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
from tvm.script import tirx as T

from pa_compiler import PagedAttentionSpec
from pa_compiler.cuda import gpus, tiles
from pa_compiler.cuda import tiling as cuda_tiling
from pa_compiler.cuda.kernels.ring import chunk_offset
from pa_compiler.cuda.strategies import choose_strategy
from pa_compiler.cuda.tiles import WARP

ARCHS = ("sm_80", "sm_86", "sm_90", "sm_90a", "sm_100", "sm_120")
HEAD_DIMS = range(16, 257, 16)

ONE_HEAD = [
    PagedAttentionSpec(1, 1, head_dim, 16, dtype, value_dim=value_dim)
    for dtype in ("float32", "float16")
    for head_dim, value_dim in [*zip(HEAD_DIMS, HEAD_DIMS, strict=True), (256, 16), (16, 256), (192, 128), (240, 256)]
]
IN_FLOAT32 = [spec for spec in ONE_HEAD if choose_strategy(spec)[0] == "fma"]


def assert_fits(spec, arch):
    """The chosen tiles go into each other, and their rings into shared memory."""
    tiling, of_attend = cuda_tiling.choose(spec, arch), cuda_tiling.choose_attend(spec, arch)
    assert 0 <= tiling.row_tile * tiling.row_tiles(spec) - spec.group < tiling.row_tile
    for each in (tiling, of_attend):
        assert_fits_in(spec, arch, each)
    if tiling.strategy == of_attend.strategy:  # then single tokens of attend have the bits of decode
        assert (tiling.step_tokens, tiling.range_tokens) == (of_attend.step_tokens, of_attend.range_tokens)


def assert_fits_in(spec, arch, tiling):
    keys, values = tiling.key_rows(spec), tiling.value_rows(spec)
    assert tiling.shared_bytes(spec) <= gpus.shared_limit(arch)
    assert tiling.tile_tokens % (WARP // tiles.copy_lanes(spec)) == 0
    assert tiling.range_tokens >= cuda_tiling.MIN_RANGE_TOKENS
    assert tiling.range_tokens % tiling.step_tokens == 0
    for rows in (keys, values):
        assert rows.chunks <= rows.pitch
        assert rows.chunks % tiles.copy_lanes(spec) == 0
    if tiling.strategy == "fma":
        pieces = [rows.chunks * tiles.CHUNK_WORDS // tiling.piece_words for rows in (keys, values)]
        assert [count % tiling.lanes for count in pieces] == [0, 0]
        assert tiling.tile_tokens % (WARP // tiling.lanes) == 0
    else:
        assert tiling.row_tile <= 16


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_spec_has_a_tiling_that_fits(dtype, arch):
    for head_dim in HEAD_DIMS:
        for group in (*range(1, 40), 64, 128):
            assert_fits(PagedAttentionSpec(group, 1, head_dim, 16, dtype), arch)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_120"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn"])
def test_every_spec_with_codes_has_a_tiling_that_fits(kv_dtype, dtype, arch):
    for head_dim, value_dim in itertools.product(HEAD_DIMS, (16, 80, 128, 208, 240, 256)):
        for group in (1, 3, 4, 9, 17):
            assert_fits(PagedAttentionSpec(group, 1, head_dim, 16, dtype, value_dim=value_dim, kv_dtype=kv_dtype), arch)


@pytest.mark.parametrize(
    ("group", "dtype", "kv_dtype", "strategy"),
    [
        (3, "bfloat16", "int8", "fma"),
        (4, "bfloat16", "int8", "tensor_cores"),
        (4, "float16", "int8", "fma"),  # whose weights times scales would leave float16
        (4, "float16", "float8_e5m2", "tensor_cores"),
        (4, "float32", "float8_e4m3fn", "fma"),
    ],
)
def test_strategy_of_codes(group, dtype, kv_dtype, strategy):
    spec = PagedAttentionSpec(group, 1, 128, 16, dtype, kv_dtype=kv_dtype)
    assert cuda_tiling.choose(spec, "sm_90").strategy == choose_strategy(spec)[0] == strategy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_pair_of_dims_has_a_tiling_that_fits(dtype):
    for head_dim, value_dim in itertools.product(HEAD_DIMS, HEAD_DIMS):
        for group in (1, 3, 4, 16):
            for shared_kv in (False, True) if value_dim <= head_dim else (False,):
                spec = PagedAttentionSpec(group, 1, head_dim, 16, dtype, value_dim=value_dim, shared_kv=shared_kv)
                for arch in ("sm_80", "sm_120"):
                    assert_fits(spec, arch)


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


def place(rows, row, chunk):
    """Of a chunk in the ring, in chunks."""
    return int(chunk_offset(rows, T.int32(row), T.int32(chunk))) // 4


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_eight_rows_never_meet_in_a_bank(head_dim):
    """Of one chunk of eight rows, as ldmatrix reads them, and each row has its own place for each chunk."""
    spec = PagedAttentionSpec(8, 1, head_dim, 16, "bfloat16")
    rows = cuda_tiling.choose(spec, "sm_90").key_rows(spec)
    places = [[place(rows, row, chunk) for row in range(8)] for chunk in range(rows.chunks)]
    for column in places:
        assert len({place % 8 for place in column}) == 8
    assert len({place for column in places for place in column}) == 8 * rows.chunks
    assert max(map(max, places)) < 8 * rows.pitch


@pytest.mark.parametrize("spec", IN_FLOAT32, ids=lambda spec: f"{spec.dtype}_{spec.head_dim}_{spec.result_dim}")
def test_eight_lanes_never_meet_in_a_bank(spec):
    """Of a warp that multiplies in float32: of each eight lanes, whatever rows and chunks they read."""
    tiling = cuda_tiling.choose(spec, "sm_90")
    for rows in (tiling.key_rows(spec), tiling.value_rows(spec)):
        for first in range(0, WARP, 8):
            for chunk in range(0, rows.chunks, tiling.lanes):
                lanes = [divmod(lane, tiling.lanes) for lane in range(first, first + 8)]
                assert len({place(rows, row, chunk + number) % 8 for row, number in lanes}) == 8


def test_shared_values_take_no_room():
    """With shared_kv the ring holds keys alone, and values are chunks of their rows."""
    spec = PagedAttentionSpec(16, 1, 192, 16, "bfloat16", value_dim=128, shared_kv=True)
    apart = dataclasses.replace(spec, shared_kv=False)
    tiling = cuda_tiling.choose(spec, "sm_90")
    assert tiling.values_at(spec) == 0
    assert tiling.stage_words(spec) == 16 * 192 // 2
    assert tiling.stage_words(apart) == 16 * (192 + 128) // 2
    assert tiling.value_rows(spec) == dataclasses.replace(tiling.key_rows(spec), chunks=16)


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
        (
            PagedAttentionSpec(2, 2, 64, 16, "float16", value_dim=72),
            "value_dim: expected a multiple of 16 up to 256 for target cuda, got 72",
        ),
        (
            PagedAttentionSpec(2, 2, 64, 16, "float32", value_dim=512),
            "value_dim: expected a multiple of 16 up to 256 for target cuda, got 512",
        ),
        (
            PagedAttentionSpec(16, 1, 576, 16, "bfloat16", value_dim=512, shared_kv=True),
            "head_dim: expected a multiple of 16 up to 256 for target cuda, got 576",
        ),
    ],
    ids=["packed", "72", "272", "64_72", "64_512", "576_512"],
)
def test_refuses(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cuda_tiling.choose(spec, "sm_90")


@pytest.mark.parametrize(
    ("tiles", "resident", "extra"),
    [(8, 396, 99), (1, 264, 528), (5, 396, 158), (6, 264, 88), (7, 396, 113), (1000, 264, 1)],
)
def test_extra_workers_fill_the_gpu_twice_and_no_more(tiles, resident, extra):
    assert cuda_tiling.extra_workers(tiles, resident) == extra
    assert extra == 1 or extra * tiles <= 2 * resident < (extra + 1) * tiles
