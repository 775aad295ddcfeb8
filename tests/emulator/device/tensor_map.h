// What the copy engine must know of a tensor.
#pragma once

#include <cstdint>

namespace bitune {

struct alignas(128) TensorMap {  // the size of CUDA's own: PTX that was compiled with that reads these
  const uint8_t* data = nullptr;
  int64_t sizes[3] = {};    // columns, rows, heads
  int64_t strides[3] = {};  // bytes
  int box_rows = 0;         // 0: never encoded
};

}  // namespace bitune
