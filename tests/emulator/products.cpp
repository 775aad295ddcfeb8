// The one file whose loops are worth unrolling.
#pragma GCC optimize("O3")

#include "products.h"

#include <device/ptx.cuh>

#if defined(__x86_64__) && defined(__gnu_linux__)
// Compiled for several processors; the one at hand is found when the library is loaded.
#define EVERY_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_PROCESSOR
#endif

namespace emulator {
namespace {

typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));

EVERY_PROCESSOR
void widen(bool bf16, int count, const uint16_t* x, float* y) {
  if (bf16) {
    for (int i = 0; i < count; ++i) y[i] = bitune::ptx::from_bf16(x[i]);
  } else {
    for (int i = 0; i < count; ++i) y[i] = bitune::ptx::from_fp16(x[i]);
  }
}

EVERY_PROCESSOR
void multiply_floats(int m, int n, const float* a, const float* b, float* d) {
  int j = 0;
  for (; j + 16 <= n; j += 16) {
    for (int i = 0; i < m; i += 4) {
      Eight sum[4][2];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) sum[r][c] = *reinterpret_cast<const Eight*>(&d[(i + r) * n + j + 8 * c]);
      }
      for (int k = 0; k < 16; ++k) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 2
          for (int c = 0; c < 2; ++c) {
            sum[r][c] += a[(i + r) * 16 + k] * *reinterpret_cast<const Eight*>(&b[k * n + j + 8 * c]);
          }
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) *reinterpret_cast<Eight*>(&d[(i + r) * n + j + 8 * c]) = sum[r][c];
      }
    }
  }
  for (; j < n; j += 8) {
    for (int i = 0; i < m; ++i) {
      Eight sum = *reinterpret_cast<const Eight*>(&d[i * n + j]);
      for (int k = 0; k < 16; ++k) sum += a[i * 16 + k] * *reinterpret_cast<const Eight*>(&b[k * n + j]);
      *reinterpret_cast<Eight*>(&d[i * n + j]) = sum;
    }
  }
}

}  // namespace

void multiply_add(bool bf16, int m, int n, const uint16_t* a, const uint16_t* b, float* d) {
  float wide_a[64 * 16], wide_b[16 * 256];
  widen(bf16, m * 16, a, wide_a);
  widen(bf16, 16 * n, b, wide_b);
  multiply_floats(m, n, wide_a, wide_b, d);
}

}  // namespace emulator
