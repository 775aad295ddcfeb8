// The forward of bitune_attention (bitune_kernels/ops.py), as Python asks for it. Neither torch nor pybind11 here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace bitune {

enum class Element { bf16, fp16 };

// A tensor [rows, heads, dim] of T on the device, each row of dim elements 16-byte aligned. Strides in elements.
struct Rows {
  void* data = nullptr;
  int64_t stride_row = 0;
  int64_t stride_head = 0;
  int64_t rows = 0;
};

// A float32 on the device per head (stride 1), or one for all (stride 0).
struct PerHead {
  const float* data = nullptr;
  int stride = 0;
};

struct Attention {
  // one row of int32 per tile, see schedule.h: int32 [num_items, Item::columns]
  const int32_t* items = nullptr;
  int num_items = 0;

  Element element = Element::bf16;
  int num_heads_kv = 0;
  int group_size = 0;  // query heads per key/value head
  int head_dim = 0;    // of q and k; a multiple of 8
  int head_dim_v = 0;  // likewise
  int num_prompt = 0;  // rows of one stream's prompt: causal row = bidir row + num_prompt

  Rows q, k, v;
  Rows k_prefix, v_prefix;  // no data: no sample has a prefix
  Rows out;                 // [rows, heads, head_dim_v]
  Rows streams;             // outputs of both streams before beta mixes them; no data: not wanted
  Rows k_written, v_written;       // mixed keys and values, or the cache; no data: nothing is written
  const int64_t* slots = nullptr;  // row of k_written of each mixed row and then each answer row; null: the row itself
  float* lse = nullptr;            // [rows of all streams, heads] in log2; null: not wanted

  PerHead alpha_k, alpha_v;  // no data: one stream, nothing is mixed
  PerHead beta;              // no data: the streams' outputs stay apart
  const float* sinks = nullptr;  // [heads]; null: none

  float softmax_scale = 1;
  float softcap = 0;  // 0: none
  int window = 0;     // 0: none
  bool two_parts = false;  // prompt tiles compute both streams
  bool goes_on = false;    // the second part goes on with the softmax of the first
};

// A call that can't run: never a crash, and never nothing.
struct Error {
  int code = 0;  // 0: none; else a cudaError_t, or -1 for what was refused before CUDA was asked
  std::string text;
};

// Packed query rows and keys of a kernel's tiles, and the shared memory that its blocks take.
struct Tile {
  int block_m = 0;
  int block_n = 0;
  int shared_bytes = 0;
};

// What forward() uses on a GPU of this compute capability (90: 9.0). block_m 0: there is no kernel for it.
Tile forward_tile(int capability, int head_dim, int head_dim_v);

// Compute capability of a device times 10.
Error capability_of(int device, int* capability);

// Launches on the device and its stream (a cudaStream_t), waits for nothing and allocates nothing.
Error forward(const Attention& attention, int device, void* stream);

}  // namespace bitune
