"""The policy of tiles, by arithmetic alone: nothing is compiled here."""

from __future__ import annotations

import itertools

import pytest

from pa_compiler import PagedAttentionSpec, key_ranges
from pa_compiler.cpu import tiles as tiling
from pa_compiler.cpu.prefetch import fetching_passes
from pa_compiler.cpu.target import CpuTarget
from pa_compiler.cpu.tiles.basis import register_tile
from pa_compiler.spec import PACKED_TOKENS
from pa_compiler.tiles import divisors, largest_divisor

TARGETS = {"lanes16": "avx512f", "lanes8": "avx", "lanes4": ""}
GROUPS = (1, 3, 8, 16, 31, 64, 65)
HEAD_DIMS = (1, 7, 24, 128, 576, 8192)
every_pipeline = pytest.mark.parametrize("pipeline", ["fused", "staged"])
_ALL_TARGETS = TARGETS | {"pairs": "avx512f avx512vl avx512bf16"}
every_target = pytest.mark.parametrize(
    "cpu", [CpuTarget("{}", frozenset(f.split())) for f in _ALL_TARGETS.values()], ids=_ALL_TARGETS
)


def specs():
    """Groups, widths, types and layouts; block sizes that no tile is a multiple of among them."""
    kinds = itertools.product(GROUPS, HEAD_DIMS, ("float32", "float16", "bfloat16"), ("NHD", "packed"), (4, 16, 64))
    for group, head_dim, dtype, layout, head_tile in kinds:
        if layout == "packed" and dtype == "bfloat16" and head_dim % 2:
            continue
        for block_size in (16, 48) if layout == "packed" else (1, 5, 300):
            for value_dim in (None, 33, 512):
                yield PagedAttentionSpec(
                    2 * group,
                    2,
                    head_dim,
                    block_size,
                    dtype,
                    kv_layout=layout,
                    head_tile=head_tile,
                    value_dim=value_dim,
                )


def vectors_of_sums(tiles, cpu):
    """Registers that qk_matmul and pv_matmul sum in."""
    lanes = cpu.vector_lanes
    if tiles.strategy == "heads_in_lanes":
        return tiles.qk_tokens * tiles.row_tile // lanes, tiles.pv_dims * tiles.row_tile // lanes
    qk = tiles.qk_rows * tiles.qk_tokens
    return qk // lanes if tiles.strategy == "tokens_in_lanes" else qk, tiles.pv_rows * tiles.pv_dims // tiles.pv_lanes


@every_target
@every_pipeline
def test_the_tiles_of_every_spec(cpu, pipeline):
    """Tiles divide what they tile, sums fit in registers, and what is looked up at once is in the table."""
    for spec in specs():
        tiles = tiling.choose(spec, cpu, pipeline)
        assert tiles.row_tile <= spec.head_tile, spec
        assert 0 <= tiles.row_tile * tiles.row_tiles(spec) - spec.group < tiles.row_tiles(spec), spec
        assert tiles.row_tile % tiles.qk_rows == tiles.row_tile % tiles.pv_rows == 0, spec
        assert tiles.token_group % tiles.qk_tokens == spec.result_dim % tiles.pv_dims == 0, spec
        assert spec.head_dim % (tiles.qk_lanes * tiles.keys.halves) == 0, spec
        assert spec.result_dim % (tiles.pv_lanes * tiles.values.halves) == 0, spec
        if tiles.strategy != "heads_in_lanes":
            assert tiles.pv_dims % (tiles.pv_lanes * tiles.values.halves) == 0, spec
        sums = cpu.vector_registers // 2 if tiles.strategy == "heads_in_lanes" else cpu.vector_sums
        assert max(vectors_of_sums(tiles, cpu)) <= sums, (spec, tiles)
        assert 0 <= tiles.padded_kv_tile - tiles.kv_tile < tiles.token_group, spec
        assert tiles.keys.terms == tiles.values.terms, spec
        if tiles.keys.terms == 2:
            assert (spec.dtype, spec.head_dim % 8, spec.result_dim % 8, pipeline) == ("bfloat16", 0, 0, "fused"), spec
            assert tiles.token_group % 2 == tiles.kv_tile % 2 == 0, spec
        assert tiles.kv_tile == (spec.block_size if pipeline == "staged" else tiles.padded_kv_tile), spec
        assert tiles.num_offsets == (tiles.kv_tile if tiles.prefetches else 0) + tiles.padded_kv_tile, spec
        assert tiles.kv_tile % tiles.streams == 0, spec
        if spec.kv_layout == "packed":  # a tile begins where tokens that lie side by side begin
            assert tiles.token_group % PACKED_TOKENS == tiles.kv_tile % PACKED_TOKENS == 0, spec
        assert tiles.split_blocks == 1 or tiles.split_blocks * spec.block_size <= key_ranges.SPLIT_TOKENS, spec


@pytest.mark.parametrize("features", ["avx", "avx512f", "avx512f avx512vl avx512bf16", "neon", "neon bf16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiles_of_many_rows(features, dtype):
    """Groups of tokens are of whole products, of which pairs are two, and their sums fit in registers."""
    cpu = CpuTarget("{}", frozenset(features.split()))
    for rows in range(1, 520):
        tiles = tiling.choose(PagedAttentionSpec(rows, 1, 64, 16, dtype, head_tile=1024), cpu, "fused")
        assert tiles.token_group >= 1, rows
        assert tiles.token_group % tiles.values.terms == 0, rows
        assert max(vectors_of_sums(tiles, cpu)) <= max(cpu.vector_sums, cpu.vector_registers // 2), rows


@pytest.mark.parametrize("features", ["avx", "avx512f", "avx512f avx512vl avx512bf16", "neon", "neon bf16"])
@pytest.mark.parametrize(("dtype", "kv_layout"), [("float32", "NHD"), ("bfloat16", "HND"), ("float32", "packed")])
def test_a_tile_of_attend_has_several_groups_of_tokens(features, dtype, kv_layout):
    """Of one group of few tokens schedules would not find the loop over groups: so head_dim 2048 was not compiled."""
    cpu = CpuTarget("{}", frozenset(features.split()))
    for head_dim in range(8, 8193, 56):
        tiles = tiling.choose_attend(PagedAttentionSpec(2, 1, head_dim, 16, dtype, kv_layout=kv_layout), cpu)
        assert tiles.kv_tile >= 2 * tiles.token_group or tiles.strategy == "tokens_in_lanes", head_dim


@pytest.mark.parametrize(
    ("group", "layout", "pipeline", "strategies"),
    [  # with 16, 8 and 4 lanes
        (1, "NHD", "fused", ("head_dim_in_lanes",) * 3),
        (8, "NHD", "fused", ("head_dim_in_lanes",) * 3),
        (16, "NHD", "fused", ("head_dim_in_lanes", "heads_in_lanes", "heads_in_lanes")),  # one vector of 16
        (24, "HND", "fused", ("head_dim_in_lanes",) * 3),  # two tiles of 12
        # two tiles of 16, the second with a row of padding
        (31, "HND", "fused", ("head_dim_in_lanes", "heads_in_lanes", "heads_in_lanes")),
        (16, "NHD", "staged", ("head_dim_in_lanes",) * 3),
        (1, "packed", "fused", ("tokens_in_lanes",) * 3),
        (16, "packed", "staged", ("tokens_in_lanes",) * 3),
    ],
)
def test_the_strategy(group, layout, pipeline, strategies):
    spec = PagedAttentionSpec(group, 1, 128, 16, "float32", kv_layout=layout)
    for features, strategy in zip(TARGETS.values(), strategies, strict=True):
        cpu = CpuTarget("{}", frozenset(features.split()))
        assert tiling.choose(spec, cpu, pipeline).strategy == strategy


@pytest.mark.parametrize(("dtype", "head_dim"), [("bfloat16", 128), ("bfloat16", 127), ("float16", 128)])
@pytest.mark.parametrize(("layout", "pipeline"), [("NHD", "fused"), ("NHD", "staged"), ("packed", "staged")])
def test_only_pairs_of_bfloat16_are_read_as_words(dtype, head_dim, layout, pipeline):
    if layout == "packed":
        head_dim -= head_dim % 2
    spec = PagedAttentionSpec(8, 2, head_dim, 16, dtype, kv_layout=layout)
    tiles = tiling.choose(spec, CpuTarget("{}", frozenset({"avx"})), pipeline)
    as_words = dtype == "bfloat16" and head_dim % 2 == 0 and (layout, pipeline) != ("NHD", "staged")
    for element in (tiles.keys, tiles.values):
        assert element.word == (2 if as_words else 1)
        assert element.halves == (2 if as_words and layout == "NHD" else 1)


@every_target
@pytest.mark.parametrize("held", [1, 2])
@pytest.mark.parametrize("load_cost", [2, 3])
def test_a_register_tile_has_the_fewest_loads(cpu, load_cost, held):
    """Against every other tile that fits; and where none does, one row of the smallest."""

    def fits(r, c):
        registers = r * c + (held * c if r > 1 else 0)
        return r * c <= cpu.vector_sums and registers <= cpu.vector_registers

    for rows, columns in itertools.product(
        (*range(1, 17), 31, 48, 64), ([1], [1, 2, 4], [2, 4, 8, 16], [1, 3, 9], [1, 2, 4, 8, 16])
    ):
        row_count, column_count = register_tile(rows, columns, cpu, load_cost, held)
        assert rows % row_count == 0
        assert column_count in columns
        assert fits(row_count, column_count)
        for r, c in itertools.product(range(1, rows + 1), columns):
            if rows % r == 0 and fits(r, c):
                assert 1 / column_count + load_cost / row_count <= 1 / c + load_cost / r + 1e-12
    assert register_tile(4, [64], cpu, load_cost, held) == (1, 64)


@pytest.mark.parametrize(
    ("passes", "group", "lines", "fetching"),
    [
        (8, 8, 4, 8),  # a token in each pass
        (4, 8, 2, 4),  # two tokens
        (5, 8, 3, 4),  # two tokens, and the last pass fetches nothing
        (12, 8, 6, 8),
        (16, 8, 8, 16),  # half a token
        (32, 4, 4, 16),  # a line, in every other pass
        (1, 8, 1, 1),
    ],
)
def test_the_passes_that_fetch_values(passes, group, lines, fetching):
    """Each of them fetches whole tokens or an equal part of one, and all of them everything."""
    assert fetching_passes(passes, group, lines) == fetching
    assert group * lines % fetching == 0
    each = group * lines // fetching
    assert each % lines == 0 or lines % each == 0


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert [largest_divisor(12, limit) for limit in (1, 5, 11, 99)] == [1, 4, 6, 12]
