// What the fake driver of fake_cuda.cc knows: memory, streams and what waits on them, kernels, and failures to come.

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

namespace {

enum : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kNotInitialized = 3,
  kInvalidDevice = 101,
  kInvalidImage = 200,
  kInvalidContext = 201,
  kInvalidHandle = 400,
  kNotFound = 500,
  kIllegalAddress = 700,
  kCaptureUnsupported = 900,
};

struct Dim {
  unsigned x, y, z;
};

struct Argument {  // of the emulator
  const char* name;
  char* start;
  size_t bytes;
  int writable;
};

using Emulator = const char* (*)(void (*)(void**), void**, const Argument*, size_t, const Dim*, const Dim*, size_t, int);

struct Memory {
  size_t bytes;
  bool writable;
};

struct Kernel {
  std::string name;
  void (*entry)(void**);
  int parameters, shared_limit = 48 << 10;
};

struct Library {
  std::map<std::string, Kernel> kernels;
};

using Work = std::function<void()>;

struct Stream {
  std::vector<Work> waiting;
  bool capturing = false;
};

constexpr int kDevices = 2;
constexpr int kMultiprocessors = 4, kBlocksOfMultiprocessor = 2;  // thread blocks that one runs at once

struct World {
  std::mutex mutex;
  std::ostringstream log;
  std::string text;  // that log() has returned
  Emulator emulator = nullptr;
  int capability[kDevices] = {90, 90}, initialized = 0, reversed = 0;
  std::map<char*, Memory> memory;
  std::map<void*, Stream> streams;
  std::vector<Work> graph;
  std::deque<Library> libraries;
  std::map<std::string, int> failures;
} world;

thread_local std::vector<intptr_t> contexts;
thread_local int capture_mode = 0;

int Failure(const char* function) {
  const auto found = world.failures.find(function);
  if (found == world.failures.end()) return world.initialized || !strcmp(function, "cuInit") ? kSuccess : kNotInitialized;
  const int result = found->second;
  world.failures.erase(found);
  return result;
}

int Device() { return static_cast<int>(contexts.back()) - 1; }

bool AnyCapture() {
  for (const auto& [handle, stream] : world.streams) {
    if (stream.capturing) return true;
  }
  return false;
}

void Put(void* handle, Work work) {
  Stream& stream = world.streams[handle];
  (stream.capturing ? world.graph : stream.waiting).push_back(std::move(work));
}

void Run(std::vector<Work>& work) {
  for (size_t i = 0; i < work.size(); ++i) work[i]();
}

void RunAll() {
  for (auto& [handle, stream] : world.streams) {
    Run(stream.waiting);
    stream.waiting.clear();
  }
}

// New memory, full of NaNs. It is the device's from now on, or from when `use` says so.
char* NewMemory(size_t bytes) {
  char* const memory = static_cast<char*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  memset(memory, 0xFF, bytes);
  return memory;
}

// The device's memory from now on.
int Allocate(char** memory, size_t bytes) {
  *memory = NewMemory(bytes);
  world.memory[*memory] = {bytes, true};
  return kSuccess;
}

std::string Where(void* stream) {
  std::ostringstream text;
  text << " device=" << Device() << " stream=" << reinterpret_cast<uintptr_t>(stream);
  return text.str();
}

void Execute(const Kernel& kernel, std::vector<uint64_t> values, Dim grid, Dim block, unsigned shared) {
  std::vector<Argument> arguments;
  for (const auto& [start, memory] : world.memory) {
    arguments.push_back({"device memory", start, memory.bytes, memory.writable});
  }
  std::vector<void*> pointers;
  for (uint64_t& value : values) pointers.push_back(&value);
  const char* error = world.emulator(kernel.entry, pointers.data(), arguments.data(), arguments.size(), &grid, &block,
                                     shared, world.reversed);
  if (error != nullptr) world.log << "fault " << kernel.name << ": " << error << "\n";
}

}  // namespace

// How a function of the driver begins.
#define BEGIN(function)                                  \
  const std::lock_guard<std::mutex> lock(world.mutex); \
  if (const int failure = Failure(function)) return failure
#define NEEDS_CONTEXT() \
  if (contexts.empty()) return kInvalidContext

// What blocks or allocates at once may not be called while a stream is captured, unless the thread is relaxed.
#define UNSAFE() \
  if (AnyCapture() && capture_mode != 2) return kCaptureUnsupported
