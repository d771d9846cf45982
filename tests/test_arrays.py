"""Kinds of arrays: NumPy, torch, and whatever else has DLPack."""

from __future__ import annotations

import numpy as np
import pytest
from dlpack import Exported
from inputs import DTYPES, make_inputs
from specs import DTYPE_SPECS, OUT_DTYPE_SPECS
from tolerances import assert_same_bits

from pa_compiler import PagedAttentionSpec

LENGTHS = [0, 1, 8, 37, 9]

every_dtype = pytest.mark.parametrize(
    "spec",
    [*DTYPE_SPECS.values(), *OUT_DTYPE_SPECS.values()],
    ids=lambda spec: f"{spec.dtype}-{spec.result_dtype}",
)


@pytest.fixture
def case(compiled, spec):
    """A module, inputs, and what they give as NumPy arrays."""
    module, inputs = compiled(spec), make_inputs(spec, LENGTHS)
    return module, inputs, module.decode(*inputs.arguments, return_lse=True)


def as_torch(array):
    torch = pytest.importorskip("torch", reason="torch is not installed: its tensors are not tested")
    if array.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_numpy(tensor):
    """A NumPy view of any result, bfloat16 included."""
    if isinstance(tensor, np.ndarray):
        return tensor
    torch = pytest.importorskip("torch", reason="torch is not installed: its tensors are not tested")
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(DTYPES["bfloat16"])
    return tensor.numpy()


@every_dtype
def test_numpy(case):
    _, inputs, (out, lse) = case
    assert isinstance(out, np.ndarray)
    assert isinstance(lse, np.ndarray)
    assert (out.dtype, lse.dtype) == (inputs.out_dtype, np.float32)
    assert (out.shape, lse.shape) == (inputs.query.shape, inputs.query.shape[:2])


@every_dtype
def test_read_only_numpy(case):
    module, inputs, (expected, _) = case
    for array in inputs.arguments:
        array.flags.writeable = False
    assert_same_bits(module.decode(*inputs.arguments), expected)
    assert not any(array.flags.writeable for array in inputs.arguments)


@every_dtype
def test_broadcast_numpy(case):
    """One query for all sequences: stride 0, and read-only by NumPy's rule."""
    module, inputs, _ = case
    query = np.broadcast_to(inputs.query[:1], inputs.query.shape)
    expected = module.decode(query.copy(), *inputs.arguments[1:])
    assert_same_bits(module.decode(query, *inputs.arguments[1:]), expected)


@every_dtype
def test_torch(case):
    module, inputs, (expected, expected_lse) = case
    tensors = [as_torch(array) for array in inputs.arguments]
    out, lse = module.decode(*tensors, return_lse=True)
    assert type(out) is type(lse) is type(tensors[0])
    assert out.device.type == "cpu"
    assert_same_bits(as_numpy(out), expected)
    assert_same_bits(as_numpy(lse), expected_lse)


@every_dtype
def test_torch_out(case):
    module, inputs, (expected, expected_lse) = case
    tensors = [as_torch(array) for array in inputs.arguments]
    out, lse = as_torch(inputs.out), as_torch(inputs.lse)
    returned = module.decode(*tensors, out=out, lse=lse)
    assert returned[0] is out
    assert returned[1] is lse
    assert_same_bits(as_numpy(out), expected)
    assert_same_bits(as_numpy(lse), expected_lse)


@every_dtype
def test_torch_views(case):
    """Key and value interleaved in one tensor, as vLLM keeps them."""
    module, inputs, (expected, _) = case
    both = as_torch(np.stack([inputs.key_cache, inputs.value_cache], axis=1))
    query, _, _, block_table, context_lens = (as_torch(array) for array in inputs.arguments)
    key_cache, value_cache = both.unbind(1)
    out = module.decode(query, key_cache, value_cache, block_table, context_lens)
    assert_same_bits(as_numpy(out), expected)


@every_dtype
def test_kinds_may_be_mixed(case):
    """The result is of the query's kind."""
    module, inputs, (expected, _) = case
    query, key_cache, value_cache, block_table, context_lens = inputs.arguments
    caches_in_torch = module.decode(query, as_torch(key_cache), as_torch(value_cache), block_table, context_lens)
    assert isinstance(caches_in_torch, np.ndarray)
    assert_same_bits(caches_in_torch, expected)
    query_in_torch = module.decode(as_torch(query), key_cache, value_cache, block_table, context_lens)
    assert type(query_in_torch).__module__ == "torch"
    assert_same_bits(as_numpy(query_in_torch), expected)


@every_dtype
@pytest.mark.parametrize("export", [{}, {"with_strides": False}, {"byte_offset": 48}], ids=str)
def test_dlpack(case, export):
    """Into arrays given by DLPack; strides may be missing, which means contiguous, and data may start at an offset."""
    module, inputs, (expected, expected_lse) = case
    exported = [Exported(array, **export) for array in inputs.arguments]
    out, lse = Exported(inputs.out, **export), Exported(inputs.lse, **export)
    returned = module.decode(*exported, out=out, lse=lse)
    assert returned[0] is out
    assert returned[1] is lse
    assert_same_bits(out.array, expected)
    assert_same_bits(lse.array, expected_lse)


@every_dtype
def test_dlpack_result(case):
    """Where the query's library is unknown, the result is something with DLPack."""
    module, inputs, (expected, expected_lse) = case
    out, lse = module.decode(*map(Exported, inputs.arguments), return_lse=True)
    assert_same_bits(np.from_dlpack(lse), expected_lse)
    assert out.__dlpack_device__()[0] == 1
    assert tuple(out.shape) == expected.shape
    assert str(out.dtype) == module.spec.result_dtype
    if expected.dtype != DTYPES["bfloat16"]:
        assert_same_bits(np.from_dlpack(out), expected)


def test_bfloat16_as_torch_and_as_numpy_agree(compiled):
    spec = DTYPE_SPECS["bfloat16"]
    inputs, module = make_inputs(spec, LENGTHS), compiled(spec)
    out = as_torch(inputs.out)
    module.decode(*inputs.arguments, out=out)
    assert_same_bits(as_numpy(out), module.decode(*inputs.arguments))


@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_codes_in_torch(compiled, kv_dtype):
    """Caches that torch's own 8-bit types are of: append_kv and decode do with them what they do with NumPy's."""
    torch = pytest.importorskip("torch", reason="torch is not installed: its tensors are not tested")
    module = compiled(PagedAttentionSpec(8, 2, 64, 16, "float32", kv_dtype=kv_dtype))
    rng = np.random.default_rng(0)
    key, value, query = (rng.standard_normal((40, heads, 64), np.float32) for heads in (2, 2, 8))
    outs = []
    for like, made in (("numpy", np.asarray), ("torch", torch.from_numpy)):
        caches = module.empty_cache(3, like=like)
        if like == "torch":
            assert {cache.dtype for cache in caches} == {getattr(torch, kv_dtype)}
        scales = dict(zip(("key_scale", "value_scale"), map(made, module.empty_scales(3)), strict=True))
        module.append_kv(made(key), made(value), *caches, made(np.arange(40)), **scales)
        lens, table = made(np.array([40])), made(np.array([[0, 1, 2]]))
        outs.append(np.asarray(module.decode(made(query[:1]), *caches, table, lens, **scales)))
    assert_same_bits(*outs)
