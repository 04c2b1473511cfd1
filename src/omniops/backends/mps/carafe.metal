// CARAFE on Apple GPUs, for every kernel_size, scale_factor and stride; omniops/ops/carafe.py has the formula and the
// names. carafe_doubling.metal has faster kernels for what is usual.
//
// N batch and G channel groups are one axis here, "group" = n * G + g, since features, masks and results of (n, g) lie
// together in memory. All tensors are contiguous. A plane (H, W) of any of them has fewer than 2^28 elements and there
// are fewer than 2^31 planes. Sums are in float.
//
// Addresses are the kernel's argument, which is the same for all threads, and an offset: of 64 bits in the kernels
// WIDE, else of 32, as 64-bit integers are slow on these GPUs, where no tensor has 2^31 elements or more.
//
// ASCII and Metal 3.1 only: PyTorch hands the source to the compiler so.

#include <metal_stdlib>
using namespace metal;

// The dtype of the tensors: float, half or bfloat. Who compiles the source says which.
#ifndef SCALAR
#define SCALAR float
#endif
typedef SCALAR T;

constant constexpr int CHANNELS = 8;  // the channels of one group that a thread of the first two operators owns
constant constexpr int TAPS = 4;      // the taps of one kernel row that a thread of carafe_backward_masks owns

// Where the grid's third axis stands: a group, and the first of the CHANNELS channels of it that the thread sums. The
// last of a group's blocks reaches back into the one before it where CHANNELS does not divide them, so that no inner
// loop asks how many are left; the thread stores the channels from skip on only. In a group of fewer than CHANNELS
// channels the thread stores the first count ones.
struct Block {
  int group, first, skip, count;

  Block(uint z, int channels) {
    const int blocks = (channels + CHANNELS - 1) / CHANNELS;
    group = int(z) / blocks;
    const int own = (int(z) - group * blocks) * CHANNELS;
    first = max(0, min(own, channels - CHANNELS));
    skip = own - first;
    count = min(CHANNELS, channels);
  }
};

// What the kernels take as sizes, and what follows from it.
struct Sizes {
  int groups, channels, height, width, centre_rows, centre_columns, k, s, t;
  int plane, result_height, result_width, result_plane;

  Sizes(constant int* sizes) {
    groups = sizes[0];
    channels = sizes[1];
    height = sizes[2];
    width = sizes[3];
    k = sizes[4];
    s = sizes[5];
    t = sizes[6];
    centre_rows = (height - 1) / t + 1;
    centre_columns = (width - 1) / t + 1;
    plane = height * width;
    result_height = centre_rows * s;
    result_width = centre_columns * s;
    result_plane = result_height * result_width;
  }
};

template <bool WIDE>
struct Offsets {
  typedef int type;
};
template <>
struct Offsets<true> {
  typedef long type;
};

// out[i, j] = sum over u, v of masks[u, v, i, j] * features[i / s * t + u - p, j / s * t + v - p]
//
// Grid: (columns of results, rows of results, groups * blocks of channels). sizes: see Sizes.
template <bool WIDE>
[[kernel, max_total_threads_per_threadgroup(256)]] void carafe(
    device const T* features [[buffer(0)]],
    device const T* masks [[buffer(1)]],
    device T* out [[buffer(2)]],
    constant int* sizes [[buffer(3)]],
    uint3 gid [[thread_position_in_grid]]) {
  typedef typename Offsets<WIDE>::type Offset;
  const Sizes z(sizes);
  const int i = int(gid.y), j = int(gid.x);
  const Block block(gid.z, z.channels);
  if (i >= z.result_height || j >= z.result_width || block.group >= z.groups) {
    return;
  }
  const int p = z.k / 2, y = i / z.s * z.t - p, x = j / z.s * z.t - p;
  const Offset first_plane = Offset(block.group) * z.channels + block.first;
  const int pixel = i * z.result_width + j;
  const Offset lines = first_plane * z.plane;
  const Offset weights = Offset(block.group) * z.k * z.k * z.result_plane + pixel;

  float sums[CHANNELS];
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    sums[c] = 0.0f;
  }
  for (int u = max(0, -y); u < min(z.k, z.height - y); ++u) {
    for (int v = max(0, -x); v < min(z.k, z.width - x); ++v) {
      const float mask = float(masks[weights + Offset(u * z.k + v) * z.result_plane]);
      const int from = (y + u) * z.width + x + v;
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        sums[c] = fma(mask, float(features[lines + min(c, block.count - 1) * z.plane + from]), sums[c]);
      }
    }
  }
  out += first_plane * z.result_plane + pixel;
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    if (c >= block.skip && c < block.count) {
      out[c * z.result_plane] = T(sums[c]);
    }
  }
}

// out[y, x] = sum over u, v, a, b of masks[u, v, q*s + a, r*s + b] * grad[q*s + a, r*s + b] for all centres (q, r) with
// (q*t + u - p, r*t + v - p) = (y, x)
//
// A gather, as above. Grid: (columns, rows, groups * blocks of channels). sizes: see Sizes.
template <bool WIDE>
[[kernel, max_total_threads_per_threadgroup(256)]] void carafe_backward_features(
    device const T* grad [[buffer(0)]],
    device const T* masks [[buffer(1)]],
    device T* out [[buffer(2)]],
    constant int* sizes [[buffer(3)]],
    uint3 gid [[thread_position_in_grid]]) {
  typedef typename Offsets<WIDE>::type Offset;
  const Sizes z(sizes);
  const int y = int(gid.y), x = int(gid.x);
  const Block block(gid.z, z.channels);
  if (y >= z.height || x >= z.width || block.group >= z.groups) {
    return;
  }
  const int p = z.k / 2;
  const Offset first_plane = Offset(block.group) * z.channels + block.first;
  const Offset lines = first_plane * z.result_plane;

  float sums[CHANNELS];
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    sums[c] = 0.0f;
  }
  // The rows q of centres with 0 <= u = y + p - q*t < k, and the columns r likewise.
  const int first_q = max(0, y + p - z.k + z.t) / z.t, end_q = min(z.centre_rows, (y + p) / z.t + 1);
  const int first_r = max(0, x + p - z.k + z.t) / z.t, end_r = min(z.centre_columns, (x + p) / z.t + 1);
  for (int q = first_q; q < end_q; ++q) {
    const int u = y + p - q * z.t;
    for (int r = first_r; r < end_r; ++r) {
      const int v = x + p - r * z.t;
      const Offset weights = (Offset(block.group) * z.k * z.k + u * z.k + v) * z.result_plane;
      for (int a = 0; a < z.s; ++a) {
        for (int b = 0; b < z.s; ++b) {
          const int from = (q * z.s + a) * z.result_width + r * z.s + b;
          const float mask = float(masks[weights + from]);
#pragma unroll
          for (int c = 0; c < CHANNELS; ++c) {
            sums[c] = fma(mask, float(grad[lines + min(c, block.count - 1) * z.result_plane + from]), sums[c]);
          }
        }
      }
    }
  }
  out += first_plane * z.plane + y * z.width + x;
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    if (c >= block.skip && c < block.count) {
      out[c * z.plane] = T(sums[c]);
    }
  }
}

// out[u, v, i, j] = sum over channels of grad[i, j] * features[i / s * t + u - p, j / s * t + v - p]
//
// Grid: (columns of results, rows of results, groups * k * blocks of TAPS taps of a kernel row). sizes: see Sizes.
template <bool WIDE>
[[kernel, max_total_threads_per_threadgroup(256)]] void carafe_backward_masks(
    device const T* grad [[buffer(0)]],
    device const T* features [[buffer(1)]],
    device T* out [[buffer(2)]],
    constant int* sizes [[buffer(3)]],
    uint3 gid [[thread_position_in_grid]]) {
  typedef typename Offsets<WIDE>::type Offset;
  const Sizes z(sizes);
  const int i = int(gid.y), j = int(gid.x);
  const int blocks = (z.k + TAPS - 1) / TAPS;
  const int kernel_row = int(gid.z) / blocks;  // group * k + u
  const int group = kernel_row / z.k, u = kernel_row - group * z.k;
  const int first_v = (int(gid.z) - kernel_row * blocks) * TAPS;
  if (i >= z.result_height || j >= z.result_width || group >= z.groups) {
    return;
  }
  const int p = z.k / 2, y = i / z.s * z.t + u - p, x = j / z.s * z.t + first_v - p;
  const int pixel = i * z.result_width + j;
  Offset grads = Offset(group) * z.channels * z.result_plane + pixel;
  Offset line = Offset(group) * z.channels * z.plane + clamp(y, 0, z.height - 1) * z.width;

  // Columns outside the map are read from its edge, and their sums are dropped at the end.
  int column[TAPS];
  float sums[TAPS];
#pragma unroll
  for (int v = 0; v < TAPS; ++v) {
    column[v] = clamp(x + v, 0, z.width - 1);
    sums[v] = 0.0f;
  }
  const bool inside = y >= 0 && y < z.height;
  for (int c = 0; c < (inside ? z.channels : 0); ++c) {
    const float g = float(grad[grads]);
#pragma unroll
    for (int v = 0; v < TAPS; ++v) {
      sums[v] = fma(g, float(features[line + column[v]]), sums[v]);
    }
    grads += z.result_plane;
    line += z.plane;
  }
  out += (Offset(kernel_row) * z.k + first_v) * z.result_plane + pixel;
#pragma unroll
  for (int v = 0; v < TAPS; ++v) {
    if (first_v + v < z.k) {
      out[Offset(v) * z.result_plane] = T(column[v] == x + v ? sums[v] : 0.0f);
    }
  }
}

#define INSTANTIATE(NAME)                                                     \
  template [[host_name(#NAME)]] [[kernel]] decltype(NAME<false>) NAME<false>; \
  template [[host_name(#NAME "_wide")]] [[kernel]] decltype(NAME<true>) NAME<true>;
INSTANTIATE(carafe)
INSTANTIATE(carafe_backward_features)
INSTANTIATE(carafe_backward_masks)
