"""The benchmark of attend measures what it says: cases, which rows are compared, ratios to parts, files of results."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import attend, measure
from benchmarks.attend_cases import ATTEND_CASES, COMMON, GROUPS
from benchmarks.inputs import make_call
from benchmarks.peers import Unsupported
from benchmarks.roofline import BF16, FMA, SHARE
from pa_compiler import PagedAttentionSpec, reference
from pa_compiler.verification.cases import Case

SPEC = PagedAttentionSpec(4, 2, 16, 16, "bfloat16")
RAGGED = Case(SPEC, 3, (40, 100, 16), scale=None, query_lens=(5, 80, 1))
CASES = {"one": Case(SPEC, 3, (40, 9, 16), scale=None, query_lens=(1,)), "prompt": RAGGED}
CASES["both"] = Case(SPEC, 4, (40, 9, 16, 100), scale=None, query_lens=(1, 1, 1, 80))


class Probe:
    def measure(self, cpus):
        return {FMA: 1e9, BF16: 2e9, SHARE: 1.0, "read": 1e9}


class InProcess:
    """A contender without a process; of its cases one may be impossible, and its process then ends."""

    def __init__(self, name, times, impossible=None):
        self.name, self.times, self.impossible, self.prepared = name, times, impossible, {}

    def forget(self):
        self.prepared = {}

    def prepare(self, case, batch):
        if case == self.impossible:
            self.prepared = {}
            raise Unsupported("its process ended")
        self.prepared[case] = make_call(CASES[case], 1, huge_pages=False)

    def time(self, case, seconds):
        assert case in self.prepared
        return [self.times[case]]

    def result(self, case, path):
        call = self.prepared[case]
        return reference.attend(*call.arguments, call.starts)


def measured(*contenders):
    parts = {"both": ("one", "prompt")}
    found = measure.measure(CASES, contenders, Probe(), [0], rounds=3, tell=lambda text: None, parts=parts)
    return {(case.name, row.contender): row for case in found for row in case.results}, found


@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_as_large_as_they_say(name):
    group = GROUPS[name]
    grown = group.sized(32 << 20)
    assert set(group.parts) | {part for parts in group.parts.values() for part in parts} <= set(group.cases)
    if group.from_memory:
        assert min(case.kv_bytes for case in grown.values()) >= 64 << 20
        assert len({case.batch for case in grown.values()}) == 1
    else:
        assert grown == group.cases


def test_flops_are_those_of_keys_that_are_seen():
    case = ATTEND_CASES["32/8-bf16-chunk-512-of-8192"]
    assert case.flops == sum(range(8192 - 511, 8193)) * 32 * 4 * 128


def test_a_row_that_is_compared_is_a_call_of_decode():
    call = make_call(RAGGED, 1, huge_pages=False)
    rows = call.checked()
    assert {0, 4, 5, 84, 85} <= set(rows.row)
    assert len(rows.row) <= 64 + 3
    caches = (call.key_cache, call.value_cache)
    of_rows = reference.decode(call.query[rows.row], *caches, call.block_table[rows.sequence], rows.length)
    np.testing.assert_array_equal(of_rows, reference.attend(*call.arguments, call.starts)[rows.row])


def test_the_newest_keys_are_those_of_the_query_tokens():
    call = make_call(RAGGED, 1, huge_pages=False)
    keys = call.contiguous(call.key_cache).swapaxes(1, 2)
    expected = np.concatenate([keys[0, 35:40], keys[1, 20:100], keys[2, 15:16]])
    np.testing.assert_array_equal(call.newest(call.key_cache), expected)


def test_a_case_is_compared_with_the_sum_of_its_parts():
    ours, peer = {"one": 1.0, "prompt": 3.0, "both": 5.0}, {"one": 2.0, "prompt": 2.0, "both": 6.0}
    rows, found = measured(InProcess("ours", ours), InProcess("pace", peer))
    assert rows["both", "ours"].to_parts == (1.25, 1.25, 1.25)
    assert rows["both", "pace"].to_parts == (1.5, 1.5, 1.5)
    assert rows["one", "ours"].to_parts is None
    assert rows["one", "ours"].to_best_peer == (2, 2, 2)
    table = attend._row(attend.report.as_json(found, True, 3)["cases"][-1])
    assert table[2].startswith("pace ")
    assert table[3:] == ["1.20 (1.20-1.20)", "", "1.25 (1.25-1.25)", ""]


def test_a_process_that_ends_in_one_case_does_the_others():
    times = dict.fromkeys(CASES, 1.0)
    rows, _ = measured(InProcess("ours", times), InProcess("pace", times, impossible="prompt"))
    assert rows["prompt", "pace"].reason == "its process ended"
    assert rows["one", "pace"].seconds == (1, 1, 1)
    assert rows["both", "pace"].to_parts is None


def test_results_are_added_to_those_of_the_same_cpu(tmp_path):
    def case(name, value):
        return {"name": name, "num_threads": 1, "value": value}

    first, second = "32/8-bf16-prefill-2048", "32/8-bf16-prefill-8192"
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"cpu": "A", "cases": [case(second, 1), case(first, 1)]}))
    added = attend._added(path, {"cpu": "A", "cases": [case(second, 2)]})
    assert added["cases"] == [case(first, 1), case(second, 2)]
    assert attend._added(path, {"cpu": "B", "cases": []})["cases"] == []


def test_cases_are_chosen_by_patterns():
    assert CliRunner().invoke(attend.main, ["--list"]).output.split() == list(GROUPS)
    done = CliRunner().invoke(attend.main, ["--cases", "none"])
    assert done.exit_code == 2
    assert "none" in done.output
    for pattern in COMMON:
        assert any(attend.fnmatch.fnmatchcase(name, pattern) for name in GROUPS)
