"""Inputs for attend_shared_prefix: groups of sequences, with poison wherever the call does not look."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
from inputs import DTYPES, Inputs, poison_value
from ragged_inputs import Ragged, assert_near_float64, make_ragged

from pa_compiler.verification.inputs import GARBAGE_IDS


@dataclasses.dataclass(frozen=True)
class Shared:
    """The arrays of one call. whole is the call of attend whose rows have the prefixes' blocks."""

    whole: Ragged
    prefix_table: np.ndarray
    prefix_len: np.ndarray
    block_table: np.ndarray
    prefix_start_loc: np.ndarray

    @property
    def arguments(self) -> dict[str, Any]:
        """By their names."""
        query, key_cache, value_cache, _, context_lens, query_start_loc = self.whole.arguments
        names = ("prefix_table", "prefix_len", "block_table", "prefix_start_loc")
        arrays = {"query": query, "key_cache": key_cache, "value_cache": value_cache}
        arrays |= {name: getattr(self, name) for name in names}
        return arrays | {"context_lens": context_lens, "query_start_loc": query_start_loc}

    def attend(self, module, **options):
        """(out, lse) of a module, written over NaN."""
        query = self.whole.query
        out = np.full((*query.shape[:2], module.spec.result_dim), np.nan, DTYPES[module.spec.result_dtype])
        lse = np.full(query.shape[:2], np.nan, np.float32)
        given = self.arguments | self.whole.inputs.heads | options
        found = module.attend_shared_prefix(**given, out=out, lse=lse)
        assert found[0] is out
        assert found[1] is lse
        return out, lse

    def take(self, prefix, sequences) -> Shared:
        """Some sequences of one prefix alone."""
        one = {"prefix_table": self.prefix_table[[prefix]], "prefix_len": self.prefix_len[[prefix]]}
        starts = np.array([0, len(sequences)], self.prefix_start_loc.dtype)
        return Shared(
            self.whole.take(sequences), block_table=self.block_table[sequences], prefix_start_loc=starts, **one
        )


def make_shared(spec, groups, *, seed=0, poison="nan", index=np.int32) -> Shared:
    """Draw a call.

    Args:
        spec: The PagedAttentionSpec.
        groups: For each prefix its blocks, and (query tokens, tokens of its own) of each of its sequences.
        seed: Seed of the data.
        poison: As for make_inputs, for all slots that no sequence has.
        index: The dtype of all indices.
    """
    size = spec.block_size
    sequences = [(count, blocks * size + own) for blocks, of_group in groups for count, own in of_group]
    starts = np.cumsum([0, *(len(of_group) for _, of_group in groups)]).astype(index)
    ragged = make_ragged(spec, sequences, seed=seed, poison=poison, index=index)
    lens = np.array([blocks * size for blocks, _ in groups], index)
    whole, given = ragged.inputs.block_table.copy(), ragged.inputs.block_table.copy()
    table = np.resize(GARBAGE_IDS, (len(groups), max([0, *(blocks for blocks, _ in groups)]) + 2)).astype(index)
    caches = [None if cache is None else cache.copy() for cache in ragged.inputs.arguments[1:3]]
    for prefix, (begin, end) in enumerate(itertools.pairwise(starts)):
        blocks = groups[prefix][0]
        if begin == end or not blocks:
            continue
        table[prefix, :blocks] = whole[begin, :blocks]
        for cache in caches:  # what the others had of it
            if cache is not None:
                cache[whole[begin + 1 : end, :blocks].reshape(-1)] = poison_value(poison, cache.dtype)
        whole[begin:end, :blocks] = table[prefix, :blocks]
        given[begin:end, :blocks] = np.resize(GARBAGE_IDS, (end - begin, blocks))
    inputs: Inputs = ragged.inputs.replace(block_table=whole, key_cache=caches[0], value_cache=caches[1])
    return Shared(dataclasses.replace(ragged, inputs=inputs), table, lens, given, starts)


def check(module, groups, **options) -> None:
    """A drawn call beside float64."""
    shared = make_shared(module.spec, groups, **options)
    assert_near_float64(module.spec, shared.whole, *shared.attend(module))
