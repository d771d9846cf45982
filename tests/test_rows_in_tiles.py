"""Decode of bfloat16 in NHD and HND in the tile registers of AMX, where rows of keys and values lie.

What it computes is tested wherever decode is, on a CPU that has them. Here is what only it has.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from inputs import make_inputs
from test_tile_registers import SAPPHIRE_RAPIDS, here
from tolerances import assert_close_to_oracle, assert_same_bits

from pa_compiler import PagedAttentionSpec, backends
from pa_compiler.backend import Extras
from pa_compiler.cpu import assembly, backend, target
from pa_compiler.cpu import tiles as tiling

LENGTHS = [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 255, 257, 1000, 2049]


def rows(num_heads, num_kv_heads, head_dim, block_size, **fields):
    return PagedAttentionSpec(num_heads, num_kv_heads, head_dim, block_size, "bfloat16", "float32", **fields)


BASE = rows(8, 2, 64, 32)
SPECS = {
    "HND": dataclasses.replace(BASE, kv_layout="HND"),
    "group_of_3": rows(6, 2, 96, 48),
    "swept_group_of_2": rows(32, 16, 64, 32),
    "swept_group_of_4": rows(32, 8, 128, 16),
    "swept_group_of_9": rows(72, 8, 128, 32, value_dim=64),
    "swept_group_of_17": rows(68, 4, 256, 16, value_dim=32),
    "swept_window": rows(32, 8, 128, 16, window=50),
    "group_of_5": rows(10, 2, 32, 32, value_dim=64),
    "group_of_8": rows(8, 1, 256, 128),
    "group_of_9": rows(9, 1, 64, 16, value_dim=32),
    "group_of_16": rows(16, 1, 128, 64),
    "group_of_17": rows(17, 1, 64, 32, value_dim=96),
    "group_of_24": rows(24, 1, 64, 32, kv_layout="HND"),
    "latent": rows(16, 1, 160, 16, value_dim=128, shared_kv=True),
    "window": dataclasses.replace(BASE, window=50),
    "window_of_one": dataclasses.replace(BASE, window=1, block_size=16),
    "scored": dataclasses.replace(BASE, softcap=20.0, alibi=True, window=70, sinks=True),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def tiles_of(spec, mcpu="sapphirerapids", pipeline="fused"):
    return tiling.choose(spec, target.resolve({"kind": "llvm", "mcpu": mcpu}), pipeline)


@pytest.mark.parametrize("name", SPECS)
def test_specs_that_they_are_for(name):
    tiles = tiles_of(SPECS[name])
    assert tiles.strategy == "rows_in_tiles"
    assert tiles.sweep == ("tokens" if name.startswith("swept") else None)
    assert tiles.prefetches == (tiles.sweep is None)


@pytest.mark.parametrize(
    ("spec", "mcpu", "pipeline"),
    [
        (BASE, "znver4", "fused"),
        (BASE, "sapphirerapids", "staged"),
        (dataclasses.replace(BASE, kv_layout="packed"), "sapphirerapids", "fused"),
        (dataclasses.replace(BASE, dtype="float16"), "sapphirerapids", "fused"),
        (dataclasses.replace(BASE, head_dim=80), "sapphirerapids", "fused"),
        (dataclasses.replace(BASE, value_dim=48), "sapphirerapids", "fused"),
        (dataclasses.replace(BASE, block_size=8), "sapphirerapids", "fused"),
        (dataclasses.replace(BASE, num_kv_heads=8), "sapphirerapids", "fused"),
        (rows(32, 16, 64, 32, kv_layout="HND"), "sapphirerapids", "fused"),
        (dataclasses.replace(BASE, mask_mod=lambda b, h, q, k: k % 2 == 0), "sapphirerapids", "fused"),
    ],
    ids=[
        "no_AMX", "staged", "packed", "float16", "head_dim_80", "value_dim_48", "blocks_of_8", "group_of_1",
        "HND_group_of_2", "mask_mod"
    ],
)  # fmt: skip
def test_specs_that_they_are_not_for(spec, mcpu, pipeline):
    assert tiles_of(spec, mcpu, pipeline).strategy != "rows_in_tiles"


@pytest.mark.parametrize("name", ["swept_group_of_4", "group_of_16"])
def test_the_matmuls_are_in_them(name, tmp_path):
    """On any machine: a product has one operand of its own, and vectors multiply nothing beside it."""
    texts = backend.emit(SPECS[name], backends.normalize(SAPPHIRE_RAPIDS), "fused", Extras(), tmp_path)
    loops = [loop.code for loop in assembly.inner_loops(texts["asm"]) if "fused_decode" in loop.function]
    products = [code for code in loops if any("tdpbf16ps" in line for line in code)]
    assert products
    lines = [line for code in products for line in code]
    loads, multiplied = (sum(name in line for line in lines) for name in ("tileloadd", "tdpbf16ps"))
    assert multiplied <= loads <= 1.4 * multiplied  # and in a sweep sums, between two token groups
    assert not any("vdpbf16ps" in line or "vfmadd" in line for line in lines)
    assert "const TileRegisters registers(16, 16);" in texts["host"]


@here
@every_spec
@pytest.mark.parametrize("poison", ["nan", "inf"])
def test_ends_of_tiles_and_groups(compiled, spec, poison):
    """Every length, with NaN or infinities in all slots that hold no token that is seen."""
    module, inputs = compiled(spec), make_inputs(spec, LENGTHS, poison=poison)
    out, lse = module.decode(*inputs.arguments, out=inputs.out, lse=inputs.lse, return_lse=True, **inputs.heads)
    assert_close_to_oracle(spec, inputs, out, lse)


def decoded(module, inputs):
    return module.decode(*inputs.arguments, out=inputs.out, lse=inputs.lse, return_lse=True, **inputs.heads)


def with_value(spec, inputs, position, element, value):
    """The inputs with another element of the value of each sequence's token at a position, in all kv heads."""
    cache = (inputs.key_cache if spec.shared_kv else inputs.value_cache).copy()
    of_tokens = cache.swapaxes(1, 2) if spec.kv_layout == "HND" else cache
    block, slot = divmod(position, spec.block_size)
    of_tokens[inputs.block_table[:, block], slot, :, element] = value
    return inputs.replace(**{"key_cache" if spec.shared_kv else "value_cache": cache})


@here
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("element", [6, 7])
@pytest.mark.parametrize("name", ["HND", "group_of_3", "group_of_16", "swept_group_of_17"])
def test_an_element_that_is_not_finite(compiled, name, element, value):
    """A product has its neighbour too, by a weight of 0: yet it is seen in its own element alone."""
    spec = SPECS[name]
    module, inputs = compiled(spec), make_inputs(spec, [81, 150, 300])
    expected_out, expected_lse = decoded(module, inputs)
    out, lse = decoded(module, with_value(spec, inputs, 80, element, value))
    assert_same_bits(lse, expected_lse)
    found, rest = out[..., element], np.delete(out, element, axis=2)
    assert np.isnan(found).all() if np.isnan(value) else (found == value).all()
    np.testing.assert_allclose(rest, np.delete(expected_out, element, axis=2), rtol=2e-6, atol=2e-6)


@here
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_value_before_the_window(compiled, value):
    """In the rows that a tile begins with, though not seen: every bit is as without it."""
    spec = SPECS["window"]
    module, inputs = compiled(spec), make_inputs(spec, [150, 150], poison="none")
    expected = decoded(module, inputs)
    for position in (96, 99):  # tiles begin at 96, of which 100 is the first that is seen
        found = decoded(module, with_value(spec, inputs, position, 0, value))
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other)
    assert not np.isfinite(decoded(module, with_value(spec, inputs, 100, 0, value))[0][..., 0]).any()
