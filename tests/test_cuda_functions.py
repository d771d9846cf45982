"""score_mod and mask_mod in the CUDA kernels on the emulator, against the reference, which calls the functions."""

from __future__ import annotations

import dataclasses
import operator

import numpy as np
import pytest
import test_score_functions as functions
from cuda_kernels import build_others, build_staged, on_device, shared
from inputs import make_inputs
from test_cuda_scores import BASES, LENGTHS, assert_same

from pa_compiler.bounds import affine, bounds
from pa_compiler.cuda.kernels.check import BAD_BLOCK, VIOLATION
from pa_compiler.cuda.strategies import choose_strategy
from pa_compiler.score import Constant, Function, Term


def sinks_and_window(batch, head, query_pos, key_pos):
    """The first 4 keys and the last 100: between them blocks are not looked up."""
    return (key_pos < 4) | (query_pos - key_pos < 100)


def no_key(batch, head, query_pos, key_pos):
    return key_pos < 0


def of_document_and_head(batch, head, query_pos, key_pos, *, document):
    return (document[key_pos % 64] != 3) & ((key_pos + head) % 3 != 0)


SCORE_MODS = {
    "relative": functions.relative,
    "decay": functions.decay,
    "capped": functions.capped,
    "by_sequence": functions.by_sequence,
}
MASKS = {
    "dilated": functions.dilated,
    "checkered": functions.checkered,
    "documents": functions.documents,
    "nothing": functions.nothing,
    "no_key": no_key,
    "sinks_and_window": sinks_and_window,
    "of_document_and_head": of_document_and_head,
}
FIELDS = {"window": 130, "softcap": 1.5, "alibi": True, "sinks": True}

IN_PYTHON = affine.Operations(operator.floordiv, min, max)

one_of_each_strategy = pytest.mark.parametrize("base", ["mma", "fma"])


def spec_of(base, **fields):
    given = [function for function in fields.values() if callable(function)]
    names = {name for function in given for name in functions._keywords(function)}
    inputs = {name: declared for name, declared in functions.INPUTS.items() if name in names}
    return dataclasses.replace(BASES[base], **fields, inputs=inputs)


def used_blocks(spec, length, count):
    """Which blocks of a sequence have keys within the bounds of what is seen."""
    used = np.zeros(count, bool)
    for interval in bounds(spec).intervals:
        begin, end = (affine.value(each, length, IN_PYTHON) for each in interval)
        if max(begin, 0) < min(end, length):
            used[max(begin, 0) // spec.block_size : -(-min(end, length) // spec.block_size)] = True
    return used


def taking(inputs, given):
    """Inputs with these arrays for the functions, in place of those that make_inputs draws."""
    return inputs.replace(heads={name: array for name, array in inputs.heads.items() if name != "inputs"}, given=given)


def inputs_of(spec, lengths, **more):
    """Inputs with NaN in all that no head sees, and ids that fault for blocks of which none sees any token."""
    inputs, given = make_inputs(spec, lengths, **more), functions.arrays(spec, len(lengths))
    if spec.mask_mod is not None:
        shown = functions.shown(spec, spec.mask_mod.source, inputs.context_lens, given)
        for sequence, length in enumerate(lengths):
            blocks = inputs.block_table[sequence]
            by_kv_head = shown[sequence].reshape(spec.num_kv_heads, spec.group, -1).any(axis=1)
            for head, position in np.argwhere(~by_kv_head):
                block, slot = blocks[position // spec.block_size], position % spec.block_size
                if 0 <= block < len(inputs.key_cache):  # and not what nobody is to use, before a window
                    for cache in filter(lambda cache: cache is not None, (inputs.key_cache, inputs.value_cache)):
                        rows = cache if spec.kv_layout == "NHD" else cache.swapaxes(1, 2)
                        rows[block, slot, head] = np.nan
            blocks[~used_blocks(spec, length, len(blocks))] = np.iinfo(np.int32).max
    return taking(shared(spec, on_device(inputs)), given)


def assert_close(spec, results, inputs):
    """The reference looks up all blocks up to the last that is seen: those that nobody is to look up are any block."""
    exists = inputs.block_table < len(inputs.key_cache)
    inputs = inputs.replace(block_table=np.where(exists, inputs.block_table, 0))
    functions.assert_close(spec, results, functions.expected(spec, inputs, inputs.given))


@one_of_each_strategy
@pytest.mark.parametrize("name", SCORE_MODS)
def test_score_mods(cuda_decode, base, name):
    spec = spec_of(base, score_mod=SCORE_MODS[name])
    inputs = inputs_of(spec, LENGTHS)
    assert_close(spec, cuda_decode(spec).decode(inputs), inputs)


@pytest.mark.parametrize("base", ["mma", "fma", "one_cache"])
@pytest.mark.parametrize("name", MASKS)
def test_masks(cuda_decode, base, name):
    """In whole sequences and in ranges."""
    spec = spec_of(base, mask_mod=MASKS[name])
    inputs = inputs_of(spec, LENGTHS)
    assert_close(spec, cuda_decode(spec).decode(inputs), inputs)


@pytest.mark.parametrize("base", ["mma", "mma_in_tiles", "fma_in_tiles", "fma_16_bits"])
@pytest.mark.parametrize("name", ["documents", "of_document_and_head", "sinks_and_window"])
def test_all_together(cuda_decode, base, name):
    spec = spec_of(base, score_mod=functions.decay, mask_mod=MASKS[name], **FIELDS)
    inputs = inputs_of(spec, LENGTHS)
    assert_close(spec, cuda_decode(spec).decode(inputs), inputs)


@one_of_each_strategy
def test_what_one_head_does_not_see_another_may(cuda_decode, base):
    """NaN in the value of such a token is in the results of the heads that see it, and in no others."""
    spec = spec_of(base, mask_mod=functions.checkered)
    assert choose_strategy(spec)[0] == "fma"
    inputs = inputs_of(spec, [300, 40])
    expected = cuda_decode(spec).decode(inputs)
    seen = functions.shown(spec, functions.checkered, inputs.context_lens, {})[1]
    position = 21
    block, slot = inputs.block_table[1, position // spec.block_size], position % spec.block_size
    inputs.value_cache[block, slot] = np.nan
    out, lse = cuda_decode(spec).decode(inputs)
    sees = seen[:, position]
    assert 0 < sees.sum() < len(sees)
    assert np.isnan(out[1, sees]).all()
    assert_same((out[1, ~sees], out[0], lse), (expected[0][1, ~sees], expected[0][0], expected[1]))


@one_of_each_strategy
def test_an_index_outside_of_an_array(cuda_decode, base):
    """The emulator would report a read outside; the results of sequences that have such an index are NaN."""

    def biased(score, batch, head, query_pos, key_pos, *, document):
        return score + document[key_pos]

    spec = spec_of(base, score_mod=biased)
    out, lse = cuda_decode(spec).decode(inputs_of(spec, [64, 65, 0, 300]))
    for each in (out, lse):
        assert np.isnan(each[[1, 3]]).all()
        assert not np.isnan(each[[0, 2]]).any()


@one_of_each_strategy
def test_inputs_of_bool_and_float16(cuda_decode, base):
    def biased(score, batch, head, query_pos, key_pos, *, bias):
        return score + bias[key_pos % 64]

    def allowed_only(batch, head, query_pos, key_pos, *, allowed):
        return allowed[batch, key_pos % 64]

    shapes = {"bias": ("float16", (64,)), "allowed": ("bool", ("batch", 64))}
    spec = dataclasses.replace(BASES[base], score_mod=biased, mask_mod=allowed_only, inputs=shapes)
    rng, lengths = np.random.default_rng(0), [300, 0, 17]
    given = {"bias": rng.uniform(-1, 1, 64).astype(np.float16), "allowed": rng.random((3, 64)) < 0.5}
    inputs = taking(shared(spec, on_device(make_inputs(spec, lengths))), given)
    assert_close(spec, cuda_decode(spec).decode(inputs), inputs)


def with_table(spec):
    """A score_mod of a table in the library, and the same of an input."""
    table = np.random.default_rng(0).uniform(-1, 1, (spec.num_heads, 64)).astype(np.float32)

    def of_array(array, **more):
        distance = Term("subtract", "int32", (Term("query_pos", "int32"), Term("key_pos", "int32")))
        index = Term("remainder", "int32", (distance, Term("number", "int32", (), 64)))
        element = Term("element", "float32", (Term("head", "int32"), index), array)
        return Function(f"of {array}", Term("add", "float32", (Term("score", "float32"), element)), **more)

    name = "table_0123456789abcdef"
    constant = Constant(name, "float32", table.shape, table.tobytes())
    of_table = dataclasses.replace(spec, score_mod=of_array(name, constants=(constant,)))
    of_input = dataclasses.replace(spec, score_mod=of_array("table"), inputs={"table": ("float32", table.shape)})
    return of_table, of_input, {"table": table}


@one_of_each_strategy
def test_tables(cuda_decode, base):
    """What a function closes over has the bits of the same array as an input."""
    of_table, of_input, given = with_table(BASES[base])
    inputs = inputs_of(BASES[base], [300, 0, 17])
    results = cuda_decode(of_table).decode(inputs)
    assert_same(results, cuda_decode(of_input).decode(inputs.replace(given=given)))
    assert not np.array_equal(results[1], cuda_decode(BASES[base]).decode(inputs)[1])


@one_of_each_strategy
def test_block_ids_on_the_device(emulated, base):
    """Those of blocks that nobody sees may be anything; a bad one among the others is found, the first of them."""
    spec = spec_of(base, mask_mod=sinks_and_window)
    kernels, inputs = build_others(emulated, spec), inputs_of(spec, [300, 17, 700, 0])
    numbers = {"table_seq": inputs.block_table.shape[1], "max_blocks": inputs.block_table.shape[1], "batch": 4}
    numbers |= {"row_step": 0, "num_entries": 0}
    for sequence, entry in ((None, None), (0, 0), (0, 12), (0, 18), (2, 37), (2, 43)):
        table, status = inputs.block_table.copy(), np.zeros(1, np.int32)
        if sequence is not None:
            table[sequence, entry] = -1
        arrays = {
            "row_starts": np.zeros(1, np.int32),
            "block_table": table,
            "context_lens": inputs.context_lens,
            "status": status,
        }
        kernels.launch("cuda_check", {**arrays, **numbers, "num_blocks": len(inputs.key_cache)})
        assert status[0] == (0 if sequence is None else VIOLATION - (2 * sequence + BAD_BLOCK))


@pytest.mark.parametrize("base", ["mma", "fma_in_tiles"])
@pytest.mark.parametrize("name", ["capped", "documents", "of_document_and_head", "sinks_and_window", "together"])
def test_staged(emulated, base, name):
    fields = {"score_mod": functions.decay, "mask_mod": MASKS["of_document_and_head"], **FIELDS}
    if name != "together":
        fields = {"score_mod": SCORE_MODS[name]} if name in SCORE_MODS else {"mask_mod": MASKS[name]}
    spec = spec_of(base, **fields)
    inputs = inputs_of(spec, (0, 1, 101, 16, 163))
    assert_close(spec, build_staged(emulated, spec).decode(inputs), inputs)
