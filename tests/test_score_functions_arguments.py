"""score_mod, mask_mod and inputs: what a spec takes, what decode takes for them, and what both refuse by name."""

from __future__ import annotations

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from specs import BASE

import pa_compiler
from pa_compiler import PagedAttentionSpec, dependencies, store
from pa_compiler.runtime import manifest
from pa_compiler.score import CONSTANT_BYTES, Constant, Function, Input, Term
from pa_compiler.verification.functions import with_functions

SIZES = (4, 2, 16, 8, "float32")
BIAS = {"bias": ("bfloat16", (4, 64)), "on": ("bool", ("batch",))}


def biased(score, batch, head, query_pos, key_pos, *, bias):
    return score + bias[head, np.minimum(query_pos - key_pos, 63)]


def switched(batch, head, query_pos, key_pos, *, on):
    return on[batch] | (key_pos == query_pos)


def recent(batch, head, query_pos, key_pos):
    return query_pos - key_pos < 5


SPEC = PagedAttentionSpec(*SIZES, score_mod=biased, mask_mod=switched, inputs=BIAS)


def constant(values):
    """A score_mod by hand, with a tensor that it closes over."""
    name = f"table_{abs(hash(values.tobytes())):016x}"[:22]
    index = Term("cast", "int32", (Term("head", "int32"),))
    result = Term("add", "float32", (Term("score", "float32"), Term("element", "float32", (index,), name)))
    return Function(f"score + {name}[head]", result, (Constant(name, "float32", values.shape, values.tobytes()),))


def call_of(spec, batch=2, length=5):
    rng = np.random.default_rng(0)
    caches = rng.standard_normal((2, batch, spec.block_size, spec.num_kv_heads, spec.head_dim), np.float32)
    query = rng.standard_normal((batch, spec.num_heads, spec.head_dim), np.float32)
    return (query, *caches, np.arange(batch, dtype=np.int32)[:, None], np.full(batch, length, np.int32))


def good_inputs(batch=2):
    rng = np.random.default_rng(1)
    return {"bias": rng.standard_normal((4, 64)).astype(ml_dtypes.bfloat16), "on": np.arange(batch) % 2 == 0}


BAD_INPUTS = [
    ("no_mapping", [("bias", "float32")], TypeError, "inputs: expected a mapping"),
    ("name", {3: ("float32", (4,))}, TypeError, "inputs: expected names that are strings, got 3"),
    ("keyword", {"if": ("float32", (4,))}, ValueError, "inputs: .*'if'"),
    ("argument", {"head": ("float32", (4,))}, ValueError, "inputs: .*'head'"),
    ("not_ascii", {"été": ("float32", (4,))}, ValueError, "inputs: .*'été'"),
    ("no_shape", {"bias": "float32"}, TypeError, r"inputs\['bias'\]: expected \(dtype, shape\), got 'float32'"),
    ("dtype", {"bias": ("float64", (4,))}, ValueError, r"inputs\['bias'\]: expected dtype .*, got 'float64'"),
    ("dtype_kind", {"bias": (np.float32, (4,))}, TypeError, r"inputs\['bias'\]: expected a dtype that is a string"),
    ("shape_kind", {"bias": ("float32", 4)}, TypeError, r"inputs\['bias'\]: expected a shape that is a tuple, got 4"),
    ("extent_kind", {"bias": ("float32", (4.0,))}, TypeError, r"inputs\['bias'\]: expected extents .*, got 4.0"),
    ("bool_extent", {"bias": ("float32", (True,))}, TypeError, r"inputs\['bias'\]: expected extents .*, got True"),
    ("zero", {"bias": ("float32", (4, 0))}, ValueError, r"inputs\['bias'\]: expected extents .*, got 0"),
    ("word", {"bias": ("float32", ("heads",))}, ValueError, r"inputs\['bias'\]: expected extents .*, got 'heads'"),
    ("no_axes", {"bias": ("float32", ())}, ValueError, r"inputs\['bias'\]: expected 1 to 8 axes, got 0"),
    ("nine_axes", {"bias": ("float32", (1,) * 9)}, ValueError, r"inputs\['bias'\]: expected 1 to 8 axes, got 9"),
    ("large", {"bias": ("float32", (1 << 16, 1 << 15))}, ValueError, r"up to 2\*\*31 - 1 elements, got 2147483648"),
    ("unread", BIAS | {"other": ("int32", (3,))}, ValueError, "inputs: .*got other, not read by either"),
    ("too_many", {f"x{i}": ("int32", (3,)) for i in range(33)}, ValueError, "inputs: expected up to 32 arrays, got 33"),
]


@pytest.mark.scorecard(13)
@pytest.mark.parametrize(("inputs", "error", "message"), [pytest.param(*case, id=name) for name, *case in BAD_INPUTS])
def test_a_spec_refuses_inputs_by_name(inputs, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(SPEC, inputs=inputs)


def test_inputs_without_functions_are_refused():
    with pytest.raises(ValueError, match="inputs: expected arrays that score_mod or mask_mod reads, got bias"):
        PagedAttentionSpec(*SIZES, inputs={"bias": ("float32", (4,))})


def test_constants_of_both_functions_count_together():
    half = np.zeros(CONSTANT_BYTES // 8, np.float32)
    first, second = constant(half), constant(half + 1)
    spec = dataclasses.replace(SPEC, score_mod=first, mask_mod=dataclasses.replace(second, text="two"), inputs=())
    assert spec.constants == (*first.constants, *second.constants)
    assert dataclasses.replace(spec, mask_mod=first).constants == first.constants
    more = constant(np.zeros(CONSTANT_BYTES // 8 + 1, np.float32))
    with pytest.raises(
        ValueError, match=f"up to {CONSTANT_BYTES} bytes in all to close over, got {CONSTANT_BYTES + 4}"
    ):
        dataclasses.replace(spec, mask_mod=more)


def test_specs_are_equal_by_what_functions_compute():
    same = dataclasses.replace(SPEC, mask_mod=lambda b, h, q, k, *, on: on[b] | (k == q))
    assert same == SPEC
    assert hash(same) == hash(SPEC)
    assert dataclasses.replace(SPEC, mask_mod=lambda b, h, q, k, *, on: on[b]) != SPEC
    assert dataclasses.replace(SPEC, inputs=BIAS | {"bias": ("float32", (4, 64))}) != SPEC
    assert SPEC.inputs == (Input("bias", "bfloat16", (4, 64)), Input("on", "bool", ("batch",)))
    assert json.loads(json.dumps(SPEC.stated()))["inputs"][1] == ["on", "bool", ["batch"]]
    assert SPEC.score_mod.text in repr(SPEC)
    assert "score_mod" not in repr(BASE)
    assert "inputs" not in repr(BASE)


def key_of(spec):
    return store.key(dependencies.inputs(spec, {"kind": "llvm"}, "fused"))


def test_the_cache_key_has_texts_values_and_shapes():
    ones = PagedAttentionSpec(*SIZES, score_mod=constant(np.ones(4, np.float32)))
    others = [
        dataclasses.replace(SPEC, mask_mod=lambda b, h, q, k, *, on: on[b]),
        dataclasses.replace(SPEC, inputs=BIAS | {"bias": ("bfloat16", (4, 65))}),
        dataclasses.replace(SPEC, inputs=BIAS | {"bias": ("float16", (4, 64))}),
        ones,
        dataclasses.replace(ones, score_mod=constant(np.full(4, 2, np.float32))),
    ]
    keys = [key_of(spec) for spec in (SPEC, *others)]
    assert len(set(keys)) == len(keys)
    assert key_of(dataclasses.replace(SPEC, mask_mod=lambda b, h, q, k, *, on: on[b] | (k == q))) == keys[0]


def test_a_manifest_has_the_texts(compiled, tmp_path):
    module = compiled(SPEC)
    module.save(tmp_path / "pa.so")
    loaded = pa_compiler.load(tmp_path / "pa.so")
    assert loaded.spec == SPEC
    assert loaded.spec.score_mod.source is None
    assert loaded.spec.inputs == SPEC.inputs
    assert manifest.read((tmp_path / "pa.so").read_bytes(), "pa.so").spec == SPEC
    call, inputs = call_of(SPEC), good_inputs()
    assert loaded.decode(*call, inputs=inputs).tobytes() == module.decode(*call, inputs=inputs).tobytes()
    with pytest.raises(TypeError, match="score_mod: expected a function, got the text of one, read from a library: "):
        pa_compiler.compile(loaded.spec)
    with pytest.raises(TypeError, match="score_mod: expected the function that the library was compiled of"):
        loaded.verify(0)
    with pytest.raises(ValueError, match=r"score_mod: expected a function that computes .*, got score"):
        loaded.verify(0, score_mod=lambda score, b, h, q, k: score, mask_mod=switched)
    assert loaded.verify(0, seed=1, score_mod=biased, mask_mod=switched).passed


def test_functions_that_a_spec_has_not_are_refused():
    assert with_functions(SPEC, None, None) == SPEC
    with pytest.raises(TypeError, match="mask_mod: expected None, since the spec has no mask_mod"):
        with_functions(BASE, None, recent)


@pytest.mark.parametrize("pipeline", ["fused", "staged"])
def test_results_are_those_of_the_reference(compiled, pipeline):
    call, inputs = call_of(SPEC), good_inputs()
    functions = {"score_mod": biased, "mask_mod": switched, "inputs": inputs}
    out = compiled(SPEC, pipeline).decode(*call, inputs=inputs)
    assert np.abs(out - pa_compiler.reference.decode(*call, **functions)).max() < 1e-5


V, T = ValueError, TypeError

BAD_ARRAYS = [
    ("none", lambda a: None, T, "inputs: expected arrays named bias, on, got none"),
    ("no_mapping", lambda a: list(a.values()), T, "inputs: expected a mapping of arrays by their names"),
    ("missing", lambda a: {"bias": a["bias"]}, T, "inputs: expected arrays named bias, on, got bias"),
    ("surplus", lambda a: a | {"x": a["on"]}, T, "inputs: expected arrays named bias, on, got bias, on, x"),
    ("no_array", lambda a: a | {"on": [True, False]}, T, r"inputs\['on'\]: expected an array with DLPack, got list"),
    ("none_of_one", lambda a: a | {"on": None}, T, r"inputs\['on'\]: expected an array with DLPack, got NoneType"),
    ("dtype", lambda a: a | {"bias": a["bias"].astype(np.float32)}, T, r"inputs\['bias'\]: .*bfloat16, got float32"),
    ("uint16", lambda a: a | {"bias": a["bias"].view(np.uint16)}, T, r"inputs\['bias'\]: .*bfloat16, got uint16"),
    ("int8", lambda a: a | {"on": a["on"].view(np.int8)}, T, r"inputs\['on'\]: expected dtype bool, got int8"),
    (
        "size",
        lambda a: a | {"bias": a["bias"][:, :63]},
        V,
        r"inputs\['bias'\]: expected shape \[4, 64\], got \[4, 63\]",
    ),
    ("rank", lambda a: a | {"bias": a["bias"].ravel()}, V, r"inputs\['bias'\]: expected shape \[4, 64\], got \[256\]"),
    ("batch", lambda a: a | {"on": np.ones(3, bool)}, V, r"inputs\['on'\]: expected shape \[2\], got \[3\]"),
    ("strided", lambda a: a | {"on": np.ones(4, bool)[::2]}, V, r"inputs\['on'\]: expected elements side by side"),
    (
        "transposed",
        lambda a: a | {"bias": np.ascontiguousarray(a["bias"].T).T},
        V,
        r"inputs\['bias'\]: expected elements side by side in C's order, got shape \[4, 64\] with strides \[1, 4\]",
    ),
]


@pytest.mark.scorecard(13)
@pytest.mark.parametrize(("change", "error", "message"), [pytest.param(*case, id=name) for name, *case in BAD_ARRAYS])
def test_decode_refuses_arrays_by_name(compiled, change, error, message):
    call = call_of(SPEC)
    out = np.full(call[0].shape, 7, np.float32)
    with pytest.raises(error, match=message):
        compiled(SPEC).decode(*call, out=out, inputs=change(good_inputs()))
    assert (out == 7).all()


@pytest.mark.scorecard(13)
def test_inputs_are_refused_where_the_spec_has_none(compiled):
    spec = PagedAttentionSpec(*SIZES, mask_mod=recent)
    call = call_of(spec)
    compiled(spec).decode(*call, inputs={})
    with pytest.raises(TypeError, match="inputs: expected none, since the spec has no inputs, got on"):
        compiled(spec).decode(*call, inputs={"on": np.ones(2, bool)})


@pytest.mark.scorecard(13)
@pytest.mark.parametrize("written", ["out", "lse"])
def test_what_is_written_has_no_byte_of_an_input(compiled, written):
    call = call_of(SPEC)
    given = {"out": np.zeros(call[0].shape, np.float32), "lse": np.zeros(call[0].shape[:2], np.float32)}
    inside = given[written].reshape(-1).view(bool)[5:7]
    with pytest.raises(ValueError, match=rf"{written}: expected memory apart from inputs\['on'\]'s bytes \[5, 7\)"):
        compiled(SPEC).decode(*call, **given, inputs=good_inputs() | {"on": inside})


def test_arrays_begin_anywhere_and_may_be_read_only(compiled):
    call, inputs = call_of(SPEC), good_inputs()
    expected = compiled(SPEC).decode(*call, inputs=inputs)
    moved = np.zeros(1 + inputs["bias"].size, inputs["bias"].dtype)[1:].reshape(4, 64)
    moved[...] = inputs["bias"]
    moved.flags.writeable = False
    assert compiled(SPEC).decode(*call, inputs=inputs | {"bias": moved}).tobytes() == expected.tobytes()


def test_torch_tensors_are_inputs(compiled):
    torch = pytest.importorskip("torch")
    call, inputs = call_of(SPEC), good_inputs()
    tensors = {
        "bias": torch.from_numpy(inputs["bias"].view(np.int16)).view(torch.bfloat16),
        "on": torch.from_numpy(inputs["on"]),
    }
    expected = compiled(SPEC).decode(*call, inputs=inputs)
    assert compiled(SPEC).decode(*call, inputs=tensors).tobytes() == expected.tobytes()
    with pytest.raises(ValueError, match=r"inputs\['bias'\]: expected elements side by side"):
        compiled(SPEC).decode(*call, inputs=tensors | {"bias": tensors["bias"].T.contiguous().T})


def only(field):
    return {name: declared for name, declared in BIAS.items() if (name == "bias") == (field == "score_mod")}
