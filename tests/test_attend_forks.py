"""Sequences that an engine appends to, forks, cuts and guesses for, call after call, in caches of shared blocks.

The grid is that of TVM's tests/python/relax/test_runtime_builtin_paged_attention_kv_cache_cpu.py, in blocks of 16
tokens: prompts, chunks and single tokens of several sequences in one call; forks at the end of a sequence and inside
it, at 15 to 17 and 75 to 80 tokens, and of forks up to seven deep; tokens taken back; and trees that are binary,
chains, and forests of both, of which one path stays.
"""

from __future__ import annotations

import numpy as np
import pytest
from inputs import DTYPES, GARBAGE_IDS, Inputs
from ragged_inputs import Ragged, assert_near_float64

from pa_compiler import PagedAttentionSpec

SPEC = PagedAttentionSpec(16, 2, 64, 16, "float32")
NUM_BLOCKS = 160
WIDTH = 24


class Engine:
    """Sequences, each a list of (key, value) tokens and of blocks that hold them. Whole blocks are shared by forks."""

    def __init__(self, module):
        self.module, self.rng = module, np.random.default_rng(0)
        self.caches = module.empty_cache(NUM_BLOCKS)
        for cache in self.caches:
            cache.fill(np.nan)
        self.tokens, self.blocks = {}, {}

    def _take_blocks(self, sequence):
        """Blocks that no sequence has, for its tokens."""
        of, used = self.blocks[sequence], {block for blocks in self.blocks.values() for block in blocks}
        free = self.rng.permutation([block for block in range(NUM_BLOCKS) if block not in used]).tolist()
        while len(of) * 16 < len(self.tokens[sequence]):
            of.append(free.pop())

    def _write(self, sequence, first):
        """Its tokens from `first` on, into their slots."""
        self._take_blocks(sequence)
        new = self.tokens[sequence][first:]
        slots = [self.blocks[sequence][at // 16] * 16 + at % 16 for at in range(first, first + len(new))]
        if new:
            key, value = (np.stack(each) for each in zip(*new, strict=True))
            self.module.append_kv(key, value, *self.caches, np.array(slots))

    def fork(self, sequence, parent, at=None):
        """A sequence that begins with the first `at` tokens of another, or with all."""
        self.tokens[sequence] = self.tokens[parent][:at]
        whole = len(self.tokens[sequence]) // 16
        self.blocks[sequence] = self.blocks[parent][:whole]
        self._write(sequence, 16 * whole)

    def cut(self, sequence, count, path=()):
        """Take the last `count` tokens back, but for those of a path, in its order."""
        tokens = self.tokens[sequence]
        kept = len(tokens) - count
        self.tokens[sequence] = tokens[:kept] + [tokens[kept + node] for node in path]
        for block in self.blocks[sequence][-(-len(self.tokens[sequence]) // 16) :]:
            if sum(block in blocks for blocks in self.blocks.values()) == 1:
                for cache in self.caches:
                    cache[block] = np.nan
        del self.blocks[sequence][-(-len(self.tokens[sequence]) // 16) :]
        self._write(sequence, kept)

    def run(self, batch, parents=None):
        """Append new tokens to some sequences, and attend from these; parents are those of the nodes of their trees."""
        for sequence, count in batch:
            first = len(self.tokens.setdefault(sequence, []))
            self.blocks.setdefault(sequence, [])
            shape = (2, SPEC.num_kv_heads, SPEC.head_dim)
            drawn = (self.rng.uniform(-1, 1, shape).astype(DTYPES[SPEC.dtype]) for _ in range(count))
            self.tokens[sequence] = self.tokens[sequence] + [tuple(each) for each in drawn]
            self._write(sequence, first)
        ragged = self._call(batch, None if parents is None else np.concatenate([*map(tree_of, parents)]))
        assert_near_float64(SPEC, ragged, *ragged.attend(self.module))

    def _call(self, batch, tree_mask):
        counts, table = [count for _, count in batch], np.resize(GARBAGE_IDS, (len(batch), WIDTH))
        for row, (sequence, _) in zip(table, batch, strict=True):
            row[: len(self.blocks[sequence])] = self.blocks[sequence]
        lens = np.array([len(self.tokens[sequence]) for sequence, _ in batch], np.int32)
        query = self.rng.uniform(-1, 1, (sum(counts), SPEC.num_heads, SPEC.head_dim)).astype(DTYPES[SPEC.dtype])
        inputs = Inputs(query, *self.caches, table.astype(np.int32), lens, query.dtype, SPEC.result_dim)
        self.check_caches()
        return Ragged(query, inputs, np.cumsum([0, *counts], dtype=np.int32), {"tree_mask": tree_mask})

    def check_caches(self):
        """Every sequence has its tokens, whatever was done to those that it shares blocks with."""
        for sequence, tokens in self.tokens.items():
            at = np.arange(len(tokens))
            block = np.array(self.blocks[sequence], int)[at // 16]
            for cache, of in zip(self.caches, range(2), strict=True):
                held = cache[block, at % 16]
                assert held.tobytes() == b"".join(token[of].tobytes() for token in tokens)


def tree_of(parents):
    """[n * n]: each node sees itself and what it descends from; a parent of -1 is the context."""
    mask = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask.reshape(-1)


def path_to(parents, leaf):
    """The nodes from a root to a leaf; none to -1."""
    path = []
    while leaf >= 0:
        path.insert(0, leaf)
        leaf = parents[leaf]
    return path


@pytest.fixture(params=["fused", "staged"])
def engine(request, compiled):
    return Engine(compiled(SPEC, request.param, attend=True))


def test_prompts_chunks_and_single_tokens(engine):
    for batch in (
        [(0, 6)], [(1, 8)], [(2, 11)], [(3, 16)], [(4, 19), (5, 20)], [(6, 21), (7, 24)], [(2, 5), (4, 7), (8, 24)],
        [(6, 13)], [(8, 19)], [(0, 1)], [(1, 3), (3, 8), (5, 12), (7, 11)], [(each, 1) for each in range(9)],
        [(each, 1) for each in range(0, 9, 2)], [(each, 1) for each in range(4, 9)],
    ):  # fmt: skip
        engine.run(batch)


def test_forks(engine):
    """At the end of sequences, and inside them around the ends of blocks; single tokens and chunks of all after it."""
    engine.run([(0, 60), (1, 88), (2, 17), (3, 4)])
    for sequence, parent, count in ((4, 3, 35), (5, 0, 20), (6, 5, 102), (7, 0, 3)):
        engine.fork(sequence, parent)
        engine.run([(sequence, count)])
    engine.fork(8, 5)
    engine.fork(9, 5)
    engine.run([(8, 71), (9, 20)])
    engine.run([(each, 1) for each in (2, 4, 7, 6, 8, 9)])
    engine.run([(7, 10), (6, 2), (8, 3), (9, 4)])
    inside = [(10, 1, 33, 11), (11, 0, 60, 45), (12, 0, 15, 14), (13, 0, 16, 19), (14, 0, 17, 19), (15, 5, 60, 8)]
    inside += [(16, 5, 80, 10), (17, 5, 75, 11), (18, 5, 76, 45), (19, 5, 77, 14)]
    for sequence, parent, at, _ in inside:
        engine.fork(sequence, parent, at)
    engine.run([(sequence, count) for sequence, _, _, count in inside])
    engine.run([(each, 1) for each in (6, 11, 13, 9, 10, 16, 18, 19, 8, 15, 17, 12, 14)])
    engine.run([(10, 10), (6, 2), (8, 3), (19, 4)])


def test_forks_of_forks(engine):
    engine.run([(0, 30)])
    parents = {1: 0, 2: 1, 3: 2, 4: 3, 5: 3, 6: 5, 7: 5, 8: 7, 9: 7, 10: 9, 11: 9}
    for (sequence, parent), count in zip(parents.items(), (15, 5, 20, 26, 18, 22, 12, 29, 9, 31, 4), strict=True):
        engine.fork(sequence, parent)
        engine.run([(sequence, count)])
    for batch in ((3, 6, 9), (4, 8, 10), (5, 7, 11)):
        engine.run([(each, 1) for each in batch])


def test_tokens_taken_back(engine):
    """And others in their place, beside a fork that has kept them."""
    engine.run([(0, 35), (1, 88), (2, 17), (3, 4)])
    engine.fork(4, 3)
    engine.run([(4, 35)])
    for sequence, count in ((0, 17), (1, 57), (2, 16), (3, 0), (4, 37)):
        engine.cut(sequence, count)
    engine.run([(0, 3), (1, 2), (2, 20), (4, 30)])


BINARY = [(node - 1) // 2 for node in range(15)]
FOREST = [-1, 0, 0, 1, 1, 2, 2, -1, 7, 7, 8, 8, 9, 9]
TREES = {
    "trees": ([BINARY[:7], BINARY, list(range(-1, 9)), FOREST], [6, 11, 6, 13]),
    "chains": ([list(range(-1, count - 1)) for count in (7, 15, 10, 14)], [2, 6, -1, 4]),
}


@pytest.mark.parametrize(("parents", "leaves"), TREES.values(), ids=TREES)
def test_trees(engine, parents, leaves):
    """After a tree the path to one of its leaves stays, and single tokens follow."""
    engine.run([(0, 10), (1, 20), (2, 30), (3, 40)])
    engine.run([(sequence, len(each)) for sequence, each in enumerate(parents)], parents)
    for sequence, (each, leaf) in enumerate(zip(parents, leaves, strict=True)):
        engine.cut(sequence, len(each), path_to(each, leaf))
    for _ in range(5):
        engine.run([(sequence, 1) for sequence in range(4)])


def test_trees_that_grow(engine):
    """A level after the other, each time the whole tree: a call knows of no tree in the context."""
    engine.run([(0, 10), (1, 20), (2, 30), (3, 40)])
    for level in range(5):
        size = 2 ** (level + 1) - 1
        engine.run([(sequence, size) for sequence in range(4)], [[(node - 1) // 2 for node in range(size)]] * 4)
        for sequence, leaf in enumerate([2, 6, -1, 4] if level == 4 else [-1] * 4):
            engine.cut(sequence, size, path_to(BINARY, leaf))
    engine.run([(sequence, 1) for sequence in range(4)])
