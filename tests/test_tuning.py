"""tune(): what it keeps is the best of what it timed, compile takes it up on this CPU alone, and results stay right."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import pa_compiler
from pa_compiler import backends, compiler, records, tuning
from pa_compiler.cli.main import main
from pa_compiler.cpu import choices, target, tiles
from pa_compiler.spec import PagedAttentionSpec

SPEC = PagedAttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, block_size=16, dtype="float32")
HALF, DOUBLE = ({"kv_tile": tokens, "second_level": 1 << 22} for tokens in (64, 256))
ALL = choices.CHOICES
OPTIONS = "--num-heads 4 --num-kv-heads 2 --head-dim 16 --block-size 16 --dtype float32 --out-dtype float32".split()


@pytest.fixture(scope="module", autouse=True)
def patch(tmp_path_factory):
    """A cache directory of its own, and small work: two tiles of decode, and one of attend."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PA_CACHE_DIR", str(tmp_path_factory.mktemp("records") / "cache"))
        patch.delenv("PA_TUNE", raising=False)
        for name, value in {"CONTEXT": 300, "PROMPT": 20, "LEAST_BYTES": 1 << 16, "MOST_BYTES": 1 << 16}.items():
            patch.setattr(tuning, name, value)
        patch.setattr(choices, "CHOICES", {"decode": {"tile": (HALF, DOUBLE)}, "attend": {}})
        yield patch


@pytest.fixture(scope="module")
def library():
    """One library in place of all that would be timed."""
    return pa_compiler.compile(SPEC, {"kind": "llvm", "tuned": {}})


@pytest.fixture
def ratios(monkeypatch, library):
    """ratios(of each rival in each turn): what was measured, with nothing built."""

    def make(found):
        monkeypatch.setattr(tuning._Timed, "built", lambda self, fields: library)
        monkeypatch.setattr(tuning._Timed, "ratios", lambda self, best, rivals: found if rivals else [])

    return make


@pytest.fixture
def found(ratios):
    """What is kept where the larger tile is 1.5 times as fast in all turns but one."""
    ratios([[0.9] * 9, [1.5] * 8 + [0.5]])
    return tuning.tune(SPEC)


def test_what_is_fastest_is_kept_and_taken_up(found, monkeypatch):
    assert found.tuned == {"decode": DOUBLE}
    assert [(each.fields, each.ratio, each.taken) for each in found.trials] == [(HALF, 0.9, False), (DOUBLE, 1.5, True)]
    assert found.finished
    assert json.loads(found.path.read_text())["tuned"] == found.tuned
    module = pa_compiler.compile(SPEC, attend=False)
    assert module.manifest.target["tuned"] == found.tuned
    module.verify(seconds=1)
    explained = compiler.explain(SPEC)
    assert dict(explained.facts)["tokens"].startswith("kv_tile 256")
    assert dict(explained.facts)["tuned"].startswith("kv_tile 256 of decode, second_level 4194304 of decode. As")

    monkeypatch.setenv("PA_TUNE", "0")
    assert "tuned" not in pa_compiler.compile(SPEC, attend=False).manifest.target
    monkeypatch.setenv("PA_TUNE", "no")
    with pytest.raises(ValueError, match="PA_TUNE: expected 0 or 1, got 'no'"):
        pa_compiler.compile(SPEC, attend=False)


def test_a_record_is_of_its_spec_and_of_this_cpu(found):
    config = backends.normalize("llvm")
    assert records.taken_up(config, SPEC) == {"kind": "llvm", "tuned": found.tuned}
    for other in ({"kind": "llvm", "mcpu": "x86-64-v3"}, {"kind": "llvm", "tuned": {}}, {"kind": "cuda"}):
        normalized = backends.normalize(other)
        assert records.taken_up(normalized, SPEC) == normalized
    other_spec = PagedAttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, block_size=32, dtype="float32")
    assert records.taken_up(config, other_spec) == config
    assert records.forget(SPEC)
    assert not records.forget(SPEC)
    assert records.taken_up(config, SPEC) == config


@pytest.mark.parametrize("text", ["{", "[]", '{"tuned": {"decode": {"kv_tile": 7}}}', '{"spec": 1}'])
def test_a_record_that_cannot_be_read_is_left_out_with_a_warning(found, text):
    found.path.write_text(text)
    with pytest.warns(RuntimeWarning, match=rf"{found.path}: expected a record of pa-compiler tune, which is left out"):
        assert records.taken_up(backends.normalize("llvm"), SPEC) == {"kind": "llvm"}


@pytest.mark.parametrize(
    ("turns", "why"),
    [([1.01] * 9, "less than the margin"), ([1.5] * 6 + [0.9] * 3, "a quarter of the turns was slower")],
)
def test_what_may_be_noise_takes_no_place(ratios, turns, why):
    ratios([turns, turns])
    assert tuning.tune(SPEC).tuned == {}


def test_timed_calls_are_those_of_the_libraries():
    said = []
    found = tuning.tune(SPEC, threads=1, progress=said.append)
    assert [each.fields for each in found.trials] == [HALF, DOUBLE]
    assert all(each.spread[0] <= each.ratio <= each.spread[1] for each in found.trials)
    assert said[0] == "decode: the tiles of the table"
    assert said[1] == "decode: tile, kv_tile 64, second_level 4194304"


def test_no_library_is_built_after_the_time_is_over():
    found = tuning.tune(SPEC, seconds=0)
    assert (found.tuned, found.trials, found.finished) == ({}, (), False)


def test_a_wrong_result_is_never_timed(monkeypatch):
    monkeypatch.setattr(tuning.cases, "call", lambda *args, **heads: args[2].query * 0)
    with pytest.raises(AssertionError, match=r"tuned \{\}: expected results within the tolerance, got"):
        tuning.tune(SPEC)


@pytest.mark.parametrize(
    ("tuned", "error", "message"),
    [
        (3, TypeError, "target: expected tuned to be a dict of dicts by kernels, got 3"),
        ({"decode": 3}, TypeError, "target: expected tuned to be a dict of dicts by kernels, got"),
        ({"append": {}}, ValueError, r"target: expected tuned to have the kernels \['attend', 'decode'\], got also"),
        ({"decode": {"attend_bytes": 1}}, ValueError, "target: expected tuned decode to have some of .*'attend_bytes'"),
        ({"decode": {"kv_tile": 100}}, ValueError, "target: expected tuned decode kv_tile to be one of .* got 100"),
        ({"decode": {"kv_tile": 64.0}}, ValueError, r"target: expected tuned decode kv_tile to be one of .* got 64\.0"),
        ({"attend": {"attend_vectors": True}}, ValueError, "target: expected tuned attend attend_vectors .* got True"),
    ],
)
def test_a_target_says_what_is_tuned_or_is_refused(tuned, error, message, monkeypatch):
    monkeypatch.setattr(choices, "CHOICES", ALL)
    with pytest.raises(error, match=message):
        backends.normalize({"kind": "llvm", "mcpu": "x86-64-v3", "tuned": tuned})


@pytest.mark.parametrize("kernel", ALL)
@pytest.mark.parametrize("mcpu", ["x86-64-v3", "x86-64-v4", "znver4", "sapphirerapids"])
def test_every_choice_makes_tiles(kernel, mcpu, monkeypatch):
    """Those that tune() may build, of specs with each of the strategies."""
    monkeypatch.setattr(choices, "CHOICES", ALL)
    choose, made = tiles.choose if kernel == "decode" else tiles.choose_attend, set()
    for heads, kv_heads, dtype, layout in (
        (32, 8, "bfloat16", "NHD"),
        (16, 1, "float16", "HND"),
        (32, 8, "bfloat16", "packed"),
        (8, 8, "float32", "packed"),
    ):
        spec = PagedAttentionSpec(heads, kv_heads, 128, 32, dtype, kv_layout=layout)
        for fields in (fields for options in ALL[kernel].values() for fields in options):
            config = backends.normalize({"kind": "llvm", "mcpu": mcpu, "tuned": {kernel: fields}})
            made.add(choose(spec, target.resolve(config), "fused"))
    assert len(made) > 8


def test_a_level_of_llvm_is_of_its_kernel_alone(monkeypatch):
    """Less is unrolled at the second level."""
    monkeypatch.setattr(choices, "CHOICES", ALL)
    spec = PagedAttentionSpec(num_heads=8, num_kv_heads=2, head_dim=64, block_size=16, dtype="float16")
    config = {"kind": "llvm", "mcpu": "x86-64-v3"}
    plain = compiler.emit(spec, config)
    tuned = compiler.emit(spec, {**config, "tuned": {"attend": {"llvm_level": 2}}})
    lengths = [{name: len(text) for name, text in _functions(each["asm"])} for each in (plain, tuned)]
    shorter = {name for name in lengths[0] if lengths[1][name] < lengths[0][name]}
    assert shorter == {"fused_attend"}
    assert lengths[0] | {"fused_attend": 0} == lengths[1] | {"fused_attend": 0}
    levels = [each["scheduled"].count('"pa.llvm_level": 2') for each in (plain, tuned)]
    assert levels == [1, 2]  # merge_partials has it always
    assert plain["tensorir"] == tuned["tensorir"]


def _functions(asm):
    """(name, lines) of each kernel."""
    for part in asm.split("\n__tvm_ffi_")[1:]:
        name, lines = part.split(":", 1)
        yield name, lines.split(".Lfunc_end")[0].splitlines()


def test_a_core_has_a_row_of_its_own():
    zen3, any_avx2 = (target.resolve({"kind": "llvm", "mcpu": mcpu}) for mcpu in ("znver3", "x86-64-v3"))
    spec = PagedAttentionSpec(num_heads=32, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
    assert tiles.choose(spec, zen3, "fused").sweep == "tokens"
    assert tiles.choose(spec, any_avx2, "fused").sweep is None


def test_rows_up_to_which_packed_caches_are_swept():
    """By the core and the type of the cache; an invariant spec goes in the steps of attend, by their register tiles."""
    zen3, any_avx2 = (target.resolve({"kind": "llvm", "mcpu": mcpu}) for mcpu in ("znver3", "x86-64-v3"))

    def chosen(rows, cpu, dtype, **fields):
        spec = PagedAttentionSpec(4 * rows, 4, 128, 16, dtype, kv_layout="packed", **fields)
        return tiles.choose(spec, cpu, "fused")

    for cpu, dtype, most in (
        (zen3, "float32", 8),
        (zen3, "bfloat16", 7),
        (zen3, "float16", 2),
        (any_avx2, "float32", 1),
        (any_avx2, "bfloat16", 1),
    ):
        sweeps = [chosen(rows, cpu, dtype).sweep for rows in (1, most, most + 1)]
        assert sweeps == ["heads", "heads", None], (dtype, most)
        still = {"kind": "llvm", "mcpu": json.loads(cpu.config)["mcpu"], "tuned": {"decode": {"sweep_intensity": 0.0}}}
        stepped = chosen(most, target.resolve(still), dtype, invariant=True)
        assert chosen(most, cpu, dtype, invariant=True) == stepped
        assert (stepped.sweep, stepped.weight_sums > 0) == (None, True)
    assert chosen(1, zen3, "bfloat16", kv_dtype="int4", kv_rotation="none").sweep == "heads"
    assert chosen(1, zen3, "bfloat16", kv_dtype="int8").sweep is None


def test_the_command(ratios):
    ratios([[1.5] * 9, [0.9] * 9])
    result = CliRunner().invoke(main, ["tune", *OPTIONS])
    assert result.exit_code == 0, result.output
    assert "kv_tile 64" in result.output
    assert "taken" in result.output
    assert "PA_TUNE=0 ignores it" in result.output
    spec = PagedAttentionSpec(4, 2, 16, 16, "float32")
    assert records.taken_up({"kind": "llvm"}, spec)["tuned"] == {"decode": HALF}
    assert "removed" in CliRunner().invoke(main, ["tune", "--forget", *OPTIONS]).output
    assert "there is none" in CliRunner().invoke(main, ["tune", "--forget", *OPTIONS]).output
    refused = CliRunner().invoke(main, ["tune", "--target", "znver4"])
    assert refused.exit_code == 2
    assert "expected llvm, the CPU of this machine, for tune, got" in refused.output
    assert "expected fused for tune" in CliRunner().invoke(main, ["tune", "--pipeline", "staged"]).output
