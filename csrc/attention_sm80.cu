// The forward kernel for Ampere and what came after it: mma.sync, cp.async, one block per tile.
//
//     for each run of keys (prefix, mixed prompt, the segment's own) and each tile of keys in it:
//         s = q k^T;  p = exp2(s - m');  acc = acc exp2(m - m') + p v
//
// A tile's values are on their way while its scores are computed, the next keys while its values are summed. The
// hardware starts blocks in order, so the longest first.
#include <device/launch.h>
#include <device/ptx.cuh>

#include "kernels.h"
#include "tile.cuh"

namespace bitune {
namespace {

template <typename T, int D>
struct Shape {
  using Element = T;
  static constexpr int kDim = D;
  static constexpr Tile kTile = tile_sm80(D);
  static constexpr int kBlockM = kTile.block_m;
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kThreads = kBlockM / 16 * 32;  // 16 query rows per warp
  static constexpr int kBytesQ = kBlockM * columns(D) * 2;
  static constexpr int kBytesK = kBlockN * columns(D) * 2;
};

// s [16, kBlockN] = q k^T for a warp's query rows, from `row` on.
template <class S>
__device__ void scores(float (&s)[S::kBlockN / 2], uint32_t q, uint32_t k, int row) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (float& x : s) x = 0;
#pragma unroll
  for (int d = 0; d < S::kDim / 16; ++d) {
    uint32_t a[4];
    ptx::ldmatrix(a, q + chunk_offset(row + lane % 16, 2 * d + lane / 16, S::kBlockM));
#pragma unroll
    for (int j = 0; j < S::kBlockN / 16; ++j) {
      uint32_t b[4];
      ptx::ldmatrix(b, k + chunk_offset(16 * j + lane % 8 + lane / 16 * 8, 2 * d + lane / 8 % 2, S::kBlockN));
      ptx::mma<typename S::Element>(s + 8 * j, a, b[0], b[1]);
      ptx::mma<typename S::Element>(s + 8 * j + 4, a, b[2], b[3]);
    }
  }
}

// acc [16, kDim] += p v.
template <class S>
__device__ void add_values(float (&acc)[S::kDim / 2], const uint32_t (&p)[S::kBlockN / 4], uint32_t v) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < S::kBlockN / 16; ++j) {
    uint32_t a[4] = {p[4 * j], p[4 * j + 1], p[4 * j + 2], p[4 * j + 3]};
#pragma unroll
    for (int d = 0; d < S::kDim / 16; ++d) {
      uint32_t b[4];
      ptx::ldmatrix_transposed(b, v + chunk_offset(16 * j + lane % 16, 2 * d + lane / 16, S::kBlockN));
      ptx::mma<typename S::Element>(acc + 8 * d, a, b[0], b[1]);
      ptx::mma<typename S::Element>(acc + 8 * d + 4, a, b[2], b[3]);
    }
  }
}

// A tile of keys or values, on its way to shared memory after this. The mixed prompt is mixed here.
template <class S>
__device__ void fill(uint32_t target, const Rows& x, const PerHead& alpha, int dim, const Attention& a, const Run& r,
                     bool mixes, int head, int first) {
  const Bits* tile = row_of(x, int64_t(r.row) + first, head);
  if (mixes) {
    mix_rows<typename S::Element, S::kBlockN, S::kDim>(target, tile, x.stride_row, a.num_prompt * x.stride_row,
                                                       r.length - first, dim, per_head(alpha, head), threadIdx.x,
                                                       S::kThreads);
  } else {
    auto source = [&](int row) { return first + row < r.length ? tile + row * x.stride_row : nullptr; };
    copy_rows<S::kBlockN, S::kDim>(target, source, dim, threadIdx.x, S::kThreads);
  }
  ptx::cp_async_commit();
}

template <class S, bool kPrescaled>
__global__ void __launch_bounds__(S::kThreads) attend_sm80(const __grid_constant__ Attention a) {
  uint32_t q = ptx::dynamic_shared();
  uint32_t k = q + S::kBytesQ;
  uint32_t v = k + S::kBytesK;
  int head = blockIdx.x % a.num_heads_kv;
  // Read again wherever it is used: registers are what the loops are short of.
  const Item& item = reinterpret_cast<const Item*>(a.items)[blockIdx.x / a.num_heads_kv];
  Tokens of_tile = tokens(item, a.group_size, S::kBlockM);
  float unit = kPrescaled ? 1 : a.softmax_scale * kLog2e;
  int warp_row = threadIdx.x / 32 * 16;

  Softmax softmax;
  float acc[S::kDim / 2];

  for (int part = 0; part < (a.two_parts && item.second_stream_row >= 0 ? 2 : 1); ++part) {
    if (part == 0 || !a.goes_on) {
      ptx::sync_block();  // everyone is done with the first part's q
      copy_queries<S::kBlockM, S::kDim>(q, a, item, part ? item.second_row : item.q_row, head, threadIdx.x,
                                        S::kThreads);
      ptx::cp_async_commit();
      softmax.reset(a, query_of(a, item, head, S::kBlockM, warp_row));
#pragma unroll
      for (float& x : acc) x = 0;
    }
    for (int source = prefix; source <= own; ++source) {
      Run r = run(item, part, a.goes_on, source, of_tile, a.window, S::kBlockN);
      if (r.span.start >= r.span.stop) continue;
      bool mixes = source == mixed && a.alpha_k.data;
      const Rows& keys = source == prefix ? a.k_prefix : a.k;
      const Rows& values = source == prefix ? a.v_prefix : a.v;
      ptx::sync_block();  // everyone is done with the keys and values of the run before
      fill<S>(k, keys, a.alpha_k, a.head_dim, a, r, mixes, head, r.span.start);
      Bounds bounds[2];
      bounds_of(bounds, query_of(a, item, head, S::kBlockM, warp_row), item, r, a.window);
      for (int first = r.span.start; first < r.span.stop; first += S::kBlockN) {
        ptx::cp_async_wait<0>();
        ptx::sync_block();  // these keys are there, and everyone is done with the values before
        fill<S>(v, values, a.alpha_v, a.head_dim_v, a, r, mixes, head, first);
        float s[S::kBlockN / 2];
        scores<S>(s, q, k, warp_row);
        ptx::cp_async_wait<0>();
        ptx::sync_block();  // these values are there, and everyone is done with the keys
        if (first + S::kBlockN < r.span.stop)
          fill<S>(k, keys, a.alpha_k, a.head_dim, a, r, mixes, head, first + S::kBlockN);
        if (kPrescaled) scale_scores(s, a.softmax_scale, a.softcap);
        if (first < r.span.whole || first >= r.span.rest) mask_scores(s, first, bounds);
        float rescale[2];
        softmax.step(s, unit, rescale);
        multiply_rows(acc, rescale);
        uint32_t p[S::kBlockN / 4];
        pack_rows<typename S::Element>(s, p);
        add_values<S>(acc, p, v);
      }
    }
    store_part<typename S::Element>(a, item, part, query_of(a, item, head, S::kBlockM, warp_row), softmax, acc);
  }
  ptx::cp_async_wait<0>();  // a tile that sees no key has not waited for its queries
  write_cache<typename S::Element>(a, item, head, S::kBlockM, threadIdx.x, S::kThreads);
}

template <typename T, int D>
Error launch_shape(const Attention& a, void* stream) {
  using S = Shape<T, D>;
  auto kernel = prescaled(a) ? attend_sm80<S, true> : attend_sm80<S, false>;
  return launch(kernel, a.num_items * a.num_heads_kv, S::kThreads, S::kTile.shared_bytes, stream, a);
}

}  // namespace

Error forward_sm80(const Attention& a, void* stream) {
  return dispatch(a, [&](auto type, auto dim) {
    return launch_shape<decltype(type), decltype(dim)::value>(a, stream);
  });
}

}  // namespace bitune
