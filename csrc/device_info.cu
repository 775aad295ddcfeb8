#include "device_info.h"

#include <cuda_runtime.h>

namespace bitune {
namespace {

// Asking for its attributes is how one learns whether this build has code for a device.
__global__ void probe() {}

std::string message(cudaError_t status) {
  if (status == cudaSuccess) return "";
  cudaGetLastError();  // do not leave the error behind for the next caller
  return std::string(cudaGetErrorString(status)) + " (" + cudaGetErrorName(status) + ")";
}

Device inspect(int index) {
  Device device{};
  cudaDeviceProp properties;
  cudaError_t status = cudaGetDeviceProperties(&properties, index);
  if (status == cudaSuccess) {
    device.name = properties.name;
    device.capability_major = properties.major;
    device.capability_minor = properties.minor;
    cudaFuncAttributes attributes;
    status = cudaSetDevice(index);
    if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, probe);
  }
  device.error = message(status);
  return device;
}

}  // namespace

DeviceInfo device_info() {
  DeviceInfo info{};
  info.compiled_cuda = CUDART_VERSION;
  info.archs = BITUNE_CUDA_ARCHS;
  info.error = message(cudaDriverGetVersion(&info.driver_cuda));
  if (!info.error.empty()) return info;
  if (info.driver_cuda == 0) {
    info.error = "no NVIDIA driver on this machine";
    return info;
  }
  int count = 0;
  int current = 0;
  info.error = message(cudaGetDeviceCount(&count));
  if (!info.error.empty()) return info;
  info.error = message(cudaGetDevice(&current));
  for (int index = 0; index < count; ++index) info.devices.push_back(inspect(index));
  if (count > 0) message(cudaSetDevice(current));
  return info;
}

}  // namespace bitune
