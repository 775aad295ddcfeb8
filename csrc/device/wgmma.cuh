// Hopper's matrix unit: products of a warpgroup (4 warps), started in order and finished behind its back.
// Operands: see layout.h.
#pragma once

#include <cstdint>

#include <device/ptx.cuh>

namespace bitune {
namespace ptx {

// Between writing registers that wgmma reads and the first wgmma of a group.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `pending` groups are unfinished.
template <int pending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Keeps the compiler from moving uses of registers that a running wgmma has across this line.
template <int count>
__device__ inline void wgmma_hold(float (&r)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(r[i])::"memory");
}

// d [64, N] = (accumulate ? d : 0) + a b. wgmma_ss: a [64, 16] and b [N, 16] in shared memory, columns summed.
// wgmma_rs: a in 4 registers, not to be written before the product has ended, b [16, N], rows summed.
template <typename T, int N>
struct Wgmma;

#define R8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define R32 R8(0, 1, 2, 3, 4, 5, 6, 7) "," R8(8, 9, 10, 11, 12, 13, 14, 15) \
  "," R8(16, 17, 18, 19, 20, 21, 22, 23) "," R8(24, 25, 26, 27, 28, 29, 30, 31)
#define R64 R32 "," R8(32, 33, 34, 35, 36, 37, 38, 39) "," R8(40, 41, 42, 43, 44, 45, 46, 47) \
  "," R8(48, 49, 50, 51, 52, 53, 54, 55) "," R8(56, 57, 58, 59, 60, 61, 62, 63)
#define R128 R64 "," R8(64, 65, 66, 67, 68, 69, 70, 71) "," R8(72, 73, 74, 75, 76, 77, 78, 79) \
  "," R8(80, 81, 82, 83, 84, 85, 86, 87) "," R8(88, 89, 90, 91, 92, 93, 94, 95) \
  "," R8(96, 97, 98, 99, 100, 101, 102, 103) "," R8(104, 105, 106, 107, 108, 109, 110, 111) \
  "," R8(112, 113, 114, 115, 116, 117, 118, 119) "," R8(120, 121, 122, 123, 124, 125, 126, 127)
#define D8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define D32 D8(0), D8(8), D8(16), D8(24)
#define D64 D32, D8(32), D8(40), D8(48), D8(56)
#define D128 D64, D8(64), D8(72), D8(80), D8(88), D8(96), D8(104), D8(112), D8(120)

// A0 .. A5: the numbers that follow those of d.
#define BITUNE_WGMMA(TYPE, NAME, N, COUNT, A0, A1, A2, A3, A4, A5)                                                 \
  template <>                                                                                                      \
  struct Wgmma<TYPE, N> {                                                                                          \
    __device__ static void ss(float (&d)[COUNT], uint64_t a, uint64_t b, int accumulate) {                         \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #A2 ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME \
                   "." NAME " {" R##COUNT "}, %" #A0 ", %" #A1 ", p, 1, 1, 0, 0;}"                                  \
                   : D##COUNT                                                                                      \
                   : "l"(a), "l"(b), "r"(accumulate));                                                             \
    }                                                                                                              \
    __device__ static void rs(float (&d)[COUNT], const uint32_t* a, uint64_t b, int accumulate) {                  \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #A5 ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME \
                   "." NAME " {" R##COUNT "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #A4 ", p, 1, 1, 1;}"    \
                   : D##COUNT                                                                                      \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                         \
    }                                                                                                              \
  };
#define BITUNE_WGMMA_TYPES(...)             \
  BITUNE_WGMMA(Bf16, "bf16", __VA_ARGS__) \
  BITUNE_WGMMA(Fp16, "f16", __VA_ARGS__)
BITUNE_WGMMA_TYPES(64, 32, 32, 33, 34, 35, 36, 37)
BITUNE_WGMMA_TYPES(128, 64, 64, 65, 66, 67, 68, 69)
BITUNE_WGMMA_TYPES(256, 128, 128, 129, 130, 131, 132, 133)
#undef BITUNE_WGMMA_TYPES
#undef BITUNE_WGMMA
#undef R8
#undef R32
#undef R64
#undef R128
#undef D8
#undef D32
#undef D64
#undef D128

}  // namespace ptx
}  // namespace bitune
