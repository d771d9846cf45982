"""Every sblock of every kernel is scheduled, or listed as one that is not; and nothing is listed that no kernel has."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
from specs import BASE, PIPELINES, SPECS
from tvm import IRModule
from tvm.s_tir import Schedule
from tvm.script import tirx as T

from pa_compiler import PagedAttentionSpec, kernels, schedules
from pa_compiler.cpu import target
from pa_compiler.cpu import tiles as tiling
from pa_compiler.cuda import tiling as cuda_tiling
from pa_compiler.cuda.kernels import launches as cuda

CPUS = {
    name: target.CpuTarget('{"kind": "llvm"}', frozenset(features.split()))
    for name, features in {
        "avx2": "avx avx2 fma",
        "avx512bf16": "avx avx512f avx512vl avx512bf16",
        "amx": "avx avx512f avx512vl avx512bf16 amx-tile amx-bf16",
    }.items()
}
BFMMLA = target.CpuTarget('{"kind": "llvm"}', frozenset({"neon", "bf16"}))
IN_TILE_REGISTERS = PagedAttentionSpec(16, 1, 64, 16, "bfloat16")
SWEPT_BY_TILES = PagedAttentionSpec(16, 8, 128, 16, "bfloat16")
HEADS_IN_LANES = PagedAttentionSpec(16, 1, 32, 16, "bfloat16")  # in pairs
MASKED = {"mask_mod": lambda batch, head, query_pos, key_pos: (key_pos % 3 + head) % 2 == 0}
WITH_MASKS = [
    dataclasses.replace(spec, **MASKED)
    for spec in (
        HEADS_IN_LANES,
        IN_TILE_REGISTERS,
        dataclasses.replace(IN_TILE_REGISTERS, kv_layout="packed"),
        BASE,
        PagedAttentionSpec(8, 2, 32, 16, "bfloat16", kv_layout="packed"),
    )
]
WITH_MASKS.append(dataclasses.replace(BASE, mask_mod=lambda b, h, q, k: (k < 4) | (q - k < 40)))  # in two intervals
ALL_SPECS = [*SPECS.values(), HEADS_IN_LANES, IN_TILE_REGISTERS, SWEPT_BY_TILES, *WITH_MASKS]
ALL_SPECS.append(dataclasses.replace(IN_TILE_REGISTERS, kv_layout="packed"))
ALL_SPECS += [
    dataclasses.replace(spec, **codes)
    for spec in (BASE, IN_TILE_REGISTERS, dataclasses.replace(IN_TILE_REGISTERS, kv_layout="packed"))
    for codes in ({"kv_dtype": "int8"}, {"kv_dtype": "float8_e4m3fn", "kv_scale": "head"})
]
ALL_SPECS.append(PagedAttentionSpec(8, 2, 32, 16, "bfloat16", kv_dtype="int8"))  # integers, head_dim in lanes
ALL_SPECS += [
    dataclasses.replace(spec, kv_dtype="int4", kv_rotation="none")
    for spec in (BASE, IN_TILE_REGISTERS, PagedAttentionSpec(8, 2, 32, 16, "bfloat16", kv_layout="packed"))
]
ALL_SPECS.append(PagedAttentionSpec(8, 2, 32, 16, "bfloat16", kv_dtype="int4", kv_dots="int8"))

ON_CUDA = PagedAttentionSpec(8, 2, 64, 16, "bfloat16")

STAGES = {name: module.STAGES for name, module in schedules._STRATEGIES.items()}
SCALAR = [module.SCALAR for module in schedules._STRATEGIES.values()]


@pytest.fixture(scope="module")
def worked_on():
    """(schedule, PrimFunc that it works on, strategy) of every kernel that is scheduled, nothing done to it yet.

    So the sblocks of each stay as they are, and are looked up once.
    """
    built = {}  # by all that a kernel comes from, which several CPUs have alike
    for spec, cpu, pipeline in itertools.product(ALL_SPECS, CPUS.values(), PIPELINES):
        built[kernels.build, spec, tiling.choose(spec, cpu, pipeline), pipeline] = None
        if pipeline == "fused" or spec in (BASE, HEADS_IN_LANES):  # staged, the stages are those of decode
            built[kernels.build_attend, spec, tiling.choose_attend(spec, cpu, pipeline), pipeline] = None
    for spec in ALL_SPECS:
        of_attend = tiling.choose_attend(spec, BFMMLA)
        if of_attend.strategy == "blocks_in_lanes":
            built[kernels.build_attend, spec, of_attend, "fused"] = None
    modules = [(build(spec, tiles, pipeline), tiles) for build, spec, tiles, pipeline in built]
    for spec in (ON_CUDA, dataclasses.replace(ON_CUDA, **MASKED)):
        tiles = cuda_tiling.staged(spec)
        modules.append((cuda.build_staged(spec, tiles)[0], tiles))
    found = []
    for mod, tiles in modules:
        for variable in mod.get_global_vars():
            sch = Schedule(mod)
            sch.work_on(variable.name_hint)
            found.append((sch, variable.name_hint, schedules._strategy_of(variable.name_hint, tiles)[0]))
    assert {strategy for _, _, strategy in found} == set(schedules._STRATEGIES)
    within = schedules._within
    known = {body: within(body) for body in (sch.mod[name].body for sch, name, _ in found)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            schedules, "_within", lambda statement: known[statement] if statement in known else within(statement)
        )
        yield found


def refusals(worked_on):
    """What is said of each kernel that has an sblock which no list names."""
    for sch, function, strategy in worked_on:
        try:
            schedules._stages(sch, function, strategy)
        except ValueError as error:
            yield str(error)


def test_every_pipeline_has_kernels():
    assert tuple(kernels.PIPELINES) == PIPELINES


def test_every_sblock_is_named(worked_on):
    assert list(refusals(worked_on)) == []


@pytest.mark.parametrize("strategy", STAGES)
def test_every_stage_of_a_strategy_is_missed(worked_on, monkeypatch, strategy):
    """Without it a kernel of the strategy is refused: none is skipped in silence, and each is in a kernel."""
    for stage in list(STAGES[strategy]):
        with monkeypatch.context() as patch:
            patch.delitem(STAGES[strategy], stage)
            said = [words for words in refusals(worked_on) if f"of strategy {strategy}, " in words]
        assert said, f"{stage}: no kernel of strategy {strategy} has it"
        assert all(re.search(rf"got .*\b{stage}\b.* of PrimFunc \w+$", words) for words in said)


def test_every_other_name_is_missed(worked_on, monkeypatch):
    """Of append_kv's stages, and of what is not scheduled by any strategy."""
    lists = [schedules.append_kv.STAGES, *SCALAR]
    for name in sorted({name for names in lists for name in names}):
        with monkeypatch.context() as patch:
            for names in lists:
                patch.delitem(names, name, raising=False)
            said = list(refusals(worked_on))
        assert said, f"{name}: no kernel has it"
        assert all(re.search(rf"got .*\b{name}\b.* of PrimFunc \w+$", words) for words in said)


def test_an_sblock_that_no_schedule_names_is_refused():
    """Within a stage it is the stage's own; beside one, also where a stage is the loop around both, it is named."""

    @T.prim_func(s_tir=True)
    def fused_decode(out_handle: T.handle):
        out = T.match_buffer(out_handle, (4, 4), "float32")
        for s in range(4):
            with T.sblock("sequence"):
                vs = T.axis.spatial(4, s)
                T.reads()
                T.writes(out[vs, 0:4])
                with T.sblock("lse_of_sinks"):
                    T.reads()
                    T.writes(out[vs, 0:4])
                    for i in range(4):
                        with T.sblock("element_of_sinks"):
                            vi = T.axis.spatial(4, i)
                            out[vs, vi] = T.float32(0)
                with T.sblock("normalize"):
                    T.reads()
                    T.writes(out[vs, 0:4])
                    for i in range(4):
                        with T.sblock("within"):
                            vi = T.axis.spatial(4, i)
                            out[vs, vi] = T.float32(0)

    for tiles, strategy in (
        (tiling.choose(BASE, CPUS["avx2"], "fused"), "head_dim_in_lanes"),
        (cuda_tiling.staged(ON_CUDA), "cuda_threads"),
    ):
        with pytest.raises(
            ValueError,
            match=rf"^sblock: expected a stage of strategy {strategy}, one within a stage, or one that its SCALAR "
            r"names, got lse_of_sinks of PrimFunc fused_decode$",
        ):
            schedules.schedule(IRModule({"fused_decode": fused_decode}), tiles)
