"""block_table as a pair (indptr, indices): the tests of decode and attend on pairs, and bad pairs."""

from __future__ import annotations

import numpy as np
import pytest
import test_attend
import test_attend_masks
import test_attend_staged
import test_decode
from block_pairs import OnPairs, sampled
from inputs import make_inputs
from ragged_inputs import make_ragged
from specs import BASE, SPECS, every_pipeline
from tolerances import assert_same_bits

from pa_compiler import reference
from pa_compiler.verification.inputs import as_pair


@pytest.fixture
def compiled(compiled):
    """As the fixture of that name, with modules that are given pairs."""
    return lambda *arguments, **options: OnPairs(compiled(*arguments, **options))


class TestDecode:
    """tests/test_decode.py."""


class TestAttend:
    """tests/test_attend.py."""


class TestAttendStaged:
    """tests/test_attend_staged.py."""


class TestAttendMasks:
    """Of tests/test_attend_masks.py what has ids in its tables that may not be looked at."""

    test_ids = staticmethod(sampled(test_attend_masks)["test_ids_between_what_is_seen_are_not_looked_at"])


for holder, tests in ((TestDecode, test_decode), (TestAttend, test_attend), (TestAttendStaged, test_attend_staged)):
    for name, test in sampled(tests).items():
        setattr(holder, name, staticmethod(test))


LENGTHS = [0, 5, 17, 2500, 40, 0, 9]


@every_pipeline
@pytest.mark.parametrize("name", ["float32", "bfloat16_packed"])
def test_the_bits_are_those_of_a_table(compiled, name, pipeline):
    """Of either type of index, with entries past what lengths need that may be anything, at ends of rows and of all."""
    on_pairs, inputs = compiled(SPECS[name], pipeline), make_inputs(SPECS[name], LENGTHS)
    module = on_pairs._module
    expected = module.decode(*inputs.arguments, return_lse=True)
    indptr, indices = as_pair(inputs.block_table, inputs.context_lens, module.spec.block_size)
    indices = np.append(indices, [2**31 - 1, -7]).astype(np.int32)
    for index in (np.int32, np.int64):
        for other in (np.int32, np.int64):
            given = inputs.replace(block_table=(indptr.astype(index), indices.astype(other)))
            for one, table in zip(module.decode(*given.arguments, return_lse=True), expected, strict=True):
                assert_same_bits(one, table)


@every_pipeline
def test_attend_has_the_bits_of_a_table(compiled, pipeline):
    module = compiled(BASE, pipeline, attend=True)
    ragged = make_ragged(BASE, [(3, 40), (0, 9), (1, 300), (33, 33)])
    for one, table in zip(ragged.attend(module), ragged.attend(module._module), strict=True):
        assert_same_bits(one, table)


def test_the_reference_takes_pairs():
    inputs = make_inputs(BASE, LENGTHS)
    pair = as_pair(inputs.block_table, inputs.context_lens, BASE.block_size)
    expected = reference.decode(*inputs.arguments)
    assert_same_bits(reference.decode(*inputs.replace(block_table=pair).arguments), expected)


def test_nothing_in_a_pair(compiled):
    module = compiled(BASE)._module
    for batch in (0, 3):
        inputs = make_inputs(BASE, [0] * batch)
        pair = np.zeros(batch + 1, np.int64), np.zeros(0, np.int32)
        assert not module.decode(*inputs.replace(block_table=pair).arguments).any()


def changed(array, at, value):
    array = array.copy()
    array[at] = value
    return array


# id, error, message, what is given in place of (indptr, indices)
BAD = [
    ("begins_late", ValueError, r"block_table\[0\]: expected 0 first, got 1", lambda p, i: (changed(p, 0, 1), i)),
    ("begins_below", ValueError, r"block_table\[0\]: expected 0 first, got -1", lambda p, i: (changed(p, 0, -1), i)),
    ("falls", ValueError, r"block_table\[0\]: expected numbers that never fall, got 1 after 2 at position 2",
     lambda p, i: (changed(p, 2, 1), i)),
    ("beyond", ValueError, r"block_table\[0\]: expected .* up to 6, .* block_table\[1\], got 7 at position 3",
     lambda p, i: (changed(p, 3, 7), i)),
    ("int64_beyond", ValueError, r"block_table\[0\]: expected .* up to 6, .*, got 4294967298 at position 1",
     lambda p, i: (changed(p.astype(np.int64), 1, 2**32 + 2), i)),
    ("too_few", ValueError, r"context_lens: expected a length from 0 to 5 for sequence 0, got 9",
     lambda p, i: (changed(p, 1, 1), i)),
    ("count", ValueError, r"block_table\[0\]: expected shape \[4\], got \[3\]", lambda p, i: (p[1:], i)),
    ("rank", ValueError, r"block_table\[1\]: expected shape \[n\], got \[1, 6\]", lambda p, i: (p, i[None])),
    ("strided", ValueError, r"block_table\[1\]: expected a contiguous last axis", lambda p, i: (p, i.repeat(2)[::2])),
    ("dtype", TypeError, r"block_table\[0\]: expected dtype int32 or int64, got int16",
     lambda p, i: (p.astype("i2"), i)),
    ("indices_dtype", TypeError, r"block_table\[1\]: .* got float32", lambda p, i: (p, i.astype(np.float32))),
    ("list", TypeError, r"block_table\[1\]: expected an array with DLPack, got list", lambda p, i: (p, i.tolist())),
    ("none", TypeError, r"block_table\[0\]: expected an array with DLPack, got NoneType", lambda p, i: (None, i)),
    ("three", TypeError, r"block_table: expected .* \(indptr, indices\), got a tuple of 3", lambda p, i: (p, i, i)),
    ("id", IndexError, r"block_table: expected a block id in \[0, 9\), got 9 for sequence 2 at position 2",
     lambda p, i: (p, changed(i, 4, 9))),
    ("negative_id", IndexError, r"block_table: .* got -1 for sequence 0 at position 0",
     lambda p, i: (p, changed(i, 0, -1))),
]  # fmt: skip


@pytest.mark.parametrize("call", ["decode", "attend"])
@pytest.mark.parametrize(("error", "message", "given"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_pairs(compiled, call, error, message, given):
    module, inputs = compiled(BASE, attend=True)._module, make_inputs(BASE, [9, 0, 18])  # 2, 0 and 4 blocks, 3 spare
    indptr, indices = (
        np.array([0, 2, 2, 6], np.int32),
        np.concatenate([inputs.block_table[0, :2], inputs.block_table[2, :4]]),
    )
    query, *caches, _, context_lens = inputs.arguments
    starts = (np.array([0, 1, 1, 2]),) if call == "attend" else ()
    query = query[::2] if starts else query
    out = np.full(query.shape, np.nan, np.float32)
    with pytest.raises(error, match=f"^{message}"):
        getattr(module, call)(query, *caches, given(indptr, indices), context_lens, *starts, out=out)
    assert np.isnan(out).all()
