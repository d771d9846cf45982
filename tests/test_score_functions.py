"""score_mod and mask_mod in compiled kernels, against the reference, which calls the Python functions themselves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from inputs import DTYPES, make_inputs
from specs import every_pipeline
from test_scores import BASES, LENGTHS, one_in_three

from pa_compiler import reference
from pa_compiler.verification.tolerances import LSE_TOLERANCES, TOLERANCES

TABLE = 64
HEADS = 32  # at most


def relative(score, batch, head, query_pos, key_pos, *, slopes):
    return score + slopes[head] * (key_pos - query_pos)


def decay(score, batch, head, query_pos, key_pos, *, bias):
    """A table of distances: beyond its end what it has there."""
    return score - np.log(1.0 + np.minimum(query_pos - key_pos, 1000)) + bias[head, np.minimum(query_pos - key_pos, 63)]


def capped(score, batch, head, query_pos, key_pos):
    return np.where(head % 2 == 0, 2.0 * np.tanh(score / 2.0), np.exp(-np.abs(score)) + np.sqrt(np.abs(score)))


def by_sequence(score, batch, head, query_pos, key_pos, *, lengths):
    return np.where(key_pos < lengths[batch], score, score * 0.5)


def dilated(batch, head, query_pos, key_pos):
    return key_pos % 3 != 1


def checkered(batch, head, query_pos, key_pos):
    return (key_pos // 2 + head) % 2 == 0


def documents(batch, head, query_pos, key_pos, *, document):
    return document[key_pos % 64] == document[query_pos % 64]


def nothing(batch, head, query_pos, key_pos):
    return (key_pos + batch) % 1000 > 1000


INPUTS = {
    "slopes": ("float32", (HEADS,)),
    "bias": ("bfloat16", (HEADS, TABLE)),
    "lengths": ("int32", ("batch",)),
    "document": ("int32", (TABLE,)),
}


def arrays(spec, batch, seed=0):
    rng = np.random.default_rng(seed)
    every = {
        "slopes": rng.uniform(-0.02, 0.02, HEADS).astype(np.float32),
        "bias": rng.uniform(-1, 1, (HEADS, TABLE)).astype(DTYPES["bfloat16"]),
        "lengths": rng.integers(0, 300, batch).astype(np.int32),
        "document": np.repeat(np.arange(TABLE // 8, dtype=np.int32), 8),
    }
    return {each.name: every[each.name] for each in spec.inputs}


def spec_of(base, **functions):
    names = {name for function in functions.values() for name in function.__kwdefaults__ or _keywords(function)}
    inputs = {name: INPUTS[name] for name in INPUTS if name in names}
    return dataclasses.replace(BASES[base], **functions, inputs=inputs)


def _keywords(function):
    code = function.__code__
    return code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]


def shown(spec, function, context_lens, given):
    """[batch][num_heads, tokens]: which keys a mask shows."""
    found = []
    for batch, length in enumerate(context_lens):
        arguments = np.array([[batch]]), np.arange(spec.num_heads)[:, None], np.array([[length - 1]]), np.arange(length)
        keywords = {name: given[name] for name in _keywords(function)}
        found.append(np.broadcast_to(function(*arguments, **keywords), (spec.num_heads, length)))
    return found


def poison_hidden(spec, inputs, visible, value=np.nan):
    """Spoil keys and values that no head of a kv head sees."""
    pair = 2 if spec.dtype == "bfloat16" and spec.kv_layout == "packed" else 1
    for batch, seen in enumerate(visible):
        by_kv_head = seen.reshape(spec.num_kv_heads, spec.group, -1).any(axis=1)
        for head, position in np.argwhere(~by_kv_head):
            block, slot = inputs.block_table[batch, position // spec.block_size], position % spec.block_size
            if not 0 <= block < len(inputs.key_cache):
                continue  # outside of the mask's bounds, where the table holds garbage
            for number, cache in enumerate((inputs.key_cache, inputs.value_cache)):
                if cache is None:
                    continue
                if spec.kv_layout == "NHD":
                    cache[block, slot, head] = value
                elif spec.kv_layout == "HND":
                    cache[block, head, slot] = value
                elif number == 0:
                    cache[block, head, :, pair * slot : pair * slot + pair] = value
                else:
                    cache[block, head, slot // pair, slot % pair :: pair] = value


def decode(module, inputs, given):
    return module.decode(*inputs.arguments, None, inputs.out, lse=inputs.lse, **(inputs.heads | {"inputs": given}))


def expected(spec, inputs, given):
    query, key, value, *rest = inputs.arguments
    value = key[..., : spec.result_dim] if value is None else value
    return reference.decode(
        query, key, value, *rest, kv_layout=spec.kv_layout, return_lse=True, window=spec.window, softcap=spec.softcap,
        **(inputs.heads | {"inputs": given}), score_mod=spec.score_mod, mask_mod=spec.mask_mod,
    )  # fmt: skip


def assert_close(spec, results, wanted):
    (out, lse), (of_out, of_lse) = results, wanted
    bound = max(TOLERANCES[each] for each in (spec.dtype, spec.result_dtype))
    np.testing.assert_allclose(out.astype(np.float64), of_out, rtol=bound.of_out, atol=2 * bound.of_magnitude)
    error = LSE_TOLERANCES[spec.dtype] + 1e-5
    np.testing.assert_allclose(lse.astype(np.float64), of_lse, rtol=1e-5, atol=error)


def check(compiled, spec, pipeline, lengths=LENGTHS, poison=np.nan):
    inputs, given = make_inputs(spec, lengths), arrays(spec, len(lengths))
    if spec.mask_mod is not None:
        poison_hidden(spec, inputs, shown(spec, spec.mask_mod.source, inputs.context_lens, given), poison)
    results = decode(compiled(spec, pipeline), inputs, given)
    assert_close(spec, results, expected(spec, inputs, given))
    return results


CASES = [
    (base, functions)
    for number, base in enumerate(BASES)
    for functions in (
        [{"score_mod": relative, "mask_mod": dilated}, {"score_mod": decay, "mask_mod": checkered}],
        [{"score_mod": capped, "mask_mod": checkered}, {"score_mod": by_sequence, "mask_mod": documents}],
        [{"mask_mod": checkered}, {"score_mod": decay}],
    )[number % 3]
]


def named(value):
    return value if isinstance(value, str) else "_".join(each.__name__ for each in value.values())


@every_pipeline
@pytest.mark.parametrize(("base", "functions"), one_in_three(CASES), ids=named)
def test_functions(compiled, base, functions, pipeline):
    check(compiled, spec_of(base, **functions), pipeline)


@every_pipeline
@pytest.mark.parametrize("base", ["32/32_float32", "8/2_bfloat16", "16/1_float32", "32/8_bfloat16_packed"])
def test_a_mask_of_all_keys(compiled, base, pipeline):
    """Rows that see nothing, and keys and values of anything."""
    spec = spec_of(base, mask_mod=nothing)
    for poison in (np.nan, np.inf):
        out, lse = check(compiled, spec, pipeline, poison=poison)
        assert not out.any()
        assert (lse == -np.inf).all()


def nested(score, batch, head, query_pos, key_pos):
    """So many functions of functions that no expression can hold them."""
    far = np.sqrt(np.log(np.exp(np.tanh(np.log(query_pos - key_pos + 2.0))) + 1.0))
    near = np.tanh(np.exp(np.log(np.abs(np.tanh(np.exp(np.tanh(score))) + score) + 1.0)) * 0.5)
    return near * far + np.exp(-np.log(np.exp(np.tanh(head * 0.1)) + 1.0))


def far_off(batch, head, query_pos, key_pos):
    return np.tanh(np.exp(np.tanh((key_pos % 7) * 0.2)) * np.exp(np.tanh(head * 0.1))) < 0.98


@every_pipeline
@pytest.mark.parametrize("base", one_in_three(["32/32_float32", "8/2_bfloat16", "16/1_float32", "16/1_bfloat16"]))
def test_functions_of_functions(compiled, base, pipeline):
    check(compiled, spec_of(base, score_mod=nested, mask_mod=far_off), pipeline)
    check(compiled, dataclasses.replace(spec_of(base, score_mod=nested), softcap=1.5), pipeline)


def beyond(score, batch, head, query_pos, key_pos, *, bias):
    return score + bias[head, query_pos - key_pos]


def beyond_in_mask(batch, head, query_pos, key_pos, *, document):
    return (document[key_pos] >= 0) & (key_pos != 70)


@every_pipeline
@pytest.mark.parametrize("base", ["32/32_bfloat16_HND", "8/2_float32_sweep", "16/1_bfloat16", "32/8_float32_packed"])
def test_an_index_outside_of_an_input_shows(compiled, base, pipeline):
    """The rows of 64 tokens and fewer are right, and the longer ones NaN; nothing outside is read."""
    lengths = [1, 17, TABLE, TABLE + 1, 300, 0, 2500]
    spec = spec_of(base, score_mod=beyond)
    inputs, given = make_inputs(spec, lengths), arrays(spec, len(lengths))
    out, lse = decode(compiled(spec, pipeline), inputs, given)
    inside = inputs.context_lens <= TABLE
    assert np.isnan(out[~inside].astype(np.float32)).all()
    assert np.isnan(lse[~inside]).all()
    wanted = [each[inside] for each in expected(spec, inputs, given)]
    assert_close(spec, (out[inside], lse[inside]), wanted)
    masked = spec_of(base, mask_mod=beyond_in_mask)
    given = arrays(masked, len(lengths))
    out, lse = decode(compiled(masked, pipeline), inputs, given)
    np.testing.assert_array_equal(np.isnan(lse).any(axis=1), ~inside)


def test_a_key_that_is_masked_may_have_any_index(compiled):
    """Of a table that ends before it."""
    spec = spec_of(
        "8/2_bfloat16", score_mod=beyond, mask_mod=lambda batch, head, query_pos, key_pos: near(query_pos, key_pos)
    )
    check(compiled, spec, "fused")


def near(query_pos, key_pos):
    return (query_pos - key_pos) // 64 == 0


def twisted(score, batch, head, query_pos, key_pos, *, bias, document):
    """Indices that go by the head and by the key."""
    return score + bias[head, (head + key_pos) % 64] * document[np.minimum(key_pos * (head + 1), 63)]


@every_pipeline
@pytest.mark.parametrize(
    "base", one_in_three(["32/32_float32", "8/2_bfloat16", "16/1_bfloat16", "32/8_float32_packed"])
)
def test_indices_of_every_score(compiled, base, pipeline):
    def mask_mod(batch, head, query_pos, key_pos, *, document):
        return document[(key_pos + head) % 64] % 3 != 1

    check(compiled, spec_of(base, score_mod=twisted, mask_mod=mask_mod), pipeline)
