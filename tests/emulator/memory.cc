// Which addresses a thread may use, shared memory with its races, and cp.async.
//
// Shared memory is followed in granules of 2 bytes. Each knows its last writer and, for each warp, its last reader, as
// (count of the warp's clock, thread). An access that is not ordered after the ones it conflicts with is a race, but for
// a write after another's of what is there already: that one is known only once it has been made.
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
constexpr uint32_t kSharedBase = 1024;     // as a 32-bit address: 0 is none
constexpr size_t kGranule = 2, kGranules = kWindow / kGranule;
constexpr uint32_t kThreadBits = 11, kSeveral = (1 << kThreadBits) - 1;
constexpr uint32_t kInFlight = (1 << (32 - kThreadBits)) - 1, kLastCount = kInFlight - 1;

struct Range {
  const char* name;
  size_t offset, bytes;
};

char* window;
uint32_t writers[kGranules];
uint32_t readers[kMaxWarps][kGranules];
size_t dynamic_bytes;
std::map<const void*, Range> static_arrays;  // by the text of their declaration
size_t static_end;
const Argument* arguments;
size_t argument_count, last_argument;
size_t in_flight;  // copies
struct {
  size_t offset, bytes;
  uint32_t record;  // of the other write
  char before[16];
} unsettled;  // the current thread's write after another's, which may leave what is there

uint32_t record_of(const Thread& thread) { return warps[thread.warp].clock[thread.warp] << kThreadBits | thread.id; }
uint32_t thread_of(uint32_t record) { return record & kSeveral; }
uint32_t count_of(uint32_t record) { return record >> kThreadBits; }

// Whether what a thread of a warp did at record comes before what the current thread does now.
bool is_ordered(uint32_t record, unsigned warp) {
  if (thread_of(record) == current->id) return true;
  uint32_t seen = warps[current->warp].clock[warp];
  return warp == current->warp ? count_of(record) < seen : count_of(record) <= seen;
}

const char* verb(Access access) { return access == Access::read ? "reads" : "writes"; }

[[noreturn]] void fail_race(Access access, size_t bytes, size_t offset, const char* other, uint32_t record) {
  char who[64] = "several threads";
  if (thread_of(record) != kSeveral) snprintf(who, sizeof who, "thread %u", thread_of(record));
  fail("race: it %s %zu bytes at byte %zu of shared memory, which %s %s with no barrier between", verb(access), bytes,
       offset, who, other);
}

void check_shared(size_t offset, size_t bytes, Access access) {
  if (offset + bytes > dynamic_bytes) {
    bool inside = false;
    for (const auto& [key, array] : static_arrays)
      inside |= offset >= array.offset && offset + bytes <= array.offset + array.bytes;
    if (!inside)
      fail("it %s %zu bytes at byte %zu of shared memory, which has %zu", verb(access), bytes, offset, dynamic_bytes);
  }
  uint32_t record = record_of(*current), last_writer = record, last_reader = 0;
  uint32_t* own = readers[current->warp];
  for (size_t i = offset / kGranule; i <= (offset + bytes - 1) / kGranule; ++i) {
    uint32_t writer = writers[i];
    if (writer != last_writer) {
      if (count_of(writer) == kInFlight)
        fail("it %s %zu bytes at byte %zu of shared memory, where a cp.async of thread %u is in flight", verb(access),
             bytes, offset, thread_of(writer));
      if (!is_ordered(writer, thread_of(writer) / kLanes)) {
        if (access == Access::read || bytes > sizeof unsettled.before) fail_race(access, bytes, offset, "wrote", writer);
        unsettled.offset = offset, unsettled.bytes = bytes, unsettled.record = writer;
        memcpy(unsettled.before, window + offset, bytes);
      }
      last_writer = writer;
    }
    if (access == Access::read) {
      uint32_t reader = own[i];
      bool shares = count_of(reader) == count_of(record) && reader != record;
      own[i] = shares ? reader | kSeveral : record;
      continue;
    }
    for (unsigned warp = 0; warp < warp_count; ++warp) {
      uint32_t reader = readers[warp][i];
      if (reader == last_reader) continue;
      if (!is_ordered(reader, warp)) fail_race(access, bytes, offset, "read", reader);
      if (warp_count == 1) last_reader = reader;
    }
    writers[i] = record;
  }
}

bool is_inside(const Argument& argument, const char* address, size_t bytes) {
  return address >= argument.start && address + bytes <= argument.start + argument.bytes;
}

void check_global(const char* address, size_t bytes, Access access) {
  if (last_argument >= argument_count || !is_inside(arguments[last_argument], address, bytes)) {
    const Argument* nearest = nullptr;
    for (last_argument = 0; last_argument < argument_count; ++last_argument) {
      const Argument& argument = arguments[last_argument];
      if (is_inside(argument, address, bytes)) break;
      if (!nearest || std::abs(address - argument.start) < std::abs(address - nearest->start)) nearest = &argument;
    }
    if (last_argument == argument_count) {
      if (!nearest) fail("it %s %zu bytes at %p: the kernel has no arrays", verb(access), bytes, address);
      fail("it %s %zu bytes at byte %td of %s, which has %zu", verb(access), bytes, address - nearest->start,
           nearest->name, nearest->bytes);
    }
  }
  const Argument& argument = arguments[last_argument];
  if (access == Access::write && !argument.writable)
    fail("it writes %zu bytes at byte %td of %s, which is read-only", bytes, address - argument.start, argument.name);
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

void use_memory(const Argument* those, size_t count, size_t bytes) {
  if (!window) {
    size_t reserved = 2 * kWindow;  // so that it can begin at a multiple of its size
    void* memory = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort();
    window = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + kWindow - 1) & ~(kWindow - 1));
  }
  arguments = those, argument_count = count, last_argument = 0;
  dynamic_bytes = bytes;
  static_arrays.clear();
  static_end = (bytes + 1023) / 1024 * 1024 + 1024;  // a gap between the two kinds
}

void poison_shared() {
  unsettled.bytes = 0;
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

void settle_write() {
  size_t bytes = unsettled.bytes;
  unsettled.bytes = 0;
  if (bytes && memcmp(unsettled.before, window + unsettled.offset, bytes))
    fail_race(Access::write, bytes, unsettled.offset, "wrote", unsettled.record);
}

void check(const void* pointer, size_t bytes, Access access) {
  if (unsettled.bytes) settle_write();
  const char* address = static_cast<const char*>(pointer);
  if (address >= window && address < window + kWindow) return check_shared(address - window, bytes, access);
  if (address >= current->stack && address < current->stack + kStackBytes) return;
  check_global(address, bytes, access);
}

void check_aligned(const void* address, size_t bytes, Access access) {
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    fail("misaligned: it %s %zu bytes at %p", verb(access), bytes, address);
  check(address, bytes, access);
}

Words load(const void* address, size_t bytes) {
  check_aligned(address, bytes, Access::read);
  Words words{};
  memcpy(words.word, address, bytes);
  return words;
}

void store(void* address, Words words, size_t bytes) {
  check_aligned(address, bytes, Access::write);
  memcpy(address, words.word, bytes);
}

void* dynamic_shared() { return window; }

void* static_shared(const char* declaration, size_t bytes) {
  auto [place, is_new] = static_arrays.try_emplace(declaration, Range{declaration, static_end, bytes});
  if (is_new) {
    static_end += (bytes + 127) / 128 * 128 + 128;
    memset(window + place->second.offset, 0xff, bytes);
    if (dynamic_bytes + static_end > kMostShared) fail("more than %zu bytes of shared memory", kMostShared);
  }
  return window + place->second.offset;
}

uint32_t shared_address(const void* generic) {
  const char* address = static_cast<const char*>(generic);
  if (address < window || address >= window + kWindow) fail("%p is not an address of shared memory", generic);
  return address - window + kSharedBase;
}

char* generic_address(uint32_t shared) { return window + (shared - kSharedBase) % kWindow; }

void copy_async(void* shared, const void* global, size_t bytes, size_t source_bytes) {
  if (source_bytes > bytes) fail("cp.async of %zu bytes from a source of %zu", bytes, source_bytes);
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

// What the compiler calls at each access (-fsanitize=thread) and at a pointer that is not aligned for its type
// (-fsanitize=alignment).
#define HOOK(name, bytes, access) \
  extern "C" void __tsan_##name##bytes(void* address) { emulator::check(address, bytes, emulator::Access::access); }
#define HOOKS(bytes) \
  HOOK(read, bytes, read) \
  HOOK(write, bytes, write) \
  HOOK(unaligned_read, bytes, read) \
  HOOK(unaligned_write, bytes, write)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_read_range(void* address, size_t bytes) {
  emulator::check(address, bytes, emulator::Access::read);
}
extern "C" void __tsan_write_range(void* address, size_t bytes) {
  emulator::check(address, bytes, emulator::Access::write);
}
extern "C" void __ubsan_handle_type_mismatch_v1_abort(void* place, uintptr_t address) {
  struct Place {
    const char* file;
    uint32_t line, column;
    const void* type;
    unsigned char log_alignment, kind;
  };
  const Place& at = *static_cast<Place*>(place);
  emulator::fail("misaligned: %p at line %u is not a multiple of %u", reinterpret_cast<void*>(address), at.line,
                 1u << at.log_alignment);
}
