"""Runs the CUDA kernels of a spec on the emulator, as the host will: the same launches, arguments by name."""

from __future__ import annotations

import dataclasses
import math

import cuda_emulator
import numpy as np
from inputs import Inputs
from tvm import IRModule

from pa_compiler.cuda import build as cuda_build
from pa_compiler.cuda import tiling as cuda_tiling
from pa_compiler.cuda.kernels import launches as cuda
from pa_compiler.cuda.tiling import CudaTiling
from pa_compiler.spec import PagedAttentionSpec

ARCH = "sm_90"


@dataclasses.dataclass(frozen=True)
class CudaKernels:
    """The kernels of one spec, compiled for the emulator."""

    spec: PagedAttentionSpec
    tiling: CudaTiling
    kernels: dict[str, cuda_emulator.Kernel]
    source: str

    def launch(self, name: str, arguments: dict[str, object], order: str = "forward") -> None:
        """Launch a kernel with arguments by the names of its parameters, which may be fewer."""
        launch = cuda.launches(self.spec, self.tiling)[name]
        numbers = {key: value for key, value in arguments.items() if isinstance(value, int)}
        blocks = eval(launch.blocks.replace("/", "//"), {}, numbers)
        values = [arguments[parameter.name] for parameter in cuda_build.parameters(self.source, name)]
        self.kernels[f"{name}_kernel"].launch(blocks, launch.threads, launch.shared_bytes, *values, order=order)

    def decode(self, inputs: Inputs, *, extra=8, scale=None, status=0, order="forward"):
        """(out, lse) of cuda_decode and cuda_merge, with extra work items more than sequences."""
        arguments = self.arguments(inputs, extra, scale, status)
        self.launch("cuda_decode", arguments, order)
        self.launch("cuda_merge", arguments, order)
        return arguments["out"], arguments["lse"]

    def arguments(self, inputs: Inputs, extra: int, scale=None, status=0) -> dict[str, object]:
        """What cuda_decode and cuda_merge take, by name; NaN in all partial results, of which an item has one."""
        spec, batch = self.spec, len(inputs.context_lens)
        items = batch + extra
        out, lse = inputs.out, inputs.lse
        return {
            "query": read_only(inputs.query),
            "key_cache": read_only(inputs.key_cache),
            "value_cache": read_only(inputs.value_cache),
            "block_table": read_only(inputs.block_table),
            "context_lens": read_only(inputs.context_lens),
            "status": np.array([status], np.int32),
            "report": np.zeros(5, np.int64),
            "partial_max": np.full((items, spec.num_heads), np.nan, np.float32),
            "partial_sum": np.full((items, spec.num_heads), np.nan, np.float32),
            "partial_acc": np.full((items, spec.num_heads, spec.head_dim), np.nan, np.float32),
            "out": out,
            "lse": lse,
            "table_seq": _stride(inputs.block_table, 0),
            "max_blocks": inputs.block_table.shape[1],
            "num_blocks": len(inputs.key_cache),
            "batch": batch,
            "items": items,
            **split_scale(spec, spec.head_dim**-0.5 if scale is None else scale),
            **strides(inputs.query, q_batch=0, q_head=1),
            **cache_strides(spec, "k", inputs.key_cache),
            **cache_strides(spec, "v", inputs.value_cache),
            **strides(out, out_batch=0, out_head=1),
            **strides(lse, lse_batch=0),
        }


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


def on_device(inputs: Inputs) -> Inputs:
    """Inputs whose arrays are aligned as the kernels take them."""
    return inputs.replace(**{name: aligned(getattr(inputs, name)) for name in ("query", "key_cache", "value_cache")})


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


def build_others(load, spec: PagedAttentionSpec) -> CudaKernels:
    """The kernels of append_kv and of checks."""
    tiling = cuda_tiling.choose(spec, ARCH)
    return _loaded(load, spec, tiling, {kernel.__name__: kernel(spec) for kernel in (cuda.cuda_check, *cuda.APPEND)})


def _loaded(load, spec: PagedAttentionSpec, tiling: CudaTiling, kernels: dict) -> CudaKernels:
    source = cuda_build.emit(IRModule(kernels), ARCH)
    return CudaKernels(spec, tiling, load(source), source)
