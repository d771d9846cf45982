"""The CUDA kernels of a spec in the emulator, launched as kernels.cuda.launches says."""

from __future__ import annotations

import copy
import functools
import re

import numpy as np

from pa_compiler import cuda_build, cuda_tiling
from pa_compiler.kernels import cuda


class EmulatedModule:
    """decode and append_kv of a spec by its CUDA kernels.

    Everything that a call may not write is read-only, and all that it has to write is NaN before.
    """

    def __init__(self, spec, load, arch="sm_90"):
        """load is the fixture emulated."""
        self.spec, self._load = spec, load
        tiling = cuda_tiling.choose(spec, arch)
        self.source = cuda_build.emit(cuda.build(spec, tiling), arch)
        self.kernels = load(self.source)
        self.launches = cuda.launches(spec, tiling)
        self.status = np.zeros(1, np.int32)
        self.report = np.zeros(5, np.int64)

    def edited(self, pattern, replacement):
        """The same with other CUDA C, in which each match of pattern, of which there are some, is replaced."""
        other = copy.copy(self)
        other.source, count = re.subn(pattern, replacement, self.source, flags=re.MULTILINE)
        assert count, f"{pattern} is not in the emitted text"
        other.kernels = self._load(other.source)
        other.status, other.report = np.zeros(1, np.int32), np.zeros(5, np.int64)
        return other

    def decode(self, inputs, scale=None, *, extra=3, order="forward", into=None):
        """(out, lse), with extra more work items than sequences. into: such a pair to write to, of any strides."""
        out, lse = into or (inputs.out, inputs.lse)
        spec, batch = self.spec, len(inputs.context_lens)
        items, heads = batch + extra, spec.num_heads
        values = {
            "query": inputs.query,
            "key_cache": inputs.key_cache,
            "value_cache": inputs.value_cache,
            "block_table": inputs.block_table,
            "context_lens": inputs.context_lens,
        }
        values = {name: read_only(array) for name, array in values.items()}
        values |= {
            "partial_max": np.full((items, heads), np.nan, np.float32),
            "partial_sum": np.full((items, heads), np.nan, np.float32),
            "partial_acc": np.full((items, heads, spec.head_dim), np.nan, np.float32),
            "out": out,
            "lse": lse,
            "scale": spec.head_dim**-0.5 if scale is None else scale,
            "batch": batch,
            "items": items,
            "max_blocks": inputs.block_table.shape[1],
            "num_blocks": len(inputs.key_cache),
            **dict(zip(("q_batch", "q_head"), strides_of(inputs.query), strict=False)),
            **dict(zip(("out_batch", "out_head"), strides_of(out), strict=False)),
            **cache_strides(spec, "k", inputs.key_cache),
            **cache_strides(spec, "v", inputs.value_cache),
            "table_seq": strides_of(inputs.block_table)[0],
            "lse_batch": strides_of(lse)[0],
        }
        for name in ("cuda_check", "cuda_decode", "cuda_merge"):
            self._launch(name, order, values)
        return out, lse

    def append_kv(self, key, value, key_cache, value_cache, slot_mapping, order="forward"):
        """Write key and value [tokens, num_kv_heads, head_dim] to the caches' slots."""
        bits = functools.partial(np.ndarray.view, dtype=f"u{key.itemsize}")
        values = {
            "key": read_only(bits(key)),
            "value": read_only(bits(value)),
            "key_cache": bits(key_cache),
            "value_cache": bits(value_cache),
            "slot_mapping": read_only(slot_mapping),
            "num_tokens": len(key),
            "num_blocks": len(key_cache),
            **dict(zip(("key_token", "key_head"), strides_of(key), strict=False)),
            **dict(zip(("value_token", "value_head"), strides_of(value), strict=False)),
            **cache_strides(self.spec, "k", key_cache),
            **cache_strides(self.spec, "v", value_cache),
        }
        for name in ("cuda_check_slots", "cuda_append_kv"):
            self._launch(name, order, values)

    def _launch(self, name, order, values):
        launch, kernel = self.launches[name], self.kernels[f"{name}_kernel"]
        values = values | {"status": self.status, "report": self.report}
        blocks = eval(launch.blocks.replace("/", "//"), {}, values)
        arguments = [values[parameter.name.removesuffix("_ptr")] for parameter in kernel.signature.parameters]
        kernel.launch(blocks, launch.threads, launch.shared_bytes, *arguments, order=order)


def read_only(array):
    """A view that the emulator does not let a kernel write to."""
    view = array.view()
    view.flags.writeable = False
    return view


def strides_of(array):
    """Strides in elements."""
    return [stride // array.itemsize for stride in array.strides]


def cache_strides(spec, prefix, cache):
    """The strides of a cache's blocks, slots (rows) and heads, by the kernels' names for them."""
    order = ("block", "row", "head") if spec.kv_layout == "NHD" else ("block", "head", "row")
    return {f"{prefix}_{axis}": stride for axis, stride in zip(order, strides_of(cache), strict=False)}
