// mbarriers and the copy engine.
#pragma once

#include "memory.h"
#include "threads.h"

namespace {

int find(Warp& w, uint32_t address) {
  for (size_t k = 0; k < M->mbarriers.size(); ++k) {
    MBarrier& b = M->mbarriers[k];
    if (b.address != address) continue;
    if (b.init_warp != w.index && (!b.done || w.clock.at[b.init_warp] < b.init_time))
      fail("mbarrier %#x is used without fence.mbarrier_init and a barrier after its init", address);
    return int(k);
  }
  fail("no mbarrier was initialised at %#x", address);
}
void end_phase(int k) {
  MBarrier& b = M->mbarriers[size_t(k)];
  if (b.pending || b.bytes) return;
  ++b.phase;
  b.pending = b.count;
  b.arriving.at[kMaxWarps + k] = b.phase;
  b.ended = b.arriving;
  for (int v : b.waiting) wake(v);
  b.waiting.clear();
}
void arrive(Warp& w, uint32_t address, int bytes) {
  int k = find(w, address);
  MBarrier& b = M->mbarriers[size_t(k)];
  if (!b.pending) fail("arrives at a full phase of mbarrier %#x", address);
  b.bytes += bytes;
  b.arriving.join(w.clock);
  ++w.time();
  --b.pending;
  end_phase(k);
}
OP("mbarrier.init", [](Warp& w, const Ins& i, uint32_t m) {
  const uint32_t *a = reg<uint32_t>(w, i.o[0]), *c = reg<uint32_t>(w, i.o[1]);
  lanes(m, [&](int l) {
    uint32_t address = a[l] + uint32_t(i.x[0]);
    memset(shared_at(address, 8), 0x5a, 8);
    for (MBarrier& b : M->mbarriers)
      if (b.address == address) fail("mbarrier %#x is initialised twice", address);
    if (M->mbarriers.size() == kMaxBarriers) fail("too many mbarriers");
    MBarrier b;
    b.address = address, b.count = b.pending = int(c[l]), b.init_warp = w.index, b.init_time = w.time();
    M->mbarriers.push_back(b);
  });
  return next;
})
OP("fence.mbarrier_init", [](Warp& w, const Ins&, uint32_t) {
  for (MBarrier& b : M->mbarriers)
    if (b.init_warp == w.index && !b.done) b.done = true, b.init_time = w.time();
  return next;
})
OP("mbarrier.arrive", [](Warp& w, const Ins& i, uint32_t m) {  // x: offset; operands: address[, bytes]
  lanes(m, [&](int l) {
    arrive(w, reg<uint32_t>(w, i.o[0])[l] + uint32_t(i.x[0]), i.num > 1 ? int(reg<uint32_t>(w, i.o[1])[l]) : 0);
  });
  return next;
})
OP("mbarrier.try_wait.parity", [](Warp& w, const Ins& i, uint32_t m) {  // p, address, parity
  const uint32_t *a = reg<uint32_t>(w, i.o[1]), *e = reg<uint32_t>(w, i.o[2]);
  int l = __builtin_ctz(m);
  lanes(m, [&](int k) {
    if (a[k] != a[l] || e[k] != e[l]) fail("mbarrier.try_wait: lanes wait for others");
  });
  int k = find(w, a[l] + uint32_t(i.x[0]));
  MBarrier& b = M->mbarriers[size_t(k)];
  if (e[l] > 1) fail("parity %u", e[l]);
  if ((b.phase & 1) == e[l]) {
    b.waiting.push_back(w.index);
    w.asleep = true, w.what = "mbarrier " + std::to_string(b.address) + " phase " + std::to_string(b.phase) +
                              " lacks " + std::to_string(b.pending) + " arrivals, " + std::to_string(b.bytes) +
                              " bytes";
    return again;
  }
  w.clock.join(b.ended);
  if (m == w.live) ++w.meetings;
  pred(w, i.o[0]) |= m;
  return next;
})
void end_load(size_t k) {
  Load load = M->loads[k];
  M->loads.erase(M->loads.begin() + long(k));
  MBarrier& b = M->mbarriers[size_t(load.barrier)];
  for (int row = 0; row < load.map.box_rows; ++row) {
    int64_t y = load.y + row;
    bool inside = y >= 0 && y < load.map.sizes[1] && load.z >= 0 && load.z < load.map.sizes[2];
    for (int column = 0; column < 64; ++column) {
      int64_t x = load.x + column;
      bool there = inside && x >= 0 && x < load.map.sizes[0];
      uint32_t address = load.target + uint32_t(row * 128 + column * 2);
      address ^= address >> 3 & 0x70;
      Cell& cell = M->cells[(address - kBase) / 2];
      cell.pending = false, cell.time = b.phase + 1;
      uint8_t* p = &M->memory[address - kBase];
      if (there) memcpy(p, load.map.data + y * load.map.strides[1] + load.z * load.map.strides[2] + x * 2, 2);
      else
        memset(p, 0, 2);
    }
  }
  b.bytes -= load.map.box_rows * 128;
  end_phase(load.barrier);
}
OP("cp.async.bulk.tensor.3d", [](Warp& w, const Ins& i, uint32_t m) {  // target, map, mbarrier, x, y, z
  lanes(m, [&](int l) {
    uint32_t target = reg<uint32_t>(w, i.o[0])[l];
    bitune::TensorMap map;
    uint64_t off = reg<uint64_t>(w, i.o[1])[l] - reinterpret_cast<uint64_t>(M->params);
    uint64_t bytes_of_params = uint64_t(M->param_bytes);
    if (off >= bytes_of_params || off + sizeof map > bytes_of_params || off % 64)
      fail("a tensor map at parameter byte %lld", (long long)off);
    memcpy(&map, M->params + off, sizeof map);  // parameters need not lie as a map does
    if (!map.box_rows) fail("a tensor map that was never made");
    int k = find(w, reg<uint32_t>(w, i.o[2])[l]);
    if (!M->mbarriers[size_t(k)].done) fail("mbarrier without fence");
    uint32_t bytes = uint32_t(map.box_rows) * 128;
    if (target % 1024 && target % 128) fail("copy to %#x", target);
    if (target < kBase || target + bytes > kBase + M->memory.size()) fail("copy past shared memory");
    for (uint32_t c = (target - kBase) / 2; c < (target - kBase + bytes) / 2; ++c) {
      if (M->cells[c].dirty)
        fail("the copy engine writes shared memory %#x over a store without fence.proxy.async", c * 2);
      write_cell(w, l, c, false);
      Cell& x = M->cells[c];
      x.writer = uint8_t(kMaxWarps + k), x.pending = true;
    }
    memset(&M->memory[target - kBase], 0xff, bytes);
    M->loads.push_back({map, target, k, int(reg<uint32_t>(w, i.o[3])[l]), int(reg<uint32_t>(w, i.o[4])[l]),
                        int(reg<uint32_t>(w, i.o[5])[l])});
  });
  return next;
})
OP("fence.proxy.async", [](Warp& w, const Ins&, uint32_t m) {
  std::vector<uint32_t> rest;
  for (uint32_t c : w.dirty) {
    Cell& x = M->cells[c];
    if (x.writer != w.index || !x.dirty) continue;
    if (x.lane < 32 && !(m >> x.lane & 1)) {
      rest.push_back(c);
      continue;
    }
    x.dirty = false, x.fenced = w.time();
  }
  w.dirty.swap(rest);
  if (m == w.live) w.proxy_fenced = w.clock;
  return next;
})

}  // namespace
