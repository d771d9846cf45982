"""compile(): the pipeline from a spec to a module, to be read from top to bottom."""

from __future__ import annotations

import functools
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pa_compiler import (
    artifact,
    backends,
    dependencies,
    host,
    installation,
    interrupts,
    native,
    records,
    score_checks,
    turns,
)
from pa_compiler import store as _cache
from pa_compiler.backend import Explanation, Extras, Limits
from pa_compiler.runtime import files, versions
from pa_compiler.runtime.module import Module
from pa_compiler.spec import PagedAttentionSpec

_Result = TypeVar("_Result")

PIPELINES = ("fused", "staged")
# TVM takes a second to import. What needs it is imported inside the functions that compile: loading a module, or
# finding one in the cache, does without.


def compile(  # noqa: A001  (the public name)
    spec: PagedAttentionSpec,
    target: backends.TargetLike = "llvm",
    pipeline: str = "fused",
    *,
    attend: bool = True,
    merge_states: bool = False,
    shared_prefix: bool = False,
    cache: bool = True,
    dump_dir: str | os.PathLike[str] | None = None,
) -> Module:
    """Compile paged attention for one spec, or take it from the cache.

    Args:
        spec: The attention's exact shape.
        target: "llvm" for this machine's CPU with all its features, or {"kind": "llvm", "mcpu": ..., "mattr": [...]};
            "cuda" for GPUs from sm_90 on, or {"kind": "cuda", "arch": "sm_80"}.
        pipeline: "fused", one kernel for all stages, or "staged", a kernel for each stage, driven block by block as
            in the seed: slower, easier to follow, and a second opinion.
        attend: Whether the module has attend(), where its target can: not in the staged pipeline for a GPU. Without it
            less is compiled.
        merge_states: Whether it has merge_states().
        shared_prefix: Whether it has attend_shared_prefix(), as fused ones for a CPU with attend can.
        cache: Whether to look in the cache on disk, and to leave the result there.
        dump_dir: A directory that gets what each stage produced, numbered in order, and in include/ the headers of the
            host.

    Returns:
        A module whose calls run the compiled kernels.

    Raises:
        TypeError, ValueError: a bad argument.
        RuntimeError: TVM or tvm-ffi is of another version than the one that compiles; there is no C++ compiler, or for
            "cuda" no nvcc, and the cache has no library of the spec that another one has built; or it failed.
        OSError: the directory that PA_CACHE_DIR names cannot be used. Where it is not set, and the user's cache
            directory cannot be used, there is a warning instead, and no cache.
        ImportError: packages of the extra `compiler` are missing; or this package is not installed, and there are no
            templates or no sources.
        KeyboardInterrupt: by Ctrl-C. What was begun is removed, and the next call works.
    """
    extras = Extras(attend, merge_states, shared_prefix)
    module = _compiled(spec, target, pipeline, extras, cache=cache, needs_cache=_cache.is_chosen())
    if dump_dir is not None:
        Path(dump_dir).mkdir(parents=True, exist_ok=True)
        for number, (stage, text) in enumerate(module.sources.items(), start=1):
            files.write(Path(dump_dir) / f"{number}_{artifact.STAGE_FILES[stage]}", text.encode())
        native.write_headers(host.headers(module.sources["host"]), Path(dump_dir) / "include")
    return module


def compile_to_save(
    spec: PagedAttentionSpec,
    target: backends.TargetLike = "llvm",
    pipeline: str = "fused",
    *,
    attend: bool = True,
    merge_states: bool = False,
    shared_prefix: bool = False,
) -> Module:
    """As compile, for a module that is saved: where the cache cannot be used, PA_CACHE_DIR or not, it needs none."""
    extras = Extras(attend, merge_states, shared_prefix)
    return _compiled(spec, target, pipeline, extras, cache=True, needs_cache=False)


def check(spec: PagedAttentionSpec, target: backends.TargetLike, pipeline: str) -> dict[str, Any]:
    """The normalized target of a build whose arguments are right. Errors as of compile."""
    versions.check_compiler()
    installation.check()
    if not isinstance(spec, PagedAttentionSpec):
        raise TypeError(f"spec: expected a PagedAttentionSpec, got {type(spec).__name__}")
    if pipeline not in PIPELINES:
        raise ValueError(f"pipeline: expected one of {', '.join(PIPELINES)}, got {pipeline!r}")
    for name in score_checks.FIELDS:
        function = getattr(spec, name)
        if function is not None and function.result is None:
            raise TypeError(f"{name}: expected a function, got the text of one, read from a library: {function.text}")
    config = backends.normalize(target)
    backends.of(config).check(spec, pipeline)
    return records.taken_up(config, spec)


def _checked_extras(extras: Extras, spec: PagedAttentionSpec, config: dict[str, Any], pipeline: str) -> Extras:
    """What a library is to have beside decode and append_kv; attend where it can."""
    for name, wanted in extras._asdict().items():
        if not isinstance(wanted, bool):
            raise TypeError(f"{name}: expected a bool, got {wanted!r} of type {type(wanted).__name__}")
    if extras.shared_prefix and (reason := backends.of(config).without_prefix(spec, pipeline)):
        raise ValueError(f"shared_prefix: expected False for {reason}, got True")
    if extras.shared_prefix and not extras.attend:
        raise ValueError("shared_prefix: expected attend=True beside it, got attend=False")
    return extras._replace(attend=extras.attend and backends.of(config).attends(pipeline))


def _compiled(
    spec: PagedAttentionSpec,
    target: backends.TargetLike,
    pipeline: str,
    extras: Extras,
    *,
    cache: bool,
    needs_cache: bool,
) -> Module:
    config = check(spec, target, pipeline)
    extras = _checked_extras(extras, spec, config, pipeline)

    def build(directory: Path) -> None:
        _build(spec, config, pipeline, extras, directory)

    entry = None
    if cache:
        key = _cache.key(dependencies.inputs(spec, config, pipeline, extras))
        try:
            entry = _cached(key, config, build)
        except OSError as error:
            if needs_cache:
                raise
            _warn_of_no_cache(str(error))
    return artifact.loaded(entry or interrupts.shielded(lambda: _built_aside(build)), spec)


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


def _build(spec: PagedAttentionSpec, config: dict[str, Any], pipeline: str, extras: Extras, directory: Path) -> None:
    """Fill an empty directory with pa.so and the texts of the stages."""
    dependencies.tools(config)  # a missing compiler is said before a second is spent on TVM
    with turns.using_tvm():
        artifact.build_into(
            directory,
            spec,
            pipeline,
            lambda scratch: backends.of(config).build(spec, config, pipeline, extras, scratch),
        )


def emit(
    spec: PagedAttentionSpec,
    target: backends.TargetLike = "llvm",
    pipeline: str = "fused",
    *,
    attend: bool = True,
    merge_states: bool = False,
    shared_prefix: bool = False,
) -> dict[str, str]:
    """The text of every stage, as in Module.sources, without building the library. Arguments as for compile."""
    config = check(spec, target, pipeline)
    extras = _checked_extras(Extras(attend, merge_states, shared_prefix), spec, config, pipeline)
    emit = backends.of(config).emit
    return artifact.in_order(_with_tvm(lambda directory: emit(spec, config, pipeline, extras, directory)))


def emit_portable(
    spec: PagedAttentionSpec, target: backends.TargetLike, pipeline: str, extras: Extras
) -> dict[str, str]:
    """As emit, without the stages that programs of this machine make."""
    config = check(spec, target, pipeline)
    emit, extras = backends.of(config).emit_portable, _checked_extras(extras, spec, config, pipeline)
    return artifact.in_order(_with_tvm(lambda directory: emit(spec, config, pipeline, extras, directory)))


def explain(
    spec: PagedAttentionSpec,
    target: backends.TargetLike = "llvm",
    pipeline: str = "fused",
    limits: Limits | None = None,
) -> Explanation:
    """Say how a spec is compiled, and why, without running it. Other arguments and errors as for compile.

    Args:
        spec: What is explained.
        target: What it is compiled for.
        pipeline: "fused" or "staged"; "fused" alone for "cuda".
        limits: Of the machine that a time is predicted for; by default none is.
    """
    config = check(spec, target, pipeline)
    backend = backends.of(config)
    return _with_tvm(lambda directory: backend.explain(spec, config, pipeline, limits or Limits(), directory))


def _with_tvm(work: Callable[[Path], _Result]) -> _Result:
    """What work makes of an empty directory, while no other thread uses TVM."""

    def run() -> _Result:
        with turns.using_tvm(), tempfile.TemporaryDirectory(prefix="pa_compiler.") as directory:
            return work(Path(directory))

    return interrupts.shielded(run)
