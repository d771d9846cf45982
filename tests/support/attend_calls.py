"""Calls of attend with ragged queries, and what attention is of them in NumPy."""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
from inputs import DTYPES, lay_out, poison_value

from pa_compiler.score import Function
from pa_compiler.verification.tolerances import SMALLEST, lse_bound, tolerance


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of attend. kv of a sequence lies in blocks of its own; slots that no token has hold poison.

    key and value are [tokens, num_kv_heads, dim] of each sequence; the caches are laid out from them.
    """

    query: np.ndarray
    query_lens: list[int]
    keys: list[np.ndarray]
    values: list[np.ndarray]
    key_cache: np.ndarray
    value_cache: np.ndarray | None
    block_table: np.ndarray
    alibi_slopes: np.ndarray
    sinks: np.ndarray
    inputs: dict[str, np.ndarray]
    causal: bool = True
    trees: list[np.ndarray] | None = None
    scale: float = 0.25

    @property
    def context_lens(self) -> np.ndarray:
        return np.array([len(key) for key in self.keys], np.int32)

    @property
    def starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.query_lens)]).astype(np.int32)

    @property
    def positions(self) -> np.ndarray:
        """Of each query token in its sequence."""
        of = [np.arange(len(key) - count, len(key)) for count, key in zip(self.query_lens, self.keys, strict=True)]
        return np.concatenate([np.zeros(0), *of]).astype(np.int32)


def make_call(spec, lens, *, seed=0, poison="nan", inputs=None, **fields) -> Call:
    """A call for (query tokens, context) of each sequence."""
    rng, dtype, size = np.random.default_rng(seed), DTYPES[spec.dtype], spec.block_size
    context_lens = [context for _, context in lens]
    entries = [-(-context // size) for context in context_lens]
    blocks = rng.permutation(sum(entries) + 2)
    table = np.full((len(lens), max([*entries, 1]) + 1), 2**31 - 1, np.int32)

    def draw(bound, *shape):
        return rng.uniform(-bound, bound, shape).astype(np.float32).astype(dtype)

    caches = [
        np.full((len(blocks), size, spec.num_kv_heads, dim), poison_value(poison, dtype), dtype)
        for dim in (spec.head_dim, spec.result_dim)
    ]
    keys, values, taken = [], [], 0
    for seq, context in enumerate(context_lens):
        table[seq, : entries[seq]] = blocks[taken : taken + entries[seq]]
        taken += entries[seq]
        keys.append(draw(1, context, spec.num_kv_heads, spec.head_dim))
        value = keys[-1][..., : spec.result_dim]
        values.append(value if spec.shared_kv else draw(1, context, spec.num_kv_heads, spec.result_dim))
        position = np.arange(context)
        for cache, of in zip(caches, (keys[-1], values[-1]), strict=True):
            cache[table[seq, position // size], position % size] = of
    key_cache, value_cache = lay_out(spec, caches[0], None if spec.shared_kv else caches[1])
    return Call(
        draw(1, sum(tokens for tokens, _ in lens), spec.num_heads, spec.head_dim), [tokens for tokens, _ in lens],
        keys, values, key_cache, value_cache, table,
        rng.uniform(0, 0.1, spec.num_heads).astype(np.float32), rng.normal(size=spec.num_heads).astype(np.float32),
        inputs or {}, **fields,
    )  # fmt: skip


def spoil(spec, call: Call, poison: str, position: int) -> Call:
    """A call of one sequence with poison in the keys and the values of all tokens after a position."""
    caches = [np.array(cache) if cache is not None else None for cache in (call.key_cache, call.value_cache)]
    table, size = call.block_table[0], spec.block_size
    pair = spec.packed_pair
    for token in range(position + 1, len(call.keys[0])):
        block, slot = table[token // size], token % size
        for cache, of_values in zip(caches, (False, True), strict=True):
            if cache is None:
                continue
            value = poison_value(poison, cache.dtype)
            if spec.kv_layout == "packed" and of_values:
                cache[block, :, slot // pair, slot % pair :: pair] = value
            elif spec.kv_layout == "packed":
                cache[block, :, :, pair * slot : pair * (slot + 1)] = value
            else:
                cache[(block, slot) if spec.kv_layout == "NHD" else (block, slice(None), slot)] = value
    return dataclasses.replace(call, key_cache=caches[0], value_cache=caches[1])


def expected(spec, call: Call):
    """out, lse and sum of p |v| of every query token and head, in float64. Keys that are not seen are never touched."""
    out = np.zeros((len(call.query), spec.num_heads, spec.result_dim))
    size, lse = np.zeros_like(out), np.full(out.shape[:2], -np.inf)
    for seq, (count, key, value) in enumerate(zip(call.query_lens, call.keys, call.values, strict=True)):
        for nth in range(count):
            token, query_pos = int(call.starts[seq]) + nth, len(key) - count + nth
            seen = _seen(spec, call, seq, nth, query_pos, len(key))
            for head in range(spec.num_heads):
                at = np.flatnonzero(seen[head])
                k, v = (of[at, head // spec.group].astype(np.float64) for of in (key, value))
                score = k @ call.query[token, head].astype(np.float64) * call.scale
                score = _scored(spec, call, score, seq, head, query_pos, at)
                sink = call.sinks[head : head + 1].astype(np.float64) if spec.sinks else np.zeros(0)
                if not len(at) + len(sink):
                    continue
                most = max([*score, *sink])
                weights = np.exp(score - most)
                total = weights.sum() + np.exp(sink - most).sum()
                lse[token, head] = most + np.log(total)
                out[token, head], size[token, head] = weights @ v / total, weights @ abs(v) / total
    return out, lse, size


def _seen(spec, call, seq, nth, query_pos, context):
    """[num_heads, context], bool."""
    at = np.arange(context)
    seen = at <= query_pos if call.causal else np.ones(context, bool)
    if call.trees is not None:
        count = call.query_lens[seq]
        seen = at < context - count
        seen[context - count :] = np.asarray(call.trees[seq])[nth] != 0
    if spec.window is not None:
        seen = seen & (at > query_pos - spec.window)
    seen = np.broadcast_to(seen, (spec.num_heads, context))
    if isinstance(spec.mask_mod, Function):
        seen = seen & _apply(spec.mask_mod, spec, call, seq, query_pos, at)
    return seen


def _apply(function, spec, call, seq, query_pos, at, head=None, *score):
    heads = np.arange(spec.num_heads)[:, None] if head is None else np.array(head)
    takes = inspect.signature(function.source).parameters
    given = {name: array for name, array in call.inputs.items() if name in takes}
    result = function.source(*score, np.array(seq), heads, np.array(query_pos), at, **given)
    return np.broadcast_to(result, (spec.num_heads, len(at)) if head is None else (len(at),))


def _scored(spec, call, score, seq, head, query_pos, at):
    if spec.softcap is not None:
        score = spec.softcap * np.tanh(score / spec.softcap)
    if isinstance(spec.score_mod, Function):
        score = _apply(spec.score_mod, spec, call, seq, query_pos, at, head, score)
    if spec.alibi:
        score = score + call.alibi_slopes[head].astype(np.float64) * (at - query_pos)
    return score


def assert_close(spec, call: Call, out, lse) -> None:
    """By the bounds of pa_compiler.verification.tolerances."""
    want, want_lse, size = expected(spec, call)
    longest = int(call.context_lens.max(initial=1))
    bound = tolerance(spec, longest)
    error = abs(out.astype(np.float64) - want) - (bound.of_out * abs(want) + bound.of_magnitude * size)
    where = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
    assert error[where] <= SMALLEST[spec.result_dtype], f"out{where}: expected {want[where]}, got {out[where]}"
    with np.errstate(invalid="ignore"):
        off = np.where(lse == want_lse, 0, abs(lse - want_lse))
    where = np.unravel_index(np.argmax(np.where(np.isnan(off), np.inf, off)), off.shape)
    assert off[where] <= lse_bound(spec, want_lse)[where], f"lse{where}: expected {want_lse[where]}, got {lse[where]}"
