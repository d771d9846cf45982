"""Modules whose results are changed on the way out, which verify() must notice."""

from __future__ import annotations

import re

import numpy as np

from pa_compiler.verification import verify

SEED = 1
DRAWS = 24


class Broken:
    """A module whose results are changed on the way out; spoil(out, lse or None, arguments) says how."""

    def __init__(self, module, spoil=lambda out, lse, arguments: None):
        self.module, self.spec, self.num_threads, self.spoil = module, module.spec, 1, spoil

    has_attend = has_attend_shared_prefix = has_merge_states = False
    most_query_tokens = None

    def decode(self, *arguments, **options):
        returned = self.module.decode(*arguments, **options)
        self.spoil(*(returned if isinstance(returned, tuple) else (returned, None)), arguments)
        return returned

    def append_kv(self, *arguments):
        self.module.append_kv(*arguments)


class BrokenWithQueries(Broken):
    """One of which calls of attend are changed."""

    has_attend, most_query_tokens = True, None

    def decode(self, *arguments, **options):
        return self.module.decode(*arguments, **options)

    def attend(self, *arguments, **options):
        returned = self.module.attend(*arguments, **options)
        self.spoil(*(returned if isinstance(returned, tuple) else (returned, None)), arguments)
        return returned


class BrokenWithPrefixes(BrokenWithQueries):
    """One of which those with prefixes are."""

    has_attend_shared_prefix = True

    def attend(self, *arguments, **options):
        return self.module.attend(*arguments, **options)

    def attend_shared_prefix(self, *arguments, **options):
        returned = self.module.attend_shared_prefix(*arguments, **options)
        self.spoil(*(returned if isinstance(returned, tuple) else (returned, None)), arguments)
        return returned


class BrokenWithParts(Broken):
    """One whose merge_states forgets a part."""

    has_merge_states = True

    def merge_states(self, outs, lses, **options):
        return self.module.merge_states(outs[:-1] if len(outs) > 1 else outs, lses[: len(lses) - 1 or 1], **options)


class ForgetsATokenOnAppend(Broken):
    def append_kv(self, key, value, key_cache, value_cache, slot_mapping):
        self.module.append_kv(key[1:], value[1:], key_cache, value_cache, slot_mapping[1:])


def one_element(out, lse, arguments):
    out[-1:, -1, -1] += 0.1


def not_a_number(out, lse, arguments):
    out[:1, 0, 0] = np.nan


def empty_is_not_zero(out, lse, arguments):
    out[arguments[4] == 0] = 1e-30


def logarithm_to_base_2(out, lse, arguments):
    if lse is not None:
        lse /= np.float32(np.log(2))


def writes_beside_out(out, lse, arguments):
    if out.base is not None and out.base.shape != out.shape:
        out.base[-1, -1, -1] = out.base[0, 0, 0] = 0


def writes_its_inputs(out, lse, arguments):
    arguments[2][-1] = 0


def raises(out, lse, arguments):
    raise IndexError("block_table: expected less")


def expect_failures(module, says):
    failed = [failure for number in range(DRAWS) for failure in verify.verify(module, seed=SEED, draw=number).failures]
    assert any(re.search(says, failure.message) for failure in failed), failed
