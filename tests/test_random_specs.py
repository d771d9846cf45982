"""Specs and inputs drawn at random, compiled for CPUs drawn at random, against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
from drawn_specs import drawn_spec

GROUPS = 4
"""Of specs, for as many processes."""


@pytest.mark.scorecard(1)
@pytest.mark.parametrize("group", range(GROUPS))
def test_random_specs(compiled, group, count, figure):
    worst = []
    numbers = range(group, count(GROUPS, 152), GROUPS)
    for number in numbers:
        module = compiled(*drawn_spec(number))
        for draw in range(count(12, 66)):
            result = module.verify(seed=number, draw=draw)
            assert result.passed, (f"drawn_spec({number})", module, result.failures)
            worst.append(max(result.out.of_tolerance, result.lse.of_tolerance))
    figure("specs", len(numbers))
    figure("draws", len(worst))
    figure("largest error, of the bound", max(worst), worst=True)
    # The largest of the groups' percentiles: at most 0.1 % of all draws are above it.
    figure("99.9th percentile of the draws' largest", float(np.percentile(worst, 99.9)), worst=True)


def test_drawn_values_are_of_every_size():
    """Whether they are drawn yet or not."""
    specs = [drawn_spec(number, value_dims=True)[0] for number in range(152)]
    shared = [spec for spec in specs if spec.shared_kv]
    assert len(shared) > 8
    assert {spec.dtype for spec in shared} == {"float32", "float16", "bfloat16"}
    assert any(spec.result_dim < spec.head_dim for spec in shared)
    apart = [spec for spec in specs if not spec.shared_kv and spec.result_dim != spec.head_dim]
    assert len(apart) > 25
    assert {spec.kv_layout for spec in apart} == {"NHD", "HND", "packed"}
    assert {spec.result_dim > spec.head_dim for spec in apart} == {False, True}
    others = [spec for spec in specs if spec.value_dim is None]
    assert len(others) > 76
    assert set(others) <= {drawn_spec(number, value_dims=False)[0] for number in range(152)}


def test_drawn_score_functions_are_of_every_kind():
    """Whether they are drawn yet or not, and beside the specs that are drawn without them."""
    plain, specs = ([drawn_spec(number, scores=scores)[0] for number in range(152)] for scores in (False, True))
    assert 40 < sum(one == other for one, other in zip(plain, specs, strict=True)) < 90
    fields = {(spec.window is not None, spec.softcap is not None, spec.alibi, spec.sinks) for spec in specs}
    assert len(fields) >= 12
    assert {spec.window for spec in specs} >= {1, 7, 16, 100, 128, 129, 1024, None}
    windows = [spec for spec in specs if spec.window is not None]
    assert {(spec.dtype, spec.kv_layout) for spec in windows} == {(spec.dtype, spec.kv_layout) for spec in specs}
    inputs = [each for spec in specs for each in spec.inputs]
    assert {each.shape.index("batch") for each in inputs} == {0, 1, 2}
    assert len({(spec.dtype, spec.kv_layout) for spec in specs if spec.inputs}) > 6


def test_drawn_specs_reach_every_kind():
    drawn = [drawn_spec(number) for number in range(152)]
    specs = [spec for spec, _, _ in drawn]
    assert len({(spec.dtype, spec.result_dtype) for spec in specs}) == 9
    assert len({(spec.dtype, spec.kv_layout) for spec in specs}) == 9
    assert len({(spec.kv_layout, pipeline) for spec, pipeline, _ in drawn}) == 6
    assert {str(target) for _, _, target in drawn} >= {"llvm", "{'kind': 'llvm', 'mcpu': 'x86-64'}"}
    assert {spec.head_tile for spec in specs} == {1, 2, 4, 8, 16, 32, 64}
    assert len({spec.head_dim for spec in specs}) > 30
    assert max(spec.head_dim for spec in specs) > 512
    assert max(spec.group for spec in specs) > 64
    assert {spec.block_size for spec in specs} >= {1, 2, 5, 8, 16, 32, 48, 64, 100, 128, 256}
