// A call of the C interface: its structs become the arguments that entry points take, and what they throw a status.
#pragma once

#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <cstdio>
#include <cstring>

#pragma GCC visibility push(default)
#include "bundle/pa.h"
#pragma GCC visibility pop

#include "bundle/choice.h"
#include "cpu/cpu_set.h"
#include "cpu/directions.h"
#include "cpu/kernel_call.h"
#include "shared/arrays.h"

namespace pa {

// What went wrong in the call that this thread makes, where entry points say it as they would to tvm-ffi.
struct Failure {
  const char* kind;
  char message[sizeof(pa_error::message)];
};
inline thread_local Failure failure;

// The text that an entry point has returned, for the call that asked for it.
struct Returned {
  void (*take)(void* to, const char* text, size_t size);
  void* to;
};
inline thread_local Returned returned;

// An entry point's arguments, in its order. Arrays are none or DLPack's, and apart from the caller's workspace.
class Arguments {
 public:
  Arguments() = default;
  Arguments(const void* workspace, size_t workspace_size)
      : workspace_(reinterpret_cast<uintptr_t>(workspace)), workspace_size_(workspace_size) {}

  // Returns the array; nullptr of none.
  const DLTensor* Add(const char* name, const pa_tensor& given) {
    constexpr int kMostRank = 8;  // of a function's input
    if (given.dtype == PA_NONE) return Add(TVMFFIAny{}), nullptr;
    if (given.rank < 0 || given.rank > kMostRank || (given.rank > 0 && given.shape == nullptr)) {
      Raise("ValueError", "%s: expected a rank from 0 to %d, and as many extents, got rank %d%s", name, kMostRank,
            given.rank, given.shape == nullptr ? " and no shape" : "");
    }
    for (int i = 0; i < given.rank; ++i) {
      if (given.shape[i] < 0) {
        Raise("ValueError", "%s: expected extents from 0 on, got %s", name, ListText(given.shape, given.rank).c_str());
      }
    }
    DLTensor& tensor = tensors_[count_];
    tensor = {given.data,
              {kDLCPU, 0},
              given.rank,
              DTypeOf(name, given),
              const_cast<int64_t*>(given.shape),
              const_cast<int64_t*>(given.strides),
              0};
    if (workspace_size_ != 0) CheckApart(name, tensor);
    TVMFFIAny any{};
    any.type_index = kTVMFFIDLTensorPtr;
    any.v_ptr = &tensor;
    Add(any);
    return &tensor;
  }
  void AddInputs(const pa_tensor* inputs, int64_t count, int64_t expected) {
    if (count != expected || (count > 0 && inputs == nullptr)) {
      Raise("TypeError", "inputs: expected %" PRId64 " arrays, those of the spec, got %" PRId64 "%s", expected, count,
            inputs == nullptr ? " and NULL" : "");
    }
    for (int64_t i = 0; i < count; ++i) {
      Text name;
      Add(name.Add("inputs[%" PRId64 "]", i).c_str(), inputs[i]);
    }
  }
  void AddInt(int64_t value) { Add(Packed(value)); }
  void AddFloat(double value) {
    TVMFFIAny any{};
    any.type_index = kTVMFFIFloat;
    any.v_float64 = value;
    Add(any);
  }
  // Run an entry point with them.
  int Call(TVMFFISafeCallType function) {
    TVMFFIAny result{};
    return function(nullptr, any_, count_, &result);
  }

 private:
  static constexpr int kMost = 64;

  void Add(const TVMFFIAny& any) { any_[count_++] = any; }
  // Addresses that lie apart have a distance, modulo their number, of the lower one's size at least.
  void CheckApart(const char* name, const DLTensor& given) const {
    uint64_t contiguous = 1, bits = 0, below = 0, above = 1;
    for (int i = given.ndim - 1; i >= 0; --i) {
      const int64_t extent = given.shape[i];
      const int64_t stride = given.strides != nullptr ? given.strides[i] : static_cast<int64_t>(contiguous);
      if (extent == 0) return;
      if (extent == 1) continue;  // never stepped over
      const uint64_t reach = (extent - 1) * static_cast<uint64_t>(stride);
      (stride < 0 ? below : above) += reach;
      contiguous *= extent;
      bits |= BitsOf(extent, stride);
    }
    if (bits >= kFarBits) CheckFits(name, given);
    const uint64_t itemsize = given.dtype.bits / 8, size = (above - below) * itemsize;
    const uintptr_t distance = reinterpret_cast<uintptr_t>(given.data) + below * itemsize - workspace_;
    if (distance >= workspace_size_ && -distance >= size) return;
    const auto first = static_cast<int64_t>(distance);
    Raise("ValueError",
          "workspace: expected memory apart from %s's bytes [%" PRId64 ", %" PRId64 "), got bytes [0, %zu)", name,
          first, first + static_cast<int64_t>(size), workspace_size_);
  }
  static DLDataType DTypeOf(const char* name, const pa_tensor& given) {
    static constexpr DLDataType kTypes[] = {
        {kDLFloat, 32, 1}, {kDLFloat, 16, 1}, {kDLBfloat, 16, 1}, {kDLFloat8_e4m3fn, 8, 1}, {kDLFloat8_e5m2, 8, 1},
        {kDLInt, 8, 1},    {kDLInt, 32, 1},   {kDLInt, 64, 1},    {kDLBool, 8, 1},          {kDLUInt, 8, 1},
        {kDLFloat, 64, 1}, {kDLInt, 16, 1},   {kDLUInt, 16, 1},   {kDLUInt, 32, 1},         {kDLUInt, 64, 1}};
    static_assert(sizeof kTypes / sizeof *kTypes == PA_UINT64, "from PA_FLOAT32 on");
    if (given.dtype < 0 || given.dtype > PA_UINT64) {
      Raise("TypeError", "%s: expected a pa_dtype, got %d", name, given.dtype);
    }
    return kTypes[given.dtype - 1];
  }

  TVMFFIAny any_[kMost];
  DLTensor tensors_[kMost];
  int count_ = 0;
  uintptr_t workspace_ = 0;
  size_t workspace_size_ = 0;  // 0: there is none
};

// Whether calls may still run: not since the library is being unloaded, or the process ends.
class Gate {
 public:
  bool Enter() {
    ++calls_;
    if (!closed_) return true;
    --calls_;
    return false;
  }
  void Leave() { --calls_; }
  // Whether no call runs. None will.
  bool Close() {
    closed_ = true;
    return calls_ == 0;
  }

 private:
  std::atomic<int64_t> calls_{0};
  std::atomic<bool> closed_{false};
};

inline Gate gate;

inline pa_status StatusOf(const char* kind) {
  static constexpr const char* kKinds[] = {"TypeError", "ValueError", "IndexError", "RuntimeError", "MemoryError"};
  for (int i = 0; i < PA_MEMORY_ERROR; ++i) {
    if (std::strcmp(kind, kKinds[i]) == 0) return static_cast<pa_status>(i + 1);
  }
  return PA_RUNTIME_ERROR;
}

// Run the body of a function of the C interface; what it throws, or an entry point has said, becomes a status.
template <typename Body>
pa_status Answer(pa_error* error, const Body& body) {
  if (error != nullptr) error->message[0] = '\0';
  const auto say = [&](const char* kind, const char* message) {
    if (error != nullptr) std::snprintf(error->message, sizeof error->message, "%s", message);
    return StatusOf(kind);
  };
  if (!gate.Enter()) return say("RuntimeError", "library: expected one that is loaded, got one that is being unloaded");
  pa_status status = PA_OK;
  try {
    if (body() != 0) status = say(failure.kind, failure.message);
  } catch (const Error& thrown) {
    status = say(thrown.kind, thrown.message);
  } catch (const std::bad_alloc&) {
    status = say("MemoryError", "no memory for the call");
  }
  gate.Leave();
  return status;
}

template <typename Pointer>
Pointer NotNull(const char* name, Pointer given) {
  if (given == nullptr) Raise("TypeError", "%s: expected a pointer, got NULL", name);
  return given;
}

// The CPUs that the thread could use that loaded the library: how many, and the number of their set.
struct DefaultCpus {
  int64_t count = 1, number = 0;

  DefaultCpus() {
    cpu_set_t mask;
    if (sched_getaffinity(0, sizeof mask, &mask) != 0) return;
    int32_t cpus[CPU_SETSIZE];
    int found = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &mask)) cpus[found++] = cpu;
    }
    if (found == 0) return;
    count = found;
    number = CpuSet::NumberOf(cpus, found);
  }
};

// Threads that a call may use, by the number given for them; 0 stands for one on each CPU.
inline int64_t CheckNumThreads(int64_t given, int64_t num_cpus) {
  if (given < 0) Raise("ValueError", "num_threads: expected a number from 0 on, got %" PRId64, given);
  return given == 0 ? num_cpus : given;
}

// The last arguments of an entry point: its threads, and that bfloat16 is called so.
inline void AddThreads(Arguments& arguments, const pa_options& options, const DefaultCpus& cpus) {
  constexpr int32_t kMostCpu = (1 << 16) - 1;
  int64_t number = cpus.number, count = cpus.count;
  if (options.cpus == nullptr && options.num_cpus != 0) {
    Raise("ValueError", "cpus: expected num_cpus numbers, %d, got NULL", options.num_cpus);
  }
  if (options.cpus != nullptr) {
    count = options.num_cpus;
    if (count < 1) Raise("ValueError", "cpus: expected one CPU at least, got %" PRId64, count);
    for (int64_t i = 0; i < count; ++i) {
      const bool ascends = options.cpus[i] > (i == 0 ? -1 : options.cpus[i - 1]);
      if (!ascends || options.cpus[i] > kMostCpu) {
        Raise("ValueError", "cpus: expected numbers from 0 to %d, ascending, got %d at position %" PRId64, kMostCpu,
              options.cpus[i], i);
      }
    }
    number = CpuSet::NumberOf(options.cpus, count);
  }
  arguments.AddInt(CheckNumThreads(options.num_threads, count));
  arguments.AddInt(options.threading);
  arguments.AddInt(number);
  arguments.AddInt(0);
}

// What the options of a call direct, for as long as it runs.
class Directed {
 public:
  Directed(const pa_options& options, size_t kernel_bytes, size_t* measured)
      : given_{options.parallel_for, options.parallel_context, kernel_bytes,
               options.workspace != nullptr && measured == nullptr, measured != nullptr},
        measured_(measured) {
    if (options.workspace == nullptr && options.workspace_size != 0 && measured == nullptr) {
      Raise("ValueError", "workspace: expected memory of workspace_size bytes, %zu, got NULL", options.workspace_size);
    }
    if (given_.is_given && reinterpret_cast<uintptr_t>(options.workspace) % 64 != 0) {
      Raise("ValueError", "workspace: expected an address that is a multiple of 64, got %p", options.workspace);
    }
    char* const memory = given_.is_given ? static_cast<char*>(options.workspace) : nullptr;
    before_ = call_workspace.Use(memory, options.workspace_size);
    directions = given_.parallel_for != nullptr || given_.is_given || given_.measures ? &given_ : nullptr;
  }
  Directed(const Directed&) = delete;
  Directed& operator=(const Directed&) = delete;
  ~Directed() {
    if (measured_ != nullptr) *measured_ = call_workspace.most();
    call_workspace.UseAgain(before_);
    directions = outer_;
  }
  // Run an entry point.
  int Call(Arguments& arguments, TVMFFISafeCallType function, const pa_options& options) const {
    const int status = arguments.Call(function);
    if (status != 0 && given_.is_given && std::strcmp(failure.kind, "MemoryError") == 0) {
      Raise("ValueError", "workspace: expected as many bytes as the call needs, which a function says, got %zu",
            options.workspace_size);
    }
    return status;
  }

 private:
  const Directions given_;
  size_t* const measured_;
  const Directions* const outer_ = directions;  // of a call that this thread is within, in a caller's parallel_for
  ScratchStack::Given before_;
};

}  // namespace pa
