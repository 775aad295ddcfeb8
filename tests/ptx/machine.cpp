// Runs PTX: a block's warps one after the other, 32 lanes at a time.
//
// What the hardware does by itself (cp.async, wgmma, the copy engine) is done as late as the program allows; until
// then its targets hold NaN. Every warp has a vector clock, joined by barriers. Each 2 bytes of shared memory
// remember their last writer and readers: an access that no barrier puts after those it conflicts with is an
// error, whatever the order the warps ran in. Global memory is checked for its bounds, for the same races in a
// block, and between blocks.
#include "copies.h"
#include "memory.h"
#include "products.h"
#include "scalars.h"
#include "threads.h"

namespace {

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
    Step s = i.run(w, i, m);
    if (s == again) {
      if (!w.asleep) return;
      continue;
    }
    for (int k = 0; k < i.dst; ++k)
      w.written[size_t(i.o[k] >> 6)] = i.run == wgmma ? std::min(w.fenced, w.count) : w.count;
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
    w.file = reinterpret_cast<uint8_t*>((reinterpret_cast<uint64_t>(files.data()) + 63) / 64 * 64) +
             size_t(v) * size_t(p.file_bytes);
    memset(w.file, 0xff, size_t(p.constants_at));
    memcpy(w.file + p.constants_at, p.constants.data(), p.constants.size());
    w.written.assign(size_t(p.file_bytes >> 6), 0);
    w.flight.assign(size_t(p.file_bytes >> 6), 0);
    std::fill(w.written.begin() + (p.constants_at >> 6), w.written.end(), 1);
    w.time() = 1;
    for (int l = 0; l < 32; ++l) {
      uint32_t thread = uint32_t(v * 32 + l);
      uint32_t values[14] = {thread,   0,        0,        uint32_t(threads), 1,        1,           index[0],
                             index[1], index[2], index[3], index[4],          index[5], uint32_t(l), uint32_t(v)};
      for (int s = 0; s < 14; ++s)
        if (p.special[s] >= 0)
          reg<uint32_t>(w, p.special[s])[l] = values[s], w.written[size_t(p.special[s] >> 6)] = 1;
      if (p.special[14] >= 0)
        reg<uint64_t>(w, p.special[14])[l] = reinterpret_cast<uint64_t>(M->params),
                         w.written[size_t(p.special[14] >> 6)] = 1, w.written[size_t(p.special[14] >> 6) + 1] = 1;
      if (p.special[15] >= 0)
        reg<uint32_t>(w, p.special[15])[l] = kBase, w.written[size_t(p.special[15] >> 6)] = 1;
    }
  }
  Warp* running = nullptr;
  int idle = 0;
  try {
    for (;;) {
      std::vector<Warp*> ready;
      bool live = false;
      for (Warp& w : M->warps) {
        live |= w.live != 0;
        if (w.live && !w.asleep) ready.push_back(&w);
      }
      if (!live) break;
      if (!M->loads.empty() && (ready.empty() || random_number() % 8 == 0)) {
        end_load(random_number() % M->loads.size());
        continue;
      }
      if (ready.empty()) {
        std::string text = "hangs:";
        for (Warp& w : M->warps)
          if (w.live)
            text += "\n  warp " + std::to_string(w.index) + " at @" + std::to_string(w.now.pc) + " waits for " +
                    w.what;
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
      for (auto& g : w.groups)
        if (!g.empty()) fail("ends with a cp.async that it has not waited for");
      if (!w.copies.empty()) fail("ends with a cp.async that was not committed");
    }
    if (!M->loads.empty()) return "ends with copies under way";
  } catch (const std::exception& e) {
    char where[100];
    snprintf(where, sizeof where, "block %d warp %d @%d: ", M->block, running ? running->index : -1,
             running ? running->now.pc : -1);
    return where + std::string(e.what());
  }
  return "";
}

}  // namespace

extern "C" {

int ptx_handler(const char* name) { return handlers().count(name) != 0; }

// code: of each instruction its handler (in names), first operand, operands, those written, guard, whether that is
// negated, target, x[4].
Program* ptx_program(const char* const* names, const int32_t* code, int count, const int32_t* operands,
                     int num_operands, int file_bytes, const uint8_t* constants, int constants_at,
                     const int32_t* special) {
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
const char* ptx_run(const Program* program, const int32_t* grid, int threads, int shared, const uint8_t* params,
                    int param_bytes, const uint64_t* ranges, int num_ranges, uint32_t seed, int flags) {
  static std::string error;
  Machine machine;
  M = &machine;
  machine.program = program;
  machine.params = params, machine.param_bytes = param_bytes;
  machine.seed = seed, machine.flags = flags;
  for (int k = 0; k < num_ranges; ++k) machine.ranges.push_back({ranges[2 * k], ranges[2 * k + 1]});
  std::sort(machine.ranges.begin(), machine.ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (const Range& r : machine.ranges) {
    if (!machine.regions.empty() && r.begin < machine.regions.back().end)
      machine.regions.back().end = std::max(machine.regions.back().end, r.end);
    else
      machine.regions.push_back({r.begin, r.end, {}});
  }
  error = "";
  machine.block = 0;
  for (int z = 0; z < grid[2] && error.empty(); ++z)
    for (int y = 0; y < grid[1] && error.empty(); ++y)
      for (int x = 0; x < grid[0] && error.empty(); ++x, ++machine.block) {
        uint32_t index[6] = {uint32_t(x),       uint32_t(y),       uint32_t(z),
                             uint32_t(grid[0]), uint32_t(grid[1]), uint32_t(grid[2])};
        error = run_block(index, threads, shared);
      }
  M = nullptr;
  return error.c_str();
}
}
