"""TVM's paged KV cache on our functions, as vm.builtin drives it, beside a model of it in NumPy."""

from __future__ import annotations

import dataclasses
import functools

import pytest
from relax_cache import INLINE, MHA, MHA_SLIDING, NONE, NORMAL, Cache

from pa_compiler import PagedAttentionSpec
from pa_compiler.integrations.relax import kv_cache_functions

SHAPES = {
    "float32": PagedAttentionSpec(8, 2, 64, 16, "float32", kv_layout="HND"),
    "float16": PagedAttentionSpec(8, 2, 128, 16, "float16", kv_layout="HND"),
    "bfloat16": PagedAttentionSpec(6, 2, 64, 16, "bfloat16", kv_layout="HND"),
    "one_group": PagedAttentionSpec(4, 4, 64, 16, "float32", kv_layout="HND"),
    "page_5_softcap": PagedAttentionSpec(8, 2, 64, 5, "float32", kv_layout="HND", softcap=5.0),
}
MODES = {"none": NONE, "normal": NORMAL, "inline": INLINE}
GRID = [(name, mode) for name in SHAPES for mode in MODES if name in ("float32", "float16", "bfloat16")]
GRID += [("one_group", "none"), ("page_5_softcap", "none")]


@functools.cache
def functions(name, window=None):
    return kv_cache_functions(dataclasses.replace(SHAPES[name], window=window))


@pytest.fixture(params=GRID, ids="-".join)
def cache(request):
    name, mode = request.param
    return Cache(functions(name), MODES[mode])


def test_prefill_and_decode(cache):
    for name in range(5):
        cache.add(name)
    for appended in ({0: 6}, {1: 16, 2: 17}, {0: 1, 1: 40, 3: 100}, {2: 3, 4: 1}, {0: 30, 3: 2}):
        cache.step(appended)
    for _ in range(3):
        cache.step(dict.fromkeys(range(5), 1))


def test_remove_and_pop(cache):
    for name, count in enumerate((35, 88, 17, 4)):
        cache.add(name)
        cache.step({name: count})
    for name, count in ((0, 17), (1, 57), (2, 16), (3, 0)):
        cache.pop(name, count)
        cache.step({name: 3})
    cache.remove(1)
    cache.step({0: 1, 2: 1, 3: 1})
    for name in (0, 2, 3):
        cache.remove(name)
    assert cache.is_empty


def test_forks(cache):
    cache.rounds = 4
    for name, count in enumerate((60, 33)):
        cache.add(name)
        cache.step({name: count})
    cache.fork(0, 2)
    cache.step({2: 20})
    cache.fork(2, 3)
    cache.fork(2, 4, 70)
    cache.fork(1, 5, 16)
    cache.step({3: 5, 4: 30})
    cache.step({5: 40})
    for _ in range(2):
        cache.step({0: 1, 3: 1, 4: 1, 5: 1})
    cache.step({0: 3, 2: 1, 3: 20, 4: 2})
    cache.pop(4, 40)
    cache.step({4: 1, 5: 1})
    for name in range(6):
        cache.remove(name)
    assert cache.is_empty


def test_a_chain_of_forks_deeper_than_the_caches_depths(cache):
    cache.rounds = 6
    cache.add(0)
    cache.step({0: 30})
    for name in range(1, 8):
        cache.fork(name - 1, name)
        cache.step({name: 5 + name})
    cache.step({7: 1, 5: 1, 2: 1})
    cache.step({7: 4, 3: 2})


TREES = {
    0: [-1, 0, 0, 1, 1, 2, 2],
    1: [-1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6],
    2: [-1, 0, 1, 2, 3],
    3: [-1, 0, 0, -1, 3],
}


@pytest.fixture(params=[each for each in GRID if each[1] != "inline"], ids="-".join)
def tree_cache(request):
    name, mode = request.param
    cache = Cache(functions(name), MODES[mode])
    for name, count in enumerate((10, 20, 3, 40)):
        cache.add(name)
        cache.step({name: count})
    return cache


@pytest.mark.parametrize("leaves", [{0: 6, 1: 11, 2: 4, 3: 2}, {0: -1, 1: 1, 2: 2, 3: 4}], ids=["deep", "some"])
def test_trees(tree_cache, leaves):
    tree_cache.step({name: len(tree) for name, tree in TREES.items()}, TREES)
    tree_cache.commit(leaves)
    tree_cache.step(dict.fromkeys(TREES, 1))
    tree_cache.step({0: 3, 2: 1})


def test_trees_that_are_chains(tree_cache):
    chains = {name: list(range(-1, count - 1)) for name, count in enumerate((7, 15, 4, 2))}
    tree_cache.step({name: len(chain) for name, chain in chains.items()}, chains)
    tree_cache.commit({0: 2, 1: 6, 2: -1, 3: 1})
    tree_cache.step(dict.fromkeys(TREES, 1))


def test_trees_that_grow_in_the_pages(tree_cache):
    """Not committed: TVM takes the places of accepted nodes from the last step alone."""
    for level in range(4):
        new = [(node - 1) // 2 for node in range(2**level - 1, 2 ** (level + 1) - 1)]
        tree_cache.step(dict.fromkeys(TREES, len(new)), dict.fromkeys(TREES, new))


@pytest.mark.parametrize("mode", ["none", "inline"])
@pytest.mark.parametrize("shape", ["float32", "float16", "bfloat16", "page_5_softcap"])
def test_windows_of_sequences(shape, mode):
    cache = Cache(functions(shape), MODES[mode], sliding=True)
    for name, window in enumerate(((20, 6), (25, 4), (30, 0), (35, 3), None)):
        cache.add(name, window)
    for appended in ({0: 4}, {1: 6, 2: 7}, {0: 20, 1: 19, 2: 30, 3: 35, 4: 40}, {0: 6, 1: 5, 2: 4, 3: 3, 4: 2}):
        cache.step(appended)
    for _ in range(6):
        cache.step(dict.fromkeys(range(5), 1))


@pytest.mark.parametrize("shape", ["float32", "float16"])
@pytest.mark.parametrize("mode", ["none", "normal"])
def test_windows_of_layers(shape, mode):
    cache = Cache(functions(shape, 20), MODES[mode], kinds=[MHA_SLIDING, MHA])
    for name in range(2):
        cache.add(name)
    shared = mode == "none"  # TVM rotates nothing there
    for appended in ({0: 3}, {0: 2, 1: 20}, {0: 1, 1: 1}, {0: 15, 1: 9}, {0: 7, 1: 20}):
        cache.step(appended, shared=shared)
    for _ in range(3):
        cache.step({0: 1, 1: 1}, shared=shared)
