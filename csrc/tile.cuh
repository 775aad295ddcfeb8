// What the attention kernels of all architectures share: rows in and out of a tile, masks, the online softmax.
//
// The scores and the output of 16 query rows are spread over a warp as the matrix units leave them: a thread has row
// lane / 4 and the row 8 below it, of every 8 columns the two from 2 (lane % 4) on. In an array x of such a thread,
// x[4 j + 2 r + c] is column 8 j + 2 (lane % 4) + c of its row r.
#pragma once

#include <device/ptx.cuh>

#include "attention.h"
#include "layout.h"
#include "schedule.h"

namespace bitune {

constexpr float kLog2e = 1.4426950408889634f;

// Elements in global memory, whatever their type.
using Bits = uint16_t;

__device__ inline Bits* row_of(const Rows& x, int64_t row, int head) {
  return static_cast<Bits*>(x.data) + row * x.stride_row + head * x.stride_head;
}

__device__ inline float per_head(const PerHead& x, int head) { return x.data[head * x.stride]; }

// Rows to shared memory, 8 threads per row. `source(row)`: where a row begins, null for a row of zeros.
template <int kRows, int kDim, class Source>
__device__ void copy_rows(uint32_t target, Source source, int dim, int thread, int threads) {
#pragma unroll 1  // the roles that copy are short of registers
  for (int row = thread / 8; row < kRows; row += threads / 8) {
    const Bits* x = source(row);
#pragma unroll 1
    for (int i = 0; i < (kDim + 63) / 64; ++i) {
      int chunk = thread % 8 + 8 * i;
      if (chunk * 8 >= kDim) continue;
      ptx::cp_async(target + chunk_offset(row, chunk, kRows), x ? x + chunk * 8 : nullptr, x && chunk * 8 < dim);
    }
  }
}

// The packed query rows of a tile. q_row: the segment's first row in q.
template <int kRows, int kDim>
__device__ void copy_queries(uint32_t target, const Attention& a, const Item& item, int q_row, int head, int thread,
                             int threads) {
  auto source = [&](int row) -> const Bits* {
    int packed = item.block * kRows + row;
    int token = packed / a.group_size;
    if (token >= item.length) return nullptr;
    return row_of(a.q, int64_t(q_row) + token, head * a.group_size + packed - token * a.group_size);
  };
  copy_rows<kRows, kDim>(target, source, a.head_dim, thread, threads);
}

// (1 - alpha) causal + alpha bidir in float32, rounded as a cache would hold it.
template <typename T>
__device__ uint4 mix(uint4 causal, uint4 bidir, float alpha) {
  auto both = [alpha](uint32_t c, uint32_t b) {
    float2 x = ptx::unpack<T>(c);
    float2 y = ptx::unpack<T>(b);
    return ptx::pack<T>((1 - alpha) * x.x + alpha * y.x, (1 - alpha) * x.y + alpha * y.y);
  };
  return make_uint4(both(causal.x, bidir.x), both(causal.y, bidir.y), both(causal.z, bidir.z), both(causal.w, bidir.w));
}

// Mixed rows to shared memory, `valid` of them, then zeros. The causal row is to_causal elements after the bidir one.
template <typename T, int kRows, int kDim>
__device__ void mix_rows(uint32_t target, const Bits* bidir, int64_t stride_row, int64_t to_causal, int valid, int dim,
                         float alpha, int thread, int threads) {
  for (int row = thread / 8; row < kRows; row += threads / 8) {
    const Bits* x = bidir + row * stride_row;
#pragma unroll
    for (int i = 0; i < (kDim + 63) / 64; ++i) {
      int chunk = thread % 8 + 8 * i;
      uint4 mixed = make_uint4(0, 0, 0, 0);
      if (row < valid && chunk * 8 < dim)
        mixed = mix<T>(ptx::load_chunk(x + to_causal + chunk * 8), ptx::load_chunk(x + chunk * 8), alpha);
      if (chunk * 8 < kDim) ptx::store_shared(target + chunk_offset(row, chunk, kRows), mixed);
    }
  }
}

// The tile's own tokens to the mixed keys and values, or to the cache. A thread loads two chunks of a row, of both
// streams, before it stores the first: as far as the compiler knows a store may change what is read after it.
template <typename T>
__device__ void write_rows(const Rows& x, const Rows& target, const PerHead& weight, int dim, const Attention& a,
                           const Item& item, Bounds tokens, int head, int thread, int threads) {
  bool mixes = item.write_mixed;
  int64_t write_row = item.write_row;
  int64_t read_row = mixes ? item.write_row : item.own_row;
  float alpha = mixes ? per_head(weight, head) : 0;
  int64_t to_causal = a.num_prompt * x.stride_row;
#pragma unroll 1
  for (int i = tokens.low + thread / 8; i < tokens.high; i += threads / 8) {
    const Bits* from = row_of(x, read_row + i, head);
    Bits* to = row_of(target, a.slots ? a.slots[write_row + i] : write_row + i, head);
#pragma unroll 1
    for (int first = thread % 8 * 8; first < dim; first += 128) {
      uint4 bidir[2] = {};  // zeros: else what isn't loaded takes registers from tile to tile
      uint4 causal[2] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        int column = first + 64 * j;
        if (column < dim) bidir[j] = ptx::load_chunk(from + column);
        if (column < dim && mixes) causal[j] = ptx::load_chunk(from + to_causal + column);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        int column = first + 64 * j;
        if (column < dim) ptx::store_chunk(to + column, mixes ? mix<T>(causal[j], bidir[j], alpha) : bidir[j]);
      }
    }
  }
}

template <typename T>
__device__ void write_cache(const Attention& a, const Item& item, int head, int block_m, int thread, int threads) {
  if (!item.write_length) return;
  Bounds tokens = written(item, a.group_size, block_m);
  write_rows<T>(a.k, a.k_written, a.alpha_k, a.head_dim, a, item, tokens, head, thread, threads);
  write_rows<T>(a.v, a.v_written, a.alpha_v, a.head_dim_v, a, item, tokens, head, thread, threads);
}

// The two packed rows of a thread. Rows beyond the segment repeat its last token, so that they see what some row sees;
// they are not stored.
struct Queries {
  int token[2];
  int head[2];
  bool stored[2];
};

// row: of the tile, the first of the warp's 16.
__device__ inline Queries query_of(const Attention& a, const Item& item, int head, int block_m, int row) {
  Queries q;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int packed = item.block * block_m + row + threadIdx.x % 32 / 4 + 8 * r;
    int token = packed / a.group_size;
    q.token[r] = lesser(token, greater(item.length - 1, 0));
    q.head[r] = head * a.group_size + packed - token * a.group_size;
    q.stored[r] = token < item.length;
  }
  return q;
}

// Keys of a run that each of the two rows sees.
__device__ inline void bounds_of(Bounds (&bounds)[2], const Queries& query, const Item& item, const Run& r,
                                 int window) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
    bounds[i] = visible(item.position + query.token[i] - r.position, r.length, r.mask, window);
}

// s, as q k left it, in units of log2: only where the scale can't be left to the exponent.
template <int N>
__device__ void scale_scores(float (&s)[N], float scale, float softcap) {
  if (softcap == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) s[i] *= scale * kLog2e;
    return;
  }
  float inner = 2 * kLog2e * scale / softcap;
#pragma unroll
  for (int i = 0; i < N; ++i)  // tanh x = 1 - 2 / (1 + exp 2 x)
    s[i] = softcap * kLog2e * (1 - 2 * ptx::reciprocal(1 + ptx::exp2(s[i] * inner)));
}

// first_key: the run's key in column 0. One comparison per score where nothing is hidden before a row's keys.
template <int N>
__device__ void mask_scores(float (&s)[N], int first_key, const Bounds (&bounds)[2]) {
  int key = first_key + threadIdx.x % 4 * 2;
  int high[2] = {bounds[0].high - key, bounds[1].high - key};
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i / 4 * 8 + i % 2 >= high[i / 2 % 2]) s[i] = -ptx::infinity();
  if (bounds[1].low <= first_key) return;  // the other row's isn't higher
  int low[2] = {bounds[0].low - key, bounds[1].low - key};
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i / 4 * 8 + i % 2 < low[i / 2 % 2]) s[i] = -ptx::infinity();
}

// The online softmax of a thread's two rows. m: largest score so far, in log2. l: the thread's share of the sum of
// exp2(s - m).
struct Softmax {
  float m[2];
  float l[2];

  __device__ void reset(const Attention& a, const Queries& query) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // A sink is one more score, without a value.
      m[r] = a.sinks ? a.sinks[query.head[r]] * kLog2e : -ptx::infinity();
      l[r] = a.sinks && threadIdx.x % 4 == 0 ? 1 : 0;
    }
  }

  // s becomes exp2(s unit - m). `rescale`: what has been summed so far must be multiplied by it.
  template <int N>
  __device__ void step(float (&s)[N], float unit, float (&rescale)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = s[2 * r];
#pragma unroll
      for (int i = 0; i < N; i += 4) largest = fmaxf(largest, fmaxf(s[i + 2 * r], s[i + 2 * r + 1]));
      largest = fmaxf(largest, ptx::shuffle_xor(largest, 1));
      largest = fmaxf(largest, ptx::shuffle_xor(largest, 2));
      largest = fmaxf(m[r], largest * unit);
      float base = largest == -ptx::infinity() ? 0 : largest;  // no key seen yet
      rescale[r] = ptx::exp2(m[r] - base);
      m[r] = largest;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        s[i + 2 * r] = ptx::exp2(s[i + 2 * r] * unit - base);
        s[i + 2 * r + 1] = ptx::exp2(s[i + 2 * r + 1] * unit - base);
        sum += s[i + 2 * r] + s[i + 2 * r + 1];
      }
      l[r] = l[r] * rescale[r] + sum;
    }
  }
};

template <int N>
__device__ void multiply_rows(float (&x)[N], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] *= factor[i / 2 % 2];
}

// x times `weight` in the element type, two columns per register: what a matrix product takes as its left operand, 16
// columns from packed[4 k] on.
template <typename T, int N>
__device__ void pack_rows(const float (&x)[N], uint32_t (&packed)[N / 2], float weight = 1) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) packed[i] = ptx::pack<T>(x[2 * i] * weight, x[2 * i + 1] * weight);
}

// x times `factor` to the rows that aren't null. Quads exchange what they have, so that each thread stores 16 bytes.
template <typename T, int N>
__device__ void store_rows(const float (&x)[N], const float (&factor)[2], Bits* const (&row)[2], int dim) {
  int lane = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < N / 16; ++i) {  // 32 columns
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        w[j] = ptx::pack<T>(x[16 * i + 4 * j + 2 * r] * factor[r], x[16 * i + 4 * j + 2 * r + 1] * factor[r]);
      // Transposes the quad's 4 x 4 words.
#pragma unroll
      for (int bit = 1; bit < 4; bit *= 2) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (j & bit) continue;
          uint32_t& low = w[j];
          uint32_t& high = w[j + bit];
          uint32_t other = ptx::shuffle_xor(lane & bit ? low : high, bit);
          (lane & bit ? low : high) = other;
        }
      }
      int column = 32 * i + 8 * lane;
      if (row[r] && column < dim) ptx::store_chunk(row[r] + column, make_uint4(w[0], w[1], w[2], w[3]));
    }
  }
}

// The outputs of one part of a tile: acc / l, and lse = m + log2 l. A row that saw nothing: 0, and -inf.
// With beta the first part waits in `out` until the second is mixed into it.
template <typename T, int N>
__device__ void store_part(const Attention& a, const Item& item, int part, const Queries& query,
                           const Softmax& softmax, float (&acc)[N]) {
  int stream_row = part ? item.second_stream_row : item.stream_row;
  bool two = item.second_stream_row >= 0;
  bool mixes = a.beta.data != nullptr;
  int num_heads = a.num_heads_kv * a.group_size;
  float factor[2];
  Bits* out[2];
  Bits* stream[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float l = softmax.l[r];
    l += ptx::shuffle_xor(l, 1);
    l += ptx::shuffle_xor(l, 2);
    l = l > 0 ? l : 1;
    factor[r] = 1 / l;
    int64_t row = int64_t(stream_row) + query.token[r];
    if (a.lse && query.stored[r] && threadIdx.x % 4 == 0)
      a.lse[row * num_heads + query.head[r]] = softmax.m[r] + ptx::log2(l);
    int64_t out_row = mixes ? int64_t(item.out_row) + query.token[r] : row;
    out[r] = query.stored[r] ? row_of(a.out, out_row, query.head[r]) : nullptr;
    stream[r] = query.stored[r] ? row_of(a.streams, row, query.head[r]) : nullptr;
  }
  if (mixes && two && a.streams.data) store_rows<T>(acc, factor, stream, a.head_dim_v);
  if (mixes && part == 1) {
    ptx::sync_warp();  // the first part was stored by other threads of the quad
    multiply_rows(acc, factor);
    factor[0] = factor[1] = 1;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float beta = per_head(a.beta, query.head[r]);
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        int column = 8 * i + threadIdx.x % 4 * 2;
        if (!out[r] || column >= a.head_dim_v) continue;
        float2 first = ptx::unpack<T>(*reinterpret_cast<const uint32_t*>(out[r] + column));
        float* second = acc + 4 * i + 2 * r;
        second[0] = (1 - beta) * first.x + beta * second[0];
        second[1] = (1 - beta) * first.y + beta * second[1];
      }
    }
    ptx::sync_warp();  // before others of the quad overwrite it
  }
  store_rows<T>(acc, factor, out, a.head_dim_v);
}

}  // namespace bitune
