// The scheduler, and shared memory with its clocks.
#include "machine.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <exception>
#include <map>

Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

Block block;
Thread* current = nullptr;
Settings settings;
uint64_t num_switches = 0;

namespace {

Fiber host;
uint64_t random_state = 1;
void (*thread_body)(const void*);
const void* thread_call;

}  // namespace

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Failure{text};
}

uint32_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return uint32_t(random_state >> 24);
}

// threads

namespace {

std::string describe_waiting() {
  std::string text = "deadlock: nothing can go on";
  for (int w = 0; w < block.num_warps; ++w) {
    std::map<std::string, int> reasons;
    for (int lane = 0; lane < 32; ++lane) {
      const Thread& t = block.threads[size_t(w * 32 + lane)];
      char reason[300];
      if (t.done) {
        snprintf(reason, sizeof reason, "ended");
      } else if (t.wait == Wait::barrier) {
        const NamedBarrier& b = block.barriers[t.where];
        snprintf(reason, sizeof reason, "%s %u (%d of %d threads came)", t.what, t.where, b.arrived, b.threads);
      } else if (t.wait == Wait::mbarrier) {
        snprintf(reason, sizeof reason, "mbarrier_wait, parity %d, %s", t.number,
                 describe(block.mbarriers[t.where]).c_str());
      } else {
        snprintf(reason, sizeof reason, "%s", t.what);
      }
      ++reasons[reason];
    }
    text += "\n  warp " + std::to_string(w) + ":";
    const char* separator = " ";
    for (const auto& [reason, count] : reasons) {
      text += separator + (count < 32 ? std::to_string(count) + " lanes: " : std::string()) + reason;
      separator = "; ";
    }
  }
  return text;
}

Thread* take(Warp& warp) {
  uint32_t mask = warp.runnable;
  int shift = warp.first_lane & 31;
  uint32_t turned = mask >> shift | mask << ((32 - shift) & 31);
  int lane = warp.first_lane < 32 ? __builtin_ctz(turned) : 31 - __builtin_clz(turned);
  lane = (lane + shift) & 31;
  warp.runnable &= ~(1u << lane);
  return &block.threads[size_t(&warp - block.warps) * 32 + size_t(lane)];
}

// Warps have priorities that change now and then: one gets far ahead of another as easily as in step with it.
Thread* next_thread(int but_not) {
  if (current && but_not < 0 && block.warps[current->warp].runnable) return take(block.warps[current->warp]);
  for (;;) {
    if (!block.loads.empty() && (random_number() & 255) < block.late) end_load(random_number() % block.loads.size());
    Warp* best = nullptr;
    for (int w = 0; w < block.num_warps; ++w) {
      Warp& warp = block.warps[w];
      if (warp.runnable && w != but_not && (!best || warp.priority > best->priority)) best = &warp;
    }
    if (best) {
      uint32_t random = random_number();
      if (random % 8 == 0) best->priority = random_number();
      best->first_lane = int(random >> 8 & 63);
      return take(*best);
    }
    if (but_not >= 0) return take(block.warps[but_not]);
    if (block.loads.empty()) throw Failure{describe_waiting()};
    end_load(random_number() % block.loads.size());
  }
}

void run(Thread* next) {
  if (next == current) return;
  Thread* before = current;
  current = next;
  threadIdx.x = uint32_t(next->index);
  ++num_switches;
  switch_fiber(before ? before->fiber : host, next->fiber);
}

void end_thread() {
  Thread& t = *current;
  if (!t.copies.empty()) fail("ends with %zu cp_async it has not waited for", t.copies.size());
  check_products(t);
  t.done = true;
  --block.live;
}

void thread_entry() {
  Thread* next = nullptr;
  std::string what;
  try {
    thread_body(thread_call);
    end_thread();
    if (block.live) next = next_thread(-1);
  } catch (const Failure& failure) {
    what = failure.text;
  } catch (const std::exception& exception) {
    what = exception.what();
  } catch (...) {
    what = "unknown exception";
  }
  if (next) run(next);
  if (!what.empty()) {
    if (what.compare(0, 8, "deadlock")) {
      what = "thread " + std::to_string(current->index) + " (warp " + std::to_string(current->warp) + ", lane " +
             std::to_string(current->lane) + "): " + what;
    }
    block.error = "block " + std::to_string(block.index) + ", " + what;
  }
  Fiber ended;
  switch_fiber(ended, host);
}

void check_block() {
  if (!block.loads.empty()) fail("ends with %zu tma_load under way", block.loads.size());
  for (const MBarrier& b : block.mbarriers) {
    if (b.bytes) fail("ends while bytes are expected: %s", describe(b).c_str());
  }
  int registers = 0;
  for (const Thread& t : block.threads) {
    const Thread& first = block.threads[size_t(t.index / 128 * 128)];
    if (t.register_changes != first.register_changes || t.registers != first.registers) {
      fail("threads %d and %d of a warpgroup changed their registers %d and %d times, to %d and %d", first.index,
           t.index, first.register_changes, t.register_changes, first.registers, t.registers);
    }
    registers += t.registers;
  }
  if (registers > 65536) fail("threads have %d registers, a multiprocessor 65536", registers);
}

}  // namespace

std::string run_block(int index, int threads, int shared_bytes, void (*body)(const void*), const void* call) {
  random_state = (settings.seed * 0x9e3779b97f4a7c15ull + uint64_t(index) * 0xd1b54a32d192ed03ull) | 1;
  for (int i = 0; i < 8; ++i) random_number();
  block = Block();
  block.index = index;
  block.num_threads = threads;
  block.num_warps = threads / 32;
  block.live = threads;
  block.base = 1024 * (1 + random_number() % 4);
  block.size = uint32_t(shared_bytes);
  block.memory.assign(size_t(shared_bytes), 0xff);
  block.chunks.resize(size_t(shared_bytes + 15) / 16);
  block.reads.resize(block.chunks.size() * kMaxWarps);
  const uint32_t lateness[] = {0, 2, 32, 128, 255};
  block.late = lateness[random_number() % 5];
  block.groups.resize(size_t(threads + 127) / 128);
  block.threads.resize(size_t(threads));
  thread_body = body;
  thread_call = call;
  current = nullptr;
  for (int i = 0; i < threads; ++i) {
    Thread& t = block.threads[size_t(i)];
    t.index = i;
    t.warp = i / 32;
    t.lane = i % 32;
    start_fiber(t.fiber, i, thread_entry);
  }
  for (int w = 0; w < block.num_warps; ++w) {
    block.warps[w].runnable = kAllLanes;
    block.warps[w].priority = random_number();
    own_clock(w) = 1;
  }
  try {
    run(next_thread(-1));
    if (block.error.empty()) check_block();
  } catch (const Failure& failure) {
    block.error = "block " + std::to_string(index) + " " + failure.text;
  }
  return block.error;
}

void sleep(Wait wait, const char* what, uint32_t where, int number) {
  Thread& t = *current;
  t.wait = wait;
  t.what = what;
  t.where = where;
  t.number = number;
  run(next_thread(-1));
  t.wait = Wait::nothing;
}

void wake(int warp, uint32_t lanes) { block.warps[warp].runnable |= lanes; }

void preempt() {
  if (random_number() % 16) return;
  wake(current->warp, 1u << current->lane);
  run(next_thread(current->warp));
}

void collective(const char* name, void* argument, void (*execute)(Warp&)) {
  Thread& t = *current;
  Warp& warp = block.warps[t.warp];
  if (warp.arrived && warp.collective != name) {
    fail("comes to %s while other lanes of its warp wait at %s", name, warp.collective);
  }
  warp.collective = name;
  warp.arguments[t.lane] = argument;
  warp.arrived |= 1u << t.lane;
  if (warp.arrived != kAllLanes) return sleep(Wait::warp, name);
  warp.arrived = 0;
  execute(warp);
  wake(t.warp, ~(1u << t.lane));
}

// shared memory

uint8_t* at(uint32_t address, uint32_t bytes, uint32_t alignment) {
  if (address % alignment) fail("shared address %#x is no multiple of %u", address, alignment);
  if (address < block.base || address - block.base + uint64_t(bytes) > block.size) {
    fail("%u bytes at shared address %#x are outside of the block's, %#x to %#x", bytes, address, block.base,
         block.base + block.size);
  }
  return &block.memory[address - block.base];
}

uint32_t chunk_of(uint32_t address) { return (address - block.base) / 16; }

uint32_t& own_clock(int warp) { return block.warps[warp].clock.at[warp]; }

std::string name_of(int writer) {
  if (writer < kMaxWarps) return "warp " + std::to_string(writer);
  char text[60];
  snprintf(text, sizeof text, "the copy for mbarrier %#x", block.mbarriers[size_t(writer - kMaxWarps)].address);
  return text;
}

namespace {

uint32_t address_of(uint32_t chunk) { return block.base + chunk * 16; }

// What a write must come after: all writes and all reads.
void check_write(uint32_t chunk) {
  const Chunk& c = block.chunks[chunk];
  const Clock& clock = block.warps[current->warp].clock;
  if (c.barrier) fail("writes over the mbarrier at %#x", address_of(chunk));
  for (int i = 0; i < c.num_writes; ++i) {
    if (c.writes[i].seen(clock)) continue;
    fail("race: writes %#x, which %s has written, with no barrier between", address_of(chunk),
         name_of(c.writes[i].writer).c_str());
  }
  const uint32_t* reads = &block.reads[size_t(chunk) * kMaxWarps];
  uint32_t early = 0;
  for (int w = 0; w < kMaxWarps; ++w) early |= uint32_t(reads[w] > clock.at[w]) << w;
  early &= ~(1u << current->warp);
  if (early) {
    fail("race: writes %#x, which warp %d reads, with no barrier between", address_of(chunk), __builtin_ctz(early));
  }
}

}  // namespace

void read_chunk(uint32_t chunk) {
  const Chunk& c = block.chunks[chunk];
  const Warp& warp = block.warps[current->warp];
  auto sees = [&](const Write& w) {
    return w.seen(warp.clock) && !(w.ordinary && w.writer == current->warp && w.meetings == warp.meetings);
  };
  bool seen = false;
  for (int i = 0; i < c.num_writes && !seen; ++i) seen = sees(c.writes[i]);
  if (!seen) {
    const Write& w = c.writes[0];
    if (w.writer == current->warp) {
      fail("race: reads %#x, which lane %d has written, with no sync_warp between", address_of(chunk), w.lane);
    }
    fail("race: reads %#x, which %s has written, with no barrier between", address_of(chunk),
         name_of(w.writer).c_str());
  }
  block.reads[size_t(chunk) * kMaxWarps + size_t(current->warp)] = warp.clock.at[current->warp];
}

void write_chunk(uint32_t chunk, const void* before, const void* bytes) {
  Chunk& c = block.chunks[chunk];
  const Warp& warp = block.warps[current->warp];
  uint32_t own = warp.clock.at[current->warp];
  bool same = memcmp(before, bytes, 16) == 0;
  if (same && !c.barrier) {
    // Nothing changes, but who writes other bytes must come after this, as after a read.
    block.reads[size_t(chunk) * kMaxWarps + size_t(current->warp)] = own;
    for (int i = 0; i < c.num_writes; ++i) {
      if (c.writes[i].published(warp.clock)) return;
      if (c.writes[i].dirty == current->index) return;
    }
    if (c.num_writes == kMaxWrites) return;
  } else {
    check_write(chunk);
    c.num_writes = 0;
  }
  Write w;
  w.writer = uint8_t(current->warp);
  w.lane = uint8_t(current->lane);
  w.ordinary = true;
  w.dirty = int16_t(current->index);
  w.written = own;
  w.meetings = warp.meetings;
  c.writes[c.num_writes++] = w;
  current->dirty.push_back(chunk);
}

void check_published(uint32_t chunk, const Clock& clock) {
  const Chunk& c = block.chunks[chunk];
  for (int i = 0; i < c.num_writes; ++i) {
    if (c.writes[i].published(clock)) return;
  }
  const Write* seen = &c.writes[0];
  for (int i = 0; i < c.num_writes; ++i) {
    if (c.writes[i].seen(clock)) seen = &c.writes[i];
  }
  const Write& w = *seen;
  if (!w.seen(clock)) {
    fail("race: wgmma reads %#x, which %s has written, with no barrier between", address_of(chunk),
         name_of(w.writer).c_str());
  }
  if (w.dirty >= 0) fail("wgmma reads %#x, stored to by thread %d without fence_async", address_of(chunk), w.dirty);
  fail("wgmma reads %#x with no barrier after fence_async", address_of(chunk));
}

void claim_chunk(uint32_t chunk, int mbarrier, uint32_t phase) {
  check_write(chunk);
  Chunk& c = block.chunks[chunk];
  const Clock& clock = block.warps[current->warp].clock;
  for (int i = 0; i < c.num_writes; ++i) {
    const Write& w = c.writes[i];
    if (w.dirty >= 0) fail("copies to %#x, stored to by thread %d without fence_async", address_of(chunk), w.dirty);
    if (!w.published(clock)) fail("copies to %#x with no barrier after fence_async", address_of(chunk));
  }
  c.num_writes = 1;
  c.writes[0] = Write();
  c.writes[0].writer = uint8_t(kMaxWarps + mbarrier);
  c.writes[0].written = phase + 1;
}

}  // namespace emulator
