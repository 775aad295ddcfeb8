// What the copy engine must know of a tensor.
#pragma once

#include <cuda.h>

namespace bitune {

using TensorMap = CUtensorMap;

}  // namespace bitune
