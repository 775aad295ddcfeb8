// What a running grid is made of, and how instructions reach it.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "../emulator/device/tensor_map.h"

namespace {

constexpr int kMaxWarps = 16, kMaxBarriers = 48, kTimes = kMaxWarps + kMaxBarriers;
constexpr uint32_t kBase = 1024;  // where shared memory begins
constexpr uint8_t kNobody = 255, kEveryLane = 254;
constexpr uint32_t kAll = ~0u;

[[noreturn]] void fail(const char* format, ...) {
  char text[600];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw std::runtime_error(text);
}

// In Python by the same names, where each is explained.
enum Flag { kProxyOfCopies = 1, kAnyRegisters = 2, kFenceOfWriter = 4, kApproximate = 8 };

enum Step { next, jumped, again };  // again: the instruction is executed once more when the warp wakes

using s16 = int16_t;
using u16 = uint16_t;
using s32 = int32_t;
using u32 = uint32_t;
using s64 = int64_t;
using u64 = uint64_t;
using f32 = float;
using f64 = double;

struct Warp;
struct Ins;
using Handler = Step (*)(Warp&, const Ins&, uint32_t);

struct Ins {
  Handler run;
  const int32_t* o;  // registers: bytes into a warp's file
  int32_t num, dst;  // operands, and how many of the first are written
  int32_t guard;     // register, -1: none
  int32_t negated, target;
  int32_t x[4];
};

struct Clock {
  uint32_t at[kTimes] = {};
  void join(const Clock& c) {
    for (int i = 0; i < kTimes; ++i) at[i] = std::max(at[i], c.at[i]);
  }
  void meet(const Clock& c) {
    for (int i = 0; i < kTimes; ++i) at[i] = std::min(at[i], c.at[i]);
  }
};

// Lanes that go on together until they come to `meet`, where those of the entry below go on.
struct Split {
  int pc;
  uint32_t mask;
  int meet;
};

struct Copy {
  uint32_t target, bytes, valid;
  uint64_t source;
  int lane;
};

struct Accumulator;

struct Warp {
  int index;
  uint8_t* file;  // registers
  Split now;
  std::vector<Split> below;
  uint32_t live = kAll;
  bool asleep = false;
  std::string what;
  Clock clock, proxy_fenced;  // what it had seen at its last proxy fence
  uint32_t meetings = 0;
  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> groups;
  std::vector<uint32_t> dirty;  // cells stored to by each lane since its last proxy fence: (cell)
  uint32_t& time() { return clock.at[index]; }
  // wgmma
  int products = 0, product_groups = 0, waited = 0;
  std::vector<uint32_t> written;  // by register: when
  uint32_t count = 1, fenced = 0;
  std::vector<uint8_t> flight;  // by register: 1 accumulator, 2 operand of products under way
  int in_flight = 0;
  std::map<int, std::shared_ptr<Accumulator>> accumulators;  // by first register
};

struct Cell {
  uint32_t time = 0, meetings = 0, fenced = 0;
  uint8_t writer = kNobody, lane = 0;
  bool pending = false, dirty = false;
};
struct Also {
  uint8_t writer, lane;
  uint32_t time, meetings;
};

struct GlobalCell {
  int32_t write_block = -1, read_block = -1;
  uint32_t time = 0, meetings = 0, read_time = 0;
  uint8_t writer = kNobody, lane = 0, reader = kNobody;
};

struct Range {
  uint64_t begin, end;
};
struct Region {
  uint64_t begin, end;
  std::unordered_map<uint64_t, std::vector<GlobalCell>> cells;  // by page, those that were touched
};
constexpr uint64_t kPage = 4096;

struct Barrier {
  int threads = 0, arrived = 0;
  std::vector<int> waiting;
  uint32_t came = 0;
  Clock clock;
};

struct MBarrier {
  uint32_t address;
  int count, pending;
  int64_t bytes = 0;
  uint32_t phase = 0;
  Clock arriving, ended;
  int init_warp;
  uint32_t init_time;
  bool done = false;
  std::vector<int> waiting;
};

struct Load {
  bitune::TensorMap map;
  uint32_t target;
  int barrier, x, y, z;
};

struct Accumulator {
  int n, products = 0;
  std::vector<float> values;
};
struct Product {
  bool bf16, registers, accumulate, a_turned, b_turned;
  int n, k = 16;
  uint64_t a, b;
  uint32_t came = 0;
  bool computed = false;
  Clock seen, fenced;
  uint32_t times[4];
  std::shared_ptr<Accumulator> accumulator;
  std::vector<uint32_t> cells[2];  // by chunk of 8 elements: its address
  std::vector<uint16_t> bytes[2];
  uint16_t pairs[64 * 16];  // a from registers
};
struct Group {
  std::vector<std::shared_ptr<Product>> products;
  std::vector<int> ends;
};

struct Program {
  std::vector<Ins> code;
  std::vector<int32_t> operands;
  int file_bytes;
  std::vector<uint8_t> constants;  // the end of the file
  int constants_at;
  int special[16];  // registers: tid x y z, ntid x y z, ctaid x y z, nctaid x y z, laneid, warpid, param, shared
                    // base
};

struct Machine {
  const Program* program;
  std::vector<Warp> warps;
  std::vector<uint8_t> memory;
  std::vector<Cell> cells;
  std::vector<uint32_t> reads;
  std::unordered_map<uint32_t, std::vector<Also>> also;
  Barrier barriers[16];
  std::vector<MBarrier> mbarriers;
  std::vector<Load> loads;
  std::vector<Group> groups;
  std::vector<Range> ranges;
  std::vector<Region> regions;
  const uint8_t* params;
  int param_bytes;
  int block;
  uint32_t seed;
  uint64_t executed = 0;
  int flags = 0;
};
Machine* M;
std::unordered_map<std::string, Handler>& handlers() {
  static std::unordered_map<std::string, Handler> h;
  return h;
}
struct Add {
  Add(const char* name, Handler h) { handlers()[name] = h; }
};
#define GLUE2(a, b) a##b
#define GLUE(a, b) GLUE2(a, b)
#define OP(name, ...) static Add GLUE(add_, __COUNTER__)(name, __VA_ARGS__);

uint32_t random_number() {
  M->seed = M->seed * 1664525u + 1013904223u;
  return M->seed >> 8;
}

template <typename T>
T* reg(Warp& w, int32_t o) {
  return reinterpret_cast<T*>(w.file + o);
}
uint32_t& pred(Warp& w, int32_t o) { return *reinterpret_cast<uint32_t*>(w.file + o); }
template <typename F>
void lanes(uint32_t m, F f) {
  if (m == kAll) {
#pragma GCC ivdep
    for (int i = 0; i < 32; ++i) f(i);
  } else {
    for (; m; m &= m - 1) f(__builtin_ctz(m));
  }
}
uint32_t uniform(Warp& w, int32_t o, uint32_t m, const char* what) {
  const uint32_t* r = reg<uint32_t>(w, o);
  uint32_t v = r[__builtin_ctz(m)];
  lanes(m, [&](int i) {
    if (r[i] != v) fail("%s differs between lanes: %#x, %#x", what, v, r[i]);
  });
  return v;
}
void all_lanes(Warp& w, uint32_t m, const char* what) {
  if (m != w.live) fail("%s by the lanes %#x of %#x", what, m, w.live);
}

}  // namespace
