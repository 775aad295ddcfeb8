// How operands stand in shared memory, for both kernels: tiles of 64 columns (128 bytes) by any number of rows,
// 128-byte swizzled as the copy engine leaves them. A tile begins at a multiple of 1024 bytes; wider operands are
// several tiles, one after the other.
#pragma once

#include <cstdint>

#include "schedule.h"

namespace bitune {

// Bytes from the operand's begin to its 16-byte chunk (8 columns) `chunk` of `row`.
BITUNE_BOTH uint32_t chunk_offset(int row, int chunk, int rows) {
  return uint32_t(chunk / 8 * rows * 128 + row * 128 + ((chunk % 8) ^ (row % 8)) * 16);
}

// The matrix descriptor of wgmma for an operand of this layout (PTX ISA, "Asynchronous warpgroup level matrix
// instructions"): addresses and strides in units of 16 bytes. Groups of 8 rows are 1024 bytes apart, tiles of 64
// columns leading_bytes, read only where rows are the summed dimension.
BITUNE_BOTH uint64_t wgmma_descriptor(uint32_t address, uint32_t leading_bytes) {
  return uint64_t(address >> 4) | uint64_t(leading_bytes >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}

// The same operand from `bytes` further on, a multiple of 16.
BITUNE_BOTH uint64_t advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

}  // namespace bitune
