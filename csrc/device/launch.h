// The host's side of a launch: the copy engine's maps, limits of the device, the launch itself.
#pragma once

#include <cuda_runtime.h>
#include <device/tensor_map.h>

#include "attention.h"

namespace bitune {

// Makes a device current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    cudaGetDevice(&before_);
    cudaSetDevice(device);  // current or not: in a new thread the driver's functions have no context before
  }
  ~DeviceGuard() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_;
  int before_ = 0;
};

// Empties CUDA's own memory of the error, so that no later call reports it as its own.
Error error_of(cudaError_t status, const char* doing);

// Capability (90: 9.0) and multiprocessors of a device.
struct DeviceLimits {
  int capability = 0;
  int multiprocessors = 0;
};
Error limits_of(int device, DeviceLimits* limits);

// A map of 16-bit rows [rows, heads, dim] in boxes of 64 columns by `box_rows` rows of one head, 128-byte swizzled.
// Its coordinates: column, row, head.
Error map_rows(const Rows& x, Element element, int num_heads, int dim, int box_rows, TensorMap* map);

// One launch of `blocks` blocks with shared_bytes of dynamic shared memory; `params` travels by value.
template <typename Params>
Error launch(void (*kernel)(Params), int blocks, int threads, int shared_bytes, void* stream, const Params& params) {
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return error_of(status, "asking for shared memory");
  kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
  return error_of(cudaGetLastError(), "launching");
}

}  // namespace bitune
