"""explain for a GPU: occupancy by hand, and what the command prints against what was compiled."""

from __future__ import annotations

import re

import numpy as np
import pytest
from click.testing import CliRunner

from pa_compiler import PagedAttentionSpec, compiler
from pa_compiler.backend import Limits
from pa_compiler.cli import main as cli
from pa_compiler.cuda import build as cuda_build
from pa_compiler.cuda import gpus, inside
from pa_compiler.cuda import tiling as cuda_tiling


def invoke(*words):
    return CliRunner().invoke(cli.main, ["explain", *words])


@pytest.mark.parametrize(
    ("arch", "registers", "shared_bytes", "expected"),
    [
        ("sm_90", 124, 65536, (4, 3, 16)),
        ("sm_90", 128, 1024, (4, 114, 16)),
        ("sm_90", 129, 1024, (3, 114, 16)),  # taken by eights
        ("sm_80", 250, 131072, (2, 1, 16)),
        ("sm_86", 40, 49152, (12, 2, 12)),
        ("sm_121", 40, 49152, (12, 2, 12)),  # as sm_120, which is the one before it
    ],
)
def test_residence(arch, registers, shared_bytes, expected):
    found = gpus.residence(arch, 128, registers, shared_bytes)
    assert (found.registers, found.shared, found.threads) == expected
    assert found.blocks == min(expected)


@pytest.mark.parametrize("seed", range(20))
def test_ranges_go_by_a_sequence_alone(seed):
    """They are as many as partial results have room for, and not cut shorter than the shortest."""
    rng = np.random.default_rng(seed)
    spec = PagedAttentionSpec(8, 2, 64, 16, "bfloat16", window=None if seed % 2 else 10**4)
    tiling = cuda_tiling.choose(spec, "sm_90")
    for _ in range(50):
        lengths = rng.integers(0, 10 ** rng.integers(1, 8), rng.integers(1, 200)).tolist()
        ranges = cuda_tiling.ranges(spec, tiling, lengths)
        assert ranges == [cuda_tiling.ranges(spec, tiling, [length])[0] for length in lengths]
        for length, count in zip(lengths, ranges, strict=True):
            assert 1 <= count <= min(max(-(-length // tiling.range_tokens), 1), tiling.most_ranges + 1)


def test_explain():
    if cuda_build.find_tool("nvcc") is None:
        pytest.skip("there is no nvcc")
    done = invoke("--target", "sm_90", "--gpu", "H100", *"--num-heads 32 --num-kv-heads 8 --block-size 16".split())
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "tensor_cores. 4 query heads for a kv head: more than 3." in text
    assert "row_tile 4: 1 tile for the 4 rows of a kv head, mma.m16n8k16" in text
    assert "4 warps x 2 stages x 16 tokens of keys and values: 65,536 bytes" in text
    assert "3 thread blocks on an SM: 4 by registers, 3 by shared memory, 16 by threads" in text
    assert "98,304 bytes an SM" in text
    assert "ranges of 256 tokens from the first on, longer ones from 16,384 tokens on" in text
    assert "64 sequences of 4,096 tokens: 16 ranges each, taken by 1,304 thread blocks" in text
    assert "up to 16 pairs of a query token, of up to 64, and one of the 4 heads" in text
    assert "13,400 GFLOP/s, min(989,400, 3350 x 4): bound by memory" in text
    assert "320.5 us" in text  # 64 * 4096 * 4096 bytes at 3350 GB/s
    if cuda_build.find_tool("nvdisasm"):
        row = re.search(r"^decode\n *(.*)$", done.output, re.MULTILINE)[1].split()
        assert row[1] == "0"
        assert row[3:6] == ["16", "16", "17"]
    else:
        assert "nvdisasm" in text


@pytest.mark.parametrize(
    ("shared_kv", "kept", "blocks", "in_flight", "copies"),
    [
        (False, "keys and values", 2, 2 * 4 * 16 * (192 + 128) * 2, 20),
        (True, "keys", 4, 4 * 4 * 16 * 192 * 2, 12),
    ],
    ids=["apart", "shared"],
)
def test_explain_values_shorter_than_keys(shared_kv, kept, blocks, in_flight, copies):
    """The ring has room for each, or for keys alone; partial results are as long as values."""
    if cuda_build.find_tool("nvcc") is None:
        pytest.skip("there is no nvcc")
    spec = PagedAttentionSpec(8, 1, 192, 16, "bfloat16", value_dim=128, shared_kv=shared_kv)
    found = compiler.explain(spec, "cuda", limits=Limits(gpu="H100"))
    text = " ".join(said for _, said in found.facts)
    ring = 4 * 2 * 16 * (192 + (0 if shared_kv else 128)) * 2
    assert f"4 warps x 2 stages x 16 tokens of {kept}: {ring:,} bytes of shared memory a thread block" in text
    assert f"{blocks} thread blocks on an SM" in text
    assert f"{in_flight:,} bytes an SM" in text
    ranges = int(re.search(r"4,096 tokens: (\d+) ranges each", text)[1])
    assert f"{2 * 64 * ranges * 8 * (128 + 2) * 4:,} bytes written and read" in text
    kernels = dict(zip(found.code[::2], found.code[1::2], strict=True))
    counts = {name: dict(zip(found.heads, numbers, strict=True)) for name, numbers in kernels.items()}
    assert {each["spill"] for each in counts.values()} == {"0"}
    assert counts["decode"].get("copy", str(copies)) == str(copies)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--gpu H100", "expected --target cuda with it, got 'llvm'"),
        ("--target sm_80 --gpu H100", "expected one of sm_80, A100, got H100"),
        ("--target cuda --pipeline staged", "expected fused, to explain target cuda, got 'staged'"),
        ("--target cuda --kv-layout packed", "expected NHD or HND for target cuda, got 'packed'"),
    ],
)
def test_errors(words, message):
    done = invoke(*words.split())
    assert done.exit_code == 2
    assert message in " ".join(re.sub(r"[│]", "", done.output).split())


def test_without_machine_code_there_are_no_loops_of_it():
    assert inside._kernels("") == []
