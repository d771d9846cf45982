"""GPUs by name, what an SM has, and how many thread blocks it runs at once, from NVIDIA's tables."""

from __future__ import annotations

import dataclasses

from pa_compiler.cuda.target import CudaTarget

REGISTERS = 65536
"""Of an SM; a warp takes them for 8 registers of its threads at a time."""

RESERVED_BYTES = 1024
"""Shared memory that a thread block takes besides its own."""

_LIMITS = {
    80: (2048, 164), 86: (1536, 100), 87: (1536, 164), 88: (1536, 100), 89: (1536, 100), 90: (2048, 228),
    100: (2048, 228), 120: (1536, 100),
}  # fmt: skip
"""Threads, and KB of shared memory, of an SM, by compute capability times ten (CUDA programming guide).

A capability that is not named has what the one before it has, or more; 8.8, which the guide lacks, this or more.
"""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet has it.

    Attributes:
        arch: Its architecture, such as "sm_90".
        multiprocessors: SMs.
        bandwidth: GB/s of its memory.
        flops: GFLOP/s of float32.
        tensor_flops: GFLOP/s of tensor cores in bfloat16 and float16, of dense matrices.
    """

    arch: str
    multiprocessors: int
    bandwidth: float
    flops: float
    tensor_flops: float


GPUS = {
    "A100": Gpu("sm_80", 108, 2039, 19_500, 312_000),  # SXM, 80 GB
    "H100": Gpu("sm_90", 132, 3350, 66_900, 989_400),  # SXM
    "H200": Gpu("sm_90", 132, 4800, 66_900, 989_400),  # SXM
    "L40S": Gpu("sm_89", 142, 864, 91_600, 362_000),
}


@dataclasses.dataclass(frozen=True)
class Residence:
    """Thread blocks that an SM runs at once, by each of what it has to share out."""

    registers: int
    shared: int
    threads: int

    @property
    def blocks(self) -> int:
        """By what runs out first."""
        return min(self.registers, self.shared, self.threads)


def residence(arch: str, threads: int, registers: int, shared_bytes: int) -> Residence:
    """For thread blocks of so many threads and bytes of shared memory, on an architecture such as "sm_90".

    Args:
        arch: From sm_80 on.
        threads: Of a block, whole warps.
        registers: Of a thread.
        shared_bytes: Of a block.
    """
    most_threads, shared_kb = _limits(arch)
    return Residence(
        registers=REGISTERS // (-(-registers // 8) * 8 * threads),
        shared=shared_kb * 1024 // (shared_bytes + RESERVED_BYTES),
        threads=most_threads // threads,
    )


def shared_limit(arch: str) -> int:
    """Bytes of dynamic shared memory that a thread block may have, from sm_80 on: an SM's, but for what is reserved."""
    return _limits(arch)[1] * 1024 - RESERVED_BYTES


def _limits(arch: str) -> tuple[int, int]:
    capability = CudaTarget(arch).capability
    return _LIMITS[max(known for known in _LIMITS if known <= capability)]
