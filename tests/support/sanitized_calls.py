"""Calls of libraries in a process of their own: python sanitized_calls.py [--short CALL NAME] FILE...

Arrays are as large as they have to be and no larger. With --short, the array of that name of decode, or of attend,
lacks its last element, whatever its shape says: the call then reads or writes one element past its end.
"""

from __future__ import annotations

import sys

import numpy as np
from inputs import DTYPES, lay_out, make_inputs
from numpy.lib.stride_tricks import as_strided
from ragged_inputs import assert_near_float64, make_ragged
from shared_prefixes import check
from tolerances import assert_close_to_oracle, assert_same_bits

import pa_compiler

NAMES = ("query", "key_cache", "value_cache", "block_table", "context_lens")


def decode(module, number):
    """Batches around a chunk, with sequences around the ends of tiles, that are cut into ranges, and of no tokens."""
    spec, rng = module.spec, np.random.default_rng(number)
    ends = [0, 1, spec.block_size, 16, 17, 127, 128, 129, 300]
    for batch in (1, spec.batch_chunk % 32, 17):
        lengths = rng.choice(ends, batch)
        lengths[-1] = rng.integers(2000, 2600) if batch == 1 else lengths[-1]
        inputs = make_inputs(spec, lengths, seed=number, spare_blocks=0, surplus=0)
        module.num_threads = int(rng.integers(1, 4))
        out, lse = inputs.out, inputs.lse
        module.decode(*inputs.arguments, out=out, lse=lse)
        assert_close_to_oracle(spec, inputs, out, lse)


def attend(module, number):
    """Sequences of no, one and several query tokens, around the ends of tiles, in several ranges, and with trees."""
    spec, rng = module.spec, np.random.default_rng(number)
    module.num_threads = int(rng.integers(1, 4))
    sequences = [
        (1, 17),
        (0, 3),
        (2, 2),
        (16, 129),
        (int(rng.integers(3, 40)), 300),
        (2, int(rng.integers(8192, 8500))),
    ]
    sizes = [count for count, _ in sequences]
    trees = np.concatenate([rng.integers(0, 2, size * size, np.uint8) for size in sizes])
    for options in ({}, {"causal": False}, {"tree_mask": trees}):
        order = rng.permutation(len(sequences)) if "tree_mask" not in options else range(len(sequences))
        ragged = make_ragged(spec, [sequences[i] for i in order], seed=number, spare_blocks=0, surplus=0, **options)
        assert_near_float64(spec, ragged, *ragged.attend(module))


def share(module, number):
    """Prefixes of several groups, around the ends of tiles and in several ranges."""
    rng = np.random.default_rng(number)
    module.num_threads = int(rng.integers(1, 4))
    size = module.spec.block_size
    groups = [
        (1, [(1, 1), (3, 9)]),
        (0, [(1, 20)]),
        (300 // size, [(1, 2), (0, 5), (16, 129), (1, 300)]),
        (4500 // size, [(1, 1)]),
    ]
    check(module, groups, seed=number)


def append(module, number):
    """Each slot of two blocks, written in any order."""
    spec, rng = module.spec, np.random.default_rng(number)
    num_tokens = 2 * spec.block_size
    shape = (num_tokens, spec.num_kv_heads, spec.head_dim)
    key, value = (rng.random(shape, np.float32).astype(DTYPES[spec.dtype]) for _ in range(2))
    expected = lay_out(spec, *(new.reshape(2, spec.block_size, *shape[1:]) for new in (key, value)))
    caches = [np.zeros_like(cache) for cache in expected]
    order = rng.permutation(num_tokens)
    module.append_kv(key[order], value[order], *caches, order.astype(np.int64))
    for cache, wanted in zip(caches, expected, strict=True):
        assert_same_bits(cache, wanted)


def shortened(array):
    """An array of the same shape, values and strides whose memory ends one element early."""
    memory = array.reshape(-1)[:-1].copy()
    return as_strided(memory, array.shape, array.strides)


def decode_with_a_short_array(module, name):
    inputs = make_inputs(module.spec, [module.spec.block_size] * 3, spare_blocks=0, surplus=0)
    arrays = dict(zip(NAMES, inputs.arguments, strict=True)) | {"out": inputs.out}
    arrays[name] = shortened(arrays[name])
    module.decode(**arrays)


def attend_with_a_short_array(module, name):
    sequences = [(2, 2 * module.spec.block_size)] * 3
    ragged = make_ragged(module.spec, sequences, spare_blocks=0, surplus=0)
    arrays = dict(zip((*NAMES, "query_start_loc"), ragged.arguments, strict=True))
    arrays |= {"out": np.empty_like(ragged.query), "tree_mask": np.ones(12, np.uint8)}
    arrays[name] = shortened(arrays[name])
    module.attend(**arrays)


SHORT = {"decode": decode_with_a_short_array, "attend": attend_with_a_short_array}


def main(words):
    call, short = words[1:3] if words[0] == "--short" else (None, None)
    for number, path in enumerate(words if short is None else words[3:]):
        module = pa_compiler.load(path)
        print(module.spec, module.pipeline, module.target.get("mcpu"), flush=True)
        if short is None:
            decode(module, number)
            append(module, number)
            if module.has_attend:
                attend(module, number)
            if module.has_attend_shared_prefix:
                share(module, number)
        else:
            SHORT[call](module, short)
    print("done")


if __name__ == "__main__":
    main(sys.argv[1:])
