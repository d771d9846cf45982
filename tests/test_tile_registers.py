"""attend in the tile registers of AMX: which specs, what is multiplied, and what a row that does not see a value gets.

What it computes is tested wherever attend is, on a CPU that has them. Here is what only they have.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
from ragged_inputs import assert_near_float64, make_ragged
from tolerances import assert_same_bits

import pa_compiler
from pa_compiler import PagedAttentionSpec, backends
from pa_compiler.backend import Extras
from pa_compiler.cpu import assembly, backend, target
from pa_compiler.cpu import tiles as tiling
from pa_compiler.runtime import cpu_features

SAPPHIRE_RAPIDS = {"kind": "llvm", "mcpu": "sapphirerapids"}
NHD = PagedAttentionSpec(8, 2, 64, 16, "bfloat16", "float32")
SPECS = {
    "NHD": NHD,
    "HND_blocks_of_5": dataclasses.replace(NHD, kv_layout="HND", block_size=5),
    "group_of_1": PagedAttentionSpec(2, 2, 96, 32, "bfloat16", value_dim=64),
    "latent": PagedAttentionSpec(32, 1, 160, 32, "bfloat16", value_dim=128, shared_kv=True),
    "window": dataclasses.replace(NHD, window=50),
}
PACKED = {
    "packed": dataclasses.replace(NHD, kv_layout="packed"),
    "packed_blocks_of_32": dataclasses.replace(NHD, kv_layout="packed", block_size=32),
    "packed_window": dataclasses.replace(NHD, kv_layout="packed", window=50),
}
ALL = {**SPECS, **PACKED}

here = pytest.mark.skipif(
    bool(cpu_features.missing_features(["amx-tile", "amx-bf16"])), reason="this CPU has no tile registers (AMX)"
)


def tiles_of(spec, mcpu="sapphirerapids"):
    return tiling.choose_attend(spec, target.resolve({"kind": "llvm", "mcpu": mcpu}))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_specs_that_they_are_for(spec):
    assert tiles_of(spec).strategy == "in_tile_registers"


@pytest.mark.parametrize(
    ("spec", "mcpu"),
    [
        (NHD, "znver4"),
        (dataclasses.replace(NHD, dtype="float16"), "sapphirerapids"),
        (dataclasses.replace(NHD, head_dim=80), "sapphirerapids"),
        (dataclasses.replace(NHD, value_dim=32), "sapphirerapids"),
        (PACKED["packed"], "sapphirerapids"),
    ],
    ids=["no_AMX", "float16", "head_dim_80", "value_dim_32", "packed"],
)
def test_specs_that_they_are_not_for(spec, mcpu):
    assert tiles_of(spec, mcpu).strategy != "in_tile_registers"


def test_the_matmuls_are_in_them(tmp_path):
    """On any machine: the text of the kernels. Nothing else multiplies pairs but the sum of weights."""
    texts = backend.emit(NHD, backends.normalize(SAPPHIRE_RAPIDS), "fused", Extras(attend=True), tmp_path)
    loops = [loop for loop in assembly.inner_loops(texts["asm"]) if "fused_attend" in loop.function]
    products = [loop.code for loop in loops if any("tdpbf16ps" in line for line in loop.code)]
    assert products
    for code in products:
        loads, multiplied = (sum(name in line for line in code) for name in ("tileloadd", "tdpbf16ps"))
        assert multiplied <= loads <= 1.25 * multiplied  # four products of one operand on the right
        assert not any("%zmm" in line for line in code)
    assert "CheckTileRegisters();" in texts["host"]


@here
@pytest.mark.parametrize("spec", ALL.values(), ids=ALL)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_value_that_some_rows_do_not_see(compiled, spec, value):
    """A prompt's token 80 has an infinity or a NaN: who does not see it has the bits that he has without it."""
    module, before, position = compiled(spec, attend=True), 10, 80
    ragged = make_ragged(spec, [(120, before + 120)])
    expected = ragged.attend(module)
    assert_near_float64(spec, ragged, *expected)
    found = with_value(spec, ragged, position, value).attend(module)
    first = position - before
    after = first + (spec.window or 120)
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one[:first], other[:first])
        assert_same_bits(one[after:], other[after:])
    assert not np.isfinite(found[0][first:after, :, 0].astype(np.float32)).any()


@here
@pytest.mark.parametrize("name", ["NHD", "packed"])
def test_a_guess_with_an_infinite_value(compiled, name):
    """Guesses that do not see it have the bits that they have without it."""
    module, tree = compiled(ALL[name], attend=True), np.tril(np.ones((6, 6), bool))
    tree[3:, 2] = False
    ragged = make_ragged(module.spec, [(6, 90)], tree_mask=tree.reshape(-1))
    expected = ragged.attend(module)
    found = with_value(module.spec, ragged, 84 + 2, np.inf).attend(module)
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(np.delete(one, 2, axis=0), np.delete(other, 2, axis=0))
    assert np.isinf(found[0][2, :, 0].astype(np.float32)).all()


def with_value(spec, ragged, position, value):
    """The call with another first element of the values of a token, and of its keys where these are its values."""
    caches = ragged.arguments[1:3]
    block, slot = divmod(position, spec.block_size)
    block = ragged.inputs.block_table[0, block]
    if spec.shared_kv:
        caches = (caches[0].copy(), None)
        caches[0][block, slot, :, 0] = value
    else:
        caches = pa_compiler.convert_cache(*(each.copy() for each in caches), spec.kv_layout, "NHD")
        caches[1][block, slot, :, 0] = value
        caches = pa_compiler.convert_cache(*caches, "NHD", spec.kv_layout)
    names = dict(zip(("key_cache", "value_cache"), caches, strict=True))
    return dataclasses.replace(ragged, inputs=ragged.inputs.replace(**names))


@here
def test_linux_refuses_them(compiled, tmp_path):
    """A process that gets no leave is told so, by name, and not killed by the first instruction."""
    module = compiled(NHD, attend=True)
    module.save(tmp_path / "pa.so")
    (tmp_path / "refuses.c").write_text(
        "#include <errno.h>\nlong syscall(long number, long a, long b) {"
        " (void)number, (void)a, (void)b; errno = 1; return -1; }\n"
    )
    library = tmp_path / "refuses.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "refuses.c"], check=True)
    program = (
        "import sys, numpy as np, ml_dtypes, pa_compiler\n"
        "module = pa_compiler.load(sys.argv[1])\n"
        "query = np.zeros((2, 8, 64), ml_dtypes.bfloat16)\n"
        "caches = module.empty_cache(1)\n"
        "module.attend(query, *caches, np.array([[0]]), np.array([2]), np.array([0, 2]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "pa.so"],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "RuntimeError: target: expected leave to use the tile registers of AMX, and Linux refused: "
        "Operation not permitted"
    )
