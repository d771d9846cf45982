// Tests of cpu/chunk.h, cpu/partials.h, cpu/tile_registers.h, and of the calls in cpu/decode.h and cpu/append.h.

#include <atomic>

#include "cpu/append.h"
#include "cpu/chunk.h"
#include "cpu/decode.h"
#include "cpu/features.h"
#include "cpu/kernel_call.h"
#include "cpu/partials.h"
#include "cpu/tile_registers.h"
#include "expect.h"

using namespace pa;

namespace {

using Spec = SpecOf<3, false>;  // ranges of 3 blocks of 4 tokens, items of 10 tokens, chunks of 4 sequences

void TestPartials() {
  const int32_t lens[] = {3, 60, 30};  // in 1, 5 and 3 ranges
  const Plan<Spec> plan(lens, 3);
  const Partials<Spec> partials(plan, 3);
  EXPECT(partials.max.shape[0] == 8 && partials.sum.shape[1] == 4 && partials.acc.shape[2] == Spec::kValueDim);
  EXPECT(!Overlap(partials.max, partials.sum) && !Overlap(partials.sum, partials.acc));
  int64_t left[] = {0, 5, 3};
  for (int64_t i = 0; i < plan.num_items; ++i) {
    const int64_t seq = plan.item(i).batch_start;
    EXPECT(plan.item(i).partial_start < 0 || partials.Complete(seq) == (--left[seq] == 0));
  }
  EXPECT(left[0] == 0 && left[1] == 0 && left[2] == 0);
}

void TestChunk() {
  const Chunk<Spec> chunk;
  const Array* const arrays[] = {&chunk.scores,   &chunk.probs,   &chunk.tile_acc, &chunk.acc,
                                 &chunk.tile_max, &chunk.row_max, &chunk.tile_sum, &chunk.row_sum};
  for (const Array* one : arrays) {
    EXPECT(reinterpret_cast<uintptr_t>(one->tensor.data) % 64 == 0 && one->shape[0] == 4 && one->shape[1] == 2);
    for (const Array* other : arrays) EXPECT(one == other || !Overlap(*one, *other));
  }
  EXPECT(chunk.scores.shape[2] == 8 && chunk.acc.shape[2] == Spec::kValueDim && chunk.row_max.tensor.ndim == 2);
}

// The shapes of this thread's tile registers: the palette at 0, rows from 48 on.
struct alignas(64) Shapes {
  uint8_t bytes[64] = {};

  static Shapes Now() {
    Shapes now;
    asm volatile("sttilecfg %0" : "=m"(now));
    return now;
  }
};

// Kernels have the shapes that they ask for, and a caller gets back what he had, be it none. On a CPU that has them.
void TestTileRegisters() {
  if (!CpuFlags().Has("amx_tile")) return;
  CheckTileRegisters();
  {
    const TileRegisters registers(16, 16);
    EXPECT(Shapes::Now().bytes[0] == 1 && Shapes::Now().bytes[48] == 16 && Shapes::Now().bytes[55] == 16);
  }
  {
    const TileRegisters registers(4, 8);
    const Shapes now = Shapes::Now();
    EXPECT(now.bytes[48] == 4 && now.bytes[52] == 4 && now.bytes[53] == 16 && now.bytes[54] == 4 && now.bytes[55] == 8);
    EXPECT(now.bytes[16] == 64 && now.bytes[26] == 64 && now.bytes[28] == 32 && now.bytes[30] == 64);
  }
  EXPECT(Shapes::Now().bytes[0] == 0);
  Shapes callers;
  callers.bytes[0] = 1, callers.bytes[16] = 32, callers.bytes[48] = 5;
  asm volatile("ldtilecfg %0" : : "m"(callers));
  {
    const TileRegisters registers(16, 16);
    EXPECT(Shapes::Now().bytes[48] == 16);
  }
  EXPECT(std::memcmp(&callers, Shapes::Now().bytes, sizeof callers) == 0);
  asm volatile("tilerelease");
}

// A call of decode with int64 indices, from arrays that are contiguous.
void TestDecodeCall() {
  Made query(kFloat32, {2, 4, 6}), keys(kFloat32, {9, 4, 2, 6}), values(kFloat32, {9, 4, 2, 3});
  Made table(kInt64, {2, 8}), lens(kInt64, {2}), out(kFloat32, {2, 4, 3});
  auto* const len = static_cast<int64_t*>(lens.tensor.data);
  len[0] = 5, len[1] = 30;
  for (int i = 0; i < 16; ++i) static_cast<int64_t*>(table.tensor.data)[i] = i % 9;
  const TVMFFIAny none{}, given[] = {Any(query.tensor),
                                     Any(keys.tensor),
                                     Any(values.tensor),
                                     Any(table.tensor),
                                     none,
                                     none,
                                     Any(lens.tensor),
                                     Any(out.tensor),
                                     none,
                                     none,
                                     none,
                                     none,
                                     none,
                                     Packed(1.0f),
                                     Packed(int64_t{8}),
                                     Packed(int64_t{kOwn}),
                                     Packed(int64_t{0}),
                                     Packed(int64_t{0})};
  {
    DecodeCall<Spec> call(Inputs(given, 18, 18));
    EXPECT(call.plan.num_items == 4 && call.plan.num_partials == 3 && call.args.batch == 2);
    EXPECT(call.threads.limit == 35 / Spec::kThreadTokens + 1);
    EXPECT(static_cast<const int32_t*>(call.args.context_lens.tensor.data)[1] == 30);
    EXPECT(static_cast<const int32_t*>(call.args.block_table.entries.tensor.data)[15] == 15 % 9);
    EXPECT(call.args.has_lse() && call.args.lse.shape[0] == 2 && call.args.lse.shape[1] == 4);
  }
  len[1] = 33;
  EXPECT_RAISES("ValueError: context_lens: expected a length from 0 to 32 for sequence 1, got 33",
                DecodeCall<Spec>(Inputs(given, 18, 18)));
}

// Which heads of which cache are written, by so many tokens.
template <typename Spec>
void TestHeads(int64_t num_tokens, int64_t heads_of_a_call) {
  Made key(kFloat32, {num_tokens, 2, 6}), value(kFloat32, {num_tokens, 2, 3}), slots(kInt32, {num_tokens});
  Made keys(kFloat32, {1, 4, 2, 6}), values(kFloat32, {1, 4, 2, 3});
  const TVMFFIAny given[] = {Any(key.tensor),       Any(value.tensor),  Any(keys.tensor),  Any(values.tensor),
                             Any(slots.tensor),     TVMFFIAny{},        TVMFFIAny{},       Packed(int64_t{2}),
                             Packed(int64_t{kOwn}), Packed(int64_t{0}), Packed(int64_t{0})};
  const AppendCall<Spec> call(Inputs(given, 11, 11));
  EXPECT(call.slot_mapping.tensor.dtype.bits == 64 && Same(call.key.tensor.dtype, {kDLUInt, 32, 1}));
  std::atomic<int> written[2][2] = {};
  auto write_to = [&](int which, const Made& cache) {
    return [&, which](const Array&, const Array& to, int64_t head_begin, int64_t num_heads) {
      EXPECT(num_heads == heads_of_a_call && to.tensor.data == cache.tensor.data);
      for (int64_t head = head_begin; head < head_begin + num_heads; ++head) ++written[which][head];
    };
  };
  call.ForHeads(write_to(0, keys), write_to(1, values));
  for (const auto& heads : written) EXPECT(heads[0] == (num_tokens > 0) && heads[1] == (num_tokens > 0));
}

void TestAppendCall() {
  TestHeads<Spec>(0, 2);
  TestHeads<Spec>(3, 2);
  TestHeads<Spec>(kFewBytes / 72 + 1, 1);
}

}  // namespace

int main() {
  TestPartials();
  TestChunk();
  TestTileRegisters();
  TestDecodeCall();
  TestAppendCall();
  return failures;
}
