"""Bad arguments of compile: the exception, and a message with the argument and both values."""

from __future__ import annotations

import re

import pytest
from refusals import SPEC

import pa_compiler


@pytest.mark.scorecard(13)
@pytest.mark.parametrize(
    ("target", "error", "shows"),
    [
        ("rocm", ValueError, "rocm"),
        ("llvm -mcpu=skylake", ValueError, "llvm -mcpu=skylake"),
        ({"kind": "rocm"}, ValueError, "rocm"),
        ({"kind": "cuda", "arch": "sm_75"}, ValueError, "sm_75"),
        ({"kind": "cuda", "arch": "90"}, ValueError, "90"),
        ({"kind": "cuda", "arch": 90}, ValueError, "90"),
        ({"kind": "cuda", "mcpu": "sm_90"}, ValueError, "mcpu"),
        ({"mcpu": "x86-64-v3"}, ValueError, "None"),
        ({"kind": "llvm", "mcpu": "pentium-9000"}, ValueError, "pentium-9000"),
        ({"kind": "llvm", "mattr": "+avx2"}, ValueError, "+avx2"),
        ({"kind": "llvm", "cpu": "x86-64-v3"}, ValueError, "cpu"),
        ({"kind": "llvm", "mcpu": "i386"}, ValueError, "'i386' without 64bit"),
        ({"kind": "llvm", "mcpu": "x86-64", "mattr": ["-sse2"]}, ValueError, "'x86-64' without sse2"),
        ({"kind": "llvm", "mcpu": "x86-64-v3", "mattr": ["+soft-float"]}, ValueError, "'x86-64-v3' with soft-float"),
        ({"kind": "llvm", "mcpu": "neoverse-n1", "mattr": ["-neon"]}, ValueError, "'neoverse-n1' without neon"),
        ({"kind": "llvm", "mcpu": "x86-64-v3", "mattr": ["-avx2typo"]}, ValueError, "'-avx2typo'"),
        (None, TypeError, "NoneType"),
    ],
    ids=str,
)
def test_target_is_refused(figure, target, error, shows):
    with pytest.raises(error, match=rf"^target: expected .*got .*{re.escape(shows)}"):
        pa_compiler.compile(SPEC, target=target)
    figure("kinds", 1)


@pytest.mark.scorecard(13)
@pytest.mark.parametrize("pipeline", ["", "Fused", "magic", None])
def test_pipeline_is_refused(figure, pipeline):
    with pytest.raises((TypeError, ValueError), match=rf"^pipeline: expected .*fused.*staged.*got .*{pipeline}"):
        pa_compiler.compile(SPEC, pipeline=pipeline)
    figure("kinds", 1)


@pytest.mark.scorecard(13)
@pytest.mark.parametrize("spec", [None, {"num_heads": 6}, "float16"], ids=str)
def test_spec_is_refused(figure, spec):
    with pytest.raises(TypeError, match=rf"^spec: expected .*PagedAttentionSpec.*got {type(spec).__name__}"):
        pa_compiler.compile(spec)
    figure("kinds", 1)
