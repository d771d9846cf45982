"""fused_attend and merge_attend by themselves, through TVM: work items as a host would make them, and attention in NumPy."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json

import numpy as np
import tvm
from inputs import DTYPES, lay_out, poison_value
from tvm import IRModule

from pa_compiler import backends, schedules
from pa_compiler.cpu import instructions, target
from pa_compiler.cpu import tiles as tiling
from pa_compiler.interface import ATTEND_ROWS, attend_range_blocks, attend_tiles
from pa_compiler.kernels import ATTEND
from pa_compiler.score import Function
from pa_compiler.verification.tolerances import SMALLEST, lse_bound, tolerance

_CONFIG = {"tirx.disable_assert": True, "tirx.disable_storage_rewrite": True}


@functools.cache
def this_cpu():
    """The target of this machine."""
    return target.resolve(backends.normalize("llvm"))


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


class Kernels:
    """The compiled kernels of a spec."""

    def __init__(self, spec, cpu=None, **sizes) -> None:
        cpu = cpu or this_cpu()
        self.spec, self.tiles = spec, dataclasses.replace(tiling.choose_attend(spec, cpu), **sizes)
        functions = {kernel.__name__: kernel(spec, self.tiles) for kernel in ATTEND}
        self.params = {name: [param.name for param in function.params] for name, function in functions.items()}
        scheduled = schedules.schedule(IRModule(functions), self.tiles)
        with tvm.transform.PassContext(config=_CONFIG):
            self.executable = tvm.compile(
                instructions.select(scheduled, cpu), target=tvm.target.Target(json.loads(cpu.config))
            )

    def _call(self, kernel, arrays, numbers):
        given = arrays | numbers
        self.executable[kernel](*(given[name] for name in self.params[kernel]))

    def strides(self, call: Call) -> dict[str, int]:
        """The strides of the caches, in words."""
        spec, found = self.spec, {}
        for name, cache, word in (("k", call.key_cache, self.tiles.keys.word), ("v", call.value_cache, self.tiles.values.word)):
            if cache is None:
                continue
            block, *inner = [stride // cache.itemsize for stride in cache.strides[:3]]
            row, head = inner if spec.kv_layout == "NHD" else reversed(inner)
            found |= {f"{name}_block": block // word, f"{name}_row": row // word, f"{name}_head": head // word}
        return found

    def arrays(self, call: Call) -> dict[str, tvm.runtime.Tensor]:
        """The arrays of a call, by the names of parameters."""

        def words(cache, element):
            flat = cache.reshape(-1)
            return tvm.runtime.tensor(flat.view(np.int32) if element.word == 2 else flat)

        trees = call.trees or [np.zeros(1)]
        tree_mask = np.concatenate([np.asarray(tree).reshape(-1) for tree in trees]).astype(np.uint8)
        arrays = {
            "query": tvm.runtime.tensor(call.query),
            "key_cache": words(call.key_cache, self.tiles.keys),
            "block_table": tvm.runtime.tensor(call.block_table),
            "context_lens": tvm.runtime.tensor(call.context_lens),
            "tree_mask": tvm.runtime.tensor(tree_mask),
            "alibi_slopes": tvm.runtime.tensor(call.alibi_slopes),
            "sinks": tvm.runtime.tensor(call.sinks),
        }
        if call.value_cache is not None:
            arrays["value_cache"] = words(call.value_cache, self.tiles.values)
        for name, array in call.inputs.items():
            arrays[f"input_{name}"] = tvm.runtime.tensor(array.view(np.int8) if array.dtype == bool else array)
        return arrays | {each.name: tvm.runtime.tensor(_table(each)) for each in self.spec.constants}

    def attend(self, call: Call, *, chunk=None, heads=None, split=False):
        """out and lse. chunk: query tokens of an item at most; heads: its kv heads; split: an item for each range."""
        spec = self.spec
        arrays, tokens = self.arrays(call), len(call.query)
        out = tvm.runtime.tensor(np.full((tokens, spec.num_heads, spec.result_dim), np.nan, DTYPES[spec.result_dtype]))
        lse = tvm.runtime.tensor(np.full((tokens, spec.num_heads), np.nan, np.float32))
        query_scale, score_scale = (call.scale, 1.0) if spec.wide_range else (1.0, call.scale)
        common = self.strides(call) | {
            "causal": int(call.causal), "query_scale": query_scale, "score_scale": score_scale,
        }  # fmt: skip
        most = attend_tiles(spec) * ATTEND_ROWS // spec.group
        heads = heads or max(h for h in range(1, spec.num_kv_heads + 1) if h == 1 or -(-spec.group // ATTEND_ROWS) * h <= attend_tiles(spec))
        per_head = attend_tiles(spec) // heads * ATTEND_ROWS // spec.group
        chunk = max(1, min(chunk or most, per_head))
        range_blocks, tree_at = attend_range_blocks(spec), 0
        for seq, (count, context) in enumerate(zip(call.query_lens, call.context_lens, strict=True)):
            ranges = -(-int(context) // (range_blocks * spec.block_size))
            for first in range(0, count, chunk):
                number = min(chunk, count - first)
                slots = tvm_empty(ranges * number if split else 1, spec)
                whole = arrays | slots | {"out": out, "lse": lse}
                item = common | {
                    "seq": seq, "token_begin": int(call.starts[seq]) + first, "num_query": number,
                    "first_pos": int(context) - count + first, "tree_size": count,
                    "tree_start": tree_at + first * count if call.trees is not None else -1,
                }  # fmt: skip
                for head in range(0, spec.num_kv_heads, heads):
                    item |= {"kv_head_begin": head, "num_kv_heads": min(heads, spec.num_kv_heads - head)}
                    if not split:
                        blocks = {"block_begin": 0, "block_end": -(-int(context) // spec.block_size), "partial_start": -1}
                        self._call("fused_attend", whole, item | blocks)
                        continue
                    for nth in range(ranges):
                        blocks = {
                            "block_begin": nth * range_blocks, "block_end": (nth + 1) * range_blocks,
                            "partial_start": nth * number,
                        }  # fmt: skip
                        self._call("fused_attend", whole, item | blocks)
                for token in range(number if split else 0):
                    sees_all = not call.causal or call.trees is not None
                    merged = {
                        "token": item["token_begin"] + token, "partial_start": token, "partial_step": number,
                        "num_partials": ranges, "num_keys": int(context) if sees_all else item["first_pos"] + token + 1,
                    }  # fmt: skip
                    self._call("merge_attend", whole, merged)
            tree_at += count * count
        return out.numpy(), lse.numpy()


def tvm_empty(slots, spec):
    """Partial results, all NaN."""
    rows = np.full((slots, spec.num_heads), np.nan, np.float32)
    acc = np.full((slots, spec.num_heads, spec.result_dim), np.nan, np.float32)
    named = {"partial_max": rows, "partial_sum": rows.copy(), "partial_acc": acc}
    return {name: tvm.runtime.tensor(array) for name, array in named.items()}


def _table(constant):
    dtype = {"bool": np.int8}.get(constant.dtype, constant.dtype)
    return np.frombuffer(constant.data, dtype).reshape(constant.shape or (1,)).copy()


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
