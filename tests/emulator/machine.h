// One block of threads at a time: its threads as fibers, its shared memory, and what is checked of both.
//
// A thread runs until it must wait, or until it is made to let others run. Which one goes on depends on the seed.
// Copies and products that the hardware runs by itself come as late as the program allows or at a moment that the seed
// picks, and until then their targets hold NaN.
//
// Races: every warp has a vector clock. Barriers join clocks; a 16-byte chunk of shared memory remembers its last
// writer and the readers. An access that no barrier puts after those it conflicts with is an error, whatever the order
// the fibers ran in. Lanes of a warp count as one, except that what a lane stored must not be read by the others
// before the warp has met.
//
// Not seen here: accumulators touched between wgmma_fence and the product; races through global memory, and its bounds;
// what goes wrong between blocks, which run one after the other; the order that the compiler makes of it all
// (bitune_kernels/testing/native.py reads some of it); csrc/launch.cu and csrc/device/launch.h, which are replaced; a
// TensorMap that isn't at a multiple of 64; more registers than setmaxnreg leaves a role.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <device/tensor_map.h>

#include "fiber.h"

namespace emulator {

constexpr int kMaxWarps = 16;
constexpr int kMaxBarriers = 48;  // mbarriers
constexpr uint32_t kAllLanes = ~0u;
constexpr int kNobody = 255;

struct Failure {
  std::string text;
};
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// How far in each warp's time, and in each mbarrier's phases, somebody has seen.
struct Clock {
  uint32_t at[kMaxWarps + kMaxBarriers] = {};
  void join(const Clock& other) {
    for (int i = 0; i < kMaxWarps + kMaxBarriers; ++i) at[i] = at[i] > other.at[i] ? at[i] : other.at[i];
  }
  void meet(const Clock& other) {
    for (int i = 0; i < kMaxWarps + kMaxBarriers; ++i) at[i] = at[i] < other.at[i] ? at[i] : other.at[i];
  }
};

enum class Wait { nothing, warp, products, barrier, mbarrier };

// A cp.async under way.
struct Copy {
  uint32_t target;
  const void* source;
  bool valid;
};

struct Thread {
  Fiber fiber;
  int index, warp, lane;
  Wait wait = Wait::nothing;
  const char* what = "";  // the collective or barrier waited for, and its arguments
  uint32_t where = 0;
  int number = 0;
  bool done = false;
  std::vector<Copy> copies;
  std::vector<size_t> copy_groups;  // where each ends in copies
  std::vector<uint32_t> dirty;      // chunks stored to since its last fence_async
  int products = 0;                 // wgmmas started
  int product_groups = 0;           // and committed
  bool fenced = false;              // wgmma_fence since the last wgmma_wait
  int registers = 0;
  int register_changes = 0;
};

struct Warp {
  uint32_t runnable = 0;
  uint32_t priority = 0;
  int first_lane = 0;  // lanes go on in turns from here
  Clock clock;
  uint32_t meetings = 0;  // of all lanes, with what they stored
  // the collective that lanes are arriving at
  const char* collective = nullptr;
  uint32_t arrived = 0;
  void* arguments[32];
};

// Barriers 0 (the block's) to 15.
struct NamedBarrier {
  int threads = 0;  // expected; 0: nobody has come
  int arrived = 0;
  uint32_t lanes[kMaxWarps] = {};
  uint32_t waiting[kMaxWarps] = {};
  Clock clock;
};

struct MBarrier {
  uint32_t address;
  int count;
  int pending;       // arrivals
  int64_t bytes = 0;  // expected and not there yet
  uint32_t phase = 0;
  Clock arriving;  // of those that came in this phase
  Clock ended;     // of the last phase that ended
  int init_thread;
  uint32_t init_clock;
  bool init_done = false;
  uint32_t waiting[kMaxWarps] = {};
};

// A write to a chunk.
struct Write {
  uint8_t writer = kNobody;  // warp, or kMaxWarps + mbarrier of a copy by the engine
  uint8_t lane = 0;
  bool ordinary = false;  // by a thread's own store
  int16_t dirty = -1;     // that thread, until its fence_async
  uint32_t written = 0;   // the writer's clock
  uint32_t meetings = 0;  // of the writer's warp
  uint32_t fenced = 0;    // the writer's clock at its fence_async
  bool seen(const Clock& clock) const { return writer == kNobody || clock.at[writer] >= written; }
  // Also by the copy engine and wgmma.
  bool published(const Clock& clock) const {
    return seen(clock) && dirty < 0 && (!fenced || clock.at[writer] >= fenced);
  }
};

constexpr int kMaxWrites = 3;

// 16 bytes of shared memory. Several warps may store the same bytes: each sees its own store.
struct Chunk {
  Write writes[kMaxWrites];  // the last one, and later ones of the same bytes
  uint8_t num_writes = 1;
  bool barrier = false;  // holds an mbarrier
};

// A tma_load under way.
struct Load {
  bitune::TensorMap map;
  uint32_t target;
  int barrier;
  int x, y, z;
};

struct WarpGroup;  // wgmma.cpp

struct Block {
  int index = 0;
  int num_threads = 0;
  int num_warps = 0;
  int live = 0;
  std::vector<Thread> threads;
  Warp warps[kMaxWarps];
  NamedBarrier barriers[16];
  std::vector<MBarrier> mbarriers;
  std::vector<Load> loads;

  uint32_t base = 0;
  uint32_t size = 0;
  std::vector<uint8_t> memory;
  std::vector<Chunk> chunks;
  std::vector<uint32_t> reads;  // [chunk, warp]: the clock of its last read

  std::vector<std::shared_ptr<WarpGroup>> groups;
  uint32_t late = 0;  // loads end with probability late / 256 whenever another warp takes over
  std::string error;
};

extern Block block;
extern Thread* current;

struct Settings {
  int capability = 90;
  int multiprocessors = 3;
  uint32_t seed = 0;
};
extern Settings settings;
extern uint64_t num_switches;

uint32_t random_number();

// Runs `body(call)` in all threads of a block. Returns what went wrong.
std::string run_block(int index, int threads, int shared_bytes, void (*body)(const void*), const void* call);

// Waits until wake() of its lane.
void sleep(Wait wait, const char* what, uint32_t where = 0, int number = 0);
void wake(int warp, uint32_t lanes);
// Lets others run, sometimes.
void preempt();

// All lanes of the warp come here with their arguments; the last one runs `execute`.
void collective(const char* name, void* argument, void (*execute)(Warp&));

// Shared memory. Addresses are checked, accesses compared with the clocks.
uint8_t* at(uint32_t address, uint32_t bytes, uint32_t alignment);
uint32_t chunk_of(uint32_t address);
void read_chunk(uint32_t chunk);   // by the current warp
// By an ordinary store of the current thread. before: the bytes that `bytes` replace.
void write_chunk(uint32_t chunk, const void* before, const void* bytes);
// By the copy engine, at the current thread's request.
void claim_chunk(uint32_t chunk, int mbarrier, uint32_t phase);
uint32_t& own_clock(int warp);

// Of what a warp group still has under way, at the end of a thread.
void check_products(const Thread& thread);

std::string name_of(int writer);
void end_load(size_t number);
std::string describe(const MBarrier& barrier);
// That wgmma sees what stands in a chunk.
void check_published(uint32_t chunk, const Clock& clock);

}  // namespace emulator
