"""The CUDA kernels of a spec, and how each is launched."""

from __future__ import annotations

from typing import NamedTuple

from tvm import IRModule

from pa_compiler import kernels
from pa_compiler.cuda.kernels.append import cuda_append_kv
from pa_compiler.cuda.kernels.check import cuda_check, cuda_check_slots
from pa_compiler.cuda.kernels.decode import cuda_decode
from pa_compiler.cuda.kernels.merge import cuda_merge
from pa_compiler.cuda.tiles import WARP, CudaTiling
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

STAGED = kernels.PIPELINES["staged"]
"""The same of the staged pipeline, which are the CPU's: they are to be scheduled."""

APPEND = (cuda_append_kv, cuda_check_slots)
"""The PrimFuncs of append_kv, the same for both pipelines."""


def build(spec: PagedAttentionSpec, tiling: CudaTiling) -> IRModule:
    """The PrimFuncs of the fused pipeline, under their own names."""
    decode = {kernel.__name__: kernel(spec, tiling) for kernel in DECODE}
    return IRModule(decode | {kernel.__name__: kernel(spec) for kernel in (cuda_check, *APPEND)})


def build_staged(spec: PagedAttentionSpec, tiling: Tiling) -> tuple[IRModule, IRModule]:
    """The PrimFuncs of the staged pipeline, under their own names: those that are to be scheduled, and the others."""
    stages = {kernel.__name__: kernel(spec, tiling) for kernel in STAGED}
    return IRModule(stages), IRModule({kernel.__name__: kernel(spec) for kernel in APPEND})


def launches(spec: PagedAttentionSpec, tiling: CudaTiling) -> dict[str, Launch]:
    """The launches of the fused pipeline's kernels, by their names."""
    return {
        "cuda_check": Launch("batch", CHECK_THREADS, 0),
        "cuda_decode": Launch(f"items * {tiling.head_tiles(spec)}", tiling.threads, tiling.shared_bytes(spec)),
        "cuda_merge": Launch(f"batch * {spec.num_heads}", tiling.merge_threads(spec), 0),
        **_append_launches(),
    }


def staged_launches() -> dict[str, Launch]:
    """The launches of the staged pipeline's kernels, by their names."""
    return {kernel.__name__: Launch("num_seqs", STAGED_THREADS, 0) for kernel in STAGED} | _append_launches()


def _append_launches() -> dict[str, Launch]:
    per_append, per_check = APPEND_TOKENS - 1, CHECK_THREADS - 1
    append_shared = APPEND_THREADS // WARP * APPEND_TOKENS * 4  # an int32 each
    return {
        "cuda_append_kv": Launch(f"(num_tokens + {per_append}) / {APPEND_TOKENS}", APPEND_THREADS, append_shared),
        "cuda_check_slots": Launch(f"(num_tokens + {per_check}) / {CHECK_THREADS}", CHECK_THREADS, 0),
    }
