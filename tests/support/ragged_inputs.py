"""Inputs for attend: sequences of any number of query tokens, with poison wherever no query token looks."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from inputs import DTYPES, Inputs, make_inputs

from pa_compiler.verification.comparison import compare, oracle
from pa_compiler.verification.inputs import noise


@dataclasses.dataclass(frozen=True)
class Ragged:
    """The arrays of one call of attend, and what else it is told. inputs has caches, tables and lengths."""

    query: np.ndarray
    inputs: Inputs
    query_start_loc: np.ndarray
    options: dict[str, Any]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arrays in attend's order."""
        return self.query, *self.inputs.arguments[1:], self.query_start_loc

    @property
    def counts(self) -> list[int]:
        return np.diff(self.query_start_loc).tolist()

    def attend(self, module, **options):
        """(out, lse) of a module, written over NaN."""
        shape = (*self.query.shape[:2], module.spec.result_dim)
        out = np.full(shape, np.nan, DTYPES[module.spec.result_dtype])
        lse = np.full(self.query.shape[:2], np.nan, np.float32)
        found = module.attend(*self.arguments, out=out, lse=lse, **self.inputs.heads, **self.options, **options)
        assert found[0] is out
        assert found[1] is lse
        return out, lse

    def take(self, sequences) -> Ragged:
        """Sequences picked or reordered by index, with all of their query tokens."""
        rows = [np.arange(*self.query_start_loc[each : each + 2]) for each in sequences]
        starts = np.cumsum([0, *(len(each) for each in rows)], dtype=self.query_start_loc.dtype)
        query = self.query[np.concatenate([np.zeros(0, int), *rows])]
        return dataclasses.replace(self, query=query, inputs=self.inputs.take(sequences), query_start_loc=starts)

    def chunk(self, first, count) -> Ragged:
        """The call in which so many query tokens of the one sequence, from the first on, are its last tokens."""
        before = int(self.inputs.context_lens[0]) - len(self.query)
        inputs = self.inputs.replace(context_lens=np.array([before + first + count]))
        query = self.query[first : first + count]
        return dataclasses.replace(self, query=query, inputs=inputs, query_start_loc=np.array([0, count]))


def make_ragged(
    spec, sequences, *, seed=0, poison="nan", index=np.int32, spare_blocks=3, surplus=2, **options
) -> Ragged:
    """Draw the arrays of one call.

    Args:
        spec: The PagedAttentionSpec.
        sequences: (query tokens, context) of each.
        seed: Seed of the data.
        poison: As for make_inputs, for slots and blocks without a token.
        index: The dtype of block_table, context_lens and query_start_loc.
        spare_blocks: As for make_inputs.
        surplus: As for make_inputs.
        **options: causal and tree_mask of attend.
    """
    counts, context_lens = ([each[i] for each in sequences] for i in range(2))
    everything = dataclasses.replace(spec, window=None, score_mod=None, mask_mod=None, inputs={})
    room = {"spare_blocks": spare_blocks, "surplus": surplus}
    inputs = make_inputs(everything, np.array(context_lens, np.int32), seed=seed, poison=poison, **room)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(index)
    query = noise(np.random.default_rng((2, seed)), (int(starts[-1]), spec.num_heads, spec.head_dim), 2.0, spec.dtype)
    indices = {name: getattr(inputs, name).astype(index) for name in ("block_table", "context_lens")}
    return Ragged(query, inputs.replace(**indices), starts, options)


def assert_near_float64(spec, ragged: Ragged, out, lse) -> None:
    """By the bounds of pa_compiler.verification.tolerances."""
    options = {"query_start_loc": ragged.query_start_loc, **ragged.inputs.heads, **ragged.options}
    expected = oracle(spec, ragged.query, *ragged.inputs.arguments[1:], None, spec.kv_layout, **options)
    row_lens = np.repeat(ragged.inputs.context_lens, ragged.counts)
    for name, result in (("out", out), ("lse", lse)):
        _, wrong = compare(name, result, *expected[name], row_lens)
        assert not wrong, f"{wrong}; query tokens {ragged.counts}, context {ragged.inputs.context_lens.tolist()}"


def drawn_trees(counts, rng):
    """For each sequence which of its query tokens each of them sees: those on its path, or any at all."""
    masks = [np.zeros(0, bool)]
    for number, count in enumerate(counts):
        mask = rng.random((count, count)) < 0.5 if number % 3 == 2 else np.tril(rng.random((count, count)) < 0.4)
        if number % 3 == 0:
            np.fill_diagonal(mask, True)
        masks.append(mask.reshape(-1))
    return np.concatenate(masks)
