"""Small faults, one at a time, that the tests must notice: what a slip of the pen, or an old bug of others, looks like.

A fault is a text that occurs once in a file, what it becomes, and the tests that are to fail then. It is one table, and
so has more than 300 lines.
"""

from __future__ import annotations

from seeded_bug import Fault
from seeded_gpu_bugs import GPU_FAULTS
from seeded_tile_bugs import TILE_FAULTS

_DECODE = (
    "test_decode.py::test_every_length_to_three_blocks test_decode.py::test_lengths_around_the_tiles "
    "test_poison.py test_ends.py test_decode.py test_invariance.py"
)
_KERNELS = "pa_compiler/kernels/"
_CODES = "test_codes.py::test_decode_is_close_to_the_reference"
_SCORES = "test_scores.py"
_MASKS = "test_mask_bounds.py"

FAULTS = {
    "a key's scale is another token's": Fault(
        f"{_KERNELS}scales.py", 'head + T.Cast("int64", (t - first) * numbers)', "head", _CODES
    ),
    "a zero point is the scale beside it": Fault(
        f"{_KERNELS}scales.py", "at + T.int64(nth) if nth else at", "at", "test_codes.py::test_every_byte_of_two_codes"
    ),
    "nibbles are the other way round": Fault(
        f"{_KERNELS}elements.py",
        "T.floormod(index, 2) == 0, T.bitwise_and(wide, 15)",
        "T.floormod(index, 2) == 1, T.bitwise_and(wide, 15)",
        "test_codes.py::test_every_byte_of_two_codes",
    ),
    "out is not rotated back": Fault(
        f"{_KERNELS}rotation.py",
        "    if not spec.rotates:\n        return element",
        "    if True:\n        return element",
        _CODES,
    ),
    "codes of int8 are rounded down": Fault(
        f"{_KERNELS}quantise_rows.py",
        '"int32", held + T.float32(_WHOLE))',
        '"int32", held - T.float32(0.5) + T.float32(_WHOLE))',
        "test_code_appends.py",
    ),
    "a NaN of float8 is a number": Fault(
        f"{_KERNELS}elements.py",
        "T.bitwise_or(bits, nan)",
        "bits",
        "test_codes.py::test_a_code_of_nan_in_a_key_is_nan",
    ),
    "tail mask one too long": Fault(f"{_KERNELS}tokens.py", "lane < self.valid_len", "lane <= self.valid_len", _DECODE),
    "tail mask dropped": Fault(
        f"{_KERNELS}scores.py", "Value(tile.holds(group, lane), ())", "Value(lane < 1 << 20, ())", _DECODE
    ),
    "maximum starts at 0": Fault(
        f"{_KERNELS}softmax.py", ' peak[vr] = T.min_value("float32")', " peak[vr] = T.float32(0)", _DECODE
    ),
    "the maximum of keys that all rows see is lost": Fault(
        f"{_KERNELS}softmax.py", "T.max(full_peak[vr], peak[vr])", "peak[vr]", "test_attend_kernels.py"
    ),
    "all rows see what one of them sees": Fault(
        f"{_KERNELS}attend_rows.py", "sight.reach(LEAST_LIMIT)", "sight.reach(LIMIT)", "test_attend_kernels.py"
    ),
    "an empty tile has a maximum": Fault(
        f"{_KERNELS}softmax.py",
        "T.Select(0 < tile.valid_len, most",
        "T.Select(0 <= tile.valid_len, most",
        "test_kernels.py test_decode.py",
    ),
    "exp loses the low part of ln 2": Fault(
        f"{_KERNELS}exp.py", "LN2_LOW = -2.12194440e-4", "LN2_LOW = 0.0", "test_kernels.py"
    ),
    "exp wraps around far below 0": Fault(
        f"{_KERNELS}exp.py", "valid, T.Select(arg < smallest", "valid, T.Select(arg < 100 * smallest", _DECODE
    ),
    "too little room for sums of values": Fault(
        f"{_KERNELS}headroom.py", "- (_BIAS - 2), 0)", "- (_BIAS + 1), 0)", "test_ends.py"
    ),
    "queries without their part of the scale": Fault(
        f"{_KERNELS}headroom.py", "element * query_scale if", "element if", "test_ends.py test_decode.py"
    ),
    "offsets in 32 bits": Fault(
        f"{_KERNELS}tokens.py",
        "offsets[vt] = block * cache.block + access",
        'offsets[vt] = T.Cast("int64", T.Cast("int32", block * cache.block)) + access',
        "test_invariance.py::test_cache_of_more_than_2_to_the_31_elements",
    ),
    "offsets past the last token": Fault(
        f"{_KERNELS}tokens.py", "position = T.min(position, last_token)", "pass", _DECODE
    ),
    "a tile that is not whole read in turn": Fault(
        f"{_KERNELS}tokens.py",
        "T.Select(self.valid_len == size, in_turn",
        "T.Select(self.valid_len >= size - 8, in_turn",
        _DECODE,
    ),
    "values past the last token multiplied": Fault(
        f"{_KERNELS}tokens.py",
        "return T.floordiv(self.valid_len, self.tiling.token_group)",
        "return T.ceildiv(self.valid_len, self.tiling.token_group)",
        _DECODE,
    ),
    "a sweep forgets which kv head a tile reads": Fault(
        f"{_KERNELS}qk_matmul.py",
        'T.Cast("int64", T.floordiv(vi, group_tiles))',
        'T.Cast("int64", vi)',
        "test_decode.py::test_spec[2_tiles_of_a_group_swept]",
    ),
    "an empty tile lowers the maximum": Fault(
        f"{_KERNELS}state.py",
        "T.Select(tile_sum[tile_slot, vr] == T.float32(0), old_max, both)",
        "both",
        _DECODE,
    ),
    "an empty beginning has a maximum": Fault(
        f"{_KERNELS}state.py",
        "T.Select(old_sum == T.float32(0), tile_max[tile_slot, vr], old_or_both)",
        "old_or_both",
        _DECODE,
    ),
    "division by an empty sum": Fault(
        f"{_KERNELS}state.py",
        "T.Select(total == T.float32(0), T.float32(0), T.float32(1) / total)",
        "T.float32(1) / total",
        _DECODE,
    ),
    "lse in base 2": Fault(f"{_KERNELS}state.py", "T.log(lifted", "T.log2(lifted", _DECODE),
    "a window one key too short": Fault(
        "pa_compiler/bounds/__init__.py", "constant(-spec.window)", "constant(1 - spec.window)", _SCORES
    ),
    "bounds of the key before the query's": Fault(
        "pa_compiler/bounds/conditions.py", "add(query_end, constant(-1))", "add(query_end, constant(-2))", _MASKS
    ),
    "less taken for less or equal": Fault(
        "pa_compiler/bounds/conditions.py", 'constant(0 if op == "less" else 1)', "constant(1)", _MASKS
    ),
    "quotients rounded up": Fault(
        "pa_compiler/bounds/conditions.py",
        "floor_divide(add(each, constant(divisor - 1)), divisor)",
        "floor_divide(add(each, constant(divisor)), divisor)",
        _MASKS,
    ),
    "the last of two intervals alone is read": Fault(
        f"{_KERNELS}rows.py", "functools.reduce(T.min, (", "functools.reduce(T.max, (", _MASKS
    ),
    "blocks between intervals looked up": Fault(
        f"{_KERNELS}rows.py", "if len(ends) == 1:\n        return None", "if ends:\n        return None", _MASKS
    ),
    "a window's blocks begin too late": Fault(
        "templates/shared/window.h",
        "context_len - Spec::kWindow, 0)",
        "context_len - Spec::kWindow + Spec::kBlockSize, 0)",
        _SCORES,
    ),
    "the slope of another head": Fault(
        f"{_KERNELS}scores.py", "scoring.slopes[scoring.rows.at(row)[1]]", "scoring.slopes[row]", _SCORES
    ),
    "distances by columns and not by positions": Fault(
        f"{_KERNELS}scores.py",
        "tile.position(column) - query_pos",
        "tile.start + column - query_pos",
        _SCORES,
    ),
    "distances from the key after the query": Fault(
        f"{_KERNELS}scores.py",
        "tile.position(column) - query_pos",
        "tile.position(column) - query_pos - 1",
        _SCORES,
    ),
    "a soft cap that saturates early": Fault(f"{_KERNELS}functions.py", "_TANH_END = 9.0", "_TANH_END = 4.0", _SCORES),
    "a sink beside sums that are not rescaled": Fault(
        f"{_KERNELS}sinks.py",
        "kept[vr] * state.row_sum[slot, vr] + weight[vr]",
        "state.row_sum[slot, vr] + weight[vr]",
        _SCORES,
    ),
    "the sink of another head": Fault(f"{_KERNELS}sinks.py", "sinks[rows.at(vr)[1]]", "sinks[vr]", _SCORES),
    "a sink without the sequence's headroom": Fault(
        f"{_KERNELS}sinks.py", 'sink != T.float32("-inf"), of_row(headroom, vr))', 'sink != T.float32("-inf"))', _SCORES
    ),
    "values before a window multiplied by 0": Fault(
        f"{_KERNELS}pv_matmul.py", "T.Select(tile.sees(t), value, T.float32(0))", "value", _SCORES
    ),
    "the first key of a packed window masked": Fault(
        f"{_KERNELS}tokens.py",
        "lane >= self.first_seen - self.start - before",
        "lane > self.first_seen - self.start - before",
        _SCORES,
    ),
    "append_kv skips slot 0": Fault(
        f"{_KERNELS}append_kv.py", "if target >= T.int64(0):", "if target > T.int64(0):", "test_append.py"
    ),
    "append_kv forgets the first head": Fault(
        f"{_KERNELS}append_kv.py",
        "T.truncmod(target, block_size), head_begin + vh, vd",
        "T.truncmod(target, block_size), vh, vd",
        "test_append.py",
    ),
    "staged results of another sequence": Fault(
        f"{_KERNELS}chunk.py", '_bound("seq", batch_start + nth)', '_bound("seq", batch_start)', _DECODE
    ),
    "sums across lanes of the wrong elements": Fault(
        "schedules/intrinsics/sum_lanes.py",
        "for side in (0, lanes) for i in (2, 3)]",
        "for side in (0, lanes) for i in (0, 1)]",
        _DECODE,
    ),
    "pairs interleaved in the wrong order": Fault(
        "schedules/intrinsics/transpose.py",
        "+ width // 2 for lane in low]",
        "+ width // 2 for lane in sorted(low)]",
        _DECODE,
    ),
    "the last tile of a group dropped": Fault(
        "pa_compiler/tiles.py",
        "return -(-spec.group // self.row_tile)",
        "return spec.group // self.row_tile",
        "test_tiling.py",
    ),
    "block id num_blocks accepted": Fault(
        "templates/shared/block_table.h", "row[i] >= num_blocks", "row[i] > num_blocks", "test_errors.py test_bounds.py"
    ),
    "negative block ids accepted": Fault(
        "templates/shared/block_table.h", "row[i] < 0 || row[i]", "row[i]", "test_errors.py test_bounds.py"
    ),
    "the last block of a sequence unchecked": Fault(
        "templates/shared/block_table.h",
        "for (int64_t i = used.begin; i < used.end; ++i)",
        "for (int64_t i = used.begin; i < used.end - 1; ++i)",
        "test_errors.py test_bounds.py",
    ),
    "a length over capacity accepted": Fault(
        "templates/shared/block_table.h",
        "kMaxContextLen) * block_size,",
        "kMaxContextLen) * block_size + 1,",
        "test_errors.py test_bounds.py",
    ),
    "negative lengths accepted": Fault(
        "templates/shared/indices.h", "context_len < 0 || context_len", "context_len", "test_errors.py test_bounds.py"
    ),
    "out over an input accepted": Fault(
        "templates/shared/decode_checks.h",
        'CheckNoOverlap("out", args.out, input.name',
        'if (false) CheckNoOverlap("out", args.out, input.name',
        "test_errors.py",
    ),
    "sinks over out accepted": Fault(
        "templates/shared/decode_checks.h",
        "CheckNotWritten(args, {of.name, &heads});",
        "",
        "test_headers.py test_score_arguments.py",
    ),
    "slopes in the place of sinks": Fault(
        "templates/cpu/calls.j2", '"sinks": "args.sinks"', '"sinks": "args.alibi_slopes"', "test_headers.py"
    ),
    "a window of a key more": Fault(
        "templates/shared/window.h",
        "context_len - Spec::kWindow, 0",
        "context_len - Spec::kWindow - 1, 0",
        "test_headers.py test_plan.py",
    ),
    "block ids before a window checked": Fault(
        "templates/shared/block_table.h",
        "int64_t i = used.begin; i < used.end",
        "int64_t i = 0; i < used.end",
        "test_headers.py test_score_arguments.py",
    ),
    "the last window of an item's sequences begins it": Fault(
        "templates/cpu/plan.h",
        "std::min(open->block_begin, begin) : begin",
        "std::max(open->block_begin, begin) : begin",
        "test_headers.py test_plan.py",
    ),
    "the first step of a window taken for a later one": Fault(
        "templates/cpu/staged.j2",
        'update_values = dict(staged_values, block_idx="step")',
        "update_values = dict(staged_values)",
        "test_score_arguments.py",
    ),
    "rows and heads of a cache exchanged": Fault(
        "templates/shared/spec.j2", "kRowAxis = {{ 1 if", "kRowAxis = {{ 2 if", _DECODE
    ),
    "slot num_slots accepted": Fault(
        "templates/shared/indices.h",
        "slot >= num_slots",
        "slot > num_slots",
        "test_append_errors.py",
    ),
    "a slot of both caches accepted": Fault(
        "templates/shared/append_checks.h", "*met < first + sharing.unit", "*met < first", "test_append_shared.py"
    ),
    "rows in one buffer taken for longer than they are": Fault(
        "templates/shared/overlap.h",
        "sums.Meet(apart - row_bytes[0] + 1,",
        "sums.Meet(apart - row_bytes[0],",
        "test_overlap.py",
    ),
    "int64 block ids of another sequence": Fault(
        "templates/shared/block_table.h",
        "seq * table.entries.shape[1]",
        "0 * table.entries.shape[1]",
        "test_conventions.py",
    ),
    "memory not known to be writable written": Fault(
        "pa_compiler/runtime/dlpack.py", "if managed.flags & _READ_ONLY:", "if False:", "test_writable.py"
    ),
    "partial results merged after the first": Fault(
        "templates/cpu/partials.h",
        "--missing_.data()[merge] == 0",
        "--missing_.data()[merge] >= 0",
        "test_headers.py test_decode.py::test_lengths_around_the_splits",
    ),
    "all ranges write one partial result": Fault(
        "templates/cpu/plan.h", "-1 : num_partials + i, tokens", "-1 : num_partials, tokens", _DECODE
    ),
    "a sequence cut a block too early": Fault(
        "templates/cpu/plan.h",
        "splits = (blocks - 1) / Spec::kSplitBlocks + 1",
        "splits = blocks / Spec::kSplitBlocks + 1",
        "test_plan.py::test_sequences_are_cut_into_the_fewest_equal_ranges",
    ),
    "the last range of a sequence dropped": Fault(
        "templates/cpu/plan.h",
        "run_ranges[run] = (blocks - 1) / steps[run] + 1",
        "run_ranges[run] = blocks / steps[run]",
        "test_decode.py::test_lengths_around_the_splits",
    ),
    "all ranges of several query tokens write one partial result": Fault(
        "templates/cpu/attend_plan.h",
        "leaves_partials ? num_partials + range * item.num_query : -1",
        "leaves_partials ? num_partials : -1",
        "test_attend.py::test_threads",
    ),
    "query tokens of another sequence": Fault(
        "templates/cpu/attend.h",
        "MovedBy(*array, queries.Begin(seq) - seq)",
        "MovedBy(*array, 0)",
        "test_attend.py::test_single_query_tokens_between_others_are_decode",
    ),
    "keys after a prefix taken for its last one": Fault(
        f"{_KERNELS}sight.py", "position + 1), context_len)", "position + 1), 1 << 30)", "test_shared_prefix.py"
    ),
    "as many sequences as query tokens": Fault(
        "templates/cpu/attend.h", "array->shape[0] = args.batch;", "", "test_attend.py"
    ),
    "query tokens of the staged pipeline all at one position": Fault(
        f"{_KERNELS}chunk.py", "self.first_pos + nth + 1", "self.first_pos + 1", "test_attend_staged.py"
    ),
    "blocks between what a mask leaves looked up": Fault(
        f"{_KERNELS}tokens.py", "T.Select(is_seen, block, ", "T.Select(0 <= block, block, ", "test_attend_masks.py"
    ),
    "sums in lanes": Fault(
        "schedules/cpu/head_dim_in_lanes.py",
        "2, tiling.weight_sums // (tiling.values.terms if tiling.pairs_weights else 1))",
        "2, 0)",
        "test_invariant.py",
    ),
    "work items across chunks": Fault("templates/cpu/plan.h", "seq % Spec::kBatchChunk != 0 && ", "", "test_plan.py"),
    "attend missing from the cache key": Fault(
        "pa_compiler/dependencies.py",
        "**extras._asdict()",
        "**extras._replace(attend=False)._asdict()",
        "test_attend.py::test_not_every_module_has_it",
    ),
    "the pipeline missing from the cache key": Fault(
        "pa_compiler/dependencies.py", '        "pipeline": pipeline,\n', "", "test_cache.py test_cache_entries.py"
    ),
    "no lock around a build": Fault(
        "pa_compiler/store.py",
        'with filelock.FileLock(entry.with_name(f"{name}.lock")):',
        "if True:",
        "test_cache_entries.py",
    ),
    "digests of cache entries not compared": Fault(
        "pa_compiler/store.py",
        "digests == _digests(files)",
        "digests.keys() == files.keys()",
        "test_cache.py test_cache_entries.py",
    ),
    "a link for a cache entry followed": Fault(
        "pa_compiler/store.py", "if entry.is_symlink():", "if False:", "test_cache_entries.py"
    ),
    "names unchecked on their way into C++": Fault(
        "pa_compiler/host.py", "if not re.fullmatch(", "if not re.match(", "test_generated_code.py"
    ),
    "rows of keys stepped over as heads": Fault(
        "templates/cpu/calls.j2", '"args.key_cache.row_stride"', '"args.key_cache.head_stride"', "test_headers.py"
    ),
    "a cache directory open to the group accepted": Fault(
        "pa_compiler/store.py",
        "status.st_mode & 0o077",
        "status.st_mode & 0o007",
        "test_cache.py test_cache_entries.py",
    ),
    "tokens and elements of packed values exchanged": Fault(
        "pa_compiler/layout.py", "slots, dims, p).swapaxes(3, 4)", "slots, p, dims)", "test_layout.py"
    ),
    "checksum of a library not compared": Fault(
        "pa_compiler/runtime/manifest.py",
        "if found != expected:",
        "if len(found) != len(expected):",
        "test_manifest.py",
    ),
    "a line of assembly linked to the sblock behind its own": Fault(
        "pa_compiler/cpu/places.py", "place = int(line.split()[2]) - 1", "place = int(line.split()[2])", "test_links.py"
    ),
    "a line of LLVM's text linked to the one before": Fault(
        "pa_compiler/cpu/places.py",
        "lines = {number: int(line) - 1",
        "lines = {number: int(line) - 2",
        "test_links.py",
    ),
    "a let value of no sblock": Fault(
        "pa_compiler/locations.py",
        "if isinstance(seq[at], tirx.Bind) and later:",
        "if False:",
        "test_links.py",
    ),
    "a work item for the busiest thread": Fault(
        "pa_compiler/report/schedule.py", "heapq.heappop(free)", "free.pop()", "test_report.py"
    ),
    **TILE_FAULTS,
    **GPU_FAULTS,
}
"""By what goes wrong."""
