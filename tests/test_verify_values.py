"""verify() with values of another size than the keys, and with values that are part of the keys; by NumPy's kernels."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pa_compiler import PagedAttentionSpec, reference
from pa_compiler.verification import draws, verify
from pa_compiler.verification.on_gpu import OnGpu

SPECS = {
    "small": PagedAttentionSpec(6, 2, 24, 5, "float32", value_dim=10),
    "large": PagedAttentionSpec(3, 3, 7, 8, "bfloat16", "float16", kv_layout="HND", value_dim=33),
    "shared": PagedAttentionSpec(8, 1, 24, 16, "bfloat16", value_dim=16, shared_kv=True),
    "shared_HND": PagedAttentionSpec(4, 2, 11, 4, "bfloat16", "float16", kv_layout="HND", value_dim=8, shared_kv=True),
    "shared_whole": PagedAttentionSpec(4, 1, 16, 8, "float16", shared_kv=True),
}
SEED, DRAWS = 3, 32


class InNumPy:
    """A module that calls the reference; first_value is where the values of a shared cache begin."""

    has_attend = has_attend_shared_prefix = has_merge_states = False
    most_query_tokens = None

    def __init__(self, spec, first_value=0):
        self.spec, self.num_threads, self.first_value = spec, 1, first_value

    def decode(self, query, keys, values, table, lens, scale=None, out=None, *, lse=None, return_lse=False):
        assert (values is None) == self.spec.shared_kv
        if values is None:
            values = keys[..., self.first_value :][..., : self.spec.result_dim]
        exact, exact_lse = reference.decode(
            query, keys, values, table, lens, scale, kv_layout=self.spec.kv_layout, return_lse=True
        )
        if out is None:
            out = np.empty(exact.shape, self.spec.result_dtype)
        out[...] = exact
        if not return_lse:
            return out
        if lse is None:
            lse = np.empty(exact_lse.shape, np.float32)
        lse[...] = exact_lse
        return out, lse

    def append_kv(self, key, value, key_cache, value_cache, slots):
        assert (value is None) == (value_cache is None) == self.spec.shared_kv
        for new, cache in ((key, key_cache), (value, value_cache)):
            if new is not None:
                by_slot = cache if self.spec.kv_layout == "NHD" else cache.swapaxes(1, 2)
                block, slot = np.divmod(slots[slots >= 0], self.spec.block_size)
                by_slot[block, slot] = new[slots >= 0]

    def checks(self, of):
        return ("host",)

    def check_status(self):
        pass


class NoGpu:
    """The memory of a GPU that is this machine's."""

    def put(self, array, pad):
        return array.copy()

    def get(self, tensor):
        return tensor

    def synchronize(self):
        pass


class WithCheck(InNumPy):
    """The same behind OnGpu, which says who checks indices."""

    def decode(self, *arguments, check, **arrays):
        names = {"key_cache": "keys", "value_cache": "values", "block_table": "table", "context_lens": "lens"}
        renamed = {names.get(name, name): value for name, value in arrays.items()}
        return super().decode(*arguments, return_lse="lse" in arrays, **renamed)

    def append_kv(self, *, check, slot_mapping, **arrays):
        super().append_kv(slots=slot_mapping, **arrays)


def failures(module):
    return [failure for number in range(DRAWS) for failure in verify.verify(module, seed=SEED, draw=number).failures]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_right_results_pass(spec):
    assert not failures(InNumPy(spec))
    assert not failures(OnGpu(WithCheck(spec), NoGpu()))


@pytest.mark.parametrize("spec", [SPECS["shared"], SPECS["shared_HND"]], ids=["NHD", "HND"])
def test_values_from_another_place_fail(spec):
    found = failures(InNumPy(spec, first_value=1))
    assert len(found) > DRAWS // 2
    assert any(re.match("out: ", failure.message) for failure in found)
    assert not any("lse: " in failure.message for failure in found)


class ForgetsAValue(InNumPy):
    def append_kv(self, key, value, key_cache, value_cache, slots):
        super().append_kv(key, value, key_cache, value_cache, slots)
        value_cache[..., -1] = 0


@pytest.mark.parametrize("name", ["small", "large"])
def test_a_value_that_is_not_written_fails(name):
    found = failures(ForgetsAValue(SPECS[name]))
    assert any("value_cache: its bits are not as expected after append_kv" in each.message for each in found)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_draws_have_the_sizes_of_the_spec(spec):
    calls = [draws.draw(spec, SEED, number) for number in range(DRAWS)]
    for call in calls:
        assert call.keys.shape[3] == spec.head_dim
        assert call.values.shape == (*call.keys.shape[:3], spec.result_dim)
        assert np.shares_memory(call.keys, call.values) == spec.shared_kv
        assert not np.isfinite(call.values[~call.is_used].astype(np.float32)).any()
        assert np.isfinite(call.values[call.is_used].astype(np.float32)).all()
        if spec.shared_kv and call.scale is not None and call.scale >= 1:  # keys are whole numbers
            assert call.values[call.is_used].all()
    unseen = any(np.isneginf(call.keys[call.is_used].astype(np.float32)).any() for call in calls)
    assert unseen == (spec.result_dim != spec.head_dim or not spec.shared_kv)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_caches_in_one_buffer_have_even_strides(spec):
    shapes = ((3, *spec.key_cache_shape[1:]), (3, *spec.value_cache_shape[1:]))
    keys, values = (np.arange(np.prod(shape)).reshape(shape).astype(spec.dtype) for shape in shapes)
    one, other = verify._in_one_buffer(keys, None if spec.shared_kv else values)
    assert np.array_equal(one, keys)
    if spec.shared_kv:
        assert other is None
        return
    assert np.array_equal(other, values)
    assert not np.shares_memory(one, other)
    assert one.base is other.base is not None
    assert one.strides[0] == other.strides[0] == one.base.strides[0]
    assert one.strides[0] % (2 * one.itemsize) == 0
    assert (other.ctypes.data - one.ctypes.data) % (2 * one.itemsize) == 0
