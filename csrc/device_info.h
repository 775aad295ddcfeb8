#pragma once

#include <string>
#include <vector>

namespace bitune {

struct Device {
  std::string name;
  int capability_major;
  int capability_minor;
  std::string error;  // why the compiled code cannot run here; empty where it can
};

struct DeviceInfo {
  int compiled_cuda;   // 1000 * major + 10 * minor, as CUDART_VERSION
  std::string archs;   // what the code was compiled for, "80 90a"
  int driver_cuda;     // newest CUDA version the driver serves, same encoding; 0 without a driver
  std::vector<Device> devices;
  std::string error;   // why there are no devices to list; empty otherwise
};

// Never throws for want of a GPU or driver: that is an answer, not a failure.
DeviceInfo device_info();

}  // namespace bitune
