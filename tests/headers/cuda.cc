// Tests of cuda/*.h, as far as there is something to test without a driver.

#include "cuda/call.h"
#include "cuda/checks.h"
#include "cuda/device.h"
#include "cuda/driver.h"
#include "cuda/interface.h"
#include "cuda/queries.h"
#include "expect.h"
#include "shared/append_checks.h"
#include "shared/decode_checks.h"

extern "C" const unsigned char pa_kernels_image[] = "no kernels";

using namespace pa;

namespace {

void TestDevices() {
  float memory[4] = {};
  Array here(memory, {4}), there = here;
  here.tensor.device = {kDLCUDA, 1}, there.tensor.device = {kDLCUDA, 0};
  EXPECT(CheckSameDevice({{"a", &here}, {"b", &here}}) == 1);
  EXPECT_RAISES("ValueError: b: expected an array on CUDA device 1, where a is, got one on device 0",
                CheckSameDevice({{"a", &here}, {"b", &there}}));
}

void TestAlignment() {
  alignas(16) float memory[64] = {};
  Array array(memory, {4, 8});
  CheckAligned("a", array, 16);
  array.strides[0] = 10;
  EXPECT_RAISES("ValueError: a: expected strides in multiples of 4 elements (16 bytes), got [10, 1]",
                CheckAligned("a", array, 16));
  array.tensor.data = memory + 1;
  EXPECT_RAISES("ValueError: a: expected data aligned to 16 bytes, got an address 4 past a multiple of 16",
                CheckAligned("a", array, 16));
}

void TestChecks() {
  const Parameter check{0, "check"};
  for (const int64_t value : {-1, 0, 1, 2, 3}) {
    const TVMFFIAny given = Any(value);
    const Inputs in(&given, 1, 1);
    if (value == -1 || value == 3) {
      EXPECT_RAISES("ValueError: check: expected 0 to 2, got " + std::to_string(value), CheckOf(in, check));
    } else {
      EXPECT(CheckOf(in, check) == value);
    }
  }
  EXPECT_RAISES("ValueError: key: expected a number of tokens of at most 5, got 6",
                CheckCount("key", "a number of tokens", 6, 5));
  CheckNotShared({});
  EXPECT(Raised([] { CheckNotShared({1, 4}); }).find("got blocks that they share") != std::string::npos);
}

void TestWorkspace() {
  EXPECT(Workspace::Aligned(1) == 256 && Workspace::Aligned(256) == 256 && Workspace::Aligned(257) == 512);
  EXPECT(sizeof(Report) == 64);
}

struct Cut {
  static constexpr int64_t kBlockSize = 16, kRangeTokens = 256, kMostRanges = 64;
};

void TestRanges() {
  BlockTable table{};
  const auto ranges = [&](int64_t blocks) {
    table.entries.shape[1] = blocks;
    return MostRanges<Cut>(table);
  };
  EXPECT(ranges(0) == 0 && ranges(1) == 1 && ranges(16) == 1 && ranges(17) == 2);
  EXPECT(ranges(64 * 16) == 64 && ranges(64 * 16 + 1) == 65 && ranges(int64_t{1} << 40) == 65);
}

void TestQueryErrors() {
  EXPECT_RAISES(
      "ValueError: query_start_loc: expected numbers from 0 to num_tokens that never fall, of sequence 3 up to 5 query "
      "tokens (at most its tokens, and 64 on a GPU), got 7 and then 13 somewhere",
      RaiseQueries(3, 7, 13, 5, " somewhere"));
  EXPECT_RAISES("ValueError: tree_mask: expected shape [9], n * n for each sequence of n query tokens, got [4]",
                RaiseTree(4, 9));
}

}  // namespace

int main() {
  TestDevices();
  TestAlignment();
  TestChecks();
  TestWorkspace();
  TestRanges();
  TestQueryErrors();
  return failures;
}
