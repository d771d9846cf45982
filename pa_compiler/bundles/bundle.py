"""bundle(): specs and targets -> a folder with one library for all of them, to be read from top to bottom."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pa_compiler import backends, dependencies, interrupts, naming
from pa_compiler import compiler as _compiler
from pa_compiler.bundles import linking, tasks
from pa_compiler.bundles.tasks import Task, Work
from pa_compiler.cpu import target as _target
from pa_compiler.spec import PagedAttentionSpec

_POLL = 0.02
"""Seconds between two looks at the processes that build."""


def bundle(
    specs: Iterable[PagedAttentionSpec],
    targets: Iterable[backends.TargetLike],
    directory: str | os.PathLike[str],
    *,
    processes: int | None = None,
) -> None:
    """Compile specs for several CPUs into one library with a C interface, which needs neither Python nor tvm-ffi.

    The directory is made as a whole or not at all, and has

        include/pa.h              the C interface, documented
        lib/libpa.so, libpa.a     the library, which depends on libc, libm and pthread alone and exports pa_ names alone
        lib/pkgconfig/pa.pc       for pkg-config
        lib/cmake/pa/             for find_package(pa): the targets pa::pa and pa::static
        manifest.json             specs, targets, kernels and versions, as pa_manifest() returns them
        stages/SPEC/TARGET/       the text of every stage of each
        stages/door.cc            what is between pa.h and the hosts

    When the library is loaded it chooses the first of its targets that CPU and system can run, in an order in which AMX
    comes before AVX512_BF16, wider vectors before narrower ones, and otherwise more features before fewer. The variable
    PA_ISA of the environment names another one.

    Args:
        specs: One spec or more, no two the same: decode, attend and append_kv of each, by the fused pipeline.
        targets: One CPU or more, as compile() takes them, or the name of one: "x86-64-v3", "znver4". Of one
            architecture, and each with a name of its own.
        directory: What is to be made. It must not be there; the folder that it is in must.
        processes: That compile beside each other, each with TVM; by default one for each CPU of this process, up to 8.

    Raises:
        TypeError, ValueError: a bad argument: no spec, a target that is no CPU, that LLVM does not know, or of another
            architecture than the first, and what compile() raises of specs and targets.
        FileExistsError: the directory is there.
        OSError: it cannot be written, as on a full disk.
        RuntimeError: there is no C++ compiler, objcopy or ar; or one of them failed.
        ImportError: packages of the extra `compiler` are missing.
        KeyboardInterrupt: by Ctrl-C. Whatever it is, what was begun is removed.
    """
    specs, configs = _checked_specs(specs), _checked_targets(targets)
    for spec, config in ((spec, config) for spec in specs for config in configs):
        _compiler.check(spec, config, "fused")
    processes = _checked_processes(processes, len(specs) * len(configs))
    target = _checked_directory(directory)
    dependencies.tools(configs[0])  # a missing compiler is said before a second is spent on TVM
    linking.check_tools(_target.architecture(configs[0]))
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _fill(made, specs, configs, processes)
        made.chmod(0o777 & ~_umask())
        made.rename(target)
    except BaseException as error:
        shutil.rmtree(made, ignore_errors=True)
        if isinstance(error, OSError) and target.exists():
            raise _exists(target) from error
        raise


def _checked_specs(specs: Iterable[PagedAttentionSpec]) -> list[PagedAttentionSpec]:
    if isinstance(specs, PagedAttentionSpec) or not isinstance(specs, Iterable):
        raise TypeError(f"specs: expected several PagedAttentionSpecs, such as a list, got {type(specs).__name__}")
    found = list(specs)
    if not found:
        raise ValueError("specs: expected one at least, got none")
    for spec in found:
        if not isinstance(spec, PagedAttentionSpec):
            raise TypeError(f"specs: expected PagedAttentionSpecs, got {type(spec).__name__}")
    names = [naming.spec_name(spec) for spec in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"specs: expected specs that differ, got {', '.join(sorted(twice))} more than once")
    return found


def _checked_targets(targets: Iterable[backends.TargetLike]) -> list[dict[str, Any]]:
    if isinstance(targets, str) or not isinstance(targets, Iterable):
        raise TypeError(f"targets: expected several CPUs, such as a list of names, got {targets!r}")
    configs = []
    for target in targets:
        config = backends.normalize(backends.named(target) if isinstance(target, str) else target)
        if not backends.of(config).takes_numpy:
            raise ValueError(f"targets: expected CPUs, got {target!r}")
        configs.append(config)
    if not configs:
        raise ValueError("targets: expected one CPU at least, got none")
    machines = [_target.architecture(config) for config in configs]
    if len(set(machines)) > 1:
        raise ValueError(f"targets: expected CPUs of one architecture, got {', '.join(dict.fromkeys(machines))}")
    if twice := [config for number, config in enumerate(configs) if config in configs[:number]]:
        raise ValueError(f"targets: expected CPUs that differ, got {twice[0]} more than once")
    return configs


def _checked_processes(processes: int | None, count: int) -> int:
    if processes is None:
        processes = min(len(os.sched_getaffinity(0)), 8)
    if not isinstance(processes, int) or isinstance(processes, bool):
        raise TypeError(f"processes: expected an int, got {processes!r} of type {type(processes).__name__}")
    if processes < 1:
        raise ValueError(f"processes: expected at least 1, got {processes}")
    return min(processes, count)


def _checked_directory(directory: str | os.PathLike[str]) -> Path:
    target = Path(os.path.abspath(directory))
    if os.path.lexists(target):
        raise _exists(target)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"directory: expected a folder that it can be made in, got none: {target.parent}")
    return target


def _exists(target: Path) -> FileExistsError:
    return FileExistsError(f"directory: expected one that is not there yet, got {target}")


def _umask() -> int:
    """The process's, which can be read by changing it alone; another thread may make a file meanwhile, in private."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _fill(made: Path, specs: Sequence[PagedAttentionSpec], configs: Sequence[dict[str, Any]], processes: int) -> None:
    """Build, link and write everything into an empty folder."""
    scratch = made / ".scratch"
    scratch.mkdir()
    names = [naming.spec_name(spec) for spec in specs]
    todo = [
        Task(tasks.portable(spec), config, scratch / f"{number}.{place}", scratch / "stages" / f"{number}.{place}")
        for number, spec in enumerate(specs)
        for place, config in enumerate(configs)
    ]
    _build(todo, list(configs), processes, scratch)
    built = [tasks.about(task) for task in todo]
    linking.link(made, scratch, specs, names, todo, built)
    shutil.rmtree(scratch)


def _build(todo: Sequence[Task], configs: list[dict[str, Any]], processes: int, scratch: Path) -> None:
    """Do the tasks in so many processes, those of a spec in one where it can be. The first failure ends all.

    Each process has a share, and when that is done takes what others have not begun, from their ends.
    """
    running: list[tuple[subprocess.Popen[bytes], Path]] = []
    try:
        for number in range(processes):
            folder = scratch / f"process.{number}"
            folder.mkdir()
            work = folder / "work"
            begin, end = (each * len(todo) // processes for each in (number, number + 1))
            order = [*todo[begin:end], *reversed([*todo[:begin], *todo[end:]])]
            work.write_bytes(pickle.dumps(Work(order, configs, folder)))
            running.append((_start(work, folder), folder))
        while running:
            interrupts.check()
            for each in list(running):
                process, folder = each
                if process.poll() is None:
                    continue
                running.remove(each)
                if process.returncode:
                    raise tasks.error(folder) or RuntimeError(
                        f"a process that compiles ended with status {process.returncode}:\n"
                        f"{(folder / 'printed').read_text(errors='replace')[-4000:]}"
                    )
            time.sleep(_POLL)
    finally:
        for process, _ in running:
            os.killpg(process.pid, signal.SIGKILL)  # its C++ compiler too, which would go on writing
            process.wait()


def _start(work: Path, folder: Path) -> subprocess.Popen[bytes]:
    """A process, of a group of its own, that does what a file says. What it prints goes to another."""
    with open(folder / "printed", "wb") as printed:
        return subprocess.Popen(
            [sys.executable, "-m", "pa_compiler.bundles.tasks", str(work)],
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(folder)},
            start_new_session=True,
        )
