"""The ends of what a spec takes: each is compiled, and computes what the reference does."""

from __future__ import annotations

import pytest
from inputs import make_inputs
from tolerances import assert_close_to_oracle

import pa_compiler
from pa_compiler import PagedAttentionSpec, compiler, spec
from pa_compiler.cpu import tiles as tiling
from pa_compiler.cuda import backend as cuda_compiler
from pa_compiler.cuda import build as cuda_build
from pa_compiler.cuda import tiling as cuda_tiling
from pa_compiler.cuda.target import CudaTarget


def case(*fields, pipeline="fused", target="llvm", slow=True, **others):
    marks = [pytest.mark.slow] if slow else []
    words = [*map(str, fields), *(f"{name}_{value}" for name, value in others.items()), pipeline]
    if target != "llvm":
        words.append(target)
        target = {"kind": "llvm", "mcpu": target}
    return pytest.param(PagedAttentionSpec(*fields, **others), pipeline, target, id="-".join(words), marks=marks)


CASES = [  # num_heads, num_kv_heads, head_dim, block_size, dtype
    case(65536, 65536, 8, 4, "bfloat16", slow=False),
    case(65521, 1, 16, 1, "float32", slow=False),  # a prime number
    case(16, 1, 8192, 16, "float16", slow=False),
    case(64, 1, 1, 65536, "float32", pipeline="staged", head_tile=64, slow=False),  # a chunk of 2**26 scores
    case(65536, 1, 256, 1, "bfloat16"),
    case(65536, 65536, 1, 1, "float32", head_tile=1, batch_chunk=1),
    case(65536, 16384, 16, 16, "bfloat16", kv_layout="packed"),
    case(65521, 65521, 16, 16, "float16", kv_layout="HND"),
    case(65536, 65536, 16, 16, "float32", pipeline="staged"),
    case(65536, 1, 16, 16, "float16", pipeline="staged", target="x86-64"),
    case(2048, 2048, 8192, 1, "float32"),
    case(2048, 1, 8192, 1, "bfloat16", head_tile=1024),
    case(61, 1, 8191, 16, "bfloat16", head_tile=64),
    case(61, 1, 8191, 16, "float32", kv_layout="packed", target="x86-64-v3"),
    case(64, 1, 8190, 16, "bfloat16", kv_layout="packed", head_tile=64, target="x86-64"),
    case(4, 4, 8192, 48, "float32", pipeline="staged", batch_chunk=512, head_tile=16),
    case(8, 2, 8, 65536, "bfloat16", kv_layout="packed"),
    case(8, 2, 8, 65536, "float16", pipeline="staged", kv_layout="packed", batch_chunk=256),
    case(8, 1, 8, 65536, "bfloat16", batch_chunk=1024, window=1 << 30),
    case(1, 1, 1, 1, "bfloat16", head_tile=1, batch_chunk=1, window=1),
    case(1, 1, 1, 1, "float16", pipeline="staged", head_tile=1, batch_chunk=1),
]


@pytest.mark.parametrize(("spec", "pipeline", "target"), CASES)
def test_computes(compiled, spec, pipeline, target):
    module, inputs = compiled(spec, pipeline, target), make_inputs(spec, [0, 1, 5, 17])
    out, lse = module.decode(*inputs.arguments, return_lse=True)
    assert_close_to_oracle(spec, inputs, out, lse)


CUDA_CASES = [  # num_heads, num_kv_heads, head_dim, block_size, dtype
    case(65536, 1, 256, 65536, "bfloat16", slow=False),
    case(65536, 65536, 16, 1, "float32"),
    case(65521, 65521, 240, 65536, "bfloat16"),
    case(65521, 1, 256, 1, "float32"),
    case(65536, 1, 256, cuda_tiling.STAGED_BLOCK_SIZE, "float32", pipeline="staged", head_tile=64, batch_chunk=1024),
    case(65536, 65536, 16, 1, "bfloat16", pipeline="staged", head_tile=1, batch_chunk=1),
]


@pytest.mark.parametrize(("spec", "pipeline", "target"), CUDA_CASES)
def test_compiles_for_cuda(tmp_path, spec, pipeline, target):
    lowered = cuda_compiler.lower(spec, CudaTarget("sm_90"), pipeline)
    if cuda_build.find_tool("nvcc") is None:
        pytest.skip("nvcc is not there: the kernels are emitted and not compiled")
    assert cuda_build.assemble(lowered.cuda, "sm_90", tmp_path).image


def test_the_ends_are_among_the_cases():
    specs = [param.values[0] for param in CASES]
    for name, ends in spec._INTEGER_RANGES.items():
        found = [value for each in specs if (value := each.stated()[name]) is not None]
        assert {min(found), max(found)} == set(ends)
    assert max(each.num_heads * each.head_dim for each in specs) == spec.MAX_QUERY
    assert max(
        each.batch_chunk * tiling.rows(each) * max(each.block_size, each.result_dim)
        for each, pipeline, _ in (param.values for param in CASES)
        if pipeline == "staged"
    ) == tiling.STAGED_ELEMENTS  # fmt: skip


@pytest.mark.scorecard(13)
@pytest.mark.parametrize(
    ("heads", "head_dim", "says"),
    [
        (65536, 257, "^num_heads: expected 1 to 65280 with head_dim = 257, got 65536$"),
        (2049, 8192, "^num_heads: expected 1 to 2048 with head_dim = 8192, got 2049$"),
    ],
)
def test_a_query_has_a_size(figure, heads, head_dim, says):
    with pytest.raises(ValueError, match=says):
        PagedAttentionSpec(heads, 1, head_dim, 1, "float32")
    figure("kinds", 1)


@pytest.mark.scorecard(13)
@pytest.mark.parametrize(
    ("fields", "most"),
    [((64, 1, 1, 65536, "float32"), 16), ((16, 1, 8192, 16, "float32"), 512), ((1000, 1, 64, 65536, "float16"), 64)],
    ids=["blocks", "head_dim", "tiles_of_16"],
)
def test_a_chunk_of_the_staged_pipeline_has_a_size(figure, fields, most):
    head_tile = 64 if fields[0] == 64 else 16
    too_large = PagedAttentionSpec(*fields, head_tile=head_tile, batch_chunk=most + 1)
    says = rf"^batch_chunk: expected 1 to {most} for pipeline staged with tiles of \d+ heads, block_size = {fields[3]} "
    with pytest.raises(ValueError, match=rf"{says}and value_dim = {fields[2]}, got {most + 1}$"):
        pa_compiler.compile(too_large, pipeline="staged")
    tiling.check(too_large, "fused")
    tiling.check(PagedAttentionSpec(*fields, head_tile=head_tile, batch_chunk=most), "staged")
    with pytest.raises(ValueError, match=r"^batch_chunk: "):
        compiler.emit(too_large, pipeline="staged")
    figure("kinds", 1)
