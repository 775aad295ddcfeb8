// The host's side of a launch, as in csrc/device/launch.h: `launch` runs the whole grid before it returns.
#pragma once

#include <device/tensor_map.h>

#include "attention.h"

namespace bitune {

class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
  ~DeviceGuard() {}
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

struct DeviceLimits {
  int capability = 0;
  int multiprocessors = 0;
};
Error limits_of(int device, DeviceLimits* limits);

Error map_rows(const Rows& x, Element element, int num_heads, int dim, int box_rows, TensorMap* map);

// A kernel's place in memory, and the bytes of its parameter.
struct Kernel {
  const void* code;
  const void* params;
  int size;
};

// Runs `body(call)` in every thread, or hands `kernel` to what emulator_hand_over named.
Error run_grid(int blocks, int threads, int shared_bytes, void (*body)(const void*), const void* call, Kernel kernel);

template <typename Params>
Error launch(void (*kernel)(Params), int blocks, int threads, int shared_bytes, void*, const Params& params) {
  struct Call {
    void (*kernel)(Params);
    const Params& params;
  } call{kernel, params};
  auto body = [](const void* p) {
    const Call& c = *static_cast<const Call*>(p);
    c.kernel(c.params);
  };
  Kernel handed{reinterpret_cast<const void*>(kernel), &params, int(sizeof params)};
  return run_grid(blocks, threads, shared_bytes, body, &call, handed);
}

}  // namespace bitune
