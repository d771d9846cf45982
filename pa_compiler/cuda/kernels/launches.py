"""The CUDA kernels of a spec, and how each is launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tvm import IRModule
from tvm.tirx import PrimFunc

from pa_compiler import kernels
from pa_compiler.cuda.kernels.append import cuda_append_kv
from pa_compiler.cuda.kernels.check import cuda_check, cuda_check_slots
from pa_compiler.cuda.kernels.check_queries import cuda_check_queries
from pa_compiler.cuda.kernels.decode import cuda_attend, cuda_decode
from pa_compiler.cuda.kernels.merge import cuda_merge, cuda_merge_attend
from pa_compiler.cuda.kernels.merge_states import cuda_merge_float32_parts, cuda_merge_parts
from pa_compiler.cuda.tiles import WARP, CudaTiling, merge_threads
from pa_compiler.cuda.tiling import APPEND_THREADS, APPEND_TOKENS, CHECK_THREADS
from pa_compiler.schedules.cuda.threads import STAGED_THREADS
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
        blocks: How many, as a C expression of the kernel's own arguments, int32.
        threads: Of a block.
        shared_bytes: Dynamic shared memory of a block.
    """

    blocks: str
    threads: int
    shared_bytes: int


DECODE = (cuda_decode, cuda_merge)
"""The PrimFuncs of decode, in the order in which they are launched."""

ATTEND = (cuda_attend, cuda_merge_attend)
"""The same of attend."""

STAGED = kernels.PIPELINES["staged"]
"""The same of the staged pipeline, which are the CPU's: they are to be scheduled."""

APPEND = (cuda_append_kv, cuda_check_slots)
"""The PrimFuncs of append_kv, the same for both pipelines."""

MERGE = (cuda_merge_parts, cuda_merge_float32_parts)
"""The PrimFuncs of merge_states; the second where out_dtype is not float32."""


def build(
    spec: PagedAttentionSpec, tiling: CudaTiling, of_attend: CudaTiling | None = None, merges: bool = False
) -> IRModule:
    """The PrimFuncs of the fused pipeline, under their own names; those of attend with the tiling of_attend.

    With merges also those of merge_states.
    """
    made = {kernel.__name__: kernel(spec, tiling) for kernel in DECODE}
    made["cuda_check"] = cuda_check(spec)
    if of_attend is not None:
        made |= {kernel.__name__: kernel(spec, of_attend) for kernel in ATTEND}
        made["cuda_check_queries"] = cuda_check_queries(spec)
    return IRModule(made | {kernel.__name__: kernel(spec) for kernel in _without_tiling(spec, merges)})


def build_staged(spec: PagedAttentionSpec, tiling: Tiling, merges: bool = False) -> tuple[IRModule, IRModule]:
    """The PrimFuncs of the staged pipeline, under their own names: those that are to be scheduled, and the others."""
    stages = {kernel.__name__: kernel(spec, tiling) for kernel in STAGED}
    return IRModule(stages), IRModule({kernel.__name__: kernel(spec) for kernel in _without_tiling(spec, merges)})


def _without_tiling(spec: PagedAttentionSpec, merges: bool) -> tuple[Callable[[PagedAttentionSpec], PrimFunc], ...]:
    """The kernels that are the same for both pipelines."""
    if not merges:
        return APPEND
    return (*APPEND, *(MERGE if spec.result_dtype != "float32" else MERGE[:1]))


def launches(
    spec: PagedAttentionSpec, tiling: CudaTiling, of_attend: CudaTiling | None = None, merges: bool = False
) -> dict[str, Launch]:
    """The launches of the fused pipeline's kernels, by their names."""
    found = {
        "cuda_check": Launch("batch", CHECK_THREADS, 0),
        "cuda_decode": Launch(f"workers * {tiling.head_tiles(spec)}", tiling.threads, tiling.shared_bytes(spec)),
        "cuda_merge": Launch(f"batch * {spec.num_heads}", merge_threads(spec), 0),
    }
    if of_attend is not None:
        blocks, shared = f"workers * {spec.num_kv_heads}", of_attend.shared_bytes(spec)
        found |= {
            "cuda_check_queries": Launch("batch", CHECK_THREADS, 0),
            "cuda_attend": Launch(blocks, of_attend.threads, shared),
            "cuda_merge_attend": Launch(f"num_tokens * {spec.num_heads}", merge_threads(spec), 0),
        }
    return found | _other_launches(spec, merges)


def staged_launches(spec: PagedAttentionSpec, merges: bool = False) -> dict[str, Launch]:
    """The launches of the staged pipeline's kernels, by their names."""
    stages = {kernel.__name__: Launch("num_seqs", STAGED_THREADS, 0) for kernel in STAGED}
    return stages | _other_launches(spec, merges)


def _other_launches(spec: PagedAttentionSpec, merges: bool) -> dict[str, Launch]:
    """Those of the kernels that are the same for both pipelines."""
    per_append, per_check = APPEND_TOKENS - 1, CHECK_THREADS - 1
    append_shared = APPEND_THREADS // WARP * APPEND_TOKENS * 4  # an int32 each
    found = {
        "cuda_append_kv": Launch(f"(num_tokens + {per_append}) / {APPEND_TOKENS}", APPEND_THREADS, append_shared),
        "cuda_check_slots": Launch(f"(num_tokens + {per_check}) / {CHECK_THREADS}", CHECK_THREADS, 0),
    }
    for kernel in _without_tiling(spec, merges):
        if kernel not in APPEND:
            found[kernel.__name__] = Launch(f"num_tokens * {spec.num_heads}", merge_threads(spec), 0)
    return found
