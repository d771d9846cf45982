// Kernels for test_cuda_emulator.py, each instruction by itself, and for test_cuda_emulator_errors.py.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>

__forceinline__ __device__ uint32_t shared_address(const void* p) { return __cvta_generic_to_shared(p); }

__forceinline__ __device__ void cp_async_16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" : : "r"(shared_address(to)), "l"(from) : "memory");
}
__forceinline__ __device__ void commit() { asm volatile("cp.async.commit_group;" : :); }
__forceinline__ __device__ void wait_0() { asm volatile("cp.async.wait_group 0;" : : : "memory"); }
__forceinline__ __device__ void wait_1() { asm volatile("cp.async.wait_group 1;" : : : "memory"); }
__forceinline__ __device__ void ldmatrix_x4(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3) : "r"(p) : "memory");
}

// ---- fragments -----------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(32) mma_bf16(uint32_t* a, uint32_t* b, float* c, float* d) {
  int l = threadIdx.x;
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%10, %11, %12, %13};"
               : "=f"(d[4 * l]), "=f"(d[4 * l + 1]), "=f"(d[4 * l + 2]), "=f"(d[4 * l + 3])
               : "r"(a[4 * l]), "r"(a[4 * l + 1]), "r"(a[4 * l + 2]), "r"(a[4 * l + 3]), "r"(b[2 * l]),
                 "r"(b[2 * l + 1]), "f"(c[4 * l]), "f"(c[4 * l + 1]), "f"(c[4 * l + 2]), "f"(c[4 * l + 3]));
}

extern "C" __global__ void __launch_bounds__(32) mma_f16(uint32_t* a, uint32_t* b, float* c, float* d) {
  int l = threadIdx.x;
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%10, %11, %12, %13};"
               : "=f"(d[4 * l]), "=f"(d[4 * l + 1]), "=f"(d[4 * l + 2]), "=f"(d[4 * l + 3])
               : "r"(a[4 * l]), "r"(a[4 * l + 1]), "r"(a[4 * l + 2]), "r"(a[4 * l + 3]), "r"(b[2 * l]),
                 "r"(b[2 * l + 1]), "f"(c[4 * l]), "f"(c[4 * l + 1]), "f"(c[4 * l + 2]), "f"(c[4 * l + 3]));
}

// Six forms of ldmatrix: out[form][lane][register], the rows of a 32 x 8 matrix taken as `rows` says.
extern "C" __global__ void __launch_bounds__(32) ldmatrix(uint16_t* matrix, int* rows, uint32_t* out) {
  __shared__ __align__(16) uint16_t tile[256];
  int l = threadIdx.x;
  for (int i = 0; i < 8; ++i) tile[8 * l + i] = matrix[8 * l + i];
  __syncwarp();
  uint32_t row = shared_address(&tile[8 * rows[l]]);
  uint32_t* r = out + 4 * l;
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(row) : "memory");
  r += 128;
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(row) : "memory");
  r += 128;
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(row) : "memory");
  r += 128;
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(row) : "memory");
  r += 128;
  ldmatrix_x4(r[0], r[1], r[2], r[3], row);
  r += 128;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}

extern "C" __global__ void __launch_bounds__(32) movmatrix(uint32_t* from, uint32_t* to) {
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to[threadIdx.x]) : "r"(from[threadIdx.x]));
}

// ---- arithmetic, loads, shuffles ------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(32) convert(float* x, uint32_t* bf16, uint32_t* f16, float* power, int n) {
  for (int i = threadIdx.x; i < n; i += 32) {
    asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bf16[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
    asm volatile("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(f16[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(power[i]) : "f"(x[i]));
  }
}

extern "C" __global__ void __launch_bounds__(32) codes(uint32_t* x, uint32_t* y, uint32_t* out, int n) {
  for (int i = threadIdx.x; i < n; i += 32) {
    asm volatile("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(out[i]) : "h"((uint16_t)x[i]));
    asm volatile("sub.f16x2 %0, %1, %2;" : "=r"(out[n + i]) : "r"(x[i]), "r"(y[i]));
    asm volatile("mul.f16x2 %0, %1, %2;" : "=r"(out[2 * n + i]) : "r"(x[i]), "r"(y[i]));
    asm volatile("prmt.b32 %0, %1, %2, %3;" : "=r"(out[3 * n + i]) : "r"(x[i]), "r"(y[i]), "r"(0x2705));
  }
}

extern "C" __global__ void __launch_bounds__(32) types(nv_bfloat16* a, half* b, nv_bfloat16* product, float* sum, int n) {
  for (int i = threadIdx.x; i < n; i += 32) {
    product[i] = a[i] * a[n - 1 - i];
    sum[i] = ((float)a[i]) + ((float)b[i]);
    b[i] = ((half)(((float)b[i]) * 0x1p-1f));
  }
}

extern "C" __global__ void __launch_bounds__(32) loads(uint32_t* from, uint32_t* to, int offset) {
  int l = threadIdx.x;
  uint32_t x, y, z, w;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x), "=r"(y), "=r"(z), "=r"(w) : "l"(from + 4 * l + offset) : "memory");
  to[4 * l] = x, to[4 * l + 1] = y, to[4 * l + 2] = z, to[4 * l + 3] = w;
  uint4 v = *(uint4*)(from + 4 * l + offset);
  *(uint4*)(to + 128 + 4 * l) = make_uint4(v.w, v.z, v.y, v.x);
}

extern "C" __global__ void __launch_bounds__(64) shuffles(int* in, float* f, int* out, float* sums) {
  int t = threadIdx.x, x = in[t];
  out[t] = __shfl_xor_sync((uint)4294967295, x, 5, 32);
  out[64 + t] = __shfl_sync((uint)4294967295, x, t / 2, 8);
  out[128 + t] = __shfl_up_sync((uint)4294967295, x, 3, 16);
  out[192 + t] = __shfl_down_sync((uint)4294967295, x, 3, 16);
  out[256 + t] = __ballot_sync((uint)4294967295, x % 3 == 0);
  out[320 + t] = __any_sync((uint)4294967295, x == 0) + 2 * __all_sync((uint)4294967295, x < 1000);
  if (t % 32 < 8) out[384 + t] = __shfl_xor_sync((uint)255, x, 1, 32);
  out[448 + t] = __reduce_add_sync((uint)4294967295, x);
  float sum = f[t];
  for (int mask = 16; mask; mask /= 2) sum = sum + __shfl_xor_sync((uint)4294967295, sum, mask, 32);
  sums[t] = sum;
}

// Copies of 4, 8 and 16 bytes, one of which fills with zeros past its source, in two groups.
extern "C" __global__ void __launch_bounds__(32) copies(uint32_t* from, uint32_t* to) {
  extern __shared__ __align__(64) uint32_t buffer[];
  int l = threadIdx.x;
  uint32_t p = shared_address(&buffer[16 * l]);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" : : "r"(p), "l"(from + 12 * l) : "memory");
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" : : "r"(p + 8), "l"(from + 12 * l + 2) : "memory");
  commit();
  asm volatile("{ .reg .pred go; setp.ne.b32 go, %2, 0; @go cp.async.cg.shared.global [%0+16], [%1], 16, 12; }"
               : : "r"(p), "l"(from + 12 * l + 4), "r"(l % 2) : "memory");
  cp_async_16(&buffer[16 * l + 8], from + 12 * l + 8);
  commit();
  wait_1();
  for (int i = 0; i < 4; ++i) to[16 * l + i] = buffer[16 * l + i];
  wait_0();
  for (int i = 4; i < 12; ++i) to[16 * l + i] = buffer[16 * l + i];
}

// Each block of 4 warps sums its part; named barriers join pairs of warps, and atomics the blocks.
extern "C" __global__ void __launch_bounds__(128) sums(int* in, int* pairs, int* total, int* largest, int n) {
  __shared__ int part[4];
  __shared__ int pair[2];
  int t = threadIdx.x, warp = t / 32, x = 0;
  for (int i = blockIdx.x * 128 + t; i < n; i += gridDim.x * blockDim.x) x += in[i];
  for (int mask = 16; mask; mask /= 2) x += __shfl_xor_sync((uint)4294967295, x, mask, 32);
  if (t % 32 == 0) part[warp] = x;
  asm volatile("bar.sync %0, 64;" : : "r"(1 + warp / 2) : "memory");
  if (t % 64 == 0) pair[warp / 2] = part[warp] + part[warp + 1];
  __syncthreads();
  if (t == 0) {
    atomicAdd(total, pair[0] + pair[1]);
    asm volatile("red.relaxed.gpu.global.max.s32 [%0], %1;" : : "l"(largest), "r"(pair[0]) : "memory");
  }
  if (t < 2) pairs[2 * blockIdx.x + t] = pair[t];
}

extern "C" __global__ void __launch_bounds__(64) indices(int* out) {
  int t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  int b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[b * blockDim.x * blockDim.y * blockDim.z + t] = 1000 * b + t;
}

// ---- what a kernel may not do ---------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(32) reads_poison(float* out) {
  extern __shared__ __align__(64) float floats[];
  floats[threadIdx.x] = 1.0f;
  out[threadIdx.x] = floats[32 + threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(64) leaves_shared(float* out) {
  extern __shared__ __align__(64) float floats[];
  floats[threadIdx.x + 1] = 1.0f;
}

// wait 0: all groups; 1: all but the last; 2: none.
extern "C" __global__ void __launch_bounds__(32) waits(uint32_t* from, uint32_t* to, int wait) {
  extern __shared__ __align__(64) uint32_t buffer[];
  int l = threadIdx.x;
  cp_async_16(&buffer[4 * l], from + 4 * l);
  commit();
  if (wait == 0) wait_0();
  if (wait == 1) wait_1();
  __syncwarp();
  uint32_t r0, r1, r2, r3;
  ldmatrix_x4(r0, r1, r2, r3, shared_address(&buffer[4 * l]));
  to[l] = r0 + r1 + r2 + r3;
}

// A copy that another lane reads without a barrier after the wait.
extern "C" __global__ void __launch_bounds__(32) waits_alone(uint32_t* from, uint32_t* to) {
  extern __shared__ __align__(64) uint32_t buffer[];
  int l = threadIdx.x;
  cp_async_16(&buffer[4 * l], from + 4 * l);
  commit();
  wait_0();
  to[l] = buffer[127 - 4 * l];
}

// Two warps exchange: barriers 1: __syncthreads, 2: __syncwarp, which is not enough, 0: none.
extern "C" __global__ void __launch_bounds__(64) exchanges(int* out, int barrier) {
  __shared__ int tile[64];
  int t = threadIdx.x;
  tile[t] = t;
  if (barrier == 1) __syncthreads();
  if (barrier == 2) __syncwarp();
  out[t] = tile[63 - t];
}

// A tile used again: its readers have to be done before it is overwritten.
extern "C" __global__ void __launch_bounds__(64) overwrites(int* out, int barrier) {
  __shared__ int tile[64];
  int t = threadIdx.x, sum = 0;
  for (int i = 0; i < 4; ++i) {
    tile[t] = t + i;
    __syncthreads();
    sum += tile[63 - t];
    if (barrier) __syncthreads();
  }
  out[t] = sum;
}

// All threads write the same to one place.
extern "C" __global__ void __launch_bounds__(64) agrees(int* out) {
  __shared__ int found;
  found = 1;
  __syncthreads();
  out[threadIdx.x] = found;
}

// Reads what it has written through the cache of what is never written.
extern "C" __global__ void __launch_bounds__(32) rereads(uint32_t* from, uint32_t* to, int writes_first) {
  int l = threadIdx.x;
  uint32_t x;
  if (writes_first) from[l] = l;
  asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(x) : "l"(from + l) : "memory");
  if (!writes_first) from[l] = x + 1;
  to[l] = x;
}

// Waits for a word that nobody writes: in `kind` 1 by shuffles alone.
extern "C" __global__ void __launch_bounds__(32) waits_for_ever(int* word, int kind) {
  while (kind ? __shfl_sync((uint)4294967295, kind, 0, 32) : atomicAdd(word, 0) == 0) {
  }
}

extern "C" __global__ void __launch_bounds__(64) divergent_barrier(int* out) {
  int t = threadIdx.x;
  if (t < 40) __syncthreads();
  if (t >= 40) __syncwarp(4294967040u);
  if (t >= 63) asm volatile("bar.sync 3, 64;" : : : "memory");
  out[t] = t;
}

extern "C" __global__ void __launch_bounds__(32) divergent_instructions(uint32_t* out) {
  extern __shared__ __align__(64) uint32_t buffer[];
  int l = threadIdx.x;
  uint32_t r = 0, s;
  if (l < 8) {
    ldmatrix_x4(r, s, s, s, shared_address(buffer));
  } else {
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(r));
  }
  out[l] = r;
}

extern "C" __global__ void __launch_bounds__(32) leaves_early(int* out) {
  if (threadIdx.x == 7) return;
  uint32_t r = 0;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(r));
  out[threadIdx.x] = r;
}

extern "C" __global__ void __launch_bounds__(32) touches(int* in, int* out, int64_t first, int64_t step) {
  out[first + step * threadIdx.x] = in[first + step * threadIdx.x];
}
