// Fibers, the meetings of a warp, barriers, and the launch of a grid.
#include "threads.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulator {

Thread* current;
Warp warps[kMaxWarps];
unsigned warp_count;

namespace {

struct Barrier {
  unsigned expected, arrived;  // expected 0: all that have not left
  uint32_t waiting[kMaxWarps];
};

using Kernel = void (*)(void**);

Thread threads[kMaxThreads];
unsigned thread_count, exited_count;
size_t steps;  // of the block
constexpr size_t kMostSteps = 50'000'000;
Barrier barriers[kBarriers];
Dim block, block_dim, grid_dim;
Kernel kernel;
void** kernel_arguments;
bool reversed;  // last warps and lanes first
void* main_stack_pointer;
std::string failure;

unsigned pick(uint32_t lanes) { return reversed ? 31 - __builtin_clz(lanes) : __builtin_ctz(lanes); }

Thread* next_thread() {
  if (warps[current->warp].runnable) return &threads[current->warp * kLanes + pick(warps[current->warp].runnable)];
  for (unsigned i = 0; i < warp_count; ++i) {
    unsigned warp = reversed ? warp_count - 1 - i : i;
    if (warps[warp].runnable) return &threads[warp * kLanes + pick(warps[warp].runnable)];
  }
  return nullptr;
}

// Save this place and go on at another. A jump, because returns are predicted: threads that meet call the same
// functions, whose returns then come as the processor expects them.
__attribute__((noinline)) void switch_stacks(void** saved, void* to) {
  asm volatile(
      "pushq %%rbp\n"
      "leaq 1f(%%rip), %%rax\n"
      "pushq %%rax\n"
      "movq %%rsp, (%0)\n"
      "movq %1, %%rsp\n"
      "popq %%rax\n"
      "jmp *%%rax\n"
      "1: popq %%rbp\n"
      : "+r"(saved), "+r"(to)
      :
      : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc", "xmm0", "xmm1",
        "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14",
        "xmm15");
}

// Let another thread run until this one can again.
void suspend() {
  Thread* from = current;
  Thread* next = next_thread();
  if (next == from) return;
  current = next;
  switch_stacks(&from->stack_pointer, next ? next->stack_pointer : main_stack_pointer);
}

void wait_at(const char* what) {
  current->waits_at = what;
  warps[current->warp].runnable &= ~(1u << current->lane);
  suspend();
}

void wake(unsigned warp, uint32_t lanes) {
  warps[warp].runnable |= lanes;
  for (; lanes; lanes &= lanes - 1) threads[warp * kLanes + __builtin_ctz(lanes)].waits_at = nullptr;
}

// Run a meeting that all have come to, and end it.
bool finish(Warp& warp, size_t index) {
  Meeting& meeting = warp.meetings[index];
  uint32_t needed = meeting.operation->aligned ? meeting.mask : meeting.mask & ~warp.exited;
  if (meeting.arrived != needed) return false;
  meeting.operation->run(meeting.operands, meeting.arrived);
  uint32_t lanes = meeting.arrived;
  warp.meetings.erase(warp.meetings.begin() + index);
  wake(&warp - warps, lanes);
  return true;
}

bool finish(Barrier& barrier) {
  unsigned needed = barrier.expected ? barrier.expected : thread_count - exited_count;
  if (barrier.arrived != needed) return false;
  uint32_t passing = 0;
  for (unsigned warp = 0; warp < warp_count; ++warp)
    if (barrier.waiting[warp]) passing |= 1u << warp;
  pass_barrier(passing);
  for (unsigned warp = 0; warp < warp_count; ++warp) wake(warp, barrier.waiting[warp]);
  barrier = Barrier{};
  return true;
}

void leave() {
  Warp& warp = warps[current->warp];
  warp.exited |= 1u << current->lane;
  ++exited_count;
  for (size_t i = 0; i < warp.meetings.size();)
    if (!finish(warp, i)) ++i;
  for (Barrier& barrier : barriers)
    if (barrier.arrived && !barrier.expected) finish(barrier);
  wait_at("its end");
}

void fiber() {
  kernel(kernel_arguments);
  leave();
  __builtin_unreachable();
}

void start_thread(unsigned id) {
  Thread& thread = threads[id];
  if (!thread.stack) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED || mprotect(stack, 4096, PROT_NONE)) abort();
    thread.stack = static_cast<char*>(stack);
  }
  thread.index = {id % block_dim.x, id / block_dim.x % block_dim.y, id / (block_dim.x * block_dim.y)};
  thread.id = id, thread.warp = id / kLanes, thread.lane = id % kLanes;
  thread.waits_at = nullptr;
  thread.copies.clear(), thread.groups.clear();
  size_t shift = id % 64 * 320;  // or the tops of all stacks would fall in one set of a cache
  void** top = reinterpret_cast<void**>(thread.stack + kStackBytes - shift) - 2;  // aligned as at a call of fiber()
  *top = reinterpret_cast<void*>(fiber);
  thread.stack_pointer = top;
}

// "warp 0: lanes 0-31 at __syncthreads; warp 1: ..."
std::string waiting() {
  std::string text;
  for (unsigned first = 0, id = 1; id <= thread_count; ++id) {
    const char* what = threads[first].waits_at;
    if (id < thread_count && id % kLanes && !strcmp(threads[id].waits_at, what)) continue;
    char part[160];
    snprintf(part, sizeof part, "warp %u, lanes %u-%u: at %s; ", first / kLanes, first % kLanes, (id - 1) % kLanes, what);
    text += part;
    first = id;
  }
  text.resize(text.size() - 2);
  return text;
}

void run_block() {
  memset(barriers, 0, sizeof barriers);
  exited_count = 0, steps = 0;
  for (unsigned warp = 0; warp < warp_count; ++warp) {
    unsigned lanes = thread_count - warp * kLanes;
    warps[warp].launched = warps[warp].runnable = lanes >= kLanes ? ~0u : (1u << lanes) - 1;
    warps[warp].exited = 0;
    warps[warp].meetings.clear();
  }
  poison_shared();
  for (unsigned id = 0; id < thread_count; ++id) start_thread(id);
  current = &threads[0];
  current = next_thread();
  switch_stacks(&main_stack_pointer, current->stack_pointer);
  if (failure.empty() && exited_count != thread_count) {
    current = nullptr;
    failure = "deadlock: " + waiting();
  }
}

}  // namespace

Dim thread_index() { return current->index; }
Dim block_index() { return block; }
Dim block_size() { return block_dim; }
Dim grid_size() { return grid_dim; }
unsigned lane_index() { return current->lane; }

std::string place(const Thread& thread) {
  char text[64];
  snprintf(text, sizeof text, "thread %u (warp %u, lane %u)", thread.id, thread.warp, thread.lane);
  return text;
}

void count_step() {
  if (++steps > kMostSteps) fail("no end: %zu accesses and warp-wide instructions in a block", kMostSteps);
}

void fail(const char* format, ...) {
  char text[512];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  failure = place(*current) + ": " + text;
  void* abandoned;
  switch_stacks(&abandoned, main_stack_pointer);
  __builtin_unreachable();
}

void meet(const Operation& operation, uint32_t mask, void* operands) {
  count_step();
  Warp& warp = warps[current->warp];
  uint32_t self = 1u << current->lane;
  if (!(mask & self)) fail("%s with mask %#x, in which it is not", operation.name, mask);
  if (mask == ~0u && !operation.aligned) mask = warp.launched;
  size_t index = 0;
  while (index < warp.meetings.size() && warp.meetings[index].mask != mask) ++index;
  if (index == warp.meetings.size()) warp.meetings.push_back({&operation, mask, 0, {}});
  Meeting& meeting = warp.meetings[index];
  if (meeting.operation != &operation)
    fail("divergence: it is at %s, and lane %d of its warp at %s", operation.name, __builtin_ctz(meeting.arrived),
         meeting.operation->name);
  meeting.arrived |= self;
  meeting.operands[current->lane] = operands;
  if (!finish(warp, index)) wait_at(operation.name);
}

void block_barrier(unsigned id, unsigned count) {
  if (id >= kBarriers) fail("barrier %u: there are %u", id, kBarriers);
  if (count % kLanes) fail("barrier %u for %u threads: no multiple of %u", id, count, kLanes);
  Barrier& barrier = barriers[id];
  if (barrier.arrived && barrier.expected != count)
    fail("barrier %u for %u threads: others wait there for %u", id, count, barrier.expected);
  barrier.expected = count;
  barrier.waiting[current->warp] |= 1u << current->lane;
  ++barrier.arrived;
  static const char* const names[] = {"barrier 0", "barrier 1", "barrier 2",  "barrier 3",  "barrier 4",  "barrier 5",
                                      "barrier 6", "barrier 7", "barrier 8",  "barrier 9",  "barrier 10", "barrier 11",
                                      "barrier 12", "barrier 13", "barrier 14", "barrier 15"};
  if (!finish(barrier)) wait_at(names[id]);
}

// Run a grid, block after block. Returns nullptr, or what went wrong, which is valid until the next launch.
extern "C" const char* emulator_launch(Kernel entry, void** values, const Argument* arguments, size_t argument_count,
                                       const Dim* grid, const Dim* size, size_t dynamic_bytes, int in_reverse) {
  kernel = entry, kernel_arguments = values, reversed = in_reverse;
  grid_dim = *grid, block_dim = *size;
  thread_count = size->x * size->y * size->z;
  warp_count = (thread_count + kLanes - 1) / kLanes;
  failure.clear();
  use_arguments(arguments, argument_count);
  use_shared(dynamic_bytes);
  size_t blocks = size_t(grid->x) * grid->y * grid->z;
  for (size_t i = 0; i < blocks && failure.empty(); ++i) {
    size_t at = reversed ? blocks - 1 - i : i;
    block = {unsigned(at % grid->x), unsigned(at / grid->x % grid->y), unsigned(at / grid->x / grid->y)};
    run_block();
  }
  if (failure.empty()) return nullptr;
  char where[64];
  snprintf(where, sizeof where, "block (%u, %u, %u), ", block.x, block.y, block.z);
  failure = where + failure;
  return failure.c_str();
}

}  // namespace emulator
