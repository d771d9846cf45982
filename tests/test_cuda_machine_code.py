"""What nvcc makes of the CUDA kernels: registers, and the instructions that they are written for.

Nothing here needs a GPU. Without NVIDIA's nvcc, or for instructions nvdisasm, the tests are skipped.
"""

from __future__ import annotations

import re

import pytest
from cuda_emulator import PARTS
from tvm import IRModule

from pa_compiler import PagedAttentionSpec
from pa_compiler.cuda import backend as cuda_compiler
from pa_compiler.cuda import build as cuda_build
from pa_compiler.cuda import gpus
from pa_compiler.cuda import tiling as cuda_tiling
from pa_compiler.cuda.kernels import launches as cuda
from pa_compiler.cuda.target import CudaTarget

ARCHS = ("sm_80", "sm_90")
SCORES = {"window": 1024, "softcap": 50.0, "alibi": True, "sinks": True}
DECODE = {
    "group_4": (PagedAttentionSpec(32, 8, 128, 16, "bfloat16"), 3),
    "group_16_of_256": (PagedAttentionSpec(16, 1, 256, 16, "float16"), 2),
    "one_head": (PagedAttentionSpec(32, 32, 128, 16, "bfloat16"), 4),
    "float32": (PagedAttentionSpec(32, 8, 128, 16, "float32"), 2),
    "keys_longer": (PagedAttentionSpec(32, 2, 192, 16, "bfloat16", value_dim=128), 2),
    "keys_longer_shared": (PagedAttentionSpec(16, 1, 192, 16, "bfloat16", value_dim=128, shared_kv=True), 2),
    "one_head_keys_longer": (PagedAttentionSpec(16, 16, 192, 16, "bfloat16", value_dim=128), 2),
    "float32_values_longer": (PagedAttentionSpec(4, 1, 240, 16, "float32", value_dim=256), 2),
    "values_of_16": (PagedAttentionSpec(8, 1, 256, 16, "float16", value_dim=16), 3),
    "scores": (PagedAttentionSpec(32, 8, 128, 16, "bfloat16", **SCORES), 3),
    "scores_group_16_of_256": (PagedAttentionSpec(16, 1, 256, 16, "float16", **SCORES), 2),
    "scores_float32": (PagedAttentionSpec(32, 8, 128, 16, "float32", **SCORES), 2),
    "scores_one_head": (PagedAttentionSpec(32, 32, 128, 16, "bfloat16", **SCORES), 4),
}
"""decode of a spec, and how many thread blocks of it have registers on an SM."""

INT8, E4M3 = {"kv_dtype": "int8"}, {"kv_dtype": "float8_e4m3fn"}
CODES = {
    "int8": (PagedAttentionSpec(32, 8, 128, 16, "bfloat16", **INT8), 3),
    "int8_group_16_of_256": (PagedAttentionSpec(16, 1, 256, 16, "bfloat16", **INT8), 2),
    "int8_one_head": (PagedAttentionSpec(32, 32, 128, 16, "bfloat16", **INT8), 4),
    "int8_float16": (PagedAttentionSpec(32, 8, 128, 16, "float16", **INT8), 2),
    "e4m3": (PagedAttentionSpec(32, 8, 128, 16, "bfloat16", **E4M3), 3),
    "e4m3_float32": (PagedAttentionSpec(32, 8, 128, 16, "float32", **E4M3), 2),
    "e5m2_float16": (PagedAttentionSpec(32, 8, 128, 16, "float16", kv_dtype="float8_e5m2", kv_scale="head"), 3),
}
"""The same of caches of codes."""

APPEND = ("append_int8", "append_e4m3")
"""append_kv of two of them."""

MMA_TILES = {"group_4": 1, "group_16_of_256": 2, "keys_longer": 2, "keys_longer_shared": 2, "values_of_16": 1}
MMA_TILES |= {"scores": 1, "scores_group_16_of_256": 2}
"""Tiles of 8 heads, by the specs that tensor cores compute."""


ATTEND = {
    "group_4": 2, "group_16_of_256": 2, "float32": 2, "keys_longer": 2, "one_head": 2, "scores": 2, "scores_float32": 2,
    "int8": 2, "e4m3": 2,
}  # fmt: skip
"""attend of some of these specs: thread blocks that have registers on an SM."""


def tool_or_skip(name):
    try:
        cuda_build.tool(name)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=ARCHS)
def cubin(request, tmp_path_factory):
    """All kernels of the first spec, and decode of the others, in one file: (Cubin, tilings by name)."""
    tool_or_skip("nvcc")
    arch = request.param
    specs = {name: spec for name, (spec, _) in (DECODE | CODES).items()}
    tilings = {name: cuda_tiling.choose(spec, arch) for name, spec in specs.items()}
    first, tiling = DECODE["group_4"][0], tilings["group_4"]
    functions = dict(cuda.build(first, tiling, cuda_tiling.choose_attend(first, arch)).functions_items())
    kernels = {str(name.name_hint): each for name, each in functions.items()}
    del kernels["cuda_decode"], kernels["cuda_attend"]
    for name, spec in specs.items():
        kernels[name] = cuda.cuda_decode(spec, tilings[name]).with_attr("global_symbol", name)
    for name in ATTEND:
        tilings[attend := f"attend_{name}"] = cuda_tiling.choose_attend(specs[name], arch)
        kernels[attend] = cuda.cuda_attend(specs[name], tilings[attend]).with_attr("global_symbol", attend)
    for name in APPEND:
        kernels[name] = cuda.cuda_append_kv(specs[name.removeprefix("append_")]).with_attr("global_symbol", name)
    source = cuda_build.emit(IRModule(kernels), arch)
    return cuda_build.assemble(source, arch, tmp_path_factory.mktemp(arch)), tilings


@pytest.fixture(scope="module")
def instructions(cubin, tmp_path_factory):
    """How often each instruction occurs, by kernel."""
    tool_or_skip("nvdisasm")
    sass = cuda_build.disassemble(cubin[0], tmp_path_factory.mktemp("sass"))
    return {kernel: cuda_build.instructions(text) for kernel, text in sass.items()}


def count(instructions, pattern):
    return sum(number for name, number in instructions.items() if re.fullmatch(pattern, name))


def test_nothing_spills(cubin):
    resources = cubin[0].resources
    others = ("merge", "merge_attend", "append_kv", "check", "check_queries", "check_slots")
    of_specs = {*DECODE, *CODES, *APPEND, *(f"attend_{name}" for name in ATTEND)}
    assert set(resources) == of_specs | {f"cuda_{name}" for name in others}
    spilled = {name: (used.stack_bytes, used.spill_bytes) for name, used in resources.items()}
    assert spilled == dict.fromkeys(spilled, (0, 0))


RESIDENT = {name: blocks for name, (_, blocks) in (DECODE | CODES).items()} | {
    f"attend_{name}": n for name, n in ATTEND.items()
}


@pytest.mark.parametrize("name", RESIDENT)
def test_registers(cubin, name):
    compiled, tilings = cubin
    registers = -(-compiled.resources[name].registers // 8) * 8  # as they are allotted
    assert registers * tilings[name].threads * RESIDENT[name] <= gpus.REGISTERS


def test_copies_of_attend(instructions):
    """As many as decode has, products for 16 rows, and for marks of what is not finite; ptxas may repeat some."""
    spec = DECODE["group_4"][0]
    of_attend = instructions["attend_group_4"]
    assert count(of_attend, r"LDGSTS\.E\.BYPASS\S*\.128") >= 16 * 2 * (spec.head_dim + spec.result_dim) // 16 // 32
    products = 2 * ((spec.head_dim + spec.result_dim) // 16 + 1)
    assert count(of_attend, r"HMMA\.16816\.F32\.BF16") >= products + 2 * 2 * spec.result_dim // 16
    assert count(of_attend, "STL.*") == 0


@pytest.mark.parametrize("name", DECODE)
def test_copies(instructions, name):
    """Keys and values go to shared memory by asynchronous copies of 16 bytes past L1: as many as a tile has."""
    spec, _ = DECODE[name]
    tile = 16 * 2 if spec.dtype != "float32" else 8 * 4  # bytes of its elements, of one dimension
    copied = spec.head_dim + (0 if spec.shared_kv else spec.result_dim)
    assert count(instructions[name], r"LDGSTS\.E\.BYPASS\S*\.128") == tile * copied // 16 // 32
    assert count(instructions[name], "LDGSTS.*") == count(instructions[name], r"LDGSTS\S*\.128")
    assert count(instructions[name], "STL.*|LDL.*") == 0


@pytest.mark.parametrize("name", MMA_TILES)
def test_tensor_cores(instructions, name):
    """QK and PV take one mma for 16 tokens, 8 heads and 16 elements of head_dim each, and the sums of rows one more."""
    spec, tiles = DECODE[name][0], MMA_TILES[name]
    kind = {"bfloat16": "BF16", "float16": "F16"}[spec.dtype]
    assert count(instructions[name], rf"HMMA\.16816\.F32(\.{kind})?") == tiles * (
        (spec.head_dim + spec.result_dim) // 16 + 1
    )
    assert count(instructions[name], r"LDSM\.16\.M88\.4") == spec.head_dim // 16
    assert count(instructions[name], r"LDSM\.16\.MT88\.4") == spec.result_dim // 16
    assert count(instructions[name], r"MOVM\.16\.MT88") == 2 * tiles


@pytest.mark.parametrize("name", sorted(DECODE.keys() - MMA_TILES.keys()))  # in one order in every worker
def test_float32_arithmetic(instructions, name):
    """Shared memory is read 16 bytes at a time, and multiplied by FMAs alone."""
    spec, _ = DECODE[name]
    assert count(instructions[name], "HMMA.*") == 0
    tile, itemsize = (16 * 2, 2) if spec.dtype != "float32" else (8 * 4, 4)
    dims = spec.head_dim + spec.result_dim
    assert count(instructions[name], r"LDS(\.U)?\.128") >= tile * dims // 16 // 32
    assert count(instructions[name], "FFMA.*") >= tile * dims // itemsize // 32


@pytest.mark.parametrize("name", CODES)
def test_codes(cubin, instructions, name):
    """A tile has 16-byte copies of its codes, and 4-byte ones of scales; fragments are two matrices; nothing spills."""
    (spec, _), tiling, found = CODES[name], cubin[1][name], instructions[name]
    dims, blocks = spec.head_dim + spec.result_dim, tiling.tile_tokens // 16
    assert count(found, r"LDGSTS\.E\.BYPASS\S*\.128") == tiling.tile_tokens * dims // 16 // 32
    assert count(found, r"LDGSTS.*") - count(found, r"LDGSTS\S*\.128") == (2 if spec.token_scales else 0)
    assert count(found, "STL.*|LDL.*") == 0
    on_tensor_cores = tiling.strategy == "tensor_cores"
    products = tiling.mma_tiles * (dims // 16 + (not spec.token_scales)) * blocks if on_tensor_cores else 0
    assert count(found, "HMMA.*") == products
    assert count(found, r"LDSM\.16\.M88\.2") == (spec.head_dim // 16 * blocks if on_tensor_cores else 0)
    assert count(found, r"LDSM\.16\.MT88\.2") == (spec.result_dim // 16 * blocks if on_tensor_cores else 0)
    pairs = tiling.tile_tokens * dims // 2 // 32
    by_instruction = spec.kv_dtype == "float8_e4m3fn" and tiling.element.by_instruction
    assert count(found, r"F2FP\.F16\.E4M3\.UNPACK_B\S*") == (pairs if by_instruction else 0)


def test_append_moves_16_bytes(instructions):
    assert count(instructions["cuda_append_kv"], r"LDG\.E\.128\S*") >= 2
    assert count(instructions["cuda_append_kv"], r"STG\.E\.128") >= 2


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head_dim", [64, 256])
def test_staged(tmp_path, arch, head_dim):
    """Nothing spills, and the largest blocks fit in shared memory."""
    tool_or_skip("nvcc")
    spec = PagedAttentionSpec(16, 1, head_dim, cuda_tiling.STAGED_BLOCK_SIZE, "bfloat16")
    lowered = cuda_compiler.lower(spec, CudaTarget(arch), "staged")
    resources = cuda_build.assemble(lowered.cuda, arch, tmp_path).resources
    assert resources.keys() == cuda.staged_launches(spec).keys()
    assert {name: found.spill_bytes for name, found in resources.items() if found.spill_bytes} == {}


def test_a_missing_tool(monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(RuntimeError, match=r"nvnothing is neither in CUDA_HOME/bin.*pa-compiler\[compiler,cuda\]"):
        cuda_build.tool("nvnothing")


def test_code_that_nvcc_refuses(tmp_path):
    tool_or_skip("nvcc")
    with pytest.raises(RuntimeError, match=r"nvcc failed with status(.|\n)*nonsense"):
        cuda_build.assemble("nonsense", "sm_90", tmp_path)


def test_the_emulators_own_kernels_are_cuda(tmp_path):
    """nvcc takes what test_cuda_emulator.py runs: the emulator has no dialect of its own."""
    tool_or_skip("nvcc")
    assert cuda_build.assemble((PARTS / "kernels.cu").read_text(), "sm_89", tmp_path).image
