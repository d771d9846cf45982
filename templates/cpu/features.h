// What the CPU that a call runs on has to have.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include "shared/errors.h"

namespace pa {

#if defined(__aarch64__)

// An instruction set that kernels may use: LLVM's name, and its bit of AT_HWCAP, or, from 64 on, of AT_HWCAP2.
struct InstructionSet {
  const char* name;
  int bit;

  constexpr InstructionSet(const char* name, int bit) : name(name), bit(bit) {}
  constexpr InstructionSet(std::nullptr_t) : name(nullptr), bit(0) {}
};

// What the system says of this CPU in the auxiliary vector of the process.
class CpuFlags {
 public:
  static constexpr const char* kPlace = "the auxiliary vector";
  bool is_known() const { return words_[0] != 0; }
  bool Has(const InstructionSet& set) const { return (words_[set.bit / 64] >> (set.bit % 64) & 1) != 0; }

 private:
  uint64_t words_[2] = {getauxval(AT_HWCAP), getauxval(AT_HWCAP2)};
};

#else

// An instruction set that kernels may use: LLVM's name, and Linux's where that is another.
struct InstructionSet {
  const char *name, *flag;

  constexpr InstructionSet(const char* name) : name(name), flag(name) {}
  constexpr InstructionSet(const char* name, const char* flag) : name(name), flag(flag) {}
};

// The line of /proc/cpuinfo that names the instruction sets of this CPU, with spaces around each. What the system does
// not save, or a virtual machine hides, it does not name.
class CpuFlags {
 public:
  static constexpr const char* kPlace = "/proc/cpuinfo";
  CpuFlags() {
    FILE* const file = std::fopen("/proc/cpuinfo", "re");
    size_t room = 0;
    ssize_t length = 0;
    while (file != nullptr && (length = getline(&line_, &room, file)) > 0 && std::strncmp(line_, "flags\t", 6) != 0) {
    }
    if (file != nullptr) std::fclose(file);
    is_known_ = length > 0;
    if (is_known_) line_[length - 1] = ' ';
  }
  CpuFlags(const CpuFlags&) = delete;
  CpuFlags& operator=(const CpuFlags&) = delete;
  ~CpuFlags() { std::free(line_); }

  bool is_known() const { return is_known_; }
  bool Has(const InstructionSet& set) const {
    char word[32];
    std::snprintf(word, sizeof word, " %s ", set.flag);
    return std::strstr(line_, word) != nullptr;
  }

 private:
  char* line_ = nullptr;
  bool is_known_ = false;
};

#endif

// Those of a list, which ends with nullptr, that this CPU does not have, with a space before each.
template <size_t count>
const char* MissingFeatures(const InstructionSet (&needed)[count]) {
  static char names[32 * count] = "";  // all of them
  const CpuFlags flags;
  if (!flags.is_known())
    Raise("RuntimeError", "target: expected to read in %s what this CPU has, and could not", CpuFlags::kPlace);
  char* end = names;
  for (const InstructionSet* each = needed; each->name != nullptr; ++each) {
    if (!flags.Has(*each)) end += std::snprintf(end, names + sizeof names - end, " %s", each->name);
  }
  return names;
}

// Refuse to run instructions that this CPU does not have.
template <size_t count>
void CheckCpuFeatures(const InstructionSet (&needed)[count]) {
  static const char* const missing = MissingFeatures(needed);
  if (*missing != '\0') {
    Raise("RuntimeError", "target: this module is built for a CPU with features that this one lacks:%s", missing);
  }
}

}  // namespace pa
