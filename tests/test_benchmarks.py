"""The benchmark measures what it says: sizes, inputs, limits; and it finds a wrong result. No time is asserted."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from specs import BASE

from benchmarks import measure, run, scores, shared_prefix
from benchmarks.cases import CASES, MLA_CASES, MORE_CASES, beyond_cache, sized
from benchmarks.contender import Contender
from benchmarks.inputs import make_call
from benchmarks.peers import PEERS, Unsupported
from benchmarks.roofline import BF16, FMA, SHARE, summarise
from pa_compiler import PagedAttentionSpec, reference
from pa_compiler.verification.cases import Case

SMALL = Case(PagedAttentionSpec(4, 2, 16, 16, "bfloat16"), 3, (40, 1, 16), scale=None)
ROUND = {FMA: 40e9, BF16: 0.0, SHARE: 1.0, "read, plain": 8e9, "read, fast": 10e9}


@pytest.mark.parametrize("case", [*CASES.values(), *MORE_CASES.values()], ids=[*CASES, *MORE_CASES])
def test_keys_and_values_are_four_times_the_cache(case):
    grown = beyond_cache(case, 32 << 20)
    assert grown.kv_bytes >= 128 << 20
    assert beyond_cache(case, 1) == case


def test_latent_attention_is_measured_as_large_as_it_is():
    assert {case.spec.num_heads for case in MLA_CASES.values()} == {16, 64, 128}
    assert {case.spec.dtype for case in MLA_CASES.values()} == {"bfloat16", "float32"}
    assert {case.batch for case in MLA_CASES.values()} == {1, 8}
    assert {case.longest for case in MLA_CASES.values()} >= {1 << 10, 1 << 17}
    for name, case in MLA_CASES.items():
        assert sized(name, 32 << 20) == case
        assert case.flops == case.num_tokens * case.spec.num_heads * 2 * (576 + 512)
        assert case.kv_bytes == case.num_tokens * 576 * np.dtype(case.spec.dtype).itemsize


@pytest.mark.parametrize("only", ["mla-64-f32", "32/8-d80"])
def test_cases_are_chosen_by_part_of_their_names(monkeypatch, only):
    asked = []

    def stop(name, cache_bytes):
        asked.append(name)
        return SMALL

    monkeypatch.setattr(run, "sized", stop)
    monkeypatch.setattr(run, "Probe", lambda cache_bytes: None)
    monkeypatch.setattr(run.machine, "cores", list)
    monkeypatch.setattr(run.report, "as_json", lambda *_: {})
    done = CliRunner().invoke(run.main, ["--only", only], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert len(asked) > 1
    assert all(only in name for name in asked)
    done = CliRunner().invoke(run.main, ["--only", "no such case"])
    assert done.exit_code == 2
    assert "'no such case'" in done.output


def test_values_that_are_part_of_the_keys_are_a_view_of_them():
    spec = PagedAttentionSpec(4, 1, 24, 16, "bfloat16", value_dim=16, shared_kv=True)
    call = make_call(Case(spec, 2, (40, 17), scale=None), 1, huge_pages=True)
    assert call.value_cache is None
    assert call.out_shape == (2, 4, 16)
    assert call.scale == pytest.approx(24**-0.5)
    assert np.shares_memory(call.values, call.key_cache)
    assert np.array_equal(call.contiguous(call.values), call.contiguous(call.key_cache)[..., :16])


def test_every_layout_of_the_inputs_holds_the_same_tokens():
    call = make_call(SMALL, 1, huge_pages=False)
    blocks = -(-call.context_lens // SMALL.spec.block_size)
    used = np.concatenate([row[:count] for row, count in zip(call.block_table, blocks, strict=True)])
    assert sorted(used) == list(range(SMALL.num_blocks)), "a block is used twice, or not at all"
    keys = call.key_cache.reshape(-1, 2, 16)[call.slots()]
    contiguous = call.contiguous(call.key_cache)
    pieces = [contiguous[i, :, :length].swapaxes(0, 1) for i, length in enumerate(call.context_lens)]
    assert np.array_equal(np.concatenate(pieces).astype(np.float32), keys.astype(np.float32))
    again = make_call(SMALL, 2, huge_pages=True)
    assert np.array_equal(again.value_cache.view(np.uint16), call.value_cache.view(np.uint16))
    assert np.array_equal(again.block_table, call.block_table)


def test_the_roofline_is_the_lower_of_arithmetic_and_memory():
    roofline, rounds = summarise([ROUND, ROUND | {"read, fast": 12e9}, ROUND])
    assert (roofline.bandwidth, roofline.reading, rounds[1].bandwidth) == (10e9, "read, fast", 12e9)
    few = dataclasses.replace(SMALL, spec=PagedAttentionSpec(2, 2, 16, 16, "float32"))  # 0.5 FLOPs a byte
    many = dataclasses.replace(SMALL, spec=PagedAttentionSpec(32, 2, 16, 16, "bfloat16"))  # 16
    assert roofline.limit(few) == 5e9
    assert roofline.limit(many) == 40e9
    with_bf16, _ = summarise([ROUND | {BF16: 90e9}])
    assert with_bf16.limit(many) == 90e9


class InProcess:
    """A contender without a process, whose result is off by a factor."""

    def __init__(self, name, factor):
        self.name, self._factor = name, factor

    def forget(self):
        pass

    def prepare(self, case, batch):
        if self._factor is None:
            raise Unsupported("not on this CPU")

    def time(self, case, seconds):
        return [{"ours": 1.0, "vllm": 3.0, "torch": 2.0}[self.name]]

    def result(self, case, path):
        call = make_call(SMALL, 1, huge_pages=False)
        return self._factor * reference.decode(*[getattr(call, name) for name in
            ("query", "key_cache", "value_cache", "block_table", "context_lens")])  # fmt: skip


class FixedProbe:
    def measure(self, cpus):
        return ROUND


def measured(*contenders):
    (found,) = measure.measure({"small": SMALL}, contenders, FixedProbe(), [0], rounds=3, tell=lambda text: None)
    return found, {row.contender: row for row in found.results}


def test_ratios_are_to_the_fastest_peer_that_is_right():
    found, rows = measured(InProcess("ours", 1), InProcess("vllm", 1), InProcess("torch", 1.1))
    assert found.best_peer == "vllm"
    assert rows["ours"].to_best_peer == (3, 3, 3)
    assert rows["torch"].reason.startswith("wrong: ")
    assert rows["torch"].seconds is None


def test_a_peer_that_does_not_run_is_named_with_its_reason():
    found, rows = measured(InProcess("ours", 1), InProcess("torch", None))
    assert found.best_peer is None
    assert rows["torch"].reason == "not on this CPU"
    assert rows["ours"].to_best_peer is None


def test_a_process_that_dies_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        Contender("ours", [0], False, tmp_path / "log") as contender,
        pytest.raises(Unsupported, match="exit status 1"),
    ):
        contender.prepare(next(iter(CASES)), 1)


def test_results_are_written_through_a_link(tmp_path):
    (tmp_path / "link").symlink_to("results.json")
    run._write({"cases": []}, tmp_path / "link", None)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "results.json").read_text() == '{"cases": []}\n'


def test_every_peer_has_its_file():
    folder = Path(measure.__file__).parent / "peers"
    assert {peer.module for peer in PEERS.values()} == {path.stem for path in folder.glob("[a-z]*.py")}


def test_a_window_is_measured_on_the_blocks_of_its_tokens():
    """In float64 it is the call of the short context: the entries before the window name no block."""
    case = Case(PagedAttentionSpec(4, 2, 16, 16, "float32"), 2, (scores.WINDOW,), scale=None)
    call = make_call(case, 1, huge_pages=False)
    longer = scores.in_a_longer_context(call)
    assert longer.context_lens.tolist() == [scores.CONTEXT] * 2
    assert (longer.block_table >= 0).sum() == case.num_blocks
    expected = reference.decode(*call.arguments)
    np.testing.assert_array_equal(reference.decode(*longer.arguments, window=longer.case.spec.window), expected)


@pytest.mark.parametrize("query", [1, 2])
def test_shared_prefixes_are_timed_and_compared(compiled, query):
    module, case = compiled(BASE, attend=True, shared_prefix=True), shared_prefix.Case(3, 10, 7, query)
    calls = shared_prefix.make_calls(module, case)
    runs = shared_prefix.make_runs(module, case, calls)
    shared_prefix.check(BASE, calls["blocks"], runs)
    assert {name: len(each) for name, each in shared_prefix.measure(runs).items()} == dict.fromkeys(
        ("shared", "blocks", "copies"), shared_prefix.ROUNDS
    )
