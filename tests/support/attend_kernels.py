"""fused_attend and merge_partials by themselves, through TVM: work items as a host makes them."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import tile_registers
import tvm
from attend_calls import Call
from inputs import DTYPES

from pa_compiler import backends
from pa_compiler.cpu import backend, build, instructions, target
from pa_compiler.cpu import tiles as tiling
from pa_compiler.kernels import build_attend
from pa_compiler.kernels.merge_partials import merge_partials
from pa_compiler.key_ranges import attend_range_blocks, attend_tiles
from pa_compiler.tiles import FEW_ROWS


@functools.cache
def this_cpu():
    """The target of this machine."""
    return target.resolve(backends.normalize("llvm"))


class Kernels:
    """The compiled kernels of a spec."""

    def __init__(self, spec, cpu=None, **sizes) -> None:
        cpu = cpu or this_cpu()
        self.spec, self.tiles = spec, dataclasses.replace(tiling.choose_attend(spec, cpu), **sizes)
        module = build_attend(spec, self.tiles)
        module["merge_partials"] = merge_partials(spec, self.tiles)
        names = [variable.name_hint for variable in module.get_global_vars()]
        self.params = {name: [param.name for param in module[name].params] for name in names}
        lowered = backend.lower(module, spec, self.tiles, self.tiles)
        apart = build.apart(instructions.select(lowered.mod, cpu, self.tiles)).values()  # each has its level of LLVM's
        self.executables = {name: build.translate(each, cpu) for name, each in zip(sorted(names), apart, strict=True)}

    def _call(self, kernel, arrays, numbers):
        given = arrays | numbers
        if kernel == "fused_attend" and self.tiles.few:
            has_few = numbers["num_query"] * self.spec.group <= self.tiles.row_tile
            kernel = FEW_ROWS if has_few else kernel
        if shape := self.tiles.of_kernel(kernel).tile_shape:
            tile_registers.shape(*shape)
        self.executables[kernel][kernel](*(given[name] for name in self.params[kernel]))

    def strides(self, call: Call) -> dict[str, int]:
        """The strides of the caches, in words."""
        spec, found = self.spec, {}
        values = call.key_cache if call.value_cache is None else call.value_cache
        for name, cache, word in (("k", call.key_cache, self.tiles.keys.word), ("v", values, self.tiles.values.word)):
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
            "row_starts": tvm.runtime.tensor(np.zeros(len(call.context_lens), np.int32)),
            "context_lens": tvm.runtime.tensor(call.context_lens),
            "token_positions": tvm.runtime.tensor(call.positions),
            "tree_mask": tvm.runtime.tensor(tree_mask),
            "alibi_slopes": tvm.runtime.tensor(call.alibi_slopes),
            "sinks": tvm.runtime.tensor(call.sinks),
        }
        shared = call.value_cache is None
        arrays["value_cache"] = arrays["key_cache"] if shared else words(call.value_cache, self.tiles.values)
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
        rows, tiles = self.tiles.row_tile, attend_tiles(spec, self.tiles.row_tile)
        most = tiles * rows // spec.group
        heads = heads or max(
            h for h in range(1, spec.num_kv_heads + 1) if h == 1 or -(-spec.group // rows) * h <= tiles
        )
        per_head = tiles // heads * rows // spec.group
        chunk = max(1, min(chunk or most, per_head))
        tree_at = 0
        for seq, (count, context) in enumerate(zip(call.query_lens, call.context_lens.tolist(), strict=True)):
            for first in range(0, count, chunk):
                number = min(chunk, count - first)
                item = common | {
                    "seq": seq, "token_begin": int(call.starts[seq]) + first, "num_query": number,
                    "tree_size": count,
                    "tree_start": tree_at + first * count if call.trees is not None else -1,
                }  # fmt: skip
                results = {"out": out, "lse": lse}
                for head in range(0, 0 if split else spec.num_kv_heads, heads):
                    of_heads = {"kv_head_begin": head, "num_kv_heads": min(heads, spec.num_kv_heads - head)}
                    self._whole(arrays | results, item | of_heads, context)
                if split:
                    self._in_ranges(arrays | results, item, context, heads, call)
            tree_at += count * count
        return out.numpy(), lse.numpy()

    def _whole(self, arrays, item, context):
        blocks = {"block_begin": 0, "block_end": -(-context // self.spec.block_size), "partial_start": -1}
        self._call("fused_attend", arrays | tvm_empty(1, self.spec), item | blocks)

    def _in_ranges(self, arrays, item, context, heads, call):
        """An item for each range of keys, and what merges them."""
        size, number, spec = attend_range_blocks(self.spec), item["num_query"], self.spec
        ranges = -(-context // (size * spec.block_size))
        arrays = arrays | tvm_empty(ranges * number, spec)
        for head in range(0, spec.num_kv_heads, heads):
            for nth in range(ranges):
                numbers = {
                    "kv_head_begin": head, "num_kv_heads": min(heads, spec.num_kv_heads - head),
                    "block_begin": nth * size, "block_end": (nth + 1) * size, "partial_start": nth * number,
                }  # fmt: skip
                self._call("fused_attend", arrays, item | numbers)
        sees_all = not call.causal or call.trees is not None
        for token in range(number):
            numbers = {
                "token": item["token_begin"] + token, "partial_start": token, "partial_step": number,
                "shared_start": 0, "shared_step": 0, "num_shared": 0, "num_partials": ranges,
                "num_keys": context if sees_all else int(call.positions[item["token_begin"] + token]) + 1,
            }  # fmt: skip
            self._call("merge_partials", arrays, numbers)


def tvm_empty(slots, spec):
    """Partial results, all NaN."""
    rows = np.full((slots, spec.num_heads), np.nan, np.float32)
    acc = np.full((slots, spec.num_heads, spec.result_dim), np.nan, np.float32)
    named = {"partial_max": rows, "partial_sum": rows.copy(), "partial_acc": acc}
    return {name: tvm.runtime.tensor(array) for name, array in named.items()}


def _table(constant):
    dtype = {"bool": np.int8}.get(constant.dtype, constant.dtype)
    return np.frombuffer(constant.data, dtype).reshape(constant.shape or (1,)).copy()
