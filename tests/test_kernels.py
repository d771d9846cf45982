"""The kernels one by one, through TVM: what a stage writes, and what the schedules become in machine code."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess

import numpy as np
import pytest
import tvm
from builds import build_library
from inputs import make_inputs
from tolerances import assert_close_to_oracle, assert_same_bits
from tvm.script import tirx as T

import pa_compiler
from pa_compiler import backends, compiler, kernels, schedules
from pa_compiler import tvmscript as script
from pa_compiler.cpu import assembly, target
from pa_compiler.cpu import tiles as tiling
from pa_compiler.kernels.arrays import BlockTable
from pa_compiler.kernels.caches import Cache, key_access
from pa_compiler.kernels.exp import store_exp, store_weight
from pa_compiler.kernels.tokens import Tile, token_offsets
from pa_compiler.tiles import TILE_TOKENS

SPEC = pa_compiler.PagedAttentionSpec(16, 1, 32, 16, "float32")
V4 = {"kind": "llvm", "mcpu": "x86-64-v4"}


@pytest.fixture(scope="module")
def cpu():
    return target.resolve(backends.normalize("llvm"))


@pytest.fixture(scope="module")
def staged(cpu):
    """The scheduled PrimFuncs of the staged pipeline, compiled by TVM alone."""
    tiles = tiling.choose(SPEC, cpu, "staged")
    scheduled = schedules.schedule(kernels.build(SPEC, tiles, "staged"), tiles)
    return tvm.compile(scheduled, target=tvm.target.Target(json.loads(cpu.config))), tiles


def run_softmax_prepare(staged, context_lens, block_idx, scores):
    executable, tiles = staged
    chunk, tokens, rows = SPEC.batch_chunk, tiles.padded_kv_tile, tiles.row_tile
    arrays = [
        np.asarray(context_lens, np.int32),
        np.broadcast_to(np.asarray(scores, np.float32), (chunk, rows, tokens)),
        *(np.full(shape, np.nan, np.float32) for shape in ((chunk, rows, tokens), (chunk, rows), (chunk, rows))),
    ]
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in arrays]
    executable["softmax_prepare"](*tensors, 0, len(context_lens), block_idx, 0.5)
    return [tensor.numpy()[: len(context_lens)] for tensor in tensors[2:]]


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 3e38])
def test_softmax_prepare_of_an_empty_block_is_exact(staged, garbage):
    probs, tile_max, tile_sum = run_softmax_prepare(staged, [0, 16, 5], 1, garbage)
    assert np.all(tile_max == np.float32(-1e30))
    assert_same_bits(tile_sum, np.zeros_like(tile_sum))
    assert_same_bits(probs, np.zeros_like(probs))


def test_softmax_prepare_masks_the_tail(staged):
    tokens, rows = staged[1].padded_kv_tile, staged[1].row_tile
    scores = np.random.default_rng(0).normal(size=(rows, tokens)).astype(np.float32)
    scores[:, 5:] = np.nan
    probs, tile_max, tile_sum = run_softmax_prepare(staged, [16 + 5], 1, scores)
    probs, tile_sum = probs * 64, tile_sum * 64  # the smallest power of two that is at least twice 21
    expected = 0.5 * scores[:, :5].astype(np.float64)
    largest = expected.max(axis=1, keepdims=True)
    np.testing.assert_allclose(tile_max[0], largest[:, 0], rtol=1e-6)
    np.testing.assert_allclose(probs[0, :, :5], np.exp(expected - largest), rtol=1e-6)
    np.testing.assert_allclose(tile_sum[0], probs[0].sum(axis=1), rtol=1e-6)
    assert not probs[0, :, 5:].any()


@pytest.mark.parametrize("headroom", [0, 1, 12, 32])
def test_exp_over_its_whole_range(cpu, headroom):
    count = 1 << 16
    smallest = np.float32(-87 + headroom * np.log(2))

    @T.prim_func(s_tir=True)
    def evaluate(x_handle: T.handle, y_handle: T.handle):
        x = T.match_buffer(x_handle, (count,), "float32")
        y = T.match_buffer(y_handle, (count,), "float32")
        for i in range(count):
            with T.sblock("exp"):
                vi = T.axis.spatial(count, i)
                store_exp(y, (vi,), x[vi], vi < count - 1, T.int32(headroom))

    x = np.linspace(-90, 0, count, dtype=np.float32)
    x[:4] = [np.nan, -np.inf, -0.0, -3e38]
    x[-1] = np.nan  # not valid: 0
    y = tvm.runtime.tensor(np.empty_like(x))
    executable = tvm.compile(evaluate, target=tvm.target.Target(json.loads(cpu.config)))
    executable["evaluate"](tvm.runtime.tensor(x), y)
    y = y.numpy() * 2.0**headroom
    assert np.isnan(y[0])
    assert y[1] == y[3] == y[-1] == 0
    assert y[2] == y[-2] == 1 or x[-2] != 0
    inside = (x > smallest) & np.isfinite(x)
    inside[-1] = False
    np.testing.assert_allclose(y[inside], np.exp(x[inside].astype(np.float64)), rtol=2e-7)
    assert np.all(y[x < smallest - 1e-5] == 0)


@pytest.mark.parametrize("headroom", [0, 12, 32])
def test_weights_that_are_rounded_to_bfloat16(cpu, headroom):
    count = 1 << 16
    smallest = np.float32(-87 + headroom * np.log(2))

    @T.prim_func(s_tir=True)
    def evaluate(x_handle: T.handle, y_handle: T.handle):
        x = T.match_buffer(x_handle, (count,), "float32")
        y = T.match_buffer(y_handle, (count,), "float32")
        for i in range(count):
            with T.sblock("weight"):
                vi = T.axis.spatial(count, i)
                store_weight(y, (vi,), x[vi], T.int32(headroom))

    x = np.linspace(-90, 0, count, dtype=np.float32)
    x[:4] = [np.nan, -np.inf, -0.0, -3e38]
    y = tvm.runtime.tensor(np.empty_like(x))
    executable = tvm.compile(evaluate, target=tvm.target.Target(json.loads(cpu.config)))
    executable["evaluate"](tvm.runtime.tensor(x), y)
    y = y.numpy() * 2.0**headroom
    assert np.isnan(y[0])
    assert y[1] == y[3] == 0
    assert y[2] == y[-1] == 1
    inside = (x > smallest) & np.isfinite(x)
    np.testing.assert_allclose(y[inside], np.exp(x[inside].astype(np.float64)), rtol=1e-5)
    assert np.all(y[x < smallest - 1e-5] == 0)


@pytest.mark.parametrize("features", ["avx512f", "avx", ""], ids=["lanes16", "lanes8", "lanes4"])
@pytest.mark.parametrize(
    ("heads", "block_size", "dtype", "kv_layout"),
    [((32, 1), 20, "float32", "NHD"), ((20, 4), 20, "bfloat16", "NHD"), ((3, 3), 16, "bfloat16", "packed")],
    ids=["mqa", "gqa", "packed"],
)
def test_the_tiles_of_every_vector_width_are_right_on_this_cpu(
    cpu, tmp_path, features, heads, block_size, dtype, kv_layout
):
    """The tiles follow another target's features; the code generator splits their vectors for this one."""
    spec = pa_compiler.PagedAttentionSpec(*heads, 48, block_size, dtype, out_dtype="float32", kv_layout=kv_layout)
    tiles = tiling.choose(spec, dataclasses.replace(cpu, features=frozenset(features.split())), "fused")
    build_library(spec, cpu, tiles, "fused", tmp_path)
    inputs = make_inputs(spec, [0, 1, 19, 20, 21, 61, 128, 129, 300])
    out, lse = pa_compiler.load(tmp_path / "pa.so").decode(*inputs.arguments, return_lse=True)
    assert_close_to_oracle(spec, inputs, out, lse)


def matmuls(asm: str) -> list[list[str]]:
    """The innermost loops of AVX-512 FMAs whose sums are not in memory: no exponentials, no updates of acc."""
    found = []
    for loop in (innermost.code for innermost in assembly.inner_loops(asm)):
        fmas = sum(line.startswith("vfmadd") and "zmm" in line for line in loop)
        stores = sum(bool(re.match(r"vmov\w+\s+%zmm\d+, ", line)) for line in loop)
        exponents = any(re.match(r"vpslld\s+\$23", line) for line in loop)
        if fmas >= 8 and stores < fmas and not exponents:
            found.append(loop)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_matmuls_stay_in_registers(dtype):
    """On AVX-512 QK with heads in lanes is FMAs with a broadcast operand, with no store and nothing on the stack."""
    spec = pa_compiler.PagedAttentionSpec(16, 1, 128, 128, dtype, out_dtype="float32")
    texts = compiler.emit(spec, V4)
    broadcasts = [loop for loop in matmuls(texts["asm"]) if sum("{1to16}" in line for line in loop) >= 8]
    assert len(broadcasts) >= 2
    for loop in broadcasts:
        assert not any(re.match(r"vmov\w+\s+%zmm\d+, ", line) for line in loop), loop
    assert_in_registers(texts["asm"])
    assert_prefetches(texts["asm"])


@pytest.mark.parametrize(
    ("heads", "dtype", "kv_layout"),
    [
        ((32, 8), "bfloat16", "NHD"),  # head_dim in lanes
        ((32, 8), "float16", "packed"),  # tokens in lanes
        ((8, 8), "bfloat16", "packed"),  # four vectors of them, for single rows
    ],
)
def test_the_other_matmuls_stay_in_registers(heads, dtype, kv_layout):
    spec = pa_compiler.PagedAttentionSpec(*heads, 128, 16, dtype, out_dtype="float32", kv_layout=kv_layout)
    asm = compiler.emit(spec, V4)["asm"]
    assert_in_registers(asm)
    if heads != (8, 8):  # multi-head attention is read in sweeps, which the hardware's prefetchers follow
        assert_prefetches(asm)


def assert_in_registers(asm: str) -> None:
    """Matmuls spill nothing and load whole vectors or broadcasts; exp is not a call."""
    loops = matmuls(asm)
    assert len(loops) >= 2
    for loop in loops:
        assert not any(re.match(r"vmov\w+\s+%zmm\d+, .*%rsp", line) for line in loop), loop
        assert not any(re.match(r"vp?(insert|gather)", line) for line in loop), loop
    assert "expf" not in asm


def assert_prefetches(asm: str) -> None:
    """Both caches are prefetched."""
    assert len(re.findall(r"^\s*prefetcht1", asm, re.MULTILINE)) >= 2


@pytest.mark.parametrize(("mcpu", "size"), [("x86-64-v3", 32), ("x86-64-v4", 64), ("neoverse-n1", 16)])
def test_what_lies_on_the_stack_is_aligned_to_a_vector(mcpu, size):
    """Buffers, and so what is spilled: the stack itself is aligned to 16 bytes only, so that the kernel aligns it."""
    texts = compiler.emit(pa_compiler.PagedAttentionSpec(32, 8, 128, 16, "bfloat16"), backends.named(mcpu))
    assert set(re.findall(r"= alloca .*, align (\d+)", texts["llvm"])) == {str(size)}
    spills = re.findall(r"(vmov[au])\w+\s+%[yz]mm\d+, \d*\(%rsp\)", texts["asm"])
    assert spills.count("vmovu") <= spills.count("vmova")


def test_only_the_entry_points_are_exported(compiled, tmp_path):
    compiled(SPEC).save(tmp_path / "pa.so")
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", str(tmp_path / "pa.so")], capture_output=True, text=True, check=True
    ).stdout.split()[2::3]
    names = ("append_kv", "cpu_set", "decode", "openmp", "plan", "view_as_bfloat16")
    assert sorted(symbols) == [f"__tvm_ffi_{name}" for name in names]


def test_a_stage_outside_of_a_prim_func_says_so():
    with pytest.raises(RuntimeError, match=r"store_exp: used outside of a T\.prim_func"):
        store_exp(None, (0,), 0.0, True)


@pytest.mark.parametrize(
    ("heads", "dtype", "streams"), [(8, "float32", 8), (24, "bfloat16", 1)], ids=["sweep", "prefetches"]
)
def test_the_token_of_each_column_of_a_tile(cpu, heads, dtype, streams):
    """As token_offsets has it in its docstring: in turn from several places in the whole tiles of a sweep alone."""
    spec = pa_compiler.PagedAttentionSpec(heads, 2, 32, 16, dtype)
    tiles = tiling.choose(spec, cpu, "fused")
    assert tiles.streams == streams
    stage = token_offsets(spec, key_access(spec, tiles))
    blocks, size, block_stride, row_stride = 40, tiles.num_offsets, 1000, 7

    @script.prim_func(s_tir=True)
    def look_up(
        entries_handle: T.handle,
        starts_handle: T.handle,
        offsets_handle: T.handle,
        tile_start: T.int32,
        last_token: T.int32,
    ):
        entries = T.match_buffer(entries_handle, (1, blocks + 3), "int32")
        row_starts = T.match_buffer(starts_handle, (1,), "int32")
        offsets = T.match_buffer(offsets_handle, (size,), "int64")
        tile = T.meta_var(Tile(tiles, tile_start, T.min(last_token - tile_start + 1, tiles.kv_tile)))
        cache = T.meta_var(Cache(None, T.int64(block_stride), T.int64(row_stride), None, offsets))
        table = T.meta_var(BlockTable(entries, row_starts))
        stage(table, cache, tile, 0, last_token, tiles.padded_kv_tile)

    executable = tvm.compile(look_up, target=tvm.target.Target(json.loads(cpu.config)))
    entries = np.random.default_rng(0).permutation(blocks + 3).astype(np.int32)
    row_starts, table = np.array([3], np.int32), entries[3:]
    kv_tile, start = tiles.kv_tile, 48
    column = np.arange(kv_tile)
    in_turn = column % streams * (kv_tile // streams) + column // streams
    assert sorted(in_turn) == list(column)
    for valid_len in (1, kv_tile // 2, kv_tile - 1, kv_tile, kv_tile + 1):
        offsets = tvm.runtime.tensor(np.full(size, -1, np.int64))
        given = tvm.runtime.tensor(entries[None]), tvm.runtime.tensor(row_starts), offsets
        executable["look_up"](*given, start, start + valid_len - 1)
        tokens = start + (in_turn if valid_len >= kv_tile else np.minimum(column, valid_len - 1))
        slots = tokens % spec.block_size
        if tiles.rows_in_place:  # of the first of so many that are read at once
            slots -= slots % TILE_TOKENS
        expected = table[tokens // spec.block_size] * block_stride + slots * row_stride
        np.testing.assert_array_equal(offsets.numpy()[:kv_tile], expected)
