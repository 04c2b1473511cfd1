// Multi-scale deformable attention on Apple GPUs. omniops/ops/multi_scale_deform_attn.py has the formula and the names.
//
// Tensors are contiguous: value (N, S, M, D), locations (N, Q, M, K, 2), weights (N, Q, M, K), out and grad (N, Q, M, D).
// A thread takes WIDTH channels at a time: 4 or 8 by vector loads, where these divide D and the tensors start at a
// multiple of them; otherwise 1. 2^lane_bits lanes of a simdgroup take the channels of one query and head, and the
// queries that follow each other, of one head, share a threadgroup: they sample neighbouring pixels, which then are in
// the cache. Where a sample lies is worked out by one lane and handed to the others by shuffles. Locations and weights
// are of the type of value or, where Sizes says that they are wide, float. Positions and sums are in float, offsets in
// memory take 32 bits.
//
// The gradient of value is a gather. A cell is a place between four pixels, of one image, head and level: the samples
// with floor(y) = i - 1 and floor(x) = j - 1 lie in cell (i, j) of a grid (H + 1) x (W + 1), and those outside the map,
// or at what is not a number, in none. The method "discrete" has its pixel for floor(y) and floor(x). The samples of a
// batch, which is of some queries of some heads, are counted in their cells, the cells get segments of memory and the
// numbers of the samples are collected there, in any order (segments.metal), and put in order: a thread for each counts
// the smaller numbers of the segment and writes a record of its sample at that index. So
// multi_scale_deform_attn_by_value, which sums what the four cells around a pixel hold, has the order of the samples: no
// atomics on floats, and the same bits every run. No thread goes through more samples than one cell has.
//
// PyTorch compiles without fast math unless PYTORCH_MPS_FAST_MATH is set. Where it is, the compiler may assume that
// there is neither NaN nor infinity; whether a sample is inside is asked of its location's bits in memory first, and a
// finite location is brought near the map before it is multiplied, so that nothing is read out of bounds even then. That
// a sample at NaN is NaN, and one at infinity zero, is not promised then.
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

// As multi_scale_deform_attn.py has them.
constant constexpr int SIMD = 32;
constant constexpr int ROWS = 8;  // of cells that a threadgroup of multi_scale_deform_attn_by_value takes

constant constexpr int GATHER_THREADS = SIMD * ROWS;

// As multi_scale_deform_attn.py lists them.
struct Sizes {
  int queries, heads, pixels, points, channels;              // Q, M, S, K, D
  int first_head, first_query, batch_heads, batch_queries;   // a batch; its heads are counted over the images, n * M + m
  int cells, tiles;                                          // of one head
  int lane_bits;                                             // log2 of the lanes that share the channels
  int discrete;                                              // whether a sample is one pixel
  int wide_locations, wide_weights, wide_value;              // whether these and their gradients are float beside T
  int wanted_locations, wanted_weights;                      // whether these gradients are
  int adds;                                                  // whether the gradient of value has sums of other batches
};

// Each level; height and width are 0 where it has no pixels.
struct Level {
  int height, width;
  int pixel;      // the first
  int end_point;  // the number of points to the end of this level
  int cell;       // the first of a head
  int end_tile;   // the number of tiles of cells to the end of this level
};

inline float number(device const T* from, uint index, int wide) {
  return wide != 0 ? ((device const float*)from)[index] : float(from[index]);
}
inline bool is_finite(device const T* from, uint index, int wide) {
  return wide != 0 ? is_finite((device const float*)from + index) : is_finite(from + index);
}
inline bool is_infinity(device const T* from, uint index, int wide) {
  return wide != 0 ? is_infinity((device const float*)from + index) : is_infinity(from + index);
}
inline void put(device T* to, uint index, float value, int wide) {
  if (wide != 0) {
    ((device float*)to)[index] = value;
  } else {
    to[index] = T(value);
  }
}

// In pixels. The product is rounded before the sum, as on other devices, whose nearest pixel is to be the same.
inline float scaled(float location, int size, float shift) {
#pragma METAL fp contract(off)
  const float product = location * float(size);
  return product + shift;
}

// The pixel that the method "discrete" takes on an axis of so many. It asks the bits of a location that is not finite, so
// that each kernel finds the same, with fast math too.
inline int nearest(device const T* locations, uint index, int wide, int size) {
  if (!is_finite(locations, index, wide)) {
    return is_infinity(locations, index, wide) ? size - 1 : 0;
  }
  // Farther outside of the map is as far as this.
  const float position = scaled(clamp(number(locations, index, wide), -1.0f, 2.0f), size, 0.5f);
  return min(int(clamp(position, 0.0f, float(size))), size - 1);
}

// Where a point of a query and a head samples: down and right of the pixel (row, column), by so much of a pixel. Outside
// the map down and right are zero; where a location is not a number, down or right is none either. What is not inside has
// no cell.
struct Sample {
  int row, column, height, width;
  int pixel;  // (row, column) among all, perhaps before its level
  int cell;   // of the head
  float down, right, factor;
  bool inside;

  Sample(
      constant Sizes& z, constant Level* levels, device const T* locations, device const T* weights, uint index, int k) {
    int l = 0;
    while (k >= levels[l].end_point) {
      ++l;
    }
    height = levels[l].height;
    width = levels[l].width;
    const bool exists = height > 0;
    factor = exists ? number(weights, index, z.wide_weights) : 0.0f;
    row = 0;
    column = 0;
    down = 0.0f;
    right = 0.0f;
    if (z.discrete != 0) {
      inside = exists;
      if (exists) {
        row = nearest(locations, 2 * index + 1, z.wide_locations, height);
        column = nearest(locations, 2 * index, z.wide_locations, width);
      }
    } else {
      const bool finite =
          is_finite(locations, 2 * index, z.wide_locations) && is_finite(locations, 2 * index + 1, z.wide_locations);
      const float x = number(locations, 2 * index, z.wide_locations);
      const float y = number(locations, 2 * index + 1, z.wide_locations);
      // Farther outside of the map is as far as this.
      const float i = scaled(finite ? clamp(y, -2.0f, 3.0f) : y, height, -0.5f);
      const float j = scaled(finite ? clamp(x, -2.0f, 3.0f) : x, width, -0.5f);
      const bool outside = !exists || i <= -1.0f || i >= float(height) || j <= -1.0f || j >= float(width);
      inside = exists && finite && i > -1.0f && i < float(height) && j > -1.0f && j < float(width);
      const float top = floor(i), left = floor(j);
      row = inside ? int(top) : 0;
      column = inside ? int(left) : 0;
      down = outside ? 0.0f : i - top;
      right = outside ? 0.0f : j - left;
    }
    pixel = levels[l].pixel + row * width + column;
    cell = levels[l].cell + (row + 1) * (width + 1) + column + 1;
  }

  // Which of the four pixels there are, as bits: top left, top right, low left, low right; and the width of the map.
  int corners(constant Sizes& z) const {
    if (z.discrete != 0) {
      return (inside ? 1 : 0) | width << 4;
    }
    return (inside ? corners_on_map(row, column, height, width) : 0) | width << 4;
  }
};

// Where the numbers of the first point of a query and a head lie in weights; head counts over the images.
inline uint first_point(constant Sizes& z, int head, int query) {
  const int n = int(uint(head) / uint(z.heads)), m = head - n * z.heads;
  return (uint(n * z.queries + query) * uint(z.heads) + uint(m)) * uint(z.points);
}

// Where the first channel of row i of an image's head lies in a tensor that has so many rows an image.
inline uint first_channel(constant Sizes& z, int head, int rows, int i) {
  const int n = int(uint(head) / uint(z.heads)), m = head - n * z.heads;
  return (uint(n * rows + i) * uint(z.heads) + uint(m)) * uint(z.channels);
}

// WIDTH channels of each of the four pixels around a sample, of which the first begins at from. corners is Sample's.
template <int WIDTH>
inline void load_pixels(constant Sizes& z, device const T* value, uint from, int corners, thread float* to) {
  const uint right = uint(z.heads) * uint(z.channels);
  load_pixels<WIDTH>(value, from, right, uint(corners >> 4) * right, corners & 15, to);
}

// out[n, q, m, c] = sum over k of weights[n, q, m, k] * bilinear(value_l[n, m, c], y, x)
//
// Groups: (queries, N * M * blocks of channels).
template <int WIDTH>
[[kernel, max_total_threads_per_threadgroup(256)]] void multi_scale_deform_attn_forward(
    device const T* value [[buffer(0)]],
    device const T* locations [[buffer(1)]],
    device const T* weights [[buffer(2)]],
    device T* out [[buffer(3)]],
    constant Sizes& z [[buffer(4)]],
    constant Level* levels [[buffer(5)]],
    uint2 gid [[thread_position_in_grid]],
    uint simd_lane [[thread_index_in_simdgroup]]) {
  const int lanes = 1 << z.lane_bits, lane = int(simd_lane) & (lanes - 1), base = int(simd_lane) - lane;
  const int blocks = (z.channels - 1) / (lanes * WIDTH) + 1;
  const int head = int(gid.y) / blocks, c = ((int(gid.y) - head * blocks) * lanes + lane) * WIDTH;
  const int own = int(gid.x) >> z.lane_bits, query = min(own, z.queries - 1);
  const bool exists = own < z.queries && c < z.channels;
  const uint point = first_point(z, head, query), across = uint(z.heads) * uint(z.channels);
  const uint from = first_channel(z, head, z.pixels, 0) + uint(c);
  float sums[WIDTH];
#pragma unroll
  for (int w = 0; w < WIDTH; ++w) {
    sums[w] = 0.0f;
  }
  for (int first = 0; first < z.points; first += lanes) {
    const int k = min(first + lane, z.points - 1);
    const Sample s(z, levels, locations, weights, point + uint(k), k);
    const int corners = s.corners(z);
    const float up = 1.0f - s.down, left = 1.0f - s.right;
    // Of one pixel alone the others' weights are zero, where a factor is infinite too.
    const float factor = z.discrete != 0 ? 0.0f : s.factor;
    const float top_left = z.discrete != 0 ? s.factor : s.factor * (up * left), top_right = factor * (up * s.right);
    const float low_left = factor * (s.down * left), low_right = factor * (s.down * s.right);
    const int count = min(lanes, z.points - first);
    for (int i = 0; i < count; ++i) {
      const ushort source = ushort(base + i);
      const int pixel = simd_shuffle(s.pixel, source), around = simd_shuffle(corners, source);
      const float a = simd_shuffle(top_left, source), b = simd_shuffle(top_right, source);
      const float e = simd_shuffle(low_left, source), f = simd_shuffle(low_right, source);
      float pixels[4 * WIDTH];
      load_pixels<WIDTH>(z, value, from + uint(pixel) * across, exists ? around : 0, pixels);
#pragma unroll
      for (int w = 0; w < WIDTH; ++w) {
        sums[w] += a * pixels[w] + b * pixels[WIDTH + w] + e * pixels[2 * WIDTH + w] + f * pixels[3 * WIDTH + w];
      }
    }
  }
  if (exists) {
    store<WIDTH>(out + (first_channel(z, head, z.queries, query) + uint(c)), sums);
  }
}

// by_weights[n, q, m, k] = sum over the channels c of grad[n, q, m, c] * bilinear(value_l[n, m, c], y, x)
// by_locations[n, q, m, k] = weights[n, q, m, k] * (W_l, H_l) * the same sum with the derivatives of bilinear by x and y
//
// Groups: (queries, N * M). The lanes of a query are summed by shuffles, always in the same order; each keeps the sums of
// the sample whose position it worked out.
template <int WIDTH>
[[kernel, max_total_threads_per_threadgroup(256)]] void multi_scale_deform_attn_by_points(
    device const T* grad [[buffer(0)]],
    device const T* value [[buffer(1)]],
    device const T* locations [[buffer(2)]],
    device const T* weights [[buffer(3)]],
    device T* by_locations [[buffer(4)]],
    device T* by_weights [[buffer(5)]],
    constant Sizes& z [[buffer(6)]],
    constant Level* levels [[buffer(7)]],
    uint2 gid [[thread_position_in_grid]],
    uint simd_lane [[thread_index_in_simdgroup]]) {
  const int lanes = 1 << z.lane_bits, lane = int(simd_lane) & (lanes - 1), base = int(simd_lane) - lane;
  const int head = int(gid.y), own = int(gid.x) >> z.lane_bits, query = min(own, z.queries - 1);
  const uint point = first_point(z, head, query), across = uint(z.heads) * uint(z.channels);
  const uint from = first_channel(z, head, z.pixels, 0), row = first_channel(z, head, z.queries, query);
  const uint end = own < z.queries ? uint(z.channels) : 0, first_own = uint(lane * WIDTH);
  const bool once = z.channels <= lanes * WIDTH;
  float gradient[WIDTH];
  if (once && first_own < end) {
    load<WIDTH>(grad + (row + first_own), gradient);
  }
  for (int first = 0; first < z.points; first += lanes) {
    const int k = min(first + lane, z.points - 1);
    const Sample s(z, levels, locations, weights, point + uint(k), k);
    const int corners = s.corners(z);
    float4 own_sums = float4(0.0f);
    const int count = min(lanes, z.points - first);
    for (int i = 0; i < count; ++i) {
      const ushort source = ushort(base + i);
      const int pixel = simd_shuffle(s.pixel, source), around = simd_shuffle(corners, source);
      float a = 0.0f, b = 0.0f, e = 0.0f, f = 0.0f;  // by the four pixels, from the top left on
      for (uint c = first_own; c < end; c += uint(lanes * WIDTH)) {
        if (!once) {
          load<WIDTH>(grad + (row + c), gradient);
        }
        float pixels[4 * WIDTH];
        load_pixels<WIDTH>(z, value, from + uint(pixel) * across + c, around, pixels);
#pragma unroll
        for (int w = 0; w < WIDTH; ++w) {
          a += gradient[w] * pixels[w];
          b += gradient[w] * pixels[WIDTH + w];
          e += gradient[w] * pixels[2 * WIDTH + w];
          f += gradient[w] * pixels[3 * WIDTH + w];
        }
      }
      for (int distance = lanes / 2; distance > 0; distance /= 2) {
        a += simd_shuffle_xor(a, ushort(distance));
        b += simd_shuffle_xor(b, ushort(distance));
        e += simd_shuffle_xor(e, ushort(distance));
        f += simd_shuffle_xor(f, ushort(distance));
      }
      own_sums = i == lane ? float4(a, b, e, f) : own_sums;
    }
    if (own < z.queries && first + lane < z.points) {
      const float a = own_sums.x, b = own_sums.y, e = own_sums.z, f = own_sums.w;
      const float up = 1.0f - s.down, left = 1.0f - s.right;
      const float sample = z.discrete != 0 ? a : up * (left * a + s.right * b) + s.down * (left * e + s.right * f);
      const float by_y = left * (e - a) + s.right * (f - b), by_x = up * (b - a) + s.down * (f - e);
      const bool has_derivative = z.discrete == 0 && s.height > 0;
      const uint index = point + uint(k);
      if (z.wanted_weights != 0) {
        put(by_weights, index, s.height > 0 ? sample : 0.0f, z.wide_weights);
      }
      if (z.wanted_locations != 0) {
        put(by_locations, 2 * index, has_derivative ? s.factor * float(s.width) * by_x : 0.0f, z.wide_locations);
        put(by_locations, 2 * index + 1, has_derivative ? s.factor * float(s.height) * by_y : 0.0f, z.wide_locations);
      }
    }
  }
}

// A sample of the batch: its head in the batch, the query and the point, and the index of its weight.
struct SampleIndex {
  int head, query, point;
  uint weight;

  SampleIndex(constant Sizes& z, int head_of_batch, int query_and_point) {
    const int q = int(uint(query_and_point) / uint(z.points));
    head = head_of_batch;
    query = z.first_query + q;
    point = query_and_point - q * z.points;
    weight = first_point(z, z.first_head + head, query) + uint(point);
  }
};

// Writes the cell of each sample, -1 where it has none, and adds one to the first number of the cell. What follows asks no
// location for a cell again: a compiler might round it otherwise there.
//
// Grid: (queries * K, heads) of the batch.
[[kernel, max_total_threads_per_threadgroup(256)]] void multi_scale_deform_attn_count(
    device const T* locations [[buffer(0)]],
    device const T* weights [[buffer(1)]],
    device atomic_int* cells [[buffer(2)]],
    device int* cell_of [[buffer(3)]],
    constant Sizes& z [[buffer(4)]],
    constant Level* levels [[buffer(5)]],
    uint2 grid [[thread_position_in_grid]]) {
  const SampleIndex index(z, int(grid.y), int(grid.x));
  const Sample s(z, levels, locations, weights, index.weight, index.point);
  const int cell = s.inside ? index.head * z.cells + s.cell : -1;
  cell_of[index.head * (z.batch_queries * z.points) + int(grid.x)] = cell;
  if (cell >= 0) {
    atomic_fetch_add_explicit(&cells[2 * uint(cell)], 1, memory_order_relaxed);
  }
}

// Writes a record of each sample at the index that its number has in the segment of its cell: three floats' bits (the
// parts of a pixel that it lies below and to the right of its cell's first pixel, and its weight) and its query.
//
// Grid: (samples of the batch), of which as many are there as used says.
[[kernel, max_total_threads_per_threadgroup(256)]] void multi_scale_deform_attn_order(
    device const T* locations [[buffer(0)]],
    device const T* weights [[buffer(1)]],
    device const int2* cells [[buffer(2)]],
    device const int* used [[buffer(3)]],
    device const int* cell_of [[buffer(4)]],
    device const int* samples [[buffer(5)]],
    device int4* records [[buffer(6)]],
    constant Sizes& z [[buffer(7)]],
    constant Level* levels [[buffer(8)]],
    uint grid [[thread_position_in_grid]]) {
  if (int(grid) >= *used) {
    return;
  }
  const int sample = samples[grid], of_head = z.batch_queries * z.points;
  const int head = int(uint(sample) / uint(of_head));
  const SampleIndex index(z, head, sample - head * of_head);
  const Sample s(z, levels, locations, weights, index.weight, index.point);
  const int2 cell = cells[cell_of[sample]];
  int slot = cell.y - cell.x;
#pragma unroll 4
  for (int other = cell.y - cell.x; other < cell.y; ++other) {
    slot += samples[other] < sample ? 1 : 0;
  }
  records[slot] = int4(as_type<int>(s.down), as_type<int>(s.right), as_type<int>(s.factor), index.query);
}

// by_value[n, pixel, m, c] = sum over the samples of the four cells around the pixel of
//     weight * their part of the pixel * grad[n, q, m, c]
// added to what is there where Sizes says so.
//
// Groups: (tiles of cells of all levels, heads of the batch * blocks of channels), of a simdgroup for each of ROWS rows of
// cells of a tile, which is one cell wider and higher than the pixels that it is for. 2^lane_bits lanes stand for a cell
// and take WIDTH channels each: they sum what it gives to each of its four pixels, and then, for the pixel at its lower
// right, what the four cells around that have. The last level comes first: where it has the fewest pixels, its cells have
// the most samples.
template <int WIDTH>
[[kernel, max_total_threads_per_threadgroup(256)]] void multi_scale_deform_attn_by_value(
    device const T* grad [[buffer(0)]],
    device const int2* cells [[buffer(1)]],
    device const int4* records [[buffer(2)]],
    device T* by_value [[buffer(3)]],
    constant Sizes& z [[buffer(4)]],
    constant Level* levels [[buffer(5)]],
    uint2 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]]) {
  threadgroup float upper[WIDTH * GATHER_THREADS];
  threadgroup int counts[GATHER_THREADS];
  const int id = int(index), lanes = 1 << z.lane_bits, lane = id & (lanes - 1), across = SIMD >> z.lane_bits;
  int l = 0, tile = z.tiles - 1 - int(group.x);
  while (tile >= levels[l].end_tile) {
    ++l;
  }
  const int height = levels[l].height, width = levels[l].width;
  tile -= l > 0 ? levels[l - 1].end_tile : 0;
  const int tiles_across = (width + across - 2) / (across - 1), tile_row = tile / tiles_across;
  const int i = id / SIMD, j = (id & (SIMD - 1)) >> z.lane_bits;
  const int y = tile_row * (ROWS - 1) + i, x = (tile - tile_row * tiles_across) * (across - 1) + j;
  const int blocks = (z.channels - 1) / (lanes * WIDTH) + 1;
  const int head = int(group.y) / blocks, c = ((int(group.y) - head * blocks) * lanes + lane) * WIDTH;
  const bool exists = c < z.channels;
  const uint from = first_channel(z, z.first_head + head, z.queries, 0) + uint(c);

  int2 cell = int2(0, 0);
  if (exists && y <= height && x <= width) {
    cell = cells[head * z.cells + levels[l].cell + y * (width + 1) + x];
  }
  float sums[4 * WIDTH];
  sum_samples<WIDTH>(grad, records, cell, from, uint(z.heads) * uint(z.channels), z.discrete != 0, sums);
  const int count = cell.x + simd_shuffle_down(cell.x, ushort(lanes));
  counts[id] = count;
#pragma unroll
  for (int w = 0; w < WIDTH; ++w) {
    upper[w * GATHER_THREADS + id] = sums[WIDTH + w] + simd_shuffle_down(sums[w], ushort(lanes));
    sums[w] = sums[3 * WIDTH + w] + simd_shuffle_down(sums[2 * WIDTH + w], ushort(lanes));
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (!exists || i == ROWS - 1 || j == across - 1 || y >= height || x >= width) {
    return;
  }
#pragma unroll
  for (int w = 0; w < WIDTH; ++w) {
    sums[w] += upper[w * GATHER_THREADS + id + SIMD];
  }
  const uint to = first_channel(z, z.first_head + head, z.pixels, levels[l].pixel + y * width + x) + uint(c);
  if (z.adds != 0) {
    if (count + counts[id + SIMD] == 0) {
      return;
    }
    float before[WIDTH];
    if (z.wide_value != 0) {
      load<WIDTH>((device const float*)by_value + to, before);
    } else {
      load<WIDTH>((device const T*)by_value + to, before);
    }
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) {
      sums[w] += before[w];
    }
  }
  if (z.wide_value != 0) {
    store<WIDTH>((device float*)by_value + to, sums);
  } else {
    store<WIDTH>(by_value + to, sums);
  }
}

#define INSTANTIATE(NAME, WIDTH) template [[host_name(#NAME #WIDTH)]] [[kernel]] decltype(NAME<WIDTH>) NAME<WIDTH>;

#define INSTANTIATE_ALL(WIDTH)                         \
  INSTANTIATE(multi_scale_deform_attn_forward, WIDTH)   \
  INSTANTIATE(multi_scale_deform_attn_by_points, WIDTH) \
  INSTANTIATE(multi_scale_deform_attn_by_value, WIDTH)

INSTANTIATE_ALL(1)
INSTANTIATE_ALL(4)
INSTANTIATE_ALL(8)
