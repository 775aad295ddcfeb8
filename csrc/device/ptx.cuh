// The instructions that C++ has no words for, one thin function each. Addresses in shared memory are 32-bit
// numbers. Nothing here knows what it is used for; tests/emulator/device/ptx.cuh runs the same on a CPU.
#pragma once

#include <cstdint>

#include <device/tensor_map.h>

namespace bitune {

// Element types: tags, since elements travel in pairs packed in a register.
struct Bf16 {};
struct Fp16 {};

namespace ptx {

// memory

// 16 bytes of global memory, at a multiple of 16.
__device__ inline uint4 load_chunk(const void* x) { return *static_cast<const uint4*>(x); }
__device__ inline void store_chunk(void* x, uint4 values) { *static_cast<uint4*>(x) = values; }

// Where the block's dynamic shared memory begins, a multiple of 1024.
__device__ inline uint32_t dynamic_shared() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return uint32_t(__cvta_generic_to_shared(memory));
}

__device__ inline void store_shared(uint32_t address, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

// 16 bytes from global to shared memory, zeros unless `valid`; done after cp_async_wait.
__device__ inline void cp_async(uint32_t target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `pending` groups of this thread are not there yet.
template <int pending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8 x 8 matrices; lane i gives the address of row i % 8 of matrix i / 8.
__device__ inline void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ inline void ldmatrix_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// numbers

template <typename T>
__device__ inline uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<Bf16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
__device__ inline uint32_t pack<Fp16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

template <typename T>
__device__ inline float2 unpack(uint32_t pair);
template <>
__device__ inline float2 unpack<Bf16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
template <>
__device__ inline float2 unpack<Fp16>(uint32_t pair) {
  float2 r;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(r.x), "=f"(r.y) : "r"(pair));
  return r;
}

__device__ inline float exp2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ inline float log2(float x) { return __log2f(x); }
__device__ inline float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ inline float infinity() { return __int_as_float(0x7f800000); }

// threads

__device__ inline uint32_t shuffle_xor(uint32_t x, int lanes) { return __shfl_xor_sync(~0u, x, lanes); }
__device__ inline float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(~0u, x, lanes); }
// x of lane 0: tells the compiler that all lanes have the same.
__device__ inline int uniform(int x) { return __shfl_sync(~0u, x, 0); }
__device__ inline void sync_warp() { __syncwarp(); }
__device__ inline void sync_block() { __syncthreads(); }
// Of `threads` that come to barrier 1 .. 15; arrive doesn't wait for the others.
__device__ inline void barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Registers per thread from here on, in all warps of a warpgroup.
template <int count>
__device__ inline void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ inline void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

// mbarrier: a phase ends when `count` arrivals and all expected bytes have come.

__device__ inline void mbarrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// After the inits of a block, before the barrier that the block meets at.
__device__ inline void mbarrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until the phase of this parity has ended; that before the first counts as ended, with parity 1.
__device__ inline void mbarrier_wait(uint32_t barrier, int parity) {
#ifdef BITUNE_DEBUG
  // Ends in a trap after 2^32 to 2^33 cycles, some seconds: a hang is the usual failure. The loop isn't one of C++: that
  // one's way out costs registers, and the products would wait for each other.
  asm volatile(
      "{.reg .pred p; .reg .b32 began, now;\n"
      "mov.u32 began, %%clock_hi;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra done;\n"
      "mov.u32 now, %%clock_hi; sub.u32 now, now, began; setp.gt.u32 p, now, 1;\n"
      "@!p bra again;\n"
      "trap;\n"
      "done:}" ::"r"(barrier), "r"(parity)
      : "memory");
#else
  uint32_t done;
  do {
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
#endif
}

// The copy engine (TMA). Shared memory written by ordinary stores is visible to it, and to wgmma, after
// fence_async by the writing thread and then a barrier.

__device__ inline void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// The map's box at element x of row y of head z; elements outside the tensor are 0. Its bytes count at `barrier`.
__device__ inline void tma_load(uint32_t target, const TensorMap* map, uint32_t barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(target),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// matrix products

// d += a b: [16, 16] x [16, 8] over a warp.
template <typename T>
__device__ inline void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#define BITUNE_MMA(TYPE, NAME)                                                                                    \
  template <>                                                                                                     \
  __device__ inline void mma<TYPE>(float* d, const uint32_t(&a)[4], uint32_t b0, uint32_t b1) {                   \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                           \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                           \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                 \
  }
BITUNE_MMA(Bf16, "bf16")
BITUNE_MMA(Fp16, "f16")
#undef BITUNE_MMA

}  // namespace ptx
}  // namespace bitune
