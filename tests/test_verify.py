"""Module.verify: right modules pass, wrong ones fail, and what a failure says draws it again."""

from __future__ import annotations

import dataclasses
import re
import shlex

import numpy as np
import pytest
import tvm
from builds import build_library
from click.testing import CliRunner
from specs import BASE, SPECS, every_spec, range_tokens

import pa_compiler
from pa_compiler import backends
from pa_compiler.cli import main as cli
from pa_compiler.cpu import backend, target
from pa_compiler.cpu import tiles as tiling
from pa_compiler.interface import attend_range_blocks
from pa_compiler.verification import draws, verify

SEED = 1
DRAWS = 24


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
    assert max(largest) == pytest.approx(min(draws._LARGEST[spec.dtype], draws._LARGEST[spec.result_dtype]), rel=1e-3)
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


@pytest.mark.parametrize("fields", [{}, {"window": 60, "sinks": True}], ids=["all", "window"])
def test_prefixes_and_merges_are_drawn(compiled, fields):
    module = compiled(dataclasses.replace(BASE, **fields), attend=True, shared_prefix=True, merge_states=True)
    for number in range(24):
        assert module.verify(seed=SEED, draw=number).passed


def test_draws_of_prefixes_reach_what_is_hard():
    calls = [draws.draw(BASE, SEED, number, True, True) for number in range(120)]
    told = [(call, call.prefixes) for call in calls if call.prefixes is not None]
    assert len(told) > 20
    assert {call.queries is None for call in calls if call.prefixes is None} == {True, False}
    lens = np.concatenate([prefixes.prefix_len for _, prefixes in told])
    assert lens.max() > 500
    assert 0 in lens
    assert (lens % BASE.block_size == 0).all()
    shared = [
        np.count_nonzero(call.queries.counts[begin:end])
        for call, prefixes in told
        for begin, end, length in zip(
            prefixes.prefix_start_loc[:-1], prefixes.prefix_start_loc[1:], prefixes.prefix_len, strict=True
        )
        if length
    ]
    assert max(shared) > 3
    assert any(call.as_pair for call, _ in told)


class Broken:
    """A module whose results are changed on the way out; spoil(out, lse or None, arguments) says how."""

    def __init__(self, module, spoil=lambda out, lse, arguments: None):
        self.module, self.spec, self.num_threads, self.spoil = module, module.spec, 1, spoil

    has_attend = has_attend_shared_prefix = has_merge_states = False
    most_query_tokens = None

    def decode(self, *arguments, **options):
        returned = self.module.decode(*arguments, **options)
        self.spoil(*(returned if isinstance(returned, tuple) else (returned, None)), arguments)
        return returned

    def append_kv(self, *arguments):
        self.module.append_kv(*arguments)


class BrokenWithQueries(Broken):
    """One of which calls of attend are changed."""

    has_attend, most_query_tokens = True, None

    def decode(self, *arguments, **options):
        return self.module.decode(*arguments, **options)

    def attend(self, *arguments, **options):
        returned = self.module.attend(*arguments, **options)
        self.spoil(*(returned if isinstance(returned, tuple) else (returned, None)), arguments)
        return returned


class BrokenWithPrefixes(BrokenWithQueries):
    """One of which those with prefixes are."""

    has_attend_shared_prefix = True

    def attend(self, *arguments, **options):
        return self.module.attend(*arguments, **options)

    def attend_shared_prefix(self, *arguments, **options):
        returned = self.module.attend_shared_prefix(*arguments, **options)
        self.spoil(*(returned if isinstance(returned, tuple) else (returned, None)), arguments)
        return returned


class BrokenWithParts(Broken):
    """One whose merge_states forgets a part."""

    has_merge_states = True

    def merge_states(self, outs, lses, **options):
        return self.module.merge_states(outs[:-1] if len(outs) > 1 else outs, lses[: len(lses) - 1 or 1], **options)


class ForgetsATokenOnAppend(Broken):
    def append_kv(self, key, value, key_cache, value_cache, slot_mapping):
        self.module.append_kv(key[1:], value[1:], key_cache, value_cache, slot_mapping[1:])


def one_element(out, lse, arguments):
    out[-1:, -1, -1] += 0.1


def not_a_number(out, lse, arguments):
    out[:1, 0, 0] = np.nan


def empty_is_not_zero(out, lse, arguments):
    out[arguments[4] == 0] = 1e-30


def logarithm_to_base_2(out, lse, arguments):
    if lse is not None:
        lse /= np.float32(np.log(2))


def writes_beside_out(out, lse, arguments):
    if out.base is not None and out.base.shape != out.shape:
        out.base[-1, -1, -1] = out.base[0, 0, 0] = 0


def writes_its_inputs(out, lse, arguments):
    arguments[2][-1] = 0


def raises(out, lse, arguments):
    raise IndexError("block_table: expected less")


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


def test_wrong_results_of_prefixes_and_parts_fail(compiled):
    module = compiled(BASE, attend=True, shared_prefix=True, merge_states=True)
    expect_failures(BrokenWithPrefixes(module, one_element), "^out: 1 of")
    expect_failures(BrokenWithPrefixes(module, writes_its_inputs), "^value_cache: .* after attend_shared_prefix")
    expect_failures(BrokenWithParts(module), r"^merge_states: (out|lse): .* of \d+ parts: expected")


def test_a_wrong_append_fails(compiled):
    expect_failures(ForgetsATokenOnAppend(compiled(BASE)), "^key_cache: its bits are not as expected after append_kv")


def expect_failures(module, says):
    failed = [failure for number in range(DRAWS) for failure in verify.verify(module, seed=SEED, draw=number).failures]
    assert any(re.search(says, failure.message) for failure in failed), failed


FAULTS = {  # a stage, a piece of its text, and what is there instead
    "scale": ("kernels", "vo * 8 + vi] * score_scale,", "vo * 8 + vi] * (score_scale * T.float32(1.02)),"),
    "tail": ("kernels", "vi < valid_len - vo * 8", "vi <= valid_len - vo * 8"),
    "merge": ("host", ".num_partials = plan.partials_of(seq)", ".num_partials = int64_t{1}"),
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


def test_draws_of_attend_reach_what_is_hard():
    calls = [draws.draw(BASE, SEED, number, True) for number in range(1, 160, 2)]
    assert all(draws.draw(BASE, SEED, number, True).queries is None for number in range(0, 20, 2))
    counts = np.concatenate([call.queries.counts for call in calls])
    assert {0, 1, 2, 7, 16, 17, 33, 512} <= set(counts.tolist())
    assert {call.queries.causal for call in calls} == {False, True}
    trees = [call.queries.tree_mask for call in calls if call.queries.tree_mask is not None]
    assert {tree.dtype.name for tree in trees} == {"bool", "uint8"}
    assert max(call.context_lens.max(initial=0) for call in calls) > attend_range_blocks(BASE) * BASE.block_size
    assert any(np.isnan(call.values[call.is_used].astype(np.float32)).any() for call in calls)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (one_element, r"^out: 1 of \d+ elements out of tolerance"),
        (logarithm_to_base_2, r"^lse: "),
        (writes_its_inputs, r"^value_cache: its bits are not as expected after attend"),
    ],
    ids=["one_element", "logarithm_to_base_2", "writes_its_inputs"],
)
def test_wrong_results_of_attend_fail(compiled, spoil, message):
    module = BrokenWithQueries(compiled(BASE, attend=True), spoil)
    results = [verify.verify(module, seed=SEED, draw=number) for number in range(DRAWS)]
    assert not any(result.failures for result in results[::2])
    messages = [failure.message for result in results for failure in result.failures]
    assert any(re.search(message, each) for each in messages), messages
