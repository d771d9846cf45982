"""Tensors of torch that mean more, or have less, than the memory, shape and strides that DLPack hands over.

Each is refused by name, with what to do about it, wherever it is given; or is as good as any other.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from refusals import SPEC, append_call, assert_refused, decode_call
from tolerances import assert_same_bits

torch = pytest.importorskip("torch", reason="torch is not installed: its tensors are not tested")

V, T, I = ValueError, TypeError, IndexError  # noqa: E741  (a column of this table)
CALLS = {"decode": decode_call, "append_kv": append_call}


def in_torch(call):
    """A call's arrays as tensors over the same memory."""
    return {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in vars(call).items()
    }


BAD = [  # id, error, the argument at fault, what its message also has to show, what is given for it
    ("float64", T, "query", "float16 float64", lambda c: c["query"].double()),
    ("bfloat16", T, "key_cache", "float16 bfloat16", lambda c: c["key_cache"].bfloat16()),
    ("float8", T, "query", "float16 float8_e4m3fn", lambda c: c["query"].to(torch.float8_e4m3fn)),
    ("conjugated", T, "query", "float16 complex64", lambda c: c["query"].to(torch.complex64).conj()),
    ("transposed", V, "value_cache", "[num_blocks,8,2,24] [10,8,24,2]", lambda c: c["value_cache"].mT),
    ("every_other_column", V, "query", "1 2", lambda c: c["query"].repeat(1, 1, 2)[..., ::2]),
    ("lens_int16", T, "context_lens", "int32 int64 int16", lambda c: c["context_lens"].short()),
    ("id_over", I, "block_table", "10 0", lambda c: torch.full_like(c["block_table"], 10)),
    ("id_over_int64", I, "block_table", f"10 {2**32}", lambda c: torch.full_like(c["block_table"].long(), 2**32)),
    ("out_float16", T, "out", "float32 float16", lambda c: c["out"].half()),
    ("out_expanded", V, "out", "overlap", lambda c: c["out"][:1].expand(4, 6, 24)),
    ("scale_of_one", T, "scale", "[1] Tensor", lambda c: torch.ones(1)),
    ("scale_bool", T, "scale", "True Tensor", lambda c: torch.tensor(True)),
    ("scale_complex", T, "scale", "1j Tensor", lambda c: torch.tensor(1j)),
    ("scale_freed", V, "scale", "memory freed", lambda c: freed(torch.ones(()))),
    ("scale_of_three_freed", T, "scale", "[3] Tensor", lambda c: freed(torch.ones(3))),
    ("scale_meta", T, "scale", "meta", lambda c: torch.ones((), device="meta")),
]


@pytest.mark.scorecard(13)
@pytest.mark.parametrize(
    ("error", "argument", "shows", "change"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_refused_before_anything_is_written(compiled, figure, error, argument, shows, change):
    good = decode_call()
    tensors = in_torch(good)
    call = {**tensors, argument: change(tensors)}
    assert_refused(lambda: compiled(SPEC).decode(**call), error, argument, shows, vars(good).values())
    figure("kinds", 1)


def freed(tensor):
    """Its storage is given back to the system."""
    copy = tensor.clone()
    copy.untyped_storage().resize_(0)
    return copy


def freed_view(tensor):
    """A view some 40 MB into a storage that is given back."""
    room = torch.empty(10_000_000 * 4 // tensor.itemsize + tensor.numel(), dtype=tensor.dtype)
    view = room[-tensor.numel() :].view(tensor.shape)
    room.untyped_storage().resize_(0)
    return view


def fake(tensor):
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(tensor)


def fake_view(tensor):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(1_000_000 + tensor.numel(), dtype=tensor.dtype)[1_000_000:].view(tensor.shape)


def wrapper(tensor):
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(tensor, tensor)


def nested(tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a prototype
        return torch.nested.nested_tensor([tensor], dtype=torch.float32)


def jagged(tensor):
    return torch.nested.nested_tensor([tensor[:1], tensor], layout=torch.jagged)


def quantized(tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it will go
        return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8)


KINDS = [  # id, error, what the message shows, what becomes of a tensor
    ("freed", V, "memory freed", freed),
    ("freed_view", V, "memory freed", freed_view),
    ("fake", V, "memory fake", fake),
    ("fake_view", V, "memory fake", fake_view),
    ("wrapper", V, "memory torch.testing._internal.two_tensor.TwoTensor", wrapper),
    ("functional", V, "memory", torch._to_functional_tensor),
    ("functional_view", V, "memory", lambda t: torch._to_functional_tensor(torch.cat([t, t])[len(t) :])),
    ("zeros_without_memory", V, "memory", lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype)),
    ("negated", V, "negated resolve_neg()", lambda t: torch._neg_view(-t)),
    ("meta", T, "dense meta", lambda t: t.to("meta")),
    ("sparse", T, "dense torch.sparse_coo to_dense()", lambda t: t.float().to_sparse()),
    ("sparse_with_dtype", T, "dense torch.sparse_coo to_dense()", lambda t: t.to_sparse()),
    ("opaque", T, "dense torch._mkldnn to_dense()", lambda t: torch.ones(4, 6).to_mkldnn()),
    ("quantized", T, "dense torch.quint8 dequantize()", quantized),
    ("nested", T, "dense nested to_padded_tensor()", nested),
    ("jagged", T, "dense nested to_padded_tensor()", jagged),
]
ARGUMENTS = [(function, name) for function, make in CALLS.items() for name in vars(make()) if name != "scale"]


@pytest.mark.scorecard(13)
@pytest.mark.parametrize(("error", "shows", "change"), [row[1:] for row in KINDS], ids=[row[0] for row in KINDS])
@pytest.mark.parametrize(("function", "argument"), ARGUMENTS, ids=[".".join(pair) for pair in ARGUMENTS])
def test_refused_in_every_position(compiled, figure, function, argument, error, shows, change):
    good = CALLS[function]()
    tensors = in_torch(good)
    call = {**tensors, argument: change(tensors[argument])}
    method = getattr(compiled(SPEC), function)
    assert_refused(lambda: method(**call), error, argument, shows, vars(good).values())
    figure("kinds", 1)


@pytest.mark.scorecard(13)
@pytest.mark.parametrize(("error", "shows", "change"), [row[1:] for row in KINDS], ids=[row[0] for row in KINDS])
def test_refused_by_plan(compiled, figure, error, shows, change):
    lens = torch.tensor([9, 0, 20], dtype=torch.int32)
    assert_refused(lambda: compiled(SPEC).plan(change(lens)), error, "context_lens", shows, [])
    figure("kinds", 1)


FLOATING = [pair for pair in ARGUMENTS if pair[1] not in ("block_table", "context_lens", "slot_mapping")]


@pytest.mark.scorecard(13)
@pytest.mark.parametrize("make", [torch.Tensor.requires_grad_, torch.nn.Parameter, lambda t: t.requires_grad_() * 1])
@pytest.mark.parametrize(("function", "argument"), FLOATING, ids=[".".join(pair) for pair in FLOATING])
def test_what_is_to_have_a_gradient(compiled, figure, function, argument, make):
    """Refused while gradients are recorded, since this library has none to give; good otherwise."""
    good = CALLS[function]()
    tensors = in_torch(good)
    call = {**tensors, argument: make(tensors[argument].clone())}
    method = getattr(compiled(SPEC), function)
    assert_refused(lambda: method(**call), V, argument, "gradient detach() torch.no_grad()", vars(good).values())
    with torch.no_grad():
        method(**call)
    figure("kinds", 1)


class Named(torch.Tensor):
    """A class of the user's, with memory as any tensor."""


GOOD = {
    "subclass": lambda t: t.as_subclass(Named),
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "made_in_inference_mode": lambda t: torch.inference_mode()(torch.clone)(t),
    "copied_when_it_is_written": torch._lazy_clone,
    "resolved": lambda t: torch._neg_view(-t).resolve_neg(),
}


@pytest.mark.parametrize("change", GOOD.values(), ids=GOOD)
def test_what_is_as_good_as_any_other(compiled, change):
    module = compiled(SPEC)
    expected, expected_lse = module.decode(**vars(decode_call()))
    tensors = {name: change(value.clone()) for name, value in in_torch(decode_call()).items() if value is not None}
    out, lse = module.decode(**tensors)
    assert out is tensors["out"]
    assert_same_bits(out.detach().numpy(), expected)
    assert_same_bits(lse.detach().numpy(), expected_lse)
    new, new_lse = module.decode(**tensors | {"out": None, "lse": None}, return_lse=True)
    assert isinstance(new, torch.Tensor)
    assert_same_bits(new.detach().numpy(), expected)
    assert_same_bits(new_lse.detach().numpy(), expected_lse)
    call = in_torch(append_call())
    module.append_kv(**call)
    changed = {name: change(value.clone()) for name, value in in_torch(append_call()).items()}
    module.append_kv(**changed)
    for name in ("key_cache", "value_cache"):
        assert_same_bits(changed[name].detach().numpy(), call[name].numpy())


@pytest.mark.scorecard(13)
@pytest.mark.parametrize("transform", ["vmap", "grad", "functionalize"])
def test_inside_of_a_transform(compiled, figure, transform):
    """torch.func gives its functions tensors that stand for others."""
    tensors = in_torch(decode_call()) | {"out": None, "lse": None}
    query = tensors["query"]

    def attend(one):
        return compiled(SPEC).decode(**tensors | {"query": one}).sum()

    with pytest.raises(ValueError, match=r"^query: expected a tensor (with memory|that needs no gradient), got "):
        getattr(torch.func, transform)(attend)(query[None] if transform == "vmap" else query)
    figure("kinds", 1)


def test_in_compiled_code(compiled):
    """The graph is broken there, and goes on behind."""
    module = compiled(SPEC)
    arguments = list(in_torch(decode_call()).values())[:5]

    def model(query, *others):
        return module.decode(query + 0, *others) * 2

    torch._dynamo.reset()
    found = torch.compile(model, backend="eager")(*arguments)
    assert_same_bits(found.numpy(), model(*arguments).numpy())
