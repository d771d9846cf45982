"""Runs the CUDA kernels of a spec on the emulator, as the host will: the same launches, arguments by name."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

import cuda_emulator
import numpy as np
from inputs import Inputs
from ragged_inputs import Ragged
from tvm import IRModule

from pa_compiler.cuda import build as cuda_build
from pa_compiler.cuda import tiling as cuda_tiling
from pa_compiler.cuda.kernels import launches as cuda
from pa_compiler.cuda.tiles import CudaTiling
from pa_compiler.runtime.arguments import NUMPY_DTYPES
from pa_compiler.schedules import schedule
from pa_compiler.spec import PagedAttentionSpec

ARCH = "sm_90"

HEADS = {"slope_head": "alibi_slopes", "sink_head": "sinks"}
"""The strides of arrays by head, by the kernels' names."""


@dataclasses.dataclass(frozen=True)
class CudaKernels:
    """The kernels of one spec, compiled for the emulator."""

    spec: PagedAttentionSpec
    tiling: CudaTiling
    kernels: dict[str, cuda_emulator.Kernel]
    source: str

    def launch(self, name: str, arguments: dict[str, object], order: str = "forward") -> None:
        """Launch a kernel with arguments by the names of its parameters, which may be fewer."""
        launch = cuda.launches(self.spec, self.tiling, self.tiling)[name]
        numbers = {key: value for key, value in arguments.items() if isinstance(value, int)}
        blocks = eval(launch.blocks.replace("/", "//"), {}, numbers)
        values = [arguments[parameter.name] for parameter in cuda_build.parameters(self.source, name)]
        self.kernels[f"{name}_kernel"].launch(blocks, launch.threads, launch.shared_bytes, *values, order=order)

    def decode(self, inputs: Inputs, *, workers=8, scale=None, status=0, order="forward"):
        """(out, lse) of cuda_decode and cuda_merge, with so many workers."""
        arguments = self.arguments(inputs, workers, scale, status)
        self.launch("cuda_decode", arguments, order)
        self.launch("cuda_merge", arguments, order)
        return arguments["out"], arguments["lse"]

    def arguments(self, inputs: Inputs, workers: int, scale=None, status=0) -> dict[str, object]:
        """What cuda_decode and cuda_merge take, by name; NaN in all partial results."""
        spec, batch = self.spec, len(inputs.context_lens)
        out, lse = np.full((batch, spec.num_heads, spec.result_dim), np.nan, inputs.out_dtype), inputs.lse
        return {
            **_decode_arguments(spec, inputs, out, lse, scale),
            **self._of_call(inputs, batch, workers, status),
        }

    def attend(self, call: Ragged, *, workers=8, scale=None, status=0, order="forward"):
        """(out, lse) of cuda_attend and cuda_merge_attend."""
        arguments = self.attend_arguments(call, workers, scale, status)
        self.launch("cuda_attend", arguments, order)
        self.launch("cuda_merge_attend", arguments, order)
        return arguments["out"], arguments["lse"]

    def attend_arguments(self, call: Ragged, workers: int, scale=None, status=0) -> dict[str, object]:
        """As arguments, of a call of attend."""
        spec, inputs, num_tokens = self.spec, call.inputs, len(call.query)
        out = np.full((num_tokens, spec.num_heads, spec.result_dim), np.nan, inputs.out_dtype)
        lse = np.full((num_tokens, spec.num_heads), np.nan, np.float32)
        tree = call.options.get("tree_mask")
        return {
            **_decode_arguments(spec, inputs.replace(query=call.query), out, lse, scale),
            **self._of_call(inputs, num_tokens, workers, status),
            "query_start_loc": read_only(call.query_start_loc),
            "tree_mask": np.zeros(0, np.uint8) if tree is None else read_only(tree.view(np.uint8)),
            "tree_cells": -1 if tree is None else len(tree),
            "has_tree": int(tree is not None),
            "sees_all": int(tree is not None or not call.options.get("causal", True)),
            "num_tokens": num_tokens,
        }

    def _of_call(self, inputs: Inputs, num_tokens: int, workers: int, status: int) -> dict[str, object]:
        """What has to do with a call as a whole, and with its partial results."""
        spec, most = self.spec, self.most_ranges(inputs.block_table.shape[1] * self.spec.block_size)
        return {
            "status": np.array([status], np.int32),
            "report": np.zeros(5, np.int64),
            "partial_max": np.full((most, num_tokens, spec.num_heads), np.nan, np.float32),
            "partial_sum": np.full((most, num_tokens, spec.num_heads), np.nan, np.float32),
            "partial_acc": np.full((most, num_tokens, spec.num_heads, spec.result_dim), np.nan, np.float32),
            "max_blocks": inputs.block_table.shape[1],
            "num_entries": 0,
            "num_blocks": len(inputs.key_cache),
            "batch": len(inputs.context_lens),
            "workers": workers,
        }

    def most_ranges(self, tokens: int) -> int:
        """Ranges that a sequence of so many tokens, at most, may have: as the host counts them."""
        return min(-(-tokens // self.tiling.range_tokens), self.tiling.most_ranges + 1)


@dataclasses.dataclass(frozen=True)
class StagedKernels:
    """The kernels of the staged pipeline of one spec, compiled for the emulator."""

    spec: PagedAttentionSpec
    row_tile: int
    kernels: dict[str, cuda_emulator.Kernel]
    source: str

    def decode(self, inputs: Inputs, scale=None):
        """(out, lse): the stages in turn over the blocks of one chunk of sequences and one tile of heads."""
        spec, batch, rows = self.spec, len(inputs.context_lens), self.row_tile
        shape = (spec.batch_chunk, rows)
        out, lse = np.full((batch, spec.num_heads, spec.result_dim), np.nan, inputs.out_dtype), inputs.lse
        arguments = {
            **_decode_arguments(spec, inputs, out, lse, scale),
            **{name: np.full((*shape, spec.block_size), np.nan, np.float32) for name in ("scores", "probs")},
            **{name: np.full((*shape, spec.result_dim), np.nan, np.float32) for name in ("tile_acc", "acc")},
            **{name: np.full(shape, np.nan, np.float32) for name in ("tile_max", "tile_sum", "row_max", "row_sum")},
        }
        for start in range(0, batch, spec.batch_chunk):
            lengths = inputs.context_lens[start : start + spec.batch_chunk]
            arguments |= {"batch_start": start, "num_seqs": len(lengths)}
            for kv_head, first in itertools.product(range(spec.num_kv_heads), range(0, spec.group, rows)):
                arguments |= {"kv_head": kv_head, "head_start": kv_head * spec.group + first}
                arguments["num_rows"] = min(rows, spec.group - first)
                for block in range(max(1, -(-int(lengths.max()) // spec.block_size))):
                    for name in ("qk_matmul", "softmax_prepare", "pv_matmul", "online_update"):
                        self._launch(name, arguments | {"block_idx": block})
                self._launch("normalize", arguments)
        return out, lse

    def _launch(self, name: str, arguments: dict[str, object]) -> None:
        values = [arguments[parameter.name] for parameter in cuda_build.parameters(self.source, name)]
        launch = cuda.staged_launches(self.spec)[name]
        assert launch.blocks == "num_seqs"
        self.kernels[f"{name}_kernel"].launch(arguments["num_seqs"], launch.threads, launch.shared_bytes, *values)


def _decode_arguments(spec: PagedAttentionSpec, inputs: Inputs, out, lse, scale) -> dict[str, object]:
    """What the kernels of both pipelines take of a call, by name."""
    arrays = ("query", "block_table", "context_lens")
    return {
        **{name: read_only(getattr(inputs, name)) for name in arrays},
        "key_cache": read_only(as_kept(spec, inputs.key_cache)),
        "value_cache": read_only(as_kept(spec, inputs.value_cache)),
        "out": out,
        "lse": lse,
        "table_seq": _stride(inputs.block_table, 0),
        "row_starts": np.zeros(1, np.int32),
        "row_step": 0,
        **split_scale(spec, spec.head_dim**-0.5 if scale is None else scale),
        **strides(inputs.query, q_batch=0, q_head=1),
        **cache_strides(spec, "k", inputs.key_cache),
        **cache_strides(spec, "v", inputs.value_cache),
        **strides(out, out_batch=0, out_head=1),
        **strides(lse, lse_batch=0),
        **{name: read_only(array) for name, array in inputs.heads.items()},
        **{name: _stride(inputs.heads[of], 0) for name, of in HEADS.items() if of in inputs.heads},
        **scale_strides(spec, inputs.heads),
        **{name: read_only(array) for name, array in function_arrays(spec, inputs.given).items()},
    }


def function_arrays(spec: PagedAttentionSpec, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays that functions read by the kernels' names; bools as bytes, and tables as the library has them."""
    arrays = {f"input_{name}": array for name, array in given.items()}
    arrays |= {each.name: np.frombuffer(each.data, NUMPY_DTYPES[each.dtype]) for each in spec.constants}
    return {name: array.view(np.int8) if array.dtype == bool else array for name, array in arrays.items()}


def split_scale(spec: PagedAttentionSpec, scale: float) -> dict[str, float]:
    """The two factors of a scale that kernels take, as the host makes them."""
    if not spec.wide_range:
        return {"query_scale": 1.0, "score_scale": scale}
    power = 2.0 ** min(max(math.frexp(scale)[1] - 1, -126), 0) if scale else 0.0
    return {"query_scale": power, "score_scale": scale / power if scale else 0.0}


def read_only(array: np.ndarray) -> np.ndarray:
    """A view that no kernel may write to."""
    view = array.view()
    view.flags.writeable = False
    return view


def as_kept(spec: PagedAttentionSpec, cache: np.ndarray) -> np.ndarray:
    """A cache as kernels take it: codes are bytes."""
    return cache.view(np.uint8) if spec.has_scales else cache


def scale_strides(spec: PagedAttentionSpec, arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The strides of key_scale and value_scale by the kernels' names: 0 where there is no such axis."""
    found = {}
    for prefix, name in (("ks", "key_scale"), ("vs", "value_scale")) if spec.has_scales else ():
        scales = arrays[name]
        if spec.token_scales:
            found |= strides(scales, **{f"{prefix}_block": 0, f"{prefix}_head": 1, f"{prefix}_row": 2})
        else:
            of_head = _stride(scales, 0) if spec.scales_of == "head" else 0
            found |= {f"{prefix}_block": 0, f"{prefix}_row": 0, f"{prefix}_head": of_head}
    return found


def cache_strides(spec: PagedAttentionSpec, prefix: str, cache: np.ndarray) -> dict[str, int]:
    """The strides of a cache by the kernels' names."""
    row, head = (1, 2) if spec.kv_layout == "NHD" else (2, 1)
    return {f"{prefix}_{axis}": _stride(cache, at) for axis, at in (("block", 0), ("row", row), ("head", head))}


def strides(array: np.ndarray, **axes: int) -> dict[str, int]:
    """Strides in elements, by the names of the axes."""
    return {name: _stride(array, axis) for name, axis in axes.items()}


def _stride(array: np.ndarray, axis: int) -> int:
    """In elements."""
    return array.strides[axis] // array.itemsize


def shared(spec: PagedAttentionSpec, inputs: Inputs) -> Inputs:
    """Inputs of one cache, where the spec says so: the values are the beginnings of the keys."""
    if not spec.shared_kv:
        return inputs
    return inputs.replace(value_cache=inputs.key_cache[..., : spec.result_dim])


def on_device(inputs: Inputs) -> Inputs:
    """Inputs whose arrays are aligned as the kernels take them."""
    arrays = {name: getattr(inputs, name) for name in ("query", "key_cache", "value_cache")}
    return inputs.replace(**{name: aligned(array) for name, array in arrays.items() if array is not None})


def aligned(array: np.ndarray, alignment: int = 16) -> np.ndarray:
    """A copy at an address that is a multiple of alignment, as of GPU memory."""
    buffer = np.empty(array.nbytes + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def build_decode(load, spec: PagedAttentionSpec, **sizes: int) -> CudaKernels:
    """The kernels of decode, of the chosen tiling or with other sizes; load(CUDA C) -> the emulator's kernels."""
    tiling = dataclasses.replace(cuda_tiling.choose(spec, ARCH), **sizes)
    return _loaded(load, spec, tiling, {kernel.__name__: kernel(spec, tiling) for kernel in cuda.DECODE})


def build_attend(load, spec: PagedAttentionSpec, **sizes: int) -> CudaKernels:
    """The kernels of attend, of the chosen tiling or with other sizes."""
    tiling = dataclasses.replace(cuda_tiling.choose_attend(spec, ARCH), **sizes)
    return _loaded(load, spec, tiling, {kernel.__name__: kernel(spec, tiling) for kernel in cuda.ATTEND})


def build_staged(load, spec: PagedAttentionSpec) -> StagedKernels:
    """The kernels of the staged pipeline's decode, scheduled."""
    tiling = cuda_tiling.staged(spec)
    stages, _ = cuda.build_staged(spec, tiling)
    source = cuda_build.emit(schedule(stages, tiling), ARCH)
    return StagedKernels(spec, tiling.row_tile, load(source), source)


def build_others(load, spec: PagedAttentionSpec) -> CudaKernels:
    """The kernels of append_kv and of checks."""
    tiling = cuda_tiling.choose(spec, ARCH)
    kernels = (cuda.cuda_check, cuda.cuda_check_queries, *cuda.APPEND)
    return _loaded(load, spec, tiling, {kernel.__name__: kernel(spec) for kernel in kernels})


def _loaded(load, spec: PagedAttentionSpec, tiling: CudaTiling, kernels: dict) -> CudaKernels:
    source = cuda_build.emit(IRModule(kernels), ARCH)
    return CudaKernels(spec, tiling, load(source), source)
