"""The kernels of attend, for several query tokens of a sequence, against float64."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from attend_calls import assert_close, make_call, spoil
from attend_kernels import Kernels, this_cpu
from specs import in_turn
from tolerances import assert_same_bits

from pa_compiler import PagedAttentionSpec as Spec
from pa_compiler.key_ranges import attend_range_blocks

LENS = [(1, 1), (2, 2), (7, 30), (0, 5), (33, 33), (40, 200), (3, 300)]
"""(query tokens, context) of sequences around the ends of blocks, of tiles of rows and of steps."""


@functools.cache
def kernels(spec):
    """The kernels of a spec, compiled once."""
    return Kernels(spec)


def check(spec, lens=LENS, *, seed=0, inputs=None, poison="nan", attend=None, **fields):
    call = make_call(spec, lens, seed=seed, inputs=inputs, poison=poison, **fields)
    out, lse = kernels(spec).attend(call, **attend or {})
    assert_close(spec, call, out, lse)
    return out, lse


@pytest.mark.parametrize("kv_layout", ["NHD", "HND", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_causal_attention_is_near_float64(dtype, kv_layout):
    check(Spec(8, 2, 64, 16, dtype, kv_layout=kv_layout, out_dtype="float32"))


@in_turn(("group", "kind"), [1, 3, 5, 16, 17], [("float32", "packed"), ("bfloat16", "NHD")])
def test_any_group(group, kind):
    dtype, kv_layout = kind
    check(Spec(2 * group, 2, 16, 16, dtype, kv_layout=kv_layout))


@in_turn(
    ("head_dim", "kind"),
    [8, 24, 36, 80, 128, 256],
    [("float32", "NHD"), ("bfloat16", "NHD"), ("bfloat16", "packed")],
)
def test_any_head_dim(head_dim, kind):
    dtype, kv_layout = kind
    check(Spec(4, 2, head_dim, 16, dtype, kv_layout=kv_layout), [(5, 5), (20, 150)])


@pytest.mark.parametrize("block_size", [1, 5, 48, 256])
def test_any_block_size(block_size):
    check(Spec(4, 2, 32, block_size, "bfloat16"))


@pytest.mark.parametrize("kv_layout", ["NHD", "packed"])
def test_values_of_another_size(kv_layout):
    check(Spec(4, 2, 32, 16, "bfloat16", value_dim=48, kv_layout=kv_layout))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shared_caches(dtype):
    check(Spec(4, 1, 48, 16, dtype, value_dim=32, shared_kv=True))


@pytest.mark.parametrize("kv_layout", ["NHD", "packed"])
def test_every_query_token_sees_the_whole_context_if_not_causal(kv_layout):
    check(Spec(4, 2, 32, 16, "bfloat16", kv_layout=kv_layout), causal=False)


def random_trees(lens, seed=1):
    """One tree_mask for each sequence; a token that sees nothing of them is there too."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 2, (tokens, tokens)) for tokens, _ in lens]


@pytest.mark.parametrize(
    ("dtype", "kv_layout"), [("float32", "NHD"), ("float32", "packed"), ("bfloat16", "NHD"), ("bfloat16", "packed")]
)
def test_trees(dtype, kv_layout):
    check(Spec(6, 2, 32, 16, dtype, kv_layout=kv_layout), trees=random_trees(LENS))


@in_turn(("window", "kv_layout"), [1, 20, 150], ["NHD", "packed"])
def test_windows(window, kv_layout):
    spec = Spec(4, 2, 32, 16, "bfloat16", window=window, kv_layout=kv_layout)
    check(spec)
    check(spec, causal=False)
    check(spec, trees=random_trees(LENS))


@pytest.mark.parametrize("kv_layout", ["NHD", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_soft_caps_slopes_and_sinks(dtype, kv_layout):
    check(Spec(4, 2, 32, 16, dtype, softcap=5.0, alibi=True, sinks=True, kv_layout=kv_layout))


@pytest.mark.parametrize("kv_layout", ["NHD", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_functions_of_scores_and_masks(dtype, kv_layout):
    spec = Spec(
        4, 2, 32, 16, dtype, kv_layout=kv_layout,
        score_mod=lambda score, batch, head, query, key, bias: score + bias[batch] * head - 0.01 * (query - key),
        mask_mod=lambda batch, head, query, key: ((query - key) % 3 != 1) | (head == 2) & (key < 100),
        inputs={"bias": ("float32", ("batch",))},
    )  # fmt: skip
    inputs = {"bias": np.linspace(-1, 1, len(LENS)).astype(np.float32)}
    check(spec, inputs=inputs)
    check(spec, inputs=inputs, trees=random_trees(LENS))


def test_bounds_of_masks():
    spec = Spec(4, 2, 32, 16, "bfloat16", mask_mod=lambda batch, head, query, key: (query - key < 70) & (key >= 8))
    check(spec)


@pytest.mark.parametrize(("dtype", "kv_layout"), [("float32", "NHD"), ("bfloat16", "NHD"), ("bfloat16", "packed")])
def test_what_a_token_gets_depends_on_no_chunk_and_no_split(dtype, kv_layout):
    spec = Spec(4, 2, 32, 16, dtype, kv_layout=kv_layout)
    tokens = attend_range_blocks(spec) * spec.block_size
    lens = [(70, 2 * tokens + 9), (30, tokens + 20), (20, 20), (300, tokens + 128)]
    call = make_call(spec, lens)
    whole = kernels(spec).attend(call)
    assert_close(spec, call, *whole)
    for attend in ({"chunk": 2}, {"chunk": 7}, {"heads": 1}, {"split": True, "chunk": 13}):
        for one, other in zip(whole, kernels(spec).attend(call, **attend), strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("poison", ["nan", "inf", "huge", "all_ones"])
@pytest.mark.parametrize(
    ("dtype", "kv_layout"), [("float32", "NHD"), ("float16", "HND"), ("bfloat16", "NHD"), ("bfloat16", "packed")]
)
@pytest.mark.parametrize("window", [None, 30], ids=["", "window"])
def test_nothing_enters_of_keys_that_a_row_does_not_see(poison, dtype, kv_layout, window):
    """A token's own prompt has poison in all keys and values after it."""
    spec = Spec(4, 2, 32, 16, dtype, kv_layout=kv_layout, window=window)
    lens = [(20, 150)]
    clean = make_call(spec, lens, poison="none")
    call = make_call(spec, lens, poison=poison)
    out, lse = kernels(spec).attend(clean)
    for token in (0, 1, 7, 18):
        spoiled = spoil(spec, call, poison, lens[0][1] - lens[0][0] + token)
        got, got_lse = kernels(spec).attend(spoiled)
        assert_same_bits(got[: token + 1], out[: token + 1])
        assert_same_bits(got_lse[: token + 1], lse[: token + 1])


@pytest.mark.parametrize("features", ["avx512f", "avx", ""], ids=["lanes16", "lanes8", "lanes4"])
@pytest.mark.parametrize(("dtype", "kv_layout"), [("bfloat16", "NHD"), ("float32", "packed"), ("bfloat16", "packed")])
def test_the_tiles_of_every_vector_width(features, dtype, kv_layout):
    """The tiles follow another target's features; the code generator splits their vectors for this one."""
    spec = Spec(6, 2, 48, 16, dtype, kv_layout=kv_layout)
    call = make_call(spec, LENS)
    cpu = dataclasses.replace(this_cpu(), features=frozenset(features.split()))
    assert_close(spec, call, *Kernels(spec, cpu).attend(call))
