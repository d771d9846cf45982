"""compile(): the pipeline from a spec to a module, to be read from top to bottom."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_compiler import cache as _cache
from pa_compiler import (
    cuda_compiler,
    cuda_tiling,
    dependencies,
    files,
    host,
    installation,
    interrupts,
    manifest,
    modules,
    tiling,
    turns,
)
from pa_compiler import target as _target
from pa_compiler.cuda_target import CudaTarget
from pa_compiler.loader import open_library
from pa_compiler.module import Module
from pa_compiler.spec import PagedAttentionSpec

if TYPE_CHECKING:
    from tvm import IRModule

    from pa_compiler.build import Kernels

PIPELINES = ("fused", "staged")
STAGE_FILES = {
    "tensorir": "tensorir.py",
    "scheduled": "scheduled.py",
    "cuda": "kernels.cu",
    "host": "host.cc",
    "llvm": "kernels.ll",
    "asm": "kernels.s",
    "ptx": "kernels.ptx",
    "sass": "kernels.sass",
}
"""What the stages produce, in order: the name in Module.sources, and the file. Each target has some of them."""

# TVM takes a second to import. What needs it is imported inside the functions that compile: loading a module, or
# finding one in the cache, does without.


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A spec's kernels before scheduling, as text, and after, as text and to be compiled."""

    tensorir: str
    scheduled: str
    mod: IRModule


def compile(  # noqa: A001  (the public name)
    spec: PagedAttentionSpec,
    target: _target.TargetLike = "llvm",
    pipeline: str = "fused",
    *,
    cache: bool = True,
    dump_dir: str | os.PathLike[str] | None = None,
) -> Module:
    """Compile paged decode attention for one spec, or take it from the cache.

    Args:
        spec: The attention's exact shape.
        target: "llvm" for this machine's CPU with all its features, or {"kind": "llvm", "mcpu": ..., "mattr": [...]};
            "cuda" for GPUs from sm_90 on, or {"kind": "cuda", "arch": "sm_80"}.
        pipeline: "fused", one kernel for all stages, or "staged", a kernel for each stage, driven block by block as
            in the seed: slower, easier to follow, and a second opinion.
        cache: Whether to look in the cache on disk, and to leave the result there.
        dump_dir: A directory that gets what each stage produced, numbered in order.

    Returns:
        A module whose decode() runs the compiled kernels.

    Raises:
        TypeError, ValueError: a bad argument.
        RuntimeError: there is no C++ compiler, or for "cuda" no nvcc, and the cache has no library of the spec that
            another one has built; or it failed.
        OSError: the directory that PA_CACHE_DIR names cannot be used. Where it is not set, and the user's cache
            directory cannot be used, there is a warning instead, and no cache.
        ImportError: the package is not installed: there are no templates or no sources.
        KeyboardInterrupt: by Ctrl-C. What was begun is removed, and the next call works.
    """
    module = _compiled(spec, target, pipeline, cache=cache, needs_cache=_cache.is_chosen())
    if dump_dir is not None:
        Path(dump_dir).mkdir(parents=True, exist_ok=True)
        for number, (stage, text) in enumerate(module.sources.items(), start=1):
            files.write(Path(dump_dir) / f"{number}_{STAGE_FILES[stage]}", text.encode())
    return module


def compile_to_save(spec: PagedAttentionSpec, target: _target.TargetLike = "llvm", pipeline: str = "fused") -> Module:
    """As compile, for a module that is saved: where the cache cannot be used, PA_CACHE_DIR or not, it needs none."""
    return _compiled(spec, target, pipeline, cache=True, needs_cache=False)


def _compiled(
    spec: PagedAttentionSpec, target: _target.TargetLike, pipeline: str, *, cache: bool, needs_cache: bool
) -> Module:
    config = _checked(spec, target, pipeline)

    def build(directory: Path) -> None:
        _build(spec, config, pipeline, directory)

    entry = None
    if cache:
        key = _cache.key(dependencies.inputs(spec, config, pipeline))
        try:
            entry = _cached(key, config, build)
        except OSError as error:
            if needs_cache:
                raise
            _warn_of_no_cache(str(error))
    return _loaded(entry or interrupts.shielded(lambda: _built_aside(build)), spec)


def _cached(key: str, config: dict[str, Any], build: Callable[[Path], None]) -> dict[str, bytes]:
    """What build leaves in a directory, from the cache or by way of it. Without a compiler, what another has built."""
    try:
        tools = dependencies.tools(config)
    except RuntimeError:
        if found := _cache.find(key):
            return found
        raise
    return _cache.get_or_build(f"{key}-{_cache.key(tools)}", build)


def _built_aside(build: Callable[[Path], None]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory(prefix="pa_compiler.") as directory:
        build(Path(directory))
        return _cache.contents(Path(directory))


@functools.cache
def _warn_of_no_cache(reason: str) -> None:
    """Once in a process, for the line that calls compile."""
    warnings.warn(f"libraries are compiled without a cache: {reason}", RuntimeWarning, stacklevel=4)


def emit(spec: PagedAttentionSpec, target: _target.TargetLike = "llvm", pipeline: str = "fused") -> dict[str, str]:
    """The text of every stage, as in Module.sources, without building the library. Arguments as for compile."""
    config = _checked(spec, target, pipeline)
    return interrupts.shielded(lambda: _emitted(spec, config, pipeline))


def _emitted(spec: PagedAttentionSpec, config: dict[str, Any], pipeline: str) -> dict[str, str]:
    from pa_compiler import build

    with turns.using_tvm(), tempfile.TemporaryDirectory(prefix="pa_compiler.") as directory:
        if config["kind"] == "cuda":
            gpu = CudaTarget(config["arch"])
            kernels = cuda_compiler.lower(spec, gpu, pipeline)
            return _in_order(kernels.texts | cuda_compiler.machine_texts(kernels, gpu, Path(directory)))
        cpu = _target.resolve(config)
        tiles = tiling.choose(spec, cpu, pipeline)
        lowered = lower(spec, tiles, pipeline)
        compiled = build.compile_kernels(lowered.mod, cpu, Path(directory))
        return _texts(lowered, _host(spec, cpu, tiles, pipeline), compiled)


def lower(spec: PagedAttentionSpec, tiles: tiling.Tiling, pipeline: str) -> Lowered:
    """spec -> kernels -> schedules."""
    from pa_compiler import build, kernels
    from pa_compiler.schedules import schedule

    unscheduled = kernels.build(spec, tiles, pipeline)
    tensorir = build.script(unscheduled)  # now: what follows may change the PrimFuncs that it is given
    interrupts.check()
    scheduled = schedule(unscheduled, tiles)
    interrupts.check()
    return Lowered(tensorir, build.script(scheduled), scheduled)


def _host(spec: PagedAttentionSpec, cpu: _target.CpuTarget, tiles: tiling.Tiling, pipeline: str) -> str:
    """spec -> host."""
    from pa_compiler import kernels

    return host.render(spec, tiles, cpu, pipeline, kernels.names(spec, pipeline))


def _build(spec: PagedAttentionSpec, config: dict[str, Any], pipeline: str, directory: Path) -> None:
    """Fill an empty directory with pa.so and the texts of the stages."""
    dependencies.tools(config)  # a missing compiler is said before a second is spent on TVM
    with turns.using_tvm():
        if config["kind"] == "cuda":
            build_cuda_library(spec, CudaTarget(config["arch"]), pipeline, directory)
        else:
            cpu = _target.resolve(config)
            build_library(spec, cpu, tiling.choose(spec, cpu, pipeline), pipeline, directory)


def build_library(
    spec: PagedAttentionSpec, cpu: _target.CpuTarget, tiles: tiling.Tiling, pipeline: str, directory: Path
) -> None:
    """Lower, compile and link; leave pa.so and the texts of the stages in an empty directory."""
    from pa_compiler import build

    host_text = _host(spec, cpu, tiles, pipeline)
    with tempfile.TemporaryDirectory(prefix=".scratch.", dir=directory) as name:  # what removes one removes the other
        scratch = Path(name)
        with build.compiling_host(host_text, scratch) as compiling:  # while TVM works
            lowered = lower(spec, tiles, pipeline)
            compiled = build.compile_kernels(lowered.mod, cpu, scratch)
            library = build.link(compiling, compiled.asm, scratch)
        about = _about(spec, pipeline, json.loads(cpu.config), _target.instruction_sets(cpu), compiled.asm)
        _leave(directory, library, about, _texts(lowered, host_text, compiled))


def build_cuda_library(spec: PagedAttentionSpec, gpu: CudaTarget, pipeline: str, directory: Path) -> None:
    """As build_library, for the CUDA target."""
    with tempfile.TemporaryDirectory(prefix=".scratch.", dir=directory) as scratch:
        library, texts = cuda_compiler.build_library(spec, gpu, pipeline, Path(scratch))
        _leave(directory, library, _about(spec, pipeline, gpu.config, (), texts["ptx"]), texts)


def _about(
    spec: PagedAttentionSpec, pipeline: str, config: dict[str, Any], features: tuple[str, ...], code: str
) -> manifest.Manifest:
    """What a library of this machine's says of itself; code is the kernels' assembly."""
    return manifest.Manifest(
        spec=spec,
        pipeline=pipeline,
        target=config,
        machine=platform.machine(),
        features=features,
        kernels=hashlib.sha256(code.encode()).hexdigest(),
        versions=dependencies.versions(),
    )


def _leave(directory: Path, library: Path, about: manifest.Manifest, texts: Mapping[str, str]) -> None:
    (directory / "pa.so").write_bytes(manifest.seal(library.read_bytes(), about))
    for stage, text in texts.items():
        (directory / STAGE_FILES[stage]).write_text(text, encoding="utf-8")


def _in_order(texts: Mapping[str, str]) -> dict[str, str]:
    return {stage: texts[stage] for stage in STAGE_FILES if stage in texts}


def _texts(lowered: Lowered, host_text: str, compiled: Kernels) -> dict[str, str]:
    return {
        "tensorir": lowered.tensorir,
        "scheduled": lowered.scheduled,
        "host": host_text,
        "llvm": compiled.llvm,
        "asm": compiled.asm,
    }


def _loaded(entry: Mapping[str, bytes], spec: PagedAttentionSpec) -> Module:
    library = entry["pa.so"]
    sources = {stage: entry[file].decode() for stage, file in STAGE_FILES.items() if file in entry}
    about = manifest.read(library, "pa.so")
    if about.spec == spec:  # where the library states the type of out, the spec may leave it to follow dtype
        about = dataclasses.replace(about, spec=spec)
    return modules.make(library, about, open_library(library, "pa.so"), sources)


def _checked(spec: PagedAttentionSpec, target: _target.TargetLike, pipeline: str) -> dict[str, Any]:
    installation.check()
    if not isinstance(spec, PagedAttentionSpec):
        raise TypeError(f"spec: expected a PagedAttentionSpec, got {type(spec).__name__}")
    if pipeline not in PIPELINES:
        raise ValueError(f"pipeline: expected one of {', '.join(PIPELINES)}, got {pipeline!r}")
    config = _target.normalize(target)
    if config["kind"] == "cuda":
        cuda_tiling.check(spec, pipeline)
    else:
        tiling.check(spec, pipeline)
    return config
