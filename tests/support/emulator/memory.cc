// Which addresses a thread may use: an argument's, shared memory's, its own stack's.
#include <cstring>

#include "threads.h"

namespace emulator {
namespace {

const Argument* arguments;
size_t argument_count, last_argument;
constexpr char kWritten = 1, kConstant = 2;
std::vector<char> uses;  // of each argument, in this launch

bool is_inside(const Argument& argument, const char* address, size_t bytes) {
  return address >= argument.start && address + bytes <= argument.start + argument.bytes;
}

size_t distance(const Argument& argument, const char* address) {
  if (address < argument.start) return argument.start - address;
  return address < argument.start + argument.bytes ? 0 : address - (argument.start + argument.bytes);
}

// The argument that has these bytes. An error names the one that ends or begins nearest to them.
size_t argument_of(const char* address, size_t bytes, Access access) {
  if (last_argument < argument_count && is_inside(arguments[last_argument], address, bytes)) return last_argument;
  const Argument* nearest = nullptr;
  for (last_argument = 0; last_argument < argument_count; ++last_argument) {
    const Argument& argument = arguments[last_argument];
    if (is_inside(argument, address, bytes)) return last_argument;
    if (!nearest || distance(argument, address) < distance(*nearest, address)) nearest = &argument;
  }
  if (!nearest) fail("it %s %zu bytes at %p: the kernel has no arrays", verb(access), bytes, address);
  fail("it %s %zu bytes at byte %td of %s, which has %zu", verb(access), bytes, address - nearest->start, nearest->name,
       nearest->bytes);
}

void check_global(const char* address, size_t bytes, Access access) {
  size_t index = argument_of(address, bytes, access);
  if (access == Access::read) return;
  const Argument& argument = arguments[index];
  if (access == Access::write && !argument.writable)
    fail("it writes %zu bytes at byte %td of %s, which is read-only", bytes, address - argument.start, argument.name);
  uses[index] |= access == Access::write ? kWritten : kConstant;
  if (uses[index] == (kWritten | kConstant))
    fail("it %s %zu bytes at byte %td of %s, which the kernel both writes and reads by ld.global.nc", verb(access), bytes,
         address - argument.start, argument.name);
}

}  // namespace

void use_arguments(const Argument* those, size_t count) {
  arguments = those, argument_count = count, last_argument = 0;
  uses.assign(count, 0);
}

const char* verb(Access access) { return access == Access::write ? "writes" : "reads"; }

void check(const void* pointer, size_t bytes, Access access) {
  count_step();
  const char* address = static_cast<const char*>(pointer);
  if (is_shared(address)) return check_shared(address, bytes, access);
  if (address >= current->stack && address < current->stack + kStackBytes) return;
  check_global(address, bytes, access);
}

void check_aligned(const void* address, size_t bytes, Access access) {
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    fail("misaligned: it %s %zu bytes at %p", verb(access), bytes, address);
  check(address, bytes, access);
}

Words load(const void* address, size_t bytes, bool constant) {
  check_aligned(address, bytes, constant ? Access::constant : Access::read);
  Words words{};
  memcpy(words.word, address, bytes);
  return words;
}

void store(void* address, Words words, size_t bytes) {
  check_aligned(address, bytes, Access::write);
  memcpy(address, words.word, bytes);
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
