// Deformable convolution on Apple GPUs: the columns and their gradients. omniops/ops/deform_conv2d.py has the formula
// and the names, omniops/backends/columns.py what columns are.
//
// Tensors are contiguous. image and by_image are (N, H, W, C), columns (G, P, K, C / G), offset (N, D * K * 2, H_out,
// W_out), mask (N, D * K, H_out, W_out), where N counts the images that the launch is about. Threads that lie together
// run along the channels, WIDTH at a time: 4 by vector loads, where 4 divides the channels of a weight group and those
// of an offset group and the tensors start at a multiple of four elements; otherwise 1. Sums are in float.
//
// A launch is about the positions of the result first ... first + positions - 1, counted from the first of its images;
// they are the rows start ... of the columns, of which there are column_positions. A position has K * D samples, those
// of pair t * D + d of a tap and an offset group. Sample (start + p) * K * D + t * D + d is that of position p; its row is
// (start + p) * K + t, of the columns, which are (G, P * K, C / G). All offsets in memory take 32 bits.
//
// deform_conv2d_sample and deform_conv2d_backward_samples work on tiles: 2^position_bits positions by some pairs. First
// a thread each works out where the samples lie, along the positions, as offsets lie in memory; then 2^lane_bits lanes
// take the channels of a sample, along these, as columns do.
//
// The gradient of the image is a gather. A cell is a place between four pixels, of one image and offset group: the
// samples with floor(y) = i - 1 and floor(x) = j - 1 lie in cell (i, j) of a grid (H + 1) x (W + 1), and those outside
// the map, or at what is not a number, in none. deform_conv2d_count counts the samples of each cell,
// deform_conv2d_place gives each cell a segment of memory, deform_conv2d_collect writes the rows of its samples there, in
// any order, and deform_conv2d_backward_samples writes a record of each sample at the place that its row has among them.
// So deform_conv2d_backward_image, which sums what the four cells around a pixel hold, has the order of the samples: no
// atomics on floats, and the same bits every run. No thread goes through more samples than one cell has.
//
// PyTorch compiles without fast math unless PYTORCH_MPS_FAST_MATH is set. Where it is, the compiler may assume that
// there is neither NaN nor infinity; whether a sample is inside is asked of its offset's bits in memory first, so that
// nothing is read out of bounds even then. That a sample at NaN is NaN, and one at infinity zero, is not promised then.
//
// ASCII and Metal 3.1 only: PyTorch hands the source to the compiler so.

#include <metal_stdlib>
using namespace metal;

// The dtype of the tensors: float, half or bfloat. Who compiles the source says which.
#ifndef SCALAR
#define SCALAR float
#endif
typedef SCALAR T;

// As deform_conv2d.py has them.
constant constexpr int TILE_PAIRS = 9;
constant constexpr int TILE_POSITIONS = 32;
constant constexpr int CELLS = 4;  // that a thread of deform_conv2d_place takes

// The samples of one pair in threadgroup memory: an odd number, so that pairs lie in different banks.
constant constexpr int STEP = TILE_POSITIONS + 1;
constant constexpr int TILE = TILE_PAIRS * STEP;
constant constexpr int GATHER_THREADS = 256;
constant constexpr int BATCH = 2;  // records that a thread of deform_conv2d_backward_image loads at a time
constant constexpr int SIMD = 32;

// As deform_conv2d.py lists them.
struct Sizes {
  int height, width, channels;
  int result_height, result_width;
  int kernel_height, kernel_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  int offset_groups, offset_group_channels, group_channels;
  int first, positions, start, column_positions;
  int position_bits;  // log2 of the positions of a tile
  int tile_pairs;     // the pairs of a tile
  int rounds;         // how many tiles of the same positions a threadgroup takes
  int tile_reciprocal;  // 65536 / tile_pairs + 1, which divides what is less than 65536 / tile_pairs
  int lane_bits;      // log2 of the lanes of a simdgroup that share the channels of one sample or cell
  int masked;         // whether there is a mask
};

// Four neighbours as memory has them, and eight of them in as few loads and stores as there can be.
template <typename Scalar>
struct Four;
template <>
struct Four<float> {
  typedef float4 Stored;
  static void load(device const float* from, thread Stored& low, thread Stored& high) {
    low = *(device const Stored*)from;
    high = *(device const Stored*)(from + 4);
  }
  static void store(device float* to, Stored low, Stored high) {
    *(device Stored*)to = low;
    *(device Stored*)(to + 4) = high;
  }
};
template <>
struct Four<half> {
  typedef half4 Stored;
  static void load(device const half* from, thread Stored& low, thread Stored& high) {
    const uint4 bits = *(device const uint4*)from;
    low = as_type<Stored>(uint2(bits.x, bits.y));
    high = as_type<Stored>(uint2(bits.z, bits.w));
  }
  static void store(device half* to, Stored low, Stored high) {
    const uint2 first = as_type<uint2>(low), second = as_type<uint2>(high);
    *(device uint4*)to = uint4(first.x, first.y, second.x, second.y);
  }
};
template <>
struct Four<bfloat> {
  typedef bfloat4 Stored;
  static void load(device const bfloat* from, thread Stored& low, thread Stored& high) {
    const uint4 bits = *(device const uint4*)from;
    low = as_type<Stored>(uint2(bits.x, bits.y));
    high = as_type<Stored>(uint2(bits.z, bits.w));
  }
  static void store(device bfloat* to, Stored low, Stored high) {
    const uint2 first = as_type<uint2>(low), second = as_type<uint2>(high);
    *(device uint4*)to = uint4(first.x, first.y, second.x, second.y);
  }
};

template <typename Stored>
inline void widen(Stored value, thread float* to) {
  to[0] = float(value.x);
  to[1] = float(value.y);
  to[2] = float(value.z);
  to[3] = float(value.w);
}
template <typename Scalar>
inline typename Four<Scalar>::Stored narrow(thread const float* from) {
  typename Four<Scalar>::Stored value;
  value.x = Scalar(from[0]);
  value.y = Scalar(from[1]);
  value.z = Scalar(from[2]);
  value.w = Scalar(from[3]);
  return value;
}

template <int WIDTH, typename Scalar>
inline void load(device const Scalar* from, thread float* to) {
  typedef typename Four<Scalar>::Stored Stored;
  if (WIDTH == 1) {
    to[0] = float(from[0]);
  } else if (WIDTH == 4) {
    const Stored value = *(device const Stored*)from;
    widen(value, to);
  } else {
    Stored low, high;
    Four<Scalar>::load(from, low, high);
    widen(low, to);
    widen(high, to + WIDTH - 4);
  }
}
template <int WIDTH, typename Scalar>
inline void store(device Scalar* to, thread const float* from) {
  typedef typename Four<Scalar>::Stored Stored;
  if (WIDTH == 1) {
    to[0] = Scalar(from[0]);
  } else if (WIDTH == 4) {
    *(device Stored*)to = narrow<Scalar>(from);
  } else {
    Four<Scalar>::store(to, narrow<Scalar>(from), narrow<Scalar>(from + WIDTH - 4));
  }
}

// By the bits in memory: what a value is, the compiler may think that it knows.
inline bool is_finite(device const float* value) {
  return (*(device const uint*)value & 0x7f800000u) != 0x7f800000u;
}
inline bool is_finite(device const half* value) {
  return (*(device const ushort*)value & 0x7c00u) != 0x7c00u;
}
inline bool is_finite(device const bfloat* value) {
  return (*(device const ushort*)value & 0x7f80u) != 0x7f80u;
}

// A position of the launch and a pair of a tap and an offset group: the image, row and column, the tap and the offset
// group, and where their numbers lie in mask (plane) and offset (vertical, horizontal).
struct Place {
  int n, i, j, t, d;
  uint plane, vertical, horizontal;

  Place(constant Sizes& z, int p, int pair) {
    const int line = int(uint(z.first + p) / uint(z.result_width));
    n = int(uint(line) / uint(z.result_height));
    i = line - n * z.result_height;
    j = z.first + p - line * z.result_width;
    t = int(uint(pair) / uint(z.offset_groups));
    d = pair - t * z.offset_groups;
    const uint area = uint(z.result_height) * uint(z.result_width), at = uint(i * z.result_width + j);
    const uint planes = uint((n * z.offset_groups + d) * (z.kernel_height * z.kernel_width) + t);
    plane = planes * area + at;
    vertical = 2 * planes * area + at;
    horizontal = vertical + area;
  }
};

// Where that samples: down and right of the pixel (row, column), by so much of a pixel. Outside the map down and right
// are zero; where y or x is not a number, down or right is none either, and the sample is not inside.
struct Sample {
  int n, d, row, column;
  float down, right;
  bool inside;

  Sample(constant Sizes& z, device const T* offset, Place at) {
    n = at.n;
    d = at.d;
    const int u = int(uint(at.t) / uint(z.kernel_width)), v = at.t - u * z.kernel_width;
    device const T* vertical = offset + at.vertical;
    device const T* horizontal = offset + at.horizontal;
    const float y = float(at.i * z.stride_y - z.padding_y + u * z.dilation_y) + float(*vertical);
    const float x = float(at.j * z.stride_x - z.padding_x + v * z.dilation_x) + float(*horizontal);
    const bool outside = y < -1.0f || y >= float(z.height) || x < -1.0f || x >= float(z.width);
    inside = is_finite(vertical) && is_finite(horizontal) && y >= -1.0f && y < float(z.height) && x >= -1.0f &&
             x < float(z.width);
    const float top = floor(y), left = floor(x);
    row = inside ? int(top) : 0;
    column = inside ? int(left) : 0;
    down = outside ? 0.0f : y - top;
    right = outside ? 0.0f : x - left;
  }

  int cell(constant Sizes& z) const {
    return ((n * z.offset_groups + d) * (z.height + 1) + row + 1) * (z.width + 1) + column + 1;
  }

  // Where the first channel of the offset group of the pixel (row, column) lies, perhaps before the image; and which of
  // the four pixels are in the map, as bits: top left, top right, low left, low right.
  int2 pixel(constant Sizes& z) const {
    const bool top = inside && row >= 0, low = inside && row + 1 < z.height;
    const bool left = column >= 0, right = column + 1 < z.width;
    const int corners = (top && left ? 1 : 0) | (top && right ? 2 : 0) | (low && left ? 4 : 0) | (low && right ? 8 : 0);
    return int2(((n * z.height + row) * z.width + column) * z.channels + d * z.offset_group_channels, corners);
  }
};

// WIDTH channels of each of the four pixels around a sample, from channel c of the offset group on: top left, top
// right, low left, low right; zero outside the map.
template <int WIDTH>
inline void load_pixels(constant Sizes& z, device const T* image, int2 pixel, int c, thread float* to) {
  const int from = pixel.x + c, low = from + z.width * z.channels;
  if (pixel.y == 15) {
    load<WIDTH>(image + uint(from), to);
    load<WIDTH>(image + uint(from + z.channels), to + WIDTH);
    load<WIDTH>(image + uint(low), to + 2 * WIDTH);
    load<WIDTH>(image + uint(low + z.channels), to + 3 * WIDTH);
    return;
  }
#pragma unroll
  for (int w = 0; w < 4 * WIDTH; ++w) {
    to[w] = 0.0f;
  }
  if ((pixel.y & 1) != 0) {
    load<WIDTH>(image + uint(from), to);
  }
  if ((pixel.y & 2) != 0) {
    load<WIDTH>(image + uint(from + z.channels), to + WIDTH);
  }
  if ((pixel.y & 4) != 0) {
    load<WIDTH>(image + uint(low), to + 2 * WIDTH);
  }
  if ((pixel.y & 8) != 0) {
    load<WIDTH>(image + uint(low + z.channels), to + 3 * WIDTH);
  }
}

// Where channel c of the offset group of a sample lies in the columns.
inline uint column_of(constant Sizes& z, int sample, int c) {
  if (z.group_channels == z.channels) {
    return uint(sample) * uint(z.offset_group_channels) + uint(c);
  }
  const int row = sample / z.offset_groups;
  const int channel = (sample - row * z.offset_groups) * z.offset_group_channels + c, g = channel / z.group_channels;
  const uint rows = uint(z.column_positions) * uint(z.kernel_height * z.kernel_width);
  return (uint(g) * rows + uint(row)) * uint(z.group_channels) + uint(channel - g * z.group_channels);
}

// The samples of a threadgroup in one of its rounds: so many positions and pairs, from these on.
struct Tile {
  int position, positions, pair, pairs;

  Tile(constant Sizes& z, uint2 group, int round) {
    position = int(group.x) << z.position_bits;
    positions = min(1 << z.position_bits, z.positions - position);
    pair = (int(group.y) * z.rounds + round) * z.tile_pairs;
    pairs = min(z.tile_pairs, z.kernel_height * z.kernel_width * z.offset_groups - pair);
  }

  // i / pairs, for sample i of the tile in the order of the columns.
  int position_of(constant Sizes& z, int i) const {
    return pairs == z.tile_pairs ? (i * z.tile_reciprocal) >> 16 : i / pairs;
  }

  int sample(constant Sizes& z, int p, int j) const {
    return (z.start + position + p) * (z.kernel_height * z.kernel_width * z.offset_groups) + pair + j;
  }
};

// columns[p, t, c] = mask[p, t] * bilinear(image[c], y, x)
//
// Groups: (tiles of positions, rounds of tiles of pairs).
template <int WIDTH>
[[kernel, max_total_threads_per_threadgroup(320)]] void deform_conv2d_sample(
    device const T* image [[buffer(0)]],
    device const T* offset [[buffer(1)]],
    device const T* mask [[buffer(2)]],
    device T* columns [[buffer(3)]],
    constant Sizes& z [[buffer(4)]],
    uint2 group [[threadgroup_position_in_grid]],
    uint2 size [[threads_per_threadgroup]],
    uint index [[thread_index_in_threadgroup]]) {
  threadgroup float4 weights[TILE];
  threadgroup int2 pixels[TILE];
  const int threads = int(size.x), id = int(index);
  const int own_pair = id >> z.position_bits, own = id - (own_pair << z.position_bits);
  for (int round = 0; round < z.rounds; ++round) {
    const Tile tile(z, group, round);
    if (round > 0) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (own_pair < tile.pairs && own < tile.positions) {
      const Place at(z, tile.position + own, tile.pair + own_pair);
      const Sample s(z, offset, at);
      const float up = 1.0f - s.down, left = 1.0f - s.right, factor = z.masked != 0 ? float(mask[at.plane]) : 1.0f;
      weights[own_pair * STEP + own] =
          float4(factor * (up * left), factor * (up * s.right), factor * (s.down * left), factor * (s.down * s.right));
      pixels[own_pair * STEP + own] = s.pixel(z);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int lane = id & ((1 << z.lane_bits) - 1);
    for (int i = id >> z.lane_bits; i < tile.positions * tile.pairs; i += threads >> z.lane_bits) {
      const int p = tile.position_of(z, i), j = i - p * tile.pairs;
      const float4 weight = weights[j * STEP + p];
      const int2 pixel = pixels[j * STEP + p];
      const int sample = tile.sample(z, p, j);
      for (int c = lane * WIDTH; c < z.offset_group_channels; c += WIDTH << z.lane_bits) {
        float around[4 * WIDTH], sums[WIDTH];
        load_pixels<WIDTH>(z, image, pixel, c, around);
#pragma unroll
        for (int w = 0; w < WIDTH; ++w) {
          sums[w] = weight.x * around[w] + weight.y * around[WIDTH + w] + weight.z * around[2 * WIDTH + w] +
                    weight.w * around[3 * WIDTH + w];
        }
        store<WIDTH>(columns + column_of(z, sample, c), sums);
      }
    }
  }
}

// Adds one to the first number of the cell of each sample.
//
// Grid: (positions, K * D).
[[kernel, max_total_threads_per_threadgroup(256)]] void deform_conv2d_count(
    device const T* offset [[buffer(0)]],
    device atomic_int* cells [[buffer(1)]],
    constant Sizes& z [[buffer(2)]],
    uint2 at [[thread_position_in_grid]]) {
  const Sample s(z, offset, Place(z, int(at.x), int(at.y)));
  if (s.inside) {
    atomic_fetch_add_explicit(&cells[2 * uint(s.cell(z))], 1, memory_order_relaxed);
  }
}

// Gives each cell a segment of memory for as many samples as its first number says, and makes its second number the
// beginning of that. The segments of a simdgroup's 128 cells follow each other, those of simdgroups in any order. used is
// 0 before.
//
// Grid: (simdgroups that have CELLS cells a lane).
[[kernel, max_total_threads_per_threadgroup(256)]] void deform_conv2d_place(
    device int2* cells [[buffer(0)]],
    device atomic_int* used [[buffer(1)]],
    constant int& count [[buffer(2)]],
    uint at [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  int samples[CELLS], sum = 0;
#pragma unroll
  for (int i = 0; i < CELLS; ++i) {
    const int cell = int(at) * CELLS + i;
    samples[i] = cell < count ? cells[cell].x : 0;
    sum += samples[i];
  }
  const int before = simd_prefix_exclusive_sum(sum);
  int first = 0;
  if (lane == 31 && before + sum > 0) {
    first = atomic_fetch_add_explicit(used, before + sum, memory_order_relaxed);
  }
  first = simd_shuffle(first, ushort(31)) + before;
#pragma unroll
  for (int i = 0; i < CELLS; ++i) {
    const int cell = int(at) * CELLS + i;
    if (samples[i] > 0) {
      cells[cell] = int2(samples[i], first);
      first += samples[i];
    }
  }
}

// Writes the row of each sample into the segment of its cell, and moves the second number of the cell to its end.
//
// Grid: (positions, K * D).
[[kernel, max_total_threads_per_threadgroup(256)]] void deform_conv2d_collect(
    device const T* offset [[buffer(0)]],
    device atomic_int* cells [[buffer(1)]],
    device int* rows [[buffer(2)]],
    constant Sizes& z [[buffer(3)]],
    uint2 grid [[thread_position_in_grid]]) {
  const int p = int(grid.x), pair = int(grid.y);
  const Place at(z, p, pair);
  const Sample s(z, offset, at);
  if (s.inside) {
    const int place = atomic_fetch_add_explicit(&cells[2 * uint(s.cell(z)) + 1], 1, memory_order_relaxed);
    rows[place] = (z.start + p) * (z.kernel_height * z.kernel_width) + at.t;
  }
}

// by_mask[p, t] = sum over the channels c of offset group d of by_columns[p, t, c] * bilinear(image[c], y, x)
// by_offset[p, t] = mask[p, t] * the same sum with the derivatives of bilinear by y and x
// and the record of each sample: three floats' bits (the parts of a pixel that it lies below and to the right of its
// cell's first pixel, and its mask) and its row.
//
// Groups: (tiles of positions, rounds of tiles of pairs). The lanes of a sample are summed by shuffles, always in the
// same order.
template <int WIDTH>
[[kernel, max_total_threads_per_threadgroup(320)]] void deform_conv2d_backward_samples(
    device const T* by_columns [[buffer(0)]],
    device const T* image [[buffer(1)]],
    device const T* offset [[buffer(2)]],
    device const T* mask [[buffer(3)]],
    device T* by_offset [[buffer(4)]],
    device T* by_mask [[buffer(5)]],
    device const int2* cells [[buffer(6)]],
    device const int* rows [[buffer(7)]],
    device int4* records [[buffer(8)]],
    constant Sizes& z [[buffer(9)]],
    uint2 group [[threadgroup_position_in_grid]],
    uint2 size [[threads_per_threadgroup]],
    uint index [[thread_index_in_threadgroup]]) {
  threadgroup float2 parts[TILE];  // down, right
  threadgroup int2 pixels[TILE];
  threadgroup uint2 places[TILE];  // of their numbers in by_mask and by_offset
  threadgroup float factors[TILE];
  threadgroup float values[TILE];
  threadgroup float by_y[TILE];
  threadgroup float by_x[TILE];
  const int threads = int(size.x), id = int(index);
  const int own_pair = id >> z.position_bits, own = id - (own_pair << z.position_bits);
  for (int round = 0; round < z.rounds; ++round) {
    const Tile tile(z, group, round);
    if (round > 0) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    const bool has_own = own_pair < tile.pairs && own < tile.positions;
    if (has_own) {
      const Place at(z, tile.position + own, tile.pair + own_pair);
      const Sample s(z, offset, at);
      const float factor = z.masked != 0 ? float(mask[at.plane]) : 1.0f;
      places[own_pair * STEP + own] = uint2(at.plane, at.vertical);
      factors[own_pair * STEP + own] = factor;
      parts[own_pair * STEP + own] = float2(s.down, s.right);
      pixels[own_pair * STEP + own] = s.pixel(z);
      if (s.inside) {
        const int row = (z.start + tile.position + own) * (z.kernel_height * z.kernel_width) + at.t;
        const int2 cell = cells[s.cell(z)];
        int place = cell.y - cell.x;
#pragma unroll 4
        for (int other = place; other < cell.y; ++other) {
          place += rows[other] < row ? 1 : 0;
        }
        records[place] = int4(as_type<int>(s.down), as_type<int>(s.right), as_type<int>(factor), row);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int lanes = 1 << z.lane_bits, lane = id & (lanes - 1), at_once = threads >> z.lane_bits;
    const int count = tile.positions * tile.pairs;
    for (int base = 0; base < count; base += at_once) {
      const int i = base + (id >> z.lane_bits);
      const int p = tile.position_of(z, min(i, count - 1)), j = min(i, count - 1) - p * tile.pairs;
      const float2 part = parts[j * STEP + p];
      const int2 pixel = pixels[j * STEP + p];
      const int sample = tile.sample(z, p, j), end = i < count ? z.offset_group_channels : 0;
      float a = 0.0f, b = 0.0f, e = 0.0f, f = 0.0f;  // by the four pixels, from the top left on
      for (int c = lane * WIDTH; c < end; c += lanes * WIDTH) {
        float gradient[WIDTH], around[4 * WIDTH];
        load<WIDTH>(by_columns + column_of(z, sample, c), gradient);
        load_pixels<WIDTH>(z, image, pixel, c, around);
#pragma unroll
        for (int w = 0; w < WIDTH; ++w) {
          a += gradient[w] * around[w];
          b += gradient[w] * around[WIDTH + w];
          e += gradient[w] * around[2 * WIDTH + w];
          f += gradient[w] * around[3 * WIDTH + w];
        }
      }
      const float up = 1.0f - part.x, left = 1.0f - part.y;
      float value = up * (left * a + part.y * b) + part.x * (left * e + part.y * f);
      float down = left * (e - a) + part.y * (f - b);
      float right = up * (b - a) + part.x * (f - e);
      for (int distance = lanes / 2; distance > 0; distance /= 2) {
        value += simd_shuffle_xor(value, ushort(distance));
        down += simd_shuffle_xor(down, ushort(distance));
        right += simd_shuffle_xor(right, ushort(distance));
      }
      if (lane == 0 && i < count) {
        values[j * STEP + p] = value;
        by_y[j * STEP + p] = down;
        by_x[j * STEP + p] = right;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (has_own) {
      const uint2 place = places[own_pair * STEP + own];
      const float factor = factors[own_pair * STEP + own];
      by_offset[place.y] = T(factor * by_y[own_pair * STEP + own]);
      by_offset[place.y + uint(z.result_height) * uint(z.result_width)] = T(factor * by_x[own_pair * STEP + own]);
      if (z.masked != 0) {
        by_mask[place.x] = T(values[own_pair * STEP + own]);
      }
    }
  }
}

// by_image[y, x, c] += sum over the samples of the cells (y, x) ... (y + 1, x + 1) of
//     mask * their weight at the pixel * by_columns[c]
//
// Groups: (tiles of cells along x, along y, N * D * blocks), of a simdgroup for each row of cells of a tile, which is
// one cell wider and higher than the pixels that it is for. 2^lane_bits lanes stand for a cell and take WIDTH channels
// each: they sum what it gives to each of its four pixels, and then, for the pixel at its lower right, what the four
// cells around that have. The channels of an offset group take several blocks of these.
template <int WIDTH>
[[kernel, max_total_threads_per_threadgroup(256)]] void deform_conv2d_backward_image(
    device const T* by_columns [[buffer(0)]],
    device const int2* cells [[buffer(1)]],
    device const int4* records [[buffer(2)]],
    device float* by_image [[buffer(3)]],
    constant Sizes& z [[buffer(4)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint3 size [[threads_per_threadgroup]],
    uint index [[thread_index_in_threadgroup]]) {
  threadgroup float upper[WIDTH * GATHER_THREADS];
  threadgroup int counts[GATHER_THREADS];
  const int id = int(index), lanes = 1 << z.lane_bits, lane = id & (lanes - 1);
  const int along = int(size.x) / SIMD, across = SIMD >> z.lane_bits;
  const int i = id / SIMD, j = (id & (SIMD - 1)) >> z.lane_bits;
  const int y = int(group.y) * (along - 1) + i, x = int(group.x) * (across - 1) + j;
  const int blocks = (z.offset_group_channels + lanes * WIDTH - 1) / (lanes * WIDTH);
  const int grid = int(group.z) / blocks, c = ((int(group.z) - grid * blocks) * lanes + lane) * WIDTH;
  const bool exists = c < z.offset_group_channels;
  const int n = grid / z.offset_groups, d = grid - n * z.offset_groups, channel = d * z.offset_group_channels + c;
  const int g = channel / z.group_channels;
  const uint rows = uint(z.column_positions) * uint(z.kernel_height * z.kernel_width);
  const uint from = uint(g) * rows * uint(z.group_channels) + uint(channel - g * z.group_channels);

  float sums[4 * WIDTH];
#pragma unroll
  for (int w = 0; w < 4 * WIDTH; ++w) {
    sums[w] = 0.0f;
  }
  int2 cell = int2(0, 0);
  if (exists && y <= z.height && x <= z.width) {
    cell = cells[(grid * (z.height + 1) + y) * (z.width + 1) + x];
  }
  for (int k = cell.y - cell.x; k < cell.y; k += BATCH) {
    int4 record[BATCH];
    float gradient[BATCH * WIDTH];
#pragma unroll
    for (int r = 0; r < BATCH; ++r) {
      record[r] = records[min(k + r, cell.y - 1)];
    }
#pragma unroll
    for (int r = 0; r < BATCH; ++r) {
      load<WIDTH>(by_columns + (uint(record[r].w) * uint(z.group_channels) + from), gradient + r * WIDTH);
    }
#pragma unroll
    for (int r = 0; r < BATCH; ++r) {
      if (k + r < cell.y) {
        const float right = as_type<float>(record[r].y), left = 1.0f - right, factor = as_type<float>(record[r].z);
        const float low = as_type<float>(record[r].x) * factor, top = (1.0f - as_type<float>(record[r].x)) * factor;
#pragma unroll
        for (int w = 0; w < WIDTH; ++w) {
          sums[w] += (top * left) * gradient[r * WIDTH + w];
          sums[WIDTH + w] += (top * right) * gradient[r * WIDTH + w];
          sums[2 * WIDTH + w] += (low * left) * gradient[r * WIDTH + w];
          sums[3 * WIDTH + w] += (low * right) * gradient[r * WIDTH + w];
        }
      }
    }
  }
  const int count = cell.x + simd_shuffle_down(cell.x, ushort(lanes));
  counts[id] = count;
#pragma unroll
  for (int w = 0; w < WIDTH; ++w) {
    upper[w * GATHER_THREADS + id] = sums[WIDTH + w] + simd_shuffle_down(sums[w], ushort(lanes));
    sums[w] = sums[3 * WIDTH + w] + simd_shuffle_down(sums[2 * WIDTH + w], ushort(lanes));
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (!exists || i == along - 1 || j == across - 1 || y >= z.height || x >= z.width || count + counts[id + SIMD] == 0) {
    return;
  }
  device float* to = by_image + uint(((n * z.height + y) * z.width + x) * z.channels + channel);
  float before[WIDTH];
  load<WIDTH>((device const float*)to, before);
#pragma unroll
  for (int w = 0; w < WIDTH; ++w) {
    before[w] += sums[w] + upper[w * GATHER_THREADS + id + SIMD];
  }
  store<WIDTH>(to, before);
}

#define INSTANTIATE(NAME, WIDTH) template [[host_name(#NAME #WIDTH)]] [[kernel]] decltype(NAME<WIDTH>) NAME<WIDTH>;

#define INSTANTIATE_ALL(WIDTH)                       \
  INSTANTIATE(deform_conv2d_sample, WIDTH)           \
  INSTANTIATE(deform_conv2d_backward_samples, WIDTH) \
  INSTANTIATE(deform_conv2d_backward_image, WIDTH)

INSTANTIATE_ALL(1)
INSTANTIATE_ALL(4)
INSTANTIATE_ALL(8)
