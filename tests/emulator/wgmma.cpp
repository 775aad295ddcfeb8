// Products of warpgroups. A product is computed when it is waited for, from what its operands held when it started;
// shared memory and registers that are touched before then are errors.
#include <device/wgmma.cuh>

#include <cstring>
#include <deque>

#include "machine.h"
#include "products.h"

namespace emulator {

namespace {

constexpr uint32_t kPoison = ~0u;

// The registers that products under way add to: all threads' fragments as one matrix [64, n].
struct Accumulator {
  int n = 0;
  int products = 0;  // under way
  float* d[128] = {};
  float values[64 * 256];
};

struct Product {
  bool bf16, in_registers, accumulate;
  int n;
  uint64_t a_descriptor, b_descriptor;
  std::shared_ptr<Accumulator> accumulator;
  int threads = 0;      // that have started it
  uint32_t lanes[4] = {};
  Clock seen;           // by all four warps when they started it
  uint32_t clocks[4];   // the warps' own
  int num_a, num_chunks;
  uint32_t chunks[128 + 512];  // of a, then of b: [row, 2] or, in registers, [k, n / 8]
  uint64_t bytes[128 + 512][2];
  uint32_t a[64 * 8];  // pairs, row-major
  const uint32_t* registers[128];  // that a is in, by thread
};

}  // namespace

struct WarpGroup {
  std::deque<std::shared_ptr<Product>> products;  // not waited for
  int first = 0;                                  // number of the oldest of them
  std::deque<int> groups;                         // numbers where groups that are not waited for end
  int first_group = 0;
  std::vector<std::shared_ptr<Accumulator>> accumulators;  // in use
  std::vector<std::shared_ptr<Product>> free;
  // the wait that threads are arriving at
  int waiting = 0;
  int pending = 0;
  uint32_t lanes[4] = {};
};

namespace {

WarpGroup& group_of(const Thread& t) {
  auto& group = block.groups[size_t(t.index / 128)];
  if (!group) {
    if (settings.capability / 10 != 9) fail("wgmma on a device of capability %d", settings.capability);
    if (t.index / 128 * 128 + 128 > block.num_threads) fail("wgmma in an incomplete warpgroup");
    group = std::make_shared<WarpGroup>();
  }
  return *group;
}

uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

struct Descriptor {
  uint32_t start, leading, stride;
};

Descriptor decode(uint64_t d, const char* name) {
  if (d >> 62 != 1) fail("descriptor of %s: layout %d, not 1 (128-byte swizzle)", name, int(d >> 62));
  if (d >> 49 & 7) fail("descriptor of %s: base offset %d, not 0", name, int(d >> 49 & 7));
  if (d & 0x3ff1c000c000c000ull) fail("descriptor of %s: unknown bits in %#llx", name, static_cast<long long>(d));
  auto field = [d](int shift) { return uint32_t(d >> shift & 0x3fff) << 4; };
  return {field(0), field(16), field(32)};
}

// Rows of 16 summed columns.
void add_rows(Product& p, uint64_t descriptor, int rows, const char* name) {
  Descriptor d = decode(descriptor, name);
  for (int r = 0; r < rows; ++r) {
    uint32_t row = d.start + uint32_t(r / 8) * d.stride + uint32_t(r % 8) * 128;
    for (uint32_t c = 0; c < 2; ++c) p.chunks[p.num_chunks++] = swizzled(row + c * 16);
  }
}

// 16 summed rows.
void add_columns(Product& p, uint64_t descriptor, int n) {
  Descriptor d = decode(descriptor, "b");
  for (uint32_t k = 0; k < 16; ++k) {
    uint32_t row = d.start + k / 8 * d.stride + k % 8 * 128;
    for (uint32_t c = 0; c < uint32_t(n) / 8; ++c) {
      p.chunks[p.num_chunks++] = swizzled(row + c / 8 * d.leading + c % 8 * 16);
    }
  }
}

void begin(Product& p) {
  p.threads = 0;
  memset(p.lanes, 0, sizeof p.lanes);
  p.num_chunks = 0;
  if (!p.in_registers) add_rows(p, p.a_descriptor, 64, "a");
  p.num_a = p.num_chunks;
  if (p.in_registers) {
    add_columns(p, p.b_descriptor, p.n);
  } else {
    add_rows(p, p.b_descriptor, p.n, "b");
  }
  for (int i = 0; i < p.num_chunks; ++i) {
    memcpy(p.bytes[i], at(p.chunks[i], 16, 16), 16);
    p.chunks[i] = chunk_of(p.chunks[i]);
  }
}

// Once every warp has come: each must see what stands in the operands.
void check_operands(const Product& p, int first_warp) {
  for (int i = 0; i < p.num_chunks; ++i) {
    uint32_t chunk = p.chunks[i];
    check_published(chunk, p.seen);
    memcpy(&block.reads[size_t(chunk) * kMaxWarps + size_t(first_warp)], p.clocks, sizeof p.clocks);
  }
}

int row_of(int thread) { return thread / 32 * 16 + thread % 32 / 4; }
int column_of(int thread) { return 2 * (thread % 4); }

// Copies between the fragment of a thread and the matrix.
template <typename F>
void each_element(Accumulator& x, int thread, F f) {
  float* rows = x.values + row_of(thread) * x.n + column_of(thread);
  float* d = x.d[thread];
  for (int j = 0; j < x.n / 8; ++j) {
    f(d[4 * j], rows[8 * j]);
    f(d[4 * j + 1], rows[8 * j + 1]);
    f(d[4 * j + 2], rows[8 * j + 8 * x.n]);
    f(d[4 * j + 3], rows[8 * j + 8 * x.n + 1]);
  }
}

// The pairs of a that stand in a thread's registers, and what these hold now.
template <typename F>
void each_pair(Product& p, int thread, F f) {
  uint32_t* pairs = p.a + row_of(thread) * 8 + column_of(thread) / 2;
  for (int i = 0; i < 4; ++i) f(pairs[i % 2 * 64 + i / 2 * 4], p.registers[thread][i]);
}

void compute(Product& p) {
  for (int i = 0; i < p.num_chunks; ++i) {
    if (memcmp(p.bytes[i], &block.memory[size_t(p.chunks[i]) * 16], 16)) {
      fail("shared memory of a running wgmma was changed: %#x, operand %s", block.base + p.chunks[i] * 16,
           i < p.num_a ? "a" : "b");
    }
  }
  for (int thread = 0; p.in_registers && thread < 128; ++thread) {
    each_pair(p, thread, [thread](uint32_t pair, uint32_t now) {
      if (pair != now) fail("registers of a running wgmma were written, operand a in thread %d of its warpgroup", thread);
    });
  }
  Accumulator& x = *p.accumulator;
  const auto* a = reinterpret_cast<const uint16_t*>(p.in_registers ? static_cast<const void*>(p.a) : p.bytes);
  const auto* b = reinterpret_cast<const uint16_t*>(p.bytes[p.num_a]);
  uint16_t turned[16 * 256];
  if (!p.in_registers) {
    for (int n = 0; n < p.n; ++n) {
      for (int k = 0; k < 16; ++k) turned[k * p.n + n] = b[n * 16 + k];
    }
    b = turned;
  }
  if (!p.accumulate) memset(x.values, 0, size_t(64 * p.n) * sizeof(float));
  multiply_add(p.bf16, 64, p.n, a, b, x.values);
  if (--x.products) return;
  for (int thread = 0; thread < 128; ++thread) {
    bool touched = false;
    each_element(x, thread, [&](float& d, float value) {
      touched |= __float_as_uint(d) != kPoison;
      d = value;
    });
    if (touched) fail("registers of a running wgmma were written, in thread %d of its warpgroup", thread);
  }
}

void finish(WarpGroup& g, int first_thread) {
  int groups = int(g.groups.size()) - g.pending;
  for (; groups > 0; --groups) {
    for (; g.first < g.groups.front(); ++g.first) {
      Product& p = *g.products.front();
      compute(p);
      for (int i = 0; i < p.num_chunks; ++i) {
        for (int w = 0; w < 4; ++w) {
          int warp = first_thread / 32 + w;
          block.reads[size_t(p.chunks[i]) * kMaxWarps + size_t(warp)] = own_clock(warp);
        }
      }
      if (!p.accumulator->products) {
        for (size_t i = 0; i < g.accumulators.size(); ++i) {
          if (g.accumulators[i] == p.accumulator) g.accumulators.erase(g.accumulators.begin() + long(i--));
        }
      }
      p.accumulator.reset();
      g.free.push_back(g.products.front());
      g.products.pop_front();
    }
    g.groups.pop_front();
    ++g.first_group;
  }
}

// The accumulator at `d` of this thread, if products under way have it.
std::shared_ptr<Accumulator> in_use(const WarpGroup& g, int thread, const float* d) {
  for (const auto& x : g.accumulators) {
    if (x->d[thread] == d) return x;
  }
  return nullptr;
}

}  // namespace

void check_products(const Thread& t) {
  if (!t.products) return;
  const WarpGroup& g = group_of(t);
  if (t.products > g.first) fail("ends with %d wgmma it has not waited for", t.products - g.first);
}

}  // namespace emulator

namespace bitune {
namespace ptx {

using namespace emulator;

void wgmma_fence() { current->fenced = true; }

void start_product(bool bf16, int n, float* d, const uint32_t* a_registers, uint64_t a, uint64_t b, bool accumulate) {
  Thread& t = *current;
  WarpGroup& g = group_of(t);
  int thread = t.index % 128;
  size_t number = size_t(t.products++ - g.first);
  bool leads = number == g.products.size();
  std::shared_ptr<Accumulator> x = in_use(g, thread, d);
  if (leads) {
    if (g.free.empty()) g.free.push_back(std::make_shared<Product>());
    std::shared_ptr<Product> p = g.free.back();
    p->bf16 = bf16;
    p->in_registers = a_registers != nullptr;
    p->accumulate = accumulate;
    p->n = n;
    p->a_descriptor = a;
    p->b_descriptor = b;
    begin(*p);
    if (!x) {
      x = std::make_shared<Accumulator>();
      x->n = n;
      g.accumulators.push_back(x);
    }
    ++x->products;
    p->accumulator = x;
    g.free.pop_back();
    g.products.push_back(p);
  }
  Product& p = *g.products[number];
  if (p.bf16 != bf16 || p.in_registers != (a_registers != nullptr) || p.accumulate != accumulate || p.n != n ||
      p.a_descriptor != a || p.b_descriptor != b) {
    fail("starts a wgmma other than the first thread of its warpgroup does");
  }
  const float* before = p.accumulator->d[thread];
  if (p.accumulator->n != n || (before && before != d) || (x && x != p.accumulator)) {
    fail("the accumulator of a wgmma overlaps that of another under way");
  }
  bool fresh = !before;
  if (!t.fenced && (fresh || a_registers)) fail("wgmma without wgmma_fence since the last wgmma_wait");
  if (fresh) {
    p.accumulator->d[thread] = d;
    each_element(*p.accumulator, thread, [](float& element, float& value) {
      value = element;
      element = __uint_as_float(kPoison);
    });
  }
  if (a_registers) {
    p.registers[thread] = a_registers;
    each_pair(p, thread, [](uint32_t& pair, uint32_t now) { pair = now; });
  }
  int warp = thread / 32;
  if (!p.lanes[warp]) {
    const Clock& clock = block.warps[t.warp].clock;
    p.clocks[warp] = own_clock(t.warp);
    if (p.threads == 0) {
      p.seen = clock;
    } else {
      p.seen.meet(clock);
    }
    p.lanes[warp] = kAllLanes;
    if (p.lanes[0] && p.lanes[1] && p.lanes[2] && p.lanes[3]) check_operands(p, t.index / 128 * 4);
  }
  ++p.threads;
}

void wgmma_commit() {
  Thread& t = *current;
  WarpGroup& g = group_of(t);
  size_t number = size_t(t.product_groups++ - g.first_group);
  if (number == g.groups.size()) g.groups.push_back(t.products);
  if (g.groups[number] != t.products) fail("commits other wgmmas than the first thread of its warpgroup does");
}

void wait_products(int pending) {
  Thread& t = *current;
  WarpGroup& g = group_of(t);
  int groups = t.product_groups - g.first_group;
  if (t.products != (groups ? g.groups[size_t(groups - 1)] : g.first)) {
    fail("wgmma_wait with a wgmma that was not committed");
  }
  if (g.waiting && g.pending != pending) {
    fail("wgmma_wait for %d pending groups, others wait for %d", pending, g.pending);
  }
  g.pending = pending;
  t.fenced = false;
  int warp = t.warp % 4;
  g.lanes[warp] |= 1u << t.lane;
  if (++g.waiting < 128) return sleep(Wait::products, "wgmma_wait");
  for (int i = 0; i < 128; ++i) {
    const Thread& other = block.threads[size_t(t.index / 128 * 128 + i)];
    if (other.products != t.products || other.product_groups != t.product_groups) {
      fail("wgmma_wait after %d wgmmas in %d groups, thread %d after %d in %d", t.products, t.product_groups,
           other.index, other.products, other.product_groups);
    }
  }
  finish(g, t.index / 128 * 128);
  for (int w = 0; w < 4; ++w) {
    wake(t.index / 128 * 4 + w, w == warp ? ~(1u << t.lane) : kAllLanes);
    g.lanes[w] = 0;
  }
  g.waiting = 0;
}

}  // namespace ptx
}  // namespace bitune
