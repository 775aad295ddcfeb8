// What a tile computes: which keys its queries see, by integers alone. Host and device run the same code.
//
// Python makes the list of tiles, longest first (bitune_kernels/backends/schedule.py). A query row is *packed*: row r
// of a segment is token r / group_size and query head r % group_size of one key/value head.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define BITUNE_BOTH __host__ __device__ inline
#else
#define BITUNE_BOTH inline
#endif

namespace bitune {

// A row of the list: its columns by name. In Python: FORWARD, where each is explained.
#define BITUNE_ITEM(column)                                                                                      \
  column(q_row) column(length) column(position) column(block) column(own_row) column(mask) column(mixed_row)    \
  column(mixed_length) column(prefix_row) column(prefix_length) column(out_row) column(stream_row)              \
  column(second_row) column(second_mask) column(second_stream_row) column(write_row) column(write_length)       \
  column(write_mixed)

struct Item {
#define COLUMN(name) int32_t name;
  BITUNE_ITEM(COLUMN)
#undef COLUMN
};

// Which keys of a run a query sees, by position. after: j > i. none: no key.
enum Mask { full, causal, anti_causal, after, none };

// Where the keys of a run stand: cached past, mixed prompt, the segment's own rows.
enum Source { prefix, mixed, own };

BITUNE_BOTH int lesser(int a, int b) { return a < b ? a : b; }
BITUNE_BOTH int greater(int a, int b) { return a > b ? a : b; }
BITUNE_BOTH int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Keys [low, high) of a run.
struct Bounds {
  int low, high;
};

// Which of `length` keys a query sees that stands `i` positions after the first of them (i may be any number).
BITUNE_BOTH Bounds visible(int i, int length, int mask, int window) {
  if (mask == none) return {0, 0};
  int low = mask == anti_causal ? i : mask == after ? i + 1 : 0;
  int high = mask == causal ? i + 1 : length;
  if (window) {
    low = greater(low, i - window + 1);
    high = lesser(high, i + window);
  }
  low = lesser(greater(low, 0), length);
  return {low, greater(lesser(high, length), low)};
}

// The tiles of a run that hold something visible to a tile of queries: [start, stop), multiples of the tile but stop.
// Those in [whole, rest) are visible to every query as a whole and need no mask.
struct Span {
  int start, whole, rest, stop;
};

// Bounds of the first and the last query. Bounds never decrease from query to query.
BITUNE_BOTH Span span(Bounds first, Bounds last, int block_n) {
  Span s;
  s.start = first.low / block_n * block_n;
  s.stop = last.high > first.low ? ceil_div(last.high, block_n) * block_n : s.start;
  s.whole = lesser(ceil_div(last.low, block_n) * block_n, s.stop);
  s.rest = greater(first.high / block_n * block_n, s.whole);
  return s;
}

// Keys that a tile of queries goes through: those of one source.
struct Run {
  int row;       // of the first key in its tensor; of the bidir stream for mixed keys
  int length;    // keys
  int position;  // of the first key
  int mask;
  Span span;
};

// The tokens of a tile of queries.
struct Tokens {
  int first, last;
};

BITUNE_BOTH Tokens tokens(const Item& item, int group_size, int block_m) {
  int last = greater(item.length - 1, 0);
  int first = item.block * block_m / group_size;
  return {lesser(first, last), lesser((item.block * block_m + block_m - 1) / group_size, last)};
}

BITUNE_BOTH Run run(const Item& item, int part, bool goes_on, int source, Tokens t, int window, int block_n) {
  Run r{};
  bool second = part == 1;
  bool absent = second && item.second_stream_row < 0;
  if (source == prefix) {
    r = {item.prefix_row, absent || (second && goes_on) ? 0 : item.prefix_length, 0, full, {}};
  } else if (source == mixed) {
    r = {item.mixed_row, second ? 0 : item.mixed_length, item.position - item.mixed_length, full, {}};
  } else {
    r = {second ? item.second_row : item.own_row, absent ? 0 : item.length, item.position,
         second ? item.second_mask : item.mask, {}};
  }
  int i = item.position - r.position;
  r.span = span(visible(i + t.first, r.length, r.mask, window), visible(i + t.last, r.length, r.mask, window), block_n);
  return r;
}

// Of num_entries pieces of work, longest first, the one that worker w of n does in its round, or -1: every second
// round goes backwards, so that nobody gets the longest of every round.
BITUNE_BOTH int entry_of(int round, int worker, int workers, int num_entries) {
  int64_t entry = int64_t(round) * workers + (round % 2 ? workers - 1 - worker : worker);
  return entry < num_entries ? int(entry) : -1;
}

// Tokens whose keys and values a tile writes: those whose first packed row it has.
BITUNE_BOTH Bounds written(const Item& item, int group_size, int block_m) {
  int start = ceil_div(item.block * block_m, group_size);
  return {start, lesser(ceil_div((item.block + 1) * block_m, group_size), item.write_length)};
}

}  // namespace bitune
