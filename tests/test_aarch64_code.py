"""What kernels for aarch64 consist of: lanes of registers as operands, and products of blocks."""

from __future__ import annotations

import pytest

from pa_compiler import PagedAttentionSpec, backends, compiler
from pa_compiler.cpu import assembly, target, tiles

N1, V2 = ({"kind": "llvm", "mcpu": f"neoverse-{name}"} for name in ("n1", "v2"))


@pytest.mark.parametrize(("dtype", "on"), [("float32", N1), ("bfloat16", V2)], ids=["float32", "bfloat16"])
def test_the_matmul_of_heads_in_lanes_multiplies_by_lanes_of_registers(dtype, on):
    """Of its instructions 78 % are products: no broadcast, and nothing on the stack."""
    asm = compiler.emit(PagedAttentionSpec(16, 1, 128, 16, dtype), on, attend=False)["asm"]
    counted = [assembly.count(loop.code) for loop in assembly.inner_loops(asm)]
    (best,) = (each for each in counted if each.fmas + each.dots >= 0.78 * each.instructions and each.loads >= 16)
    assert best.embedded == (best.dots if dtype == "bfloat16" else best.fmas) >= 64
    assert best.stack_stores == best.broadcasts == best.arithmetic == 0


@pytest.mark.parametrize("group", [4, 16])
def test_packed_decode_multiplies_by_lanes_of_registers(group):
    """Of pairs of bfloat16, whose broadcast takes a unit that multiplies: QK's and PV's loops have none."""
    asm = compiler.emit(PagedAttentionSpec(group, 1, 128, 16, "bfloat16", kv_layout="packed"), V2, attend=False)["asm"]
    counted = [assembly.count(loop.code) for loop in assembly.inner_loops(asm)]
    qk, pv = (each for each in counted if each.dots >= 64)  # the other is of the last tokens of a tile
    assert (qk.dots, pv.dots) == (64, 128)
    for each in (qk, pv):
        assert each.embedded == each.dots >= 0.62 * each.instructions
        assert each.broadcasts == each.arithmetic == 0


@pytest.mark.parametrize("kv_layout", ["NHD", "packed"])
def test_attend_multiplies_blocks_in_registers(kv_layout):
    """Three products and more for two operands that are loaded, and of QK's best loop 60 % are products."""
    spec = PagedAttentionSpec(32, 8, 128, 16, "bfloat16", kv_layout=kv_layout)
    asm = compiler.emit(spec, V2)["asm"]
    loops = [loop for loop in assembly.inner_loops(asm) if any("bfmmla" in line for line in loop.code)]
    counted = [assembly.count(loop.code) for loop in loops]
    assert {loop.function for loop in loops} == {"__tvm_ffi_fused_attend"}
    assert sorted({each.dots for each in counted}) == [16, 64]  # a step of PV, four of QK
    for each in counted:
        assert each.stack_stores == each.broadcasts == each.embedded == each.arithmetic == 0
        assert 3 * each.loads <= 2 * each.dots
    assert max(each.dots / each.instructions for each in counted) >= 0.6


def test_what_is_multiplied_in_blocks():
    """Pairs of bfloat16 in attend, on CPUs with bfmmla, unless a mask may hide values, or packed codes are read."""

    def chosen(mcpu, **fields):
        spec = PagedAttentionSpec(8, 2, **{"head_dim": 64, "block_size": 16, "dtype": "bfloat16", **fields})
        cpu = target.resolve(backends.normalize(backends.named(mcpu)))
        return tiles.choose_attend(spec, cpu).strategy

    for fields in ({}, {"kv_layout": "packed"}, {"kv_dtype": "int8"}, {"window": 50}, {"softcap": 3.0}):
        assert {chosen(mcpu, **fields) for mcpu in ("neoverse-v1", "neoverse-n2", "neoverse-v2")} == {"blocks_in_lanes"}
        assert {chosen(mcpu, **fields) for mcpu in ("neoverse-n1", "znver4")} <= {"heads_in_lanes", "tokens_in_lanes"}
    assert chosen("neoverse-v2", dtype="float32") == chosen("neoverse-v2", head_dim=36) == "heads_in_lanes"
    assert chosen("neoverse-v2", mask_mod=lambda b, h, q, kv: (q - kv) % 2 == 0) == "heads_in_lanes"
    assert chosen("neoverse-v2", kv_layout="packed", kv_dtype="int8") == "tokens_in_lanes"
