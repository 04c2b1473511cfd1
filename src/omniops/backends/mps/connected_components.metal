// Connected components on Apple GPUs: union-find over the runs of a bitmap.
//
// A mask becomes a bitmap with 32 pixels of a row in a word, bit b for column 32k + b. A run is a maximal row of
// foreground pixels *within a word*; it is known by the node of its first pixel, 1 + y * W + x, which is what its label
// would be. While the kernels work, labels at a run's first pixel holds the node of its parent, an earlier run of the
// same component or itself, and counts there its length; other pixels are not touched before the end.
//
//   pack_mask     the bitmap
//   link_runs     each run's parent: the run that it continues from the word on the left, else the first run that it
//                 touches above, else itself; no two threads write one parent
//   flatten_runs  each run's parent becomes the root: all runs jump at once to their parents' parents
//   merge_runs    the other touching runs: the later of two roots is pointed to the earlier one by an atomic minimum;
//                 had that one got another parent meanwhile, this parent is merged too
//   flatten_runs  again, and each run adds its length to the count of its root
//   write_result  labels and counts of every pixel
//
// Parents only ever become smaller and stay in their component, so a value read late costs a step and nothing else, and
// relaxed atomics are enough. Roots are the first nodes of their components: the result is canonical.
//
// Grids: (32 * words of a row, H, N) in pack_mask and write_result, a thread a pixel, groups 32 wide, so that a
// simdgroup is a word; (words of an image, N) in the others, a thread a word, which works through its runs. All tensors
// are contiguous. A plane has fewer than 2^31 pixels: within it offsets take 32 bits, the step to an image is taken in
// 64. sizes: H, W, words of a row.
//
// ASCII and Metal 3.1 only: PyTorch hands the source to the compiler so.

#include <metal_stdlib>
using namespace metal;

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

// Where an image begins in the mask and the results, and in the bitmap.
inline long plane_of(constant int* sizes, uint image) {
  return long(image) * long(uint(sizes[0]) * uint(sizes[1]));
}

inline long bitmap_of(constant int* sizes, uint image) {
  return long(image) * long(uint(sizes[0]) * uint(sizes[2]));
}

// A thread's word, those around it and its nodes.
struct Place {
  uint width, words, y, k;
  uint origin;  // the node of the word's first column
  bool exists;
  device const uint* here;

  Place(constant int* sizes, device const uint* bits, uint2 at) {
    const uint height = uint(sizes[0]);
    width = uint(sizes[1]);
    words = uint(sizes[2]);
    exists = at.x < height * words;
    y = at.x / words;
    k = at.x - y * words;
    origin = y * width + k * 32u + 1u;
    here = bits + bitmap_of(sizes, at.y) + at.x;
  }

  uint left() const { return k > 0u ? here[-1] : 0u; }
  uint right() const { return k + 1u < words ? here[1] : 0u; }
  uint above() const { return y > 0u ? here[-int(words)] : 0u; }
  uint above_left() const { return y > 0u && k > 0u ? here[-int(words) - 1] : 0u; }
  uint above_right() const { return y > 0u && k + 1u < words ? here[1 - int(words)] : 0u; }
};

inline uint parent_of(device const atomic_uint* labels, uint node) {
  return atomic_load_explicit(labels + (node - 1u), memory_order_relaxed);
}

inline uint root_of(device const atomic_uint* labels, uint node) {
  for (uint parent = parent_of(labels, node); parent != node; parent = parent_of(labels, node)) {
    node = parent;
  }
  return node;
}

inline void unite(device atomic_uint* labels, uint a, uint b) {
  for (;;) {
    a = root_of(labels, a);
    b = root_of(labels, b);
    if (a == b) {
      return;
    }
    const uint later = max(a, b);
    b = min(a, b);
    a = atomic_fetch_min_explicit(labels + (later - 1u), b, memory_order_relaxed);
    if (a == later) {
      return;
    }
  }
}

// bits[y, k] = the foreground of columns 32k ... 32k + 31. A thread: one column of a word, outside the map too.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(256)]] void pack_mask(
    device const T* mask [[buffer(0)]],
    device uint* bits [[buffer(1)]],
    constant int* sizes [[buffer(2)]],
    uint3 at [[thread_position_in_grid]]) {
  const uint height = uint(sizes[0]), width = uint(sizes[1]), words = uint(sizes[2]);
  const uint column = at.x & 31u;
  const bool inside = at.x < width && at.y < height;
  const bool foreground = inside && mask[plane_of(sizes, at.z) + long(at.y * width + at.x)] != T(0);
  const uint word = simd_or(foreground ? 1u << column : 0u);
  if (column == 0u && at.y < height) {
    bits[bitmap_of(sizes, at.z) + long(at.y * words + at.x / 32u)] = word;
  }
}

// The first links, and the length of each run. A thread: one word.
template <bool DIAGONALS>
[[kernel, max_total_threads_per_threadgroup(64)]] void link_runs(
    device const uint* bits [[buffer(0)]],
    device uint* labels [[buffer(1)]],
    device uint* counts [[buffer(2)]],
    constant int* sizes [[buffer(3)]],
    uint2 at [[thread_position_in_grid]]) {
  const Place place(sizes, bits, at);
  if (!place.exists) {
    return;
  }
  labels += plane_of(sizes, at.y);
  counts += plane_of(sizes, at.y);
  const uint left = place.left(), above = place.above();
  const uint above_left = DIAGONALS ? place.above_left() : 0u, above_right = DIAGONALS ? place.above_right() : 0u;
  for (uint rest = *place.here; rest != 0u;) {
    const Run run(rest);
    const uint node = place.origin + run.first;
    const uint reach = DIAGONALS ? 1u : 0u;
    const uint touching =
        above & columns(run.first > reach ? run.first - reach : 0u, min(run.end + reach, 32u));
    uint parent = node;
    if (run.first == 0u && left >> 31 != 0u) {
      parent = place.origin - 32u + first_of_run(left, 31u);
    } else if (run.first == 0u && above_left >> 31 != 0u) {
      parent = place.origin - place.width - 32u + first_of_run(above_left, 31u);
    } else if (touching != 0u) {
      parent = place.origin - place.width + first_of_run(above, ctz(touching));
    } else if (run.end == 32u && (above_right & 1u) != 0u) {
      parent = place.origin - place.width + 32u;
    }
    labels[node - 1u] = parent;
    counts[node - 1u] = run.end - run.first;
    rest = run.rest;
  }
}

// Every run's parent becomes its root; with COUNT, whose count gets the run's length. A thread: one word.
template <bool COUNT>
[[kernel, max_total_threads_per_threadgroup(64)]] void flatten_runs(
    device const uint* bits [[buffer(0)]],
    device atomic_uint* labels [[buffer(1)]],
    device atomic_uint* counts [[buffer(2)]],
    constant int* sizes [[buffer(3)]],
    uint2 at [[thread_position_in_grid]]) {
  const Place place(sizes, bits, at);
  if (!place.exists) {
    return;
  }
  labels += plane_of(sizes, at.y);
  counts += plane_of(sizes, at.y);
  for (uint rest = *place.here; rest != 0u;) {
    const Run run(rest);
    const uint node = place.origin + run.first;
    uint root = parent_of(labels, node);
    for (uint parent = parent_of(labels, root); parent != root; parent = parent_of(labels, root)) {
      root = parent;
      // At once, for those whose way leads through here.
      atomic_store_explicit(labels + (node - 1u), root, memory_order_relaxed);
    }
    if (COUNT && root != node) {
      atomic_fetch_add_explicit(counts + (root - 1u), run.end - run.first, memory_order_relaxed);
    }
    rest = run.rest;
  }
}

// Unites each two runs that touch, at the first column where they do. Not those where that is the corner at which the
// upper one ends and the lower one begins: link_runs has joined them. A thread: one word.
template <bool DIAGONALS>
[[kernel, max_total_threads_per_threadgroup(64)]] void merge_runs(
    device const uint* bits [[buffer(0)]],
    device atomic_uint* labels [[buffer(1)]],
    constant int* sizes [[buffer(2)]],
    uint2 at [[thread_position_in_grid]]) {
  const Place place(sizes, bits, at);
  if (!place.exists || place.y == 0u) {
    return;
  }
  labels += plane_of(sizes, at.y);
  const uint here = *place.here, left = place.left(), above = place.above(), above_left = place.above_left();
  const uint origin = place.origin, origin_above = origin - place.width;
  const uint both = here & above;
  for (uint meetings = both & ~(both << 1 | (left & above_left) >> 31); meetings != 0u; meetings &= meetings - 1u) {
    const uint column = ctz(meetings);
    unite(labels, origin + first_of_run(here, column), origin_above + first_of_run(above, column));
  }
  if (DIAGONALS) {
    // Above on the right: the run above begins there.
    const uint after = place.right() << 31, above_after = place.above_right() << 31;
    for (uint meetings = here & ~above & (above >> 1 | above_after) & ~(here >> 1 | after); meetings != 0u;
         meetings &= meetings - 1u) {
      const uint column = ctz(meetings);
      unite(labels, origin + first_of_run(here, column), origin_above + column + 1u);
    }
  }
}

// The label and the count of every pixel. A thread: one pixel. What is right already, a run's label at its first pixel
// and a component's count at its own, is read by other threads and not written again.
[[kernel, max_total_threads_per_threadgroup(256)]] void write_result(
    device const uint* bits [[buffer(0)]],
    device uint* labels [[buffer(1)]],
    device uint* counts [[buffer(2)]],
    constant int* sizes [[buffer(3)]],
    uint3 at [[thread_position_in_grid]]) {
  const uint height = uint(sizes[0]), width = uint(sizes[1]), words = uint(sizes[2]);
  if (at.x >= width || at.y >= height) {
    return;
  }
  labels += plane_of(sizes, at.z);
  counts += plane_of(sizes, at.z);
  const uint here = bits[bitmap_of(sizes, at.z) + long(at.y * words + at.x / 32u)];
  const uint column = at.x & 31u, pixel = at.y * width + at.x;
  if ((here >> column & 1u) == 0u) {
    labels[pixel] = 0u;
    counts[pixel] = 0u;
    return;
  }
  const uint first = pixel - column + first_of_run(here, column);
  const uint label = labels[first];
  if (pixel != first) {
    labels[pixel] = label;
  }
  if (pixel + 1u != label) {
    counts[pixel] = counts[label - 1u];
  }
}

#define INSTANTIATE_PACK(T) \
  template [[host_name("pack_mask_" #T)]] kernel void pack_mask<T>(device const T*, device uint*, constant int*, uint3);
INSTANTIATE_PACK(char)
INSTANTIATE_PACK(short)
INSTANTIATE_PACK(int)
INSTANTIATE_PACK(long)

#define INSTANTIATE(CONNECTIVITY, DIAGONALS)                                             \
  template [[host_name("link_runs_" #CONNECTIVITY)]] kernel void link_runs<DIAGONALS>(             \
      device const uint*, device uint*, device uint*, constant int*, uint2);             \
  template [[host_name("merge_runs_" #CONNECTIVITY)]] kernel void merge_runs<DIAGONALS>(           \
      device const uint*, device atomic_uint*, constant int*, uint2);
INSTANTIATE(4, false)
INSTANTIATE(8, true)

template [[host_name("flatten_runs")]] kernel void flatten_runs<false>(
    device const uint*, device atomic_uint*, device atomic_uint*, constant int*, uint2);
template [[host_name("flatten_and_count_runs")]] kernel void flatten_runs<true>(
    device const uint*, device atomic_uint*, device atomic_uint*, constant int*, uint2);
