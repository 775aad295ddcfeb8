// The forward kernel for Hopper: wgmma, TMA, persistent blocks that go through the tiles longest first.
//
// A block is one warpgroup that fetches and two that compute, 64 query rows each:
//
//     loader   (a thread):  tiles of keys and values by TMA, into rings of kStages
//     copiers  (3 warps):   the queries, and values at the end of a sample, where zeros must follow
//     consumers:            s = q k^T;  p = exp2(s - m');  acc = acc exp2(m - m') + p v
//
// Every buffer has two mbarriers, full and empty. Loader and copiers both arrive for every tile of values, whoever
// brings it: a role that only waited could be overtaken by two phases, which a parity doesn't tell from none.
//
// A consumer starts the scores of tile i + 1 before it adds the values of tile i, so that its softmax runs beside a
// matrix product; the consumers also take turns, so that one's softmax runs beside the other's products.
//
// The answer attends to mixed keys and values that nobody has to mix first, since products are linear:
//     q k_mixed^T = (1 - alpha) q k_causal^T + alpha q k_bidir^T,  p v_mixed likewise.
#include <device/launch.h>
#include <device/wgmma.cuh>

#include "kernels.h"
#include "tile.cuh"

namespace bitune {
namespace {

constexpr int kConsumers = 2;
constexpr int kThreads = (1 + kConsumers) * 128;
constexpr int kCopyWarps = 3;
constexpr int kCopyThreads = 32 * kCopyWarps;

// Of 65536 per multiprocessor, 168 per thread until the roles are known.
constexpr int kFetchRegisters = 72;
constexpr int kComputeRegisters = 216;
static_assert(kFetchRegisters + kConsumers * kComputeRegisters <= (1 + kConsumers) * 168, "more than a block has");

// The named barriers of the consumers' turns are this one and the next.
constexpr int kTurns = 1;

struct Params {
  Attention a;
  TensorMap k, v, k_prefix, v_prefix;
};

template <typename T, int D>
struct Shape {
  using Element = T;
  static constexpr int kDim = D;
  static constexpr Tile kTile = tile_sm90(D);
  static constexpr int kBlockM = kTile.block_m;
  static constexpr int kBlockN = kTile.block_n;
  static_assert(kBlockM == 128, "two consumers");
  static constexpr bool kTakesTurns = D <= 128;  // wider ones have more products per softmax than they need
  static constexpr int kColumns = columns(D);
  static constexpr int kBytesQ = kBlockM * kColumns * 2;
  static constexpr int kBytesK = kBlockN * kColumns * 2;
};

// Shared memory: addresses of the buffers and of their barriers.
template <class S>
struct Memory {
  uint32_t base = ptx::dynamic_shared();
  __device__ uint32_t q() const { return base; }
  __device__ uint32_t k(int stage) const { return base + S::kBytesQ + stage * S::kBytesK; }
  __device__ uint32_t v(int stage) const { return k(kStages + stage); }
  __device__ uint32_t barrier(int i) const { return k(2 * kStages) + 8 * i; }
  __device__ uint32_t q_full() const { return barrier(0); }
  __device__ uint32_t q_empty() const { return barrier(1); }
  __device__ uint32_t k_full(int stage) const { return barrier(2 + stage); }
  __device__ uint32_t k_empty(int stage) const { return barrier(2 + kStages + stage); }
  __device__ uint32_t v_full(int stage) const { return barrier(2 + 2 * kStages + stage); }
  __device__ uint32_t v_empty(int stage) const { return barrier(2 + 3 * kStages + stage); }
};

// Where a role stands in a ring: tile n of the block is in stage n % kStages, for the (n / kStages)th time.
struct Ring {
  int n = 0;
  __device__ int stage() const { return n % kStages; }
  __device__ int full() const { return n / kStages % 2; }  // parity to wait for
  __device__ int empty() const { return full() ^ 1; }
};

__device__ inline const Item& item_of(const Attention& a, int entry) {
  return reinterpret_cast<const Item*>(a.items)[entry / a.num_heads_kv];
}
__device__ inline int parts_of(const Attention& a, const Item& item) {
  return a.two_parts && item.second_stream_row >= 0 ? 2 : 1;
}

// The mixed run has two tiles in each place, one per stream; that of less weight comes first.
struct Mix {
  bool mixes;
  float less, more;  // weights
  bool causal_first;

  __device__ Mix(const Attention& a, int source, const PerHead& alpha, int head)
      : mixes(source == mixed && alpha.data), less(0), more(1), causal_first(false) {
    if (!mixes) return;
    float bidir = per_head(alpha, head);
    float causal = 1 - bidir;
    causal_first = fabsf(causal) < fabsf(bidir);
    less = causal_first ? causal : bidir;
    more = causal_first ? bidir : causal;
  }
  __device__ int tiles() const { return mixes ? 2 : 1; }
  // From the run's row to that of tile i.
  __device__ int shift(const Attention& a, int i) const { return mixes && causal_first == (i == 0) ? a.num_prompt : 0; }
};

// Whether a part has queries of its own.
__device__ inline bool has_queries(const Attention& a, int part) { return part == 0 || !a.goes_on; }

template <class S>
__device__ void fetch(uint32_t target, const TensorMap* map, uint32_t barrier, int row, int head) {
  ptx::mbarrier_arrive_expect(barrier, S::kBytesK);
#pragma unroll
  for (int column = 0; column < S::kColumns; column += 64)
    ptx::tma_load(target + column * S::kBlockN * 2, map, barrier, column, row, head);
}

template <class S>
__device__ void load(const Params& p, Memory<S> memory) {
  const Attention& a = p.a;
  Ring ring;
  int entry;
  for (int round = 0; (entry = entry_of(round, blockIdx.x, gridDim.x, a.num_items * a.num_heads_kv)) >= 0; ++round) {
    const Item& item = item_of(a, entry);
    int head = entry % a.num_heads_kv;
    Tokens of_tile = tokens(item, a.group_size, S::kBlockM);
    for (int part = 0; part < parts_of(a, item); ++part) {
      for (int source = prefix; source <= own; ++source) {
        Run r = run(item, part, a.goes_on, source, of_tile, a.window, S::kBlockN);
        Mix mix_k(a, source, a.alpha_k, head);
        Mix mix_v(a, source, a.alpha_v, head);
        const TensorMap* k = source == prefix ? &p.k_prefix : &p.k;
        const TensorMap* v = source == prefix ? &p.v_prefix : &p.v;
        for (int first = r.span.start; first < r.span.stop; first += S::kBlockN) {
          for (int i = 0; i < mix_k.tiles(); ++i, ++ring.n) {
            int row = r.row + first;
            ptx::mbarrier_wait(memory.k_empty(ring.stage()), ring.empty());
            fetch<S>(memory.k(ring.stage()), k, memory.k_full(ring.stage()), row + mix_k.shift(a, i), head);
            ptx::mbarrier_wait(memory.v_empty(ring.stage()), ring.empty());
            if (first + S::kBlockN <= r.length) {
              fetch<S>(memory.v(ring.stage()), v, memory.v_full(ring.stage()), row + mix_v.shift(a, i), head);
            } else {
              ptx::mbarrier_arrive(memory.v_full(ring.stage()));
            }
          }
        }
      }
    }
  }
}

// What this thread has copied is there for wgmma, once others know.
__device__ inline void settle() {
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::fence_async();
}

// Of a warp, after all its lanes have come here.
__device__ inline void arrive(uint32_t barrier) {
  ptx::sync_warp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
}

template <class S>
__device__ void copy(const Attention& a, Memory<S> memory) {
  int thread = threadIdx.x - 32;
  Ring ring;
  int queries = 0;
  int entry;
  for (int round = 0; (entry = entry_of(round, blockIdx.x, gridDim.x, a.num_items * a.num_heads_kv)) >= 0; ++round) {
    const Item& item = item_of(a, entry);
    int head = entry % a.num_heads_kv;
    Tokens of_tile = tokens(item, a.group_size, S::kBlockM);
    for (int part = 0; part < parts_of(a, item); ++part) {
      if (has_queries(a, part)) {
        ptx::mbarrier_wait(memory.q_empty(), ++queries % 2);
        copy_queries<S::kBlockM, S::kDim>(memory.q(), a, item, part ? item.second_row : item.q_row, head, thread,
                                          kCopyThreads);
        settle();
        arrive(memory.q_full());
      }
      for (int source = prefix; source <= own; ++source) {
        Run r = run(item, part, a.goes_on, source, of_tile, a.window, S::kBlockN);
        Mix mix(a, source, a.alpha_v, head);
        const Rows& values = source == prefix ? a.v_prefix : a.v;
        for (int first = r.span.start; first < r.span.stop; first += S::kBlockN) {
          for (int i = 0; i < mix.tiles(); ++i, ++ring.n) {
            ptx::mbarrier_wait(memory.v_empty(ring.stage()), ring.empty());
            if (first + S::kBlockN > r.length) {
              // What follows in memory is another sample's: 0 times whatever it is must be 0.
              const Bits* tile = row_of(values, int64_t(r.row) + first + mix.shift(a, i), head);
              auto row = [&](int j) { return first + j < r.length ? tile + j * values.stride_row : nullptr; };
              copy_rows<S::kBlockN, S::kColumns>(memory.v(ring.stage()), row, a.head_dim_v, thread, kCopyThreads);
              settle();
            }
            arrive(memory.v_full(ring.stage()));
          }
        }
      }
    }
  }
}

// A consumer's warpgroup: its place, and what it carries from tile to tile.
template <class S, bool kPrescaled>
struct Consumer {
  const Attention& a;
  Memory<S> memory;
  int index;  // of the consumer
  Ring ring;
  Softmax softmax;
  float acc[S::kColumns / 2];  // whole tiles of 64: a swizzled operand isn't cut within one

  __device__ Queries queries(const Item& item, int head) const {
    return query_of(a, item, head, S::kBlockM, index * 64 + threadIdx.x / 32 % 4 * 16);
  }
  __device__ void await_turn() const {
    if (S::kTakesTurns) ptx::barrier_sync(kTurns + index, 128 * kConsumers);
  }
  __device__ void pass_turn() const {
    if (S::kTakesTurns) ptx::barrier_arrive(kTurns + 1 - index, 128 * kConsumers);
  }

  // s = q k^T, started; with `adds` s + q k^T.
  __device__ void start_scores(float (&s)[S::kBlockN / 2], bool adds = false) const {
    // Uniform anew: else the descriptors of all steps are kept in registers from tile to tile.
    uint64_t q = wgmma_descriptor(ptx::uniform(memory.q() + index * 64 * 128), 16);
    uint64_t k = wgmma_descriptor(memory.k(ring.stage()), 16);
    ptx::wgmma_hold(s);
    ptx::wgmma_fence();
#pragma unroll
    for (int d = 0; d < S::kDim / 16; ++d) {
      uint32_t step = d % 4 * 32;  // within a tile of 64 columns
      ptx::Wgmma<typename S::Element, S::kBlockN>::ss(s, advance(q, d / 4 * S::kBlockM * 128 + step),
                                                      advance(k, d / 4 * S::kBlockN * 128 + step), adds || d > 0);
    }
    ptx::wgmma_commit();
  }

  // acc += p v, started.
  __device__ void start_values(const uint32_t (&p)[S::kBlockN / 4], int stage) {
    uint64_t v = wgmma_descriptor(memory.v(stage), S::kBlockN * 128);
    ptx::wgmma_hold(acc);
    ptx::wgmma_fence();
#pragma unroll
    for (int j = 0; j < S::kBlockN / 16; ++j) {
      ptx::Wgmma<typename S::Element, S::kColumns>::rs(acc, p + 4 * j, advance(v, j * 16 * 128), 1);
    }
    ptx::wgmma_commit();
  }

  // Scores of the tile whose first key is `first` to probabilities.
  __device__ void step(float (&s)[S::kBlockN / 2], float (&rescale)[2], const Run& r, int first,
                       const Bounds (&bounds)[2]) {
    if (kPrescaled) scale_scores(s, a.softmax_scale, a.softcap);
    if (first < r.span.whole || first >= r.span.rest) mask_scores(s, first, bounds);
    softmax.step(s, kPrescaled ? 1 : a.softmax_scale * kLog2e, rescale);
  }

  // All tiles of a run. is_last: the part's queries aren't needed after it.
  __device__ void attend(const Item& item, int head, const Run& r, bool is_last) {
    if (r.span.start >= r.span.stop) {
      if (is_last) arrive(memory.q_empty());
      return;
    }
    float s[S::kBlockN / 2];
    uint32_t p[S::kBlockN / 4];
    float rescale[2];
    Bounds bounds[2];
    bounds_of(bounds, queries(item, head), item, r, a.window);
    int first = r.span.start;

    ptx::mbarrier_wait(memory.k_full(ring.stage()), ring.full());
    await_turn();
    start_scores(s);
    ptx::wgmma_wait<0>();
    pass_turn();
    ptx::wgmma_hold(s);
    arrive(memory.k_empty(ring.stage()));
    step(s, rescale, r, first, bounds);
    multiply_rows(acc, rescale);
    pack_rows<typename S::Element>(s, p);

    for (first += S::kBlockN; first < r.span.stop; first += S::kBlockN) {
      Ring before = ring;
      ++ring.n;
      ptx::mbarrier_wait(memory.k_full(ring.stage()), ring.full());
      await_turn();
      start_scores(s);
      ptx::mbarrier_wait(memory.v_full(before.stage()), before.full());
      start_values(p, before.stage());
      pass_turn();
      ptx::wgmma_wait<1>();
      ptx::wgmma_hold(s);
      arrive(memory.k_empty(ring.stage()));
      step(s, rescale, r, first, bounds);
      if (first + S::kBlockN < r.span.stop) {  // a branch: else ptxas moves the wait before the softmax
        Ring next{ring.n + 1};
        ptx::mbarrier_wait(memory.k_full(next.stage()), next.full());
      }
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(acc);
      arrive(memory.v_empty(before.stage()));
      multiply_rows(acc, rescale);
      pack_rows<typename S::Element>(s, p);
    }

    if (is_last) arrive(memory.q_empty());
    ptx::mbarrier_wait(memory.v_full(ring.stage()), ring.full());
    start_values(p, ring.stage());
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(acc);
    arrive(memory.v_empty(ring.stage()));
    ++ring.n;
  }

  // All tiles of the mixed run.
  __device__ void attend_mixed(const Item& item, int head, const Run& r) {
    Mix mix_k(a, mixed, a.alpha_k, head);
    Mix mix_v(a, mixed, a.alpha_v, head);
    float ratio = mix_k.less / mix_k.more;
    float s[S::kBlockN / 2];
    uint32_t p[S::kBlockN / 4];
    Bounds bounds[2];
    bounds_of(bounds, queries(item, head), item, r, a.window);
    for (int first = r.span.start; first < r.span.stop; first += S::kBlockN) {
      Ring of_values = ring;
      await_turn();
#pragma unroll
      for (int i = 0; i < 2; ++i, ++ring.n) {
        ptx::mbarrier_wait(memory.k_full(ring.stage()), ring.full());
        start_scores(s, i == 1);
        ptx::wgmma_wait<0>();
        ptx::wgmma_hold(s);
        arrive(memory.k_empty(ring.stage()));
        float weight = i == 0 ? ratio : mix_k.more;
#pragma unroll
        for (float& x : s) x *= weight;
      }
      pass_turn();
      float rescale[2];
      step(s, rescale, r, first, bounds);
      multiply_rows(acc, rescale);
#pragma unroll
      for (int i = 0; i < 2; ++i, ++of_values.n) {
        pack_rows<typename S::Element>(s, p, i == 0 ? mix_v.less : mix_v.more);
        ptx::mbarrier_wait(memory.v_full(of_values.stage()), of_values.full());
        start_values(p, of_values.stage());
        ptx::wgmma_wait<0>();
        ptx::wgmma_hold(acc);
        arrive(memory.v_empty(of_values.stage()));
      }
    }
  }

  __device__ void consume() {
    int parts_done = 0;  // that had queries of their own
    int entry;
    if (index == 1) pass_turn();  // consumer 0 begins
    for (int round = 0; (entry = entry_of(round, blockIdx.x, gridDim.x, a.num_items * a.num_heads_kv)) >= 0; ++round) {
      const Item& item = item_of(a, entry);
      int head = entry % a.num_heads_kv;
      Tokens of_tile = tokens(item, a.group_size, S::kBlockM);
      int parts = parts_of(a, item);
      // While the queries are on their way.
      write_cache<typename S::Element>(a, item, head, S::kBlockM, threadIdx.x - 128, 128 * kConsumers);
      for (int part = 0; part < parts; ++part) {
        if (has_queries(a, part)) {
          softmax.reset(a, queries(item, head));
#pragma unroll
          for (float& x : acc) x = 0;
          ptx::mbarrier_wait(memory.q_full(), parts_done++ % 2);
        }
        bool is_last = part + 1 == parts || has_queries(a, part + 1);
        for (int source = prefix; source <= own; ++source) {
          Run r = run(item, part, a.goes_on, source, of_tile, a.window, S::kBlockN);
          if (source == mixed && a.alpha_k.data) {
            attend_mixed(item, head, r);
          } else {
            attend(item, head, r, is_last && source == own);
          }
        }
        store_part<typename S::Element>(a, item, part, queries(item, head), softmax, acc);
      }
    }
    if (index == 0) await_turn();  // the turn that nobody takes
  }
};

template <class S, bool kPrescaled>
__global__ void __launch_bounds__(kThreads, 1) attend_sm90(const __grid_constant__ Params p) {
  Memory<S> memory;
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * kConsumers;
    ptx::mbarrier_init(memory.q_full(), kCopyWarps);
    ptx::mbarrier_init(memory.q_empty(), kConsumerWarps);
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(memory.k_full(stage), 1);
      ptx::mbarrier_init(memory.k_empty(stage), kConsumerWarps);
      ptx::mbarrier_init(memory.v_full(stage), 1 + kCopyWarps);
      ptx::mbarrier_init(memory.v_empty(stage), kConsumerWarps);
    }
    ptx::mbarrier_init_done();
    ptx::prefetch(&p.k);
    ptx::prefetch(&p.v);
  }
  ptx::sync_block();
  if (threadIdx.x < 128) {
    ptx::lower_registers<kFetchRegisters>();
    if (threadIdx.x == 0) load<S>(p, memory);
    if (threadIdx.x >= 32) copy<S>(p.a, memory);
  } else {
    ptx::raise_registers<kComputeRegisters>();
    Consumer<S, kPrescaled>{p.a, memory, ptx::uniform(threadIdx.x / 128) - 1}.consume();
  }
}

template <typename T, int D>
Error launch_shape(const Params& p, int multiprocessors, void* stream) {
  using S = Shape<T, D>;
  const Attention& a = p.a;
  int blocks = lesser(a.num_items * a.num_heads_kv, multiprocessors);
  auto kernel = prescaled(a) ? attend_sm90<S, true> : attend_sm90<S, false>;
  return launch(kernel, blocks, kThreads, S::kTile.shared_bytes, stream, p);
}

}  // namespace

Error forward_sm90(const Attention& a, int multiprocessors, void* stream) {
  return dispatch(a, [&](auto type, auto dim) -> Error {
    using T = decltype(type);
    constexpr int D = decltype(dim)::value;
    Params p{a, {}, {}, {}, {}};
    struct {
      const Rows& rows;
      int dim;
      TensorMap* map;
    } tensors[] = {{a.k, a.head_dim, &p.k},
                   {a.v, a.head_dim_v, &p.v},
                   {a.k_prefix, a.head_dim, &p.k_prefix},
                   {a.v_prefix, a.head_dim_v, &p.v_prefix}};
    for (auto [rows, dim, map] : tensors) {
      if (!rows.data || !rows.rows) continue;
      Error error = map_rows(rows, a.element, a.num_heads_kv, dim, Shape<T, D>::kBlockN, map);
      if (error.code) return error;
    }
    return launch_shape<T, D>(p, multiprocessors, stream);
  });
}

}  // namespace bitune
