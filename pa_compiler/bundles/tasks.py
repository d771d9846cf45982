"""What is built for a bundle, a spec on a target at a time, in processes of their own, since TVM takes one thread.

A process is given a pickle of Work, and leaves for each task its object files in a folder, and beside it what is to be
known of them. What it raises, of the errors that compile() documents, it leaves as text.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import pickle
import sys
from pathlib import Path
from typing import Any, NamedTuple

from pa_compiler import artifact, naming, turns
from pa_compiler.cpu import backend
from pa_compiler.cpu import target as _target
from pa_compiler.key_ranges import decodes_by_attend
from pa_compiler.spec import PagedAttentionSpec

ERROR = "error.json"
_KINDS = {kind.__name__: kind for kind in (TypeError, ValueError, RuntimeError, OSError, ImportError)}


class Task(NamedTuple):
    """A spec on a target: the folder that gets its object files, and the one that gets the texts of its stages."""

    spec: PagedAttentionSpec
    config: dict[str, Any]
    objects: Path
    stages: Path


class Work(NamedTuple):
    """The tasks of one process, which begins with a look at all targets of the bundle."""

    tasks: list[Task]
    targets: list[dict[str, Any]]
    folder: Path


@dataclasses.dataclass(frozen=True)
class About:
    """What is to be known of a task that was done: see choice.h and the manifest.

    Attributes:
        target: The TVM target dict, resolved.
        features: LLVM's names of the instruction sets that a CPU must have.
        rank: What a target is preferred by, from the left: the more the better.
        tile_registers: Whether kernels use those of AMX, for which the system is asked.
        strategies: By decode and attend.
        name: Of what a bundle has for the spec on the target.
        kernels: Their symbols.
        by_attend: Whether decode is a call of attend.
        scratch: Bytes that a thread's kernels take at most.
    """

    target: dict[str, Any]
    features: list[str]
    rank: list[int]
    tile_registers: bool
    strategies: dict[str, str]
    name: str
    kernels: list[str]
    by_attend: bool
    scratch: int


def portable(spec: PagedAttentionSpec) -> PagedAttentionSpec:
    """The same spec for another process: without the Python functions that its own came from."""
    spec = copy.copy(spec)
    for name in ("score_mod", "mask_mod"):
        function = getattr(spec, name)
        if function is not None:
            object.__setattr__(spec, name, dataclasses.replace(function, source=None))
    return spec


def about(task: Task) -> About:
    """What a process has left of a task."""
    return About(**json.loads((task.objects / "about.json").read_text()))


def error(folder: Path) -> Exception | None:
    """What a process has left in its folder in place of results."""
    if not (folder / ERROR).exists():
        return None
    kind, message = json.loads((folder / ERROR).read_text())
    return _KINDS[kind](message.replace("target: ", "targets: ", 1) if message.startswith("target: ") else message)


def _do(task: Task, hosts: dict[str, Path]) -> None:
    cpu = _target.resolve(task.config)
    spec, target = naming.spec_name(task.spec), naming.target_name(json.loads(cpu.config), task.config)
    task.objects.mkdir(parents=True)
    task.stages.mkdir(parents=True)

    def renamed(name: str, tiles: Any) -> str:
        return naming.kernel_name(spec, tiles, target, name)

    with turns.using_tvm():
        part = backend.build_part(task.spec, cpu, task.objects, renamed, hosts)
    for stage, text in part.texts.items():
        (task.stages / artifact.STAGE_FILES[stage]).write_text(text, encoding="utf-8")
    tile_registers = any(tiles.tile_shape for tiles in (part.tiles, part.of_attend))
    made = About(
        target=json.loads(cpu.config),
        features=list(_target.instruction_sets(cpu)),
        rank=[cpu.tile_registers, cpu.dot_pairs, cpu.vector_lanes, len(cpu.features)],
        tile_registers=tile_registers,
        strategies={"decode": part.tiles.strategy, "attend": part.of_attend.strategy},
        name=naming.variant_name(spec, part.tiles, target),
        kernels=list(part.kernels),
        by_attend=decodes_by_attend(task.spec, "fused"),
        scratch=part.scratch,
    )
    (task.objects / "about.json").write_text(json.dumps(dataclasses.asdict(made)))


def main(path: str) -> None:
    """Do the work of a file."""
    work: Work = pickle.loads(Path(path).read_bytes())  # of our own making, in a folder of our own
    gc.disable()  # it would walk through what TVM makes, which ends with the process
    hosts: dict[str, Path] = {}
    try:
        for config in work.targets:
            _target.resolve(config)
        for task in work.tasks:
            _do(task, hosts)
    except tuple(_KINDS.values()) as raised:
        kind = next(name for name, each in _KINDS.items() if isinstance(raised, each))
        (work.folder / ERROR).write_text(json.dumps([kind, str(raised)]))
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
