// Tests of the checks of whole calls in shared/*.h.

#include "cpu/interface.h"
#include "expect.h"
#include "shared/append_checks.h"
#include "shared/decode_checks.h"

using namespace pa;

namespace {

using Narrow = SpecOf<3, false>;
using Shared = SpecOf<3, true>;
using Scored = SpecOf<3, false, 0, true, true>;  // alibi and sinks

// A good call of decode, whose arguments may be exchanged.
struct DecodeCall {
  Made query{kFloat32, {2, 4, 6}}, keys{kFloat32, {3, 4, 2, 6}}, values{kFloat32, {3, 4, 2, 3}}, table{kInt32, {2, 1}};
  Made lens{kInt32, {2}}, out{kFloat32, {2, 4, 3}};
  TVMFFIAny given[DecodeParameters::kCount] = {Any(query.tensor),
                                               Any(keys.tensor),
                                               Any(values.tensor),
                                               Any(table.tensor),
                                               None(),
                                               None(),
                                               Any(lens.tensor),
                                               Any(out.tensor),
                                               None(),
                                               None(),
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
  EXPECT_RAISES("TypeError: value_cache: expected an array, got none", call.Check<Narrow>());
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
  EXPECT_RAISES("TypeError: alibi_slopes: expected an array, got none", call.Check<Scored>());
  call.given[kSlopes] = Any(slopes.tensor);
  EXPECT_RAISES("TypeError: alibi_slopes: expected None, since the spec has no alibi, got an array of shape [4]",
                call.Check<Narrow>());
  EXPECT_RAISES("TypeError: sinks: expected an array, got none", call.Check<Scored>());
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
                                                 None(),
                                                 None(),
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

}  // namespace

int main() {
  TestDecode();
  TestSharedDecode();
  TestHeadsOfDecode();
  TestAppend();
  return failures;
}
