// The emulator's own view of a block: threads are fibers, one of which runs at a time.
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "runtime.h"

namespace emulator {

constexpr unsigned kLanes = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kLanes, kBarriers = 16;
constexpr size_t kStackBytes = 256 << 10;

struct Copy {  // a cp.async in flight
  char* to;
  const char* from;
  size_t bytes, source_bytes;
};

struct Thread {
  void* stack_pointer;
  char* stack;  // its lowest byte
  Dim index;
  unsigned id, warp, lane;
  const char* waits_at;  // nullptr while it can run
  std::deque<Copy> copies;
  std::deque<size_t> groups;  // how many of the copies each committed group has, oldest first
};

// A warp-wide instruction: run() sees the operands of the lanes of mask, each a pointer into that lane's stack.
struct Operation {
  const char* name;
  void (*run)(void** operands, uint32_t mask);
  bool aligned;  // needs lanes that have left the kernel too
};

struct Meeting {
  const Operation* operation;
  uint32_t mask, arrived;
  void* operands[kLanes];
};

struct Warp {
  uint32_t launched, runnable, exited;
  std::vector<Meeting> meetings;
  // A vector clock. Its own entry counts the barriers it has passed; another warp's is the last count of that warp
  // whose accesses it has seen. Lanes of a warp have seen each other's accesses of earlier counts.
  uint32_t clock[kMaxWarps];
};

extern Thread* current;
extern Warp warps[kMaxWarps];
extern unsigned warp_count;

// Meet the other lanes of mask at an operation. Returns when it has been run.
void meet(const Operation& operation, uint32_t mask, void* operands);
void count_step();  // fails after so many that the block will hardly end
std::string place(const Thread& thread);  // "thread 37 (warp 1, lane 5)"

// Memory, at the start of a launch and of each block.
struct Argument {
  const char* name;
  char* start;
  size_t bytes;
  int writable;
};
void use_arguments(const Argument* arguments, size_t count);
void use_shared(size_t dynamic_bytes);
void poison_shared();
bool is_shared(const char* address);
void check_shared(const char* address, size_t bytes, Access access);
const char* verb(Access access);  // "reads", "writes"
void pass_barrier(uint32_t warp_mask);  // all of these warps see what each of them has done before

}  // namespace emulator
