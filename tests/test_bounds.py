"""Every buffer ends, and begins, at a page that may not be touched: a read or write beyond it ends the process."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from drawn_specs import drawn_spec
from fences import PROT_READ, PROT_WRITE, SIDES, fenced, run_in_child
from inputs import make_inputs
from specs import SPECS as SHARED
from specs import parametrize
from tolerances import assert_same_bits

from pa_compiler import PagedAttentionSpec

ELEMENTS = 1 << 18
"""Of the keys of a call, at most, and in most calls fewer: for as many calls as there is time for."""

SPECS = {
    **SHARED,
    "blocks_of_1": PagedAttentionSpec(4, 2, 16, 1, "float32"),
    "odd_head_dim": PagedAttentionSpec(6, 2, 33, 16, "bfloat16", "float16"),
    "packed_float32": PagedAttentionSpec(17, 1, 7, 16, "float32", kv_layout="packed"),
}
SWEEPS = {
    "NHD": PagedAttentionSpec(5, 5, 20, 5, "bfloat16"),  # a token through all heads
    "HND": PagedAttentionSpec(3, 3, 9, 8, "float32", kv_layout="HND"),  # a head through all tokens
}


def call_inputs(spec, seed):
    """Inputs of up to 20 sequences, most of them of 0 to 3 blocks. No block is spare: any may be the last."""
    rng = np.random.default_rng(seed)
    size, tokens = spec.block_size, max(ELEMENTS // (spec.num_kv_heads * spec.head_dim), 1)
    lengths = rng.integers(0, 3 * size + 1, rng.choice([1, 1, 2, 5, 20]))
    if rng.random() < 0.3:
        lengths[0] = tokens ** rng.random()
    lengths[np.cumsum(lengths) > tokens] = 1
    return make_inputs(spec, lengths, seed=seed, spare_blocks=0, surplus=0)


def not_to_be_read(inputs, spec):
    """How many elements at the end of each input no sequence has a use for."""
    needed = -(-inputs.context_lens // spec.block_size)
    is_used = np.arange(inputs.block_table.shape[1]) < needed[:, None]
    unread_keys = unread_values = 0
    for sequence, index in np.argwhere((inputs.block_table == len(inputs.key_cache) - 1) & is_used):
        slots = max(0, int((index + 1) * spec.block_size - inputs.context_lens[sequence]))  # of the cache's last block
        heads = spec.num_kv_heads if spec.kv_layout == "NHD" else 1
        unread_keys = 0 if spec.kv_layout == "packed" else slots * heads * spec.head_dim  # packed: in whole vectors
        pair = spec.packed_pair if spec.kv_layout == "packed" else 1
        unread_values = slots // pair * pair * heads * spec.head_dim
    return 0, unread_keys, unread_values, int((~is_used[-1]).sum()), 0


def check_call(module, side, seed):
    """One call, on inputs in pages that may only be read, against the same call on ordinary memory.

    At the end even what lies in the cache's last block past a length, and surplus entries of the block table, may not
    be touched.
    """
    inputs = call_inputs(module.spec, seed)
    module.num_threads = 1 + seed % 3
    expected, expected_lse = module.decode(*inputs.arguments, return_lse=True)
    unread = not_to_be_read(inputs, module.spec) if side == "end" else (0,) * 5
    guarded = [fenced(array, side, PROT_READ, n) for array, n in zip(inputs.arguments, unread, strict=True)]
    out, lse = fenced(inputs.out, side), fenced(inputs.lse, side)
    module.decode(*guarded, out=out, lse=lse)
    assert_same_bits(out, expected)
    assert_same_bits(lse, expected_lse)


def check_calls(module, side, calls):
    what = f"{module}, side {side}, seed"
    return run_in_child((f"{what} {seed}", functools.partial(check_call, module, side, seed)) for seed in range(calls))


@pytest.mark.scorecard(11)
@pytest.mark.parametrize("side", SIDES)
@parametrize(SPECS)
def test_stays_inside_every_buffer(compiled, spec, pipeline, side, count, figure):
    figure(f"calls of decode at the {side}", check_calls(compiled(spec, pipeline), side, count(8, 80)))


@pytest.mark.scorecard(11)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("order", SWEEPS)
def test_sweeps_stay_inside_every_buffer(compiled, order, side, count, figure):
    module = compiled(SWEEPS[order])
    figure(f"calls of decode at the {side}", check_calls(module, side, count(8, 80)))


@pytest.mark.scorecard(11)
@pytest.mark.parametrize("side", SIDES)
def test_drawn_specs_stay_inside_every_buffer(compiled, side, count, figure):
    for number in range(count(2, 48)):
        figure(
            f"calls of decode at the {side}",
            check_calls(compiled(*drawn_spec(number, scores=False)), side, count(8, 20)),
        )


@pytest.mark.parametrize(
    ("touch", "side"), [*itertools.product(("read", "write", "write_read_only"), SIDES), ("unread", "end")]
)
def test_a_fence_is_one(touch, side):
    """What the tests above rely on: an element too far, or a write to what may only be read, ends the process."""
    protection = PROT_READ if touch == "write_read_only" else PROT_READ | PROT_WRITE
    array = fenced(np.zeros(100, np.int32), side, protection, unread=1 if touch == "unread" else 0)
    last, beyond = (99, 4) if side == "end" else (0, -4)
    two = np.lib.stride_tricks.as_strided(array[last:], (2,), (beyond,))
    touches = {
        "read": lambda: two.sum(),
        "write": lambda: two.__setitem__(1, 0),
        "write_read_only": lambda: two.__setitem__(0, 0),
        "unread": lambda: array[-1:].sum(),
    }
    with pytest.raises(AssertionError, match="the touch: ended by SIGSEGV after 1 cases"):
        run_in_child([("nothing", lambda: None), ("the touch", touches[touch])])


def test_a_wrong_result_in_a_child_fails():
    with pytest.raises(AssertionError, match=r"^after 0 cases: wrong: Traceback[^$]*1 of 3 elements differ"):
        run_in_child([("wrong", lambda: assert_same_bits(np.array([1, 2, 3]), np.array([1, 2, 4])))])
