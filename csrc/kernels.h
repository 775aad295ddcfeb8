// The kernels' host side: which tiles they have, and their launches.
#pragma once

#include <type_traits>

#include <device/ptx.cuh>

#include "attention.h"

namespace bitune {

// Columns of an operand in shared memory: whole tiles of 64.
constexpr int columns(int dim) { return (dim + 63) / 64 * 64; }

// sm80: queries, keys, values.
constexpr Tile tile_sm80(int dim) {
  Tile t = dim > 128 ? Tile{64, 32} : Tile{128, 64};
  t.shared_bytes = (t.block_m + 2 * t.block_n) * columns(dim) * 2;
  return t;
}

// sm90: queries, rings of keys and values, and the mbarriers of each buffer.
constexpr int kStages = 2;
constexpr Tile tile_sm90(int dim) {
  Tile t = dim > 128 ? Tile{128, 64} : Tile{128, 128};
  t.shared_bytes = (t.block_m + 2 * kStages * t.block_n) * columns(dim) * 2 + 2 * (1 + 2 * kStages) * 8;
  return t;
}

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
