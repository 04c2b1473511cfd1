// Connected components on Apple GPUs: union-find over the runs of a bitmap, first within tiles, then between them.
//
// A mask becomes a bitmap with 32 pixels of a row in a word, bit b for column 32k + b. A run is a maximal row of
// foreground pixels *within a word*; it is known by the node of its first pixel, 1 + y * W + x, which is what its label
// would be. A tile is TILE_WORDS words wide and TILE_ROWS rows high, and a threadgroup's; the runs of a component that
// are joined within a tile are a subcomponent, known by its first run.
//
//   label_tiles           the bitmap; the subcomponents of every tile, by union-find in threadgroup memory. labels at a
//                         run's first pixel becomes the node of its subcomponent, counts at a subcomponent's the number
//                         of its pixels, and the bitmap `subcomponents` has a bit there. Then labels at subcomponents
//                         are the parents of a second union-find.
//   merge_tiles           unites subcomponents that touch across the borders of tiles
//   count_subcomponents   each subcomponent's parent becomes its root, to whose count it adds its pixels
//   write_result          labels and counts of every pixel
//
// A union points the later of two roots to the earlier one by an atomic minimum; had that one got another parent
// meanwhile, this parent is united too. A parent is always smaller than its node and in its component, whoever stores
// which of its ancestors there, and no node becomes a root again: a value read late costs a step and nothing else, and
// relaxed atomics are enough. No thread waits for another but at barriers. Roots are the first nodes of their
// components: the result is canonical.
//
// All tensors are contiguous. A plane has fewer than 2^31 pixels: within it offsets take 32 bits, the step to an image,
// which is the same for a threadgroup, is taken in 64. sizes: H, W, words of a row, connectivity.
//
// ASCII and Metal 3.1 only: PyTorch hands the source to the compiler so.

#include <metal_stdlib>
using namespace metal;

constant constexpr uint TILE_WORDS = 4;
constant constexpr uint TILE_ROWS = 64;
constant constexpr uint WRITTEN_ROWS = 4;  // that a simdgroup of write_result has

// Threadgroup memory of a tile: a cell for every other pixel, as no two runs begin in one. One cell of each row is left
// free, so that rows, which neighbouring threads work on, lie in different banks.
constant constexpr uint WORD_CELLS = 16;
constant constexpr uint ROW_CELLS = TILE_WORDS * WORD_CELLS + 1;
constant constexpr uint CELLS = TILE_ROWS * ROW_CELLS;
constant constexpr uint PARENT = 0xffffu;  // the bits of a cell with the parent; a subcomponent's pixels stand above

// The columns [from, to) of a word.
inline uint columns(uint from, uint to) {
  const uint below = to < 32u ? (1u << to) - 1u : ~0u;
  return below & ~((1u << from) - 1u);
}

// The column of the first pixel of the run that has `column` in it.
inline uint first_of_run(uint word, uint column) {
  return 32u - clz(~word & ((1u << column) - 1u));
}

// The first run of `rest`, a word whose earlier runs are cleared.
struct Run {
  uint first, end, rest;  // its columns [first, end), and the word without it

  Run(uint word) {
    const uint low = word & (0u - word);
    const uint past = word + low;  // carries through the run to the bit after it, or out of the word
    first = ctz(low);
    end = past == 0u ? 32u : ctz(past);
    rest = past & (past - 1u);
  }
};

// The first column of each run.
inline uint starts_of(uint word) {
  return word & ~(word << 1);
}

// What touches a word, and how many columns beyond a run count as touching: none with connectivity 4.
struct Around {
  uint left, right, above, above_left, above_right, reach;
};

// Where an image begins in the mask and the results, and in the bitmaps.
inline long plane_of(constant int* sizes, uint image) {
  return long(image) * long(uint(sizes[0]) * uint(sizes[1]));
}

inline long bitmap_of(constant int* sizes, uint image) {
  return long(image) * long(uint(sizes[0]) * uint(sizes[2]));
}

// Union-find over parents in device or in threadgroup memory; node 0 is at nodes.
template <typename Nodes>
inline uint parent_of(Nodes nodes, uint node) {
  return atomic_load_explicit(nodes + node, memory_order_relaxed);
}

// Makes one component of those of a and b. Climbs from whichever has the later parent, until both have the same, and
// gives each node that it leaves its parent's parent, so that the way becomes half as long.
template <typename Nodes>
inline void unite(Nodes nodes, uint a, uint b) {
  uint parent = parent_of(nodes, a), other = parent_of(nodes, b);
  while (parent != other) {
    if (parent < other) {
      const uint node = a, above = parent;
      a = b;
      parent = other;
      b = node;
      other = above;
    }
    if (parent == a) {
      parent = atomic_fetch_min_explicit(nodes + a, other, memory_order_relaxed);
      if (parent == a) {
        return;
      }
      // It had got this parent meanwhile.
      a = parent;
      parent = parent_of(nodes, a);
    } else {
      const uint next = parent_of(nodes, parent);
      if (next != parent) {
        atomic_store_explicit(nodes + a, next, memory_order_relaxed);
      }
      a = parent;
      parent = next;
    }
  }
}

// The root of a node, which becomes its parent, at once after every step, for those whose way leads through here.
template <typename Nodes>
inline uint flatten(Nodes nodes, uint node, uint bits) {
  uint root = parent_of(nodes, node) & bits;
  for (uint parent = parent_of(nodes, root) & bits; parent != root; parent = parent_of(nodes, root) & bits) {
    root = parent;
    atomic_store_explicit(nodes + node, root, memory_order_relaxed);
  }
  return root;
}

// The first columns of `here` that touch `above` straight, once for each two runs, if not in the word on the left.
inline uint meetings(uint current, uint above, uint left, uint above_left) {
  const uint overlap = current & above;
  return overlap & ~(overlap << 1 | (left & above_left) >> 31);
}

// A tile's word in threadgroup memory.
struct Slot {
  uint row, word;  // in the tile

  uint cell() const { return row * ROW_CELLS + word * WORD_CELLS; }  // of its first column
};

// The first link of each run of a word: to the run that it continues from the word on the left, else to the first that
// it touches above, else to itself. No two threads write one cell.
inline void link_runs(threadgroup atomic_uint* cells, Slot slot, uint current, Around around) {
  const uint origin = slot.cell();
  for (uint rest = current; rest != 0u;) {
    const Run run(rest);
    const uint node = origin + run.first / 2u;
    const uint touching = around.above & columns(run.first > around.reach ? run.first - around.reach : 0u,
                                                 min(run.end + around.reach, 32u));
    uint parent = node;
    if (run.first == 0u && around.left >> 31 != 0u) {
      parent = origin - WORD_CELLS + first_of_run(around.left, 31u) / 2u;
    } else if (run.first == 0u && around.above_left >> 31 != 0u) {
      parent = origin - ROW_CELLS - WORD_CELLS + first_of_run(around.above_left, 31u) / 2u;
    } else if (touching != 0u) {
      parent = origin - ROW_CELLS + first_of_run(around.above, ctz(touching)) / 2u;
    } else if (run.end == 32u && (around.above_right & 1u) != 0u) {
      parent = origin - ROW_CELLS + WORD_CELLS;
    }
    atomic_store_explicit(cells + node, parent, memory_order_relaxed);
    rest = run.rest;
  }
}

// Unites each two runs of a word and of the row above that touch, but for those that link_runs has joined: where the
// upper one ends at the corner at which the lower one begins.
inline void merge_runs(threadgroup atomic_uint* cells, Slot slot, uint current, Around around) {
  const uint origin = slot.cell(), origin_above = origin - ROW_CELLS;
  for (uint rest = meetings(current, around.above, around.left, around.above_left); rest != 0u; rest &= rest - 1u) {
    const uint column = ctz(rest);
    unite(cells, origin + first_of_run(current, column) / 2u, origin_above + first_of_run(around.above, column) / 2u);
  }
  if (around.reach != 0u) {
    // Above on the right: the run above begins there.
    const uint beyond = around.above >> 1 | around.above_right << 31, next = current >> 1 | around.right << 31;
    for (uint rest = current & ~around.above & beyond & ~next; rest != 0u; rest &= rest - 1u) {
      const uint column = ctz(rest);
      unite(cells, origin + first_of_run(current, column) / 2u, origin_above + (column + 1u) / 2u);
    }
  }
}

// Every run's parent becomes its root; with `counted` each adds its length to the root's cell.
inline void flatten_runs(threadgroup atomic_uint* cells, Slot slot, uint current, bool counted) {
  const uint origin = slot.cell();
  uint last = 0u, length = 0u;  // of one root in a row
  for (uint rest = current; rest != 0u;) {
    const Run run(rest);
    const uint root = flatten(cells, origin + run.first / 2u, PARENT);
    if (counted && root != last && length != 0u) {
      atomic_fetch_add_explicit(cells + last, length << 16, memory_order_relaxed);
      length = 0u;
    }
    last = root;
    length += run.end - run.first;
    rest = run.rest;
  }
  if (counted && length != 0u) {
    atomic_fetch_add_explicit(cells + last, length << 16, memory_order_relaxed);
  }
}

// 32 rows of the mask at a column as words: lane r gets that of row r.
template <typename T>
inline uint packed(device const T* mask, uint height, uint width, uint top, uint x, uint lane) {
  uint word = 0u;
#pragma unroll 4
  for (uint r = 0u; r < 32u; ++r) {
    const bool foreground = x < width && top + r < height && mask[(top + r) * width + x] != T(0);
    const uint votes = uint(simd_vote::vote_t(simd_ballot(foreground)));
    word = lane == r ? votes : word;
  }
  return word;
}

// Grid: a threadgroup of 32 x 8 threads a tile, (tiles of a row, rows of tiles, N). A simdgroup has a word of 32 rows:
// its lanes are the columns where it reads and writes, and the rows in between.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(256)]] void label_tiles(
    device const T* mask [[buffer(0)]],
    device uint* bits [[buffer(1)]],
    device uint* subcomponents [[buffer(2)]],
    device uint* labels [[buffer(3)]],
    device uint* counts [[buffer(4)]],
    constant int* sizes [[buffer(5)]],
    uint3 tile [[threadgroup_position_in_grid]],
    uint3 tid [[thread_position_in_threadgroup]]) {
  threadgroup uint bitmap[TILE_ROWS * TILE_WORDS];
  threadgroup atomic_uint cells[CELLS];
  const uint height = uint(sizes[0]), width = uint(sizes[1]), words = uint(sizes[2]);
  const uint lane = tid.x, block_row = tid.y / TILE_WORDS * 32u;
  const Slot slot = {block_row + lane, tid.y % TILE_WORDS};
  const uint k = tile.x * TILE_WORDS + slot.word, top = tile.y * TILE_ROWS, x = k * 32u + lane;
  const long plane = plane_of(sizes, tile.z);
  labels += plane;
  counts += plane;

  const uint current = packed(mask + plane, height, width, top + block_row, x, lane);
  const uint word_index = slot.row * TILE_WORDS + slot.word;
  bitmap[word_index] = current;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const bool first = slot.word == 0u, last = slot.word + 1u == TILE_WORDS, upper = slot.row == 0u;
  Around around;
  around.reach = sizes[3] == 8 ? 1u : 0u;
  const bool diagonals = around.reach != 0u && !upper;
  around.left = first ? 0u : bitmap[word_index - 1u];
  around.right = last ? 0u : bitmap[word_index + 1u];
  around.above = upper ? 0u : bitmap[word_index - TILE_WORDS];
  around.above_left = upper || first ? 0u : bitmap[word_index - TILE_WORDS - 1u];
  around.above_right = upper || last ? 0u : bitmap[word_index - TILE_WORDS + 1u];
  Around linked = around;
  linked.above_left = diagonals ? around.above_left : 0u;
  linked.above_right = diagonals ? around.above_right : 0u;
  link_runs(cells, slot, current, linked);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  flatten_runs(cells, slot, current, false);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  merge_runs(cells, slot, current, around);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  flatten_runs(cells, slot, current, true);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  uint own_subcomponents = 0u;
  for (uint r = 0u; r < 32u; ++r) {
    const uint row = block_row + r;
    const uint starts = starts_of(bitmap[row * TILE_WORDS + slot.word]);
    if (starts == 0u) {  // for the whole simdgroup
      continue;
    }
    bool is_root = false;
    if ((starts >> lane & 1u) != 0u) {
      const uint node = row * ROW_CELLS + slot.word * WORD_CELLS + lane / 2u;
      const uint cell = parent_of(cells, node), root = cell & PARENT;
      const uint root_row = root / ROW_CELLS, rest = root - root_row * ROW_CELLS, root_word = rest / WORD_CELLS;
      uint column = rest % WORD_CELLS * 2u;
      column += starts_of(bitmap[root_row * TILE_WORDS + root_word]) >> (column + 1u) & 1u;
      const uint pixel = (top + row) * width + x;
      labels[pixel] = (top + root_row) * width + (tile.x * TILE_WORDS + root_word) * 32u + column + 1u;
      is_root = root == node;
      if (is_root) {
        counts[pixel] = cell >> 16;
      }
    }
    const uint votes = uint(simd_vote::vote_t(simd_ballot(is_root)));
    own_subcomponents = lane == r ? votes : own_subcomponents;
  }
  if (k < words && top + slot.row < height) {
    const long out_index = bitmap_of(sizes, tile.z) + long((top + slot.row) * words + k);
    bits[out_index] = current;
    subcomponents[out_index] = own_subcomponents;
  }
}

// Unites what touches across the upper border of a tile, at one pixel.
inline void merge_above(device atomic_uint* nodes, device const uint* bits, constant int* sizes, uint y, uint x) {
  const uint width = uint(sizes[1]), words = uint(sizes[2]), k = x / 32u, column = x % 32u;
  device const uint* word = bits + (y * words + k);
  device const uint* word_above = word - words;
  const uint current = word[0], above = word_above[0];
  if ((current >> column & 1u) == 0u) {
    return;
  }
  const uint left = k > 0u ? word[-1] : 0u, above_left = k > 0u ? word_above[-1] : 0u;
  const uint origin = y * width + k * 32u + 1u, node = origin + first_of_run(current, column);
  if ((meetings(current, above, left, above_left) >> column & 1u) != 0u) {
    unite(nodes, node, origin - width + first_of_run(above, column));
  }
  if (sizes[3] == 4 || (above >> column & 1u) != 0u) {
    return;
  }
  // Above on the left, where a run ends, and above on the right, where one begins.
  const uint before = above << 1 | above_left >> 31, previous = current << 1 | left >> 31;
  if (((before & ~previous) >> column & 1u) != 0u) {
    const uint ending = column > 0u ? first_of_run(above, column - 1u) : first_of_run(above_left, 31u) - 32u;
    unite(nodes, node, origin - width + ending);
  }
  const uint right = k + 1u < words ? word[1] : 0u, above_right = k + 1u < words ? word_above[1] : 0u;
  const uint beyond = above >> 1 | above_right << 31, next = current >> 1 | right << 31;
  if (((beyond & ~next) >> column & 1u) != 0u) {
    unite(nodes, node, origin - width + column + 1u);
  }
}

// Unites what touches across the left border of a tile, at one row; across its corners only below its first row.
inline void merge_left(device atomic_uint* nodes, device const uint* bits, constant int* sizes, uint y, uint k) {
  const uint width = uint(sizes[1]), words = uint(sizes[2]), origin = y * width + k * 32u + 1u;
  device const uint* word = bits + (y * words + k);
  const bool upper = y % TILE_ROWS == 0u;
  const uint current = word[0] & 1u, left = word[-1] >> 31;
  const uint above = upper ? 0u : (word - words)[0] & 1u, above_left = upper ? 0u : (word - words)[-1] >> 31;
  if ((current & left) != 0u) {
    if ((above & above_left) == 0u) {  // else these are united a row above
      unite(nodes, origin, origin - 32u + first_of_run(word[-1], 31u));
    }
  } else if (sizes[3] == 8 && (current & above_left) != 0u && above == 0u) {
    unite(nodes, origin, origin - width - 32u + first_of_run((word - words)[-1], 31u));
  } else if (sizes[3] == 8 && (left & above) != 0u && above_left == 0u) {
    unite(nodes, origin - 32u + first_of_run(word[-1], 31u), origin - width);
  }
}

// Grid: (pixels below the upper borders of tiles, then rows right of the left ones; N).
[[kernel, max_total_threads_per_threadgroup(64)]] void merge_tiles(
    device const uint* bits [[buffer(0)]],
    device atomic_uint* labels [[buffer(1)]],
    constant int* sizes [[buffer(2)]],
    uint2 gid [[thread_position_in_grid]],
    uint2 group [[threadgroup_position_in_grid]]) {
  const uint height = uint(sizes[0]), width = uint(sizes[1]), words = uint(sizes[2]);
  const uint below = (height - 1u) / TILE_ROWS * width, columns = (words - 1u) / TILE_WORDS;
  bits += bitmap_of(sizes, group.y);
  labels += plane_of(sizes, group.y) - 1;
  if (gid.x < below) {
    const uint row = gid.x / width;
    merge_above(labels, bits, sizes, (row + 1u) * TILE_ROWS, gid.x - row * width);
  } else if (gid.x - below < height * columns) {
    const uint y = (gid.x - below) / columns;
    merge_left(labels, bits, sizes, y, (gid.x - below - y * columns + 1u) * TILE_WORDS);
  }
}

// Every subcomponent's parent becomes its root, to whose count it adds its pixels. Grid: (words of an image, N).
[[kernel, max_total_threads_per_threadgroup(64)]] void count_subcomponents(
    device const uint* subcomponents [[buffer(0)]],
    device atomic_uint* labels [[buffer(1)]],
    device atomic_uint* counts [[buffer(2)]],
    constant int* sizes [[buffer(3)]],
    uint2 gid [[thread_position_in_grid]],
    uint2 group [[threadgroup_position_in_grid]]) {
  const uint height = uint(sizes[0]), width = uint(sizes[1]), words = uint(sizes[2]);
  if (gid.x >= height * words) {
    return;
  }
  labels += plane_of(sizes, group.y) - 1;
  counts += plane_of(sizes, group.y) - 1;
  const uint y = gid.x / words, origin = y * width + (gid.x - y * words) * 32u + 1u;
  for (uint rest = (subcomponents + bitmap_of(sizes, group.y))[gid.x]; rest != 0u; rest &= rest - 1u) {
    const uint node = origin + ctz(rest), root = flatten(labels, node, ~0u);
    if (root != node) {
      // Nobody adds to a subcomponent's own count but to its root's.
      const uint pixels = atomic_load_explicit(counts + node, memory_order_relaxed);
      atomic_fetch_add_explicit(counts + root, pixels, memory_order_relaxed);
    }
  }
}

// The label and the count of every pixel. Grid: (32 * words of a row, WRITTEN_ROWS rows at a time, N), a simdgroup a
// word of each of its rows. Where a run begins, its lane looks up both for all of its pixels. The first pixels of
// subcomponents and components hold their result already; other threads read it there, so it is not written again.
[[kernel, max_total_threads_per_threadgroup(256)]] void write_result(
    device const uint* bits [[buffer(0)]],
    device uint* labels [[buffer(1)]],
    device uint* counts [[buffer(2)]],
    constant int* sizes [[buffer(3)]],
    uint3 gid [[thread_position_in_grid]],
    uint3 group [[threadgroup_position_in_grid]]) {
  const uint height = uint(sizes[0]), width = uint(sizes[1]), words = uint(sizes[2]);
  const uint k = gid.x / 32u, lane = gid.x % 32u;
  labels += plane_of(sizes, group.z);
  counts += plane_of(sizes, group.z);
  bits += bitmap_of(sizes, group.z);
  // What a look-up needs is read for all rows before the next, so that they wait for memory together.
  uint current[WRITTEN_ROWS], subcomponents[WRITTEN_ROWS], roots[WRITTEN_ROWS], numbers[WRITTEN_ROWS];
  const uint first = gid.y * WRITTEN_ROWS;
#pragma unroll
  for (uint r = 0u; r < WRITTEN_ROWS; ++r) {
    current[r] = first + r < height ? bits[(first + r) * words + k] : 0u;
  }
#pragma unroll
  for (uint r = 0u; r < WRITTEN_ROWS; ++r) {
    const bool begins = (starts_of(current[r]) >> lane & 1u) != 0u;
    subcomponents[r] = begins ? labels[(first + r) * width + gid.x] : 0u;
  }
#pragma unroll
  for (uint r = 0u; r < WRITTEN_ROWS; ++r) {
    roots[r] = subcomponents[r] != 0u ? labels[subcomponents[r] - 1u] : 0u;
  }
#pragma unroll
  for (uint r = 0u; r < WRITTEN_ROWS; ++r) {
    numbers[r] = subcomponents[r] != 0u ? counts[roots[r] - 1u] : 0u;
  }
#pragma unroll
  for (uint r = 0u; r < WRITTEN_ROWS; ++r) {
    const bool foreground = (current[r] >> lane & 1u) != 0u;
    const ushort from = ushort(foreground ? first_of_run(current[r], lane) : lane);
    const uint label = simd_shuffle(roots[r], from), count = simd_shuffle(numbers[r], from);
    const uint pixel = (first + r) * width + gid.x;
    if (gid.x < width && first + r < height) {
      if (subcomponents[r] == 0u || subcomponents[r] != label) {
        labels[pixel] = label;
      }
      if (label != pixel + 1u) {
        counts[pixel] = count;
      }
    }
  }
}

#define INSTANTIATE(T) template [[host_name("label_tiles_" #T)]] [[kernel]] decltype(label_tiles<T>) label_tiles<T>;
INSTANTIATE(char)
INSTANTIATE(short)
INSTANTIATE(int)
INSTANTIATE(long)
