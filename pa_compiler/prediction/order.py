"""The order in which a call reads memory: lines of a trace's steps, which rates.py reads by loads alone.

How fast a core reads goes by the order: prefetchers of the hardware follow runs of lines, and where these are short, no
more lines are on their way than a core's first level has room for.
"""

from __future__ import annotations

import numpy as np

from pa_compiler.prediction.core import LINE, Cache, Sizes
from pa_compiler.prediction.trace import Trace


def lines(trace: Trace, caches: list[np.ndarray]) -> tuple[np.ndarray, int]:
    """The bytes at which lines of a call's caches begin that no second-level cache has, in order, and the bytes of all.

    The caches are counted as one behind another.
    """
    second = Cache(Sizes().second, Sizes().second_ways)
    begins, size, found = [], 0, []
    for each in caches:
        begins.append((each.ctypes.data, each.ctypes.data + each.nbytes, size - each.ctypes.data))
        size += each.nbytes
    for step in trace.steps:
        if step >= 0 and not second.has(step // LINE):
            found += [step + shift for begin, end, shift in begins if begin <= step < end]
    return np.array(found, np.int64) // LINE * LINE, size


def readers(trace: Trace, caches: list[np.ndarray]) -> set[int]:
    """The numbers of the blocks that access a call's caches."""
    found, block = set(), -1
    for step in trace.steps:
        if step < 0:
            block = -1 - step
        elif any(each.ctypes.data <= step < each.ctypes.data + each.nbytes for each in caches):
            found.add(block)
    return found
