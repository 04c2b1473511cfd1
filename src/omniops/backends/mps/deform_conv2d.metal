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
// segments.metal gives each cell a segment of memory, deform_conv2d_collect writes the rows of its samples there, in
// any order, and deform_conv2d_backward_samples writes a record of each sample at the index that its row has among them.
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

#include "vectors.h"

#include "bilinear.h"

// As deform_conv2d.py has them.
constant constexpr int TILE_PAIRS = 9;
constant constexpr int TILE_POSITIONS = 32;

// The samples of one pair in threadgroup memory: an odd number, so that pairs lie in different banks.
constant constexpr int STEP = TILE_POSITIONS + 1;
constant constexpr int TILE = TILE_PAIRS * STEP;
constant constexpr int GATHER_THREADS = 256;
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

// A position of the launch and a pair of a tap and an offset group: the image, row and column, the tap and the offset
// group, and where their numbers lie in mask (plane) and offset (vertical, horizontal).
struct SampleIndex {
  int n, i, j, t, d;
  uint plane, vertical, horizontal;

  SampleIndex(constant Sizes& z, int p, int pair) {
    const int line = int(uint(z.first + p) / uint(z.result_width));
    n = int(uint(line) / uint(z.result_height));
    i = line - n * z.result_height;
    j = z.first + p - line * z.result_width;
    t = int(uint(pair) / uint(z.offset_groups));
    d = pair - t * z.offset_groups;
    const uint area = uint(z.result_height) * uint(z.result_width), pixel = uint(i * z.result_width + j);
    const uint planes = uint((n * z.offset_groups + d) * (z.kernel_height * z.kernel_width) + t);
    plane = planes * area + pixel;
    vertical = 2 * planes * area + pixel;
    horizontal = vertical + area;
  }
};

// Where that samples: down and right of the pixel (row, column), by so much of a pixel. Outside the map down and right
// are zero; where y or x is not a number, down or right is none either, and the sample is not inside.
struct Sample {
  int n, d, row, column;
  float down, right;
  bool inside;

  Sample(constant Sizes& z, device const T* offset, SampleIndex index) {
    n = index.n;
    d = index.d;
    const int u = int(uint(index.t) / uint(z.kernel_width)), v = index.t - u * z.kernel_width;
    device const T* vertical = offset + index.vertical;
    device const T* horizontal = offset + index.horizontal;
    const float y = float(index.i * z.stride_y - z.padding_y + u * z.dilation_y) + float(*vertical);
    const float x = float(index.j * z.stride_x - z.padding_x + v * z.dilation_x) + float(*horizontal);
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
    const int corners = inside ? corners_on_map(row, column, z.height, z.width) : 0;
    return int2(((n * z.height + row) * z.width + column) * z.channels + d * z.offset_group_channels, corners);
  }
};

// WIDTH channels of each of the four pixels around a sample, from channel c of the offset group on.
template <int WIDTH>
inline void load_pixels(constant Sizes& z, device const T* image, int2 pixel, int c, thread float* to) {
  load_pixels<WIDTH>(image, uint(pixel.x + c), uint(z.channels), uint(z.width * z.channels), pixel.y, to);
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
      const SampleIndex index(z, tile.position + own, tile.pair + own_pair);
      const Sample s(z, offset, index);
      const float up = 1.0f - s.down, left = 1.0f - s.right, factor = z.masked != 0 ? float(mask[index.plane]) : 1.0f;
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
    uint2 gid [[thread_position_in_grid]]) {
  const Sample s(z, offset, SampleIndex(z, int(gid.x), int(gid.y)));
  if (s.inside) {
    atomic_fetch_add_explicit(&cells[2 * uint(s.cell(z))], 1, memory_order_relaxed);
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
  const SampleIndex index(z, p, pair);
  const Sample s(z, offset, index);
  if (s.inside) {
    const int slot = atomic_fetch_add_explicit(&cells[2 * uint(s.cell(z)) + 1], 1, memory_order_relaxed);
    rows[slot] = (z.start + p) * (z.kernel_height * z.kernel_width) + index.t;
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
  threadgroup float2 fractions[TILE];  // down, right
  threadgroup int2 pixels[TILE];
  threadgroup uint2 indices[TILE];  // of their numbers in by_mask and by_offset
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
      const SampleIndex index(z, tile.position + own, tile.pair + own_pair);
      const Sample s(z, offset, index);
      const float factor = z.masked != 0 ? float(mask[index.plane]) : 1.0f;
      indices[own_pair * STEP + own] = uint2(index.plane, index.vertical);
      factors[own_pair * STEP + own] = factor;
      fractions[own_pair * STEP + own] = float2(s.down, s.right);
      pixels[own_pair * STEP + own] = s.pixel(z);
      if (s.inside) {
        const int row = (z.start + tile.position + own) * (z.kernel_height * z.kernel_width) + index.t;
        const int2 cell = cells[s.cell(z)];
        int slot = cell.y - cell.x;
#pragma unroll 4
        for (int other = slot; other < cell.y; ++other) {
          slot += rows[other] < row ? 1 : 0;
        }
        records[slot] = int4(as_type<int>(s.down), as_type<int>(s.right), as_type<int>(factor), row);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int lanes = 1 << z.lane_bits, lane = id & (lanes - 1), at_once = threads >> z.lane_bits;
    const int count = tile.positions * tile.pairs;
    for (int base = 0; base < count; base += at_once) {
      const int i = base + (id >> z.lane_bits);
      const int p = tile.position_of(z, min(i, count - 1)), j = min(i, count - 1) - p * tile.pairs;
      const float2 fraction = fractions[j * STEP + p];
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
      const float up = 1.0f - fraction.x, left = 1.0f - fraction.y;
      float value = up * (left * a + fraction.y * b) + fraction.x * (left * e + fraction.y * f);
      float down = left * (e - a) + fraction.y * (f - b);
      float right = up * (b - a) + fraction.x * (f - e);
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
      const uint2 index = indices[own_pair * STEP + own];
      const float factor = factors[own_pair * STEP + own];
      by_offset[index.y] = T(factor * by_y[own_pair * STEP + own]);
      by_offset[index.y + uint(z.result_height) * uint(z.result_width)] = T(factor * by_x[own_pair * STEP + own]);
      if (z.masked != 0) {
        by_mask[index.x] = T(values[own_pair * STEP + own]);
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

  int2 cell = int2(0, 0);
  if (exists && y <= z.height && x <= z.width) {
    cell = cells[(grid * (z.height + 1) + y) * (z.width + 1) + x];
  }
  float sums[4 * WIDTH];
  sum_samples<WIDTH>(by_columns, records, cell, from, uint(z.group_channels), false, sums);
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
