"""Functions of scores and masks in torch, as people write them for FlexAttention."""

from __future__ import annotations

import functools

import numpy
import pytest
from terms import term_value, text_value

from pa_compiler.score import CONSTANT_BYTES, Input, names_read
from pa_compiler.tracing import trace

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")

HEADS, TOKENS = 8, 64
INPUTS = (Input("bias", "float32", (HEADS, TOKENS)),)
drawn = torch.Generator().manual_seed(3)
SLOPES = torch.exp2(-torch.arange(1, HEADS + 1, dtype=torch.float32))
TABLE = torch.randn(HEADS, TOKENS, generator=drawn)
HALF, BRAIN, DOUBLE = TABLE.half(), TABLE.bfloat16(), TABLE.double()
DOCUMENT = torch.arange(TOKENS) // 10
SMALL = torch.arange(HEADS, dtype=torch.uint8)
FLAGS = torch.rand(HEADS, TOKENS, generator=drawn) < 0.5
LOWEST = torch.tensor(-float("inf"))
TRAINED = torch.nn.Parameter(SLOPES.clone())
F = torch.nn.functional


def traced(function, field="score_mod"):
    return trace(field, function, INPUTS, num_heads=HEADS)


@functools.cache
def arguments():
    """Random arguments of 400 scores as torch has them, and the array of INPUTS."""
    generator = torch.Generator().manual_seed(4)
    query = torch.randint(0, TOKENS, (400,), generator=generator)
    values = {
        "score": 3 * torch.randn(400, generator=generator, dtype=torch.float64),
        "batch": torch.randint(0, 3, (400,), generator=generator),
        "head": torch.randint(0, HEADS, (400,), generator=generator),
        "query_pos": query,
        "key_pos": (query * torch.rand(400, generator=generator)).long(),
    }
    return values, {"bias": torch.randn(HEADS, TOKENS, generator=generator, dtype=torch.float64)}


def numbers(constant):
    """The elements of a Constant, from its bytes."""
    flat = torch.frombuffer(bytearray(constant.data), dtype=getattr(torch, constant.dtype)).reshape(constant.shape)
    return (flat.double() if flat.is_floating_point() else flat).numpy()


def agree(function, field="score_mod"):
    """That a function, its term and its text compute the same."""
    values, arrays = arguments()
    result = traced(function, field)
    read = names_read(result.result)
    taken = {name: array for name, array in arrays.items() if name in read}
    expected = torch.as_tensor(function(*list(values.values())[field == "mask_mod" :], **taken)).detach().numpy()
    inside = {name: value.numpy() for name, value in values.items()}
    all_arrays = {name: array.numpy() for name, array in taken.items()}
    all_arrays |= {constant.name: numbers(constant) for constant in result.constants}
    assert read == set(all_arrays)
    with numpy.errstate(all="ignore"):
        by_term = term_value(result.result, inside, all_arrays)
        by_text = text_value(result.text, inside, all_arrays)
    for found in (by_term, by_text):
        found, wanted = numpy.broadcast_to(found, 400), numpy.broadcast_to(expected, 400)
        numpy.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)
    return result


SCORE_MODS = {
    "causal": lambda s, b, h, q, k: torch.where(q >= k, s, -float("inf")),
    "causal_by_tensor": lambda s, b, h, q, k: torch.where(q >= k, s, LOWEST),
    "causal_by_method": lambda s, b, h, q, k: s.where(q >= k, -float("inf")),
    "causal_by_fill": lambda s, b, h, q, k: s.masked_fill(k > q, float("-inf")),
    "by_keywords": lambda s, b, h, q, k: torch.where(condition=q > k, input=s, other=torch.zeros_like(s)),
    "slopes": lambda s, b, h, q, k: s + SLOPES[h] * (k - q),
    "computed_slopes": lambda s, b, h, q, k: s + torch.exp2(-((h + 1) * 8.0 / HEADS)) * (k - q),
    "parameter": lambda s, b, h, q, k: s * TRAINED[h],
    "relative": lambda s, b, h, q, k: s + TABLE[h, q - k],
    "number_among_indices": lambda s, b, h, q, k: s + TABLE[0, q - k] + TABLE[h, -1] + TABLE[-1, torch.tensor(3)],
    "types": lambda s, b, h, q, k: s + HALF[h, q] + BRAIN[h, k] + DOUBLE[h, k] + SMALL[h] + DOCUMENT[k] * FLAGS[h, k],
    "tables_in_tables": lambda s, b, h, q, k: s * TABLE[SMALL[h].long(), DOCUMENT[q]],
    "softcap": lambda s, b, h, q, k: 20 * torch.tanh(s / 20),
    "methods": lambda s, b, h, q, k: s.abs().clamp(min=0.5, max=2).sqrt().tanh() + s.sigmoid().log() + s.exp().square(),
    "more_methods": lambda s, b, h, q, k: s.floor() + s.ceil() + s.round() + s.trunc() + s.pow(2) + s.neg() + s.sign(),
    "casts": lambda s, b, h, q, k: s.int() + (s > 0).float() + (q - k).bool().long() + s.to(torch.int32).to(s.dtype),
    "types_as": lambda s, b, h, q, k: (q - k).type_as(s) + s.type(torch.int64) + h.double() / 3,
    "functions": lambda s, b, h, q, k: torch.sigmoid(s) + F.relu(s) + torch.abs(s) + torch.rsqrt(1 + s * s),
    "limits": lambda s, b, h, q, k: torch.clamp(s, -1, 1) + torch.clamp(k, max=9) + s.clamp_min(0) + s.clip(max=2),
    "two": lambda s, b, h, q, k: torch.maximum(s, h) + torch.minimum(h, k) + torch.max(s, -s) + torch.remainder(q, 3),
    "divisions": lambda s, b, h, q, k: torch.div(q, 3, rounding_mode="floor") + torch.div(q, 4) + q // 5 + s / (1 + k),
    "from_the_left": lambda s, b, h, q, k: torch.tensor(2.0) * s - torch.tensor(3) + torch.tensor(0.5) / (s.abs() + 1),
    "decay": lambda s, b, h, q, k: s * torch.exp(-(q - k).float() / 10) - torch.log(1 + (q - k)),
    "powers": lambda s, b, h, q, k: torch.pow(2.0, -h) + torch.pow(s, 3) + 0.5**h + torch.full_like(s, 2.5),
    "near": lambda s, b, h, q, k: torch.where(torch.isnan(s) | torch.isinf(s), 0.0, s) + torch.log2(1 + torch.abs(s)),
    "inputs": lambda s, b, h, q, k, bias: s + bias[h, q - k] * SLOPES[h],
}

MASK_MODS = {
    "sliding": lambda b, h, q, k: (q >= k) & (q - k <= 16),
    "prefix": lambda b, h, q, k: torch.logical_or(k <= q, k < 9),
    "documents": lambda b, h, q, k: (DOCUMENT[q] == DOCUMENT[k]) & (q >= k),
    "dilated": lambda b, h, q, k: torch.logical_and(q >= k, torch.remainder(q - k, 4).eq(0)),
    "from_a_table": lambda b, h, q, k: FLAGS[h, k] | ~FLAGS[0, k],
    "by_heads": lambda b, h, q, k: torch.where(h % 2 == 0, q - k < 8, (q - k) % 2 == 0),
    "made_true": lambda b, h, q, k: b.new_ones(size=(), dtype=torch.bool, device=b.device) & (q >= k),
    "made_numbers": lambda b, h, q, k: q.new_zeros(()) + q.new_full((), 9) < k,
    "logical": lambda b, h, q, k: torch.logical_not(torch.logical_xor(h > 2, k.gt(9))) & k.le(q) | k.ne(3),
}


@pytest.mark.parametrize("name", SCORE_MODS)
def test_a_score_mod_its_term_and_its_text_agree(name):
    assert agree(SCORE_MODS[name]).uses_torch


@pytest.mark.parametrize("name", MASK_MODS)
def test_a_mask_mod_its_term_and_its_text_agree(name):
    agree(MASK_MODS[name], "mask_mod")


def test_masks_are_joined_as_flex_attention_does():
    flex_attention = pytest.importorskip("torch.nn.attention.flex_attention")
    window = flex_attention.and_masks(lambda b, h, q, k: q >= k, lambda b, h, q, k: q - k < 16)
    agree(flex_attention.or_masks(window, lambda b, h, q, k: k < 4), "mask_mod")
    agree(flex_attention.noop_mask, "mask_mod")


def test_operators_alone_use_no_torch():
    assert not traced(lambda s, b, h, q, k: s * 2 + h // 2).uses_torch


def test_a_constant_is_named_by_its_elements():
    first, again, other = (torch.tensor([1.0, value] * 4) for value in (2, 2, 3))
    one, same, another = (traced(lambda s, b, h, q, k, t=t: s * t[h]) for t in (first, again, other))
    assert one == same != another
    (constant,) = one.constants
    assert one.text == f"score * {constant.name}[head]"
    assert (constant.dtype, constant.shape, len(constant.data)) == ("float32", (8,), 32)
    assert traced(lambda s, b, h, q, k: s * first.reshape(2, 4)[h // 4, h % 4]).constants[0].name != constant.name
    assert traced(lambda s, b, h, q, k: (first[h], s)[1]).constants == ()  # indexed and not used


def test_views_are_constants_of_what_they_show():
    even = TABLE[:, ::2].t()
    (constant,) = traced(lambda s, b, h, q, k: s * even[k, h]).constants
    assert constant.shape == (TOKENS // 2, HEADS)
    assert (numbers(constant) == even.double().numpy()).all()


def test_up_to_1_mb_is_taken():
    largest = torch.zeros(CONSTANT_BYTES // 4)
    assert len(traced(lambda s, b, h, q, k: largest[k]).constants[0].data) == CONSTANT_BYTES
    assert len(traced(lambda s, b, h, q, k: largest[k] + largest[q]).constants) == 1


REFUSED = {
    "unknown": (TypeError, lambda s, b, h, q, k: torch.sin(s), "torch.sin, which is not one of the functions"),
    "softplus": (TypeError, lambda s, b, h, q, k: F.softplus(s), "torch.softplus, which is not one of"),
    "erf": (TypeError, lambda s, b, h, q, k: torch.erf(s), "torch.erf, which is not one of"),
    "log1p": (TypeError, lambda s, b, h, q, k: torch.log1p(s), "torch.log1p, which is not one of"),
    "stack": (TypeError, lambda s, b, h, q, k: torch.stack([s, s]), "torch.stack, which is not one of"),
    "reduction": (TypeError, lambda s, b, h, q, k: torch.max(s), "torch.max called so that it cannot be compiled"),
    "alpha": (TypeError, lambda s, b, h, q, k: torch.sub(s, 1, alpha=2), "torch.sub called so that it cannot be"),
    "rounding": (TypeError, lambda s, b, h, q, k: torch.div(q, 3, rounding_mode="trunc"), "rounding_mode 'trunc'"),
    "tensor": (TypeError, lambda s, b, h, q, k: torch.tensor(s), "of a value"),
    "whole": (
        TypeError,
        lambda s, b, h, q, k: SLOPES * s,
        "a tensor of shape (8,) used whole: index it, as tensor[head]",
    ),
    "whole_on_the_right": (TypeError, lambda s, b, h, q, k: s + SLOPES, "a tensor of shape (8,) used whole"),
    "one_element": (TypeError, lambda s, b, h, q, k: s + SLOPES[:1], "a tensor of shape (1,) used whole"),
    "part": (TypeError, lambda s, b, h, q, k: TABLE[h][q - k], "an index into a tensor with 1 of 2 indices"),
    "slice": (TypeError, lambda s, b, h, q, k: TABLE[h, :], "an index into a tensor with a slice, None or ..."),
    "mask": (TypeError, lambda s, b, h, q, k: SLOPES[q > k], "an index into a tensor, axis 0, with a bool"),
    "fraction": (TypeError, lambda s, b, h, q, k: SLOPES[s], "an index into a tensor, axis 0, with a float32"),
    "if": (TypeError, lambda s, b, h, q, k: s if SLOPES[h] > 0 else 0, "a value asked whether it is true"),
    "new": (TypeError, lambda s, b, h, q, k: s.new_ones((8,)) * s, "a tensor of size (8,) made of a value"),
    "half": (TypeError, lambda s, b, h, q, k: s.to(torch.float16), "a cast to float16"),
    "half_by_name": (TypeError, lambda s, b, h, q, k: s.half(), ".half of a value"),
    "finfo": (TypeError, lambda s, b, h, q, k: torch.finfo(s.dtype).min, "raised TypeError: finfo()"),
    "complex": (TypeError, lambda s, b, h, q, k: torch.zeros(8, dtype=torch.complex64)[h], "a tensor of complex64"),
    "large": (
        ValueError,
        lambda s, b, h, q, k: torch.zeros(600, 1000)[h, q],
        "got 2400000: larger ones are given at each",
    ),
    "together": (
        ValueError,
        lambda s, b, h, q, k: torch.zeros(1 << 17)[k] + torch.ones((1 << 17) + 1)[k],
        "expected at most 1048576 bytes of tensors that a function closes over, got 1048580",
    ),
    "int64": (
        ValueError,
        lambda s, b, h, q, k: torch.full((8,), 1 << 31)[h],
        "expected a tensor of numbers that int32",
    ),
    "empty": (ValueError, lambda s, b, h, q, k: torch.zeros(0)[k], "expected a tensor with elements"),
    "outside": (ValueError, lambda s, b, h, q, k: SLOPES[h + 1], "axis 0: expected 0 to 7, got 8 from head + 1"),
    "number_outside": (ValueError, lambda s, b, h, q, k: TABLE[h, 64], "axis 1: expected 0 to 63, got 64 from 64"),
    "random": (
        ValueError,
        lambda s, b, h, q, k: s * torch.rand(8)[h],
        "two calls of <lambda> gave different expressions",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compiled_is_refused(name):
    kind, function, expected = REFUSED[name]
    with pytest.raises(kind) as caught:
        traced(function)
    assert caught.type is kind
    assert expected in str(caught.value)
    assert str(caught.value).startswith("score_mod: ")
    if name != "random":
        assert f"{__file__}:" in str(caught.value)
