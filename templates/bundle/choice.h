// Which of a bundle's targets this CPU and system can run: the best one is chosen once, when the library is loaded.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/features.h"
#include "shared/errors.h"
#include "shared/ffi.h"

namespace pa {

// What a bundle has for a spec on a target.
struct Variant {
  const char* name;  // of its symbols
  TVMFFISafeCallType decode, attend, append_kv, plan, attend_plan;
  double scale;         // of scores, by default
  int64_t num_inputs;   // of the spec's functions
  bool by_attend;       // whether decode is a call of attend
  size_t kernel_bytes;  // of scratch that a thread's kernels need
};

// A target of a bundle.
struct Isa {
  const char* name;
  const InstructionSet* needs;  // ends with nullptr
  int (*ask)();                 // asks the system for leave to use it; 0, or an errno. nullptr: nothing is asked
};

// The choice among a bundle's targets, which stand in the order in which they are preferred.
class Choice {
 public:
  template <size_t kCount>
  explicit Choice(const Isa (&isas)[kCount]) {
    const CpuFlags flags;
    const char* const wanted = std::getenv("PA_ISA");
    if (!flags.is_known()) {
      kind_ = "RuntimeError";
      why_.Add("target: expected to read in %s what this CPU has, and could not", CpuFlags::kPlace);
      return;
    }
    for (size_t i = 0; i < kCount && chosen_ < 0; ++i) {
      if (wanted != nullptr && std::strcmp(wanted, isas[i].name) != 0) continue;
      Long lacks;
      AddMissing(isas[i], flags, lacks);
      if (lacks.empty()) chosen_ = static_cast<int>(i);
      missing_.Add("%s%s lacks%s", missing_.empty() ? "" : "; ", isas[i].name, lacks.c_str());
    }
    if (chosen_ >= 0) return;
    if (missing_.empty()) {  // no target has the name
      kind_ = "ValueError";
      why_.Add("PA_ISA: expected a target of this bundle, one of");
      for (const Isa& isa : isas) why_.Add(" %s", isa.name);
      why_.Add(", got %s", wanted);
    } else {
      kind_ = "RuntimeError";
      why_.Add("target: this bundle is built for CPUs with features that this one lacks: for %s", missing_.c_str());
    }
  }
  // The number of the target, or -1.
  int chosen() const { return chosen_; }
  // Throws where there is none.
  void Check() const {
    if (chosen_ < 0) Raise(kind_, "%s", why_.c_str());
  }

 private:
  // A text of the length of an error's.
  class Long {
   public:
    [[gnu::format(printf, 2, 3)]] void Add(const char* format, ...) {
      va_list values;
      va_start(values, format);
      const int wanted = std::vsnprintf(text_ + size_, sizeof text_ - size_, format, values);
      va_end(values);
      size_ = std::min<int>(size_ + wanted, sizeof text_ - 1);
    }
    const char* c_str() const { return text_; }
    bool empty() const { return size_ == 0; }

   private:
    char text_[480] = "";
    int size_ = 0;
  };

  static void AddMissing(const Isa& isa, const CpuFlags& flags, Long& lacks) {
    for (const InstructionSet* each = isa.needs; each->name != nullptr; ++each) {
      if (!flags.Has(*each)) lacks.Add(" %s", each->name);
    }
    if (!lacks.empty() || isa.ask == nullptr) return;
    if (const int error = isa.ask()) lacks.Add(" leave of the system to use it: %s", std::strerror(error));
  }

  int chosen_ = -1;
  const char* kind_ = "";
  Long missing_, why_;
};

}  // namespace pa
