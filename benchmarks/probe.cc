// The limits of this CPU's cores: floating-point operations and bytes read, each on num_threads pinned threads at once.
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kSums = 24;
#elif defined(__AVX__)
constexpr int kBytes = 32, kSums = 12;
#else
constexpr int kBytes = 16, kSums = 12;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));

// Multiply and add `steps` times in kSums independent vectors; return the floating-point operations done.
double fma(long steps, float* sink) {
  Vector sums[kSums], a = 0.5f - Vector{}, b = 0.25f - Vector{};
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) sums[i] = Vector{} + float(i);
  for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) {
      sums[i] = sums[i] * a + b;
      asm volatile("" : "+v"(sums[i]));  // each step is done, not its closed form
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) *sink += sums[i][0];
  return 2.0 * (kBytes / 4) * kSums * steps;
}

#if defined(__AVX512BF16__)
// The same with dot products of bfloat16 pairs.
double bf16_dot(long steps, float* sink) {
  __m512 sums[kSums];
  const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f003f00), b = (__m512bh)_mm512_set1_epi32(0x3e803e80);
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) sums[i] = _mm512_set1_ps(float(i));
  for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) {
      sums[i] = _mm512_dpbf16_ps(sums[i], a, b);
      asm volatile("" : "+v"(sums[i]));
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) *sink += sums[i][0];
  return 4.0 * (kBytes / 4) * kSums * steps;
}
#endif

// Add up `size` bytes, in kStreams places at once as a kernel reads keys, values and several heads. `ahead` is how many
// bytes before their use lines are prefetched; 0 leaves that to the hardware. Returns the bytes read.
template <int kStreams>
double read(const char* data, long size, long ahead, float* sink) {
  constexpr long kChunk = 256;
  Vector sums[kChunk / kBytes] = {};
  const long part = size / kStreams / kChunk * kChunk;
  for (long at = 0; at < part; at += kChunk) {
    for (int stream = 0; stream < kStreams; ++stream) {
      const char* from = data + stream * part + at;
      if (ahead) {
        for (long line = 0; line < kChunk; line += 64) __builtin_prefetch(from + ahead + line, 0, 2);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kChunk / kBytes; ++i) sums[i] += *reinterpret_cast<const Vector*>(from + i * kBytes);
    }
  }
  for (const Vector& sum : sums) *sink += sum[0];
  return double(part) * kStreams;
}

// Run work(thread, &sink) on all threads at once, each on its CPU. Returns the sum of its results per second: from when
// the last thread is ready to when the last has ended.
template <typename Work>
double rate(int num_threads, const int* cpus, Work work) {
  using Clock = std::chrono::steady_clock;
  std::atomic<int> ready{0};
  std::vector<double> done(num_threads);
  std::vector<Clock::time_point> starts(num_threads), ends(num_threads);
  std::vector<float> sinks(num_threads);
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i) {
    threads.emplace_back([&, i] {
      cpu_set_t set;
      CPU_ZERO(&set);
      CPU_SET(cpus[i], &set);
      pthread_setaffinity_np(pthread_self(), sizeof set, &set);
      ++ready;
      while (ready < num_threads) {
      }
      starts[i] = Clock::now();
      done[i] = work(i, &sinks[i]);
      ends[i] = Clock::now();
    });
  }
  for (std::thread& thread : threads) thread.join();
  double sum = 0;
  Clock::time_point start = starts[0], end = ends[0];
  for (int i = 0; i < num_threads; ++i) {
    sum += done[i];
    start = std::min(start, starts[i]);
    end = std::max(end, ends[i]);
  }
  return sum / std::chrono::duration<double>(end - start).count();
}

}  // namespace

// float32 operations per second.
extern "C" double fma_rate(int num_threads, const int* cpus, long steps) {
  return rate(num_threads, cpus, [=](int, float* sink) { return fma(steps, sink); });
}

// bfloat16 operations per second; 0 where this CPU has no such instruction.
extern "C" double bf16_rate(int num_threads, const int* cpus, long steps) {
#if defined(__AVX512BF16__)
  return rate(num_threads, cpus, [=](int, float* sink) { return bf16_dot(steps, sink); });
#else
  return 0;
#endif
}

// Bytes per second; each thread reads a part of its own of data, size bytes in all.
extern "C" double read_rate(int num_threads, const int* cpus, const char* data, long size, long ahead, int streams) {
  const long part = size / num_threads / 4096 * 4096;
  return rate(num_threads, cpus, [=](int i, float* sink) {
    const char* from = data + i * part;
    return streams == 1 ? read<1>(from, part, ahead, sink) : read<4>(from, part, ahead, sink);
  });
}
