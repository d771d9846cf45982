"""Calls of a bundle's C interface have the bits and the words of the Python module's."""

from __future__ import annotations

import numpy as np
import pytest
from bundles import MODULE_TARGETS, SPECS, kernels, target_names
from inputs import make_inputs
from ragged_inputs import drawn_trees, make_ragged
from specs import lengths_around_the_splits
from tolerances import assert_same_bits

MIX = [(1, 1), (0, 9), (2, 2), (7, 100), (1, 300), (16, 129), (33, 128), (1, 7), (17, 255), (3, 3)]

every_spec = pytest.mark.parametrize("name", SPECS)
every_target = pytest.mark.parametrize("place", [0, 1], ids=["x86-64-v3", "this_cpu"])


@pytest.fixture
def both(bundle, compiled, monkeypatch):
    """both(name, place) -> the module and the bundle's kernels of a spec on a target."""

    def both(name, place, **options):
        module = compiled(SPECS[name], target=MODULE_TARGETS[place], attend=True)
        return module, kernels(bundle, target_names(bundle)[place], name, monkeypatch, **options)

    return both


def given(spec, batch):
    """What the spec's function reads."""
    rng = np.random.default_rng(3)
    return {"inputs": {"tilt": rng.random((6, batch), np.float32)}} if spec.inputs else {}


def same_decode(module, kernels, inputs, **more):
    more |= inputs.heads | given(module.spec, len(inputs.query))
    results = []
    for each in (module, kernels):
        out, lse = inputs.out, inputs.lse
        each.decode(*inputs.arguments, out=out, lse=lse, **more)
        results.append((out, lse))
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


def same_attend(module, kernels, sequences, **options):
    ragged = make_ragged(module.spec, sequences, **options)
    more = given(module.spec, len(sequences))
    for one, other in zip(*(ragged.attend(each, **more) for each in (module, kernels)), strict=True):
        assert_same_bits(one, other)


@every_spec
@every_target
def test_decode_has_the_bits_of_the_module(both, name, place):
    module, kernels = both(name, place)
    spec, size = module.spec, module.spec.block_size
    lengths = [0, 1, size - 1, size, size + 1, 2 * size, 3 * size + 1, 0, 130, 17 * size - 1]
    for seed, poison in enumerate(("nan", "inf", "all_ones")):
        same_decode(module, kernels, make_inputs(spec, lengths * 2, seed=seed, poison=poison))
    same_decode(module, kernels, make_inputs(spec, lengths_around_the_splits(spec)), scale=0.25)
    same_decode(module, kernels, make_inputs(spec, [0]))
    same_decode(module, kernels, make_inputs(spec, []))


@every_spec
@every_target
def test_attend_has_the_bits_of_the_module(both, name, place):
    module, kernels = both(name, place)
    for causal in (True, False):
        same_attend(module, kernels, MIX, causal=causal, index=np.int64)
    same_attend(module, kernels, [(70, 513), (5, 9000)])
    trees = drawn_trees([8, 1, 9], np.random.default_rng(0))
    same_attend(module, kernels, [(8, 8), (1, 40), (9, 100)], tree_mask=trees)


@every_spec
@every_target
def test_append_kv_has_the_bits_of_the_module(both, name, place):
    module, kernels = both(name, place)
    spec, rng = module.spec, np.random.default_rng(0)
    inputs = make_inputs(spec, [3 * spec.block_size], spare_blocks=0, surplus=0, poison="none")
    count = 2 * spec.block_size
    new = rng.random((2, count, spec.num_kv_heads, spec.head_dim), np.float32).astype(inputs.query.dtype)
    slots = rng.permutation(3 * spec.block_size)[:count]
    slots[1] = -1
    results = []
    for each in (module, kernels):
        caches = [np.copy(inputs.key_cache), np.copy(inputs.value_cache)]
        scales = {key: np.copy(inputs.heads[key]) for key in ("key_scale", "value_scale") if key in inputs.heads}
        each.append_kv(*new, *caches, slots, **scales)
        results.append([*caches, *scales.values()])
    for one, other in zip(*results, strict=True):
        assert one.tobytes() == other.tobytes()


@every_spec
def test_plans_are_those_of_the_module(both, name):
    module, kernels = both(name, 1)
    lengths = np.array([0, 1, 5000, 33, 40000, 300, 2], np.int32)
    assert kernels.plan(lengths) == [tuple(item) for item in module.plan(lengths)]
    starts = np.array([0, 0, 1, 4000, 4001, 4050, 4051, 4053])
    assert kernels.plan(lengths, starts, 2) == [tuple(item) for item in module.plan(lengths, starts)]


def test_views_pairs_of_tables_and_other_shapes(both):
    module, kernels = both("float32", 1)
    inputs = make_inputs(module.spec, [7, 0, 23, 130])
    wide = np.repeat(inputs.query, 2, axis=1)[:, ::2]
    same_decode(module, kernels, inputs.replace(query=wide))
    used = [-(-length // module.spec.block_size) for length in inputs.context_lens]
    indices = np.concatenate([row[:count] for row, count in zip(inputs.block_table, used, strict=True)])
    pair = (np.cumsum([0, *used]), indices.astype(np.int32))
    same_decode(module, kernels, inputs.replace(block_table=pair))
    flat = np.full((4, 6 * 24), np.nan, np.float32)
    kernels.decode(*inputs.arguments, out=flat)
    assert_same_bits(flat.reshape(4, 6, 24), module.decode(*inputs.arguments))


@pytest.mark.parametrize("threading", [0, 1])
@pytest.mark.parametrize("num_threads", [1, 2, 8])
def test_bits_do_not_depend_on_the_threads(both, threading, num_threads):
    module, kernels = both("float32", 1, threading=threading, num_threads=num_threads)
    same_decode(module, kernels, make_inputs(module.spec, [3000, 1, 12000, 500]))
