"""TVM's paged KV cache on our functions beside a model of it in NumPy, which knows no pages.

Every step of the cache attends in all layers and compares with the model. Pages hold NaN before anything is written to
them, so what is read beyond a sequence shows.
"""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import tvm
import tvm_ffi

from pa_compiler.verification.tolerances import TOLERANCES

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
NONE, NORMAL, INLINE = range(3)
"""TVM's RopeMode."""

MHA, MHA_SLIDING = 0, 3
"""Of TVM's AttnKind."""

THETA, SCALE = 1e4, 1.0


def builtin(name):
    return tvm_ffi.get_global_func(f"vm.builtin.{name}")


def tensor(values):
    """An array as a tensor of TVM; bfloat16 by its words."""
    if values.dtype != ml_dtypes.bfloat16:
        return tvm.runtime.tensor(np.ascontiguousarray(values))
    words = tvm.runtime.tensor(np.ascontiguousarray(values).view(np.uint16))
    return words._create_view(values.shape, "bfloat16")


def values_of(found):
    """A tensor of TVM as an array; bfloat16 by its words."""
    if str(found.dtype) != "bfloat16":
        return found.numpy()
    return found._create_view(found.shape, "uint16").numpy().view(ml_dtypes.bfloat16)


def rotated(vectors, positions):
    """Vectors [n, heads, head_dim] turned by their positions, in float64."""
    half = vectors.shape[-1] // 2
    angle = np.asarray(positions)[:, None, None] * SCALE / THETA ** (np.arange(half) / half)
    pairs = vectors[..., :half].astype(np.float64) + 1j * vectors[..., half:].astype(np.float64)
    turned = pairs * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


@dataclasses.dataclass
class Sequence:
    """What the model has of a sequence.

    Attributes:
        keys: [layers, n, num_kv_heads, head_dim], as they are stored.
        values: The same.
        window: Tokens that are kept, and those of them at the begin, or None.
        parents: Those of a token tree that is not accepted yet, whose nodes are the last tokens.
    """

    keys: np.ndarray
    values: np.ndarray
    window: tuple[int, int] | None = None
    parents: list[int] = dataclasses.field(default_factory=list)

    @property
    def length(self):
        return self.keys.shape[1]


def depths(parents):
    """How deep each node of a tree is."""
    found = []
    for parent in parents:
        found.append(found[parent] + 1 if parent >= 0 else 0)
    return found


def path(parents, node):
    """The nodes from a root to a node."""
    return [] if node < 0 else [*path(parents, parents[node]), node]


class Cache:
    """A cache of TVM with the functions of a spec, and the model beside it."""

    def __init__(self, functions, rope=NONE, sliding=False, layers=2, kinds=None, tokens=2048, seed=0):
        self.spec, self.rope, self.layers = functions.spec, rope, layers
        self.kinds = kinds or [MHA] * layers
        self.rng, self.sequences, self.poisoned = np.random.default_rng(seed), {}, set()
        self.dtype = DTYPES[self.spec.dtype]
        arguments = list(functions.arguments())
        arguments[0] = tvm_ffi.convert(self._poisoning(arguments[0]))
        spec, window = self.spec, self.spec.window or 1024
        config = (16, tokens, 512, spec.block_size, int(sliding), window)
        self.cache = builtin("paged_attention_kv_cache_create")(
            *(tvm_ffi.Shape(config), tvm_ffi.Shape([0, layers]), spec.num_heads, spec.num_kv_heads),
            *(spec.head_dim, spec.head_dim, tvm_ffi.Shape(self.kinds), False, rope, SCALE, THETA, None),
            tvm.runtime.empty((), spec.dtype),
            *arguments,
        )

    def _poisoning(self, append):
        """transpose_append, which first fills pages with NaN that it has not seen before."""

        def poisoning(pages, *arguments):
            if pages.data_ptr() not in self.poisoned:
                self.poisoned.add(pages.data_ptr())
                nan = 0x7FC0 if self.spec.dtype == "bfloat16" else np.nan
                words = "uint16" if self.spec.dtype == "bfloat16" else self.spec.dtype
                np.from_dlpack(pages._create_view(pages.shape, words))[:] = nan
            append(pages, *arguments)

        return poisoning

    def add(self, name, window=None):
        """Add a sequence, with (tokens that are kept, those at its begin among them)."""
        builtin("kv_state_add_sequence")(self.cache, name)
        empty = np.zeros((self.layers, 0, self.spec.num_kv_heads, self.spec.head_dim), self.dtype)
        self.sequences[name] = Sequence(empty, empty)
        self.slide(name, window)

    def slide(self, name, window):
        if window:
            builtin("attention_kv_cache_enable_sliding_window_for_seq")(self.cache, name, *window)
            self.sequences[name].window = window

    def fork(self, parent, name, position=-1):
        builtin("kv_state_fork_sequence")(self.cache, parent, name, position)
        end = self.sequences[parent].length if position < 0 else position
        one = self.sequences[parent]
        self.sequences[name] = Sequence(one.keys[:, :end], one.values[:, :end])

    def pop(self, name, count):
        builtin("kv_state_popn")(self.cache, name, count)
        one = self.sequences[name]
        one.keys, one.values = one.keys[:, : one.length - count], one.values[:, : one.length - count]

    def remove(self, name):
        builtin("kv_state_remove_sequence")(self.cache, name)
        del self.sequences[name]

    @property
    def is_empty(self):
        return bool(builtin("attention_kv_cache_empty")(self.cache))

    def step(self, appended, trees=None, shared=False):
        """Append tokens {sequence: count}, attend in each layer, and compare. trees: {sequence: parents of the new}.

        With shared, a second attention of other queries reads the keys and values of each layer.
        """
        names, counts = list(appended), list(appended.values())
        parents = [parent for name in names for parent in trees[name]] if trees else None
        shape = tvm_ffi.Shape(parents) if trees else None
        builtin("kv_state_begin_forward")(self.cache, tvm_ffi.Shape(names), tvm_ffi.Shape(counts), shape)
        spec, total = self.spec, sum(counts)
        heads = spec.num_heads + 2 * spec.num_kv_heads
        given = self.rng.standard_normal((self.layers, total, heads, spec.head_dim)).astype(self.dtype)
        ends = np.cumsum(counts)
        for name, begin, end in zip(names, ends - counts, ends, strict=True):
            self._append(name, given[:, begin:end], trees and trees[name])
        for layer in range(self.layers):
            out = tvm.runtime.empty((total, spec.num_heads, spec.head_dim), spec.dtype)
            call = builtin("attention_kv_cache_attention_with_fused_qkv")
            call(self.cache, layer, spec.head_dim**-0.5, tensor(given[layer]), out)
            self._compare(layer, appended, given[layer, :, : spec.num_heads], values_of(out))
            if shared:
                self._shared(layer, appended, given[layer])
        builtin("kv_state_end_forward")(self.cache)
        for name in names:
            self._slid(self.sequences[name])
            if MHA_SLIDING not in self.kinds:
                self.check_pages(name)

    def _shared(self, layer, appended, given):
        spec, heads = self.spec, self.spec.num_heads
        queries = self.rng.standard_normal((len(given), heads, spec.head_dim)).astype(self.dtype)
        keys, values = given[:, heads : heads + spec.num_kv_heads], given[:, heads + spec.num_kv_heads :]
        out = tvm.runtime.empty(queries.shape, spec.dtype)
        call = builtin("attention_kv_cache_attention_with_shared_kv")
        call(self.cache, layer, spec.head_dim**-0.5, tensor(queries), tensor(keys), tensor(values), out)
        self._compare(layer, appended, queries, values_of(out))

    def commit(self, leaves):
        """Accept the path to a node of each sequence's tree: {sequence: node, or -1 for none}."""
        shapes = tvm_ffi.Shape(list(leaves)), tvm_ffi.Shape(list(leaves.values()))
        builtin("attention_kv_cache_commit_accepted_token_tree_nodes")(self.cache, *shapes)
        for name, leaf in leaves.items():
            one = self.sequences[name]
            begin = one.length - len(one.parents)
            kept = [*range(begin), *(begin + node for node in path(one.parents, leaf))]
            one.keys, one.values, one.parents = one.keys[:, kept], one.values[:, kept], []
            self.check_pages(name)

    def _append(self, name, given, parents):
        """The new tokens of a sequence in the model; keys are rotated where the cache stores them so."""
        one, spec = self.sequences[name], self.spec
        keys, values = given[:, :, spec.num_heads : -spec.num_kv_heads], given[:, :, -spec.num_kv_heads :]
        count, base = given.shape[1], one.length - len(one.parents)
        one.parents = [*one.parents, *parents] if parents else []
        if self.rope == NORMAL:
            at = self._positions(one, base, one.length - base + count)[-count:]
            keys = np.stack([rotated(layer, at) for layer in keys]).astype(self.dtype)
        one.keys = np.concatenate([one.keys, keys], axis=1)
        one.values = np.concatenate([one.values, values], axis=1)

    @staticmethod
    def _positions(one, base, count):
        """Positions of the tokens from base on."""
        return base + np.array(depths(one.parents)) if one.parents else base + np.arange(count)

    def _slid(self, one):
        """Drop what has left the window of a sequence."""
        if one.window and one.length > one.window[0]:
            keep, sink = one.window
            kept = [*range(sink), *range(one.length - keep + sink, one.length)]
            one.keys, one.values = one.keys[:, kept], one.values[:, kept]

    def _compare(self, layer, appended, queries, out):
        begin = 0
        for name, count in appended.items():
            one, end = self.sequences[name], begin + count
            expected, magnitude = self._attention(one, layer, queries[begin:end])
            of_out, of_magnitude = TOLERANCES[self.spec.dtype]
            bound = (of_out * np.abs(expected) + of_magnitude * magnitude) * self.rounds
            error = np.abs(out[begin:end].astype(np.float64) - expected)
            assert (error <= bound).all(), f"sequence {name}, layer {layer}: {(error / bound).max()} times the bound"
            begin = end

    rounds = 2
    """Bounds are of one call. TVM rounds out of each part to dtype, and what it merges again: more often with forks."""

    def _attention(self, one, layer, queries):
        """out of the last tokens, and what it would be if nothing cancelled, in float64."""
        spec, count, total = self.spec, len(queries), one.length
        base, keys = total - max(len(one.parents), count), one.keys[layer].astype(np.float64)
        at = self._positions(one, base, total - base)[-count:] if one.parents else total - count + np.arange(count)
        queries = queries.astype(np.float64)
        if self.rope != NONE:
            turned = rotated(queries, at)
            queries = turned.astype(self.dtype).astype(np.float64)
        if self.rope == INLINE:
            keys = rotated(keys, np.arange(total)).astype(self.dtype).astype(np.float64)
        keys, values = (np.repeat(each, spec.group, axis=1) for each in (keys, one.values[layer].astype(np.float64)))
        scores = np.einsum("qhd,khd->hqk", queries, keys) * spec.head_dim**-0.5
        if spec.softcap:
            scores = spec.softcap * np.tanh(scores / spec.softcap)
        scores = np.where(self._seen(one, layer, count), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return tuple(np.einsum("hqk,khd->qhd", weights, each) for each in (values, np.abs(values)))

    def _seen(self, one, layer, count):
        """[count, tokens], bool: which tokens each of the last sees."""
        total = one.length
        distance = np.arange(total - count, total)[:, None] - np.arange(total)
        seen = distance >= 0
        if self.kinds[layer] == MHA_SLIDING:
            seen &= distance < self.spec.window
        if one.parents:
            nodes = len(one.parents)
            seen[:, total - nodes :] = False
            for row in range(count):
                seen[row, total - nodes + np.array(path(one.parents, nodes - count + row))] = True
        return seen

    def check_pages(self, name):
        """Compare what the cache says that it has of a sequence with the model, bit for bit but for rotations."""
        one = self.sequences[name]
        if not one.length:
            return
        found = [tvm.runtime.empty(one.keys.shape, self.spec.dtype) for _ in range(2)]
        builtin("attention_kv_cache_debug_get_kv")(self.cache, name, 0, one.length, *found)
        keys, values = map(values_of, found)
        assert np.array_equal(values, one.values)
        if self.rope != NORMAL:
            assert np.array_equal(keys, one.keys)
        else:
            step = 4 * float(ml_dtypes.finfo(self.dtype).eps)
            assert np.allclose(keys.astype(np.float64), one.keys.astype(np.float64), rtol=step, atol=step)
