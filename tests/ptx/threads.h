// Branches, shuffles and barriers.
#pragma once

#include "state.h"

namespace {

// x: where all ways from here meet again, which is where the compiler makes lanes converge.
OP("bra", [](Warp& w, const Ins& i, uint32_t m) {
  uint32_t rest = w.now.mask & ~m;
  if (!rest) {
    w.now.pc = i.target;
    return jumped;
  }
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

Step shuffle(Warp& w, const Ins& i,
             uint32_t m) {  // d, a, b, c, members; x: 0 bfly 1 idx 2 up 3 down, whether p is there
  int k = i.x[1] ? 1 : 0;
  const uint32_t *a = reg<uint32_t>(w, i.o[1 + k]), *b = reg<uint32_t>(w, i.o[2 + k]),
                 *c = reg<uint32_t>(w, i.o[3 + k]), *e = reg<uint32_t>(w, i.o[4 + k]);
  uint32_t r[32], p = 0;
  lanes(m, [&](int l) {
    if ((e[l] & w.live) != m) fail("shfl.sync for the lanes %#x by the lanes %#x", e[l], m);
    int lane = l, seg = int(c[l] >> 8 & 31), clamp = int(c[l] & 31), bv = int(b[l] & 31);
    int max = (lane & seg) | (clamp & ~seg), min = lane & seg, j;
    bool ok;
    switch (i.x[0]) {
      case 0:
        j = lane ^ bv, ok = j <= max;
        break;
      case 1:
        j = min | (bv & ~seg), ok = j <= max;
        break;
      case 2:
        j = lane - bv, ok = j >= max;
        break;
      default:
        j = lane + bv, ok = j <= max;
    }
    if (!ok) j = lane;
    if (!(m >> j & 1)) fail("shfl.sync: lane %d reads that of lane %d, which is not there", l, j);
    r[l] = a[j], p |= uint32_t(ok) << l;
  });
  uint32_t* d = reg<uint32_t>(w, i.o[0]);
  lanes(m, [&](int l) { d[l] = r[l]; });
  if (k) {
    uint32_t& q = pred(w, i.o[1]);
    q = (q & ~m) | (p & m);
  }
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
  if (number > 15 || threads <= 0 || threads % 32 || threads > all)
    fail("barrier %u for %d threads", number, threads);
  Barrier& b = M->barriers[number];
  if (b.arrived && b.threads != threads)
    fail("barrier %u for %d threads, others came for %d", number, threads, b.threads);
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
  for (int v : b.waiting) {
    M->warps[size_t(v)].clock.join(b.clock);
    wake(v);
  }
  b = Barrier();
  return next;
}
OP("bar.sync", [](Warp& w, const Ins& i, uint32_t m) { return come(w, i, m, true); })
OP("bar.arrive", [](Warp& w, const Ins& i, uint32_t m) { return come(w, i, m, false); })

}  // namespace
