// ldmatrix, stmatrix, mma.sync and wgmma.
#pragma once

#include "memory.h"
#include "scalars.h"

namespace {

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
      for (int k = 0; k < 4; ++k)
        a[(r + 8 * (k & 1)) * 16 + c + 8 * (k >> 1) + h] =
            widen(bf16, uint16_t(reg<uint32_t>(w, i.o[4 + k])[l] >> 16 * h));
      for (int k = 0; k < 2; ++k)
        b[(c + 8 * k + h) * 8 + r] = widen(bf16, uint16_t(reg<uint32_t>(w, i.o[8 + k])[l] >> 16 * h));
    }
    for (int k = 0; k < 4; ++k) d[(r + 8 * (k >> 1)) * 8 + c + (k & 1)] = reg<float>(w, i.o[10 + k])[l];
  }
  multiply(16, 8, 16, a, b, d);
  for (int l = 0; l < 32; ++l)
    for (int k = 0; k < 4; ++k) reg<float>(w, i.o[k])[l] = d[(l / 4 + 8 * (k >> 1)) * 8 + 2 * (l % 4) + (k & 1)];
  return next;
}
OP("mma.m16n8k16.bf16", mma_k16<true>)
OP("mma.m16n8k16.f16", mma_k16<false>)

Group& group_of(Warp& w) {
  if (size_t(w.index / 4 * 4 + 4) > M->warps.size()) fail("wgmma in an incomplete warpgroup");
  return M->groups[size_t(w.index / 4)];
}
// Chunks of 8 elements of an operand [rows, 16] (rows: m or n), in the order [row][2], or turned [16][rows / 8].
void chunks_of(uint64_t d, bool turned, int rows, std::vector<uint32_t>& out) {
  int layout = int(d >> 62);
  if (d >> 49 & 7) fail("wgmma descriptor with base offset");
  if (d & 0x3ff1c000c000c000ull) fail("unknown bits in the wgmma descriptor %#llx", (unsigned long long)d);
  uint32_t start = uint32_t(d & 0x3fff) << 4, leading = uint32_t(d >> 16 & 0x3fff) << 4,
           stride = uint32_t(d >> 32 & 0x3fff) << 4;
  uint32_t width = layout == 1 ? 128 : layout == 2 ? 64 : layout == 3 ? 32 : 16, mask = width / 16 - 1;
  if (layout == 0 && turned) std::swap(leading, stride);
  auto swizzled = [&](uint32_t a) { return a ^ ((a >> 7 & mask) << 4); };
  if (!turned) {
    for (uint32_t r = 0; r < uint32_t(rows); ++r)
      for (uint32_t c = 0; c < 2; ++c)
        out.push_back(swizzled(start + r / 8 * stride + r % 8 * width + (layout ? c * 16 : c * leading)));
  } else {
    uint32_t per = width / 16;
    for (uint32_t k = 0; k < 16; ++k)
      for (uint32_t c = 0; c < uint32_t(rows) / 8; ++c)
        out.push_back(swizzled(start + c / per * leading + c % per * 16 + k / 8 * stride + k % 8 * width));
  }
}
void compute(Product& p) {
  static thread_local float a[64 * 16], b[16 * 256];
  for (int side = 0; side < 2; ++side) {
    auto& cells = p.cells[side];
    for (size_t c = 0; c < cells.size(); ++c)
      if (memcmp(&p.bytes[side][8 * c], &M->memory[cells[c] - kBase], 16))
        fail("shared memory %#x of a running wgmma was changed", cells[c] - kBase);
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
  for (int side = 0; side < 2; ++side) {
    p.cells[side].clear();
    p.bytes[side].clear();
  }
  p.computed = true;
}
void check_seen(const Product& p, int first_warp) {
  for (auto& cells : p.cells)
    for (uint32_t address : cells)
      for (uint32_t c = (address - kBase) / 2; c < (address - kBase) / 2 + 8; ++c) {
        const Cell& x = M->cells[c];
        if (x.writer == kNobody) fail("wgmma reads shared memory that nobody wrote: %#x", c * 2);
        if (x.pending)
          fail("wgmma reads shared memory %#x that a copy of %s is under way to", c * 2,
               name_of(x.writer).c_str());
        bool ok = p.seen.at[x.writer] >= x.time;
        if (!ok) {
          auto a = M->also.find(c);
          if (a != M->also.end())
            for (const Also& s : a->second) ok |= p.seen.at[s.writer] >= s.time;
        }
        if (!ok)
          fail("race: wgmma reads shared memory %#x, written by %s, without a barrier between", c * 2,
               name_of(x.writer).c_str());
        if (x.writer < kMaxWarps && (x.dirty || (x.fenced && p.seen.at[x.writer] < x.fenced)) &&
            ((M->flags & kFenceOfWriter) || p.fenced.at[x.writer] < x.time))
          fail("wgmma reads shared memory %#x, stored by %s lane %d without fence.proxy.async before the barrier",
               c * 2, name_of(x.writer).c_str(), x.lane);
        for (int v = 0; v < 4; ++v)
          M->reads[size_t(c) * kMaxWarps + size_t(first_warp + v)] =
              std::max(M->reads[size_t(c) * kMaxWarps + size_t(first_warp + v)], p.times[v]);
      }
}
void land(Warp& w, const Ins& i, int first, int n, Accumulator& x, bool out) {
  int v = w.index % 4;
  for (int j = 0; j < n / 2; ++j) {
    float* r = reg<float>(w, i.o[first + j]);
    for (int l = 0; l < 32; ++l) {
      float& e = x.values[size_t((16 * v + l / 4 + 8 * (j >> 1 & 1)) * n + 8 * (j >> 2) + 2 * (l % 4) + (j & 1))];
      if (out) r[l] = e;
      else
        e = r[l];
    }
  }
}
// Operands: n / 2 accumulators, then a (descriptor or 4 registers), b, the predicate. x: n, bf16 | registers << 1
// | a turned << 2 | b turned << 3
Step wgmma(Warp& w, const Ins& i, uint32_t m) {
  all_lanes(w, m, "wgmma");
  Group& g = group_of(w);
  int n = i.x[0];
  bool registers = i.x[1] & 2;
  int at = n / 2;
  uint64_t a = 0, b;
  auto descriptor = [&](int o) {
    const uint64_t* r = reg<uint64_t>(w, i.o[o]);
    for (int l = 1; l < 32; ++l)
      if (r[l] != r[0]) fail("a wgmma descriptor differs between lanes");
    return r[0];
  };
  int a_at = at;
  if (registers) at += 4;
  else
    a = descriptor(at++);
  b = descriptor(at++);
  uint32_t p_mask = pred(w, i.o[at]);
  if (p_mask && p_mask != kAll) fail("scale-d of wgmma differs between lanes");
  int number = w.products++;
  if (size_t(number) == g.products.size()) {
    auto p = std::make_shared<Product>();
    p->bf16 = i.x[1] & 1, p->registers = registers, p->accumulate = p_mask != 0, p->a_turned = i.x[1] >> 2 & 1,
    p->b_turned = i.x[1] >> 3 & 1;
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
  if (p.n != n || p.a != a || p.b != b || p.registers != registers || p.accumulate != (p_mask != 0))
    fail("starts another wgmma than the other warps of its warpgroup");
  auto& mine = w.accumulators[i.o[0]];
  bool fresh = !mine;
  if (mine && mine != p.accumulator) fail("the accumulator of a wgmma is that of another under way");
  auto need_fence = [&](int o) {
    if (!(M->flags & kAnyRegisters) && w.written[size_t(i.o[o] >> 6)] > w.fenced)
      fail("wgmma: register operand %d was written after the last wgmma.fence", o);
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
        for (int h = 0; h < 2; ++h)
          p.pairs[(16 * (w.index % 4) + l / 4 + 8 * (k & 1)) * 16 + 2 * (l % 4) + 8 * (k >> 1) + h] =
              uint16_t(r[l] >> 16 * h);
    }
  }
  if (p.came) p.seen.meet(w.clock), p.fenced.meet(w.proxy_fenced);
  else
    p.seen = w.clock, p.fenced = w.proxy_fenced;
  p.times[w.index % 4] = w.time();
  p.came |= 1u << w.index % 4;
  if (p.came == 15) check_seen(p, w.index / 4 * 4);
  ++mine->products;  // counted by warp
  return next;
}
OP("wgmma", wgmma)
OP("wgmma.fence", [](Warp& w, const Ins&, uint32_t m) {
  all_lanes(w, m, "wgmma.fence");
  w.fenced = w.count;
  return next;
})
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
  if (w.product_groups && g.ends[size_t(w.product_groups) - 1] != w.products)
    fail("wgmma.wait_group with a wgmma that was not committed");
  int groups = w.product_groups - i.x[0];
  int until = groups > 0 ? g.ends[size_t(groups) - 1] : 0;
  for (int k = w.waited; k < until; ++k)
    if (g.products[size_t(k)]->came != 15) {
      // The others of the warpgroup haven't started it: asks again later.
      for (size_t v = size_t(w.index / 4 * 4); v < size_t(w.index / 4 * 4 + 4); ++v)
        if (M->warps[v].live) goto later;
      fail("wgmma that not all warps of the warpgroup start");
    later:
      return again;
    }
  for (; w.waited < until; ++w.waited) {
    Product& p = *g.products[size_t(w.waited)];
    if (!p.computed) {
      for (int k = 0; k < w.waited; ++k)
        if (!g.products[size_t(k)]->computed) fail("order");
      check_seen(p, w.index / 4 * 4);
      compute(p);
    }
  }
  // Accumulators whose products have all ended.
  for (auto a = w.accumulators.begin(); a != w.accumulators.end();) {
    bool under_way = false;
    for (int k = w.waited; k < w.products; ++k) under_way |= g.products[size_t(k)]->accumulator == a->second;
    if (under_way) {
      ++a;
      continue;
    }
    const Ins* ins = nullptr;
    for (const Ins& c : M->program->code)
      if (c.run == wgmma && c.o[0] == a->first && c.x[0] == a->second->n) {
        ins = &c;
        break;
      }
    land(w, *ins, 0, a->second->n, *a->second, true);
    for (int j = 0; j < a->second->n / 2; ++j)
      w.flight[size_t(ins->o[j] >> 6)] = 0, --w.in_flight, w.written[size_t(ins->o[j] >> 6)] = w.fenced;
    a = w.accumulators.erase(a);
  }
  if (w.waited == w.products && w.in_flight) {
    std::fill(w.flight.begin(), w.flight.end(), 0);
    w.in_flight = 0;
  }
  w.fenced = std::min(w.fenced, w.count);
  return next;
})

}  // namespace
