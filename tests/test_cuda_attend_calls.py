"""attend of whole modules for a GPU, on the fake driver: arguments, who checks indices, pairs, graphs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cuda_driver import stream
from ragged_inputs import assert_near_float64, drawn_trees, make_ragged
from test_attend import by_head_and_sequence
from tolerances import assert_same_bits

from pa_compiler import PagedAttentionSpec
from pa_compiler.interface import GPU_QUERY_TOKENS
from pa_compiler.verification.inputs import as_pair

SPEC = PagedAttentionSpec(8, 2, 64, 16, "bfloat16")
SEQUENCES = [(3, 300), (1, 1), (0, 40), (5, 17), (2, 530)]
CHECKS = ("device", "host", "none")


@pytest.fixture
def module(gpu_module):
    return gpu_module(SPEC, attend=True)


class Attend:
    """A call of attend on the fake GPU."""

    def __init__(self, gpu, call):
        self.call, self._gpu = call, gpu
        given = dict(
            zip(("key_cache", "value_cache", "block_table", "context_lens"), call.inputs.arguments[1:], strict=True)
        )
        given |= {"query": call.query, "query_start_loc": call.query_start_loc}
        given |= {name: array for name, array in call.options.items() if isinstance(array, np.ndarray)}
        self.arguments = {name: gpu.tensor(array, writable=False) for name, array in given.items()}
        self.arguments |= {"causal": call.options.get("causal", True)}
        self.arguments["out"] = gpu.tensor(np.full(call.query.shape, np.nan, call.query.dtype))
        self.arguments["lse"] = gpu.tensor(np.full(call.query.shape[:2], np.nan, np.float32))

    def __call__(self, module, **others):
        module.attend(**self.arguments | others)

    def results(self):
        self._gpu.run()
        return tuple(self.arguments[name].array.copy() for name in ("out", "lse"))

    @property
    def unwritten(self):
        return all(np.isnan(result.astype(np.float32)).all() for result in self.results())


@pytest.mark.parametrize("options", ["causal", "all", "tree"])
def test_attend(gpu, module, options):
    """Whoever checks: near float64, and the same bits; for block_table as a pair too."""
    tree = {"tree_mask": drawn_trees([count for count, _ in SEQUENCES], np.random.default_rng(1))}
    call = make_ragged(SPEC, SEQUENCES, **{"causal": {}, "all": {"causal": False}, "tree": tree}[options])
    found = []
    for check in CHECKS:
        of_table, of_pair = Attend(gpu, call), Attend(gpu, call)
        of_table(module, check=check)
        pair = as_pair(call.inputs.block_table, call.inputs.context_lens, SPEC.block_size)
        of_pair(module, check=check, block_table=tuple(map(gpu.tensor, pair)))
        found += [of_table.results(), of_pair.results()]
        module.check_status()
    assert_near_float64(SPEC, call, *found[0])
    for results in found[1:]:
        for one, other in zip(results, found[0], strict=True):
            assert_same_bits(one, other)


def changed(name, at, value):
    return lambda arrays: arrays[name].__setitem__(at, value)


TREE = "tree_mask"
BAD = {  # what is changed, the error, what the host says, and what a kernel reports
    "begins_late": (
        changed("query_start_loc", 0, 1), ValueError,
        "query_start_loc: expected 0 first, got 1", "query_start_loc: .* of sequence 0 up to 64 .*, got 1 and then 3",
    ),
    "falls": (
        changed("query_start_loc", 2, 2), ValueError,
        "query_start_loc: expected numbers that never fall, got 2 after 3 at position 2",
        "query_start_loc: .* of sequence 1 up to 1 query tokens .*, got 3 and then 2",
    ),
    "ends_early": (
        changed("query_start_loc", -1, 10), ValueError,
        "query_start_loc: expected num_tokens last, 11, got 10",
        "query_start_loc: .* of sequence 4 .*, got 9 and then 10",
    ),
    "more_than_tokens": (
        changed("context_lens", 3, 4), ValueError,
        "query_start_loc: expected up to 4 query tokens of sequence 3, its tokens in context_lens, got 5",
        "query_start_loc: .* of sequence 3 up to 4 query tokens .*, got 4 and then 9",
    ),
    "length": (
        changed("context_lens", 1, 10**6), ValueError,
        *["context_lens: expected a length from 0 to [0-9]+ for sequence 1, got 1000000"] * 2,
    ),
    "block": (
        changed("block_table", (4, 33), 999), IndexError,
        *[r"block_table: expected a block id in \[0, [0-9]+\), got 999 for sequence 4 at position 33"] * 2,
    ),
    "tree": (
        None, ValueError,
        *[r"tree_mask: expected shape \[39\], n \* n for each sequence of n query tokens, got \[38\]"] * 2,
    ),
}  # fmt: skip


def test_an_input_with_the_batch_in_a_later_extent(gpu, gpu_module):
    """The batch is that of sequences, of which one has a single query token beside others."""
    inputs = {"tilt": ("float32", (SPEC.num_heads, "batch", 2))}
    spec = dataclasses.replace(SPEC, score_mod=by_head_and_sequence, inputs=inputs)
    given = {"tilt": np.random.default_rng(0).standard_normal((spec.num_heads, len(SEQUENCES), 2), np.float32)}
    call = make_ragged(spec, SEQUENCES)
    attend = Attend(gpu, call)
    attend(gpu_module(spec, attend=True), inputs={"tilt": gpu.tensor(given["tilt"], writable=False)})
    call = dataclasses.replace(call, options={"inputs": given})
    assert_near_float64(spec, call, *attend.results())


@pytest.mark.parametrize("case", BAD)
def test_bad_indices(gpu, module, case):
    """Found on the device and by the host: nothing is written, and the next call works."""
    change, error, on_host, on_device = BAD[case]
    call = make_ragged(SPEC, SEQUENCES)
    if change is None:
        call = dataclasses.replace(call, options={"tree_mask": np.ones(38, bool)})
    bad = Attend(gpu, call)
    if change is not None:
        change({name: tensor.array for name, tensor in bad.arguments.items() if hasattr(tensor, "array")})
    with pytest.raises(error, match=f"^{on_host}$"):
        bad(module, check="host")
    bad(module)
    assert bad.unwritten
    with pytest.raises(error, match=f"^{on_device} in an earlier call, which wrote nothing$"):
        module.check_status()
    good = Attend(gpu, make_ragged(SPEC, SEQUENCES))
    good(module)
    assert not good.unwritten


def test_longer_queries_are_refused(gpu, module):
    call = make_ragged(SPEC, [(2, 3), (GPU_QUERY_TOKENS, 70)])
    most = Attend(gpu, call)
    most(module)
    assert_near_float64(SPEC, call, *most.results())
    more = Attend(gpu, make_ragged(SPEC, [(2, 3), (GPU_QUERY_TOKENS + 1, 70)]))
    message = (
        rf"^query_start_loc: expected .*, of sequence 1 up to {GPU_QUERY_TOKENS} query tokens "
        r"\(at most its tokens, and "
        rf"{GPU_QUERY_TOKENS} on a GPU\), got 2 and then {GPU_QUERY_TOKENS + 3}"
    )
    with pytest.raises(ValueError, match=message + "$"):
        more(module, check="host")
    more(module)
    assert more.unwritten
    with pytest.raises(ValueError, match=message):
        module.check_status()


def test_blocks_that_no_query_token_sees(gpu, gpu_module):
    """Before a window: not looked at, whoever checks."""
    spec = dataclasses.replace(SPEC, window=40)
    call = make_ragged(spec, [(4, 100), (1, 90)])
    call.inputs.block_table[0, : (97 - 40) // 16] = -7
    call.inputs.block_table[1, : (90 - 40) // 16] = 10**6
    for check in ("device", "host"):
        found = Attend(gpu, call)
        found(gpu_module(spec, attend=True), check=check)
        assert_near_float64(spec, dataclasses.replace(call, inputs=readable(call.inputs)), *found.results())
        gpu_module(spec, attend=True).check_status()


def readable(inputs):
    """Inputs whose table names a block everywhere, for the oracle."""
    table = np.where((inputs.block_table >= 0) & (inputs.block_table < len(inputs.key_cache)), inputs.block_table, 0)
    return inputs.replace(block_table=table)


def test_no_query_tokens(gpu, module):
    for sequences in ([], [(0, 5), (0, 0)]):
        for check in CHECKS:
            Attend(gpu, make_ragged(SPEC, sequences))(module, check=check)
    gpu.run()
    module.check_status()


def test_a_graph(gpu, module):
    """Captured once, run with other lengths and other numbers of query tokens."""
    call = make_ragged(SPEC, SEQUENCES)
    Attend(gpu, call)(module)
    captured = Attend(gpu, call)
    with stream(5):
        gpu.capture(5, True)
        captured(module)
        gpu.capture(5, False)
    captured.arguments["query_start_loc"].array[...] = [0, 1, 1, 4, 9, 11]
    captured.arguments["context_lens"].array[...] = [30, 1, 40, 17, 530]
    gpu.replay()
    inputs = call.inputs.replace(context_lens=captured.arguments["context_lens"].array)
    other = dataclasses.replace(call, inputs=inputs, query_start_loc=captured.arguments["query_start_loc"].array)
    assert_near_float64(SPEC, other, *captured.results())


def test_arguments(gpu, module, gpu_module):
    call = Attend(gpu, make_ragged(SPEC, SEQUENCES))
    wide = gpu.tensor(call.call.query_start_loc.astype(np.int64))
    with pytest.raises(TypeError, match=r"^query_start_loc: expected dtype int32, got int64"):
        call(module, query_start_loc=wide)
    with pytest.raises(ValueError, match=r"^query_start_loc: expected shape \[6\], got \[5\]"):
        call(module, query_start_loc=gpu.tensor(call.call.query_start_loc[:-1]))
    with pytest.raises(
        ValueError, match=r"^query_start_loc: expected an array on CUDA device 0, where query is, got one"
    ):
        call(module, query_start_loc=gpu.tensor(call.call.query_start_loc, 1))
    with pytest.raises(TypeError, match=r"^tree_mask: expected dtype bool or uint8, got int32"):
        call(module, tree_mask=gpu.tensor(np.zeros(39, np.int32)))
    with pytest.raises(ValueError, match=r"^tree_mask: expected causal=True beside it"):
        call(module, tree_mask=gpu.tensor(np.zeros(39, bool)), causal=False)
    assert call.unwritten
    with pytest.raises(NotImplementedError, match=r"^attend: expected .*, got one compiled with attend=False"):
        call(gpu_module(SPEC))
    with pytest.raises(NotImplementedError, match=r"^attend: expected .*, got one of the staged pipeline for a GPU"):
        call(gpu_module(SPEC, "staged", attend=True))
