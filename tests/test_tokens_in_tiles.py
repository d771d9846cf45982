"""Packed bfloat16 in the tile registers of AMX, where keys and values lie: decode and attend.

What they compute is tested wherever packed caches are, on a CPU that has them. Here is what only they have.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from inputs import make_inputs
from ragged_inputs import assert_near_float64, make_ragged
from test_tile_registers import SAPPHIRE_RAPIDS, here, with_value
from tolerances import assert_close_to_oracle, assert_same_bits

from pa_compiler import PagedAttentionSpec, backends
from pa_compiler.backend import Extras
from pa_compiler.cpu import assembly, backend, target
from pa_compiler.cpu import tiles as tiling

LENGTHS = [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 255, 257, 1000, 2049]


def packed(num_heads, num_kv_heads, head_dim, block_size, **fields):
    return PagedAttentionSpec(
        num_heads, num_kv_heads, head_dim, block_size, "bfloat16", "float32", kv_layout="packed", **fields
    )


BASE = packed(8, 2, 64, 32)
SPECS = {
    "group_of_1": packed(2, 2, 64, 32),
    "group_of_2": packed(4, 2, 128, 16),
    "group_of_3": packed(6, 2, 96, 48),
    "group_of_5": packed(10, 2, 32, 32, value_dim=16),
    "group_of_8": packed(8, 1, 256, 128),
    "group_of_16": packed(16, 1, 128, 64),
    "group_of_17": packed(17, 1, 64, 32, value_dim=80),
    "group_of_24": packed(24, 1, 64, 32, value_dim=128),
    "window": dataclasses.replace(BASE, window=50),
    "window_of_one": dataclasses.replace(BASE, window=1, block_size=16),
    "scored": dataclasses.replace(BASE, softcap=20.0, alibi=True, window=70, sinks=True),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def tiles_of(spec, mcpu="sapphirerapids"):
    cpu = target.resolve({"kind": "llvm", "mcpu": mcpu})
    return tiling.choose(spec, cpu, "fused"), tiling.choose_attend(spec, cpu)


@every_spec
def test_specs_that_they_are_for(spec):
    of_decode, of_attend = tiles_of(spec)
    for tiles in (of_decode, of_attend.few or of_attend):
        assert tiles.strategy == "tokens_in_tiles"
        assert spec.block_size % (2 * tiles.value_pairs) == 0


@every_spec
def test_items_of_many_rows_have_copies_where_these_are_added_up_alike(spec):
    """Products of 16 pairs, as a copy has them, are products of 16 pairs of the cache in blocks of 32 and no others."""
    of_attend = tiles_of(spec)[1]
    alike = spec.block_size % 32 == 0 and spec.result_dim % 64 == 0 and not spec.functions
    assert of_attend.strategy == ("in_tile_registers" if alike else "tokens_in_tiles")
    assert (of_attend.few is not None) == alike
    if alike:
        assert (of_attend.kv_tile, of_attend.weight_sums) == (of_attend.few.kv_tile, of_attend.few.weight_sums)


@pytest.mark.parametrize(
    ("spec", "mcpu"),
    [
        (BASE, "znver4"),
        (dataclasses.replace(BASE, kv_layout="HND"), "sapphirerapids"),
        (dataclasses.replace(BASE, dtype="float16"), "sapphirerapids"),
        (dataclasses.replace(BASE, head_dim=80), "sapphirerapids"),
        (dataclasses.replace(BASE, value_dim=24), "sapphirerapids"),
    ],
    ids=["no_AMX", "HND", "float16", "head_dim_80", "value_dim_24"],
)
def test_specs_that_they_are_not_for(spec, mcpu):
    assert "tokens_in_tiles" not in {tiles.strategy for tiles in tiles_of(spec, mcpu)}


@pytest.mark.parametrize("block_size", [16, 32])
def test_the_matmuls_are_in_them(block_size, tmp_path):
    """On any machine: a product has one operand of its own, which no vector has touched before."""
    spec = dataclasses.replace(BASE, block_size=block_size)
    texts = backend.emit(spec, backends.normalize(SAPPHIRE_RAPIDS), "fused", Extras(attend=True), tmp_path)
    for kernel in ("fused_decode", "fused_attend_few" if block_size == 32 else "fused_attend"):
        loops = [loop.code for loop in assembly.inner_loops(texts["asm"]) if kernel in loop.function]
        products = [code for code in loops if any("tdpbf16ps" in line for line in code)]
        assert products
        lines = [line for code in products for line in code]
        loads, multiplied = (sum(name in line for line in lines) for name in ("tileloadd", "tdpbf16ps"))
        assert multiplied <= loads <= 1.3 * multiplied  # four products of one operand on the left
        assert not any("zmm" in line for line in lines)
    registers = f"const TileRegisters registers({{}}, {min(block_size // 2, 16)});"
    assert registers.format(4) in texts["host"]
    assert registers.format(16) in texts["host"]


@here
@every_spec
def test_ends_of_tiles_and_groups(compiled, spec):
    """Every length, with NaN in all slots that hold no token."""
    module, inputs = compiled(spec, attend=True), make_inputs(spec, LENGTHS)
    out, lse = module.decode(*inputs.arguments, out=inputs.out, lse=inputs.lse, return_lse=True, **inputs.heads)
    assert_close_to_oracle(spec, inputs, out, lse)
    sequences = [(min(length, 1 + length % 7), length) for length in LENGTHS]
    for poison in ("nan", "inf"):
        ragged = make_ragged(spec, sequences, poison=poison)
        assert_near_float64(spec, ragged, *ragged.attend(module))


@here
@every_spec
def test_a_token_has_the_same_bits_alone_and_in_a_prompt(compiled, spec):
    """Though nobody has asked for it by `invariant`."""
    module = compiled(spec, attend=True)
    ragged = make_ragged(spec, [(300, 700)])
    expected = ragged.attend(module)
    for first, count in ((0, 1), (1, 3), (63, 17), (98, 1), (255, 45), (299, 1)):
        found = ragged.chunk(first, count).attend(module)
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other[first : first + count])


@here
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", ["group_of_3", "group_of_16", "window"])
def test_a_decoded_token_sees_what_is_not_finite(compiled, name, value):
    """And the one before it, which does not see it, has the bits that it has without it."""
    spec, position = SPECS[name], 80
    module, ragged = compiled(spec, attend=True), make_ragged(SPECS[name], [(120, 120)])
    changed = with_value(spec, ragged, position, value)
    seen, unseen = changed.chunk(position, 1), changed.chunk(position - 1, 1)
    assert not np.isfinite(seen.attend(module)[0][0, :, 0]).any()
    for one, other in zip(unseen.attend(module), ragged.chunk(position - 1, 1).attend(module), strict=True):
        assert_same_bits(one, other)
