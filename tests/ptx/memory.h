// Shared and global memory: bounds, races, loads, stores and cp.async.
#pragma once

#include "state.h"

namespace {

uint8_t* shared_at(uint32_t address, uint32_t bytes) {
  if (address < kBase || address + bytes > kBase + M->memory.size())
    fail("shared memory has no %u bytes at %#x (it has %zu)", bytes, address - kBase, M->memory.size());
  if (address % bytes) fail("shared address %#x is no multiple of %u", address, bytes);
  return &M->memory[address - kBase];
}
std::string name_of(int writer) {
  char t[60];
  if (writer < kMaxWarps) snprintf(t, sizeof t, "warp %d", writer);
  else
    snprintf(t, sizeof t, "a copy to mbarrier %d", writer - kMaxWarps);
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
  if (x.pending)
    fail("lane %d reads shared memory %#x that a copy of %s is under way to", lane, c * 2,
         name_of(x.writer).c_str());
  if (seen(w, lane, x.writer, x.lane, x.time, x.meetings)) return;
  auto a = M->also.find(c);
  if (a != M->also.end())
    for (const Also& s : a->second)
      if (seen(w, lane, s.writer, s.lane, s.time, s.meetings)) return;
  fail("race: lane %d reads shared memory %#x, written by %s lane %d, without a barrier between", lane, c * 2,
       name_of(x.writer).c_str(), x.lane);
}
// same: it writes the bytes that are there already
void write_cell(Warp& w, int lane, uint32_t c, bool same) {
  Cell& x = M->cells[c];
  if (x.pending)
    fail("lane %d writes shared memory %#x that a copy of %s is under way to", lane, c * 2,
         name_of(x.writer).c_str());
  const uint32_t* r = &M->reads[size_t(c) * kMaxWarps];
  for (int v = 0; v < kMaxWarps; ++v)
    if (r[v] && v != w.index && w.clock.at[v] < r[v] && !same)
      fail("race: lane %d writes shared memory %#x, read by warp %d, without a barrier between", lane, c * 2, v);
  if (x.writer != kNobody && !(x.writer == w.index || w.clock.at[x.writer] >= x.time)) {
    if (!same)
      fail("race: lane %d writes shared memory %#x, written by %s, without a barrier between", lane, c * 2,
           name_of(x.writer).c_str());
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
  auto r = std::upper_bound(M->ranges.begin(), M->ranges.end(), p,
                            [](uint64_t v, const Range& x) { return v < x.begin; });
  // Ranges may overlap: any that holds the access.
  while (r != M->ranges.begin()) {
    --r;
    if (p + bytes <= r->end) return &*r;
    if (M->ranges.begin() == r) break;
  }
  return nullptr;
}
GlobalCell* global_cells(Warp& w, int lane, uint64_t p, uint32_t bytes, const char* doing) {
  if (!range_of(p, bytes)) {
    int64_t best = INT64_MAX;
    int at = -1;
    for (size_t k = 0; k < M->ranges.size(); ++k) {
      int64_t d = p < M->ranges[k].begin ? int64_t(M->ranges[k].begin - p) : int64_t(p + bytes - M->ranges[k].end);
      if (d < best) best = d, at = int(k);
    }
    fail(
        "lane %d %s %u bytes of global memory at %#llx outside of every tensor, %lld bytes from %s of tensor "
        "[%#llx, %#llx)",
        lane, doing, bytes, (unsigned long long)p, (long long)best,
        at >= 0 && p < M->ranges[size_t(at)].begin ? "the begin" : "the end",
        at >= 0 ? (unsigned long long)M->ranges[size_t(at)].begin : 0,
        at >= 0 ? (unsigned long long)M->ranges[size_t(at)].end : 0);
  }
  if (p % bytes)
    fail("lane %d %s global memory at %#llx, no multiple of %u", lane, doing, (unsigned long long)p, bytes);
  for (Region& g : M->regions)
    if (p >= g.begin && p + bytes <= g.end) {
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
      if (c->write_block != M->block)
        fail("lane %d reads global memory that block %d of the same launch wrote", lane, c->write_block);
      if (!seen(w, lane, c->writer, c->lane, c->time, c->meetings))
        fail("race: lane %d reads global memory written by warp %d lane %d, without a barrier between", lane,
             c->writer, c->lane);
    }
    c->read_block = M->block, c->reader = uint8_t(w.index), c->read_time = w.time();
  }
}
void write_global(Warp& w, int lane, uint64_t p, uint32_t bytes, const void* value) {
  GlobalCell* c = global_cells(w, lane, p, bytes, "writes");
  bool same = !memcmp(reinterpret_cast<void*>(p), value, bytes);
  for (uint32_t i = 0; i < (bytes + 1) / 2; ++i, ++c) {
    if (c->read_block >= 0 && c->read_block != M->block)
      fail("lane %d writes global memory that block %d of the same launch read", lane, c->read_block);
    if (c->write_block >= 0) {
      if (c->write_block != M->block)
        fail("lane %d writes global memory that block %d of the same launch wrote", lane, c->write_block);
      if (c->writer != w.index && w.clock.at[c->writer] < c->time && !same)
        fail("race: lane %d writes global memory written by warp %d, without a barrier between", lane, c->writer);
    }
    if (c->read_block == M->block && c->reader != w.index && w.clock.at[c->reader] < c->read_time && !same)
      fail("race: lane %d writes global memory read by warp %d, without a barrier between", lane, c->reader);
    c->write_block = M->block, c->writer = uint8_t(w.index), c->lane = uint8_t(lane), c->time = w.time(),
    c->meetings = w.meetings;
  }
  memcpy(reinterpret_cast<void*>(p), value, bytes);
}

template <typename D, typename A>
D put(A a) {
  if constexpr (sizeof(D) == sizeof(A)) {
    D d;
    memcpy(&d, &a, sizeof d);
    return d;
  } else
    return D(a);
}

// x: offset, number of elements. Operands: registers, then the address.
template <typename T, typename D>
Step load_global(Warp& w, const Ins& i, uint32_t m) {
  const uint64_t* a = reg<uint64_t>(w, i.o[i.num - 1]);
  int n = i.x[1];
  lanes(m, [&](int l) {
    uint64_t p = a[l] + uint64_t(int64_t(i.x[0]));
    read_global(w, l, p, uint32_t(sizeof(T)) * uint32_t(n));
  });
  uint64_t address[32];
  memcpy(address, a, sizeof address);
  lanes(m, [&](int l) {
    for (int k = 0; k < n; ++k)
      reg<D>(w, i.o[k])[l] = put<D>(reinterpret_cast<const T*>(address[l] + uint64_t(int64_t(i.x[0])))[k]);
  });
  return next;
}
template <typename T, typename D>
Step load_param(Warp& w, const Ins& i, uint32_t m) {
  const uint64_t* a = reg<uint64_t>(w, i.o[i.num - 1]);
  lanes(m, [&](int l) {
    uint64_t p = a[l] + uint64_t(int64_t(i.x[0]));
    uint64_t base = reinterpret_cast<uint64_t>(M->params);
    if (p < base || p + sizeof(T) * uint64_t(i.x[1]) > base + uint64_t(M->param_bytes))
      fail("reads a parameter at %lld", (long long)(p - base));
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
      if (!same && x.writer == w.index && x.lane != l && x.meetings == w.meetings && x.time == w.time() &&
          some == 2 && !x.pending)
        fail("race: lanes %d and %d store to shared memory %#x", x.lane, l, c * 2);
      write_cell(w, l, c, same);
      M->cells[c].dirty = true;
      w.dirty.push_back(c);
    }
    memcpy(p, v, bytes);
  });
  return next;
}
#define MEM(T, name)                                \
  OP("ld.global." name ">16", load_global<T, u16>)  \
  OP("ld.global." name ">32", load_global<T, u32>)  \
  OP("ld.global." name ">64", load_global<T, u64>)  \
  OP("ld.param." name ">16", load_param<T, u16>)    \
  OP("ld.param." name ">32", load_param<T, u32>)    \
  OP("ld.param." name ">64", load_param<T, u64>)    \
  OP("ld.shared." name ">16", load_shared<T, u16>)  \
  OP("ld.shared." name ">32", load_shared<T, u32>)  \
  OP("ld.shared." name ">64", load_shared<T, u64>)  \
  OP("st.global." name ">16", store_global<T, u16>) \
  OP("st.global." name ">32", store_global<T, u32>) \
  OP("st.global." name ">64", store_global<T, u64>) \
  OP("st.shared." name ">16", store_shared<T, u16>) \
  OP("st.shared." name ">32", store_shared<T, u32>) \
  OP("st.shared." name ">64", store_shared<T, u64>)
MEM(uint8_t, "u8")
MEM(int8_t, "s8")
MEM(u16, "u16")
MEM(s16, "s16")
MEM(u32, "u32") MEM(s32, "s32") MEM(u64, "u64") MEM(s64, "s64")

    // cp.async: target, source[, bytes that are read]. x: offsets, bytes.
    Step cp_async(Warp& w, const Ins& i, uint32_t m) {
  const uint32_t* t = reg<uint32_t>(w, i.o[0]);
  const uint64_t* s = reg<uint64_t>(w, i.o[1]);
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
      if (M->flags & kProxyOfCopies) x.dirty = true, w.dirty.push_back(k);
    }
  }
}
OP("cp.async.wait_group", [](Warp& w, const Ins& i, uint32_t m) {
  all_lanes(w, m, "cp.async.wait_group");
  while (w.groups.size() > size_t(i.x[0])) {
    finish_copies(w, w.groups.front());
    w.groups.pop_front();
  }
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
      for (int h = 0; h < 2; ++h)
        (i.x[2] ? rows[8 * k + 2 * (l % 4) + h][l / 4] : rows[8 * k + l / 4][2 * (l % 4) + h]) =
            uint16_t(d[l] >> 16 * h);
  }
  const uint32_t* a = reg<uint32_t>(w, i.o[0]);
  for (int l = 0; l < 8 * n; ++l) {
    uint32_t address = a[l] + uint32_t(i.x[0]);
    uint8_t* p = shared_at(address, 16);
    for (uint32_t b = 0; b < 16; b += 2) {
      uint32_t c = (address - kBase + b) / 2;
      write_cell(w, kEveryLane, c,
                 M->cells[c].writer != kNobody && !memcmp(p + b, reinterpret_cast<uint8_t*>(rows[l]) + b, 2));
      M->cells[c].dirty = true;
      w.dirty.push_back(c);
    }
    memcpy(p, rows[l], 16);
  }
  return next;
}
OP("stmatrix", stmatrix)

}  // namespace
