// Runs PTX: a block's warps one after the other, 32 lanes at a time.
//
// What the hardware does by itself (cp.async, wgmma, the copy engine) is done as late as the program allows; until then
// its targets hold NaN. Every warp has a vector clock, joined by barriers. Each 2 bytes of shared memory remember their
// last writer and readers: an access that no barrier puts after those it conflicts with is an error, whatever the order
// the warps ran in. Global memory is checked for its bounds, for the same races in a block, and between blocks.
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

enum Step { next, jumped, again };  // again: the instruction is executed once more when the warp wakes

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
  void join(const Clock& c) { for (int i = 0; i < kTimes; ++i) at[i] = std::max(at[i], c.at[i]); }
  void meet(const Clock& c) { for (int i = 0; i < kTimes; ++i) at[i] = std::min(at[i], c.at[i]); }
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
struct Also { uint8_t writer, lane; uint32_t time, meetings; };

struct GlobalCell {
  int32_t write_block = -1, read_block = -1;
  uint32_t time = 0, meetings = 0, read_time = 0;
  uint8_t writer = kNobody, lane = 0, reader = kNobody;
};

struct Range { uint64_t begin, end; };
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

struct TensorMap {
  const uint8_t* data;
  int64_t sizes[3], strides[3];
  int box_rows;
};
struct Load { TensorMap map; uint32_t target; int barrier, x, y, z; };

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
  int a_first[4][4];
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
  int special[16];  // registers: tid x y z, ntid x y z, ctaid x y z, nctaid x y z, laneid, warpid, param, shared base
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
  uint32_t index[12];
  uint64_t executed = 0;
  uint8_t* hits = nullptr;  // by instruction: whether a lane executed it
  int flags = 0;  // see __init__.py
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

template <typename T> T* reg(Warp& w, int32_t o) { return reinterpret_cast<T*>(w.file + o); }
uint32_t& pred(Warp& w, int32_t o) { return *reinterpret_cast<uint32_t*>(w.file + o); }
template <typename F> void lanes(uint32_t m, F f) {
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
  lanes(m, [&](int i) { if (r[i] != v) fail("%s differs between lanes: %#x, %#x", what, v, r[i]); });
  return v;
}
void all_lanes(Warp& w, uint32_t m, const char* what) {
  if (m != w.live) fail("%s by the lanes %#x of %#x", what, m, w.live);
}

// ---------------------------------------------------------------- scalar instructions

template <typename D, typename A, D (*F)(A)>
Step unary(Warp& w, const Ins& i, uint32_t m) {
  D* d = reg<D>(w, i.o[0]); const A* a = reg<A>(w, i.o[1]);
  lanes(m, [=](int l) { d[l] = F(a[l]); });
  return next;
}
template <typename D, typename A, typename B, D (*F)(A, B)>
Step binary(Warp& w, const Ins& i, uint32_t m) {
  D* d = reg<D>(w, i.o[0]); const A* a = reg<A>(w, i.o[1]); const B* b = reg<B>(w, i.o[2]);
  lanes(m, [=](int l) { d[l] = F(a[l], b[l]); });
  return next;
}
template <typename D, typename A, typename B, typename C, D (*F)(A, B, C)>
Step ternary(Warp& w, const Ins& i, uint32_t m) {
  D* d = reg<D>(w, i.o[0]); const A* a = reg<A>(w, i.o[1]); const B* b = reg<B>(w, i.o[2]); const C* c = reg<C>(w, i.o[3]);
  lanes(m, [=](int l) { d[l] = F(a[l], b[l], c[l]); });
  return next;
}
template <typename T, bool (*F)(T, T)>
Step compare(Warp& w, const Ins& i, uint32_t m) {
  const T* a = reg<T>(w, i.o[1]); const T* b = reg<T>(w, i.o[2]);
  uint32_t r = 0;
  for (int l = 0; l < 32; ++l) r |= uint32_t(F(a[l], b[l])) << l;
  uint32_t& d = pred(w, i.o[0]);
  d = (d & ~m) | (r & m);
  return next;
}
template <typename T>
Step select(Warp& w, const Ins& i, uint32_t m) {
  T* d = reg<T>(w, i.o[0]); const T* a = reg<T>(w, i.o[1]); const T* b = reg<T>(w, i.o[2]);
  uint32_t p = pred(w, i.o[3]);
  lanes(m, [=](int l) { d[l] = p >> l & 1 ? a[l] : b[l]; });
  return next;
}
template <uint32_t (*F)(uint32_t, uint32_t)>
Step logic(Warp& w, const Ins& i, uint32_t m) {
  uint32_t& d = pred(w, i.o[0]);
  uint32_t r = F(pred(w, i.o[1]), i.num > 2 ? pred(w, i.o[2]) : 0);
  d = (d & ~m) | (r & m);
  return next;
}

#define UN(name, D, A, ...) OP(name, unary<D, A, [](A a) -> D { return D(__VA_ARGS__); }>)
#define BIN(name, D, A, B, ...) OP(name, binary<D, A, B, [](A a, B b) -> D { return D(__VA_ARGS__); }>)
#define TER(name, D, A, B, C, ...) OP(name, ternary<D, A, B, C, [](A a, B b, C c) -> D { return D(__VA_ARGS__); }>)
#define CMP1(name, T, ...) OP(name, compare<T, [](T a, T b) -> bool { return (__VA_ARGS__); }>)

using s16 = int16_t; using u16 = uint16_t; using s32 = int32_t; using u32 = uint32_t; using s64 = int64_t; using u64 = uint64_t;
using f32 = float; using f64 = double;

#define CMPS(T) \
  CMP1("setp.eq." #T, T, a == b) CMP1("setp.ne." #T, T, a != b) CMP1("setp.lt." #T, T, a < b) \
  CMP1("setp.le." #T, T, a <= b) CMP1("setp.gt." #T, T, a > b) CMP1("setp.ge." #T, T, a >= b)
CMPS(s16) CMPS(u16) CMPS(s32) CMPS(u32) CMPS(s64) CMPS(u64)
CMP1("setp.eq.f32", f32, a == b) CMP1("setp.ne.f32", f32, a == a && b == b && a != b) CMP1("setp.lt.f32", f32, a < b)
CMP1("setp.le.f32", f32, a <= b) CMP1("setp.gt.f32", f32, a > b) CMP1("setp.ge.f32", f32, a >= b)
CMP1("setp.equ.f32", f32, !(a != a) && !(b != b) ? a == b : true) CMP1("setp.neu.f32", f32, a != b)
CMP1("setp.ltu.f32", f32, !(a >= b)) CMP1("setp.leu.f32", f32, !(a > b)) CMP1("setp.gtu.f32", f32, !(a <= b))
CMP1("setp.geu.f32", f32, !(a < b)) CMP1("setp.num.f32", f32, a == a && b == b) CMP1("setp.nan.f32", f32, a != a || b != b)
CMP1("setp.eq.b16", u16, a == b) CMP1("setp.ne.b16", u16, a != b)
CMP1("setp.eq.b32", u32, a == b) CMP1("setp.ne.b32", u32, a != b) CMP1("setp.eq.b64", u64, a == b) CMP1("setp.ne.b64", u64, a != b)
OP("selp.16", select<u16>) OP("selp.32", select<u32>) OP("selp.64", select<u64>)
OP("and.pred", logic<[](u32 a, u32 b) { return a & b; }>) OP("or.pred", logic<[](u32 a, u32 b) { return a | b; }>)
OP("xor.pred", logic<[](u32 a, u32 b) { return a ^ b; }>) OP("not.pred", logic<[](u32 a, u32) { return ~a; }>)
OP("mov.pred", logic<[](u32 a, u32) { return a; }>)
UN("mov.16", u16, u16, a) UN("mov.32", u32, u32, a) UN("mov.64", u64, u64, a)
#define INTS(n, U, S) \
  BIN("add." #U, U, U, U, a + b) BIN("add." #S, U, U, U, a + b) BIN("sub." #U, U, U, U, a - b) BIN("sub." #S, U, U, U, a - b) \
  BIN("mul.lo." #U, U, U, U, a * b) BIN("mul.lo." #S, U, U, U, a * b) \
  TER("mad.lo." #U, U, U, U, U, a * b + c) TER("mad.lo." #S, U, U, U, U, a * b + c) \
  BIN("min." #U, U, U, U, a < b ? a : b) BIN("min." #S, S, S, S, a < b ? a : b) \
  BIN("max." #U, U, U, U, a > b ? a : b) BIN("max." #S, S, S, S, a > b ? a : b) \
  BIN("max.relu." #S, S, S, S, std::max<S>(a > b ? a : b, 0)) \
  BIN("and.b" #n, U, U, U, a & b) BIN("or.b" #n, U, U, U, a | b) BIN("xor.b" #n, U, U, U, a ^ b) UN("not.b" #n, U, U, ~a) \
  BIN("shl.b" #n, U, U, u32, b >= n ? 0 : U(a << b)) BIN("shr.b" #n, U, U, u32, b >= n ? 0 : U(a >> b)) \
  BIN("shr." #U, U, U, u32, b >= n ? 0 : U(a >> b)) BIN("shr." #S, S, S, u32, a >> (b >= n ? n - 1 : b)) \
  UN("neg." #S, U, U, 0 - a) UN("abs." #S, S, S, a < 0 ? -a : a) \
  BIN("div." #U, U, U, U, b ? a / b : U(-1)) BIN("div." #S, S, S, S, b ? (b == -1 ? S(U(0) - U(a)) : S(a / b)) : S(-1)) \
  BIN("rem." #U, U, U, U, b ? a % b : a) BIN("rem." #S, S, S, S, b && b != -1 ? a % b : 0)
INTS(16, u16, s16) INTS(32, u32, s32) INTS(64, u64, s64)
BIN("mul.wide.s32", s64, s32, s32, s64(a) * b) BIN("mul.wide.u32", u64, u32, u32, u64(a) * b)
BIN("mul.hi.s32", s32, s32, s32, s64(a) * b >> 32) BIN("mul.hi.u32", u32, u32, u32, u64(a) * b >> 32)
BIN("mul.wide.s16", s32, s16, s16, s32(a) * b) BIN("mul.wide.u16", u32, u16, u16, u32(a) * b)
TER("mad.wide.s32", s64, s32, s32, s64, s64(a) * b + c) TER("mad.wide.u32", u64, u32, u32, u64, u64(a) * b + c)
s64 bfe(bool sign, int width, u64 a, u32 pos, u32 len) {
  pos &= 255, len &= 255;
  u64 s = 0;
  if (sign && len) { u32 top = std::min<u32>(pos + len - 1, u32(width - 1)); s = a >> top & 1; }
  u64 r = 0;
  for (int i = 0; i < width; ++i) r |= (u32(i) < len && pos + u32(i) < u32(width) ? a >> (pos + u32(i)) & 1 : s) << i;
  return s64(r);
}
TER("bfe.u32", u32, u32, u32, u32, bfe(false, 32, a, b, c)) TER("bfe.s32", u32, u32, u32, u32, bfe(true, 32, a, b, c))
TER("bfe.u64", u64, u64, u32, u32, bfe(false, 64, a, b, c)) TER("bfe.s64", u64, u64, u32, u32, bfe(true, 64, a, b, c))
static Step bfi32(Warp& w, const Ins& i, uint32_t m) {
  u32 *d = reg<u32>(w, i.o[0]), *a = reg<u32>(w, i.o[1]), *b = reg<u32>(w, i.o[2]), *c = reg<u32>(w, i.o[3]), *e = reg<u32>(w, i.o[4]);
  lanes(m, [=](int l) {
    u32 pos = c[l] & 255, len = e[l] & 255, f = b[l];
    for (u32 k = 0; k < len && pos + k < 32; ++k) f = (f & ~(1u << (pos + k))) | (a[l] >> k & 1) << (pos + k);
    d[l] = f;
  });
  return next;
}
OP("bfi.b32", bfi32)
static Step lop3(Warp& w, const Ins& i, uint32_t m) {
  u32 *d = reg<u32>(w, i.o[0]), *a = reg<u32>(w, i.o[1]), *b = reg<u32>(w, i.o[2]), *c = reg<u32>(w, i.o[3]), *t = reg<u32>(w, i.o[4]);
  lanes(m, [=](int l) {
    u32 r = 0;
    for (int k = 0; k < 8; ++k) if (t[l] >> k & 1) r |= (k & 4 ? a[l] : ~a[l]) & (k & 2 ? b[l] : ~b[l]) & (k & 1 ? c[l] : ~c[l]);
    d[l] = r;
  });
  return next;
}
OP("lop3.b32", lop3)
u32 prmt(u32 a, u32 b, u32 c) {
  u64 v = u64(b) << 32 | a; u32 r = 0;
  for (int k = 0; k < 4; ++k) {
    u32 s = c >> 4 * k & 15, byte = u32(v >> 8 * (s & 7) & 255);
    if (s & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << 8 * k;
  }
  return r;
}
TER("prmt.b32", u32, u32, u32, u32, prmt(a, b, c))
TER("shf.l.wrap.b32", u32, u32, u32, u32, (u64(b) << 32 | a) << (c & 31) >> 32) TER("shf.r.wrap.b32", u32, u32, u32, u32, (u64(b) << 32 | a) >> (c & 31))
TER("shf.l.clamp.b32", u32, u32, u32, u32, (u64(b) << 32 | a) << std::min(c, 32u) >> 32) TER("shf.r.clamp.b32", u32, u32, u32, u32, (u64(b) << 32 | a) >> std::min(c, 32u))
UN("popc.b32", u32, u32, __builtin_popcount(a)) UN("clz.b32", u32, u32, a ? __builtin_clz(a) : 32) UN("brev.b32", u32, u32, [](u32 x) { u32 r = 0; for (int k = 0; k < 32; ++k) r |= (x >> k & 1) << (31 - k); return r; }(a))

f32 ftz(f32 x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
f32 minf(f32 a, f32 b) { return a != a ? b : b != b ? a : a < b ? a : a > b ? b : std::signbit(a) ? a : b; }
f32 maxf(f32 a, f32 b) { return a != a ? b : b != b ? a : a > b ? a : a < b ? b : std::signbit(a) ? b : a; }
f32 nanf_of(f32 a, f32 b, f32 r) { return a != a ? a : b != b ? b : r; }
#define FLOATS(z, Z) \
  BIN("add" z "f32", f32, f32, f32, Z(a + b)) BIN("sub" z "f32", f32, f32, f32, Z(a - b)) BIN("mul" z "f32", f32, f32, f32, Z(a * b)) \
  TER("fma" z "f32", f32, f32, f32, f32, Z(__builtin_fmaf(a, b, c))) BIN("div" z "f32", f32, f32, f32, Z(a / b)) \
  UN("neg" z "f32", f32, f32, -a) UN("abs" z "f32", f32, f32, std::fabs(a)) UN("rcp" z "f32", f32, f32, Z(1 / a)) \
  UN("sqrt" z "f32", f32, f32, Z(std::sqrt(a))) UN("rsqrt" z "f32", f32, f32, Z(1 / std::sqrt(a))) \
  UN("ex2" z "f32", f32, f32, Z(std::exp2(a))) UN("lg2" z "f32", f32, f32, Z(std::log2(a))) UN("tanh" z "f32", f32, f32, Z(std::tanh(a))) \
  BIN("min" z "f32", f32, f32, f32, minf(a, b)) BIN("max" z "f32", f32, f32, f32, maxf(a, b)) \
  BIN("min" z "NaN.f32", f32, f32, f32, nanf_of(a, b, minf(a, b))) BIN("max" z "NaN.f32", f32, f32, f32, nanf_of(a, b, maxf(a, b)))
FLOATS(".", ) FLOATS(".ftz.", ftz)
// What is approximate may be off by this much, and with flag 32 is.
f32 off(f32 x, int ulps) {
  if (!(M->flags & 32) || !std::isfinite(x) || x == 0) return x;
  u32 b; memcpy(&b, &x, 4);
  b += u32(int(b * 2654435761u >> 16) % (2 * ulps + 1) - ulps);
  memcpy(&x, &b, 4);
  return x;
}
#define APPROX(z, Z) \
  UN("ex2.approx" z "f32", f32, f32, a == 0 ? 1.0f : Z(off(std::exp2(a), 2))) UN("rcp.approx" z "f32", f32, f32, Z(off(1 / a, 1))) \
  UN("lg2.approx" z "f32", f32, f32, [](f32 x) { f32 r = std::log2(x); return M->flags & 32 && std::isfinite(r) ? off(r, 2) + (x > 0.5f && x < 2 ? 2.4e-7f : 0) : r; }(Z(a))) \
  BIN("div.full" z "f32", f32, f32, f32, Z(off(a / b, 2))) BIN("div.approx" z "f32", f32, f32, f32, Z(off(a / b, 2))) \
  UN("sqrt.approx" z "f32", f32, f32, Z(off(std::sqrt(a), 2))) UN("rsqrt.approx" z "f32", f32, f32, Z(off(1 / std::sqrt(a), 2))) \
  UN("tanh.approx" z "f32", f32, f32, std::tanh(a))
APPROX(".", ) APPROX(".ftz.", ftz)

u16 to_bf16(f32 x) {
  u32 b; memcpy(&b, &x, 4);
  if (x != x) return 0x7fff;
  return u16((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
f32 from_bf16(u16 x) { u32 b = u32(x) << 16; f32 r; memcpy(&r, &b, 4); return r; }
u16 to_f16(f32 x) { return x != x ? 0x7fff : u16(_cvtss_sh(x, 0)); }
f32 from_f16(u16 x) { return _cvtsh_ss(x); }
BIN("cvt.rn.bf16x2.f32", u32, f32, f32, u32(to_bf16(a)) << 16 | to_bf16(b)) BIN("cvt.rn.f16x2.f32", u32, f32, f32, u32(to_f16(a)) << 16 | to_f16(b))
UN("cvt.rn.bf16.f32", u16, f32, to_bf16(a)) UN("cvt.rn.f16.f32", u16, f32, to_f16(a))
UN("cvt.f32.bf16", f32, u16, from_bf16(a)) UN("cvt.f32.f16", f32, u16, from_f16(a))
UN("cvt.rn.f32.s32", f32, s32, a) UN("cvt.rn.f32.u32", f32, u32, a) UN("cvt.rn.f32.s64", f32, s64, a) UN("cvt.rn.f32.u64", f32, u64, a)
UN("cvt.rzi.s32.f32", s32, f32, a != a ? 0 : a >= 2147483648.f ? INT32_MAX : a < -2147483648.f ? INT32_MIN : s32(a))
#define CVT(D, S) UN("cvt." #D "." #S, D, S, a)
CVT(s64, s32) CVT(u64, s32) CVT(u64, u32) CVT(s64, u32) CVT(u32, u64) CVT(s32, s64) CVT(u32, s64) CVT(s32, u64) CVT(u16, u32) CVT(u32, u16) CVT(s32, s16)
CVT(s16, s32) CVT(u16, s32) CVT(u16, u64) CVT(u64, u16) CVT(s64, s16) CVT(s32, u16) CVT(u32, s16) CVT(s16, u16) CVT(u16, s16) CVT(u32, u32) CVT(s16, u32) CVT(u16, u16)
// A source in a wider register than its type.
UN("cvt.s64.s32<64", s64, u64, s32(a)) UN("cvt.u64.u32<64", u64, u64, u32(a))
// 8-bit numbers stand in 16- and 32-bit registers.
UN("cvt.u16.u8", u16, u16, a & 255) UN("cvt.s16.s8", s16, u16, int8_t(a)) UN("cvt.s32.s8", s32, u32, int8_t(a)) UN("cvt.u32.u8", u32, u32, a & 255)
BIN("mov.pack32", u32, u16, u16, u32(b) << 16 | a) BIN("mov.pack64", u64, u32, u32, u64(b) << 32 | a)
template <typename W, typename P>
Step unpack(Warp& w, const Ins& i, uint32_t m) {
  P *a = reg<P>(w, i.o[0]), *b = reg<P>(w, i.o[1]); const W* x = reg<W>(w, i.o[2]);
  lanes(m, [=](int l) { W v = x[l]; a[l] = P(v); b[l] = P(v >> 8 * sizeof(P)); });
  return next;
}
OP("mov.unpack32", unpack<u32, u16>) OP("mov.unpack64", unpack<u64, u32>)
template <typename F> void pairs16(Warp& w, const Ins& i, uint32_t m, F f) {
  lanes(m, [&](int l) {
    u32 r = 0;
    for (int h = 0; h < 2; ++h) r |= u32(f([&](int k) { return u16(reg<u32>(w, i.o[k])[l] >> 16 * h); })) << 16 * h;
    reg<u32>(w, i.o[0])[l] = r;
  });
}
#define PAIR(name, T) \
  OP("fma.rn." name, [](Warp& w, const Ins& i, uint32_t m) { pairs16(w, i, m, [](auto x) { return to_##T(f32(f64(from_##T(x(1))) * from_##T(x(2)) + from_##T(x(3)))); }); return next; }) \
  OP("mul." name, [](Warp& w, const Ins& i, uint32_t m) { pairs16(w, i, m, [](auto x) { return to_##T(from_##T(x(1)) * from_##T(x(2))); }); return next; }) \
  OP("add." name, [](Warp& w, const Ins& i, uint32_t m) { pairs16(w, i, m, [](auto x) { return to_##T(from_##T(x(1)) + from_##T(x(2))); }); return next; }) \
  OP("sub." name, [](Warp& w, const Ins& i, uint32_t m) { pairs16(w, i, m, [](auto x) { return to_##T(from_##T(x(1)) - from_##T(x(2))); }); return next; })
PAIR("bf16x2", bf16) PAIR("f16x2", f16)

// ---------------------------------------------------------------- memory

uint8_t* shared_at(uint32_t address, uint32_t bytes) {
  if (address < kBase || address + bytes > kBase + M->memory.size()) fail("shared memory has no %u bytes at %#x (it has %zu)", bytes, address - kBase, M->memory.size());
  if (address % bytes) fail("shared address %#x is no multiple of %u", address, bytes);
  return &M->memory[address - kBase];
}
std::string name_of(int writer) {
  char t[60];
  if (writer < kMaxWarps) snprintf(t, sizeof t, "warp %d", writer); else snprintf(t, sizeof t, "a copy to mbarrier %d", writer - kMaxWarps);
  return t;
}
bool seen(const Warp& w, int lane, uint8_t writer, uint8_t writer_lane, uint32_t time, uint32_t meetings) {
  if (writer == w.index) return lane == writer_lane || meetings < w.meetings;
  return w.clock.at[writer] >= time;
}
void read_cell(Warp& w, int lane, uint32_t c) {
  Cell& x = M->cells[c];
  M->reads[size_t(c) * kMaxWarps + size_t(w.index)] = w.time();
  if (x.writer == kNobody) fail("lane %d reads shared memory that nobody wrote: %#x", lane, c * 2);
  if (x.pending) fail("lane %d reads shared memory %#x that a copy of %s is under way to", lane, c * 2, name_of(x.writer).c_str());
  if (seen(w, lane, x.writer, x.lane, x.time, x.meetings)) return;
  auto a = M->also.find(c);
  if (a != M->also.end()) for (const Also& s : a->second) if (seen(w, lane, s.writer, s.lane, s.time, s.meetings)) return;
  fail("race: lane %d reads shared memory %#x, written by %s lane %d, without a barrier between", lane, c * 2, name_of(x.writer).c_str(), x.lane);
}
// same: it writes the bytes that are there already
void write_cell(Warp& w, int lane, uint32_t c, bool same) {
  Cell& x = M->cells[c];
  if (x.pending) fail("lane %d writes shared memory %#x that a copy of %s is under way to", lane, c * 2, name_of(x.writer).c_str());
  const uint32_t* r = &M->reads[size_t(c) * kMaxWarps];
  for (int v = 0; v < kMaxWarps; ++v)
    if (r[v] && v != w.index && w.clock.at[v] < r[v] && !same) fail("race: lane %d writes shared memory %#x, read by warp %d, without a barrier between", lane, c * 2, v);
  if (x.writer != kNobody && !(x.writer == w.index || w.clock.at[x.writer] >= x.time)) {
    if (!same) fail("race: lane %d writes shared memory %#x, written by %s, without a barrier between", lane, c * 2, name_of(x.writer).c_str());
    M->also[c].push_back({uint8_t(w.index), uint8_t(lane), w.time(), w.meetings});
    return;
  }
  if (!M->also.empty()) M->also.erase(c);
  x = Cell();
  x.writer = uint8_t(w.index), x.lane = uint8_t(lane), x.time = w.time(), x.meetings = w.meetings;
}
void read_shared(Warp& w, int lane, uint32_t address, uint32_t bytes) {
  for (uint32_t c = (address - kBase) / 2; c < (address - kBase + bytes + 1) / 2; ++c) read_cell(w, lane, c);
}

// Global memory.
const Range* range_of(uint64_t p, uint64_t bytes) {
  auto r = std::upper_bound(M->ranges.begin(), M->ranges.end(), p, [](uint64_t v, const Range& x) { return v < x.begin; });
  // Ranges may overlap: any that holds the access.
  while (r != M->ranges.begin()) { --r; if (p + bytes <= r->end) return &*r; if (M->ranges.begin() == r) break; }
  return nullptr;
}
GlobalCell* global_cells(Warp& w, int lane, uint64_t p, uint32_t bytes, const char* doing) {
  if (!range_of(p, bytes)) {
    int64_t best = INT64_MAX; int at = -1;
    for (size_t k = 0; k < M->ranges.size(); ++k) {
      int64_t d = p < M->ranges[k].begin ? int64_t(M->ranges[k].begin - p) : int64_t(p + bytes - M->ranges[k].end);
      if (d < best) best = d, at = int(k);
    }
    fail("lane %d %s %u bytes of global memory at %#llx outside of every tensor, %lld bytes from %s of tensor [%#llx, %#llx)", lane, doing, bytes, (unsigned long long)p, (long long)best,
         at >= 0 && p < M->ranges[size_t(at)].begin ? "the begin" : "the end", at >= 0 ? (unsigned long long)M->ranges[size_t(at)].begin : 0, at >= 0 ? (unsigned long long)M->ranges[size_t(at)].end : 0);
  }
  if (p % bytes) fail("lane %d %s global memory at %#llx, no multiple of %u", lane, doing, (unsigned long long)p, bytes);
  for (Region& g : M->regions) if (p >= g.begin && p + bytes <= g.end) {
    std::vector<GlobalCell>& page = g.cells[p / kPage];
    if (page.empty()) page.resize(kPage / 2);
    return &page[p % kPage / 2];
  }
  fail("no region");
}
void read_global(Warp& w, int lane, uint64_t p, uint32_t bytes) {
  GlobalCell* c = global_cells(w, lane, p, bytes, "reads");
  for (uint32_t i = 0; i < (bytes + 1) / 2; ++i, ++c) {
    if (c->write_block >= 0) {
      if (c->write_block != M->block) fail("lane %d reads global memory that block %d of the same launch wrote", lane, c->write_block);
      if (!seen(w, lane, c->writer, c->lane, c->time, c->meetings)) fail("race: lane %d reads global memory written by warp %d lane %d, without a barrier between", lane, c->writer, c->lane);
    }
    c->read_block = M->block, c->reader = uint8_t(w.index), c->read_time = w.time();
  }
}
void write_global(Warp& w, int lane, uint64_t p, uint32_t bytes, const void* value) {
  GlobalCell* c = global_cells(w, lane, p, bytes, "writes");
  bool same = !memcmp(reinterpret_cast<void*>(p), value, bytes);
  for (uint32_t i = 0; i < (bytes + 1) / 2; ++i, ++c) {
    if (c->read_block >= 0 && c->read_block != M->block) fail("lane %d writes global memory that block %d of the same launch read", lane, c->read_block);
    if (c->write_block >= 0) {
      if (c->write_block != M->block) fail("lane %d writes global memory that block %d of the same launch wrote", lane, c->write_block);
      if (c->writer != w.index && w.clock.at[c->writer] < c->time && !same) fail("race: lane %d writes global memory written by warp %d, without a barrier between", lane, c->writer);
    }
    if (c->read_block == M->block && c->reader != w.index && w.clock.at[c->reader] < c->read_time && !same) fail("race: lane %d writes global memory read by warp %d, without a barrier between", lane, c->reader);
    c->write_block = M->block, c->writer = uint8_t(w.index), c->lane = uint8_t(lane), c->time = w.time(), c->meetings = w.meetings;
  }
  memcpy(reinterpret_cast<void*>(p), value, bytes);
}

template <typename D, typename A>
D put(A a) { if constexpr (sizeof(D) == sizeof(A)) { D d; memcpy(&d, &a, sizeof d); return d; } else return D(a); }

// x: offset, number of elements. Operands: registers, then the address.
template <typename T, typename D>
Step load_global(Warp& w, const Ins& i, uint32_t m) {
  const uint64_t* a = reg<uint64_t>(w, i.o[i.num - 1]);
  int n = i.x[1];
  lanes(m, [&](int l) {
    uint64_t p = a[l] + uint64_t(int64_t(i.x[0]));
    read_global(w, l, p, uint32_t(sizeof(T)) * uint32_t(n));
  });
  uint64_t address[32]; memcpy(address, a, sizeof address);
  lanes(m, [&](int l) {
    for (int k = 0; k < n; ++k) reg<D>(w, i.o[k])[l] = put<D>(reinterpret_cast<const T*>(address[l] + uint64_t(int64_t(i.x[0])))[k]);
  });
  return next;
}
template <typename T, typename D>
Step load_param(Warp& w, const Ins& i, uint32_t m) {
  const uint64_t* a = reg<uint64_t>(w, i.o[i.num - 1]);
  lanes(m, [&](int l) {
    uint64_t p = a[l] + uint64_t(int64_t(i.x[0]));
    uint64_t base = reinterpret_cast<uint64_t>(M->params);
    if (p < base || p + sizeof(T) * uint64_t(i.x[1]) > base + uint64_t(M->param_bytes)) fail("reads a parameter at %lld", (long long)(p - base));
    for (int k = 0; k < i.x[1]; ++k) reg<D>(w, i.o[k])[l] = put<D>(reinterpret_cast<const T*>(p)[k]);
  });
  return next;
}
template <typename T, typename D>
Step load_shared(Warp& w, const Ins& i, uint32_t m) {
  const uint32_t* a = reg<uint32_t>(w, i.o[i.num - 1]);
  int n = i.x[1];
  uint32_t address[32];
  lanes(m, [&](int l) {
    address[l] = a[l] + uint32_t(i.x[0]);
    shared_at(address[l], uint32_t(sizeof(T)) * uint32_t(n));
    read_shared(w, l, address[l], uint32_t(sizeof(T)) * uint32_t(n));
  });
  lanes(m, [&](int l) {
    const T* p = reinterpret_cast<const T*>(&M->memory[address[l] - kBase]);
    for (int k = 0; k < n; ++k) reg<D>(w, i.o[k])[l] = put<D>(p[k]);
  });
  return next;
}
// Operands: the address, then registers.
template <typename T, typename D>
Step store_global(Warp& w, const Ins& i, uint32_t m) {
  const uint64_t* a = reg<uint64_t>(w, i.o[0]);
  lanes(m, [&](int l) {
    T v[8];
    for (int k = 0; k < i.x[1]; ++k) v[k] = T(reg<D>(w, i.o[1 + k])[l]);
    write_global(w, l, a[l] + uint64_t(int64_t(i.x[0])), uint32_t(sizeof(T)) * uint32_t(i.x[1]), v);
  });
  return next;
}
template <typename T, typename D>
Step store_shared(Warp& w, const Ins& i, uint32_t m) {
  const uint32_t* a = reg<uint32_t>(w, i.o[0]);
  uint32_t bytes = uint32_t(sizeof(T)) * uint32_t(i.x[1]);
  lanes(m, [&](int l) {
    T v[8];
    for (int k = 0; k < i.x[1]; ++k) v[k] = T(reg<D>(w, i.o[1 + k])[l]);
    uint32_t address = a[l] + uint32_t(i.x[0]);
    uint8_t* p = shared_at(address, bytes);
    for (uint32_t b = 0; b < bytes; b += 2) {
      uint32_t c = (address - kBase + b) / 2, some = std::min(bytes, 2u);
      Cell& x = M->cells[c];
      bool same = x.writer != kNobody && !memcmp(p + b, reinterpret_cast<uint8_t*>(v) + b, some);
      // Two lanes of one warp that store other bytes to one place, in one go or without a meeting between.
      if (!same && x.writer == w.index && x.lane != l && x.meetings == w.meetings && x.time == w.time() && some == 2 && !x.pending)
        fail("race: lanes %d and %d store to shared memory %#x", x.lane, l, c * 2);
      write_cell(w, l, c, same);
      M->cells[c].dirty = true;
      w.dirty.push_back(c);
    }
    memcpy(p, v, bytes);
  });
  return next;
}
#define MEM(T, name) \
  OP("ld.global." name ">16", load_global<T, u16>) OP("ld.global." name ">32", load_global<T, u32>) OP("ld.global." name ">64", load_global<T, u64>) \
  OP("ld.param." name ">16", load_param<T, u16>) OP("ld.param." name ">32", load_param<T, u32>) OP("ld.param." name ">64", load_param<T, u64>) \
  OP("ld.shared." name ">16", load_shared<T, u16>) OP("ld.shared." name ">32", load_shared<T, u32>) OP("ld.shared." name ">64", load_shared<T, u64>) \
  OP("st.global." name ">16", store_global<T, u16>) OP("st.global." name ">32", store_global<T, u32>) OP("st.global." name ">64", store_global<T, u64>) \
  OP("st.shared." name ">16", store_shared<T, u16>) OP("st.shared." name ">32", store_shared<T, u32>) OP("st.shared." name ">64", store_shared<T, u64>)
MEM(uint8_t, "u8") MEM(int8_t, "s8") MEM(u16, "u16") MEM(s16, "s16") MEM(u32, "u32") MEM(s32, "s32") MEM(u64, "u64") MEM(s64, "s64")

// cp.async: target, source[, bytes that are read]. x: offsets, bytes.
Step cp_async(Warp& w, const Ins& i, uint32_t m) {
  const uint32_t* t = reg<uint32_t>(w, i.o[0]); const uint64_t* s = reg<uint64_t>(w, i.o[1]);
  const uint32_t* v = i.num > 2 ? reg<uint32_t>(w, i.o[2]) : nullptr;
  uint32_t bytes = uint32_t(i.x[2]);
  lanes(m, [&](int l) {
    Copy c{t[l] + uint32_t(i.x[0]), bytes, v ? v[l] : bytes, s[l] + uint64_t(int64_t(i.x[1])), l};
    if (c.valid > bytes) fail("cp.async reads %u bytes of %u", c.valid, bytes);
    if (c.valid) read_global(w, l, c.source, c.valid == bytes ? bytes : 1);
    uint8_t* p = shared_at(c.target, bytes);
    for (uint32_t k = (c.target - kBase) / 2; k < (c.target - kBase + bytes) / 2; ++k) {
      write_cell(w, l, k, false);
      M->cells[k].pending = true;
    }
    memset(p, 0xff, bytes);
    w.copies.push_back(c);
  });
  return next;
}
OP("cp.async", cp_async)
OP("cp.async.commit_group", [](Warp& w, const Ins&, uint32_t m) {
  all_lanes(w, m, "cp.async.commit_group");
  w.groups.push_back(std::move(w.copies));
  w.copies.clear();
  return next;
})
void finish_copies(Warp& w, const std::vector<Copy>& copies) {
  for (const Copy& c : copies) {
    uint8_t* p = shared_at(c.target, c.bytes);
    memcpy(p, reinterpret_cast<const void*>(c.source), c.valid);
    memset(p + c.valid, 0, c.bytes - c.valid);
    for (uint32_t k = (c.target - kBase) / 2; k < (c.target - kBase + c.bytes) / 2; ++k) {
      Cell& x = M->cells[k];
      x.pending = false, x.time = w.time(), x.meetings = w.meetings;
      if (M->flags & 1) x.dirty = true, w.dirty.push_back(k);
    }
  }
}
OP("cp.async.wait_group", [](Warp& w, const Ins& i, uint32_t m) {
  all_lanes(w, m, "cp.async.wait_group");
  while (w.groups.size() > size_t(i.x[0])) { finish_copies(w, w.groups.front()); w.groups.pop_front(); }
  return next;
})

Step ldmatrix(Warp& w, const Ins& i, uint32_t m) {  // x: offset, matrices, transposed
  all_lanes(w, m, "ldmatrix");
  int n = i.x[1];
  const uint32_t* a = reg<uint32_t>(w, i.o[i.num - 1]);
  uint16_t rows[32][8];
  for (int l = 0; l < 8 * n; ++l) {
    uint32_t address = a[l] + uint32_t(i.x[0]);
    const uint8_t* p = shared_at(address, 16);
    read_shared(w, kEveryLane, address, 16);
    memcpy(rows[l], p, 16);
  }
  for (int k = 0; k < n; ++k) {
    uint32_t* d = reg<uint32_t>(w, i.o[k]);
    for (int l = 0; l < 32; ++l) {
      uint16_t low = i.x[2] ? rows[8 * k + 2 * (l % 4)][l / 4] : rows[8 * k + l / 4][2 * (l % 4)];
      uint16_t high = i.x[2] ? rows[8 * k + 2 * (l % 4) + 1][l / 4] : rows[8 * k + l / 4][2 * (l % 4) + 1];
      d[l] = uint32_t(high) << 16 | low;
    }
  }
  return next;
}
OP("ldmatrix", ldmatrix)
Step stmatrix(Warp& w, const Ins& i, uint32_t m) {  // x: offset, matrices, transposed; the address comes first
  all_lanes(w, m, "stmatrix");
  int n = i.x[1];
  uint16_t rows[32][8];
  for (int k = 0; k < n; ++k) {
    const uint32_t* d = reg<uint32_t>(w, i.o[1 + k]);
    for (int l = 0; l < 32; ++l)
      for (int h = 0; h < 2; ++h) (i.x[2] ? rows[8 * k + 2 * (l % 4) + h][l / 4] : rows[8 * k + l / 4][2 * (l % 4) + h]) = uint16_t(d[l] >> 16 * h);
  }
  const uint32_t* a = reg<uint32_t>(w, i.o[0]);
  for (int l = 0; l < 8 * n; ++l) {
    uint32_t address = a[l] + uint32_t(i.x[0]);
    uint8_t* p = shared_at(address, 16);
    for (uint32_t b = 0; b < 16; b += 2) {
      uint32_t c = (address - kBase + b) / 2;
      write_cell(w, kEveryLane, c, M->cells[c].writer != kNobody && !memcmp(p + b, reinterpret_cast<uint8_t*>(rows[l]) + b, 2));
      M->cells[c].dirty = true;
      w.dirty.push_back(c);
    }
    memcpy(p, rows[l], 16);
  }
  return next;
}
OP("stmatrix", stmatrix)

// ---------------------------------------------------------------- control, threads

// x: where all ways from here meet again, which is where the compiler makes lanes converge.
OP("bra", [](Warp& w, const Ins& i, uint32_t m) {
  uint32_t rest = w.now.mask & ~m;
  if (!rest) { w.now.pc = i.target; return jumped; }
  w.below.push_back({i.x[0], w.now.mask, w.now.meet});
  w.below.push_back({i.target, m, i.x[0]});
  w.now = {w.now.pc + 1, rest, i.x[0]};
  return jumped;
})
OP("ret", [](Warp& w, const Ins&, uint32_t m) {
  w.live &= ~m;
  w.now.mask &= ~m;
  for (Split& s : w.below) s.mask &= ~m;
  return next;
})
OP("trap", [](Warp&, const Ins&, uint32_t) -> Step { fail("trap"); })
OP("nop", [](Warp&, const Ins&, uint32_t) { return next; })


Step shuffle(Warp& w, const Ins& i, uint32_t m) {  // d, a, b, c, members; x: 0 bfly 1 idx 2 up 3 down, whether p is there
  int k = i.x[1] ? 1 : 0;
  const uint32_t *a = reg<uint32_t>(w, i.o[1 + k]), *b = reg<uint32_t>(w, i.o[2 + k]), *c = reg<uint32_t>(w, i.o[3 + k]), *e = reg<uint32_t>(w, i.o[4 + k]);
  uint32_t r[32], p = 0;
  lanes(m, [&](int l) {
    if ((e[l] & w.live) != m) fail("shfl.sync for the lanes %#x by the lanes %#x", e[l], m);
    int lane = l, seg = int(c[l] >> 8 & 31), clamp = int(c[l] & 31), bv = int(b[l] & 31);
    int max = (lane & seg) | (clamp & ~seg), min = lane & seg, j; bool ok;
    switch (i.x[0]) {
      case 0: j = lane ^ bv, ok = j <= max; break;
      case 1: j = min | (bv & ~seg), ok = j <= max; break;
      case 2: j = lane - bv, ok = j >= max; break;
      default: j = lane + bv, ok = j <= max;
    }
    if (!ok) j = lane;
    if (!(m >> j & 1)) fail("shfl.sync: lane %d reads that of lane %d, which is not there", l, j);
    r[l] = a[j], p |= uint32_t(ok) << l;
  });
  uint32_t* d = reg<uint32_t>(w, i.o[0]);
  lanes(m, [&](int l) { d[l] = r[l]; });
  if (k) { uint32_t& q = pred(w, i.o[1]); q = (q & ~m) | (p & m); }
  return next;
}
OP("shfl", shuffle)
OP("bar.warp.sync", [](Warp& w, const Ins& i, uint32_t m) {
  uint32_t e = uniform(w, i.o[0], m, "the mask of bar.warp.sync");
  if ((e & w.live) != m) fail("bar.warp.sync for the lanes %#x by %#x", e, m);
  if (m == w.live) ++w.meetings;
  return next;
})
void wake(int warp) { M->warps[size_t(warp)].asleep = false; }
Step come(Warp& w, const Ins& i, uint32_t m, bool waits) {  // operands: barrier[, threads]
  all_lanes(w, m, "a barrier");
  uint32_t number = uniform(w, i.o[0], m, "the barrier");
  int all = int(M->warps.size()) * 32;
  int threads = i.num > 1 ? int(uniform(w, i.o[1], m, "the threads of a barrier")) : all;
  if (number > 15 || threads <= 0 || threads % 32 || threads > all) fail("barrier %u for %d threads", number, threads);
  Barrier& b = M->barriers[number];
  if (b.arrived && b.threads != threads) fail("barrier %u for %d threads, others came for %d", number, threads, b.threads);
  if (b.came >> w.index & 1) fail("comes to barrier %u again", number);
  b.came |= 1u << w.index;
  b.threads = threads;
  b.arrived += 32;
  b.clock.join(w.clock);
  ++w.time();
  ++w.meetings;
  if (waits) b.waiting.push_back(w.index);
  if (b.arrived < threads) {
    if (waits) w.asleep = true, w.what = "barrier " + std::to_string(number);
    return next;
  }
  for (int v : b.waiting) { M->warps[size_t(v)].clock.join(b.clock); wake(v); }
  b = Barrier();
  return next;
}
OP("bar.sync", [](Warp& w, const Ins& i, uint32_t m) { return come(w, i, m, true); })
OP("bar.arrive", [](Warp& w, const Ins& i, uint32_t m) { return come(w, i, m, false); })

// ---------------------------------------------------------------- mbarrier, copy engine

int find(Warp& w, uint32_t address) {
  for (size_t k = 0; k < M->mbarriers.size(); ++k) {
    MBarrier& b = M->mbarriers[k];
    if (b.address != address) continue;
    if (b.init_warp != w.index && (!b.done || w.clock.at[b.init_warp] < b.init_time)) fail("mbarrier %#x is used without fence.mbarrier_init and a barrier after its init", address);
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
    for (MBarrier& b : M->mbarriers) if (b.address == address) fail("mbarrier %#x is initialised twice", address);
    if (M->mbarriers.size() == kMaxBarriers) fail("too many mbarriers");
    MBarrier b;
    b.address = address, b.count = b.pending = int(c[l]), b.init_warp = w.index, b.init_time = w.time();
    M->mbarriers.push_back(b);
  });
  return next;
})
OP("fence.mbarrier_init", [](Warp& w, const Ins&, uint32_t) {
  for (MBarrier& b : M->mbarriers) if (b.init_warp == w.index && !b.done) b.done = true, b.init_time = w.time();
  return next;
})
OP("mbarrier.arrive", [](Warp& w, const Ins& i, uint32_t m) {  // x: offset; operands: address[, bytes]
  lanes(m, [&](int l) { arrive(w, reg<uint32_t>(w, i.o[0])[l] + uint32_t(i.x[0]), i.num > 1 ? int(reg<uint32_t>(w, i.o[1])[l]) : 0); });
  return next;
})
OP("mbarrier.try_wait.parity", [](Warp& w, const Ins& i, uint32_t m) {  // p, address, parity
  const uint32_t *a = reg<uint32_t>(w, i.o[1]), *e = reg<uint32_t>(w, i.o[2]);
  int l = __builtin_ctz(m);
  lanes(m, [&](int k) { if (a[k] != a[l] || e[k] != e[l]) fail("mbarrier.try_wait: lanes wait for others"); });
  int k = find(w, a[l] + uint32_t(i.x[0]));
  MBarrier& b = M->mbarriers[size_t(k)];
  if (e[l] > 1) fail("parity %u", e[l]);
  if ((b.phase & 1) == e[l]) {
    b.waiting.push_back(w.index);
    w.asleep = true, w.what = "mbarrier " + std::to_string(b.address) + " phase " + std::to_string(b.phase) + " lacks " + std::to_string(b.pending) + " arrivals, " + std::to_string(b.bytes) + " bytes";
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
      if (there) memcpy(p, load.map.data + y * load.map.strides[1] + load.z * load.map.strides[2] + x * 2, 2); else memset(p, 0, 2);
    }
  }
  b.bytes -= load.map.box_rows * 128;
  end_phase(load.barrier);
}
OP("cp.async.bulk.tensor.3d", [](Warp& w, const Ins& i, uint32_t m) {  // target, map, mbarrier, x, y, z
  lanes(m, [&](int l) {
    uint32_t target = reg<uint32_t>(w, i.o[0])[l];
    TensorMap map = *reinterpret_cast<const TensorMap*>(reg<uint64_t>(w, i.o[1])[l]);
    uint64_t off = reg<uint64_t>(w, i.o[1])[l] - reinterpret_cast<uint64_t>(M->params);
    if (off >= uint64_t(M->param_bytes) || off % 64) fail("a tensor map at parameter byte %lld", (long long)off);
    if (!map.box_rows) fail("a tensor map that was never made");
    int k = find(w, reg<uint32_t>(w, i.o[2])[l]);
    if (!M->mbarriers[size_t(k)].done) fail("mbarrier without fence");
    uint32_t bytes = uint32_t(map.box_rows) * 128;
    if (target % 1024 && target % 128) fail("copy to %#x", target);
    if (target < kBase || target + bytes > kBase + M->memory.size()) fail("copy past shared memory");
    for (uint32_t c = (target - kBase) / 2; c < (target - kBase + bytes) / 2; ++c) {
      if (M->cells[c].dirty) fail("the copy engine writes shared memory %#x over a store without fence.proxy.async", c * 2);
      write_cell(w, l, c, false);
      Cell& x = M->cells[c];
      x.writer = uint8_t(kMaxWarps + k), x.pending = true;
    }
    memset(&M->memory[target - kBase], 0xff, bytes);
    M->loads.push_back({map, target, k, int(reg<uint32_t>(w, i.o[3])[l]), int(reg<uint32_t>(w, i.o[4])[l]), int(reg<uint32_t>(w, i.o[5])[l])});
  });
  return next;
})
OP("fence.proxy.async", [](Warp& w, const Ins&, uint32_t m) {
  std::vector<uint32_t> rest;
  for (uint32_t c : w.dirty) {
    Cell& x = M->cells[c];
    if (x.writer != w.index || !x.dirty) continue;
    if (x.lane < 32 && !(m >> x.lane & 1)) { rest.push_back(c); continue; }
    x.dirty = false, x.fenced = w.time();
  }
  w.dirty.swap(rest);
  if (m == w.live) w.proxy_fenced = w.clock;
  return next;
})

// ---------------------------------------------------------------- matrix products

void multiply(int m, int n, int k, const float* a, const float* b, float* d) {  // d [m, n] += a [m, k] b [k, n]
  for (int i = 0; i < m; ++i)
    for (int e = 0; e < k; ++e) {
      float x = a[i * k + e];
      const float* row = b + e * n;
      float* out = d + i * n;
#pragma GCC ivdep
      for (int j = 0; j < n; ++j) out[j] += x * row[j];
    }
}
float widen(bool bf16, uint16_t x) { return bf16 ? from_bf16(x) : from_f16(x); }

template <bool bf16>
Step mma_k16(Warp& w, const Ins& i, uint32_t m) {  // d 4, a 4, b 2, c 4
  all_lanes(w, m, "mma");
  float a[16 * 16], b[16 * 8], d[16 * 8];
  for (int l = 0; l < 32; ++l) {
    int r = l / 4, c = 2 * (l % 4);
    for (int h = 0; h < 2; ++h) {
      for (int k = 0; k < 4; ++k) a[(r + 8 * (k & 1)) * 16 + c + 8 * (k >> 1) + h] = widen(bf16, uint16_t(reg<uint32_t>(w, i.o[4 + k])[l] >> 16 * h));
      for (int k = 0; k < 2; ++k) b[(c + 8 * k + h) * 8 + r] = widen(bf16, uint16_t(reg<uint32_t>(w, i.o[8 + k])[l] >> 16 * h));
    }
    for (int k = 0; k < 4; ++k) d[(r + 8 * (k >> 1)) * 8 + c + (k & 1)] = reg<float>(w, i.o[10 + k])[l];
  }
  multiply(16, 8, 16, a, b, d);
  for (int l = 0; l < 32; ++l)
    for (int k = 0; k < 4; ++k) reg<float>(w, i.o[k])[l] = d[(l / 4 + 8 * (k >> 1)) * 8 + 2 * (l % 4) + (k & 1)];
  return next;
}
OP("mma.m16n8k16.bf16", mma_k16<true>) OP("mma.m16n8k16.f16", mma_k16<false>)

Group& group_of(Warp& w) {
  if (size_t(w.index / 4 * 4 + 4) > M->warps.size()) fail("wgmma in an incomplete warpgroup");
  return M->groups[size_t(w.index / 4)];
}
// Chunks of 8 elements of an operand [rows, 16] (rows: m or n), in the order [row][2], or turned [16][rows / 8].
void chunks_of(uint64_t d, bool turned, int rows, std::vector<uint32_t>& out) {
  int layout = int(d >> 62);
  if (d >> 49 & 7) fail("wgmma descriptor with base offset");
  if (d & 0x3ff1c000c000c000ull) fail("unknown bits in the wgmma descriptor %#llx", (unsigned long long)d);
  uint32_t start = uint32_t(d & 0x3fff) << 4, leading = uint32_t(d >> 16 & 0x3fff) << 4, stride = uint32_t(d >> 32 & 0x3fff) << 4;
  uint32_t width = layout == 1 ? 128 : layout == 2 ? 64 : layout == 3 ? 32 : 16, mask = width / 16 - 1;
  if (layout == 0 && turned) std::swap(leading, stride);
  auto swizzled = [&](uint32_t a) { return a ^ ((a >> 7 & mask) << 4); };
  if (!turned) {
    for (uint32_t r = 0; r < uint32_t(rows); ++r)
      for (uint32_t c = 0; c < 2; ++c) out.push_back(swizzled(start + r / 8 * stride + r % 8 * width + (layout ? c * 16 : c * leading)));
  } else {
    uint32_t per = width / 16;
    for (uint32_t k = 0; k < 16; ++k)
      for (uint32_t c = 0; c < uint32_t(rows) / 8; ++c) out.push_back(swizzled(start + c / per * leading + c % per * 16 + k / 8 * stride + k % 8 * width));
  }
}
void compute(Product& p) {
  static thread_local float a[64 * 16], b[16 * 256];
  for (int side = 0; side < 2; ++side) {
    auto& cells = p.cells[side];
    for (size_t c = 0; c < cells.size(); ++c)
      if (memcmp(&p.bytes[side][8 * c], &M->memory[cells[c] - kBase], 16)) fail("shared memory %#x of a running wgmma was changed", cells[c] - kBase);
    if (side == 0 && p.registers) {
      for (int k = 0; k < 64 * 16; ++k) a[k] = widen(p.bf16, p.pairs[k]);
      continue;
    }
    bool turned = side ? p.b_turned : p.a_turned;
    int rows = side ? p.n : 64;
    for (int r = 0; r < rows; ++r)
      for (int k = 0; k < 16; ++k) {
        uint16_t x = turned ? p.bytes[side][size_t(k * rows + r)] : p.bytes[side][size_t(r * 16 + k)];
        (side ? b[k * p.n + r] : a[r * 16 + k]) = widen(p.bf16, x);
      }
  }
  Accumulator& x = *p.accumulator;
  if (!p.accumulate) std::fill(x.values.begin(), x.values.end(), 0.0f);
  multiply(64, p.n, 16, a, b, x.values.data());
  for (int side = 0; side < 2; ++side) { p.cells[side].clear(); p.bytes[side].clear(); }
  p.computed = true;
}
void check_seen(const Product& p, int first_warp) {
  for (auto& cells : p.cells)
    for (uint32_t address : cells)
      for (uint32_t c = (address - kBase) / 2; c < (address - kBase) / 2 + 8; ++c) {
        const Cell& x = M->cells[c];
        if (x.writer == kNobody) fail("wgmma reads shared memory that nobody wrote: %#x", c * 2);
        if (x.pending) fail("wgmma reads shared memory %#x that a copy of %s is under way to", c * 2, name_of(x.writer).c_str());
        bool ok = p.seen.at[x.writer] >= x.time;
        if (!ok) {
          auto a = M->also.find(c);
          if (a != M->also.end()) for (const Also& s : a->second) ok |= p.seen.at[s.writer] >= s.time;
        }
        if (!ok) fail("race: wgmma reads shared memory %#x, written by %s, without a barrier between", c * 2, name_of(x.writer).c_str());
        if (x.writer < kMaxWarps && (x.dirty || (x.fenced && p.seen.at[x.writer] < x.fenced)) && ((M->flags & 16) || p.fenced.at[x.writer] < x.time)) fail("wgmma reads shared memory %#x, stored by %s lane %d without fence.proxy.async before the barrier", c * 2, name_of(x.writer).c_str(), x.lane);
        for (int v = 0; v < 4; ++v) M->reads[size_t(c) * kMaxWarps + size_t(first_warp + v)] = std::max(M->reads[size_t(c) * kMaxWarps + size_t(first_warp + v)], p.times[v]);
      }
}
void land(Warp& w, const Ins& i, int first, int n, Accumulator& x, bool out) {
  int v = w.index % 4;
  for (int j = 0; j < n / 2; ++j) {
    float* r = reg<float>(w, i.o[first + j]);
    for (int l = 0; l < 32; ++l) {
      float& e = x.values[size_t((16 * v + l / 4 + 8 * (j >> 1 & 1)) * n + 8 * (j >> 2) + 2 * (l % 4) + (j & 1))];
      if (out) r[l] = e; else e = r[l];
    }
  }
}
// Operands: n / 2 accumulators, then a (descriptor or 4 registers), b, the predicate. x: n, bf16 | registers << 1 | a turned << 2 | b turned << 3
Step wgmma(Warp& w, const Ins& i, uint32_t m) {
  all_lanes(w, m, "wgmma");
  Group& g = group_of(w);
  int n = i.x[0];
  bool registers = i.x[1] & 2;
  int at = n / 2;
  uint64_t a = 0, b;
  auto descriptor = [&](int o) {
    const uint64_t* r = reg<uint64_t>(w, i.o[o]);
    for (int l = 1; l < 32; ++l) if (r[l] != r[0]) fail("a wgmma descriptor differs between lanes");
    return r[0];
  };
  int a_at = at;
  if (registers) at += 4; else a = descriptor(at++);
  b = descriptor(at++);
  uint32_t p_mask = pred(w, i.o[at]);
  if (p_mask && p_mask != kAll) fail("scale-d of wgmma differs between lanes");
  int number = w.products++;
  if (size_t(number) == g.products.size()) {
    auto p = std::make_shared<Product>();
    p->bf16 = i.x[1] & 1, p->registers = registers, p->accumulate = p_mask != 0, p->a_turned = i.x[1] >> 2 & 1, p->b_turned = i.x[1] >> 3 & 1;
    p->n = n, p->a = a, p->b = b;
    if (!registers) chunks_of(a, p->a_turned, 64, p->cells[0]);
    chunks_of(b, p->b_turned, n, p->cells[1]);
    for (int side = 0; side < 2; ++side)
      for (uint32_t address : p->cells[side]) {
        const uint8_t* s = shared_at(address, 16);
        p->bytes[side].resize(p->bytes[side].size() + 8);
        memcpy(&p->bytes[side][p->bytes[side].size() - 8], s, 16);
      }
    auto existing = w.accumulators.find(i.o[0]);
    if (existing != w.accumulators.end()) p->accumulator = existing->second;
    else {
      p->accumulator = std::make_shared<Accumulator>();
      p->accumulator->n = n;
      p->accumulator->values.resize(size_t(64 * n));
    }
    g.products.push_back(p);
  }
  Product& p = *g.products[size_t(number)];
  if (p.n != n || p.a != a || p.b != b || p.registers != registers || p.accumulate != (p_mask != 0)) fail("starts another wgmma than the other warps of its warpgroup");
  auto& mine = w.accumulators[i.o[0]];
  bool fresh = !mine;
  if (mine && mine != p.accumulator) fail("the accumulator of a wgmma is that of another under way");
  auto need_fence = [&](int o) {
    if (!(M->flags & 4) && w.written[size_t(i.o[o] >> 6)] > w.fenced) fail("wgmma: register operand %d was written after the last wgmma.fence", o);
  };
  if (fresh) {
    mine = p.accumulator;
    for (int j = 0; j < n / 2; ++j) {
      need_fence(j);
      uint8_t& f = w.flight[size_t(i.o[j] >> 6)];
      if (f) fail("register of a wgmma's accumulator is in use by another under way");
      f = 1, ++w.in_flight;
    }
    land(w, i, 0, n, *mine, false);
    for (int j = 0; j < n / 2; ++j) memset(reg<uint8_t>(w, i.o[j]), 0xff, 128);
  }
  if (registers) {
    for (int k = 0; k < 4; ++k) {
      need_fence(a_at + k);
      uint8_t& f = w.flight[size_t(i.o[a_at + k] >> 6)];
      if (f == 1) fail("operand a of a wgmma is the accumulator of one under way");
      if (!f) f = 2, ++w.in_flight;
      const uint32_t* r = reg<uint32_t>(w, i.o[a_at + k]);
      for (int l = 0; l < 32; ++l)
        for (int h = 0; h < 2; ++h) p.pairs[(16 * (w.index % 4) + l / 4 + 8 * (k & 1)) * 16 + 2 * (l % 4) + 8 * (k >> 1) + h] = uint16_t(r[l] >> 16 * h);
    }
  }
  if (p.came) p.seen.meet(w.clock), p.fenced.meet(w.proxy_fenced); else p.seen = w.clock, p.fenced = w.proxy_fenced;
  p.times[w.index % 4] = w.time();
  p.came |= 1u << w.index % 4;
  if (p.came == 15) check_seen(p, w.index / 4 * 4);
  ++mine->products;  // counted by warp
  return next;
}
OP("wgmma", wgmma)
OP("wgmma.fence", [](Warp& w, const Ins&, uint32_t m) { all_lanes(w, m, "wgmma.fence"); w.fenced = w.count; return next; })
OP("wgmma.commit_group", [](Warp& w, const Ins&, uint32_t m) {
  all_lanes(w, m, "wgmma.commit_group");
  Group& g = group_of(w);
  int number = w.product_groups++;
  if (size_t(number) == g.ends.size()) g.ends.push_back(w.products);
  if (g.ends[size_t(number)] != w.products) fail("commits other wgmmas than the other warps");
  return next;
})
OP("wgmma.wait_group", [](Warp& w, const Ins& i, uint32_t m) {
  all_lanes(w, m, "wgmma.wait_group");
  Group& g = group_of(w);
  if (w.product_groups && g.ends[size_t(w.product_groups) - 1] != w.products) fail("wgmma.wait_group with a wgmma that was not committed");
  int groups = w.product_groups - i.x[0];
  int until = groups > 0 ? g.ends[size_t(groups) - 1] : 0;
  for (int k = w.waited; k < until; ++k)
    if (g.products[size_t(k)]->came != 15) {
      // The others of the warpgroup haven't started it: asks again later.
      for (size_t v = size_t(w.index / 4 * 4); v < size_t(w.index / 4 * 4 + 4); ++v) if (M->warps[v].live) goto later;
      fail("wgmma that not all warps of the warpgroup start");
    later:
      return again;
    }
  for (; w.waited < until; ++w.waited) {
    Product& p = *g.products[size_t(w.waited)];
    if (!p.computed) {
      for (int k = 0; k < w.waited; ++k) if (!g.products[size_t(k)]->computed) fail("order");
      check_seen(p, w.index / 4 * 4);
      compute(p);
    }
  }
  // Accumulators whose products have all ended.
  for (auto a = w.accumulators.begin(); a != w.accumulators.end();) {
    bool under_way = false;
    for (int k = w.waited; k < w.products; ++k) under_way |= g.products[size_t(k)]->accumulator == a->second;
    if (under_way) { ++a; continue; }
    const Ins* ins = nullptr;
    for (const Ins& c : M->program->code) if (c.run == wgmma && c.o[0] == a->first && c.x[0] == a->second->n) { ins = &c; break; }
    land(w, *ins, 0, a->second->n, *a->second, true);
    for (int j = 0; j < a->second->n / 2; ++j) w.flight[size_t(ins->o[j] >> 6)] = 0, --w.in_flight, w.written[size_t(ins->o[j] >> 6)] = w.fenced;
    a = w.accumulators.erase(a);
  }
  if (w.waited == w.products && w.in_flight) {
    std::fill(w.flight.begin(), w.flight.end(), 0);
    w.in_flight = 0;
  }
  w.fenced = std::min(w.fenced, w.count);
  return next;
})

// ---------------------------------------------------------------- running

void run_warp(Warp& w, int budget) {
  const Program& program = *M->program;
  while (budget-- > 0 && w.live && !w.asleep) {
    if (w.now.pc == w.now.meet || !w.now.mask) {
      w.now = w.below.back();
      w.below.pop_back();
      continue;
    }
    const Ins& i = program.code[size_t(w.now.pc)];
    uint32_t m = w.now.mask;
    if (i.guard >= 0) m &= i.negated ? ~pred(w, i.guard) : pred(w, i.guard);
    ++M->executed;
    if (!m) {  // not written, and not to be: what a reduction's other lanes have
      for (int k = 0; k < i.dst; ++k) w.written[size_t(i.o[k] >> 6)] |= 1;
      ++w.now.pc;
      continue;
    }
    {
      if (i.guard >= 0 && !w.written[size_t(i.guard >> 6)]) fail("a predicate that was never written");
      for (int k = i.dst; k < i.num; ++k)
        if (!w.written[size_t(i.o[k] >> 6)]) fail("operand %d is a register that was never written", k);
    }
    if (w.in_flight && i.run != wgmma) {
      for (int k = 0; k < i.num; ++k) {
        uint8_t f = w.flight[size_t(i.o[k] >> 6)];
        if (f == 1 || (f == 2 && k < i.dst)) fail("operand %d is a register that a running wgmma has", k);
      }
    }
    ++w.count;
    M->hits[w.now.pc] = 1;
    Step s = i.run(w, i, m);
    if (s == again) { if (!w.asleep) return; continue; }
    for (int k = 0; k < i.dst; ++k) w.written[size_t(i.o[k] >> 6)] = i.run == wgmma ? std::min(w.fenced, w.count) : w.count;
    if (s == next) ++w.now.pc;
  }
}

std::string run_block(const uint32_t* index, int threads, int shared) {
  const Program& p = *M->program;
  int n = threads / 32;
  M->memory.assign(size_t(shared), 0xff);
  M->cells.assign(size_t(shared + 1) / 2, Cell());
  M->reads.assign(M->cells.size() * kMaxWarps, 0);
  M->also.clear();
  for (Barrier& b : M->barriers) b = Barrier();
  M->mbarriers.clear();
  M->loads.clear();
  M->groups.assign(size_t(n + 3) / 4, Group());
  M->warps.assign(size_t(n), Warp());
  std::vector<uint8_t> files(size_t(n) * size_t(p.file_bytes + 64));
  for (int v = 0; v < n; ++v) {
    Warp& w = M->warps[size_t(v)];
    w.index = v;
    w.now = {0, kAll, -1};
    w.file = reinterpret_cast<uint8_t*>((reinterpret_cast<uint64_t>(files.data()) + 63) / 64 * 64) + size_t(v) * size_t(p.file_bytes);
    memset(w.file, 0xff, size_t(p.constants_at));
    memcpy(w.file + p.constants_at, p.constants.data(), p.constants.size());
    w.written.assign(size_t(p.file_bytes >> 6), 0);
    w.flight.assign(size_t(p.file_bytes >> 6), 0);
    std::fill(w.written.begin() + (p.constants_at >> 6), w.written.end(), 1);
    w.time() = 1;
    for (int l = 0; l < 32; ++l) {
      uint32_t thread = uint32_t(v * 32 + l);
      uint32_t values[14] = {thread, 0, 0, uint32_t(threads), 1, 1, index[0], index[1], index[2], index[3], index[4], index[5], uint32_t(l), uint32_t(v)};
      for (int s = 0; s < 14; ++s) if (p.special[s] >= 0) reg<uint32_t>(w, p.special[s])[l] = values[s], w.written[size_t(p.special[s] >> 6)] = 1;
      if (p.special[14] >= 0) reg<uint64_t>(w, p.special[14])[l] = reinterpret_cast<uint64_t>(M->params), w.written[size_t(p.special[14] >> 6)] = 1, w.written[size_t(p.special[14] >> 6) + 1] = 1;
      if (p.special[15] >= 0) reg<uint32_t>(w, p.special[15])[l] = kBase, w.written[size_t(p.special[15] >> 6)] = 1;
    }
  }
  Warp* running = nullptr;
  int idle = 0;
  try {
    for (;;) {
      std::vector<Warp*> ready;
      bool live = false;
      for (Warp& w : M->warps) { live |= w.live != 0; if (w.live && !w.asleep) ready.push_back(&w); }
      if (!live) break;
      if (!M->loads.empty() && (ready.empty() || random_number() % 8 == 0)) { end_load(random_number() % M->loads.size()); continue; }
      if (ready.empty()) {
        std::string text = "hangs:";
        for (Warp& w : M->warps) if (w.live) text += "\n  warp " + std::to_string(w.index) + " at @" + std::to_string(w.now.pc) + " waits for " + w.what;
        return text;
      }
      running = ready[random_number() % ready.size()];
      uint64_t before = M->executed;
      run_warp(*running, 1 + int(random_number() % 4000));
      idle = M->executed - before <= 1 ? idle + 1 : 0;
      if (idle > 100000) return "hangs: nobody makes progress";
    }
    for (Warp& w : M->warps) {
      running = &w;
      if (w.waited < w.products) fail("ends with wgmma that it has not waited for");
      for (auto& g : w.groups) if (!g.empty()) fail("ends with a cp.async that it has not waited for");
      if (!w.copies.empty()) fail("ends with a cp.async that was not committed");
    }
    if (!M->loads.empty()) return "ends with copies under way";
  } catch (const std::exception& e) {
    char where[100];
    snprintf(where, sizeof where, "block %d warp %d @%d: ", M->block, running ? running->index : -1, running ? running->now.pc : -1);
    return where + std::string(e.what());
  }
  return "";
}

}  // namespace

extern "C" {

int ptx_handler(const char* name) { return handlers().count(name) != 0; }

// code: of each instruction its handler (in names), first operand, operands, those written, guard, whether that is
// negated, target, x[4].
Program* ptx_program(const char* const* names, const int32_t* code, int count, const int32_t* operands, int num_operands, int file_bytes, const uint8_t* constants, int constants_at, const int32_t* special) {
  Program* p = new Program;
  p->operands.assign(operands, operands + num_operands);
  p->file_bytes = file_bytes;
  p->constants.assign(constants, constants + (file_bytes - constants_at));
  p->constants_at = constants_at;
  memcpy(p->special, special, sizeof p->special);
  for (int k = 0; k < count; ++k, code += 11) {
    Ins i{};
    i.run = handlers().at(names[code[0]]);
    i.o = p->operands.data() + code[1];
    i.num = code[2], i.dst = code[3], i.guard = code[4], i.negated = code[5], i.target = code[6];
    memcpy(i.x, code + 7, sizeof i.x);
    p->code.push_back(i);
  }
  return p;
}
void ptx_free(Program* p) { delete p; }

// Runs a grid; returns what went wrong, or "".
const char* ptx_run(const Program* program, const int32_t* grid, int threads, int shared, const uint8_t* params, int param_bytes, const uint64_t* ranges, int num_ranges, uint32_t seed, int flags, uint64_t* executed, uint8_t* hits) {
  static std::string error;
  Machine machine;
  M = &machine;
  machine.program = program;
  machine.params = params, machine.param_bytes = param_bytes;
  machine.seed = seed, machine.flags = flags, machine.hits = hits;
  for (int k = 0; k < num_ranges; ++k) machine.ranges.push_back({ranges[2 * k], ranges[2 * k + 1]});
  std::sort(machine.ranges.begin(), machine.ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (const Range& r : machine.ranges) {
    if (!machine.regions.empty() && r.begin < machine.regions.back().end) machine.regions.back().end = std::max(machine.regions.back().end, r.end);
    else machine.regions.push_back({r.begin, r.end, {}});
  }
  error = "";
  machine.block = 0;
  for (int z = 0; z < grid[2] && error.empty(); ++z)
    for (int y = 0; y < grid[1] && error.empty(); ++y)
      for (int x = 0; x < grid[0] && error.empty(); ++x, ++machine.block) {
        uint32_t index[6] = {uint32_t(x), uint32_t(y), uint32_t(z), uint32_t(grid[0]), uint32_t(grid[1]), uint32_t(grid[2])};
        error = run_block(index, threads, shared);
      }
  *executed = machine.executed;
  M = nullptr;
  return error.c_str();
}
}
