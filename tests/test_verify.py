"""Module.verify: right modules pass, wrong ones fail, and what a failure says draws it again."""

from __future__ import annotations

import dataclasses
import re
import shlex

import numpy as np
import pytest
import tvm
from broken import (
    SEED,
    Broken,
    ForgetsATokenOnAppend,
    empty_is_not_zero,
    expect_failures,
    logarithm_to_base_2,
    not_a_number,
    one_element,
    raises,
    writes_beside_out,
    writes_its_inputs,
)
from builds import build_library
from click.testing import CliRunner
from specs import BASE, SPECS, every_spec, range_tokens

import pa_compiler
from pa_compiler import backends
from pa_compiler.cli import main as cli
from pa_compiler.cpu import backend, target
from pa_compiler.cpu import tiles as tiling
from pa_compiler.verification import draws, numbers


@every_spec
def test_right_modules_pass(compiled, spec, pipeline):
    module = compiled(spec, pipeline)
    for number in range(16):
        result = module.verify(seed=SEED, draw=number)
        assert (result.passed, result.draws, result.failures) == (True, 1, ())
        assert max(result.out.of_tolerance, result.lse.of_tolerance) <= 1
    assert module.num_threads == 2


def test_draws_until_the_time_is_over(compiled):
    passed = []
    result = compiled(BASE).verify(0.2, seed=SEED, advance=passed.append)
    assert result.passed
    assert result.draws == len(passed) > 0
    assert result.seconds >= 0.2
    assert compiled(BASE).verify(0).seed != compiled(BASE).verify(0).seed
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.seed = 2


@pytest.mark.parametrize("name", SPECS)
def test_draws_reach_what_is_hard(name):
    spec = SPECS[name]
    calls = [draws.draw(spec, SEED, number) for number in range(80)]
    lens = np.concatenate([call.context_lens for call in calls])
    for length in (0, 1, spec.block_size - 1, spec.block_size, spec.block_size + 1):
        assert length in lens
    cut_at = range_tokens(spec) * np.array([1, 2, 3])
    assert lens.max() > cut_at[0]
    assert (np.abs(lens[:, None] - cut_at) <= 1).any()
    assert {0, 1, 2, 15, 16, 17, 33} <= {len(call.context_lens) for call in calls}
    assert any(call.scale is None for call in calls)
    assert max(call.scale or 0 for call in calls) > 1e25
    largest = [largest_of(call.values[call.is_used]) for call in calls]
    assert max(largest) == pytest.approx(min(numbers.LARGEST[spec.dtype], numbers.LARGEST[spec.result_dtype]), rel=1e-3)
    assert 0 < min(size for size in largest if size) < 0.1
    unseen = [call.keys[call.is_used][..., 0] == -np.inf for call in calls]
    assert {bool(each.all()) for each in unseen if each.any()} == {False, True}
    if spec.wide_range:
        products = [largest_of(call.query) * largest_of(call.keys[call.is_used]) for call in calls]
        assert max(products) > 2**130  # which float32 has not
    for what in ("append", "one_buffer", "give_out", "num_threads", "lse"):
        assert len({getattr(call, what) for call in calls}) >= 2, what
    for call in calls:
        assert not np.isfinite(call.keys[~call.is_used].astype(np.float32)).any()
        assert np.isfinite(call.values[call.is_used].astype(np.float32)).all()
        assert np.isfinite(call.keys[call.is_used].astype(np.float32)[..., 1:]).all()


def largest_of(array):
    """The largest magnitude of the finite elements."""
    numbers = np.abs(array.astype(np.float64))
    return float(numbers[np.isfinite(numbers)].max(initial=0))


def test_a_draw_is_a_function_of_seed_and_number():
    one, same, other = (draws.draw(BASE, SEED, number) for number in (5, 5, 6))
    for field in dataclasses.fields(one):
        if field.name != "rng":
            np.testing.assert_array_equal(getattr(one, field.name), getattr(same, field.name))
    assert one.keys.shape != other.keys.shape or (one.keys != other.keys).any()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (one_element, r"^out: 1 of \d+ elements out of tolerance, the worst at \["),
        (not_a_number, r"^out: .* got nan, inf of the bound"),
        (empty_is_not_zero, "of a sequence of 0 tokens: expected 0, got 1e-30, inf of the bound"),
        (logarithm_to_base_2, "^lse: "),
        (writes_beside_out, r"^out: \d+ elements beside the array that was given were written"),
        (writes_its_inputs, "^value_cache: its bits are not as expected after decode"),
        (raises, "^raised IndexError: block_table: expected less"),
    ],
)
def test_wrong_results_fail(compiled, spoil, says):
    expect_failures(Broken(compiled(BASE), spoil), says)


def test_a_wrong_append_fails(compiled):
    expect_failures(ForgetsATokenOnAppend(compiled(BASE)), "^key_cache: its bits are not as expected after append_kv")


FAULTS = {  # a stage, a piece of its text, and what is there instead
    "scale": ("kernels", "vo * 8 + vi] * score_scale,", "vo * 8 + vi] * (score_scale * T.float32(1.02)),"),
    "tail": ("kernels", "vi < valid_len - vo * 8", "vi <= valid_len - vo * 8"),
    "merge": ("host", ".num_partials = of.count()", ".num_partials = int64_t{1}"),
}


@pytest.mark.parametrize(("stage", "text", "wrong"), FAULTS.values(), ids=FAULTS)
def test_a_wrong_library_fails_and_its_command_draws_that_again(monkeypatch, tmp_path, stage, text, wrong):
    library = build_with_fault(monkeypatch, tmp_path / "a folder", BASE, stage, text, wrong)
    module = pa_compiler.load(library)
    number = next(n for n in range(50) if not module.verify(seed=SEED, draw=n).passed)
    (failure,) = eval(module.verify(seed=SEED, draw=number).failures[0].reproduction).failures
    assert re.match("(out|lse): ", failure.message)
    result = CliRunner().invoke(cli.main, ["verify", str(library), "--seed", str(SEED), "--draw", str(number)])
    printed = " ".join(result.stdout.split())
    assert (result.exit_code, failure.message in printed, "FAIL: 1 of 1 draw" in printed) == (1, True, True), printed
    command = re.search(r"^pa-compiler (verify .* --draw \d+)$", result.stdout, re.MULTILINE)[1]
    assert CliRunner().invoke(cli.main, shlex.split(command)).exit_code == 1


def build_with_fault(monkeypatch, directory, spec, stage, text, wrong):
    """A library of a spec in whose host or scheduled kernels one piece of text is another."""
    lower, host = backend.lower, backend.host_text

    def replaced(original):
        assert text in original
        return original.replace(text, wrong)

    def faulty_lower(*arguments):
        lowered = lower(*arguments)
        scheduled = replaced(lowered.scheduled)
        return dataclasses.replace(lowered, scheduled=scheduled, mod=tvm.script.from_source(scheduled))

    if stage == "host":
        monkeypatch.setattr(backend, "host_text", lambda *arguments: replaced(host(*arguments)))
    else:
        monkeypatch.setattr(backend, "lower", faulty_lower)
    directory.mkdir()
    cpu = target.resolve(backends.normalize("llvm"))
    build_library(spec, cpu, tiling.choose(spec, cpu, "fused"), "fused", directory)
    return directory / "pa.so"


def test_the_command_passes_a_right_library(compiled, tmp_path):
    compiled(BASE).save(tmp_path / "pa.so")
    result = CliRunner().invoke(cli.main, ["verify", str(tmp_path / "pa.so"), "--seconds", "0.1", "--seed", "7"])
    assert result.exit_code == 0
    assert "Verifying" in result.stderr
    for expected in ("6 query heads on 2 kv heads of 24", " s, seed 7", "of out's is used", "PASS"):
        assert expected in result.stdout
    result = CliRunner().invoke(cli.main, ["verify", str(tmp_path / "pa.so"), "--draw", "7"])
    assert result.exit_code == 2
    assert "argument --seed: expected the seed of draw 7, got None" in result.stderr


@pytest.mark.scorecard(13)
@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"seconds": -1}, ValueError, "seconds: expected a number from 0 on, got -1"),
        ({"seconds": float("nan")}, ValueError, "seconds: .* got nan"),
        ({"seconds": "1"}, ValueError, "seconds: .* got '1'"),
        ({"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
        ({"seed": 1.0}, TypeError, "seed: expected an int, got 1.0 of type float"),
        ({"seed": 1, "draw": True}, TypeError, "draw: expected an int, got True of type bool"),
        ({"draw": 3}, ValueError, "seed: expected the seed of draw 3, got None"),
    ],
    ids=repr,
)
def test_arguments_are_checked(figure, compiled, arguments, error, says):
    with pytest.raises(error, match=f"^{says}"):
        compiled(BASE).verify(**arguments)
    figure("kinds", 1)
