// The functions of csrc/device/wgmma.cuh on a CPU, see wgmma.cpp.
#pragma once

#include <cstdint>
#include <type_traits>

#include <device/ptx.cuh>

namespace bitune {
namespace ptx {

void wgmma_fence();
void wgmma_commit();
void wait_products(int pending);
template <int pending>
void wgmma_wait() {
  wait_products(pending);
}
template <int count>
void wgmma_hold(float (&)[count]) {}

// No `a_registers`: the descriptor `a` counts.
void start_product(bool bf16, int n, float* d, const uint32_t* a_registers, uint64_t a, uint64_t b, bool accumulate);

template <typename T, int N>
struct Wgmma {
  static_assert(N == 64 || N == 128 || N == 256, "no such N");
  static constexpr bool bf16 = std::is_same<T, Bf16>::value;
  static void ss(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    start_product(bf16, N, d, nullptr, a, b, accumulate != 0);
  }
  static void rs(float (&d)[N / 2], const uint32_t* a, uint64_t b, int accumulate) {
    start_product(bf16, N, d, a, 0, b, accumulate != 0);
  }
};

}  // namespace ptx
}  // namespace bitune
