// CUDA's words for a C++ compiler. Included before every file of the emulated build.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct float2 {
  float x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  uint32_t x, y, z;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline uint32_t __float_as_uint(float x) {
  uint32_t r;
  memcpy(&r, &x, 4);
  return r;
}
inline float __uint_as_float(uint32_t x) {
  float r;
  memcpy(&r, &x, 4);
  return r;
}
inline float __int_as_float(int32_t x) { return __uint_as_float(uint32_t(x)); }

// Of the thread that runs: the scheduler sets them.
extern Index threadIdx, blockIdx, blockDim, gridDim;
