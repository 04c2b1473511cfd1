// Deformable convolution on Apple GPUs: the columns and their gradients. omniops/ops/deform_conv2d.py has the formula
// and the names, omniops/backends/columns.py what columns are.
//
// Tensors are contiguous. image and by_image are (N, H, W, C), columns (G, P, K, C / G), offset (N, D * K * 2, H_out,
// W_out), mask (N, D * K, H_out, W_out), where N counts the images that the launch is about. Threads that lie together
// run along the channels, WIDTH at a time: 4 by vector loads, where 4 divides the channels of a weight group and those
// of an offset group and the tensors start at a multiple of four elements; otherwise 1. Sums are in float.
//
// A launch is about the positions of the result first ... first + positions - 1, counted from the first of its images;
// they are the rows start ... of the columns, of which there are column_positions. Offsets within an image and within
// the columns take 32 bits, the step to an image is taken in 64.
//
// The gradient of the image is a gather. A cell is a place between four pixels, of one image and offset group: the
// samples with floor(y) = i - 1 and floor(x) = j - 1 lie in cell (i, j) of a grid (H + 1) x (W + 1), and those outside
// the map, or at what is not a number, in none. deform_conv2d_backward_samples links the samples of a cell into a list,
// in any order, deform_conv2d_sort puts each list in the order of the samples, and deform_conv2d_backward_image sums
// what the four cells around a pixel hold: no atomics on floats, and the same bits every run. A sample is known by its
// number d * positions * K + p * K + t. Four ints are kept of it: three floats' bits (the parts of a pixel that it lies
// below and to the right of its cell's first pixel, and its mask), and the next sample of its list, or -1.
//
// PyTorch compiles without fast math unless PYTORCH_MPS_FAST_MATH is set. Where it is, the compiler may assume that
// there is neither NaN nor infinity; whether a sample is inside is asked of its bits first, so that nothing is read out
// of bounds even then. That a sample at NaN is NaN, and one at infinity zero, is not promised then.
//
// ASCII and Metal 3.1 only: PyTorch hands the source to the compiler so.

#include <metal_stdlib>
using namespace metal;

constant constexpr int QUADS = 4;  // of WIDTH channels each, that a thread of deform_conv2d_backward_image sums

// As deform_conv2d.py lists them.
struct Sizes {
  int height, width, channels;
  int result_height, result_width;
  int kernel_height, kernel_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  int offset_groups, offset_group_channels, group_channels;
  int first, positions, start, column_positions;
  int lane_bits;  // log2 of the lanes of a simdgroup that share the channels of one sample or pixel
  int masked;     // whether there is a mask
};

template <typename T, int WIDTH>
struct Channels;
template <typename T>
struct Channels<T, 1> {
  using floats = float;
};
template <>
struct Channels<float, 4> {
  using floats = float4;
  using stored = float4;
};
template <>
struct Channels<half, 4> {
  using floats = float4;
  using stored = half4;
};
template <>
struct Channels<bfloat, 4> {
  using floats = float4;
  using stored = bfloat4;
};

template <typename T>
inline void load(device const T* from, thread float& to) {
  to = float(*from);
}
template <typename T>
inline void load(device const T* from, thread float4& to) {
  const typename Channels<T, 4>::stored value = *(device const typename Channels<T, 4>::stored*)from;
  to = float4(float(value.x), float(value.y), float(value.z), float(value.w));
}
template <typename T>
inline void store(device T* to, float value) {
  *to = T(value);
}
template <typename T>
inline void store(device T* to, float4 value) {
  typename Channels<T, 4>::stored stored;
  stored.x = T(value.x);
  stored.y = T(value.y);
  stored.z = T(value.z);
  stored.w = T(value.w);
  *(device typename Channels<T, 4>::stored*)to = stored;
}
inline float total(float value) {
  return value;
}
inline float total(float4 value) {
  return (value.x + value.y) + (value.z + value.w);
}

inline bool is_finite(float value) {
  return (as_type<uint>(value) & 0x7fffffffu) < 0x7f800000u;
}

// Position p of the launch: its image, row and column.
struct Position {
  int n, i, j;

  Position(constant Sizes& z, int p) {
    const int row = (z.first + p) / z.result_width;
    n = row / z.result_height;
    i = row - n * z.result_height;
    j = z.first + p - row * z.result_width;
  }
};

// Where a tap samples the image: down and right of the pixel (row, column), by so much of a pixel. inside says that it
// does, top_left ... low_right which of the four pixels around it are in the map. Outside down and right are zero;
// where y or x is not a number, down or right is none either, and the sample is not inside.
struct Sample {
  int row, column;
  float down, right, mask;
  bool inside, top_left, top_right, low_left, low_right;
};

template <typename T>
inline Sample sample_at(
    constant Sizes& z, device const T* offset, device const T* mask, Position at, int d, int u, int v) {
  const int plane = z.result_height * z.result_width, place = at.i * z.result_width + at.j;
  const int taps = z.kernel_height * z.kernel_width, tap = d * taps + u * z.kernel_width + v;
  const long planes = long(at.n) * (z.offset_groups * taps);
  offset += 2 * planes * plane + (2 * tap * plane + place);
  const float y = float(at.i * z.stride_y - z.padding_y + u * z.dilation_y) + float(offset[0]);
  const float x = float(at.j * z.stride_x - z.padding_x + v * z.dilation_x) + float(offset[plane]);
  const bool outside = y < -1.0f || y >= float(z.height) || x < -1.0f || x >= float(z.width);
  Sample s;
  s.inside = is_finite(y) && is_finite(x) && y >= -1.0f && y < float(z.height) && x >= -1.0f && x < float(z.width);
  const float top = floor(y), left = floor(x);
  s.row = s.inside ? int(top) : 0;
  s.column = s.inside ? int(left) : 0;
  s.down = outside ? 0.0f : y - top;
  s.right = outside ? 0.0f : x - left;
  s.mask = z.masked != 0 ? float(mask[planes * plane + (tap * plane + place)]) : 1.0f;
  s.top_left = s.inside && s.row >= 0 && s.column >= 0;
  s.top_right = s.inside && s.row >= 0 && s.column + 1 < z.width;
  s.low_left = s.inside && s.row + 1 < z.height && s.column >= 0;
  s.low_right = s.inside && s.row + 1 < z.height && s.column + 1 < z.width;
  return s;
}

// The four pixels around a sample, from channel c on; zero outside the map.
template <typename T, int WIDTH>
struct Pixels {
  typename Channels<T, WIDTH>::floats top_left, top_right, low_left, low_right;

  Pixels(constant Sizes& z, device const T* image, Sample s, int c) {
    using Floats = typename Channels<T, WIDTH>::floats;
    const int next_row = z.width * z.channels;
    device const T* from = image + (s.row * next_row + s.column * z.channels + c);
    top_left = top_right = low_left = low_right = Floats(0.0f);
    if (s.top_left) {
      load(from, top_left);
    }
    if (s.top_right) {
      load(from + z.channels, top_right);
    }
    if (s.low_left) {
      load(from + next_row, low_left);
    }
    if (s.low_right) {
      load(from + next_row + z.channels, low_right);
    }
  }
};

// Where channel c of tap 0 of row 0 lies in the columns; a tap is group_channels further, a row K of these.
inline uint column_of(constant Sizes& z, int c) {
  const int g = z.group_channels == z.channels ? 0 : c / z.group_channels;
  const int rows = z.column_positions * z.kernel_height * z.kernel_width;
  return uint(g * rows) * uint(z.group_channels) + uint(c - g * z.group_channels);
}

// columns[p, t, c] = mask[p, t] * bilinear(image[c], y, x)
//
// Grid: (channels / WIDTH, positions). A thread takes the taps in turn, so that the pixels that they share stay in the
// cache.
template <typename T, int WIDTH>
[[kernel, max_total_threads_per_threadgroup(256)]] void deform_conv2d_sample(
    device const T* image [[buffer(0)]],
    device const T* offset [[buffer(1)]],
    device const T* mask [[buffer(2)]],
    device T* columns [[buffer(3)]],
    constant Sizes& z [[buffer(4)]],
    uint2 at [[thread_position_in_grid]]) {
  const int c = int(at.x) * WIDTH, p = int(at.y);
  const int d = c / z.offset_group_channels;
  const Position position(z, p);
  image += long(position.n) * (z.height * z.width * z.channels);
  const int taps = z.kernel_height * z.kernel_width;
  columns += column_of(z, c) + uint((z.start + p) * taps) * uint(z.group_channels);
  for (int u = 0; u < z.kernel_height; ++u) {
    for (int v = 0; v < z.kernel_width; ++v) {
      const Sample s = sample_at(z, offset, mask, position, d, u, v);
      const Pixels<T, WIDTH> pixels(z, image, s, c);
      const float up = 1.0f - s.down, left = 1.0f - s.right;
      store(columns, s.mask * ((up * left) * pixels.top_left + (up * s.right) * pixels.top_right +
                               (s.down * left) * pixels.low_left + (s.down * s.right) * pixels.low_right));
      columns += z.group_channels;
    }
  }
}

// by_mask[p, t] = sum over the channels c of offset group d of by_columns[p, t, c] * bilinear(image[c], y, x)
// by_offset[p, t] = mask[p, t] * the same sum with the derivatives of bilinear by y and x
// and the list of each cell, see above. heads is -1 before.
//
// Grid: (lanes * positions, K, D), lanes = 2^lane_bits. So many lanes of a simdgroup share the channels of one sample,
// and are summed by shuffles, always in the same order.
template <typename T, int WIDTH>
[[kernel, max_total_threads_per_threadgroup(512)]] void deform_conv2d_backward_samples(
    device const T* by_columns [[buffer(0)]],
    device const T* image [[buffer(1)]],
    device const T* offset [[buffer(2)]],
    device const T* mask [[buffer(3)]],
    device T* by_offset [[buffer(4)]],
    device T* by_mask [[buffer(5)]],
    device atomic_int* heads [[buffer(6)]],
    device int4* links [[buffer(7)]],
    constant Sizes& z [[buffer(8)]],
    uint3 at [[thread_position_in_grid]]) {
  using Floats = typename Channels<T, WIDTH>::floats;
  const int lanes = 1 << z.lane_bits;
  const int lane = int(at.x) & (lanes - 1), p = int(at.x) >> z.lane_bits, t = int(at.y), d = int(at.z);
  const int taps = z.kernel_height * z.kernel_width;
  const int u = t / z.kernel_width, v = t - u * z.kernel_width;
  const Position position(z, p);
  const Sample s = sample_at(z, offset, mask, position, d, u, v);
  image += long(position.n) * (z.height * z.width * z.channels);
  by_columns += uint((z.start + p) * taps + t) * uint(z.group_channels);

  Floats top_left = Floats(0.0f), top_right = Floats(0.0f), low_left = Floats(0.0f), low_right = Floats(0.0f);
  const int end = (d + 1) * z.offset_group_channels;
  for (int c = d * z.offset_group_channels + lane * WIDTH; c < end; c += lanes * WIDTH) {
    Floats gradient;
    load(by_columns + column_of(z, c), gradient);
    const Pixels<T, WIDTH> pixels(z, image, s, c);
    top_left += gradient * pixels.top_left;
    top_right += gradient * pixels.top_right;
    low_left += gradient * pixels.low_left;
    low_right += gradient * pixels.low_right;
  }
  const float a = total(top_left), b = total(top_right), e = total(low_left), f = total(low_right);
  const float up = 1.0f - s.down, left = 1.0f - s.right;
  float value = up * (left * a + s.right * b) + s.down * (left * e + s.right * f);
  float by_y = left * (e - a) + s.right * (f - b);
  float by_x = up * (b - a) + s.down * (f - e);
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value += simd_shuffle_xor(value, ushort(distance));
    by_y += simd_shuffle_xor(by_y, ushort(distance));
    by_x += simd_shuffle_xor(by_x, ushort(distance));
  }
  if (lane != 0) {
    return;
  }
  const int plane = z.result_height * z.result_width, place = position.i * z.result_width + position.j;
  const long planes = long(position.n) * (z.offset_groups * taps);
  const int tap = d * taps + t;
  by_offset += 2 * planes * plane + (2 * tap * plane + place);
  by_offset[0] = T(s.mask * by_y);
  by_offset[plane] = T(s.mask * by_x);
  if (z.masked != 0) {
    by_mask[planes * plane + (tap * plane + place)] = T(value);
  }
  if (s.inside) {
    const int sample = (d * z.positions + p) * taps + t;
    const int grid = position.n * z.offset_groups + d;
    const int cell = (grid * (z.height + 1) + s.row + 1) * (z.width + 1) + s.column + 1;
    const int next = atomic_exchange_explicit(&heads[cell], sample, memory_order_relaxed);
    links[sample] = int4(as_type<int>(s.down), as_type<int>(s.right), as_type<int>(s.mask), next);
  }
}

// Sorts the list of each cell, the first sample first, by merging runs of 1, 2, 4, ... samples: in place, and in
// n log n steps however many samples meet in one cell.
//
// Grid: (cells).
[[kernel, max_total_threads_per_threadgroup(256)]] void deform_conv2d_sort(
    device int* heads [[buffer(0)]],
    device int* links [[buffer(1)]],
    uint cell [[thread_position_in_grid]]) {
  device int* next = links + 3;  // of sample s: next[4 * s]
  int head = heads[cell];
  if (head < 0) {
    return;
  }
  int runs = 2;
  for (int length = 1; runs > 1; length *= 2) {
    int left = head, last = -1;
    runs = 0;
    while (left >= 0) {
      ++runs;
      int right = left, left_count = 0, right_count = length;
      while (left_count < length && right >= 0) {
        ++left_count;
        right = next[4 * right];
      }
      while (left_count > 0 || (right_count > 0 && right >= 0)) {
        int least;
        if (left_count > 0 && (right_count == 0 || right < 0 || left < right)) {
          least = left;
          left = next[4 * left];
          --left_count;
        } else {
          least = right;
          right = next[4 * right];
          --right_count;
        }
        if (last < 0) {
          head = least;
        } else {
          next[4 * last] = least;
        }
        last = least;
      }
      left = right;
    }
    next[4 * last] = -1;
  }
  heads[cell] = head;
}

// by_image[y, x, c] += sum over the samples of the cells (y, x) ... (y + 1, x + 1) of
//     mask * their weight at the pixel * by_columns[c]
//
// Grid: (lanes * W, H, N * D * blocks), lanes = 2^lane_bits. So many lanes of a simdgroup stand for one pixel, and each
// sums QUADS times WIDTH of its channels; the channels of an offset group take several blocks of these.
template <typename T, int WIDTH>
[[kernel, max_total_threads_per_threadgroup(256)]] void deform_conv2d_backward_image(
    device const T* by_columns [[buffer(0)]],
    device const int* heads [[buffer(1)]],
    device const int4* links [[buffer(2)]],
    device float* by_image [[buffer(3)]],
    constant Sizes& z [[buffer(4)]],
    uint3 at [[thread_position_in_grid]]) {
  using Floats = typename Channels<T, WIDTH>::floats;
  const int lanes = 1 << z.lane_bits, step = lanes * WIDTH;
  const int lane = int(at.x) & (lanes - 1), x = int(at.x) >> z.lane_bits, y = int(at.y);
  const int blocks = (z.offset_group_channels + step * QUADS - 1) / (step * QUADS);
  const int grid = int(at.z) / blocks, block = int(at.z) - grid * blocks;
  const int n = grid / z.offset_groups, d = grid - n * z.offset_groups;
  const int first = d * z.offset_group_channels + block * step * QUADS + lane * WIDTH;
  const int end = (d + 1) * z.offset_group_channels;
  const int taps = z.kernel_height * z.kernel_width;

  uint columns[QUADS];
  Floats sums[QUADS];
#pragma unroll
  for (int q = 0; q < QUADS; ++q) {
    columns[q] = column_of(z, min(first + q * step, end - 1));
    sums[q] = Floats(0.0f);
  }
  by_columns += uint(z.start * taps) * uint(z.group_channels);
  const int first_sample = d * z.positions * taps;
  bool any = false;
#pragma unroll 1
  for (int corner = 0; corner < 4; ++corner) {
    const bool above = corner < 2, before = corner % 2 == 0;  // whether the cell lies so from the pixel
    const int cell = (grid * (z.height + 1) + y + (above ? 0 : 1)) * (z.width + 1) + x + (before ? 0 : 1);
    for (int sample = heads[cell]; sample >= 0;) {
      const int4 link = links[sample];
      const float down = as_type<float>(link.x), right = as_type<float>(link.y);
      const float weight = (above ? down : 1.0f - down) * (before ? right : 1.0f - right) * as_type<float>(link.z);
      device const T* from = by_columns + uint(sample - first_sample) * uint(z.group_channels);
#pragma unroll
      for (int q = 0; q < QUADS; ++q) {
        if (first + q * step < end) {
          Floats gradient;
          load(from + columns[q], gradient);
          sums[q] += weight * gradient;
        }
      }
      sample = link.w;
      any = true;
    }
  }
  if (!any) {
    return;
  }
  by_image += long(n) * (z.height * z.width * z.channels) + (y * z.width + x) * z.channels;
#pragma unroll
  for (int q = 0; q < QUADS; ++q) {
    if (first + q * step < end) {
      Floats sum;
      load((device const float*)by_image + first + q * step, sum);
      store(by_image + first + q * step, sum + sums[q]);
    }
  }
}

#define INSTANTIATE(NAME, T, WIDTH) \
  template [[host_name(#NAME "_" #T #WIDTH)]] [[kernel]] decltype(NAME<T, WIDTH>) NAME<T, WIDTH>;

#define INSTANTIATE_ALL(T, WIDTH)                          \
  INSTANTIATE(deform_conv2d_sample, T, WIDTH)              \
  INSTANTIATE(deform_conv2d_backward_samples, T, WIDTH)    \
  INSTANTIATE(deform_conv2d_backward_image, T, WIDTH)

INSTANTIATE_ALL(float, 1)
INSTANTIATE_ALL(float, 4)
INSTANTIATE_ALL(half, 1)
INSTANTIATE_ALL(half, 4)
INSTANTIATE_ALL(bfloat, 1)
INSTANTIATE_ALL(bfloat, 4)
