// Barriers of threads, mbarriers, and the copy engine that counts at them.
#include <device/ptx.cuh>

#include <cstring>

#include "machine.h"

namespace emulator {
namespace {

// The lanes of the current warp in the mask `lanes` come.
void come(int number, int threads, bool waits, uint32_t lanes) {
  Thread& t = *current;
  Warp& warp = block.warps[t.warp];
  NamedBarrier& b = block.barriers[number];
  if (threads <= 0 || threads % 32) fail("barrier %d for %d threads, no multiple of 32", number, threads);
  if (b.arrived && b.threads != threads) {
    fail("barrier %d for %d threads, but others came to it for %d", number, threads, b.threads);
  }
  if (warp.arrived) fail("comes to barrier %d while other lanes of its warp wait at %s", number, warp.collective);
  if (b.lanes[t.warp] & lanes) fail("comes to barrier %d again while it is not complete", number);
  b.threads = threads;
  b.lanes[t.warp] |= lanes;
  if (waits) b.waiting[t.warp] |= lanes;
  if (b.lanes[t.warp] == kAllLanes) {
    ++warp.meetings;
    b.clock.join(warp.clock);
    ++own_clock(t.warp);
  }
  b.arrived += __builtin_popcount(lanes);
  if (b.arrived > threads) fail("barrier %d for %d threads, but %d came", number, threads, b.arrived);
  if (b.arrived < threads) {
    if (waits) sleep(Wait::barrier, number ? "barrier_sync" : "sync_block, barrier", uint32_t(number));
    return;
  }
  for (int w = 0; w < block.num_warps; ++w) {
    if (b.lanes[w] && b.lanes[w] != kAllLanes) fail("barrier %d is complete with a part of warp %d", number, w);
    if (!b.waiting[w]) continue;
    block.warps[w].clock.join(b.clock);
    wake(w, w == t.warp ? b.waiting[w] & ~(1u << t.lane) : b.waiting[w]);
  }
  b = NamedBarrier();
}

// Index of the mbarrier at `address`, which the current thread may use.
int find(uint32_t address) {
  for (size_t i = 0; i < block.mbarriers.size(); ++i) {
    const MBarrier& b = block.mbarriers[i];
    if (b.address != address) continue;
    int warp = b.init_thread / 32;
    if (warp != current->warp && (!b.init_done || block.warps[current->warp].clock.at[warp] < b.init_clock)) {
      fail("mbarrier %#x is used without mbarrier_init_done and a barrier after its init", address);
    }
    return int(i);
  }
  fail("no mbarrier was initialised at %#x", address);
}

void end_phase(int number) {
  MBarrier& b = block.mbarriers[size_t(number)];
  if (b.pending || b.bytes) return;
  ++b.phase;
  b.pending = b.count;
  b.arriving.at[kMaxWarps + number] = b.phase;
  b.ended = b.arriving;
  for (int w = 0; w < block.num_warps; ++w) {
    wake(w, b.waiting[w]);
    b.waiting[w] = 0;
  }
}

void arrive(uint32_t address, int bytes) {
  int number = find(address);
  MBarrier& b = block.mbarriers[size_t(number)];
  if (b.pending == 0) fail("arrives at a full phase: %s", describe(b).c_str());
  b.bytes += bytes;
  if (bytes < 0 || b.bytes >= 1 << 20) fail("expects %d bytes: %s", bytes, describe(b).c_str());
  b.arriving.join(block.warps[current->warp].clock);
  ++own_clock(current->warp);
  --b.pending;
  end_phase(number);
  preempt();
}

}  // namespace

std::string describe(const MBarrier& b) {
  char text[200];
  snprintf(text, sizeof text, "mbarrier %#x in phase %u lacks %d of %d arrivals and %lld bytes", b.address, b.phase,
           b.pending, b.count, static_cast<long long>(b.bytes));
  return text;
}

void end_load(size_t index) {
  Load load = block.loads[index];
  block.loads.erase(block.loads.begin() + long(index));
  const bitune::TensorMap& map = load.map;
  MBarrier& b = block.mbarriers[size_t(load.barrier)];
  for (int row = 0; row < map.box_rows; ++row) {
    int64_t y = load.y + row;
    bool inside = y >= 0 && y < map.sizes[1] && load.z >= 0 && load.z < map.sizes[2];
    const uint8_t* source = map.data + (inside ? y * map.strides[1] + load.z * map.strides[2] : 0);
    for (int column = 0; column < 64; column += 8) {
      uint32_t address = load.target + uint32_t(row * 128 + column * 2);
      address ^= address >> 3 & 0x70;
      uint8_t* target = at(address, 16, 16);
      Write& write = block.chunks[chunk_of(address)].writes[0];
      if (write.writer != kMaxWarps + load.barrier) fail("%#x was written while tma_load wrote it", address);
      write.written = b.phase + 1;
      int64_t x = load.x + column;
      if (inside && x >= 0 && x + 8 <= map.sizes[0]) {
        memcpy(target, source + x * 2, 16);
        continue;
      }
      for (int i = 0; i < 8; ++i) {
        bool there = inside && x + i >= 0 && x + i < map.sizes[0];
        memcpy(target + 2 * i, there ? source + (x + i) * 2 : reinterpret_cast<const uint8_t*>("\0"), 2);
      }
    }
  }
  b.bytes -= map.box_rows * 128;
  if (b.bytes <= -(1 << 20)) fail("too many bytes came: %s", describe(b).c_str());
  end_phase(load.barrier);
}

}  // namespace emulator

namespace bitune {
namespace ptx {

using namespace emulator;

void sync_block() {
  come(0, block.num_threads, true, 1u << current->lane);
  preempt();
}

void barrier_sync(int barrier, int threads) {
  if (barrier < 1 || barrier > 15) fail("barrier_sync of barrier %d, not 1 to 15", barrier);
  come(barrier, threads, true, 1u << current->lane);
  preempt();
}

// A warp's lanes arrive together: none waits, but none goes on before the others came.
void barrier_arrive(int barrier, int threads) {
  if (barrier < 1 || barrier > 15) fail("barrier_arrive of barrier %d, not 1 to 15", barrier);
  int argument[] = {barrier, threads};
  collective("barrier_arrive", argument, [](Warp& warp) {
    const int* first = static_cast<const int*>(warp.arguments[0]);
    for (void* other : warp.arguments) {
      if (memcmp(first, other, 2 * sizeof(int))) fail("lanes of a warp arrive at different barriers");
    }
    come(first[0], first[1], false, kAllLanes);
  });
  preempt();
}

void mbarrier_init(uint32_t address, int count) {
  uint8_t* p = at(address, 8, 8);
  for (const MBarrier& b : block.mbarriers) {
    if (b.address == address) fail("mbarrier %#x is initialised twice", address);
  }
  if (count < 1 || count >= 1 << 20) fail("mbarrier %#x for %d arrivals", address, count);
  if (block.mbarriers.size() == kMaxBarriers) fail("more than %d mbarriers", kMaxBarriers);
  block.chunks[chunk_of(address)].barrier = true;
  memset(p, 0x5a, 8);
  MBarrier b;
  b.address = address;
  b.count = b.pending = count;
  b.init_thread = current->index;
  b.init_clock = own_clock(current->warp);
  block.mbarriers.push_back(b);
}

void mbarrier_init_done() {
  for (MBarrier& b : block.mbarriers) {
    if (b.init_thread != current->index || b.init_done) continue;
    b.init_done = true;
    b.init_clock = own_clock(current->warp);
  }
}

void mbarrier_arrive(uint32_t barrier) { arrive(barrier, 0); }
void mbarrier_arrive_expect(uint32_t barrier, int bytes) { arrive(barrier, bytes); }

void mbarrier_wait(uint32_t address, int parity) {
  int number = find(address);
  if (parity != 0 && parity != 1) fail("mbarrier_wait with parity %d", parity);
  preempt();
  while (int(block.mbarriers[size_t(number)].phase & 1) == parity) {
    MBarrier& b = block.mbarriers[size_t(number)];
    uint32_t phase = b.phase;
    b.waiting[current->warp] |= 1u << current->lane;
    sleep(Wait::mbarrier, "mbarrier_wait", uint32_t(number), parity);
    if (block.mbarriers[size_t(number)].phase > phase + 1) {
      fail("two phases ended while it waited for the first: %s", describe(block.mbarriers[size_t(number)]).c_str());
    }
  }
  Warp& warp = block.warps[current->warp];
  warp.clock.join(block.mbarriers[size_t(number)].ended);
  ++warp.meetings;
}

void tma_load(uint32_t target, const TensorMap* map, uint32_t barrier, int x, int y, int z) {
  if (settings.capability / 10 < 9) fail("tma_load on a device of capability %d", settings.capability);
  if (!map->box_rows) fail("tma_load with a map that was never made");
  int number = find(barrier);
  const MBarrier& b = block.mbarriers[size_t(number)];
  if (!b.init_done) fail("mbarrier %#x is used by tma_load without mbarrier_init_done", barrier);
  uint32_t bytes = uint32_t(map->box_rows) * 128;
  uint8_t* p = at(target, bytes, 128);
  for (uint32_t i = 0; i < bytes; i += 16) claim_chunk(chunk_of(target + i), number, b.phase);
  memset(p, 0xff, bytes);
  block.loads.push_back({*map, target, number, x, y, z});
  preempt();
}

}  // namespace ptx
}  // namespace bitune
