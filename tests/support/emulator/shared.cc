// Shared memory, its races, and cp.async.
//
// Shared memory is followed in granules of 2 bytes. Each knows its last writer and, for each warp, its last reader, as
// (count of the warp's clock, thread). An access that is not ordered after the ones it conflicts with is a race, of
// equal values too.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "threads.h"

namespace emulator {
namespace {

constexpr size_t kWindow = 256 << 10;      // addresses that belong to shared memory
constexpr size_t kMostShared = 227 << 10;  // of one block on sm_90
constexpr size_t kGap = 1024;              // between dynamic and static shared memory
constexpr uint32_t kSharedBase = 1024;     // as a 32-bit address: 0 is none
constexpr size_t kGranule = 2, kGranules = kWindow / kGranule;
constexpr uint32_t kThreadBits = 11, kSeveral = (1 << kThreadBits) - 1;
constexpr uint32_t kInFlight = (1 << (32 - kThreadBits)) - 1, kLastCount = kInFlight - 1;

struct Range {
  size_t offset, bytes;
};

char* window;
uint32_t writers[kGranules];
uint32_t readers[kMaxWarps][kGranules];
size_t dynamic_bytes;
std::map<const void*, Range> static_arrays;  // by the text of their declaration
size_t static_end;
size_t in_flight;  // copies

uint32_t record_of(const Thread& thread) { return warps[thread.warp].clock[thread.warp] << kThreadBits | thread.id; }
uint32_t thread_of(uint32_t record) { return record & kSeveral; }
uint32_t count_of(uint32_t record) { return record >> kThreadBits; }

// Whether what a thread of a warp did at record comes before what the current thread does now.
bool is_ordered(uint32_t record, unsigned warp) {
  if (thread_of(record) == current->id) return true;
  uint32_t seen = warps[current->warp].clock[warp];
  return warp == current->warp ? count_of(record) < seen : count_of(record) <= seen;
}

[[noreturn]] void fail_race(Access access, size_t bytes, size_t offset, const char* other, uint32_t record) {
  char who[64] = "several threads";
  if (thread_of(record) != kSeveral) snprintf(who, sizeof who, "thread %u", thread_of(record));
  fail("race: it %s %zu bytes at byte %zu of shared memory, which %s %s with no barrier between", verb(access), bytes,
       offset, who, other);
}

void release(size_t count) {
  for (; count; --count) {
    const Copy& copy = current->copies.front();
    size_t offset = copy.to - window;
    memcpy(copy.to, copy.from, copy.source_bytes);
    memset(copy.to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
    std::fill_n(writers + offset / kGranule, copy.bytes / kGranule, record_of(*current));
    current->copies.pop_front();
    --in_flight;
  }
}

size_t grouped_copies() {
  size_t count = 0;
  for (size_t group : current->groups) count += group;
  return count;
}

}  // namespace

void use_shared(size_t bytes) {
  if (!window) {
    size_t reserved = 2 * kWindow;  // so that it can begin at a multiple of its size
    void* memory = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort();
    window = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + kWindow - 1) & ~(kWindow - 1));
  }
  dynamic_bytes = bytes;
  static_arrays.clear();
  static_end = (bytes + 1023) / 1024 * 1024 + kGap;
}

void poison_shared() {
  memset(window, 0xff, static_end);  // a NaN in every type
  uint32_t last = 0;
  for (Warp& warp : warps) last = std::max(last, *std::max_element(warp.clock, warp.clock + kMaxWarps));
  if (in_flight || last > kLastCount / 2) {  // copies that the last block did not wait for; clocks about to run over
    in_flight = 0;
    memset(writers, 0, sizeof writers);
    memset(readers, 0, sizeof readers);
    for (Warp& warp : warps) memset(warp.clock, 0, sizeof warp.clock);
  }
  pass_barrier(~0u);
}

void pass_barrier(uint32_t warp_mask) {
  uint32_t seen[kMaxWarps] = {};
  for (uint32_t rest = warp_mask; rest; rest &= rest - 1)
    for (unsigned i = 0; i < kMaxWarps; ++i) seen[i] = std::max(seen[i], warps[__builtin_ctz(rest)].clock[i]);
  for (uint32_t rest = warp_mask; rest; rest &= rest - 1) {
    Warp& warp = warps[__builtin_ctz(rest)];
    std::copy(seen, seen + kMaxWarps, warp.clock);
    if (++warp.clock[&warp - warps] >= kLastCount) fail("more than %u barriers in a block", kLastCount / 2);
  }
}

bool is_shared(const char* address) { return address >= window && address < window + kWindow; }

void check_shared(const char* address, size_t bytes, Access access) {
  size_t offset = address - window;
  if (offset + bytes > dynamic_bytes) {
    bool inside = false;
    for (const auto& [key, array] : static_arrays)
      inside |= offset >= array.offset && offset + bytes <= array.offset + array.bytes;
    if (!inside)
      fail("it %s %zu bytes at byte %zu of shared memory, which has %zu", verb(access), bytes, offset, dynamic_bytes);
  }
  uint32_t record = record_of(*current), last_writer = record;
  uint32_t* own = readers[current->warp];
  for (size_t i = offset / kGranule; i <= (offset + bytes - 1) / kGranule; ++i) {
    uint32_t writer = writers[i];
    if (writer != last_writer) {
      if (count_of(writer) == kInFlight)
        fail("it %s %zu bytes at byte %zu of shared memory, where a cp.async of thread %u is in flight", verb(access),
             bytes, offset, thread_of(writer));
      if (!is_ordered(writer, thread_of(writer) / kLanes)) fail_race(access, bytes, offset, "wrote", writer);
      last_writer = writer;
    }
    if (access != Access::write) {
      uint32_t reader = own[i];
      bool shares = count_of(reader) == count_of(record) && reader != record;
      own[i] = shares ? reader | kSeveral : record;
      continue;
    }
    for (unsigned warp = 0; warp < warp_count; ++warp) {
      uint32_t reader = readers[warp][i];
      if (!is_ordered(reader, warp)) fail_race(access, bytes, offset, "read", reader);
    }
    writers[i] = record;
  }
}

void* dynamic_shared() { return window; }

void* static_shared(const char* declaration, size_t bytes) {
  auto [place, is_new] = static_arrays.try_emplace(declaration, Range{static_end, bytes});
  if (is_new) {
    static_end += (bytes + 127) / 128 * 128 + 128;
    memset(window + place->second.offset, 0xff, bytes);
    if (static_end > kMostShared + 2 * kGap) fail("more than %zu bytes of shared memory", kMostShared);
  }
  return window + place->second.offset;
}

uint32_t shared_address(const void* generic) {
  const char* address = static_cast<const char*>(generic);
  if (!is_shared(address)) fail("%p is not an address of shared memory", generic);
  return address - window + kSharedBase;
}

char* generic_address(uint32_t shared) { return window + (shared - kSharedBase) % kWindow; }

void copy_async(void* shared, const void* global, size_t bytes, size_t source_bytes) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async of %zu bytes", bytes);
  if (source_bytes > bytes) fail("cp.async of %zu bytes from a source of %zu", bytes, source_bytes);
  if (is_shared(static_cast<const char*>(global))) fail("cp.async from shared memory");
  if (reinterpret_cast<uintptr_t>(global) % bytes) fail("misaligned: cp.async of %zu bytes from %p", bytes, global);
  if (source_bytes) check(global, source_bytes, Access::read);
  check_aligned(shared, bytes, Access::write);
  char* to = static_cast<char*>(shared);
  memset(to, 0xff, bytes);
  std::fill_n(writers + (to - window) / kGranule, bytes / kGranule, kInFlight << kThreadBits | current->id);
  ++in_flight;
  current->copies.push_back({to, static_cast<const char*>(global), bytes, source_bytes});
}

void commit_copies() { current->groups.push_back(current->copies.size() - grouped_copies()); }

void wait_for_copies(size_t groups_left) {
  for (; current->groups.size() > groups_left; current->groups.pop_front()) release(current->groups.front());
}

void wait_for_all_copies() {
  release(current->copies.size());
  current->groups.clear();
}

}  // namespace emulator
