"""tune(): the tiles of a spec that are fastest on this CPU, found by timing libraries in turns, and kept as a record.

What is varied (cpu/choices.py) are constants of machines that the table has one value of for many specs. Of what these
make of a spec, each tiling is built and timed once. One choice after the other is varied from the best so far, the
order of memory first, since the others depend on it.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pa_compiler import backends, compiler, records, turns
from pa_compiler.cpu import choices, target, tiles
from pa_compiler.runtime.module import Module
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.verification import cases

MARGIN = 1.02
"""How many times as fast as the best so far a tiling has to be, by the median of turns, to take its place."""

TURNS = 9
CONTEXT, PROMPT = 2048, 128
"""Tokens of context of each sequence of decode, and of attend's one sequence, which has a prompt behind them."""

LEAST_BYTES, MOST_BYTES = 1 << 26, 1 << 30
"""Of keys and values that a call of decode reads: four times the last-level cache, within these."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A tiling that was timed.

    Attributes:
        kernel: "decode" or "attend".
        choice: What was varied.
        fields: Its values.
        ratio: How many times as fast as the best before it, by the median of turns.
        spread: The first and the third quartile of the turns' ratios.
        taken: Whether it took that one's place.
    """

    kernel: str
    choice: str
    fields: dict[str, Any]
    ratio: float
    spread: tuple[float, float]
    taken: bool


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What tune() found.

    Attributes:
        tuned: By kernels, the fields that differ from the table's: what a target's "tuned" takes.
        trials: What was timed, in order.
        finished: Whether there was time for all choices.
        path: The record, which compile() takes up from now on.
    """

    tuned: dict[str, dict[str, Any]]
    trials: tuple[Trial, ...]
    finished: bool
    path: Path


def tune(
    spec: PagedAttentionSpec,
    *,
    seconds: float = 110.0,
    threads: int | None = None,
    progress: Callable[[str], object] = lambda text: None,
) -> Tuned:
    """Find the tiles that are fastest for a spec on this CPU, and keep them as a record that compile() takes up.

    Calls of decode read contexts of 2048 tokens from memory, as many as four last-level caches hold; calls of attend
    have a prompt of 128 tokens behind as many. Results of each library are compared with float64 before it is timed.
    Tiles change the order of sums and nothing else of a result. The record is of this CPU, by its maker's numbers, and
    of this spec; a target that names a CPU does not take it up, nor does any where PA_TUNE is 0.

    Args:
        spec: What is tuned, in the fused pipeline.
        seconds: After so many no further library is built.
        threads: Of the calls; by default as many as a module uses.
        progress: Called with what is done next, in words.

    Raises:
        TypeError, ValueError, RuntimeError, ImportError: as compile does.
        AssertionError: a library's result is not within the tolerances of float64.
        OSError: the cache directory, where records are kept, cannot be used.
    """
    records.path_of(spec)  # a directory that cannot be used is said before two minutes are spent
    search = _Search(spec, time.monotonic() + seconds, threads, progress)
    tuned = {kernel: search.of(kernel) for kernel in choices.CHOICES}
    tuned = choices.checked(tuned)
    trials = tuple(search.trials)
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    record = {"tuned": tuned, "date": today, "trials": [dataclasses.asdict(each) for each in trials]}
    return Tuned(tuned, trials, not search.cut, records.keep(spec, record))


class _Search:
    """One after the other, the choices of a kernel, until the time is over."""

    def __init__(
        self, spec: PagedAttentionSpec, end: float, threads: int | None, progress: Callable[[str], object]
    ) -> None:
        self._spec, self._end, self._threads, self._progress = spec, end, threads, progress
        self.trials: list[Trial] = []
        self.cut = False

    def of(self, kernel: str) -> dict[str, Any]:
        """The fields that are best for a kernel."""
        best: dict[str, Any] = {}
        self._progress(f"{kernel}: the tiles of the table")
        timed = _Timed(self._spec, kernel, self._threads)
        library = timed.built(best)
        seen = {self._tiles(kernel, best)}
        for choice, options in choices.CHOICES[kernel].items():
            rivals = []
            for fields in options:
                made = self._tiles(kernel, best | fields)
                if made in seen:
                    continue
                if time.monotonic() > self._end:
                    self.cut = True
                    break
                seen.add(made)
                self._progress(f"{kernel}: {choice}, {', '.join(f'{name} {value}' for name, value in fields.items())}")
                rivals.append((fields, timed.built(best | fields)))
            won = self._compared(kernel, choice, timed.ratios(library, [rival for _, rival in rivals]), rivals)
            if won is not None:
                best, library = best | won[0], won[1]
        return best

    def _tiles(self, kernel: str, fields: dict[str, Any]) -> Any:
        with turns.using_tvm():
            cpu = target.resolve(backends.normalize({"kind": "llvm", "tuned": {kernel: fields}}))
        choose = tiles.choose if kernel == "decode" else tiles.choose_attend
        return choose(self._spec, cpu, "fused")

    def _compared(
        self,
        kernel: str,
        choice: str,
        ratios: list[list[float]],
        rivals: list[tuple[dict[str, Any], Module]],
    ) -> tuple[dict[str, Any], Module] | None:
        """The rival that takes the place of the best so far, if one does."""
        found = []
        for of_turns, (fields, _) in zip(ratios, rivals, strict=True):
            low, middle, high = statistics.quantiles(of_turns, n=4)
            found.append(Trial(kernel, choice, fields, middle, (low, high), taken=False))
        fastest = max(range(len(found)), key=lambda at: found[at].ratio, default=None)
        if fastest is not None and found[fastest].ratio >= MARGIN and found[fastest].spread[0] > 1:
            found[fastest] = dataclasses.replace(found[fastest], taken=True)
            self.trials += found
            return rivals[fastest]
        self.trials += found
        return None


class _Timed:
    """The calls of a kernel that are timed, and libraries for them."""

    def __init__(self, spec: PagedAttentionSpec, kernel: str, threads: int | None) -> None:
        self._spec, self._kernel, self._threads = spec, kernel, threads
        sequences = max(1, _bytes() // (CONTEXT * spec.token_bytes)) if kernel == "decode" else 1
        self._case, self._check = self._of(sequences), self._of(1)
        self._inputs: cases.Inputs | None = None

    def _of(self, sequences: int) -> cases.Case:
        if self._kernel == "decode":
            return cases.Case(self._spec, sequences, (CONTEXT,), scale=None)
        return cases.Case(self._spec, sequences, (CONTEXT + PROMPT,), scale=None, query_lens=(PROMPT,))

    def built(self, fields: dict[str, Any]) -> Module:
        """A library with tiles of fields, whose result is right.

        Raises:
            AssertionError: it is not.
        """
        config = {"kind": "llvm", "tuned": {self._kernel: fields}}
        module = compiler.compile(self._spec, config, attend=self._kernel == "attend", cache=False)
        if self._threads is not None:
            module.num_threads = self._threads
        inputs, heads = cases.make_inputs(self._check), cases.head_arrays(self._check)
        errors = cases.compare(cases.call(module, self._check, inputs, **heads), self._check, inputs, **heads)
        if not errors.of_tolerance <= 1:
            raise AssertionError(f"tuned {fields}: expected results within the tolerance, got {errors}")
        return module

    def ratios(self, best: Module, rivals: list[Module]) -> list[list[float]]:
        """Of each rival, how many times as fast as the best it is in each turn."""
        if not rivals:
            return []
        if self._inputs is None:
            made = cases.make_inputs(self._case, caches=best.empty_cache(self._case.num_blocks))
            self._inputs = made._replace(block_table=cases.distinct_blocks(self._case))
        inputs, heads = self._inputs, cases.head_arrays(self._case)

        def timed(module: Module) -> float:
            begin = time.perf_counter()
            cases.call(module, self._case, inputs, **heads)
            return time.perf_counter() - begin

        for module in (best, *rivals):
            timed(module)
        found: list[list[float]] = [[] for _ in rivals]
        for _ in range(TURNS):
            for ratios, rival in zip(found, rivals, strict=True):
                ratios.append(timed(best) / timed(rival))
        return found


def _bytes() -> int:
    """Of keys and values that a call of decode reads."""
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    cache = max((int(size.read_text().strip().removesuffix("K")) << 10 for size in caches), default=0)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(max(4 * cache, LEAST_BYTES), MOST_BYTES, memory // 8)
