// Warp-wide instructions. Fragments are laid out as the PTX ISA says for mma.m16n8k16, ldmatrix and movmatrix.
#include <algorithm>
#include <cstring>

#include "floats.h"
#include "threads.h"

namespace emulator {
namespace {

size_t bank_conflicts;

struct ShuffleOperands {
  uint64_t value;
  unsigned operand, width;
  uint64_t result;
};

template <Shuffle kind>
void run_shuffle(void** operands, uint32_t mask) {
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    auto& own = *static_cast<ShuffleOperands*>(operands[lane]);
    int first = lane & ~int(own.width - 1), last = first + own.width - 1, from = lane, by = own.operand;
    if (kind == Shuffle::indexed) from = first + (by & int(own.width - 1));
    if (kind == Shuffle::up && lane - by >= first) from = lane - by;
    if (kind == Shuffle::down && lane + by <= last) from = lane + by;
    if (kind == Shuffle::exclusive_or && (lane ^ by) <= last) from = lane ^ by;
    if (!(mask >> from & 1)) fail("lane %d shuffles from lane %d, which does not take part", lane, from);
    own.result = static_cast<ShuffleOperands*>(operands[from])->value;
  }
}

struct VoteOperands {
  bool predicate;
  uint32_t result;
};

template <Vote kind>
void run_vote(void** operands, uint32_t mask) {
  uint32_t ballot = 0;
  for (uint32_t rest = mask; rest; rest &= rest - 1)
    if (static_cast<VoteOperands*>(operands[__builtin_ctz(rest)])->predicate) ballot |= rest & -rest;
  uint32_t result = kind == Vote::ballot ? ballot : kind == Vote::any ? ballot != 0 : ballot == mask;
  for (uint32_t rest = mask; rest; rest &= rest - 1)
    static_cast<VoteOperands*>(operands[__builtin_ctz(rest)])->result = result;
}

struct SumOperands {
  uint32_t value, result;
};

void run_sum(void** operands, uint32_t mask) {
  uint32_t sum = 0;
  for (uint32_t rest = mask; rest; rest &= rest - 1) sum += static_cast<SumOperands*>(operands[__builtin_ctz(rest)])->value;
  for (uint32_t rest = mask; rest; rest &= rest - 1) static_cast<SumOperands*>(operands[__builtin_ctz(rest)])->result = sum;
}

void run_warp_barrier(void**, uint32_t) { pass_barrier(1u << current->warp); }

struct LoadOperands {
  const void* row;
  Words result;
};

// A matrix's eight rows come at once if no two of them, unless they are one, have the same place in 128 bytes.
void count_bank_conflicts(void** operands) {
  int passes[8] = {}, most = 1;
  for (int row = 0; row < 8; ++row) {
    const void* address = static_cast<LoadOperands*>(operands[row])->row;
    bool is_new = true;
    for (int other = 0; other < row; ++other) is_new &= static_cast<LoadOperands*>(operands[other])->row != address;
    if (is_new) most = std::max(most, ++passes[reinterpret_cast<uintptr_t>(address) / 16 % 8]);
  }
  bank_conflicts += most - 1;
}

// Row r of matrix m is at the address of lane 8 m + r. Lane l gets elements 2 (l % 4) and the next of row l / 4.
template <int count, bool transposed>
void run_load(void** operands, uint32_t) {
  uint16_t matrix[8][8];
  Thread* last = current;
  for (int m = 0; m < count; ++m) {
    for (int row = 0; row < 8; ++row) {
      const void* address = static_cast<LoadOperands*>(operands[8 * m + row])->row;
      current = last + (8 * m + row - int(last->lane));  // the row is read in its lane's name
      check_aligned(address, 16, Access::read);
      memcpy(matrix[row], address, 16);
    }
    count_bank_conflicts(operands + 8 * m);
    for (int lane = 0; lane < 32; ++lane) {
      int row = lane / 4, column = lane % 4 * 2;
      uint32_t low = transposed ? matrix[column][row] : matrix[row][column];
      uint32_t high = transposed ? matrix[column + 1][row] : matrix[row][column + 1];
      static_cast<LoadOperands*>(operands[lane])->result.word[m] = low | high << 16;
    }
  }
  current = last;
}

// A fragment holds elements 2 (l % 4) and the next of row l / 4, here of the matrix and then of its transpose.
void run_transpose(void** operands, uint32_t) {
  uint16_t matrix[8][8];
  for (int lane = 0; lane < 32; ++lane) memcpy(&matrix[lane / 4][lane % 4 * 2], operands[lane], 4);
  for (int lane = 0; lane < 32; ++lane) {
    int row = lane / 4, column = lane % 4 * 2;
    uint16_t pair[2] = {matrix[column][row], matrix[column + 1][row]};
    memcpy(operands[lane], pair, 4);
  }
}

struct MmaOperands {
  uint32_t a[4], b[2];
  float c[4];
};

template <float (*widen)(uint16_t)>
void put_pair(float* to, size_t stride, uint32_t pair) {
  to[0] = widen(uint16_t(pair));
  to[stride] = widen(uint16_t(pair >> 16));
}

// d[16][8] = a[16][16] b[16][8] + c. Products are exact in float32 and are added in it, k after k.
template <float (*widen)(uint16_t)>
void run_mma(void** operands, uint32_t) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<MmaOperands*>(operands[lane]);
    int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) put_pair<widen>(&a[group + i % 2 * 8][pair + i / 2 * 8], 1, own.a[i]);
    for (int i = 0; i < 2; ++i) put_pair<widen>(&b[pair + i * 8][group], 8, own.b[i]);
    for (int i = 0; i < 2; ++i) memcpy(&d[group + i * 8][pair], own.c + 2 * i, 8);
  }
  for (int row = 0; row < 16; ++row) {
    float sums[8];
    memcpy(sums, d[row], sizeof sums);
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) sums[column] += a[row][k] * b[k][column];
    memcpy(d[row], sums, sizeof sums);
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 2; ++i)
      memcpy(static_cast<MmaOperands*>(operands[lane])->c + 2 * i, &d[lane / 4 + i * 8][lane % 4 * 2], 8);
}

template <float (*widen)(uint16_t)>
Floats mma(const Operation& operation, Words a, uint32_t b0, uint32_t b1, Floats c) {
  MmaOperands operands;
  memcpy(operands.a, a.word, sizeof operands.a);
  operands.b[0] = b0, operands.b[1] = b1;
  memcpy(operands.c, c.lane, sizeof operands.c);
  meet(operation, ~0u, &operands);
  Floats d;
  memcpy(d.lane, operands.c, sizeof d.lane);
  return d;
}

}  // namespace

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, unsigned operand, unsigned width) {
  static const Operation operations[] = {{"__shfl_sync", run_shuffle<Shuffle::indexed>, false},
                                         {"__shfl_up_sync", run_shuffle<Shuffle::up>, false},
                                         {"__shfl_down_sync", run_shuffle<Shuffle::down>, false},
                                         {"__shfl_xor_sync", run_shuffle<Shuffle::exclusive_or>, false}};
  if (!width || width > kLanes || (width & (width - 1))) fail("a shuffle of width %u", width);
  ShuffleOperands operands{value, operand, width, 0};
  meet(operations[int(kind)], mask, &operands);
  return operands.result;
}

uint32_t vote(Vote kind, uint32_t mask, bool predicate) {
  static const Operation operations[] = {{"__ballot_sync", run_vote<Vote::ballot>, false},
                                         {"__any_sync", run_vote<Vote::any>, false},
                                         {"__all_sync", run_vote<Vote::all>, false}};
  VoteOperands operands{predicate, 0};
  meet(operations[int(kind)], mask, &operands);
  return operands.result;
}

uint32_t sum_of(uint32_t mask, uint32_t value) {
  static const Operation operation{"__reduce_add_sync", run_sum, false};
  SumOperands operands{value, 0};
  meet(operation, mask, &operands);
  return operands.result;
}

void warp_barrier(uint32_t mask) {
  static const Operation operation{"__syncwarp", run_warp_barrier, false};
  meet(operation, mask, nullptr);
}

Words load_matrices(int count, bool transposed, const void* row) {
  static const Operation operations[] = {
      {"ldmatrix.x1", run_load<1, false>, true}, {"ldmatrix.x1.trans", run_load<1, true>, true},
      {"ldmatrix.x2", run_load<2, false>, true}, {"ldmatrix.x2.trans", run_load<2, true>, true},
      {"ldmatrix.x4", run_load<4, false>, true}, {"ldmatrix.x4.trans", run_load<4, true>, true}};
  LoadOperands operands{row, {}};
  meet(operations[count / 2 * 2 + transposed], ~0u, &operands);
  return operands.result;
}

uint32_t transpose_matrix(uint32_t fragment) {
  static const Operation operation{"movmatrix", run_transpose, true};
  meet(operation, ~0u, &fragment);
  return fragment;
}

Floats mma_bf16(Words a, uint32_t b0, uint32_t b1, Floats c) {
  static const Operation operation{"mma.m16n8k16.bf16", run_mma<widen_bf16>, true};
  return mma<widen_bf16>(operation, a, b0, b1, c);
}

Floats mma_f16(Words a, uint32_t b0, uint32_t b1, Floats c) {
  static const Operation operation{"mma.m16n8k16.f16", run_mma<widen_f16>, true};
  return mma<widen_f16>(operation, a, b0, b1, c);
}

extern "C" size_t emulator_bank_conflicts() { return bank_conflicts; }

}  // namespace emulator
