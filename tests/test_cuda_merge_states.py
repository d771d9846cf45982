"""merge_states of modules for a GPU, on the fake driver: parts of a context beside float64, and bad arguments."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cuda_driver import stream
from test_merge_states import assert_near, make_parts

from pa_compiler import PagedAttentionSpec

SPEC = PagedAttentionSpec(3, 1, 48, 16, "bfloat16", value_dim=80, sinks=True)
SPECS = {
    "bfloat16": SPEC,
    "float16": dataclasses.replace(SPEC, dtype="float16", out_dtype="float32"),
    "float32": dataclasses.replace(SPEC, dtype="float32"),
    "staged": SPEC,
}


@pytest.fixture
def module_of(gpu_module):
    return lambda name: gpu_module(SPECS[name], "staged" if name == "staged" else "fused", merge_states=True)


def merged(gpu, module, outs, lses, with_lse=True):
    """(out, lse) of a call on arrays with room between their rows."""
    spec, tokens = module.spec, outs.shape[1]
    wide = np.full((*outs.shape[:-1], outs.shape[-1] + 3), np.nan, outs.dtype)
    wide[..., : outs.shape[-1]] = outs
    out = gpu.tensor(np.full((tokens, spec.num_heads, spec.result_dim), 7, module_dtype(spec)))
    lse = gpu.tensor(np.full((tokens, spec.num_heads), 7, np.float32))
    given = gpu.tensor(wide[..., : outs.shape[-1]], writable=False), gpu.tensor(lses, writable=False)
    module.merge_states(*given, out, **({"lse": lse} if with_lse else {}))
    gpu.run()
    return out.array.copy(), lse.array.copy()


def module_dtype(spec):
    return make_parts(spec, 1, 1)[0].dtype


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_results_are_near_float64(gpu, module_of, name, dtype):
    """Of parts some of which are empty, with NaN in their outs; sinks are in a part's lse."""
    module = module_of(name)
    for parts, tokens, spread in ((5, 9, 3.0), (1, 3, 1.0), (2, 1, 40.0), (33, 7, 1e4)):
        outs, lses = make_parts(SPECS[name], parts, tokens, dtype=dtype, spread=spread)
        out, lse = merged(gpu, module, outs, lses)
        assert_near(SPECS[name], outs, lses, out, lse)
        alone, untouched = merged(gpu, module, outs, lses, with_lse=False)
        np.testing.assert_array_equal(alone, out)
        assert (untouched == 7).all()


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_infinite_weights_and_nan(gpu, module_of, name):
    """Parts whose lse is inf are all that counts; NaN in an lse or in an out that counts comes out."""
    outs, lses = make_parts(SPECS[name], parts=3, tokens=4)
    lses[...] = 0
    outs[...] = np.arange(3).reshape(3, 1, 1, 1)
    lses[1, 0], lses[2, 1], lses[1:, 2] = np.inf, np.nan, np.inf
    outs[0, 3, :, 5] = np.nan
    out, lse = merged(gpu, module_of(name), outs, lses)
    out = out.astype(np.float32)
    assert (out[0] == 1).all()
    assert np.isposinf(lse[[0, 2]]).all()
    assert np.isnan(out[1]).all()
    assert np.isnan(lse[1]).all()
    assert (out[2] == 1.5).all()
    assert np.isnan(out[3, :, 5]).all()
    assert np.isfinite(np.delete(out[3], 5, axis=-1)).all()


def test_a_graph_holds_it(gpu, module_of):
    module, (outs, lses) = module_of("float32"), make_parts(SPECS["float32"])
    merged(gpu, module, outs, lses)
    arrays = [gpu.tensor(array) for array in (outs, lses, np.zeros(outs.shape[1:], np.float32))]
    with stream(5):
        gpu.capture(5, True)
        module.merge_states(*arrays)
        gpu.capture(5, False)
    arrays[1].array[...] = lses[::-1]
    gpu.replay()
    expected, _ = merged(gpu, module, outs, lses[::-1].copy())
    np.testing.assert_array_equal(arrays[2].array, expected)


def test_bad_arguments(gpu, module_of, gpu_module):
    module, (outs, lses) = module_of("float32"), make_parts(SPECS["float32"])
    given, out = (gpu.tensor(outs), gpu.tensor(lses)), gpu.tensor(np.zeros(outs.shape[1:], np.float32))
    with pytest.raises(ValueError, match=r"^lses: expected shape \[5, 9, 3\], got \[4, 9, 3\]"):
        module.merge_states(given[0], gpu.tensor(lses[:4]), out)
    with pytest.raises(
        ValueError, match=r"^out: expected an array on CUDA device 0, where outs is, got one on device 1"
    ):
        module.merge_states(*given, gpu.tensor(out.array, 1))
    with pytest.raises(ValueError, match=r"^outs: expected one part at least, got none"):
        module.merge_states(gpu.tensor(outs[:0]), gpu.tensor(lses[:0]), out)
    with pytest.raises(NotImplementedError, match=r"^merge_states: expected a module compiled with merge_states=True"):
        gpu_module(SPEC).merge_states(*given, out)
    assert not out.array.any()
    module.merge_states(gpu.tensor(outs[:, :0]), gpu.tensor(lses[:, :0]), gpu.tensor(out.array[:0]))
