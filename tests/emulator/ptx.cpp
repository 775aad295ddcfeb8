// What a thread does to shared memory and within its warp.
#include <device/ptx.cuh>

#include <cstring>

#include "machine.h"
#include "products.h"

namespace bitune {
namespace ptx {

using namespace emulator;

uint4 load_chunk(const void* x) {
  if (uintptr_t(x) % 16) fail("load_chunk from %p, no multiple of 16", x);
  return *static_cast<const uint4*>(x);
}

void store_chunk(void* x, uint4 values) {
  if (uintptr_t(x) % 16) fail("store_chunk to %p, no multiple of 16", x);
  *static_cast<uint4*>(x) = values;
}

uint32_t dynamic_shared() { return block.base; }

void store_shared(uint32_t address, uint4 x) {
  uint8_t* p = at(address, 16, 16);
  write_chunk(chunk_of(address), p, &x);
  memcpy(p, &x, 16);
  preempt();
}

void cp_async(uint32_t target, const void* source, bool valid) {
  uint8_t* p = at(target, 16, 16);
  if (uintptr_t(source) % 16) fail("cp_async from %p, no multiple of 16", source);
  uint8_t poison[16];
  memset(poison, 0xff, 16);
  write_chunk(chunk_of(target), p, poison);
  memcpy(p, poison, 16);
  current->copies.push_back({target, source, valid});
}

void cp_async_commit() { current->copy_groups.push_back(current->copies.size()); }

void wait_copies(int pending) {
  auto& copies = current->copies;
  auto& groups = current->copy_groups;
  if (groups.size() <= size_t(pending)) return preempt();
  size_t done = groups.size() - size_t(pending);
  size_t end = groups[done - 1];
  for (size_t i = 0; i < end; ++i) {
    const Copy& copy = copies[i];
    uint8_t* p = at(copy.target, 16, 16);
    uint8_t bytes[16] = {};
    if (copy.valid) memcpy(bytes, copy.source, 16);
    write_chunk(chunk_of(copy.target), p, bytes);
    memcpy(p, bytes, 16);
  }
  copies.erase(copies.begin(), copies.begin() + long(end));
  groups.erase(groups.begin(), groups.begin() + long(done));
  for (size_t& group : groups) group -= end;
  preempt();
}

void fence_async() {
  for (uint32_t chunk : current->dirty) {
    Chunk& c = block.chunks[chunk];
    for (int i = 0; i < c.num_writes; ++i) {
      Write& w = c.writes[i];
      if (w.dirty != current->index) continue;
      w.dirty = -1;
      w.fenced = own_clock(current->warp);
    }
  }
  current->dirty.clear();
  preempt();
}

// collectives

namespace {

struct Shuffle {
  uint32_t value, result;
  int lanes;
};

struct Rows8 {
  uint32_t address;
  uint32_t* r;
};

void read_rows(Warp& warp, const uint16_t* (&rows)[32]) {
  for (int i = 0; i < 32; ++i) {
    uint32_t address = static_cast<Rows8*>(warp.arguments[i])->address;
    rows[i] = reinterpret_cast<const uint16_t*>(at(address, 16, 16));
    read_chunk(chunk_of(address));
  }
}

}  // namespace

uint32_t shuffle_xor(uint32_t x, int lanes) {
  if (lanes < 0 || lanes > 31) fail("shuffle_xor by %d lanes", lanes);
  Shuffle shuffle{x, 0, lanes};
  collective("shuffle_xor", &shuffle, [](Warp& warp) {
    for (int i = 0; i < 32; ++i) {
      auto* to = static_cast<Shuffle*>(warp.arguments[i]);
      to->result = static_cast<Shuffle*>(warp.arguments[i ^ to->lanes])->value;
    }
  });
  return shuffle.result;
}

int uniform(int x) {
  collective("uniform", &x, [](Warp& warp) {
    for (void* other : warp.arguments) {
      if (*static_cast<int*>(other) != *static_cast<int*>(warp.arguments[0])) fail("uniform: the lanes differ");
    }
  });
  return x;
}

void sync_warp() {
  collective("sync_warp", nullptr, [](Warp& warp) { ++warp.meetings; });
}

void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  Rows8 argument{address, r};
  collective("ldmatrix", &argument, [](Warp& warp) {
    const uint16_t* rows[32];
    read_rows(warp, rows);
    for (int lane = 0; lane < 32; ++lane) {
      uint32_t* r = static_cast<Rows8*>(warp.arguments[lane])->r;
      for (int i = 0; i < 4; ++i) memcpy(&r[i], rows[8 * i + lane / 4] + 2 * (lane % 4), 4);
    }
  });
}

void ldmatrix_transposed(uint32_t (&r)[4], uint32_t address) {
  Rows8 argument{address, r};
  collective("ldmatrix_transposed", &argument, [](Warp& warp) {
    const uint16_t* rows[32];
    read_rows(warp, rows);
    for (int lane = 0; lane < 32; ++lane) {
      uint32_t* r = static_cast<Rows8*>(warp.arguments[lane])->r;
      for (int i = 0; i < 4; ++i) {
        int row = 8 * i + 2 * (lane % 4);
        r[i] = rows[row][lane / 4] | uint32_t(rows[row + 1][lane / 4]) << 16;
      }
    }
  });
}

namespace {

struct Fragments {
  float* d;
  uint32_t a[4], b[2];
};

// Row and column of a fragment's elements: `pair` 0 or 1 for the row and that 8 further down.
int row_of(int lane, int pair) { return lane / 4 + 8 * pair; }
int column_of(int lane) { return 2 * (lane % 4); }

template <bool bf16>
void multiply_warp(Warp& warp) {
  uint16_t a[16 * 16], b[16 * 8];
  float d[16 * 8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& f = *static_cast<Fragments*>(warp.arguments[lane]);
    int column = column_of(lane);
    for (int i = 0; i < 4; ++i) memcpy(&a[row_of(lane, i % 2) * 16 + column + 8 * (i / 2)], &f.a[i], 4);
    for (int i = 0; i < 4; ++i) b[(column + i % 2 + 8 * (i / 2)) * 8 + lane / 4] = uint16_t(f.b[i / 2] >> 16 * (i % 2));
    for (int i = 0; i < 4; ++i) d[row_of(lane, i / 2) * 8 + column + i % 2] = f.d[i];
  }
  multiply_add(bf16, 16, 8, a, b, d);
  for (int lane = 0; lane < 32; ++lane) {
    const auto& f = *static_cast<Fragments*>(warp.arguments[lane]);
    for (int i = 0; i < 4; ++i) f.d[i] = d[row_of(lane, i / 2) * 8 + column_of(lane) + i % 2];
  }
}

}  // namespace

void multiply(bool bf16, float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Fragments fragments{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  if (bf16) {
    collective("mma of Bf16", &fragments, multiply_warp<true>);
  } else {
    collective("mma of Fp16", &fragments, multiply_warp<false>);
  }
}

void set_registers(int count) {
  if (settings.capability / 10 < 9) fail("setmaxnreg on a device of capability %d", settings.capability);
  current->registers = count;
  ++current->register_changes;
}

}  // namespace ptx
}  // namespace bitune
