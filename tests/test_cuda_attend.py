"""attend on CUDA, on the emulator: the emitted kernels against float64, with poison wherever a row does not look."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cuda_kernels import on_device
from inputs import POISONS, poison_value
from ragged_inputs import assert_near_float64, drawn_trees, make_ragged
from tolerances import assert_same_bits

from pa_compiler import PagedAttentionSpec
from pa_compiler.cuda.kernels.check import BAD_LENGTH, VIOLATION

SPECS = {
    "group_of_4": PagedAttentionSpec(8, 2, 64, 16, "bfloat16"),
    "one_head_in_hnd": PagedAttentionSpec(2, 2, 48, 5, "float16", kv_layout="HND", out_dtype="float32"),
    "tiles_of_25_heads": PagedAttentionSpec(25, 1, 16, 1, "bfloat16"),
    "window": PagedAttentionSpec(6, 1, 32, 8, "bfloat16", window=70, softcap=1.5, alibi=True, sinks=True),
    "float32": PagedAttentionSpec(4, 2, 64, 16, "float32"),
    "float32_window": PagedAttentionSpec(5, 1, 48, 7, "float32", window=70, softcap=1.5, alibi=True, sinks=True),
}
"""Every strategy; rows of one token and of several; tiles of rows of which the last is short; all that scores go by."""

SEQUENCES = ((1, 1), (3, 3), (0, 5), (1, 300), (4, 64), (5, 257), (0, 0), (7, 600), (2, 513), (16, 290), (3, 16))
"""Query tokens and context: around the ends of tiles and of ranges."""

every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
one_of_each_strategy = pytest.mark.parametrize("spec", [SPECS["group_of_4"], SPECS["float32"]], ids=["mma", "fma"])


def ragged(spec, sequences, **options):
    call = make_ragged(spec, sequences, **options)
    return dataclasses.replace(call, inputs=on_device(call.inputs))


def chunk(call, first, count):
    """As Ragged.chunk, with the indices that a GPU takes."""
    part = call.chunk(first, count)
    inputs = part.inputs.replace(context_lens=part.inputs.context_lens.astype(np.int32))
    return dataclasses.replace(part, inputs=inputs, query_start_loc=part.query_start_loc.astype(np.int32))


@every_spec
@pytest.mark.parametrize("causal", [True, False])
def test_attend(cuda_attend, spec, causal):
    call = ragged(spec, SEQUENCES, causal=causal)
    assert_near_float64(spec, call, *cuda_attend(spec).attend(call, workers=7))


@every_spec
def test_trees(cuda_attend, spec):
    tree = drawn_trees([count for count, _ in SEQUENCES], np.random.default_rng(3))
    call = ragged(spec, SEQUENCES, tree_mask=tree)
    assert_near_float64(spec, call, *cuda_attend(spec).attend(call, order="reverse"))


@one_of_each_strategy
@pytest.mark.parametrize("poison", POISONS)
def test_poison_in_later_query_tokens(cuda_attend, spec, poison):
    """What is in the keys and the values of a token is nothing to the query tokens before it, in no bit."""
    call = ragged(spec, [(5, 70)])
    expected = cuda_attend(spec).attend(call)
    table, size = call.inputs.block_table[0], spec.block_size
    for cache in (call.inputs.key_cache, call.inputs.value_cache):
        cache[table[67 // size], 67 % size] = poison_value(poison, cache.dtype)
    for actual, same in zip(cuda_attend(spec).attend(call), expected, strict=True):
        assert_same_bits(actual[:2], same[:2])


@one_of_each_strategy
def test_infinities_go_to_the_rows_that_see_them(cuda_attend, spec):
    call = ragged(spec, [(4, 40)])
    table, size = call.inputs.block_table[0], spec.block_size
    for token, elements in ((37, {3: np.inf, 4: -np.inf, 5: np.nan}), (38, {3: -np.inf, 6: np.inf})):
        for element, value in elements.items():
            call.inputs.value_cache[table[token // size], token % size, :, element] = value
    out, _ = cuda_attend(spec).attend(call)
    out = out.astype(np.float32)
    assert np.isfinite(out[0]).all()
    assert np.isposinf(out[1, :, 3]).all()
    assert np.isnan(out[2:, :, 3]).all()
    assert np.isneginf(out[1:, :, 4]).all()
    assert np.isnan(out[1:, :, 5]).all()
    assert np.isfinite(out[1, :, 6]).all()
    assert np.isposinf(out[2:, :, 6]).all()
    assert np.isfinite(out[:, :, 7:]).all()


def test_single_tokens_are_those_of_decode(cuda_attend, cuda_decode):
    """Where both multiply in tensor cores: the same ranges, tiles and sums."""
    spec = SPECS["group_of_4"]
    call = ragged(spec, [(1, 1), (1, 64), (1, 300), (1, 1000), (1, 257)])
    expected = cuda_decode(spec).decode(call.inputs.replace(query=call.query))
    for actual, same in zip(cuda_attend(spec).attend(call, workers=5), expected, strict=True):
        assert_same_bits(actual, same)


@one_of_each_strategy
def test_a_query_token_by_itself_and_among_others(cuda_attend, spec):
    """A token's bits go by its position: as the last of a sequence alone, and before others."""
    call = ragged(spec, [(6, 270)])
    together = cuda_attend(spec).attend(call)
    for first, count in ((0, 1), (0, 3), (3, 1), (2, 4)):
        for alone, all_of_them in zip(cuda_attend(spec).attend(chunk(call, first, count)), together, strict=True):
            assert_same_bits(alone, all_of_them[first : first + count])


@one_of_each_strategy
@pytest.mark.parametrize("workers", [1, 3, 50])
def test_a_sequence_in_any_batch(cuda_attend, spec, workers):
    """Alone and in batches, in any place, by any number of workers: the same bits."""
    sequences = [(3, 900), (1, 300), (2, 20), (5, 600)] * 3
    call = ragged(spec, sequences)
    whole = cuda_attend(spec).attend(call, workers=workers)
    for sequence in range(4):
        for order in ([sequence], [sequence] * 3, [11, sequence, 5]):
            at = sum(sequences[each][0] for each in order[: order.index(sequence)])
            count, before = sequences[sequence][0], int(call.query_start_loc[sequence])
            some = cuda_attend(spec).attend(call.take(order), workers=workers + 1)
            for one, other in zip(some, whole, strict=True):
                assert_same_bits(one[at : at + count], other[before : before + count])


@one_of_each_strategy
def test_a_status_stops_everything(cuda_attend, spec):
    for result in cuda_attend(spec).attend(ragged(spec, [(2, 300), (1, 9)]), status=VIOLATION - BAD_LENGTH):
        assert np.isnan(result.astype(np.float32)).all()
