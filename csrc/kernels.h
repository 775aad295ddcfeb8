// The kernels' host side: which tiles they have, and their launches.
#pragma once

#include <type_traits>

#include <device/ptx.cuh>

#include "attention.h"

namespace bitune {

constexpr Tile tile_sm80(int dim) { return dim > 128 ? Tile{64, 32} : Tile{128, 64}; }
constexpr Tile tile_sm90(int dim) { return dim > 128 ? Tile{128, 64} : Tile{128, 128}; }

Error forward_sm80(const Attention& attention, void* stream);
Error forward_sm90(const Attention& attention, int multiprocessors, void* stream);

// A positive scale without a cap is left to the exponent's multiply-add.
inline bool prescaled(const Attention& a) { return a.softcap != 0 || !(a.softmax_scale > 0); }

// f(type, head dim) with both as types.
template <class F>
Error dispatch(const Attention& a, F f) {
  int dim = a.head_dim > a.head_dim_v ? a.head_dim : a.head_dim_v;
  auto of_type = [&](auto type) -> Error {
    if (dim <= 64) return f(type, std::integral_constant<int, 64>{});
    if (dim <= 96) return f(type, std::integral_constant<int, 96>{});
    if (dim <= 128) return f(type, std::integral_constant<int, 128>{});
    if (dim <= 256) return f(type, std::integral_constant<int, 256>{});
    return {-1, "head_dim: expected at most 256, got " + std::to_string(dim)};
  };
  return a.element == Element::bf16 ? of_type(Bf16{}) : of_type(Fp16{});
}

}  // namespace bitune
