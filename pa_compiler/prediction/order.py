"""The order in which a call reads memory: lines of a trace's steps, which rates.py reads with no kernel.

How fast a core reads goes by the order: prefetchers of the hardware follow runs of lines, and where these are short, no
more lines are on their way than a core's first level has room for.
"""

from __future__ import annotations

import itertools
import statistics
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pa_compiler.prediction.trace import Trace, accesses

LINE = 64
_WAYS = 8


class Order(NamedTuple):
    """Lines of a call's caches, which are counted as one behind another.

    Attributes:
        loaded: The bytes at which the lines begin that come from memory, int64, in the order of their first loads.
        fetched: The line that instructions fetch beside each of these; the same lines where they fetch few or none.
        size: Bytes of the caches.
        share: How much of a call's instructions is of blocks of them that access the caches.
    """

    loaded: np.ndarray
    fetched: np.ndarray
    size: int
    share: float = 1.0


class Cache:
    """Lines by sets, of which the one that was not used for longest gives way."""

    def __init__(self, size: int, ways: int = _WAYS) -> None:
        self._ways = ways
        self._sets: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(size // ways // LINE)]

    def has(self, line: int) -> bool:
        """Whether a line is there; it is from now on."""
        lines = self._sets[line % len(self._sets)]
        if line in lines:
            lines.move_to_end(line)
            return True
        lines[line] = None
        if len(lines) > self._ways:
            lines.popitem(last=False)
        return False


def order(trace: Trace, caches: list[np.ndarray], second_level: int) -> Order:
    """The order in which a call reads lines that a second-level cache of so many bytes has not.

    A line that is fetched is read where it is loaded at last. Which one is fetched beside a load is given by how far
    fetches are ahead of loads, in the median.
    """
    cache, size, shifts = Cache(second_level), 0, []
    for each in caches:
        shifts.append((each.ctypes.data, each.ctypes.data + each.nbytes, size - each.ctypes.data))
        size += each.nbytes
    loaded: list[int] = []
    fetched: list[int] = []
    ahead: list[int] = []
    waiting: set[int] = set()
    readers: set[int] = set()
    for block, address, fetches in _accesses(trace):
        at = next((address + shift for begin, end, shift in shifts if begin <= address < end), None)
        there = cache.has(address // LINE)
        if at is None:
            continue
        readers.add(block)
        line = at // LINE * LINE
        if fetches and not there:
            fetched.append(line)
            waiting.add(line)
        elif not fetches and (line in waiting or not there):
            waiting.discard(line)
            ahead.append(len(fetched) - len(loaded))
            loaded.append(line)
    executed = [count * len(block) for count, block in zip(trace.counts, trace.blocks, strict=True)]
    share = sum(executed[block] for block in readers) / sum(executed)
    lines = np.array(loaded, np.int64)
    if len(fetched) <= len(loaded) / 2:
        return Order(lines, lines, size, share)
    at_load = np.arange(len(loaded)) + int(statistics.median(ahead))
    return Order(lines, np.array(fetched, np.int64)[np.clip(at_load, 0, len(fetched) - 1)], size, share)


def _accesses(trace: Trace) -> Iterator[tuple[int, int, bool]]:
    """The blocks and addresses of accesses, and whether one only fetches a line."""
    fetches = [
        [instruction.startswith("prefetch") for instruction in block if accesses(instruction)] for block in trace.blocks
    ]
    steps = iter(trace.steps)
    for step in steps:
        block = -1 - step
        for address, of_fetch in zip(itertools.islice(steps, len(fetches[block])), fetches[block], strict=False):
            yield block, address, of_fetch
