// Tests of shared/*.h.

#include "cpu/interface.h"
#include "expect.h"
#include "shared/append_checks.h"
#include "shared/arrays.h"
#include "shared/decode_checks.h"
#include "shared/errors.h"
#include "shared/indices.h"
#include "shared/overlap.h"
#include "shared/window.h"

using namespace pa;

namespace {

using Narrow = SpecOf<3, false>;
using Shared = SpecOf<3, true>;
using Windowed = SpecOf<3, false, 5>;
using Scored = SpecOf<3, false, 0, true, true>;  // alibi and sinks

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

void TestIndices() {
  Made table(kInt64, {2, 3}), lens(kInt64, {2}), slots(kInt32, {3});
  const Array table_array = Checked(table), lens_array = Checked(lens), slots_array = Checked(slots);
  int64_t *blocks = table.data<int64_t>(), *lengths = lens.data<int64_t>();
  lengths[0] = 5, lengths[1] = 12;
  for (int i = 0; i < 6; ++i) blocks[i] = i;
  blocks[2] = int64_t{1} << 40;  // not used: the first sequence has two blocks
  int32_t lens_to[2] = {}, table_to[6] = {};
  CheckIndices<Narrow>(table_array, lens_array, 6, lens_to, table_to);
  EXPECT(lens_to[0] == 5 && lens_to[1] == 12 && table_to[0] == 0 && table_to[2] == 0 && table_to[5] == 5);
  blocks[4] = 6;
  EXPECT_RAISES("IndexError: block_table: expected a block id in [0, 6), got 6 for sequence 1 at position 1",
                CheckIndices<Narrow>(table_array, lens_array, 6, lens_to, table_to));
  lengths[0] = 13;
  EXPECT_RAISES("ValueError: context_lens: expected a length from 0 to 12 for sequence 0, got 13",
                CheckIndices<Narrow>(table_array, lens_array, 6, lens_to, table_to));
  slots.data<int32_t>()[1] = -1, slots.data<int32_t>()[2] = 8;
  int64_t slots_to[3] = {};
  CheckSlots(slots_array, 9, slots_to);
  EXPECT(slots_to[0] == 0 && slots_to[1] == -1 && slots_to[2] == 8);
  EXPECT_RAISES("IndexError: slot_mapping: expected -1 or a slot in [0, 8), got 8 for token 2",
                CheckSlots(slots_array, 8));
}

void TestFirstSeen() {
  EXPECT(FirstSeen<Narrow>(100) == 0 && FirstBlock<Narrow>(100) == 0);
  EXPECT(FirstSeen<Windowed>(0) == 0 && FirstSeen<Windowed>(5) == 0 && FirstSeen<Windowed>(6) == 1);
  EXPECT(FirstBlock<Windowed>(8) == 0 && FirstBlock<Windowed>(9) == 1 && FirstBlock<Windowed>(13) == 2);
  using One = SpecOf<3, false, 1>;
  EXPECT(FirstBlock<One>(1) == 0 && FirstBlock<One>(4) == 0 && FirstBlock<One>(5) == 1);
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
  CheckIndices<Windowed>(Checked(narrow), lens_array, 4);
  CheckIndices<Windowed>(Checked(wide), lens_array, 4, nullptr, table_to);
  const int32_t expected[] = {0, 1, -5, -5, -5, -5, 2, 3};
  EXPECT(std::memcmp(table_to, expected, sizeof expected) == 0);
  EXPECT_RAISES("IndexError: block_table: expected a block id in [0, 4), got 1073741824 for sequence 1 at position 0",
                CheckIndices<Narrow>(Checked(narrow), lens_array, 4));
  narrow.data<int32_t>()[6] = -3, wide.data<int64_t>()[6] = -3;
  const std::string error =
      "IndexError: block_table: expected a block id in [0, 4), got -3 for sequence 1 at position 2";
  EXPECT_RAISES(error, CheckIndices<Windowed>(Checked(narrow), lens_array, 4));
  EXPECT_RAISES(error, CheckIndices<Windowed>(Checked(wide), lens_array, 4, nullptr, table_to));
}

void TestScale() {
  for (const double scale : {0.1, 1.0, 3.0, 1e-40, -0.3, 1e30}) {
    const Scale split = SplitScale(scale, true);
    EXPECT(split.query > 0 && split.query <= 1);
    EXPECT(std::abs(split.query * static_cast<double>(split.scores) / scale - 1) < 1e-6);
  }
  EXPECT(SplitScale(0.1, false).query == 1 && SplitScale(0, true).scores == 0);
}

// A good call of decode, whose arguments may be exchanged.
struct DecodeCall {
  Made query{kFloat32, {2, 4, 6}}, keys{kFloat32, {3, 4, 2, 6}}, values{kFloat32, {3, 4, 2, 3}}, table{kInt32, {2, 1}};
  Made lens{kInt32, {2}}, out{kFloat32, {2, 4, 3}};
  TVMFFIAny given[DecodeParameters::kCount] = {Any(query.tensor),
                                               Any(keys.tensor),
                                               Any(values.tensor),
                                               Any(table.tensor),
                                               Any(lens.tensor),
                                               Any(out.tensor),
                                               None(),
                                               None(),
                                               None(),
                                               Any(1),
                                               Any(1),
                                               Any(0),
                                               Any(0),
                                               Any(0)};

  template <typename Spec>
  DecodeArguments Check() const {
    return CheckDecode<Spec, DecodeParameters>(Inputs(given, DecodeParameters::kCount, DecodeParameters::kCount));
  }
};

void TestDecode() {
  DecodeCall call;
  const DecodeArguments args = call.Check<Narrow>();
  EXPECT(args.batch == 2 && args.num_blocks == 3 && !args.has_lse());
  EXPECT(args.key_cache.block_stride.elements == 48 && args.key_cache.row_stride.elements == 12);
  EXPECT(args.value_cache.block_stride.elements == 24 && args.value_cache.head_stride.elements == 3);
  EXPECT(args.value_cache.memory.tensor.data == call.values.tensor.data && args.out.shape[2] == 3);
  const Made flat(kFloat32, {2, 12}), wide(kFloat32, {2, 4, 6}), wide_values(kFloat32, {3, 4, 2, 6});
  call.given[DecodeParameters::kOut.position] = Any(flat.tensor);
  EXPECT(call.Check<Narrow>().out.tensor.ndim == 3 && call.Check<Narrow>().out.strides[1] == 3);
  call.given[DecodeParameters::kOut.position] = Any(wide.tensor);
  EXPECT_RAISES("ValueError: out: expected shape [2, 4, 3], got [2, 4, 6]", call.Check<Narrow>());
  call.given[DecodeParameters::kValueCache.position] = Any(wide_values.tensor);
  EXPECT_RAISES("ValueError: value_cache: expected shape [num_blocks, 4, 2, 3], got [3, 4, 2, 6]",
                call.Check<Narrow>());
  call.given[DecodeParameters::kValueCache.position] = None();
  EXPECT_RAISES("TypeError: value_cache: expected an array, got tvm-ffi type index 0", call.Check<Narrow>());
}

void TestSharedDecode() {
  DecodeCall call;
  EXPECT_RAISES(
      "TypeError: value_cache: expected None, since the spec has shared_kv, got an array of shape [3, 4, 2, 3]",
      call.Check<Shared>());
  call.given[DecodeParameters::kValueCache.position] = None();
  const DecodeArguments args = call.Check<Shared>();
  EXPECT(args.value_cache.memory.tensor.data == call.keys.tensor.data);
  EXPECT(args.value_cache.block_stride.elements == args.key_cache.block_stride.elements);
  EXPECT(args.value_cache.row_stride.elements == 12 && args.value_cache.head_stride.elements == 6);
  call.out.tensor.data = call.keys.memory.data() + 400;
  EXPECT(Raised([&] { call.Check<Shared>(); }).find("out: expected memory apart from key_cache's") !=
         std::string::npos);
}

void TestHeadsOfDecode() {
  constexpr int kSlopes = DecodeParameters::kAlibiSlopes.position, kSinks = DecodeParameters::kSinks.position;
  DecodeCall call;
  Made slopes(kFloat32, {4}), sinks(kFloat32, {4}), more(kFloat32, {5}), ints(kInt32, {4}), apart(kFloat32, {4}, {2});
  EXPECT_RAISES("TypeError: alibi_slopes: expected an array, got tvm-ffi type index 0", call.Check<Scored>());
  call.given[kSlopes] = Any(slopes.tensor);
  EXPECT_RAISES("TypeError: alibi_slopes: expected None, since the spec has no alibi, got an array of shape [4]",
                call.Check<Narrow>());
  EXPECT_RAISES("TypeError: sinks: expected an array, got tvm-ffi type index 0", call.Check<Scored>());
  call.given[kSinks] = Any(sinks.tensor);
  EXPECT_RAISES("TypeError: sinks: expected None, since the spec has no sinks, got an array of shape [4]",
                (call.Check<SpecOf<3, false, 0, true>>()));
  const DecodeArguments args = call.Check<Scored>();
  EXPECT(args.alibi_slopes.tensor.data == slopes.tensor.data && args.alibi_slopes.shape[0] == 4);
  EXPECT(args.sinks.tensor.data == sinks.tensor.data && args.sinks.strides[0] == 1);
  call.given[kSinks] = Any(more.tensor);
  EXPECT_RAISES("ValueError: sinks: expected shape [4], got [5]", call.Check<Scored>());
  call.given[kSinks] = Any(ints.tensor);
  EXPECT_RAISES("TypeError: sinks: expected dtype float32, got int32", call.Check<Scored>());
  call.given[kSinks] = Any(apart.tensor);
  EXPECT_RAISES("ValueError: sinks: expected a contiguous last axis (stride 1), got stride 2", call.Check<Scored>());
  call.given[kSinks] = Any(sinks.tensor);
  sinks.tensor.data = call.out.memory.data() + 80;
  EXPECT_RAISES("ValueError: out: expected memory apart from sinks's bytes [80, 96), got bytes [0, 96)",
                call.Check<Scored>());
  sinks.tensor.data = call.out.memory.data() + 96;  // next to it
  call.Check<Scored>();
}

// The same of append_kv.
struct AppendCall {
  Made key{kFloat32, {5, 2, 6}}, value{kFloat32, {5, 2, 3}}, keys{kFloat32, {3, 4, 2, 6}},
      values{kFloat32, {3, 4, 2, 3}};
  Made slots{kInt64, {5}};
  TVMFFIAny given[AppendKvParameters::kCount] = {Any(key.tensor),
                                                 Any(value.tensor),
                                                 Any(keys.tensor),
                                                 Any(values.tensor),
                                                 Any(slots.tensor),
                                                 Any(1),
                                                 Any(0),
                                                 Any(0),
                                                 Any(0)};

  template <typename Spec>
  AppendArguments Check() const {
    return CheckAppend<Spec, AppendKvParameters>(Inputs(given, AppendKvParameters::kCount, AppendKvParameters::kCount));
  }
};

void TestAppend() {
  AppendCall call;
  const AppendArguments args = call.Check<Narrow>();
  EXPECT(args.num_slots == 12 && args.sharing.unit == 0 && args.value.shape[2] == 3);
  const Made wide(kFloat32, {5, 2, 6});
  call.given[AppendKvParameters::kValue.position] = Any(wide.tensor);
  EXPECT_RAISES("ValueError: value: expected shape [5, 2, 3], got [5, 2, 6]", call.Check<Narrow>());
  EXPECT_RAISES(
      "TypeError: value: expected None, since the spec has shared_kv, got an array of shape "
      "[5, "
      "2, 6]",
      call.Check<Shared>());
  call.given[AppendKvParameters::kValue.position] = None();
  EXPECT_RAISES(
      "TypeError: value_cache: expected None, since the spec has shared_kv, got an array of shape [3, 4, 2, 3]",
      call.Check<Shared>());
  call.given[AppendKvParameters::kValueCache.position] = None();
  const AppendArguments shared = call.Check<Shared>();
  EXPECT(shared.sharing.unit == 0 && shared.value.tensor.data == call.key.tensor.data && shared.value.shape[2] == 3);
  call.key.tensor.data = call.keys.tensor.data;
  EXPECT(Raised([&] { call.Check<Shared>(); }).find("key_cache: expected memory apart from key's") !=
         std::string::npos);
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
  TestFirstSeen();
  TestIndicesOfAWindow();
  TestScale();
  TestDecode();
  TestSharedDecode();
  TestHeadsOfDecode();
  TestAppend();
  TestSharedSlots();
  return failures;
}
