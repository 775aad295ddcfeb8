// The functions of csrc/device/ptx.cuh on a CPU. What they check stands in machine.h.
#pragma once

#include <cstdint>

#include <device/tensor_map.h>

namespace bitune {

struct Bf16 {};
struct Fp16 {};

namespace ptx {

// memory

uint4 load_chunk(const void* x);
void store_chunk(void* x, uint4 values);
uint32_t dynamic_shared();
void store_shared(uint32_t address, uint4 x);
void cp_async(uint32_t target, const void* source, bool valid);
void cp_async_commit();
void wait_copies(int pending);
template <int pending>
void cp_async_wait() {
  wait_copies(pending);
}
void ldmatrix(uint32_t (&r)[4], uint32_t address);
void ldmatrix_transposed(uint32_t (&r)[4], uint32_t address);

// numbers, rounded to nearest even; any NaN becomes 0x7fff

inline uint32_t to_bf16(float x) {
  uint32_t u = __float_as_uint(x);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}

inline uint32_t to_fp16(float x) {
  uint32_t u = __float_as_uint(x);
  uint32_t sign = u >> 16 & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) return 0x7fff;
  if (u >= 0x477ff000) return sign | 0x7c00;
  // Below 2^-14 the steps are those of floats next to 0.5: the sum rounds.
  if (u < 0x38800000) return sign | (__float_as_uint(__uint_as_float(u) + 0.5f) - 0x3f000000);
  return sign | (u + 0xfff + (u >> 13 & 1) - 0x38000000) >> 13;
}

inline float from_bf16(uint16_t x) { return __uint_as_float(uint32_t(x) << 16); }

inline float from_fp16(uint16_t x) {
  uint32_t u = uint32_t(x & 0x7fff) << 13;
  uint32_t r = __float_as_uint(__uint_as_float(u) * 0x1p112f);
  r |= u >= 0x0f800000 ? 0x7f800000 : 0;
  return __uint_as_float(r | uint32_t(x & 0x8000) << 16);
}

template <typename T>
uint32_t pack(float low, float high);
template <>
inline uint32_t pack<Bf16>(float low, float high) {
  return to_bf16(low) | to_bf16(high) << 16;
}
template <>
inline uint32_t pack<Fp16>(float low, float high) {
  return to_fp16(low) | to_fp16(high) << 16;
}

template <typename T>
float2 unpack(uint32_t pair);
template <>
inline float2 unpack<Bf16>(uint32_t pair) {
  return {from_bf16(uint16_t(pair)), from_bf16(uint16_t(pair >> 16))};
}
template <>
inline float2 unpack<Fp16>(uint32_t pair) {
  return {from_fp16(uint16_t(pair)), from_fp16(uint16_t(pair >> 16))};
}

// The instructions read and give subnormal numbers as 0.
inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }
inline float exp2(float x) { return flushed(::exp2f(x)); }
inline float log2(float x) { return ::log2f(x); }
inline float reciprocal(float x) { return flushed(1 / flushed(x)); }
inline float infinity() { return __int_as_float(0x7f800000); }

// threads

uint32_t shuffle_xor(uint32_t x, int lanes);
inline float shuffle_xor(float x, int lanes) { return __uint_as_float(shuffle_xor(__float_as_uint(x), lanes)); }
int uniform(int x);
void sync_warp();
void sync_block();
void barrier_sync(int barrier, int threads);
void barrier_arrive(int barrier, int threads);
void set_registers(int count);
template <int count>
void raise_registers() {
  static_assert(count >= 24 && count <= 256 && count % 8 == 0, "setmaxnreg takes multiples of 8 up to 256");
  set_registers(count);
}
template <int count>
void lower_registers() {
  static_assert(count >= 24 && count <= 256 && count % 8 == 0, "setmaxnreg takes multiples of 8 up to 256");
  set_registers(count);
}

// mbarrier and the copy engine

void mbarrier_init(uint32_t barrier, int count);
void mbarrier_init_done();
void mbarrier_arrive(uint32_t barrier);
void mbarrier_arrive_expect(uint32_t barrier, int bytes);
void mbarrier_wait(uint32_t barrier, int parity);
void fence_async();
inline void prefetch(const TensorMap*) {}
void tma_load(uint32_t target, const TensorMap* map, uint32_t barrier, int x, int y, int z);

// matrix products

void multiply(bool bf16, float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <typename T>
void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
inline void mma<Bf16>(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply(true, d, a, b0, b1);
}
template <>
inline void mma<Fp16>(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply(false, d, a, b0, b1);
}

}  // namespace ptx
}  // namespace bitune
