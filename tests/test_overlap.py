"""What is written may lie in one buffer with what is read, wherever no byte is of both: rows beside rows."""

from __future__ import annotations

import numpy as np
import pytest
from inputs import DTYPES, make_inputs
from refusals import SPEC, decode_call
from specs import DTYPE_SPECS, every_pipeline
from tolerances import assert_same_bits

from pa_compiler import PagedAttentionSpec


@every_pipeline
@pytest.mark.parametrize("name", DTYPE_SPECS)
@pytest.mark.parametrize("side_by_side", [False, True])
def test_out_in_one_buffer_with_query_key_and_value(compiled, name, pipeline, side_by_side):
    """As a layer of a model has them: out takes the place of the values in [batch, query | key | value]."""
    spec = DTYPE_SPECS[name]
    inputs, module = make_inputs(spec, [9, 0, 20, 7]), compiled(spec, pipeline)
    expected = module.decode(*inputs.arguments)
    width = spec.num_heads * spec.head_dim
    buffer = np.zeros((4, 4 * width + 8), DTYPES[spec.dtype])
    query, behind = buffer[:, :width], buffer[:, 2 * width + 2 :]
    out = behind[:, : width * inputs.out_dtype.itemsize // buffer.itemsize].view(inputs.out_dtype)
    query[...] = inputs.query.reshape(4, width)
    query = query.reshape(inputs.query.shape)
    given = out if side_by_side else out.reshape(inputs.query.shape)
    assert np.shares_memory(query, buffer)
    assert np.shares_memory(given, buffer)
    returned = module.decode(query, *inputs.arguments[1:], out=given)
    assert returned is given
    assert_same_bits(out.reshape(expected.shape), expected)
    assert_same_bits(query, inputs.query)


@every_pipeline
def test_nearly_all_arrays_in_one_buffer(compiled, pipeline):
    """Each row of it holds a block of keys, one of values, and a sequence's block ids, out and lse."""
    spec = PagedAttentionSpec(6, 2, 24, 8, "float32")
    inputs, module = make_inputs(spec, [9, 0, 20, 7]), compiled(spec, pipeline)
    expected, expected_lse = module.decode(*inputs.arguments, return_lse=True)
    arrays = {"key_cache": inputs.key_cache, "value_cache": inputs.value_cache, "block_table": inputs.block_table}
    arrays |= {"out": inputs.out, "lse": inputs.lse}
    widths = {name: array[0].size for name, array in arrays.items()}
    rows, begin, views = np.zeros((len(inputs.key_cache), sum(widths.values())), np.float32), 0, {}
    for name, array in arrays.items():
        view = rows[: len(array), begin : begin + widths[name]].view(array.dtype).reshape(array.shape)
        assert np.shares_memory(view, rows)
        view[...] = array
        views[name], begin = view, begin + widths[name]
    module.decode(inputs.query, context_lens=inputs.context_lens, **views)
    assert_same_bits(views["out"], expected)
    assert_same_bits(views["lse"], expected_lse)
    for name in ("key_cache", "value_cache", "block_table"):
        assert_same_bits(views[name], arrays[name])


def random_view(rng, buffer, shape, itemsize):
    """A view of bytes with any strides, each at least what the axes inside of it take, and any beginning."""
    order = rng.permutation(len(shape) - 1)
    strides, reach = [0] * (len(shape) - 1) + [itemsize], shape[-1] * itemsize
    for axis in order:
        strides[axis] = reach + int(rng.choice([0, 0, 1, rng.integers(0, 40), 2 * reach // itemsize])) * itemsize
        reach += strides[axis] * (shape[axis] - 1)
    for axis in order:
        if rng.random() < 0.2:
            strides[axis] *= -1
    low = sum(min(0, stride * (extent - 1)) for stride, extent in zip(strides, shape, strict=True))
    start = int(rng.integers(0, max(1, len(buffer) - reach) // itemsize)) * itemsize - low
    return np.ndarray(shape, f"f{itemsize}", buffer, start, strides)


def test_refused_where_a_byte_is_of_both_and_nowhere_else(compiled, count):
    """Random views of one buffer, against NumPy's answer, which is exact."""
    module, rng = compiled(SPEC), np.random.default_rng(0)
    seen = {True: 0, False: 0}
    for _ in range(count(400, 4000)):
        call = decode_call()
        buffer = np.zeros(16384, np.uint8)
        out = random_view(rng, buffer, (4, 6, 24), 4)
        query = random_view(rng, buffer, (4, 6, 24), 2)
        expected = np.shares_memory(out, query)
        seen[expected] += 1
        arguments = vars(call) | {"query": query, "out": out}
        if expected:
            with pytest.raises(ValueError, match=r"^out: expected memory apart from query's bytes"):
                module.decode(**arguments)
        else:
            query[...] = call.query
            module.decode(**arguments)
            assert_same_bits(query, call.query)
    assert min(seen.values()) > 40


def test_too_hard_a_question_is_answered_with_a_refusal(compiled):
    """No byte is of both, but it takes many steps to see: every other block of a buffer, and every fourth between."""
    module, call = compiled(SPEC), vars(decode_call())
    batch, block = 2000, 8 * 2 * 24
    buffer = np.zeros((4 * batch, block), np.float16)
    key_cache = buffer[::2].reshape(-1, 8, 2, 24)
    out = buffer[1::4].view(np.float32)[:, : 6 * 24]
    assert not np.shares_memory(key_cache, out)
    tables = {"block_table": np.zeros((batch, 1), np.int32), "context_lens": np.zeros(batch, np.int32)}
    call |= tables | {"query": np.zeros((batch, 6, 24), np.float16), "lse": None}
    call |= {"key_cache": key_cache, "value_cache": key_cache}
    with pytest.raises(ValueError, match=r"^out: expected memory apart from key_cache's bytes"):
        module.decode(**call | {"out": out})
    few = {name: call[name][:100] for name in ("query", "block_table", "context_lens")}
    assert not module.decode(**call | few | {"out": out[:100]}).any()
