// Small kernels, right and wrong. `variant` says what is wrong.
#include <device/launch.h>
#include <device/wgmma.cuh>

#include "layout.h"

namespace {

using namespace bitune;
using namespace bitune::ptx;

struct Params {
  int variant;
  int k;  // summed columns
  int z, y, x;
  const uint16_t* a;
  const uint16_t* b;
  float* out;
  uint32_t* words;
  TensorMap map;
};

__device__ bool is(const Params& p, int variant) { return p.variant == variant; }

// Two warps copy 32 rows of 8 elements each; each reads what the other has copied (variant 1, 2: itself).
__global__ void __launch_bounds__(64) copies(const __grid_constant__ Params p) {
  int lane = threadIdx.x % 32;
  int warp = threadIdx.x / 32;
  uint32_t base = dynamic_shared();
  cp_async(base + threadIdx.x * 16, p.a + threadIdx.x * 8, !(is(p, 5) && threadIdx.x % 2));
  cp_async_commit();
  if (!is(p, 1) && !is(p, 4)) cp_async_wait<0>();
  if (!is(p, 2)) sync_warp();
  bool own = is(p, 1) || is(p, 2);
  if (!own && !is(p, 3)) sync_block();
  uint32_t r[4];
  ldmatrix(r, base + (own ? warp : 1 - warp) * 512 + lane * 16);
  for (int i = 0; i < 4; ++i) p.words[threadIdx.x * 4 + i] = r[i];
  if (is(p, 1)) cp_async_wait<0>();
}

// Numbers of barriers.
__global__ void __launch_bounds__(128) barriers(const __grid_constant__ Params p) {
  uint32_t barrier = dynamic_shared();
  int warp = threadIdx.x / 32;
  if (is(p, 0)) {
    if (warp < 2) {
      barrier_sync(1, 64);
    } else {
      barrier_arrive(2, 128);
    }
    if (warp < 2) barrier_sync(2, 128);
    sync_block();
  }
  if (is(p, 1) && warp == 0) barrier_sync(3, 64);
  if (is(p, 2)) barrier_sync(3, warp ? 64 : 128);
  if (is(p, 3)) barrier_sync(16, 128);
  if (is(p, 4)) {
    if (threadIdx.x == 0) sync_warp();
    if (threadIdx.x == 1) shuffle_xor(1u, 1);
  }
  if (p.variant < 5) return;
  if (threadIdx.x == 0) {
    if (!is(p, 5)) mbarrier_init(barrier, 2);
    if (!is(p, 6)) mbarrier_init_done();
    if (is(p, 7)) mbarrier_init(barrier, 2);
  }
  sync_block();
  if (warp == 1 && threadIdx.x % 32 == 0) {
    mbarrier_arrive(barrier);
    if (is(p, 9)) mbarrier_arrive_expect(barrier, 64);
    if (is(p, 9)) mbarrier_arrive(barrier);
  }
  if (is(p, 10) && warp == 2 && threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
  if (!is(p, 9)) mbarrier_wait(barrier, 0);
}

// A box into shared memory and out of it, as layout.h says it stands.
__global__ void __launch_bounds__(64) boxes(const __grid_constant__ Params p) {
  uint32_t base = dynamic_shared();
  uint32_t barrier = base + 16384;
  int rows = 32;
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_done();
    if (is(p, 1)) store_shared(base, make_uint4(1, 2, 3, 4));
    mbarrier_arrive_expect(barrier, is(p, 3) ? 4096 + 16 : 4096);
    tma_load(base + (is(p, 4) ? 64 : 0), &p.map, barrier, p.x, p.y, p.z);
  }
  sync_block();
  if (!is(p, 2)) mbarrier_wait(barrier, 0);
  if (threadIdx.x < 32) {
    for (int chunk = 0; chunk < 8; ++chunk) {
      uint32_t r[4];
      ldmatrix(r, base + chunk_offset(threadIdx.x, chunk, rows));
      for (int i = 0; i < 4; ++i) {
        p.words[(8 * i + threadIdx.x / 4) * 32 + chunk * 4 + threadIdx.x % 4] = r[i];
      }
    }
  }
}

// A ring of two boxes that one warp fills and four warps empty.
__global__ void __launch_bounds__(160) ring(const __grid_constant__ Params p) {
  uint32_t base = dynamic_shared();
  uint32_t filled = base + 16384;
  uint32_t emptied = filled + 16;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(filled + i * 8, 1);
      mbarrier_init(emptied + i * 8, 4);
    }
    mbarrier_init_done();
  }
  sync_block();
  int warp = threadIdx.x / 32;
  for (int step = 0; step < 12; ++step) {
    int stage = step % 2;
    int parity = step / 2 % 2;
    if (warp == 4) {
      if (threadIdx.x % 32) continue;
      if (!is(p, 1)) mbarrier_wait(emptied + stage * 8, parity ^ 1);
      mbarrier_arrive_expect(filled + stage * 8, 4096);
      tma_load(base + stage * 4096, &p.map, filled + stage * 8, 0, step, 0);
    } else {
      mbarrier_wait(filled + stage * 8, parity);
      if (is(p, 2)) {
        sync_warp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(emptied + stage * 8);
      }
      uint32_t r[4];
      ldmatrix(r, base + stage * 4096 + chunk_offset(threadIdx.x % 32, warp, 32));
      if (!is(p, 2)) {
        sync_warp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(emptied + stage * 8);
      }
      for (int i = 0; i < 4; ++i) p.words[((step * 4 + warp) * 32 + threadIdx.x % 32) * 4 + i] = r[i];
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(32) warp_product(const __grid_constant__ Params p) {
  // a [16, 16], b [16, 16] with columns summed by ldmatrix, then with rows summed by its transposed form
  uint32_t base = dynamic_shared();
  int lane = threadIdx.x;
  const uint4* a = reinterpret_cast<const uint4*>(p.a);
  const uint4* b = reinterpret_cast<const uint4*>(p.b);
  store_shared(base + lane * 16, a[lane]);
  store_shared(base + 512 + lane * 16, b[lane]);
  sync_warp();
  uint32_t x[4], y[4];
  ldmatrix(x, base + (lane % 16) * 32 + lane / 16 * 16);
  float d[2][4] = {};
  if (is(p, 0)) {
    ldmatrix(y, base + 512 + (lane % 16) * 32 + lane / 16 * 16);
    mma<T>(d[0], x, y[0], y[2]);
    mma<T>(d[1], x, y[1], y[3]);
  } else {
    ldmatrix_transposed(y, base + 512 + (lane % 16) * 32 + lane / 16 * 16);
    mma<T>(d[0], x, y[0], y[1]);
    mma<T>(d[1], x, y[2], y[3]);
  }
  for (int repeat = 0; repeat < p.k; ++repeat) mma<T>(d[repeat % 2], x, 0, 0);
  for (int i = 0; i < 8; ++i) {
    p.out[(lane / 4 + i % 4 / 2 * 8) * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i / 4][i % 4];
  }
}

// [rows, columns] from global memory to where layout.h puts it.
__device__ void load_tiles(uint32_t target, const uint16_t* source, int rows, int columns) {
  for (int i = threadIdx.x; i < rows * columns / 8; i += 128) {
    int row = i / (columns / 8);
    int chunk = i % (columns / 8);
    store_shared(target + chunk_offset(row, chunk, rows), *reinterpret_cast<const uint4*>(source + i * 8));
  }
}

// a [64, k] times b: [N, k], or [k, N] with a in registers.
template <typename T, int N, bool registers>
__global__ void __launch_bounds__(128) group_product(const __grid_constant__ Params p) {
  uint32_t a = dynamic_shared();
  uint32_t b = a + 64 * p.k * 2;
  if (!registers) load_tiles(a, p.a, 64, p.k);
  if (registers) {
    load_tiles(b, p.b, p.k, N);
  } else {
    load_tiles(b, p.b, N, p.k);
  }
  if (!is(p, 1)) fence_async();
  if (!is(p, 6)) sync_block();
  int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  int column = threadIdx.x % 4 * 2;
  float d[N / 2];
  for (int i = 0; i < N / 2; ++i) d[i] = 1;
  uint32_t operands[8][4];
  if (!is(p, 7)) wgmma_fence();
  for (int k = 0; k < p.k; k += 16) {
    if (registers) {
      uint32_t* x = operands[k / 16];
      for (int i = 0; i < 4; ++i) {
        x[i] = *reinterpret_cast<const uint32_t*>(p.a + (row + i % 2 * 8) * p.k + k + column + i / 2 * 8);
      }
      Wgmma<T, N>::rs(d, x, wgmma_descriptor(b + k * 128, p.k * 128), 1);
    } else {
      uint32_t step = k % 64 * 2;
      Wgmma<T, N>::ss(d, wgmma_descriptor(a + k / 64 * 64 * 128 + step, 0),
                      wgmma_descriptor(b + k / 64 * N * 128 + step, 0), 1);
    }
    if (is(p, 9)) {
      wgmma_commit();
      wgmma_wait<1>();
      wgmma_fence();
    }
  }
  if (!is(p, 4) && !is(p, 9)) wgmma_commit();
  if (is(p, 2)) sync_block();
  if (is(p, 2)) store_shared(b + threadIdx.x * 16, make_uint4(0, 0, 0, 0));
  if (is(p, 8)) d[3] = 0;
  if (is(p, 10)) operands[0][3] += 1;
  if (!is(p, 3) && !is(p, 5)) wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) p.out[(row + i % 4 / 2 * 8) * N + i / 4 * 8 + column + i % 2] = d[i];
  if (is(p, 3)) wgmma_wait<0>();
  for (int repeat = 0; repeat < p.x; ++repeat) {
    wgmma_fence();
    for (int i = 0; i < 8; ++i) Wgmma<T, N>::ss(d, wgmma_descriptor(a, 0), wgmma_descriptor(a, 0), 1);
    wgmma_commit();
    wgmma_wait<0>();
  }
}

// Two warpgroups clear the same operands, and each waits for itself alone.
__global__ void __launch_bounds__(256) same_stores(const __grid_constant__ Params p) {
  uint32_t a = dynamic_shared();
  int group = threadIdx.x / 128;
  for (int i = threadIdx.x % 128; i < 512; i += 128) {
    store_shared(a + i * 16, make_uint4(is(p, 1) ? group : 0, 0, 0, 0));
  }
  if (!is(p, 2) || group) fence_async();
  barrier_sync(1 + group, 128);
  float d[32];
  wgmma_fence();
  Wgmma<Bf16, 64>::ss(d, wgmma_descriptor(a, 0), wgmma_descriptor(a, 0), 0);
  wgmma_commit();
  wgmma_wait<0>();
}

__global__ void __launch_bounds__(512) shuffles(const __grid_constant__ Params p) {
  uint32_t x = threadIdx.x;
  for (int i = 0; i < p.k; ++i) x = shuffle_xor(x, 1 + i % 16);
  p.words[threadIdx.x] = x;
}

__global__ void __launch_bounds__(256) registers(const __grid_constant__ Params p) {
  if (threadIdx.x < 128) {
    if (!is(p, 1) || threadIdx.x < 96) raise_registers<240>();
  } else {
    lower_registers<24>();
  }
}

template <typename T>
Error product(const Params& p, int n, bool rs) {
  int bytes = (64 + n) * p.k * 2;
  switch (n * 2 + rs) {
#define CASE(N)                                                                        \
  case N * 2:                                                                          \
    return launch(group_product<T, N, false>, 1, 128, bytes, nullptr, p);              \
  case N * 2 + 1:                                                                      \
    return launch(group_product<T, N, true>, 1, 128, bytes, nullptr, p);
    CASE(64) CASE(128) CASE(256)
#undef CASE
  }
  return {-1, "no such product"};
}

std::string text;

const char* told(const Error& error) {
  text = error.text;
  return text.c_str();
}

}  // namespace

#define SHOWN extern "C" __attribute__((visibility("default")))

// The text of the error, "" if there is none.
SHOWN const char* run(const char* kernel, int variant, int k, const uint16_t* a, uint32_t* words) {
  Params p{};
  p.variant = variant;
  p.k = k;
  p.a = a;
  p.words = words;
  std::string name = kernel;
  if (name == "copies") return told(launch(copies, 1, 64, 1024, nullptr, p));
  if (name == "barriers") return told(launch(barriers, 2, 128, 1024, nullptr, p));
  if (name == "shuffles") return told(launch(shuffles, 1, 512, 0, nullptr, p));
  if (name == "same_stores") return told(launch(same_stores, 1, 256, 8192, nullptr, p));
  if (name == "registers") return told(launch(registers, 1, 256, 0, nullptr, p));
  return "no such kernel";
}

// Of a tensor [rows, heads, dim] with rows `stride` elements apart.
SHOWN const char* run_box(int variant, bool in_ring, uint16_t* a, int rows, int heads, int dim, int stride, int x,
                          int y, int z, uint32_t* words) {
  Params p{};
  p.variant = variant;
  p.x = x;
  p.y = y;
  p.z = z;
  p.words = words;
  Error error = map_rows({a, stride, dim, rows}, Element::bf16, heads, dim, 32, &p.map);
  if (error.code) return told(error);
  if (in_ring) return told(launch(ring, 1, 160, 16384 + 32, nullptr, p));
  return told(launch(boxes, 1, 64, 16384 + 16, nullptr, p));
}

SHOWN const char* run_mma(bool bf16, int variant, int repeats, const uint16_t* a, const uint16_t* b, float* out) {
  Params p{};
  p.variant = variant;
  p.k = repeats;
  p.a = a;
  p.b = b;
  p.out = out;
  return told(bf16 ? launch(warp_product<Bf16>, 1, 32, 1024, nullptr, p)
                   : launch(warp_product<Fp16>, 1, 32, 1024, nullptr, p));
}

SHOWN const char* run_wgmma(bool bf16, bool rs, int variant, int repeats, int n, int k, const uint16_t* a,
                            const uint16_t* b, float* out) {
  Params p{};
  p.variant = variant;
  p.x = repeats;
  p.k = k;
  p.a = a;
  p.b = b;
  p.out = out;
  return told(bf16 ? product<Bf16>(p, n, rs) : product<Fp16>(p, n, rs));
}

SHOWN void round_pairs(bool bf16, int count, const float* x, uint32_t* pairs, float* back) {
  for (int i = 0; i < count; ++i) {
    pairs[i] = bf16 ? pack<Bf16>(x[i], -x[i]) : pack<Fp16>(x[i], -x[i]);
    back[i] = bf16 ? unpack<Bf16>(pairs[i]).x : unpack<Fp16>(pairs[i]).x;
  }
}
