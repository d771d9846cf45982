"""The pipeline of the CPU target: spec -> kernels -> schedules -> assembly, and a host around it, in one library."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_compiler import host, interrupts, native
from pa_compiler.backend import NO_EXTRAS, Built, Extras
from pa_compiler.bounds import bounds
from pa_compiler.cpu import build as _build
from pa_compiler.cpu import instructions, prefetch, workspace
from pa_compiler.cpu import target as _target
from pa_compiler.cpu import tiles as tiling
from pa_compiler.cpu.build import Kernels
from pa_compiler.interface import CPU_ENTRY_POINTS
from pa_compiler.key_ranges import decodes_by_attend
from pa_compiler.score import BATCH, parts
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import FEW_ROWS, Tiling

if TYPE_CHECKING:
    from tvm import IRModule

ORIGINS = {
    "tensorir": "pa_compiler/kernels/",
    "scheduled": "pa_compiler/kernels/, schedules/",
    "host": "templates/cpu/",
    "llvm": "pa_compiler/kernels/, schedules/",
}
"""What the text of each stage comes from."""

# TVM is imported inside the functions that compile: looking a module up in the cache does without.


@dataclasses.dataclass(frozen=True)
class Part:
    """What build_part has made beside its object files: tiles, texts of the stages, symbols of the kernels.

    scratch is what the kernels of a thread take at most, in bytes.
    """

    tiles: Tiling
    of_attend: Tiling
    texts: Mapping[str, str]
    kernels: Sequence[str]
    scratch: int


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A spec's kernels before scheduling, as text, and after, as text and to be compiled."""

    tensorir: str
    scheduled: str
    mod: IRModule


def build_kernels(
    spec: PagedAttentionSpec, tiles: Tiling, pipeline: str, of_attend: Tiling | None = None, merges: bool = False
) -> IRModule:
    """spec -> kernels, which is most of what the host has to wait for; those of attend where it has tiles.

    With merges also those of merge_states.
    """
    from pa_compiler import kernels

    built = kernels.build(spec, tiles, pipeline)
    if of_attend is not None:
        built.update(kernels.build_attend(spec, of_attend, pipeline))
    if merges:
        built.update(kernels.build_merge(spec, tiles))
    return built


def lower(unscheduled: IRModule, spec: PagedAttentionSpec, tiles: Tiling, of_attend: Tiling | None = None) -> Lowered:
    """kernels -> schedules -> prefetches."""
    from pa_compiler import kernels, tvmscript
    from pa_compiler.schedules import scheduled

    tensorir = tvmscript.text(unscheduled)  # now: what follows may change the PrimFuncs that it is given
    interrupts.check()
    attend, others = kernels.apart(unscheduled)
    lowered = prefetch.insert(scheduled(others, tiles).mod, spec, {"fused_decode": tiles})
    interrupts.check()
    if of_attend is not None:
        names = ("fused_attend", *([FEW_ROWS] if of_attend.few else []))
        of_names = {name: of_attend.of_kernel(name) for name in names}
        lowered.update(prefetch.insert(scheduled(attend, of_attend).mod, spec, of_names))
        interrupts.check()
    return Lowered(tensorir, tvmscript.text(lowered), lowered)


def host_text(
    spec: PagedAttentionSpec,
    cpu: _target.CpuTarget,
    tiles: Tiling,
    pipeline: str,
    unscheduled: IRModule,
    of_attend: Tiling | None,
    shares_prefix: bool = False,
    asks: bool = True,
) -> str:
    """spec, and the parameters of its kernels -> host, which asks what the CPU has, or leaves that to who loads it."""
    kernels = host.kernels(unscheduled)
    attends = of_attend or tiles
    tilings = {"fused_decode": tiles, **{name: attends.of_kernel(name) for name in ("fused_attend", FEW_ROWS)}}
    shapes = {each.name: shape for each in kernels if (of := tilings.get(each.name)) and (shape := of.tile_shape)}
    has = {"shares_prefix": shares_prefix, "tile_shapes": shapes, "attend_rows": attends.row_tile, "asks": asks}
    return host.render(spec, tiles, cpu, pipeline, kernels, **has)


def attends(pipeline: str) -> bool:
    """Whether libraries of a pipeline can have attend: all can."""
    return True


def without_prefix(spec: PagedAttentionSpec, pipeline: str) -> str:
    """What of a spec or a pipeline keeps a library from having attend_shared_prefix; "" where it can have it.

    A kernel takes the query tokens of all sequences of a prefix at once, which functions of scores cannot tell apart.
    """
    if pipeline != "fused":
        return f"pipeline {pipeline}"
    if decodes_by_attend(spec, pipeline):
        return "invariant, where decode is a call of attend"
    terms = {term.op for function in spec.functions if function.result for term in parts(function.result)}
    if "batch" in terms or any(BATCH in each.shape for each in spec.inputs):
        return "functions of scores that go by the sequence"
    if len(bounds(spec, many_tokens=True).intervals) > 1:
        return "a mask_mod that shows keys in several intervals"
    return ""


def _tiles_of_attend(
    spec: PagedAttentionSpec, cpu: _target.CpuTarget, pipeline: str, extras: Extras
) -> tiling.CpuTiling | None:
    """The tiles of attend, where a library is to have it or decode takes its kernels."""
    wanted = extras.attend or decodes_by_attend(spec, pipeline)
    return tiling.choose_attend(spec, cpu, pipeline) if wanted else None


def emit(
    spec: PagedAttentionSpec, config: dict[str, Any], pipeline: str, extras: Extras, directory: Path
) -> dict[str, str]:
    """The text of every stage; directory is for intermediate files."""
    cpu = _target.resolve(config)
    tiles = tiling.choose(spec, cpu, pipeline)
    of_attend = _tiles_of_attend(spec, cpu, pipeline, extras)
    unscheduled = build_kernels(spec, tiles, pipeline, of_attend, extras.merge_states)
    text = host_text(spec, cpu, tiles, pipeline, unscheduled, of_attend, extras.shared_prefix)
    lowered = lower(unscheduled, spec, tiles, of_attend)
    compiled = _build.compile_kernels(instructions.select(lowered.mod, cpu, tiles), cpu, directory)
    return _texts(lowered, text, compiled)


def build(spec: PagedAttentionSpec, config: dict[str, Any], pipeline: str, extras: Extras, directory: Path) -> Built:
    """Lower, compile and link, with the tiles that the policy chooses."""
    cpu = _target.resolve(config)
    tiles = tiling.choose(spec, cpu, pipeline)
    of_attend = _tiles_of_attend(spec, cpu, pipeline, extras)
    return build_with_tiles(spec, cpu, tiles, pipeline, directory, of_attend, extras)


def build_with_tiles(
    spec: PagedAttentionSpec,
    cpu: _target.CpuTarget,
    tiles: Tiling,
    pipeline: str,
    directory: Path,
    of_attend: Tiling | None = None,
    extras: Extras = NO_EXTRAS,
) -> Built:
    """Lower, compile and link. The library and intermediate files lie in directory. attend: where it has tiles."""
    unscheduled = build_kernels(spec, tiles, pipeline, of_attend, extras.merge_states)
    text = host_text(spec, cpu, tiles, pipeline, unscheduled, of_attend, extras.shared_prefix)
    interrupts.check()
    with native.compiling_host(
        text, directory, host.headers(text), machine=cpu.machine
    ) as compiling:  # while TVM works
        lowered = lower(unscheduled, spec, tiles, of_attend)
        compiled = _build.compile_kernels(instructions.select(lowered.mod, cpu, tiles), cpu, directory)
        tables = {constant.name: constant.data for constant in spec.constants}
        library = native.link(compiling, compiled.asm, directory, tuple(CPU_ENTRY_POINTS), tables, cpu.machine)
    config, features = json.loads(cpu.config), _target.instruction_sets(cpu)
    texts = _texts(lowered, text, compiled)
    return Built(library, texts, config, features, texts["asm"], cpu.machine, compiled.links)


def build_part(
    spec: PagedAttentionSpec,
    cpu: _target.CpuTarget,
    directory: Path,
    renamed: Callable[[str, Tiling], str],
    hosts: dict[str, Path],
) -> Part:
    """What a bundle has of a spec on a target, fused and with attend: renamed.o and kernels.o in directory.

    renamed(name, tiles) says what a function is called in place of the name that it would have in a library of its own:
    kernels, each with the tiles that it has, and entry points and tables, with those of decode. hosts are those that
    were compiled before, by their texts: targets may have one in common, for it is the bundle that asks what a CPU has.
    """
    tiles, of_attend = tiling.choose(spec, cpu, "fused"), tiling.choose_attend(spec, cpu, "fused")
    unscheduled = build_kernels(spec, tiles, "fused", of_attend)
    text = host_text(spec, cpu, tiles, "fused", unscheduled, of_attend, asks=False)
    kernels = {
        name: renamed(name, of_attend if "attend" in name else tiles)
        for name in (each.name for each in host.kernels(unscheduled))
    }
    symbols = {name: renamed(name, tiles) for name in CPU_ENTRY_POINTS} | kernels
    symbols = {f"__tvm_ffi_{name}": new for name, new in symbols.items()}
    symbols |= {each.name: renamed(each.name, tiles) for each in spec.constants}
    tables = {symbols[each.name]: each.data for each in spec.constants}
    interrupts.check()
    with contextlib.ExitStack() as stack:
        if text not in hosts:  # while TVM works
            stack.enter_context(native.compiling_part(text, directory, host.headers(text), cpu.machine))
        lowered = lower(unscheduled, spec, tiles, of_attend)
        mod = instructions.select(lowered.mod, cpu, tiles)
        compiled = _build.compile_kernels(mod, cpu, directory, linked=False)
        asm = [re.sub(r"\b__tvm_ffi_\w+", lambda found: symbols.get(found[0], found[0]), each) for each in compiled.asm]
        native.assemble(asm, directory, tables, cpu.machine)
    hosts.setdefault(text, directory / "host.o")
    native.rename_symbols(hosts[text], symbols, directory / "renamed.o", cpu.machine)
    scratch = workspace.scratch_bytes(lowered.mod, tiles, of_attend)
    texts = _texts(lowered, text, compiled) | {"asm": "".join(asm)}
    return Part(tiles, of_attend, texts, sorted(kernels.values()), scratch)


def _texts(lowered: Lowered, host_text: str, compiled: Kernels) -> dict[str, str]:
    return {
        "tensorir": lowered.tensorir,
        "scheduled": lowered.scheduled,
        "host": host_text,
        "llvm": "".join(compiled.llvm),
        "asm": "".join(compiled.asm),
    }
