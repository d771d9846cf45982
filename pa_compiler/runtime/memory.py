"""Memory for caches: zeros straight from the system, on huge pages where it has them."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import numpy as np

from pa_compiler.runtime.arguments import shown

HUGE_PAGE = 1 << 21
"""Bytes of the huge pages of x86-64, and the alignment of what huge_zeros returns."""


def huge_zeros(shape: Sequence[int], dtype: np.dtype, advice: int = mmap.MADV_HUGEPAGE) -> np.ndarray:
    """A new array of zeros that begins at a multiple of 2 MB, in memory of its own that is advised to use huge pages.

    Attention reads a cache block by block, in any order: on pages of 4 KB much of its time goes into their translation.
    Memory is taken when it is first written. A system without transparent huge pages refuses the advice, and the array
    lies on ordinary pages, as it does with the advice MADV_NOHUGEPAGE. The memory goes back to the system with the last
    view of the array.

    Raises:
        MemoryError: the system does not give that much.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    whole_pages = -(-num_bytes // HUGE_PAGE) * HUGE_PAGE
    try:
        # Private: what is shared is a file in memory to the kernel, which has other rules for huge pages.
        region = mmap.mmap(-1, whole_pages + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        extents = ", ".join(map(shown, shape))
        raise MemoryError(f"no memory for an array of {shown(num_bytes)} bytes, of shape [{extents}]") from error
    address = np.frombuffer(region, np.uint8).ctypes.data
    start = -address % HUGE_PAGE
    with contextlib.suppress(OSError):  # no transparent huge pages
        region.madvise(advice, start, whole_pages)
    return np.frombuffer(region, np.uint8, num_bytes, start).view(dtype).reshape(shape)
