// What emitted CUDA C calls in the emulator's library. Everything here concerns the thread that is running.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

struct Dim {
  unsigned x, y, z;
};
struct Words {  // the four registers of an instruction's result; in two registers of the CPU's own
  uint32_t word[4];
};
struct Floats {
  float lane[4];
};

// Constant in a thread, so that the compiler may ask once.
__attribute__((const)) Dim thread_index();
__attribute__((const)) Dim block_index();
__attribute__((const)) Dim block_size();
__attribute__((const)) Dim grid_size();
__attribute__((const)) unsigned lane_index();

enum class Access { read, write, constant };  // constant: a read of what the kernel never writes

// An access of so many bytes, which have to be in one argument of the kernel, in shared memory or on the thread's own
// stack. Accesses by plain C++ are reported by the compiler (-fsanitize=thread); instructions call this themselves.
void check(const void* address, size_t bytes, Access access);
void check_aligned(const void* address, size_t bytes, Access access);
Words load(const void* address, size_t bytes, bool constant);
void store(void* address, Words words, size_t bytes);

// Shared memory. Addresses are generic ones, or 32-bit ones within the window.
void* dynamic_shared();
void* static_shared(const char* name, size_t bytes);
uint32_t shared_address(const void* generic);
char* generic_address(uint32_t shared);

// Warp-wide instructions: each returns when all lanes of its mask have come to the same one.
enum class Shuffle { indexed, up, down, exclusive_or };
enum class Vote { ballot, any, all };
uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, unsigned operand, unsigned width);
uint32_t vote(Vote kind, uint32_t mask, bool predicate);
uint32_t sum_of(uint32_t mask, uint32_t value);
void warp_barrier(uint32_t mask);
Words load_matrices(int count, bool transposed, const void* row);
uint32_t transpose_matrix(uint32_t fragment);
Floats mma_bf16(Words a, uint32_t b0, uint32_t b1, Floats c);
Floats mma_f16(Words a, uint32_t b0, uint32_t b1, Floats c);

// Barrier number id of a block, for so many threads; 0 is for all that have not left the kernel.
void block_barrier(unsigned id, unsigned threads);

// cp.async: the copy is made by the wait that releases it. Bytes past source_bytes become 0.
void copy_async(void* shared, const void* global, size_t bytes, size_t source_bytes);
void commit_copies();
void wait_for_copies(size_t groups_left);
void wait_for_all_copies();

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emulator
