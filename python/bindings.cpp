#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "attention.h"
#include "device_info.h"
#include "schedule.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

// What travels instead of tensors: (address, stride_row, stride_head, rows), and (address, stride) per head.
using Rows = std::optional<std::tuple<uintptr_t, int64_t, int64_t, int64_t>>;
using PerHead = std::optional<std::pair<uintptr_t, int>>;

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Python has checked the call; these are the checks without which memory would be at stake.
void require(bool holds, const char* name, const char* expected) {
  if (!holds) throw py::value_error(std::string(name) + ": expected " + expected);
}

bitune::Rows rows(const Rows& given, const char* name) {
  if (!given) return {};
  auto [address, stride_row, stride_head, rows] = *given;
  require(0 <= rows && rows <= std::numeric_limits<int32_t>::max(), name, "less than 2^31 rows");
  require(rows == 0 || address, name, "an address");
  require(address % 16 == 0, name, "an address that is a multiple of 16 bytes");
  require(stride_row > 0 && stride_row % 8 == 0 && stride_head > 0 && stride_head % 8 == 0, name,
          "strides > 0 that are multiples of 8");
  return {pointer<void>(address), stride_row, stride_head, rows};
}

bitune::PerHead per_head(const PerHead& given) {
  if (!given) return {};
  return {pointer<const float>(given->first), given->second};
}

py::tuple forward(uintptr_t items, int num_items, bool bf16, int num_heads_kv, int group_size, int head_dim,
                  int head_dim_v, int num_prompt, const Rows& q, const Rows& k, const Rows& v, const Rows& k_prefix,
                  const Rows& v_prefix, const Rows& out, const Rows& streams, const Rows& k_written,
                  const Rows& v_written, uintptr_t slots, uintptr_t lse, const PerHead& alpha_k,
                  const PerHead& alpha_v, const PerHead& beta, uintptr_t sinks, float softmax_scale, float softcap,
                  int window, bool two_parts, bool goes_on, int device, uintptr_t stream) {
  require(num_items == 0 || (num_items > 0 && items), "items", "an address and a number >= 0");
  require(num_heads_kv > 0 && group_size > 0, "num_heads_kv, group_size", "numbers > 0");
  require(head_dim > 0 && head_dim % 8 == 0 && head_dim_v > 0 && head_dim_v % 8 == 0, "head_dim, head_dim_v",
          "multiples of 8");
  require(num_prompt >= 0 && window >= 0, "num_prompt, window", "numbers >= 0");
  require(q && k && v && out, "q, k, v, out", "tensors, got None");
  require(bool(k_prefix) == bool(v_prefix), "k_prefix, v_prefix", "both or neither");
  require(bool(k_written) == bool(v_written), "k_written, v_written", "both or neither");
  require(bool(alpha_k) == bool(alpha_v), "alpha_k, alpha_v", "both or neither");
  require(k_written || !slots, "slots", "k_written with them");
  bitune::Attention a;
  a.items = pointer<const int32_t>(items);
  a.num_items = num_items;
  a.element = bf16 ? bitune::Element::bf16 : bitune::Element::fp16;
  a.num_heads_kv = num_heads_kv;
  a.group_size = group_size;
  a.head_dim = head_dim;
  a.head_dim_v = head_dim_v;
  a.num_prompt = num_prompt;
  a.q = rows(q, "q");
  a.k = rows(k, "k");
  a.v = rows(v, "v");
  a.k_prefix = rows(k_prefix, "k_prefix");
  a.v_prefix = rows(v_prefix, "v_prefix");
  a.out = rows(out, "out");
  a.streams = rows(streams, "streams");
  a.k_written = rows(k_written, "k_written");
  a.v_written = rows(v_written, "v_written");
  a.slots = pointer<const int64_t>(slots);
  a.lse = pointer<float>(lse);
  a.alpha_k = per_head(alpha_k);
  a.alpha_v = per_head(alpha_v);
  a.beta = per_head(beta);
  a.sinks = pointer<const float>(sinks);
  a.softmax_scale = softmax_scale;
  a.softcap = softcap;
  a.window = window;
  a.two_parts = two_parts;
  a.goes_on = goes_on;
  bitune::Error error = bitune::forward(a, device, pointer<void>(stream));
  return py::make_tuple(error.code, error.text);
}

int capability(int device) {
  int found = 0;
  bitune::Error error = bitune::capability_of(device, &found);
  if (error.code) throw std::runtime_error(error.text);
  return found;
}

py::tuple forward_tile(int capability, int head_dim, int head_dim_v) {
  bitune::Tile tile = bitune::forward_tile(capability, head_dim, head_dim_v);
  return py::make_tuple(tile.block_m, tile.block_n, tile.shared_bytes);
}

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
#ifdef BITUNE_EMULATED
  module.attr("DEVICE_TYPE") = "cpu";  // the tests' build: the kernels' own source, run by the host
#else
  module.attr("DEVICE_TYPE") = "cuda";
#endif
#define NAME(column) #column,
  module.attr("ITEM_COLUMNS") = py::tuple(py::cast(std::vector<std::string>{BITUNE_ITEM(NAME)}));
#undef NAME
  module.def("device_info", &device_info,
             "What the extension was compiled for and what the CUDA runtime sees; never raises for want of a GPU.");
  module.def("capability", &capability, "device"_a,
             "The compute capability of a device, 90 for 9.0. RuntimeError where there is none.");
  module.def("forward_tile", &forward_tile, "capability"_a, "head_dim"_a, "head_dim_v"_a,
             "(block_m, block_n, bytes of shared memory) of forward() on such a device, zeros where it has no kernel.");
  module.def("forward", &forward, py::kw_only(), "items"_a, "num_items"_a, "bf16"_a, "num_heads_kv"_a,
             "group_size"_a, "head_dim"_a, "head_dim_v"_a, "num_prompt"_a, "q"_a, "k"_a, "v"_a, "k_prefix"_a,
             "v_prefix"_a, "out"_a, "streams"_a, "k_written"_a, "v_written"_a, "slots"_a, "lse"_a, "alpha_k"_a,
             "alpha_v"_a, "beta"_a, "sinks"_a, "softmax_scale"_a, "softcap"_a, "window"_a, "two_parts"_a, "goes_on"_a,
             "device"_a, "stream"_a,
             "The launch of csrc/attention.h: (error code or 0, its text). Tensors [rows, heads, dim] travel as "
             "(address, stride_row, stride_head, rows) or None, weights as (address, stride) or None.");
}
