// The emulated device as the host sees it.
#include <device/launch.h>
#include <dlfcn.h>

#include <mutex>

#include "device_info.h"
#include "machine.h"

// Runs a kernel that is `offset` bytes into this library. Returns what went wrong.
using Launcher = const char* (*)(uint64_t offset, int blocks, int threads, int shared_bytes, const void* params, int size);
static Launcher launcher = nullptr;

extern "C" {

__attribute__((visibility("default"))) void emulator_hand_over(Launcher to) { launcher = to; }

__attribute__((visibility("default"))) void emulator_set(int capability, int multiprocessors, unsigned seed) {
  emulator::settings = {capability, multiprocessors, seed};
}

// Between fibers, since the library was loaded.
__attribute__((visibility("default"))) uint64_t emulator_switches() { return emulator::num_switches; }
}

namespace bitune {

Error limits_of(int device, DeviceLimits* limits) {
  if (device != 0) return {101, "asking the device for its limits: there is one device"};
  limits->capability = emulator::settings.capability;
  limits->multiprocessors = emulator::settings.multiprocessors;
  return {};
}

// What cuTensorMapEncodeTiled demands.
Error map_rows(const Rows& x, Element, int num_heads, int dim, int box_rows, TensorMap* map) {
  auto refuse = [](const std::string& why) { return Error{1, "cuTensorMapEncodeTiled: " + why}; };
  if (!x.data || uintptr_t(x.data) % 16) return refuse("the address is null or no multiple of 16");
  for (int64_t size : {int64_t(dim), x.rows, int64_t(num_heads)}) {
    if (size < 1 || size > int64_t(1) << 32) return refuse("size " + std::to_string(size));
  }
  for (int64_t stride : {x.stride_row * 2, x.stride_head * 2}) {
    if (stride < 0 || stride % 16 || stride >= int64_t(1) << 40) {
      return refuse("stride of " + std::to_string(stride) + " bytes");
    }
  }
  if (box_rows < 1 || box_rows > 256) return refuse("box of " + std::to_string(box_rows) + " rows");
  *map = TensorMap();
  map->data = static_cast<const uint8_t*>(x.data);
  map->sizes[0] = dim;
  map->sizes[1] = x.rows;
  map->sizes[2] = num_heads;
  map->strides[0] = 2;
  map->strides[1] = x.stride_row * 2;
  map->strides[2] = x.stride_head * 2;
  map->box_rows = box_rows;
  return {};
}

Error run_grid(int blocks, int threads, int shared_bytes, void (*body)(const void*), const void* call, Kernel kernel) {
  static std::mutex one;
  std::lock_guard<std::mutex> lock(one);
  int capability = emulator::settings.capability;
  int limit = capability == 80 || capability == 87 ? 163 : capability < 90 ? 99 : capability < 120 ? 227 : 99;
  if (blocks < 1) return {9, "launching: " + std::to_string(blocks) + " blocks"};
  if (threads < 32 || threads % 32 || threads > emulator::kMaxWarps * 32) {
    return {9, "launching: " + std::to_string(threads) + " threads per block"};
  }
  if (shared_bytes < 0 || shared_bytes > limit * 1024) {
    return {1, "asking for shared memory: " + std::to_string(shared_bytes) + " bytes of " +
                   std::to_string(limit * 1024)};
  }
  if (launcher) {
    Dl_info library;
    dladdr(kernel.code, &library);
    uint64_t offset = uint64_t(kernel.code) - uint64_t(library.dli_fbase);
    std::string error = launcher(offset, blocks, threads, shared_bytes, kernel.params, kernel.size);
    return error.empty() ? Error{} : Error{-2, error};
  }
  gridDim = {uint32_t(blocks), 1, 1};
  blockDim = {uint32_t(threads), 1, 1};
  for (int i = 0; i < blocks; ++i) {
    blockIdx = {uint32_t(i), 0, 0};
    std::string error = emulator::run_block(i, threads, shared_bytes, body, call);
    if (!error.empty()) return {-2, error};
  }
  return {};
}

DeviceInfo device_info() {
  DeviceInfo info{};
  info.compiled_cuda = 12000;
  info.archs = "emulated";
  info.driver_cuda = 12000;
  int capability = emulator::settings.capability;
  info.devices.push_back({"emulator", capability / 10, capability % 10, ""});
  return info;
}

}  // namespace bitune
