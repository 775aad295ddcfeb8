// Matrix products of 16-bit numbers, 16 summed.
#pragma once

#include <cstdint>

namespace emulator {

// d [m, n] += a [m, 16] b [16, n], m a multiple of 4, n of 8.
void multiply_add(bool bf16, int m, int n, const uint16_t* a, const uint16_t* b, float* d);

}  // namespace emulator
