"""How functions for TVM's cache are made: from which specs, of which modules, and for programs of Relax."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tvm
import tvm_ffi
from relax_cache import tensor
from test_readme import ROOT, blocks, section
from test_relax_functions import SCALE, SPEC, attended, functions
from tvm import relax
from tvm.relax.frontend.nn.llm.position_embedding import llama_rope_with_position_map

import pa_compiler
from pa_compiler.integrations import versions
from pa_compiler.integrations.relax import kv_cache_functions


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kv_layout", "NHD", "kv_layout: expected 'HND'"),
        ("value_dim", 32, "value_dim: expected 64"),
        ("out_dtype", "float16", "out_dtype: expected 'float32'"),
        ("alibi", True, "alibi: expected False"),
        ("sinks", True, "sinks: expected False"),
        ("mask_mod", lambda batch, head, query_pos, key_pos: key_pos > 3, "mask_mod: expected None"),
    ],
)
def test_specs_that_the_cache_has_no_place_for_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        kv_cache_functions(dataclasses.replace(SPEC, **{field: value}))


def test_another_tvm_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(versions, "TVM", frozenset({(0, 26)}))
    with pytest.raises(RuntimeError, match=r"tvm: expected version 0\.26, .*got 0\.27"):
        kv_cache_functions(SPEC)


def test_modules_are_taken(capfd):
    made = functions()
    capfd.readouterr()
    assert [module.spec.block_size for module in made.modules] == [16, 16, 1]
    again = kv_cache_functions(SPEC, *made.modules)
    assert again.modules == made.modules
    assert "compiling" not in capfd.readouterr().err
    assert kv_cache_functions(SPEC, *made.modules, sliding_window=False).attention_decode_sliding_window is None
    without = pa_compiler.compile(made.modules[0].spec)
    with pytest.raises(ValueError, match="modules_to_use: expected attend and merge_states"):
        kv_cache_functions(SPEC, without)


@pytest.mark.parametrize("sliding_window", [True, False])
def test_a_program_of_relax_makes_the_cache_and_attends(sliding_window):
    made = kv_cache_functions(SPEC, *functions().modules, sliding_window=sliding_window)
    shapes = [relax.ShapeExpr(each) for each in ([4, 256, 64, 16, 0], [0, 1], [0])]
    numbers = [relax.prim_value(each) for each in (8, 2, 64, 64, False, 0, 1.0, 1e4, 0)]
    builder = relax.BlockBuilder()
    with builder.function("create", []):
        call = relax.call_pure_packed(
            "vm.builtin.paged_attention_kv_cache_create",
            *(*shapes[:2], *numbers[:4], shapes[2], *numbers[4:], relax.op.zeros((), "float32")),
            *made.expressions("test_relax"),
            ty_args=relax.AnyType(),
        )
        builder.emit_func_output(builder.emit(call))
    machine = relax.VirtualMachine(tvm.compile(builder.get(), target="llvm"), tvm.cpu())
    cache, rng = machine["create"](), np.random.default_rng(3)
    tvm_ffi.get_global_func("vm.builtin.kv_state_add_sequence")(cache, 0)
    tvm_ffi.get_global_func("vm.builtin.kv_state_begin_forward")(cache, tvm_ffi.Shape([0]), tvm_ffi.Shape([5]), None)
    qkv, out = rng.standard_normal((5, 12, 64)).astype(np.float32), tvm.runtime.empty((5, 8, 64), "float32")
    attention = tvm_ffi.get_global_func("vm.builtin.attention_kv_cache_attention_with_fused_qkv")
    attention(cache, 0, SCALE, tvm.runtime.tensor(qkv), out)
    expected = attended(qkv[4, :8], qkv[:, 8:10], qkv[:, 10:])[0]
    assert np.abs(out.numpy()[4] - expected).max() < 1e-5


def test_the_page_of_engines_runs():
    (code,) = blocks(section((ROOT / "docs" / "engines.md").read_text(), "## TVM Relax"), "python")
    exec(compile(code, "engines.md", "exec"), {})


def split(function, qkv, positions, rotate):
    """q, k and v that a split_rotary writes."""
    shapes = [(len(qkv), heads, 64) for heads in (8, 2, 2)]
    found = [tvm.runtime.empty(shape, str(qkv.dtype)) for shape in shapes]
    function(tensor(qkv), tensor(positions), *found, rotate)
    return [each.numpy() for each in found]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("rotate", [0, 1])
def test_split_rotary_is_as_tvms(dtype, rotate):
    body = llama_rope_with_position_map(1e4, 1.0, 64, 8, 2, dtype, {})
    theirs = tvm.compile(tvm.IRModule({"main": body}), target="llvm").mod["main"]
    ours = functions().split_rotary if dtype == "float32" else functions_of(dtype).split_rotary
    qkv = np.random.default_rng(4).standard_normal((7, 12, 64)).astype(dtype)
    positions = np.array([0, 5, 5, 1000, 2, 4000, 1], np.int32)
    step = float(np.finfo(dtype).eps)
    for found, expected in zip(split(ours, qkv, positions, rotate), split(theirs, qkv, positions, rotate), strict=True):
        # TVM's angles are float32: off by up to 2e-4 at position 4000
        assert np.allclose(found, expected, rtol=4 * step, atol=4 * step + 2e-3 * rotate)


def functions_of(dtype, **rope):
    spec = dataclasses.replace(SPEC, dtype=dtype, out_dtype=None)
    return kv_cache_functions(spec, sliding_window=False, **rope)


def test_scaled_frequencies_are_tvms_and_not_inline():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    made = kv_cache_functions(SPEC, *functions().modules, sliding_window=False, rope_scaling=scaling)
    qkv, positions = (
        np.random.default_rng(4).standard_normal((2, 12, 64)).astype(np.float32),
        np.array([3, 90], np.int32),
    )
    scaled = split(made.split_rotary, qkv, positions, 1)
    plain = split(functions().split_rotary, qkv, positions, 1)
    assert np.abs(scaled[0] - plain[0]).max() > 0.1
    assert np.array_equal(scaled[2], plain[2])
    query, out, lse = tensor(scaled[0]), tensor(scaled[0]), tvm.runtime.empty((2, 8), "float32")
    starts, offsets = (tensor(np.array(each, np.int32)) for each in ([0, 2], [0]))
    arrays = (query, starts, tensor(scaled[1]), tensor(scaled[2]), starts, tensor(positions), offsets, out, lse)
    with pytest.raises(ValueError, match=r"rope_scaling: expected none for RopeMode\.INLINE, got 'llama3'"):
        made.attention_prefill_ragged(*arrays, 1, 1, 1.0, 1e4, SCALE)
