"""Modules that are given their block tables as pairs of indptr and indices, for tests that give them tables."""

from __future__ import annotations

import types

import numpy as np
import pytest

from pa_compiler.verification.inputs import as_pair


class OnPairs:
    """A Module whose decode and attend take a table and hand on a pair: with int64 in one of them, or both."""

    def __init__(self, module):
        vars(self)["_module"] = module

    def __getattr__(self, name):
        return getattr(self._module, name)

    def __setattr__(self, name, value):
        setattr(self._module, name, value)

    def decode(self, query, key_cache, value_cache, block_table, context_lens, *others, **options):
        """As Module.decode."""
        pair = self._pair(block_table, context_lens)
        return self._module.decode(query, key_cache, value_cache, pair, context_lens, *others, **options)

    def attend(self, query, key_cache, value_cache, block_table, context_lens, *others, **options):
        """As Module.attend."""
        pair = self._pair(block_table, context_lens)
        return self._module.attend(query, key_cache, value_cache, pair, context_lens, *others, **options)

    def _pair(self, block_table, context_lens):
        indptr, indices = as_pair(block_table, context_lens, self.spec.block_size)
        wide = len(context_lens) % 4
        return indptr.astype(np.int64 if wide & 1 else np.int32), indices.astype(np.int64 if wide & 2 else np.int32)


def sampled(tests):
    """The tests of a module by name, with the first and the last of what each mark parametrizes them by."""
    return {
        name: _sampled(test)
        for name, test in vars(tests).items()
        if name.startswith("test_") and not any(mark.name == "slow" for mark in getattr(test, "pytestmark", ()))
    }


def _sampled(test):
    copy = types.FunctionType(test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__)
    copy.__doc__ = test.__doc__
    copy.pytestmark = [_first_and_last(mark) for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
    return copy


def _first_and_last(mark):
    names, values, *_ = mark.args
    values, ids = list(values), mark.kwargs.get("ids")
    step = max(len(values) - 1, 1)
    ids = list(ids)[::step] if ids is not None and not callable(ids) else ids
    return pytest.mark.parametrize(names, values[::step], ids=ids).mark
