// Fill a paged cache and attend to it, in C++: prefill DIRECTORY, with what make_cache.py has written there.
//
// The tokens of the first sequence are taken out of the cache in the files, appended to one of this program's own, and
// attended to by one query token, in memory that this program gives.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "pa.h"

namespace {

constexpr int64_t kHeads = 8, kKvHeads = 2, kHeadDim = 64, kBlockSize = 16, kBlocks = 6, kMaxBlocks = 3;
constexpr int64_t kRow = kKvHeads * kHeadDim;

template <typename Element>
constexpr int32_t kDtype = PA_FLOAT32;
template <>
constexpr int32_t kDtype<int32_t> = PA_INT32;
template <>
constexpr int32_t kDtype<int64_t> = PA_INT64;

// An array that is contiguous.
template <typename Element>
struct Array {
  std::vector<int64_t> shape;
  std::vector<Element> elements;

  explicit Array(std::initializer_list<int64_t> extents) : shape(extents) {
    size_t size = 1;
    for (int64_t extent : shape) size *= extent;
    elements.resize(size);
  }
  Array(std::initializer_list<int64_t> extents, const std::string& path) : Array(extents) {
    std::ifstream file(path, std::ios::binary);
    if (!file.read(reinterpret_cast<char*>(elements.data()), elements.size() * sizeof(Element))) {
      throw std::runtime_error(path + ": expected " + std::to_string(elements.size()) + " elements");
    }
  }
  pa_tensor tensor() {
    return {elements.data(), shape.data(), nullptr, static_cast<int32_t>(shape.size()), kDtype<Element>};
  }
};

void Check(pa_status status, const pa_error& error) {
  if (status != PA_OK) throw std::runtime_error(error.message);
}

void Run(const std::string& directory) {
  Array<float> query({3, kHeads, kHeadDim}, directory + "/query.bin");
  Array<float> keys({kBlocks, kBlockSize, kKvHeads, kHeadDim}, directory + "/key_cache.bin");
  Array<float> values({kBlocks, kBlockSize, kKvHeads, kHeadDim}, directory + "/value_cache.bin");
  Array<int32_t> table({3, kMaxBlocks}, directory + "/block_table.bin"), lens({3}, directory + "/context_lens.bin");

  const int64_t length = lens.elements[0];
  Array<float> new_keys({length, kKvHeads, kHeadDim}), new_values({length, kKvHeads, kHeadDim});
  Array<int64_t> slots({length});
  for (int64_t i = 0; i < length; ++i) {
    const int64_t from = table.elements[i / kBlockSize] * kBlockSize + i % kBlockSize;
    std::copy_n(&keys.elements[from * kRow], kRow, &new_keys.elements[i * kRow]);
    std::copy_n(&values.elements[from * kRow], kRow, &new_values.elements[i * kRow]);
    slots.elements[i] = i;  // blocks 0, 1 and 2 of our own cache
  }

  pa_error error;
  const pa_kernels* kernels;
  Check(pa_find("f32_nhd_h8x2_d64_b16", &kernels, &error), error);
  Array<float> own_keys({3, kBlockSize, kKvHeads, kHeadDim}), own_values({3, kBlockSize, kKvHeads, kHeadDim});
  pa_append_kv_args append{};
  append.key = new_keys.tensor(), append.value = new_values.tensor();
  append.key_cache = own_keys.tensor(), append.value_cache = own_values.tensor();
  append.slot_mapping = slots.tensor();
  Check(pa_append_kv(kernels, &append, nullptr, &error), error);

  Array<float> first({1, kHeads, kHeadDim}), out({1, kHeads, kHeadDim});
  std::copy_n(query.elements.begin(), kHeads * kHeadDim, first.elements.begin());
  Array<int32_t> blocks({1, 3}), context({1}), starts({2});
  blocks.elements = {0, 1, 2}, context.elements = {static_cast<int32_t>(length)}, starts.elements = {0, 1};
  pa_attend_args attend{};
  attend.query = first.tensor(), attend.out = out.tensor();
  attend.key_cache = own_keys.tensor(), attend.value_cache = own_values.tensor();
  attend.block_table = blocks.tensor(), attend.context_lens = context.tensor();
  attend.query_start_loc = starts.tensor();
  pa_options options{};
  options.num_threads = 1;
  Check(pa_attend_workspace(kernels, &attend, &options, &options.workspace_size, &error), error);
  options.workspace = std::aligned_alloc(64, (options.workspace_size + 63) / 64 * 64);
  const pa_status status = pa_attend(kernels, &attend, &options, &error);
  std::free(options.workspace);
  Check(status, error);
  std::printf("sequence 0:");
  for (int i = 0; i < 4; ++i) std::printf(" %.5f", out.elements[i]);
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc != 2) throw std::runtime_error("usage: prefill DIRECTORY");
    Run(argv[1]);
  } catch (const std::exception& failed) {
    std::fprintf(stderr, "%s\n", failed.what());
    return 1;
  }
}
