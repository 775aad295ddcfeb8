#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "device_info.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

py::dict device_info() {
  bitune::DeviceInfo info;
  {
    py::gil_scoped_release release;  // a first look at a GPU can take seconds
    info = bitune::device_info();
  }
  py::list devices;
  for (const bitune::Device& device : info.devices) {
    devices.append(py::dict("name"_a = device.name,
                            "capability"_a = py::make_tuple(device.capability_major, device.capability_minor),
                            "error"_a = device.error));
  }
  return py::dict("compiled_cuda"_a = info.compiled_cuda, "archs"_a = info.archs,
                  "driver_cuda"_a = info.driver_cuda, "devices"_a = devices, "error"_a = info.error);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("device_info", &device_info,
             "What the extension was compiled for and what the CUDA runtime sees; never raises for want of a GPU.");
}
