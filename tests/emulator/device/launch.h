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

// Runs `body(call)` in every thread.
Error run_grid(int blocks, int threads, int shared_bytes, void (*body)(const void*), const void* call);

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
  return run_grid(blocks, threads, shared_bytes, body, &call);
}

}  // namespace bitune
