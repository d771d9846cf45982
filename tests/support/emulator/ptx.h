// PTX instructions as functions, called by the statements that cuda_text.py makes of inline asm. A function is named
// after its instruction without cache hints, "." as "_"; destinations come first; addresses are generic or shared ones.
#pragma once

namespace ptx {

using emulator::Floats;
using emulator::Words;

INLINE void* address(const void* generic) { return const_cast<void*>(generic); }
INLINE void* address(uint64_t generic) { return reinterpret_cast<void*>(generic); }
INLINE void* address(uint32_t shared) { return emulator::generic_address(shared); }

// ---- tensor cores --------------------------------------------------------------------------------------------------

#define MMA(type) \
  INLINE void mma_sync_aligned_m16n8k16_row_col_f32_##type##_##type##_f32( \
      float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, \
      uint32_t b1, float c0, float c1, float c2, float c3) { \
    Floats d = emulator::mma_##type(Words{{a0, a1, a2, a3}}, b0, b1, Floats{{c0, c1, c2, c3}}); \
    d0 = d.lane[0], d1 = d.lane[1], d2 = d.lane[2], d3 = d.lane[3]; \
  }
MMA(bf16)
MMA(f16)
#undef MMA

#define LDMATRIX(suffix, transposed) \
  template <typename A> \
  INLINE void ldmatrix_sync_aligned_m8n8_x1##suffix##_shared_b16(uint32_t& r, A row) { \
    r = emulator::load_matrices(1, transposed, address(row)).word[0]; \
  } \
  template <typename A> \
  INLINE void ldmatrix_sync_aligned_m8n8_x2##suffix##_shared_b16(uint32_t& r0, uint32_t& r1, A row) { \
    Words r = emulator::load_matrices(2, transposed, address(row)); \
    r0 = r.word[0], r1 = r.word[1]; \
  } \
  template <typename A> \
  INLINE void ldmatrix_sync_aligned_m8n8_x4##suffix##_shared_b16(uint32_t& r0, uint32_t& r1, uint32_t& r2, \
                                                                 uint32_t& r3, A row) { \
    Words r = emulator::load_matrices(4, transposed, address(row)); \
    r0 = r.word[0], r1 = r.word[1], r2 = r.word[2], r3 = r.word[3]; \
  }
LDMATRIX(, false)
LDMATRIX(_trans, true)
#undef LDMATRIX

INLINE void movmatrix_sync_aligned_m8n8_trans_b16(uint32_t& d, uint32_t a) { d = emulator::transpose_matrix(a); }

// ---- memory --------------------------------------------------------------------------------------------------------

template <typename To, typename From>
INLINE void cp_async_ca_shared_global(To to, From from, uint32_t bytes, uint32_t source_bytes) {
  emulator::copy_async(address(to), address(from), bytes, source_bytes);
}
template <typename To, typename From>
INLINE void cp_async_ca_shared_global(To to, From from, uint32_t bytes) {
  cp_async_ca_shared_global(to, from, bytes, bytes);
}
template <typename To, typename From>
INLINE void cp_async_cg_shared_global(To to, From from, uint32_t bytes, uint32_t source_bytes = 16) {
  if (bytes != 16) emulator::fail("cp.async.cg of %u bytes", bytes);
  cp_async_ca_shared_global(to, from, bytes, source_bytes);
}
INLINE void cp_async_commit_group() { emulator::commit_copies(); }
INLINE void cp_async_wait_group(uint32_t left) { emulator::wait_for_copies(left); }
INLINE void cp_async_wait_all() { emulator::wait_for_all_copies(); }

// The bits of a vector in memory are the bits of so many registers.
template <typename... T>
INLINE void load(bool constant, const void* from, T&... to) {
  Words words = emulator::load(from, (sizeof(T) + ...), constant);
  size_t offset = 0;
  ((memcpy(&to, reinterpret_cast<char*>(words.word) + offset, sizeof(T)), offset += sizeof(T)), ...);
}
template <typename... T>
INLINE void store(void* to, T... from) {
  Words words;
  size_t offset = 0;
  ((memcpy(reinterpret_cast<char*>(words.word) + offset, &from, sizeof(T)), offset += sizeof(T)), ...);
  emulator::store(to, words, offset);
}

#define MOVES(space, constant, type, T) \
  template <typename A> \
  INLINE void ld_##space##_##type(T& r, A from) { \
    load(constant, address(from), r); \
  } \
  template <typename A> \
  INLINE void ld_##space##_v2_##type(T& r0, T& r1, A from) { \
    load(constant, address(from), r0, r1); \
  } \
  template <typename A> \
  INLINE void ld_##space##_v4_##type(T& r0, T& r1, T& r2, T& r3, A from) { \
    load(constant, address(from), r0, r1, r2, r3); \
  } \
  template <typename A> \
  INLINE void st_##space##_##type(A to, T r) { \
    store(address(to), r); \
  } \
  template <typename A> \
  INLINE void st_##space##_v2_##type(A to, T r0, T r1) { \
    store(address(to), r0, r1); \
  } \
  template <typename A> \
  INLINE void st_##space##_v4_##type(A to, T r0, T r1, T r2, T r3) { \
    store(address(to), r0, r1, r2, r3); \
  }
#define SPACES(type, T) \
  MOVES(global, false, type, T) \
  MOVES(global_nc, true, type, T) \
  MOVES(shared, false, type, T)
SPACES(b16, uint16_t)
SPACES(u16, uint16_t)
SPACES(b32, uint32_t)
SPACES(u32, uint32_t)
SPACES(s32, int32_t)
SPACES(f32, float)
#undef SPACES
#undef MOVES
#define REDUCTIONS(type, T)                                                                   \
  INLINE void red_relaxed_gpu_global_add_##type(const void* to, T value) { atomicAdd((T*)to, value); } \
  INLINE void red_relaxed_gpu_global_max_##type(const void* to, T value) { atomicMax((T*)to, value); }
REDUCTIONS(s32, int32_t)
REDUCTIONS(u32, uint32_t)
#undef REDUCTIONS
template <typename A>
INLINE void prefetch_global_L2(A) {}
template <typename A>
INLINE void st_release_sys_global_b64(A to, int64_t r) { store(address(to), r); }

// ---- arithmetic ----------------------------------------------------------------------------------------------------

INLINE void cvta_to_shared_u64(uint64_t& d, const void* a) { d = emulator::shared_address(a); }
INLINE void cvt_u32_u64(uint32_t& d, uint64_t a) { d = uint32_t(a); }
INLINE float flush(float value) { return fabsf(value) < 0x1p-126f ? copysignf(0, value) : value; }
INLINE void ex2_approx_ftz_f32(float& d, float a) { d = flush(exp2f(flush(a))); }
INLINE void ex2_approx_f32(float& d, float a) { d = exp2f(a); }
INLINE void lg2_approx_f32(float& d, float a) { d = log2f(a); }
INLINE void lg2_approx_ftz_f32(float& d, float a) { d = log2f(flush(a)); }
INLINE void rcp_approx_ftz_f32(float& d, float a) { d = flush(1 / flush(a)); }
INLINE void cvt_rn_bf16x2_f32(uint32_t& d, float high, float low) {
  d = uint32_t(emulator::narrow_bf16(high)) << 16 | emulator::narrow_bf16(low);
}
INLINE void cvt_rn_f16x2_f32(uint32_t& d, float high, float low) {
  d = uint32_t(emulator::narrow_f16(high)) << 16 | emulator::narrow_f16(low);
}
INLINE void cvt_rn_f16x2_e4m3x2(uint32_t& d, uint16_t a) {
  d = uint32_t(emulator::narrow_f16(emulator::widen_e4m3(a >> 8))) << 16 |
      emulator::narrow_f16(emulator::widen_e4m3(a & 0xff));
}
#define OF_TWO_HALVES(name, operation) \
  INLINE void name##_f16x2(uint32_t& d, uint32_t a, uint32_t b) { \
    uint32_t low = emulator::narrow_f16(emulator::widen_f16(a) operation emulator::widen_f16(b)); \
    d = uint32_t(emulator::narrow_f16(emulator::widen_f16(a >> 16) operation emulator::widen_f16(b >> 16))) << 16 | low; \
  }
OF_TWO_HALVES(sub, -)
OF_TWO_HALVES(mul, *)
#undef OF_TWO_HALVES
INLINE void prmt_b32(uint32_t& d, uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t of = selector >> 4 * i & 15;
    if (of > 7) emulator::fail("prmt with a byte's sign");
    found |= uint32_t(bytes >> 8 * of & 0xff) << 8 * i;
  }
  d = found;
}
template <typename T>
INLINE void setp_ne_b32(bool& p, T a, uint32_t b) {
  p = uint32_t(a) != b;
}

// ---- barriers ------------------------------------------------------------------------------------------------------

INLINE void bar_sync(uint32_t id, uint32_t threads = 0) { emulator::block_barrier(id, threads); }
INLINE void barrier_sync(uint32_t id, uint32_t threads = 0) { emulator::block_barrier(id, threads); }

}  // namespace ptx
