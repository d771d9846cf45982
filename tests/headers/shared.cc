// Tests of shared/*.h.

#include "expect.h"
#include "shared/append_checks.h"
#include "shared/arrays.h"
#include "shared/block_table.h"
#include "shared/decode_checks.h"
#include "shared/errors.h"
#include "shared/indices.h"
#include "shared/overlap.h"
#include "shared/window.h"

using namespace pa;

namespace {

using Narrow = SpecOf<3, false>;
using Windowed = SpecOf<3, false, 5>;

Array Checked(const Made& made) {
  const Parameter only{0, "it"};
  const TVMFFIAny any = Any(made.tensor);
  const Inputs in(&any, 1, 1);
  Extents extents = {};
  for (int64_t extent : made.shape) extents.values[extents.count++] = extent;
  return ArgumentCheck<Narrow>{in, 0}(only, made.tensor.dtype, extents);
}

void TestTexts() {
  Text text;
  for (int i = 0; i < 100; ++i) text.Add("%d,", i);
  EXPECT(std::strlen(text.c_str()) == 159);  // cut, and ended
  const int64_t shape[] = {-1, 4, 16};
  EXPECT(std::string(ListText(shape, 3, "batch").c_str()) == "[batch, 4, 16]");
  EXPECT(std::string(ListText(shape, 0).c_str()) == "[]");
  EXPECT(std::string(DTypeText(kBfloat16).c_str()) == "bfloat16");
  EXPECT(std::string(DTypeText({kDLFloat, 32, 4}).c_str()) == "float32x4");
  EXPECT(std::string(DTypeText({200, 8, 1}).c_str()) == "an unknown type of 8 bits (DLPack code 200)");
  const std::string words(600, 'x');
  EXPECT(Raised([&] { Raise("ValueError", "%s", words.c_str()); }).size() == std::strlen("ValueError: ") + 511);
}

void TestInputs() {
  const Parameter first{0, "first"}, second{1, "second"};
  const TVMFFIAny given[] = {Any(7), None()};
  EXPECT_RAISES("TypeError: expected 3 arguments, got 2", Inputs(given, 2, 3));
  const Inputs in(given, 2, 2);
  EXPECT(in.Int(first) == 7 && in.Float(first) == 7.0 && in.IsNone(second) && !in.IsNone(first));
  EXPECT_RAISES("TypeError: first: expected an array, got tvm-ffi type index 1", in.Tensor(first));
  EXPECT_RAISES("TypeError: second: expected an integer of 64 bits, got tvm-ffi type index 0", in.Int(second));
}

void TestArrays() {
  const Made rows(kFloat32, {2, 3, 4}), every_other(kFloat32, {2, 3}, {6, 2});
  const Array array = Checked(rows);
  EXPECT(array.strides[0] == 12 && array.strides[1] == 4 && array.strides[2] == 1 && array.tensor.shape == array.shape);
  const Array copy = array;
  EXPECT(copy.tensor.shape == copy.shape && copy.tensor.strides == copy.strides);
  EXPECT_RAISES("ValueError: it: expected a contiguous last axis (stride 1), got stride 2", Checked(every_other));
  DLTensor moved = rows.tensor;
  moved.byte_offset = 2;
  EXPECT_RAISES(
      "ValueError: x: expected data aligned to its elements of 4 bytes, got an address 2 past a multiple of 4",
      CheckArray("x", moved, kFloat32, kFloat32, {2, -1, 4}, kCpu, "any"));
  EXPECT_RAISES("ValueError: x: expected shape [any, 4], got [2, 3, 4]",
                CheckArray("x", rows.tensor, kFloat32, kFloat32, {-1, 4}, kCpu, "any"));
  EXPECT_RAISES("ValueError: x: expected an array in CUDA memory (device type 2), got device type 1",
                CheckArray("x", rows.tensor, kFloat32, kFloat32, {2, 3, 4}, kCuda));
  EXPECT_RAISES("TypeError: x: expected dtype int32, got float32",
                CheckArray("x", rows.tensor, kFloat32, kInt32, {2, 3, 4}, kCpu));
}

void TestOverlaps() {
  float buffer[64] = {};
  Array whole(buffer, {8, 8}), left = whole, right = whole;
  left.shape[1] = right.shape[1] = 4;
  right.tensor.data = buffer + 4;
  EXPECT(Overlap(whole, left) && Overlap(whole, right) && !Overlap(left, right) && !Overlap(right, left));
  left.shape[1] = 5;
  EXPECT(Overlap(left, right));
  EXPECT_RAISES("ValueError: a: expected memory apart from b's bytes [16, 256), got bytes [0, 244)",
                CheckNoOverlap("a", left, "b", right));
  left.strides[0] = 4;
  EXPECT_RAISES("ValueError: a: expected elements that do not overlap, got shape [8, 5] with strides [4, 1]",
                CheckDistinctElements("a", left));
  left.strides[0] = 5;
  CheckDistinctElements("a", left);
  right.shape[0] = 0;
  EXPECT(!Overlap(whole, right));
}

BlockTable Rows(const Made& table) { return {Checked(table), NoRowStarts(), false}; }

void TestIndices() {
  Made table(kInt64, {2, 3}), lens(kInt64, {2}), slots(kInt32, {3});
  const BlockTable rows = Rows(table);
  const Array lens_array = Checked(lens), slots_array = Checked(slots);
  int64_t *blocks = table.data<int64_t>(), *lengths = lens.data<int64_t>();
  lengths[0] = 5, lengths[1] = 12;
  for (int i = 0; i < 6; ++i) blocks[i] = i;
  blocks[2] = int64_t{1} << 40;  // not used: the first sequence has two blocks
  int32_t lens_to[2] = {}, table_to[6] = {};
  CheckIndices<Narrow>(rows, lens_array, 6, lens_to, {table_to});
  EXPECT(lens_to[0] == 5 && lens_to[1] == 12 && table_to[0] == 0 && table_to[2] == 0 && table_to[5] == 5);
  blocks[4] = 6;
  EXPECT_RAISES("IndexError: block_table: expected a block id in [0, 6), got 6 for sequence 1 at position 1",
                CheckIndices<Narrow>(rows, lens_array, 6, lens_to, {table_to}));
  lengths[0] = 13;
  EXPECT_RAISES("ValueError: context_lens: expected a length from 0 to 12 for sequence 0, got 13",
                CheckIndices<Narrow>(rows, lens_array, 6, lens_to, {table_to}));
  slots.data<int32_t>()[1] = -1, slots.data<int32_t>()[2] = 8;
  int64_t slots_to[3] = {};
  CheckSlots(slots_array, 9, slots_to);
  EXPECT(slots_to[0] == 0 && slots_to[1] == -1 && slots_to[2] == 8);
  EXPECT_RAISES("IndexError: slot_mapping: expected -1 or a slot in [0, 8), got 8 for token 2",
                CheckSlots(slots_array, 8));
}

void TestSeen() {
  EXPECT(Seen<Narrow>(100).keys.begin == 0 && Seen<Narrow>(100).keys.end == 100 && Seen<Narrow>(0).count == 0);
  const auto first_key = [](int64_t len) { return Seen<Windowed>(len).keys.begin; };
  EXPECT(first_key(0) == 0 && first_key(5) == 0 && first_key(6) == 1);
  const auto first_block = [](int64_t len) { return Seen<Windowed>(len).blocks[0].begin; };
  EXPECT(first_block(8) == 0 && first_block(9) == 1 && first_block(13) == 2);
  using One = SpecOf<3, false, 1>;
  EXPECT(Seen<One>(1).blocks[0].begin == 0 && Seen<One>(4).blocks[0].begin == 0 && Seen<One>(5).blocks[0].begin == 1);
  EXPECT(FloorDivide(7, 4) == 1 && FloorDivide(-1, 4) == -1 && FloorDivide(-4, 4) == -1 && FloorDivide(-5, 4) == -2);
}

// Unions of intervals: apart, in either order, meeting in a block, in neighbouring blocks, empty, beyond the length.
void TestSeenUnions() {
  const Seen<Union> apart(100);  // [96, 100), [0, 3), [40, 45), in blocks [24, 25), [0, 1), [10, 12)
  EXPECT(apart.count == 3 && apart.keys.begin == 0 && apart.keys.end == 100);
  const Interval blocks[] = {{0, 1}, {10, 12}, {24, 25}};
  EXPECT(std::memcmp(apart.blocks, blocks, sizeof blocks) == 0);
  const Seen<Union> met(51);  // [47, 51), in blocks [11, 13)
  EXPECT(met.count == 2 && met.blocks[1].begin == 10 && met.blocks[1].end == 13);
  const Seen<Union> one(10);  // [6, 10) in [1, 3), beside [0, 1)
  EXPECT(one.count == 1 && one.blocks[0].begin == 0 && one.blocks[0].end == 3 && one.keys.end == 10);
  EXPECT(Seen<Union>(2).keys.end == 2 && Seen<Union>(2).count == 1 && Seen<Union>(0).count == 0);
  const Seen<Union> cut(42);  // [38, 42) and [40, 42)
  EXPECT(cut.count == 2 && cut.blocks[1].begin == 9 && cut.blocks[1].end == 11 && cut.keys.end == 42);
  EXPECT(Seen<NoKeys>(1000).count == 0);
}

// The ids between the blocks that are seen may be anything, in a table and in a pair.
void TestIndicesOfAUnion() {
  Made table(kInt32, {1, 25}), lens(kInt32, {1});
  lens.data<int32_t>()[0] = 100;
  for (int i = 0; i < 25; ++i) table.data<int32_t>()[i] = -7;
  for (const int i : {0, 10, 11, 24}) table.data<int32_t>()[i] = 3;
  Made starts(kInt32, {2});
  starts.data<int32_t>()[0] = 0, starts.data<int32_t>()[1] = 25;
  for (const BlockTable& each : {Rows(table), BlockTable{Checked(table), Checked(starts), true}}) {
    CheckIndices<Union>(each, Checked(lens), 4);
    for (const int i : {0, 10, 11, 24}) {
      table.data<int32_t>()[i] = 4;
      EXPECT_RAISES("IndexError: block_table: expected a block id in [0, 4), got 4 for sequence 0 at position " +
                        std::to_string(i),
                    CheckIndices<Union>(each, Checked(lens), 4));
      table.data<int32_t>()[i] = 3;
    }
  }
}

// Rows of 2, 0 and 1 blocks one after another.
void TestIndicesOfAPair() {
  Made starts(kInt64, {4}), indices(kInt64, {5}), lens(kInt32, {3});
  const int64_t from[] = {0, 2, 2, 3}, ids[] = {4, 5, 3, 99, -1};
  std::copy_n(from, 4, starts.data<int64_t>());
  std::copy_n(ids, 5, indices.data<int64_t>());
  lens.data<int32_t>()[0] = 7, lens.data<int32_t>()[2] = 4;
  Array entries = Checked(indices);
  entries.tensor.ndim = 2, entries.shape[0] = 1, entries.shape[1] = 5, entries.strides[0] = 0, entries.strides[1] = 1;
  const BlockTable pair{entries, Checked(starts), true};
  int32_t starts_to[4] = {}, table_to[5] = {};
  CheckIndices<Narrow>(pair, Checked(lens), 6, nullptr, {table_to, starts_to});
  EXPECT(starts_to[1] == 2 && starts_to[3] == 3 && table_to[1] == 5 && table_to[2] == 3 && table_to[3] == 0);
  lens.data<int32_t>()[1] = 1;
  EXPECT_RAISES("ValueError: context_lens: expected a length from 0 to 0 for sequence 1, got 1",
                CheckIndices<Narrow>(pair, Checked(lens), 6, nullptr, {table_to, starts_to}));
  starts.data<int64_t>()[2] = 1;
  EXPECT_RAISES("ValueError: block_table[0]: expected numbers that never fall, got 1 after 2 at position 2",
                CheckRowStarts(pair, starts_to));
  starts.data<int64_t>()[2] = 6;
  EXPECT_RAISES(
      "ValueError: block_table[0]: expected numbers up to 5, the entries of block_table[1], got 6 at position 2",
      CheckRowStarts(pair, starts_to));
}

// Sequences of 8 and of 13 tokens, of which a window of 5 shows blocks [0, 2) and [2, 4).
void TestIndicesOfAWindow() {
  Made narrow(kInt32, {2, 4}), wide(kInt64, {2, 4}), lens(kInt32, {2});
  const Array lens_array = Checked(lens);
  lens.data<int32_t>()[0] = 8, lens.data<int32_t>()[1] = 13;
  const int64_t ids[] = {0, 1, -1, 99, int64_t{1} << 40, -7, 2, 3};
  for (int i = 0; i < 8; ++i)
    narrow.data<int32_t>()[i] = static_cast<int32_t>(ids[i]), wide.data<int64_t>()[i] = ids[i];
  narrow.data<int32_t>()[4] = 1 << 30;
  int32_t table_to[8];
  for (int32_t& each : table_to) each = -5;
  CheckIndices<Windowed>(Rows(narrow), lens_array, 4);
  CheckIndices<Windowed>(Rows(wide), lens_array, 4, nullptr, {table_to});
  const int32_t expected[] = {0, 1, -5, -5, -5, -5, 2, 3};
  EXPECT(std::memcmp(table_to, expected, sizeof expected) == 0);
  EXPECT_RAISES("IndexError: block_table: expected a block id in [0, 4), got 1073741824 for sequence 1 at position 0",
                CheckIndices<Narrow>(Rows(narrow), lens_array, 4));
  narrow.data<int32_t>()[6] = -3, wide.data<int64_t>()[6] = -3;
  const std::string error =
      "IndexError: block_table: expected a block id in [0, 4), got -3 for sequence 1 at position 2";
  EXPECT_RAISES(error, CheckIndices<Windowed>(Rows(narrow), lens_array, 4));
  EXPECT_RAISES(error, CheckIndices<Windowed>(Rows(wide), lens_array, 4, nullptr, {table_to}));
}

void TestScale() {
  for (const double scale : {0.1, 1.0, 3.0, 1e-40, -0.3, 1e30}) {
    const Scale split = SplitScale(scale, true);
    EXPECT(split.query > 0 && split.query <= 1);
    EXPECT(std::abs(split.query * static_cast<double>(split.scores) / scale - 1) < 1e-6);
  }
  EXPECT(SplitScale(0.1, false).query == 1 && SplitScale(0, true).scores == 0);
}

void TestSharedSlots() {
  float buffer[3 * 48] = {};
  const Array keys(buffer, {3, 4, 2, 6});
  Array values = keys;
  values.tensor.data = buffer + 48;  // block b of the values is block b + 1 of the keys
  keys.tensor.shape[0] = values.shape[0] = 2;
  const Sharing sharing = CheckCachesApart(keys, values, 4, true);
  EXPECT(sharing.unit == 1 && sharing.distance == 4);
  EXPECT(CheckCachesApart(keys, values, 4, false).unit == 4 && CheckCachesApart(keys, values, 4, false).distance == 1);
  int64_t apart[] = {7, 6, -1}, met[] = {5, 1, -1};
  CheckSlotsApart(apart, 3, sharing);
  EXPECT(apart[0] == -1 && apart[2] == 7);
  EXPECT_RAISES(
      "ValueError: value_cache: expected memory apart from key_cache's in all slots that are written, got slot 1 in "
      "the "
      "place of key_cache's slot 5",
      CheckSlotsApart(met, 3, sharing));
}

}  // namespace

int main() {
  TestTexts();
  TestInputs();
  TestArrays();
  TestOverlaps();
  TestIndices();
  TestSeen();
  TestSeenUnions();
  TestIndicesOfAUnion();
  TestIndicesOfAPair();
  TestIndicesOfAWindow();
  TestScale();
  TestSharedSlots();
  return failures;
}
