"""Operators of torch: what torch asks of one, whole graphs, the bits of the module's own calls, and bad arguments."""

from __future__ import annotations

import copy
import pickle

import pytest
from inputs import make_inputs
from ragged_inputs import make_ragged
from specs import SPECS
from test_arrays import as_torch

from pa_compiler import PagedAttentionSpec

torch = pytest.importorskip("torch", reason="torch is not installed: its operators are not tested")

from pa_compiler.integrations.torch import Operators  # noqa: E402  (needs torch)

BFLOAT16 = PagedAttentionSpec(6, 2, 32, 16, "bfloat16", "float32")
SCORED = PagedAttentionSpec(
    *(4, 2, 16, 8, "float32"),
    alibi=True,
    sinks=True,
    score_mod=lambda score, batch, head, query_pos, key_pos, *, bias: score + bias[head],
    inputs={"bias": ("float32", (4,))},
)
LATENT = PagedAttentionSpec(4, 1, 24, 8, "float32", value_dim=16, shared_kv=True)
every_spec = pytest.mark.parametrize("spec", [BFLOAT16, SCORED, LATENT], ids=["bfloat16", "scored", "latent"])
torch_ops = torch.ops.pa_compiler


@pytest.fixture
def operators(compiled, spec):
    return Operators(compiled(spec, attend=True, merge_states=True))


def tensors(spec, ragged=False):
    """(arguments, keywords) of decode or attend, and (key, value, slots) of append_kv."""
    if ragged:
        call = make_ragged(spec, [(3, 9), (1, 20), (0, 4), (5, 5)], poison="none")
        arguments, inputs = call.arguments, call.inputs
    else:
        inputs = make_inputs(spec, [5, 17, 0, 30], poison="none")
        arguments = inputs.arguments
    keywords = {name: array for name, array in inputs.heads.items() if name != "inputs"}
    keywords = {name: as_torch(array) for name, array in keywords.items()}
    if spec.inputs:
        keywords["inputs"] = {"bias": torch.linspace(0, 1, 4)}
    arrays = [None if array is None else as_torch(array) for array in arguments]
    key = torch.randn(3, spec.num_kv_heads, spec.head_dim, dtype=arrays[0].dtype)
    value = None if spec.shared_kv else key[..., : spec.result_dim].neg()
    return arrays, keywords, (key, value, torch.tensor([1, 0, 2]))


def parts(spec, count=3, tokens=5):
    """(outs, lses) of parts, of which one is empty."""
    dtype = getattr(torch, spec.result_dtype)
    outs, lses = torch.randn(count, tokens, spec.num_heads, spec.result_dim).to(dtype), torch.randn(count, tokens, 1)
    lses = lses.repeat(1, 1, spec.num_heads)
    outs[1, 2], lses[1, 2] = torch.nan, -torch.inf
    return outs, lses


def by_schema(keywords):
    return {name: [*each.values()] if name == "inputs" else each for name, each in keywords.items()}


@every_spec
@pytest.mark.parametrize("name", ["decode", "attend"])
def test_opcheck(operators, spec, name):
    arrays, keywords, _ = tensors(spec, ragged=name == "attend")
    given = by_schema(keywords)
    out = torch.empty(len(arrays[0]), spec.num_heads, spec.result_dim, dtype=getattr(torch, spec.result_dtype))
    new, writing = getattr(torch_ops, name).default, getattr(torch_ops, f"{name}_out").default
    torch.library.opcheck(new, (operators.handle, *arrays), given)
    torch.library.opcheck(new, (operators.handle, *arrays, 0.5), {"return_lse": True, **given})
    torch.library.opcheck(writing, (operators.handle, *arrays, out), given)
    torch.library.opcheck(writing, (operators.handle, *arrays, out, out[..., 0].float().contiguous(), 0.5), given)


@every_spec
def test_opcheck_of_merge_states(operators, spec):
    outs, lses = parts(spec)
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    new, writing = torch_ops.merge_states.default, torch_ops.merge_states_out.default
    for options in ({}, {"return_lse": True}):
        torch.library.opcheck(new, (operators.handle, outs, lses), options)
    for written in ((out,), (out, lse), (out.flatten(1), lse)):
        torch.library.opcheck(writing, (operators.handle, outs, lses, *written))


@every_spec
def test_opcheck_of_append_kv(operators, spec):
    arrays, _, (key, value, slots) = tensors(spec)
    torch.library.opcheck(torch_ops.append_kv.default, (operators.handle, key, value, *arrays[1:3], slots))


def model(calls, arrays, ragged, keywords, new, of_parts):
    """A step in the calls of a module or of operators: sums of powers of two, which any backend computes alike."""
    (query, key_cache, value_cache, *indices), (tokens, *_, starts) = arrays, ragged
    key, value, slots = new
    calls.append_kv(key * 2, value, key_cache, value_cache, slots)
    out, lse = calls.decode(query * 2, key_cache, value_cache, *indices, return_lse=True, **keywords)
    second = calls.decode(query, key_cache, value_cache, *indices, 0.25, **keywords)
    written, written_lse = torch.empty_like(out), torch.empty_like(lse)
    calls.decode(query, key_cache, value_cache, *indices, out=written, lse=written_lse, **keywords)
    calls.decode(query, key_cache, value_cache, *indices, out=out, **keywords)
    third = calls.attend(tokens, *ragged[1:5], starts, causal=False, **keywords)
    fourth, fourth_lse = calls.attend(tokens, *ragged[1:5], starts, return_lse=True, **keywords)
    calls.attend(tokens, *ragged[1:5], starts, out=fourth, **keywords)
    outs, lses = of_parts
    merged, merged_lse = calls.merge_states(outs * 2, lses, return_lse=True)
    fifth = calls.merge_states(outs, lses)
    calls.merge_states(outs, lses, out=merged)
    results = (out * 2, lse, second, written, written_lse * 2, third, fourth, fourth_lse, merged, merged_lse * 2, fifth)
    return *results, *calls.merge_states(outs * 4, lses, lse=merged_lse.clone())


def copied(arrays):
    return [each if each is None else each.clone() for each in arrays]


@every_spec
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.filterwarnings("ignore"))])
def test_whole_graphs_have_the_bits_of_the_module(operators, spec, backend):
    if backend == "inductor" and spec is not BFLOAT16:
        pytest.skip("the backend that generates code takes long, and asks one spec")
    arrays, keywords, new = tensors(spec)
    ragged, _, _ = tensors(spec, ragged=True)
    expected_arrays, found_arrays = copied(arrays), copied(arrays)
    of_parts = parts(spec)
    expected = model(operators.module, expected_arrays, ragged, keywords, new, of_parts)
    torch._dynamo.reset()
    graph = torch.compile(model, fullgraph=True, backend=backend)
    with torch._inductor.config.patch({"cpp.cxx": (None, "g++")}):  # and not what warns of the hosts' code
        found = graph(operators, found_arrays, ragged, keywords, new, of_parts)
    for one, other in zip([*expected, *expected_arrays], [*found, *found_arrays], strict=True):
        assert one is other is None or (one.dtype == other.dtype and torch.equal(one, other))


@every_spec
def test_eager_calls_have_the_bits_of_the_module(operators, spec):
    arrays, keywords, new = tensors(spec)
    ragged, _, _ = tensors(spec, ragged=True)
    of_parts = parts(spec)
    expected = model(operators.module, copied(arrays), ragged, keywords, new, of_parts)
    found = model(operators, copied(arrays), ragged, keywords, new, of_parts)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("spec", [BFLOAT16], ids=["bfloat16"])
def test_shapes_of_any_batch_are_one_graph(operators, spec):
    """Fake tensors have symbols for extents; out and lse follow them."""
    arrays, _, _ = tensors(spec)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    graph = torch.compile(lambda *each: operators.decode(*each), fullgraph=True, backend=counter, dynamic=True)
    for batch in (3, 2):
        rows = [arrays[0][:batch], *arrays[1:3], arrays[3][:batch], arrays[4][:batch]]
        assert torch.equal(graph(*rows), operators.module.decode(*rows))
    assert counter.frame_count == 1


@pytest.mark.parametrize("spec", [BFLOAT16], ids=["bfloat16"])
def test_writes_are_counted(operators, spec):
    (query, *caches), _, (key, value, slots) = tensors(spec)
    versions = [each._version for each in caches[:2]]
    operators.append_kv(key, value, *caches[:2], slots)
    assert [each._version for each in caches[:2]] == [each + 1 for each in versions]
    out = torch.empty(query.shape)
    assert operators.decode(query, *caches, out=out) is out
    assert out._version == 1


@pytest.mark.parametrize("spec", [BFLOAT16], ids=["bfloat16"])
def test_handles(compiled, operators, spec):
    """They are the library's, so that those of a pickle and of another process are the same."""
    again = pickle.loads(pickle.dumps(operators))
    assert again.handle == operators.handle == compiled(spec, attend=True, merge_states=True).checksum
    copied_module = copy.copy(operators.module)
    copied_module.num_threads = 1
    named = Operators(copied_module, "one thread")
    assert pickle.loads(pickle.dumps(named)).module.num_threads == 1
    arrays, _, _ = tensors(spec)
    expected = operators.module.decode(*arrays)
    assert torch.equal(torch_ops.decode("one thread", *arrays)[0], expected)
    assert torch.equal(again.decode(*arrays), expected)


BAD = [  # id, error, what its message begins with, what is done to a call of decode
    ("gradient", ValueError, "query: expected a tensor that needs no gradient", lambda c: c[0].requires_grad_()),
    ("id_over", IndexError, "block_table: expected a block id in ", lambda c: c[3].fill_(99)),
    ("axes", ValueError, "query: expected ", lambda c: c.__setitem__(0, c[0][0])),
    ("dtype", TypeError, "query: expected ", lambda c: c.__setitem__(0, c[0].half())),
    (
        "device",
        ValueError,
        "context_lens: expected a tensor on device cpu, got one on meta",
        lambda c: c.__setitem__(4, c[4].to("meta")),
    ),
    ("scale", TypeError, "scale: expected a number, got 'x'", lambda c: c.append("x")),
]


@pytest.mark.parametrize("spec", [BFLOAT16], ids=["bfloat16"])
@pytest.mark.parametrize(("error", "begins", "change"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_arguments(operators, spec, error, begins, change):
    arrays, _, _ = tensors(spec)
    change(arrays)
    with pytest.raises(error, match=rf"^{begins}"):
        operators.decode(*arrays)


@pytest.mark.parametrize("spec", [SCORED], ids=["scored"])
def test_bad_inputs(operators, spec):
    arrays, keywords, _ = tensors(spec)
    with pytest.raises(TypeError, match=r"^inputs: expected arrays named bias, got none"):
        operators.decode(*arrays, **keywords | {"inputs": {}})
    with pytest.raises(TypeError, match=r"^inputs: expected 1 tensors, got 0"):
        torch_ops.decode(operators.handle, *arrays, **keywords | {"inputs": []})


@pytest.mark.parametrize("spec", [BFLOAT16], ids=["bfloat16"])
def test_a_gradient_is_refused_in_graphs(operators, spec):
    arrays, _, _ = tensors(spec)
    torch._dynamo.reset()
    graph = torch.compile(lambda *each: operators.decode(*each), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="query: expected a tensor that needs no gradient"):
        graph(arrays[0].requires_grad_(), *arrays[1:])


@pytest.mark.parametrize("spec", [BFLOAT16], ids=["bfloat16"])
def test_bad_parts(compiled, operators, spec):
    outs, lses = parts(spec)
    for bad, options in ((outs[0, 0, 0], {}), (outs[0, 0, 0], {"return_lse": True}), (outs[0], {"lse": lses[0]})):
        with pytest.raises(ValueError, match=r"^outs: expected "):
            operators.merge_states(bad, lses, **options)
    with pytest.raises(TypeError, match=r"^lses: expected "):
        operators.merge_states(outs, lses.double())
    with pytest.raises(NotImplementedError, match=r"^merge_states: expected a module compiled with merge_states=True"):
        Operators(compiled(spec, attend=True)).merge_states(outs, lses)


def test_bad_handles(compiled):
    arrays, _, _ = tensors(BFLOAT16)
    with pytest.raises(ValueError, match=r"^module: expected the handle .* got 'none'"):
        torch_ops.decode("none", *arrays)
    with pytest.raises(TypeError, match=r"^module: expected a Module, got str"):
        Operators("none")
    with pytest.raises(TypeError, match=r"^name: expected a string that is not empty, or None, got 3"):
        Operators(compiled(SPECS["float32"]), 3)
