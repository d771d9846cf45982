"""Predict how long calls of decode take on one thread, and measure it: python -m benchmarks.prediction.

A call is predicted from two times. That of the core is the cycles of its machine code on a model, at the clock that the
FMA probe shows; that of memory is what its keys and values need in the order in which the call reads them. Where
instructions fetch the lines, a call takes both: they wait for room in the core's first level, and what follows waits
for them. Where the hardware's prefetchers run ahead, as in a sweep, blocks that read the caches take the longer of the
two, and the others come in addition. Nothing is fitted: the probes are measured between the calls.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from rich.console import Console

import pa_compiler
from benchmarks import inputs, machine
from benchmarks.cases import ALL_CASES, CASES, sized
from benchmarks.prediction.core import LINE, cycles
from benchmarks.prediction.order import Reader, lines, readers
from benchmarks.prediction.trace import Recorder, fetched
from benchmarks.roofline import FMA, Probe
from pa_compiler.verification import cases
from pa_compiler.verification.cases import Case

_OPERATIONS = 32  # of float32 in a cycle of Zen 3, two vectors of 8 multiplied and added
_ROUNDS, _TURN = 4, 0.08


class Row(NamedTuple):
    """A call that is predicted, and what is known of it before it is timed.

    Attributes:
        name, case, module, arrays: What is called.
        cycles: Of its machine code on the model of a core.
        reading: Those of them that are of blocks that read keys and values.
        fetches: Whether most of the lines of keys and values are fetched by instructions.
        lines: The bytes of the caches at which the lines that it reads begin, in its order.
        size: Bytes of the caches.
    """

    name: str
    case: Case
    module: Any
    arrays: cases.Inputs
    cycles: float
    reading: float
    fetches: bool
    lines: np.ndarray
    size: int

    def seconds(self, clock: float, bandwidth: float) -> tuple[float, float, float]:
        """Of the core, of memory, and of the call, at so many cycles and bytes a second."""
        core, memory = self.cycles / clock, self.case.kv_bytes / bandwidth
        if self.fetches:
            return core, memory, core + memory
        reading = self.reading / clock
        return core, memory, core - reading + max(reading, memory)


def predicted(name: str, case: Case, seed: int = 0) -> Row:
    """A call whose machine code has been run by the model; no time is measured."""
    spec = case.spec
    module = pa_compiler.compile(spec, attend=False)
    module.num_threads = 1
    dtype = np.dtype(spec.dtype)
    caches = [
        inputs.empty((case.num_blocks, *shape[1:]), dtype, True)
        for shape in (spec.key_cache_shape, spec.value_cache_shape)
    ]
    arrays = cases.make_inputs(case, seed, caches=(caches[0], None if spec.shared_kv else caches[1]))
    arrays = arrays._replace(block_table=cases.distinct_blocks(case, seed))
    with tempfile.TemporaryDirectory() as directory:
        recorder = Recorder(module, Path(directory))
        cases.call(recorder.module, case, arrays)
        trace = recorder.trace()
    of_call = [each for each in arrays[1:3] if each is not None]
    spent = cycles(trace)
    reading = sum(spent[block] for block in readers(trace, of_call))
    fetches = fetched(trace) * LINE > case.kv_bytes / 2
    return Row(name, case, module, arrays, sum(spent), reading, fetches, *lines(trace, of_call))


def measured(row: Row, probe: Probe, reader: Reader, cpu: int) -> tuple[float, float, float]:
    """Seconds of a call, cycles a second, and bytes a second in the call's order: medians of rounds of all three."""
    out = cases.call(row.module, row.case, row.arrays)
    rounds = []
    for _ in range(_ROUNDS):
        clock = probe.measure([cpu])[FMA] / _OPERATIONS
        bandwidth = reader.bandwidth(row.lines, row.size)
        seconds: list[float] = []
        while sum(seconds) < _TURN or len(seconds) < 2:
            start = time.perf_counter()
            cases.call(row.module, row.case, row.arrays, out)
            seconds.append(time.perf_counter() - start)
        rounds.append((statistics.median(seconds), clock, bandwidth))
    call, clock, bandwidth = (statistics.median(each) for each in zip(*rounds, strict=True))
    return call, clock, bandwidth


@click.command(context_settings={"show_default": True})
@click.option("--case", "names", multiple=True, type=click.Choice(list(ALL_CASES)), help="Default: the common ones.")
def main(names: tuple[str, ...]) -> None:
    """Predict calls of decode on one thread of a core like Zen 3's, and measure them."""
    cpu, cache = machine.cores()[0], machine.last_level_cache()
    os.sched_setaffinity(0, {cpu})
    console = Console(highlight=False)
    console.print(f"{machine.cpu_name()}; the model is of Zen 3; one thread, times in ms")
    console.print(f"{'':28}  cycles/clock  memory  predicted  measured  ratio")
    rows = []
    for name in names or CASES:
        for layout in ("NHD", "packed"):
            case = sized(name, cache)
            case = dataclasses.replace(case, spec=dataclasses.replace(case.spec, kv_layout=layout))
            with console.status(f"{name} {layout}: runs by the model"):
                rows.append(predicted(f"{name} {layout}", case))
    probe, reader = Probe(cache), Reader(cache)
    for row in rows:
        call, clock, bandwidth = measured(row, probe, reader, cpu)
        core, memory, whole = row.seconds(clock, bandwidth)
        console.print(
            f"{row.name:28}  {1e3 * core:12.2f}  {1e3 * memory:6.2f}  {1e3 * whole:9.2f}  "
            f"{1e3 * call:8.2f}  {whole / call:5.2f}"
        )


if __name__ == "__main__":
    main()
