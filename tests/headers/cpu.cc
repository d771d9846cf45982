// Tests of cpu/*.h.

#include <atomic>
#include <cmath>
#include <numeric>

#include "cpu/append.h"
#include "cpu/converted.h"
#include "cpu/cpu_set.h"
#include "cpu/features.h"
#include "cpu/floating_point.h"
#include "cpu/kernel_call.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/scratch.h"
#include "expect.h"

using namespace pa;

namespace {

using Spec = SpecOf<3, false>;  // ranges of 3 blocks of 4 tokens, items of 10 tokens, chunks of 4 sequences

void TestCuts() {
  for (const int64_t len : {0, 1, 4, 12, 13, 24, 25, 100}) {
    const Cut<Spec> cut(len);
    const int64_t blocks = (len + 3) / 4;
    EXPECT(cut.num_ranges == std::max<int64_t>(1, (blocks + 2) / 3));
    EXPECT(cut.num_partials() == (cut.num_ranges == 1 ? 0 : cut.num_ranges));
    int64_t end = 0, tokens = 0;
    for (int64_t i = 0; i < cut.num_ranges; ++i) {
      const Interval range = cut.Range(i);
      EXPECT(range.begin == end && range.end - range.begin <= 3 && (len == 0 || range.end > range.begin));
      end = range.end, tokens += cut.Tokens(range);
    }
    EXPECT(end == blocks && tokens == len);
  }
}

void TestPlan() {
  const int32_t lens[] = {2, 3, 40, 4, 5, 0, 1};
  const Plan<Spec> plan(lens, 7);
  EXPECT(plan.num_tokens == std::accumulate(lens, lens + 7, 0) && plan.num_partials == 4);
  EXPECT(plan.partials_of(2) == 4 && plan.partials_of(0) == 0 && plan.partial_begin(7) == 4);
  int64_t blocks[7] = {}, seqs = 0;
  for (int64_t i = 0; i < plan.num_items; ++i) {
    const WorkItem& item = plan.item(i);
    EXPECT(i == 0 || plan.item(i - 1).num_tokens >= item.num_tokens);
    EXPECT(item.batch_start / 4 == (item.batch_start + item.num_seqs - 1) / 4);
    EXPECT((item.partial_start >= 0) == (item.batch_start == 2));
    for (int64_t seq = item.batch_start; seq < item.batch_start + item.num_seqs; ++seq) {
      blocks[seq] += std::min<int64_t>(item.block_end, (lens[seq] + 3) / 4) - item.block_begin;
    }
    seqs += item.num_seqs;
  }
  EXPECT(seqs == 7 + 3);  // the long one is in four items
  for (int seq = 0; seq < 7; ++seq) EXPECT(blocks[seq] == (lens[seq] + 3) / 4);
  EXPECT(Plan<Spec>(lens, 0).num_items == 0);
}

using Windowed = SpecOf<3, false, 9>;  // of tokens

void TestCutsOfAWindow() {
  for (int64_t len = 0; len < 60; ++len) {
    const Cut<Windowed> cut(len);
    const int64_t first = std::max<int64_t>(len - 9, 0) / 4, blocks = (len + 3) / 4 - first;
    EXPECT(blocks <= 4 && cut.num_ranges == (blocks > 3 ? 2 : 1));
    EXPECT(len == 0 || cut.Range(0).begin == first);
    EXPECT(cut.Range(cut.num_ranges - 1).end == (len + 3) / 4);
  }
}

struct Uncut : Union {
  static constexpr int64_t kSplitBlocks = INT64_MAX;
};

// Each run of blocks is cut; where none is, there is one range with the blocks between them, whose tokens do not count.
void TestPlanOfAUnion() {
  const int32_t lens[] = {100, 10, 0, 3};
  const Plan<Union> plan(lens, 4);
  const WorkItem expected[] = {
      {1, 2, 0, 3, -1, 10}, {0, 1, 10, 12, 1, 8}, {0, 1, 0, 1, 0, 4}, {0, 1, 24, 25, 2, 4}, {3, 1, 0, 1, -1, 3},
  };
  EXPECT(plan.num_items == 5 && plan.num_partials == 3 && plan.partials_of(0) == 3 && plan.num_tokens == 29);
  for (int64_t i = 0; i < 5; ++i) EXPECT(std::memcmp(&plan.item(i), &expected[i], sizeof(WorkItem)) == 0);
  const Plan<Uncut> uncut(lens, 1);
  const WorkItem whole = {0, 1, 0, 25, -1, 16};
  EXPECT(uncut.num_items == 1 && std::memcmp(&uncut.item(0), &whole, sizeof(WorkItem)) == 0);
  EXPECT(Plan<NoKeys>(lens, 4).num_tokens == 0 && Plan<NoKeys>(lens, 4).num_items == 1);
}

void TestPlanOfAWindow() {
  const int32_t lens[] = {0, 2, 40, 0, 5, 0, 34, 1000};
  const Plan<Windowed> plan(lens, 8);
  EXPECT(plan.num_tokens == 2 + 9 + 5 + 9 + 9);
  const WorkItem expected[] = {
      // 40 is seen from 31 on, in blocks 7 to 9; 34 from 25 on, in blocks 6 to 8.
      {2, 2, 7, 10, -1, 9}, {6, 1, 6, 9, -1, 9}, {7, 1, 247, 250, -1, 9}, {4, 2, 0, 2, -1, 5}, {0, 2, 0, 1, -1, 2},
  };
  EXPECT(plan.num_items == 5 && plan.num_partials == 0);
  for (int64_t i = 0; i < plan.num_items; ++i) EXPECT(std::memcmp(&plan.item(i), &expected[i], sizeof(WorkItem)) == 0);
}

// Windows of sequences that share an item; an empty one does not move its begin. A window that is cut.
void TestItemsOfAWindow() {
  using Two = SpecOf<3, false, 2>;
  const int32_t lens[] = {0, 40, 13, 0};
  const Plan<Two> plan(lens, 4);
  const WorkItem shared = {0, 4, 2, 10, -1, 4};
  EXPECT(plan.num_items == 1 && std::memcmp(&plan.item(0), &shared, sizeof(WorkItem)) == 0);
  const int32_t cut[] = {42};  // seen from 33 on, in blocks 8 to 10; from 31 on, in blocks 7 to 10
  EXPECT(Plan<Windowed>(cut, 1).num_partials == 0);
  const Plan<SpecOf<3, false, 11>> two(cut, 1);
  const WorkItem halves[] = {{0, 1, 7, 9, 0, 5}, {0, 1, 9, 11, 1, 6}};
  EXPECT(two.num_items == 2 && two.num_partials == 2 && two.num_tokens == 11);
  EXPECT(std::memcmp(&two.item(0), &halves[1], sizeof(WorkItem)) == 0);
  EXPECT(std::memcmp(&two.item(1), &halves[0], sizeof(WorkItem)) == 0);
}

void TestScratch() {
  const void *first, *second;
  {
    const Borrowed<char> a(call_workspace, 100), b(call_workspace, 1);
    first = a.data(), second = b.data();
    EXPECT(first != second && reinterpret_cast<uintptr_t>(first) % 64 == 0);
  }
  const Borrowed<char> a(call_workspace, 128), b(call_workspace, 64);
  EXPECT(a.data() == first && b.data() == second);  // kept, and large enough
  EXPECT(Aligned(1) == 16 && Aligned(16) == 16 && Aligned(17) == 32);
}

void TestConverted() {
  Made narrow(kInt32, {2, 3}), wide(kInt64, {2, 3});
  const TVMFFIAny given[] = {Any(narrow.tensor), Any(wide.tensor)};
  const Inputs in(given, 2, 2);
  const ArgumentCheck<Spec> check{in, 0};
  const Parameter first{0, "narrow"}, second{1, "wide"};
  const Converted<int32_t> as_given(check.Indices(first, kInt32, {2, 3}));
  const Converted<int32_t> converted(check.Indices(second, kInt32, {2, 3}));
  EXPECT(as_given.to() == nullptr && as_given.array.tensor.data == narrow.tensor.data);
  EXPECT(converted.to() != nullptr && converted.array.tensor.data == converted.to());
  EXPECT(converted.array.tensor.dtype.bits == 32 && converted.array.strides[0] == 3);
}

// A kernel that writes down what it is called with.
TVMFFIAny seen[8];
int32_t num_seen;

int Record(void*, const TVMFFIAny* args, int32_t num_args, TVMFFIAny*) {
  std::copy_n(args, num_args, seen);
  return (num_seen = num_args) == 0;
}

struct Recorded {
  static constexpr TVMFFISafeCallType kFunction = Record;
  Passed<Array> array;
  Passed<RowStride<Keys>> k_row;
  Passed<HeadStride<Values>> v_head;
  Passed<int64_t> number;
  Passed<float> scale;
};

void TestKernelCall() {
  float memory[4] = {};
  const Array array(memory, {4});
  const Cache<Keys> keys{array, {1}, {2}, {3}};
  Call(Recorded{.array = array,
                .k_row = keys.row_stride,
                .v_head = ValuesIn(keys).head_stride,
                .number = int64_t{-7},
                .scale = 0.5f});
  EXPECT(num_seen == 5 && seen[0].type_index == kTVMFFIDLTensorPtr && seen[0].v_ptr == &array.tensor);
  EXPECT(seen[1].v_int64 == 2 && seen[2].v_int64 == 3 && seen[3].v_int64 == -7 && seen[4].v_float64 == 0.5);
  static_assert(!std::is_convertible_v<HeadStride<Keys>, Passed<RowStride<Keys>>>);
  static_assert(!std::is_convertible_v<RowStride<Values>, Passed<RowStride<Keys>>>);
  static_assert(!std::is_convertible_v<int64_t, Passed<RowStride<Keys>>>);
  static_assert(!std::is_convertible_v<RowStride<Keys>, Passed<int64_t>>);
  static_assert(!std::is_convertible_v<float, Passed<int64_t>> && !std::is_convertible_v<int64_t, Passed<float>>);
}

void TestThreads() {
  const int32_t cpus[] = {0, 1}, other[] = {0, 2};
  const int64_t number = CpuSet::NumberOf(cpus, 2);
  EXPECT(number > 0 && CpuSet::NumberOf(cpus, 2) == number && CpuSet::NumberOf(other, 2) != number);
  EXPECT(CpuSet::Numbered(0) == nullptr && CpuSet::Numbered(number) != nullptr);
  EXPECT_RAISES("ValueError: cpus: expected a number that cpu_set gave, got 99", CpuSet::Numbered(99));
  for (const int64_t limit : {1, 3}) {
    std::atomic<int> runs[100] = {};
    ParallelFor(100, {limit, kOwn, nullptr}, [&](int64_t i) { ++runs[i]; });
    for (const auto& each : runs) EXPECT(each == 1);
  }
  bool failed = false;
  try {
    ParallelFor(8, {2, kOwn, nullptr}, [](int64_t) { throw std::bad_alloc(); });
  } catch (const std::bad_alloc&) {
    failed = true;
  }
  EXPECT(failed);
}

void TestFloatingPoint() {
#if defined(__aarch64__)
  constexpr uint64_t kFlushes = 1 << 24;  // subnormal numbers are zero
#else
  constexpr uint32_t kFlushes = 0x8040;  // flush to zero, denormals are zero
#endif
  const auto callers = FloatingPointState();
  SetFloatingPointState(callers | kFlushes);
  volatile float tiny = 1e-38f;
  {
    const DefaultFloatingPoint state;
    EXPECT(tiny / 16 != 0);
  }
  EXPECT(FloatingPointState() == (callers | kFlushes));
  EXPECT(tiny / 16 == 0);
  SetFloatingPointState(callers);
}

void TestFeatures() {
#if defined(__aarch64__)
  static constexpr InstructionSet kThere[] = {{"neon", 1}, {"bf16", 64 + 14}, nullptr};
  static constexpr InstructionSet kNotThere[] = {{"neon", 1}, {"x", 63}, {"y", 64 + 63}, {"z", 62}, nullptr};
#else
  static constexpr InstructionSet kThere[] = {"sse2", {"lzcnt", "abm"}, nullptr};
  static constexpr InstructionSet kNotThere[] = {"sse2", {"x", "none"}, "y", "sse", {"z", "sse2 "}, nullptr};
#endif
  CheckCpuFeatures(kThere);
  EXPECT_RAISES("RuntimeError: target: this module is built for a CPU with features that this one lacks: x y z",
                CheckCpuFeatures(kNotThere));
}

void TestAppend() {
  Array array;
  array.tensor.dtype = kBfloat16;
  EXPECT(Same(AsBits(array).tensor.dtype, kUint16));
  EXPECT(AreFew<Spec>(kFewBytes / 72 - 1) && !AreFew<Spec>(kFewBytes / 72 + 1));  // 2 heads of 6 + 3 floats
}

}  // namespace

int main() {
  TestCuts();
  TestPlan();
  TestCutsOfAWindow();
  TestPlanOfAWindow();
  TestPlanOfAUnion();
  TestItemsOfAWindow();
  TestScratch();
  TestConverted();
  TestKernelCall();
  TestThreads();
  TestFloatingPoint();
  TestFeatures();
  TestAppend();
  return failures;
}
