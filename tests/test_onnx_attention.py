"""Cases of ONNX's backend suite for its operator Attention, against the outputs that the suite has for them.

A query token is a sequence of decode, several of a batch read the same blocks, and each has the context that causality,
padding and the right side of a window leave it. The left side is the spec's window, or a mask_mod where the query is
not at the last position that it sees. A boolean attn_mask is a mask_mod, another is a score_mod that adds it, and both
read it as one of `inputs`. A row that sees nothing is 0 there and here, whether by a mask, by -inf in a bias or by
causality; lse is -inf then. Keys and values go into the paged cache by append_kv, which has to make of it what ONNX
calls present_key and present_value. Decode has no output for qk_matmul_output, but returns the logarithm of the sum of
its exponentials as lse, and its softmax as out where values are those of a unit matrix.

Where the queries of a batch are the last tokens of its keys, or nothing goes by their positions, attend takes the case
in one call: is_causal is its causal, and the right side of a window a mask_mod of a call that is not causal.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pa_compiler.verification.comparison import compare
from pa_compiler.verification.tolerances import lse_bound, out_bound

pytest.importorskip("onnx", reason="onnx is not installed: its backend suite's cases of Attention are not run")

from onnx_cases import Rows, collect, rows
from onnx_sequences import Sequences

CASES, EXPANDED = collect()
BY_ATTEND = {name: Sequences(case) for name, case in CASES.items()}
LEFT_OUT = {"_expanded": "the case of the name before it, with the operator written as a graph of primitive ones"}
"""Why cases are not run, by the end of their names."""


def test_all_are_run_but_those_with_a_reason():
    assert (len(CASES), len(EXPANDED)) == (93, 93)
    (end,) = LEFT_OUT
    assert {name + end for name in CASES} == EXPANDED.keys()
    for name, case in CASES.items():  # nothing is lost: inputs and outputs are the same
        ((inputs, outputs),) = EXPANDED[name + end].data_sets
        for mine, theirs in ((case.inputs, inputs), (case.outputs, outputs)):
            assert [each.tobytes() for each in mine.values()] == [each.tobytes() for each in theirs]


def check_scores(compiled, case, made, decode):
    """qk_matmul_output, by what decode returns of scores at that stage."""
    mode = case.attributes.get("qk_matmul_output_mode", 0)
    expected = rows(case.outputs["qk_matmul_output"]).astype(np.float64)
    if mode == 3:
        unit = np.broadcast_to(
            np.eye(expected.shape[2], dtype=made.values.dtype), made.values.shape[:3] + expected.shape[2:]
        )
        spec = dataclasses.replace(made.spec, value_dim=expected.shape[2])
        out, _ = decode(spec, unit, made.context_lens)
        check("out", out, expected, out_bound(spec, made.context_lens, expected, expected), made)
        return
    spec, seen = made.spec, made.context_lens
    if mode < 2:
        softcap = made.spec.softcap if mode else None
        spec = dataclasses.replace(made.spec, score_mod=None, mask_mod=None, inputs={}, window=None, softcap=softcap)
        seen = made.lengths[made.batch].astype(np.int32)
    _, lse = decode(spec, made.values, seen)
    wanted = np.logaddexp.reduce(expected, axis=2)
    check("lse", lse, wanted, lse_bound(spec, wanted), made)


def check(name, actual, expected, bound, made):
    _, wrong = compare(name, actual, expected, bound, made.context_lens)
    assert not wrong, wrong


@pytest.mark.parametrize("name", CASES)
def test_case(compiled, name):
    case = CASES[name]
    made = Rows(case)

    def decode(spec, values, context_lens):
        module = compiled(spec)
        *caches, table = made.caches(module, values)
        if values is made.values:
            for wanted, cache in zip(("present_key", "present_value"), caches, strict=True):
                if wanted in case.outputs:
                    assert made.present(cache, table).tobytes() == case.outputs[wanted].tobytes()
        inputs = {"inputs": made.inputs} if spec.inputs else {}
        scale = case.attributes.get("scale")
        return module.decode(made.query, *caches, table[made.batch], context_lens, scale, return_lse=True, **inputs)

    out, lse = decode(made.spec, made.values, made.context_lens)
    expected = rows(case.by_head("Y")).astype(np.float64)
    magnitude = expected  # of values that are positive
    assert (made.values >= 0).all()
    check("out", out, expected, out_bound(made.spec, made.context_lens, expected, magnitude), made)
    assert ((expected == 0).all(axis=2) == np.isneginf(lse)).all()
    if "qk_matmul_output" in case.outputs:
        check_scores(compiled, case, made, decode)


def test_what_attend_cannot_express_has_a_reason():
    reasons = [each.reason for each in BY_ATTEND.values()]
    assert reasons.count("") == 70
    assert reasons.count("its query tokens are not the last tokens of their sequence") == 19
    assert reasons.count("more query tokens than the sequence has tokens") == 4


def cases_of_attend():
    """The others; those of three axes, which differ in their layout alone, with `-m slow`."""
    for name, made in BY_ATTEND.items():
        if not made.reason:
            yield pytest.param(name, marks=pytest.mark.slow if made.spec.kv_layout == "NHD" else ())


@pytest.mark.parametrize("name", cases_of_attend())
def test_case_by_attend(compiled, name):
    case, made = CASES[name], BY_ATTEND[name]
    out, lse = made.attend(case, compiled(made.spec, attend=True))
    expected = rows(case.by_head("Y")).astype(np.float64)
    _, wrong = compare("out", out, expected, out_bound(made.spec, made.row_lens, expected, expected), made.row_lens)
    assert not wrong, wrong
    assert ((expected == 0).all(axis=2) == np.isneginf(lse)).all()
