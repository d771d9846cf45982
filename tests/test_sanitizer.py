"""Libraries of random specs under AddressSanitizer, and proof that it sees an element too far in host and kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sanitizer
from specs import BASE, PIPELINES

from pa_compiler import PagedAttentionSpec

CALLS = Path(__file__).parent / "support" / "sanitized_calls.py"
PARTS = 10
"""Tests that share the specs, so that they can run beside each other."""

pytestmark = pytest.mark.skipif(sanitizer.missing() is not None, reason=str(sanitizer.missing()))


def draw_spec(rng):
    """Any spec of moderate size."""
    kv_layout, dtype = str(rng.choice(["NHD", "HND", "packed"])), str(rng.choice(["float32", "float16", "bfloat16"]))
    num_kv_heads = int(rng.integers(1, 5))
    head_dims = [2, 8, 16, 24, 40, 64, 80, 128] if kv_layout == "packed" else [1, 7, 8, 16, 24, 31, 64, 80, 128]
    return PagedAttentionSpec(
        num_heads=num_kv_heads * int(rng.integers(1, 20)),
        num_kv_heads=num_kv_heads,
        head_dim=int(rng.choice(head_dims)),
        block_size=int(rng.choice([16, 32, 48, 128] if kv_layout == "packed" else [1, 5, 8, 16, 32, 128])),
        dtype=dtype,
        out_dtype=str(rng.choice(["float32", dtype])),
        kv_layout=kv_layout,
        head_tile=int(rng.choice([1, 4, 16, 64])),
        batch_chunk=int(rng.choice([1, 3, 16])),
    )


@pytest.mark.scorecard(15)
@pytest.mark.parametrize("part", range(PARTS))
def test_random_specs(tmp_path, count, figure, part):
    libraries = []
    for number in range(count(1, 200))[part::PARTS]:
        rng = np.random.default_rng(number)
        target = str(rng.choice(["native", "native", "x86-64-v3", "x86-64"]))
        target = "llvm" if target == "native" else {"kind": "llvm", "mcpu": target}
        spec, pipeline = draw_spec(rng), str(rng.choice(PIPELINES, p=[0.7, 0.3]))
        libraries.append(sanitizer.build_library(spec, pipeline, target, tmp_path / str(number)))
    if libraries:
        ran = sanitizer.run(CALLS, *libraries)
        assert (ran.returncode, ran.stdout.splitlines()[-1:]) == (0, ["done"]), ran.stdout[-400:] + ran.stderr[:4000]
        figure("specs", len(libraries))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return sanitizer.build_library(BASE, "fused", "llvm", tmp_path_factory.mktemp("sanitized") / "library")


@pytest.mark.scorecard(15)
@pytest.mark.parametrize(
    ("call", "short", "access"),
    [
        *((call, name, "READ") for call in ("decode", "attend") for name in ("key_cache", "value_cache", "query")),
        *((call, "block_table", "READ") for call in ("decode", "attend")),
        *((call, "out", "WRITE") for call in ("decode", "attend")),
        *(("attend", name, "READ") for name in ("query_start_loc", "tree_mask")),
    ],
)
def test_an_element_too_far_is_reported(library, figure, call, short, access):
    """Without this, a run without reports would say nothing. The host reads block_table, the kernels the others."""
    ran = sanitizer.run(CALLS, "--short", call, short, library)
    assert ran.returncode == sanitizer.EXIT_STATUS, ran.stderr
    assert "AddressSanitizer: heap-buffer-overflow" in ran.stderr
    assert f"{access} of size" in ran.stderr
    figure("errors put in and reported", 1)
