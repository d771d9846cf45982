"""Calls of decode on one thread: predicted, and measured.

A call is predicted from two times. That of the core is the cycles of its machine code on a model, at the clock that the
core multiplies with; that of memory is what its keys and values need in the order in which the call reads them. Where
instructions fetch the lines, a call takes both: they wait for room in the core's first level, and what follows waits
for them. Where the hardware's prefetchers run ahead, as in a sweep, blocks that read the caches take the longer of the
two, and the others come in addition. Nothing is fitted.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pa_compiler.prediction.core import LINE, cycles
from pa_compiler.prediction.order import lines, readers
from pa_compiler.prediction.rates import Rates, last_level_cache
from pa_compiler.prediction.trace import Recorder, fetched
from pa_compiler.verification import cases
from pa_compiler.verification.cases import Case, Inputs
from pa_compiler.verification.codes import scale_arrays

KNOWN = "AMD Zen 3"
OPERATIONS = 32
"""Of float32 in a cycle of Zen 3: two vectors of 8, multiplied and added."""

_ZEN3 = (25, {*range(0x10), *range(0x20, 0x60)})
"""The family and the models of /proc/cpuinfo; others of the family are Zen 4."""
_ROUNDS, _TURN, _LEAST = 4, 0.08, 3
_BEYOND = 2
"""Times as large as the last-level cache: what calls in turn read, so that each reads from memory."""


class Call(NamedTuple):
    """A call of a module, of which each turn reads other blocks of the same caches.

    Attributes:
        module: What is called, on one thread.
        case: The size of the call.
        turns: The arguments of each turn; they differ in block_table.
        heads: The keywords of all.
    """

    module: Any
    case: Case
    turns: Sequence[Inputs]
    heads: dict[str, Any]

    def run(self, turn: int, out: Any = None) -> Any:
        """Call once."""
        return cases.call(self.module, self.case, self.turns[turn % len(self.turns)], out, **self.heads)


class Times(NamedTuple):
    """Seconds of a call on the core, of memory, and of both as they overlap."""

    core: float
    memory: float
    whole: float


class Modelled(NamedTuple):
    """What is known of a call before anything is timed.

    Attributes:
        cycles: Of its machine code on the model of a core.
        reading: Those of them that are of blocks that read keys and values.
        fetches: Whether most of the lines of keys and values are fetched by instructions.
        kv_bytes: Bytes of keys and values that it has to read.
        lines: The bytes of the caches at which the lines that it reads begin, in its order.
        size: Bytes of the caches.
    """

    cycles: float
    reading: float
    fetches: bool
    kv_bytes: int
    lines: np.ndarray
    size: int

    def times(self, clock: float, bandwidth: float) -> Times:
        """At so many cycles and bytes a second."""
        core, memory = self.cycles / clock, self.kv_bytes / bandwidth
        if self.fetches:
            return Times(core, memory, core + memory)
        reading = self.reading / clock
        return Times(core, memory, core - reading + max(reading, memory))


class Measured(NamedTuple):
    """Medians of rounds in which all of it takes turns.

    Attributes:
        seconds: Of a call on one thread.
        times: How many calls.
        operations: Float32 operations a second of the core; None without a compiler.
        bandwidth: Bytes a second in the call's order; None where it is not modelled.
        predicted: The times that these rates give; None where it is not modelled.
    """

    seconds: float
    times: int
    operations: float | None
    bandwidth: float | None
    predicted: Times | None


def unknown(module: Any, case: Case, cpuinfo: str = "") -> str:
    """What keeps a call from being predicted on this machine; "" where it is. cpuinfo: as /proc/cpuinfo has it."""
    info = cpuinfo or Path("/proc/cpuinfo").read_text()
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", info.partition("\n\n")[0], re.MULTILINE))
    family, models = _ZEN3
    is_known = (fields.get("vendor_id"), fields.get("cpu family")) == ("AuthenticAMD", str(family))
    if not is_known or int(fields.get("model", -1)) not in models:
        return f"the model knows {KNOWN}, and not {fields.get('model name', 'the CPU of this machine')}"
    if case.query_lens is not None:
        return "the model is of calls of decode, and not of attend"
    if not module.sources:
        return "the model needs the machine code as text, which a loaded module has not"
    return ""


def prepared(module: Any, case: Case, seed: int = 0) -> Call:
    """Arguments for a call, on random caches of so many turns that they are larger than the last-level cache."""
    count = -(-_BEYOND * last_level_cache() // max(case.cache_bytes, 1))
    lens = tuple(case.context_lens.tolist())
    many = dataclasses.replace(case, batch=case.batch * count, seq_lens=lens, query_lens=None)
    caches = module.empty_cache(many.num_blocks)
    arrays = cases.make_inputs(dataclasses.replace(case, max_model_len=None), seed, caches=caches)
    tables = np.split(cases.distinct_blocks(many, seed), count)
    scales = scale_arrays(np.random.default_rng((2, seed)), case.spec, many.num_blocks)
    heads = cases.head_arrays(case, seed) | scales
    return Call(module, case, [arrays._replace(block_table=table) for table in tables], heads)


def modelled(call: Call) -> Modelled:
    """Run a call's machine code on the model; no time is measured.

    Raises:
        RuntimeError: there is no C++ compiler.
    """
    with tempfile.TemporaryDirectory() as directory:
        recorder = Recorder(call.module, Path(directory))
        call._replace(module=recorder.module).run(0)
        trace = recorder.trace()
    of_call = [each for each in call.turns[0][1:3] if each is not None]
    spent = cycles(trace)
    reading = sum(spent[block] for block in readers(trace, of_call))
    kv_bytes = call.case.kv_bytes
    return Modelled(sum(spent), reading, fetched(trace) * LINE > kv_bytes / 2, kv_bytes, *lines(trace, of_call))


def measured(call: Call, rates: Rates | None, model: Modelled | None) -> Measured:
    """Time a call on one thread, and the rates that the model needs between its turns."""
    before, call.module.num_threads = call.module.num_threads, 1
    try:
        out = call.run(0)
        rounds, times = [], 0
        for _ in range(_ROUNDS):
            operations = rates.operations() if rates else 0.0
            bandwidth = rates.bandwidth(model.lines, model.size) if rates and model and len(model.lines) else 0.0
            seconds: list[float] = []
            while sum(seconds) < _TURN or len(seconds) < _LEAST:
                times += 1
                start = time.perf_counter()
                call.run(times, out)
                seconds.append(time.perf_counter() - start)
            rounds.append((statistics.median(seconds), operations, bandwidth))
    finally:
        call.module.num_threads = before
    seconds_of_call, operations, bandwidth = (statistics.median(each) for each in zip(*rounds, strict=True))
    predicted = model.times(operations / OPERATIONS, bandwidth) if model and bandwidth else None
    return Measured(seconds_of_call, times, operations or None, bandwidth or None, predicted)
