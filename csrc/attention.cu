// Which kernel serves a device. This file has no device code.
#include "attention.h"

#include <device/launch.h>

#include "kernels.h"

namespace bitune {

Error capability_of(int device, int* capability) {
  DeviceLimits limits;
  Error error = limits_of(device, &limits);
  *capability = limits.capability;
  return error;
}

// Hopper's instructions exist on capability 9.0 alone.
static bool takes_sm90(int capability) {
#ifdef BITUNE_SM90
  return capability == 90;
#else
  return false;
#endif
}

static bool takes_sm80(int capability) {
#ifdef BITUNE_SM80
  return capability >= 80;
#else
  return false;
#endif
}

Tile forward_tile(int capability, int head_dim, int head_dim_v) {
  int dim = head_dim > head_dim_v ? head_dim : head_dim_v;
  if (dim > 256) return {};
  if (takes_sm90(capability)) return tile_sm90(dim);
  return takes_sm80(capability) ? tile_sm80(dim) : Tile{};
}

Error forward(const Attention& a, int device, void* stream) {
  DeviceLimits limits;
  Error error = limits_of(device, &limits);
  if (error.code) return error;
  DeviceGuard guard(device);
#ifdef BITUNE_SM90
  if (takes_sm90(limits.capability)) return forward_sm90(a, limits.multiprocessors, stream);
#endif
#ifdef BITUNE_SM80
  if (takes_sm80(limits.capability)) return forward_sm80(a, stream);
#endif
  return {-1, "no kernel was compiled for compute capability " + std::to_string(limits.capability / 10) + "." +
                  std::to_string(limits.capability % 10)};
}

}  // namespace bitune
