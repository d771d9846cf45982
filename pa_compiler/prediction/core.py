"""A core that executes a trace out of order, from its first-level cache and its second-level cache.

Instructions are taken in their order, so many in a cycle; each begins when its operands are there and a pipe is free,
and as many are on their way as the core has room for. A line that is not in the first-level cache comes from the
second, one in some cycles. What comes from memory is not of the core: order.py has it.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Sequence
from typing import NamedTuple

from pa_compiler.prediction.instructions import PIPES, Operation, operation
from pa_compiler.prediction.trace import Trace

LINE = 64
_WARM = 0.4
"""The part of a trace that fills the caches, and is not counted."""
_LEAST = 3
"""Times that a block has to be executed in what is counted, for its mean to stand for all of its executions."""


class Sizes(NamedTuple):
    """What a core has room for. Those of Zen 3, by AMD's Software Optimization Guide for Family 19h.

    Attributes:
        width: Instructions taken in a cycle.
        in_flight: Instructions that have begun and not ended.
        vectors: Those of them that write a vector register; the architecture's own registers are of the same file.
        loads: Those of them that load.
        waiting: Those of them on vectors that may wait for a pipe.
        retired: Instructions that end in a cycle.
        loads_a_cycle: Of vectors.
        first, first_ways: Bytes of the first-level cache, and lines of a set.
        second, second_ways: The same of the second-level cache.
        second_latency: Cycles until a line comes from there, beside those of a load.
        fill: Cycles from one such line to the next.
        forwarding: Cycles from a store to a load of the same place on the stack.
    """

    width: int = 6
    in_flight: int = 256
    vectors: int = 112
    loads: int = 72
    waiting: int = 96
    retired: int = 8
    loads_a_cycle: int = 2
    first: int = 32 << 10
    first_ways: int = 8
    second: int = 512 << 10
    second_ways: int = 8
    second_latency: int = 15
    fill: int = 2
    forwarding: int = 5


class Cache:
    """Lines by sets, of which the one that was not used for longest gives way."""

    def __init__(self, size: int, ways: int) -> None:
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


class Core:
    """The state of a core."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes, self._cache = sizes, Cache(sizes.first, sizes.first_ways)
        self._busy: list[set[int]] = [set() for _ in range(PIPES)]
        self._loads: dict[int, int] = defaultdict(int)
        self._stores: set[int] = set()
        self._ready: dict[str, float] = {}
        self._slots: dict[str, float] = {}
        self._arriving: dict[int, float] = {}
        self._filled = 0.0
        self._now, self._taken = 0, 0  # the cycle in which instructions are taken, and how many have been
        self._all, self._vectors, self._loading, self._waiting = (
            deque([0.0] * count, count) for count in (sizes.in_flight, sizes.vectors, sizes.loads, sizes.waiting)
        )
        self.ended = 0.0

    def branch(self) -> None:
        """What follows stands elsewhere, and is taken in another cycle."""
        self._now, self._taken = self._now + 1, 0

    def execute(self, what: Operation, address: int | None) -> None:
        """Take one more instruction, which accesses an address or None."""
        sizes, begin = self._sizes, self._taken_at(what)
        start = max([begin, *(self._ready.get(register, 0) for register in what.sources)])
        arrived = self._fetched(what, address) if address is not None else 0.0
        if what.loads:
            asked = begin if what.pipes else start  # the address of an operand is early
            lines = 2 if address is not None and _crosses(what, address) else 1
            start = max(start, *(self._load_at(int(asked)) + what.load_latency for _ in range(lines)))
            if what.load_latency:
                start = max(start, arrived + (3 if what.on_vectors else 0))
            if what.slot:
                start = max(start, self._slots.get(what.slot, 0) + sizes.forwarding)
        end = max([start, *(self._pipe_at(pipes, int(-(-start // 1))) for pipes in what.pipes)])
        if what.pipes and what.pipes[0][0] < 4:
            self._waiting.append(max(end, self._waiting[-1]))
        end += what.latency
        if what.stores:
            end = next(cycle for cycle in range(int(end), int(end) + 10**6) if cycle not in self._stores)
            self._stores.add(int(end))
            self._slots[what.slot] = end
        for register in what.results:
            self._ready[register] = end
        self.ended = max(self.ended, end, self._all[-sizes.retired] + 1)
        self._all.append(self.ended)
        if what.on_vectors:
            self._vectors.append(self.ended)
        if what.loads:
            self._loading.append(self.ended)

    def forget(self) -> None:
        """Leave out what cannot matter any more."""
        for cycles in (*self._busy, self._stores):
            cycles -= {cycle for cycle in cycles if cycle < self._now}
        for cycle in [cycle for cycle in self._loads if cycle < self._now]:
            del self._loads[cycle]

    def _taken_at(self, what: Operation) -> int:
        """The cycle after the one in which an instruction is taken."""
        if self._taken == self._sizes.width:
            self.branch()
        room = max(self._now, self._all[0])
        room = max(room, self._vectors[0]) if what.on_vectors else room
        room = max(room, self._loading[0]) if what.loads else room
        room = max(room, self._waiting[0]) if what.pipes else room
        if room > self._now:
            self._now, self._taken = int(room), 0
        self._taken += 1
        return self._now + 1

    def _fetched(self, what: Operation, address: int) -> float:
        """When the lines of an access are in the first-level cache; 0 where they are."""
        arrived = 0.0
        for line in range(address // LINE, address // LINE + 1 + _crosses(what, address)):
            if not self._cache.has(line):
                self._filled = max(self._filled, self._now + 1) + self._sizes.fill
                self._arriving[line] = self._filled + self._sizes.second_latency - 1 - self._sizes.fill
            if what.loads and line in self._arriving:
                if self._arriving[line] > self._now:
                    arrived = max(arrived, self._arriving[line])
                else:
                    del self._arriving[line]
        return arrived

    def _load_at(self, cycle: int) -> int:
        while self._loads[cycle] >= self._sizes.loads_a_cycle:
            cycle += 1
        self._loads[cycle] += 1
        return cycle

    def _pipe_at(self, pipes: Sequence[int], cycle: int) -> int:
        """The first cycle from one on in which one of some pipes is free; it is taken."""
        while True:
            for pipe in pipes:
                if cycle not in self._busy[pipe]:
                    self._busy[pipe].add(cycle)
                    return cycle
            cycle += 1


def _crosses(what: Operation, address: int) -> bool:
    """Whether a vector lies in two lines."""
    return what.wide and address % LINE > LINE // 2


def cycles(trace: Trace, sizes: Sizes = Sizes()) -> list[float]:  # noqa: B008  # a frozen value
    """The cycles of a call by its blocks: the mean of those in the trace's steps, times how often one was executed."""
    core, steps = Core(sizes), trace.steps
    spent: dict[int, list[float]] = defaultdict(list)
    operations = [[operation(instruction) for instruction in block] for block in trace.blocks]
    at, before = 0, -1
    for done in range(len(steps)):
        number = -1 - steps[at]
        end = at + 1 + sum(what.accesses for what in operations[number])
        if end > len(steps):
            break
        addresses, at = iter(steps[at + 1 : end]), end
        if number != before + 1:
            core.branch()
        begin = core.ended
        for what in operations[number]:
            core.execute(what, next(addresses) if what.accesses else None)
        if at > _WARM * len(steps):
            spent[number].append(core.ended - begin)
        if done % 512 == 0:
            core.forget()
        before = number
        if at == len(steps):
            break
    return [
        count * (sum(found) / len(found) if len(found := spent[number]) >= _LEAST else len(block) / 4)
        for number, (count, block) in enumerate(zip(trace.counts, trace.blocks, strict=True))
    ]
