"""merge_states: parts of a context, beside float64, at the ends of float32, and beside the context in one call."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from dlpack import Exported
from inputs import DTYPES, make_inputs
from ragged_inputs import make_ragged
from specs import BASE, OUT_DTYPE_SPECS, SPECS, every_pipeline
from tolerances import assert_close_to_oracle, assert_same_bits

from pa_compiler import reference
from pa_compiler.verification.tolerances import SMALLEST, TOLERANCES

every_type = pytest.mark.parametrize(
    "spec", [*SPECS.values(), *OUT_DTYPE_SPECS.values()], ids=[*SPECS, *OUT_DTYPE_SPECS]
)


def module_of(compiled, spec, pipeline="fused"):
    return compiled(spec, pipeline, merge_states=True)


def make_parts(spec, parts=5, tokens=9, *, dtype=None, spread=3.0, seed=0):
    """outs and lses, of which some are empty: with NaN in their outs; of one token all."""
    rng = np.random.default_rng(seed)
    outs = rng.standard_normal((parts, tokens, spec.num_heads, spec.result_dim), np.float32)
    lses = (spread * rng.standard_normal(outs.shape[:-1])).astype(np.float32)
    lses[rng.random(lses.shape) < 0.3] = -np.inf
    lses[:, tokens // 2] = -np.inf
    outs[np.isneginf(lses)] = np.nan
    return outs.astype(DTYPES[dtype or spec.result_dtype]), lses


def assert_near(spec, outs, lses, out, lse):
    expected, expected_lse = reference.merge_states(outs, lses, return_lse=True)
    sizes = reference.merge_states(np.abs(outs), lses)
    of_out, of_size = TOLERANCES[spec.result_dtype]
    assert (out.dtype, lse.dtype) == (DTYPES[spec.result_dtype], np.float32)
    error = np.abs(out.astype(np.float64) - expected)
    assert (error <= of_out * np.abs(expected) + of_size * sizes + SMALLEST[spec.result_dtype]).all()
    empty = np.isneginf(expected_lse)
    assert np.isneginf(lse[empty]).all()
    assert (np.abs(lse[~empty] - expected_lse[~empty]) <= 1e-5 * (1 + np.abs(expected_lse[~empty]))).all()


@every_type
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_results_are_near_float64(compiled, spec, dtype):
    module = module_of(compiled, spec)
    for parts, tokens, spread in ((5, 9, 3.0), (1, 3, 1.0), (2, 1, 40.0), (33, 40, 1e4)):
        outs, lses = make_parts(spec, parts, tokens, dtype=dtype, spread=spread)
        assert_near(spec, outs, lses, *module.merge_states(outs, lses, return_lse=True))


@every_pipeline
def test_one_part_with_all_the_weight_comes_out_as_it_is(compiled, pipeline):
    module = module_of(compiled, BASE, pipeline)
    outs, lses = make_parts(BASE, 6, 5)
    outs = np.nan_to_num(outs)
    for level, others in (
        (0, -np.inf),
        (-3.4e38, -np.inf),
        (200, 0),
        (3.4e38, -3.4e38),
        (1e30, 1e29),
        (np.inf, 3.4e38),
    ):
        lses[:], lses[3] = others, level
        out, lse = module.merge_states(outs, lses, return_lse=True)
        assert_same_bits(out, outs[3])
        assert_same_bits(lse, lses[3])


def test_empty_parts_change_nothing(compiled):
    module = module_of(compiled, BASE)
    outs, lses = make_parts(BASE, 3, 5)
    out, lse = module.merge_states(outs[:1], lses[:1], return_lse=True)
    lses[1:], outs[1] = -np.inf, np.inf
    for one, other in zip(module.merge_states(outs, lses, return_lse=True), (out, lse), strict=True):
        assert_same_bits(one, other)
    lses[:] = -np.inf
    out, lse = module.merge_states(outs, lses, return_lse=True)
    assert (out == 0).all()
    assert np.isneginf(lse).all()


def test_ends_of_float32(compiled):
    """Averages of the largest values, parts of lse inf, which alone count, and NaN, which stays in its row."""
    module = module_of(compiled, BASE)
    outs, lses = np.full((4, 5, 6, 24), 3.4e38, np.float32), np.zeros((4, 5, 6), np.float32)
    lses[1:3, 1], lses[0, 2], outs[0, 3], lses[0, 4, :3] = np.inf, np.nan, np.nan, np.nan
    outs[0, 1], outs[3, 1], outs[2, 1] = np.nan, np.inf, -3.4e38
    lses[[0, 3], 1] = -np.inf
    out, lse = module.merge_states(outs, lses, return_lse=True)
    assert (out[0] == np.float32(3.4e38)).all()
    assert np.allclose(lse[0], np.log(4))
    assert (out[1] == 0).all()
    assert np.isposinf(lse[1]).all()
    assert np.isnan(out[2:4]).all()
    assert np.isnan(lse[2]).all()
    assert np.isnan(out[4, :3]).all()
    assert (out[4, 3:] == np.float32(3.4e38)).all()


def parts_of(inputs, spec, cuts):
    """The calls of decode for the tokens between cuts, which are multiples of the block size."""
    for begin, end in itertools.pairwise(cuts):
        table = inputs.block_table[:, begin // spec.block_size :]
        yield inputs.replace(block_table=table, context_lens=np.clip(inputs.context_lens - begin, 0, end - begin))


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_ranges_of_a_context(compiled, spec, sinks):
    """Sinks are given to the first part, and to the others -inf."""
    spec = dataclasses.replace(spec, sinks=sinks)
    module, size = module_of(compiled, spec), spec.block_size
    inputs = make_inputs(spec, [0, 1, size, 3 * size + 1, 17 * size - 1, 40 * size, 2 * size], poison="inf")
    heads = dict(inputs.heads)
    results = []
    for part in parts_of(inputs, spec, [0, 2 * size, 9 * size, 10 * size, 64 * size]):
        results.append(module.decode(*part.arguments, return_lse=True, **heads))
        if sinks:
            heads["sinks"] = np.full_like(heads["sinks"], -np.inf)
    outs, lses = map(np.stack, zip(*results, strict=True))
    assert_close_to_oracle(spec, inputs, *module.merge_states(outs, lses, return_lse=True))


def test_a_prompt_on_a_context_in_parts(compiled):
    """The context, which all query tokens see, apart from the prompt, of which each sees what is before it."""
    module = compiled(BASE, attend=True, merge_states=True)
    ragged, size = make_ragged(BASE, [(20, 120)]), BASE.block_size
    whole = ragged.attend(module)
    table, caches = ragged.inputs.block_table, ragged.arguments[1:3]
    before = module.attend(
        ragged.query[:20], *caches, table[:, : 100 // size], np.array([100]), np.array([0, 20]),
        causal=False, return_lse=True,
    )  # fmt: skip
    own = module.attend(
        ragged.query, *caches, table[:, 100 // size :], np.array([20]), np.array([0, 20]), return_lse=True
    )
    merged = module.merge_states(*map(np.stack, zip(before, own, strict=True)), return_lse=True)
    for one, other in zip(merged, whole, strict=True):
        assert np.abs(one - other).max() < 1e-5


def test_threads_and_strides(compiled):
    """The same bits at any number of threads, of views, in one axis of all heads, and through DLPack."""
    module = module_of(compiled, SPECS["bfloat16_HND"])
    outs, lses = make_parts(module.spec, 7, 600)
    expected = module.merge_states(outs, lses, return_lse=True)
    module.num_threads = 1
    wide = np.zeros((600, 8, 7, 40), outs.dtype)
    view = wide.transpose(2, 0, 1, 3)[..., 3:35]
    view[...] = outs
    flat, lse = np.empty((600, 8 * 32), outs.dtype), np.empty((600, 8), np.float32)
    returned = module.merge_states(view, np.stack([lses, lses], 2)[:, :, 1], flat, lse)
    assert returned[0] is flat
    assert returned[1] is lse
    assert_same_bits(flat.reshape(600, 8, 32), expected[0])
    assert_same_bits(lse, expected[1])
    module.num_threads = 8
    assert_same_bits(module.merge_states(outs, lses), expected[0])
    assert_same_bits(np.from_dlpack(module.merge_states(outs, Exported(lses), return_lse=True)[1]), expected[1])


def test_nothing_to_merge(compiled):
    assert module_of(compiled, BASE).merge_states(*make_parts(BASE, 3, 1)).shape == (1, 6, 24)
    none = np.zeros((3, 0, 6, 24), np.float32), np.zeros((3, 0, 6), np.float32)
    assert module_of(compiled, BASE).merge_states(*none).shape == (0, 6, 24)


# id, error, message, what is given in place of outs, lses, out and lse
V, T = ValueError, TypeError  # (a column of this table)
BAD = [
    ("outs_rank", V, r"outs: expected shape \[any, any, 6, 24\], got \[2, 6, 24\]", {"outs": lambda o, s: o[:, 0]}),
    ("outs_heads", V, r"outs: expected shape .*6, 24\], got \[2, 3, 5, 24\]", {"outs": lambda o, s: o[:, :, :5]}),
    ("outs_none", V, "outs: expected one part at least, got none", {"outs": lambda o, s: o[:0]}),
    ("outs_dtype", T, "outs: expected dtype float32, got float64", {"outs": lambda o, s: o.astype(float)}),
    ("outs_list", T, "outs: expected an array with DLPack, got list", {"outs": lambda o, s: o.tolist()}),
    ("lses_parts", V, r"lses: expected shape \[2, 3, 6\], got \[1, 3, 6\]", {"lses": lambda o, s: s[:1]}),
    ("lses_dtype", T, "lses: expected dtype float32, got float16", {"lses": lambda o, s: s.astype(np.float16)}),
    ("lses_none", T, "lses: expected an array with DLPack, got NoneType", {"lses": lambda o, s: None}),
    ("out_shape", V, r"out: expected shape \[3, 6, 24\], got \[3, 6, 23\]", {"out": lambda o, s: o[0, ..., 1:].copy()}),
    ("out_overlap", V, "out: expected .*outs", {"out": lambda o, s: o[1]}),
    ("lse_overlap", V, "lse: expected .*lses", {"lse": lambda o, s: s[1]}),
    ("lse_shape", V, r"lse: expected shape \[3, 6\], got \[3, 5\]", {"lse": lambda o, s: s[0, :, 1:].copy()}),
]


@pytest.mark.parametrize(("error", "message", "given"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_arguments(compiled, error, message, given):
    outs, lses = make_parts(BASE, 2, 3)
    before = outs.tobytes(), lses.tobytes()
    arguments = {"outs": outs, "lses": lses, "out": np.empty((3, 6, 24), np.float32)} | {
        name: make(outs, lses) for name, make in given.items()
    }
    with pytest.raises(error, match=message):
        module_of(compiled, BASE).merge_states(**arguments)
    assert (outs.tobytes(), lses.tobytes()) == before


def test_not_every_module_has_it(compiled):
    module = compiled(BASE)
    assert not module.has_merge_states
    assert module_of(compiled, BASE).has_merge_states
    with pytest.raises(NotImplementedError, match=r"^merge_states: expected a module compiled with merge_states=True"):
        module.merge_states(*make_parts(BASE))
