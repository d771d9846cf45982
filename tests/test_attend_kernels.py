"""The kernels of attend, for several query tokens of a sequence, against float64."""

from __future__ import annotations

import functools

import pytest
from attend_kernels import Kernels, assert_close, make_call

from pa_compiler import PagedAttentionSpec as Spec

LENS = [(1, 1), (2, 2), (7, 30), (0, 5), (33, 33), (40, 200), (3, 300)]
"""(query tokens, context) of sequences around the ends of blocks, of tiles of rows and of steps."""


@functools.lru_cache(maxsize=4)
def kernels(spec):
    """The kernels of a spec, compiled once for the tests that follow each other."""
    return Kernels(spec)


def check(spec, lens=LENS, *, seed=0, inputs=None, poison="nan", attend=None, **fields):
    call = make_call(spec, lens, seed=seed, inputs=inputs, poison=poison, **fields)
    out, lse = kernels(spec).attend(call, **attend or {})
    assert_close(spec, call, out, lse)
    return out, lse


@pytest.mark.parametrize("heads", [(8, 2), (4, 4), (16, 1), (17, 1), (3, 1)], ids=str)
def test_causal_attention_is_near_float64(heads):
    check(Spec(*heads, 64, 16, "float32"))
