// Tests of the C interface of a bundle: arguments, the choice of a target, and what a call directs.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "bundle/calls.h"
#include "bundle/choice.h"
#include "cpu/parallel.h"
#include "expect.h"

namespace pa {
namespace {

int64_t seen_count;
TVMFFIAny seen[8];

// An entry point that keeps what it is given.
int Keep(void*, const TVMFFIAny* args, int32_t count, TVMFFIAny*) {
  seen_count = count;
  std::copy_n(args, count, seen);
  return 0;
}

void TestArguments() {
  float memory[6];
  const int64_t shape[] = {2, 3}, negative[] = {2, -3};
  Arguments arguments;
  arguments.Add("none", pa_tensor{});
  arguments.Add("array", {memory, shape, nullptr, 2, PA_BFLOAT16});
  arguments.AddInt(7);
  arguments.AddFloat(0.5);
  EXPECT(arguments.Call(Keep) == 0 && seen_count == 4);
  EXPECT(seen[0].type_index == kTVMFFINone && seen[2].v_int64 == 7 && seen[3].v_float64 == 0.5);
  const auto& tensor = *static_cast<const DLTensor*>(seen[1].v_ptr);
  EXPECT(tensor.data == memory && tensor.ndim == 2 && tensor.shape[1] == 3 && Same(tensor.dtype, kBfloat16));
  EXPECT_RAISES("TypeError: a: expected a pa_dtype, got 16", arguments.Add("a", {memory, shape, nullptr, 2, 16}));
  EXPECT_RAISES("ValueError: a: expected extents from 0 on, got [2, -3]",
                arguments.Add("a", {memory, negative, nullptr, 2, PA_INT8}));
  EXPECT_RAISES("ValueError: a: expected a rank from 0 to 8, and as many extents, got rank 1 and no shape",
                arguments.Add("a", {memory, nullptr, nullptr, 1, PA_INT8}));
  EXPECT_RAISES("TypeError: inputs: expected 0 arrays, those of the spec, got 1 and NULL",
                arguments.AddInputs(nullptr, 1, 0));
}

void TestAnswer() {
  pa_error error;
  EXPECT(Answer(&error, [] { return 0; }) == PA_OK && error.message[0] == '\0');
  EXPECT(Answer(&error, []() -> int { Raise("IndexError", "a: %d", 3); }) == PA_INDEX_ERROR);
  EXPECT(std::strcmp(error.message, "a: 3") == 0);
  EXPECT(Answer(&error, []() -> int { throw std::bad_alloc(); }) == PA_MEMORY_ERROR);
  EXPECT(Answer(nullptr, []() -> int { Raise("TypeError", "b"); }) == PA_TYPE_ERROR);
  Gate own;
  EXPECT(own.Enter() && !own.Close() && !own.Enter());
  own.Leave();
  EXPECT(own.Close());
}

void TestChoice() {
  static constexpr InstructionSet kNone[] = {nullptr}, kNever[] = {"no-such-set", nullptr};
  const Isa isas[] = {{"best", kNever, nullptr}, {"asked", kNone, [] { return EPERM; }}, {"least", kNone, nullptr}};
  EXPECT(Choice(isas).chosen() == 2);
  setenv("PA_ISA", "best", 1);
  EXPECT_RAISES(
      "RuntimeError: target: this bundle is built for CPUs with features that this one lacks: for best lacks "
      "no-such-set",
      Choice(isas).Check());
  setenv("PA_ISA", "asked", 1);
  EXPECT_RAISES(
      "RuntimeError: target: this bundle is built for CPUs with features that this one lacks: for asked lacks leave of "
      "the system to use it: Operation not permitted",
      Choice(isas).Check());
  setenv("PA_ISA", "other", 1);
  EXPECT_RAISES("ValueError: PA_ISA: expected a target of this bundle, one of best asked least, got other",
                Choice(isas).Check());
  unsetenv("PA_ISA");
}

// A stack in memory that was given has what it needs by its own count, and no more.
void TestMemoryThatWasGiven() {
  call_workspace.Use(nullptr, 0);
  {
    const Borrowed<char> a(call_workspace, 100);
    const Borrowed<char> b(call_workspace, 1);
  }
  const size_t needed = call_workspace.most();
  EXPECT(needed == ScratchStack::Needed(100) + ScratchStack::Needed(1));
  alignas(64) char memory[1024];
  call_workspace.Use(memory, needed);
  for (int i = 0; i < 2; ++i) {
    const Borrowed<char> a(call_workspace, 100);
    const Borrowed<char> b(call_workspace, 1);
    EXPECT(a.data() > memory && b.data() < memory + needed && reinterpret_cast<uintptr_t>(b.data()) % 64 == 0);
  }
  call_workspace.Use(memory, needed - 1);
  bool refused = false;
  {
    const Borrowed<char> a(call_workspace, 100);
    try {
      const Borrowed<char> b(call_workspace, 1);
    } catch (const std::bad_alloc&) {
      refused = true;
    }
  }
  EXPECT(refused);
  call_workspace.Use(nullptr, 0);
}

// Kernels' scratch is a slot of a thread's own; a call that is measured runs nothing.
void TestDirections() {
  constexpr size_t kBytes = 256;
  alignas(64) static char memory[4096];
  const auto one_after_another = [](void* context, int64_t count, int64_t, void (*task)(void*, int64_t), void* work) {
    ++*static_cast<int*>(context);
    for (int64_t i = 0; i < count; ++i) task(work, i);
  };
  int calls = 0, ran = 0;
  const auto body = [&](int64_t) {
    const Borrowed<char> scratch(kernel_scratch, kBytes - 64);
    ran += scratch.data() >= memory && scratch.data() < memory + sizeof memory;
  };
  const Threads threads{2, kOwn, nullptr};
  const Directions measures{nullptr, nullptr, kBytes, false, true};
  call_workspace.Use(nullptr, 0);
  directions = &measures;
  ParallelFor(5, threads, body);
  const size_t needed = call_workspace.most();
  EXPECT(ran == 0 && needed > 2 * kBytes && needed <= sizeof memory);
  const Directions given{one_after_another, &calls, kBytes, true, false};
  call_workspace.Use(memory, needed);
  directions = &given;
  ParallelFor(5, threads, body);
  EXPECT(ran == 5 && calls == 1 && call_workspace.most() == needed);
  directions = nullptr;
  call_workspace.Use(nullptr, 0);
}

// A call within another one's parallel_for, on the same thread, leaves what that has.
void TestACallWithinACall() {
  alignas(64) static char outer[1024], inner[1024];
  pa_options options{};
  options.workspace = outer, options.workspace_size = sizeof outer;
  const Directed first(options, 64, nullptr);
  const Borrowed<char> held(call_workspace, 10);
  {
    options.workspace = inner;
    const Directed second(options, 64, nullptr);
    const Borrowed<char> other(call_workspace, 10);
    EXPECT(other.data() >= inner && other.data() < inner + sizeof inner);
    options.workspace = nullptr, options.workspace_size = 0;
    const Directed third(options, 64, nullptr);
    EXPECT(directions == nullptr);
    const Borrowed<char> own(call_workspace, 10);
    EXPECT(own.data() < inner || own.data() >= inner + sizeof inner);
  }
  const Borrowed<char> next(call_workspace, 10);
  EXPECT(next.data() == held.data() + 128 && directions != nullptr);
}

void TestThePoolStops() {
  std::atomic<int> ran{0};
  ThreadPool own;
  const auto body = [](const void* context, int64_t) { ++*static_cast<std::atomic<int>*>(const_cast<void*>(context)); };
  own.Run(body, &ran, 100, 4, nullptr);
  own.Stop();
  own.Run(body, &ran, 100, 4, nullptr);  // without helpers
  own.Stop();
  EXPECT(ran == 200);
}

}  // namespace
}  // namespace pa

int main() {
  pa::TestArguments();
  pa::TestAnswer();
  pa::TestChoice();
  pa::TestMemoryThatWasGiven();
  pa::TestDirections();
  pa::TestACallWithinACall();
  pa::TestThePoolStops();
  return failures;
}
