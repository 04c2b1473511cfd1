// CARAFE on Apple GPUs; omniops/ops/carafe.py has the formula and the names.
//
// N batch and G channel groups are one axis here, "group" = n * G + g, since features, masks and results of (n, g) lie
// together in memory. All tensors are contiguous and start at a multiple of four elements. A plane (H, W) of any of them
// has fewer than 2^28 elements and there are fewer than 2^31 planes, so that offsets within CHANNELS planes take 32 bits;
// the step to a group is taken in 64. Sums are in float.
//
// carafe_*_doubling serve kernel_size K, scale_factor 2, stride 1. A thread owns two neighbouring centres, x and x + 1
// with x even, so that rows of features are read in pairs and rows of masks, gradients and results in fours; EVEN says
// that the width is even, so that the pairs and fours are aligned and lie in the map as a whole or not at all.
// With P = K / 2 the columns x - P ... x + 1 + P that the two centres see are read as pairs from x - LEFT on. Of the
// four products of a pair with the two centres, two fall on the same tap v, the others on v + 1 and v - 1. A plane of
// results has fewer than 2^27 elements here: 32 unsigned bits reach the ROWS * K planes of masks that one pass uses.
//
// The other kernels serve every kernel_size, scale_factor and stride.
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
constant constexpr int ROWS = 4;      // the rows of results that a thread of carafe_backward_features_doubling owns
constant constexpr int TAPS = 4;      // the taps of one kernel row that a thread of carafe_backward_masks owns
constant constexpr int SIMD = 32;

template <typename Scalar>
struct Vectors;
template <>
struct Vectors<float> {
  typedef float2 two;
  typedef float4 four;
};
template <>
struct Vectors<half> {
  typedef half2 two;
  typedef half4 four;
};
template <>
struct Vectors<bfloat> {
  typedef bfloat2 two;
  typedef bfloat4 four;
};
typedef Vectors<T>::two Two;
typedef Vectors<T>::four Four;

inline float2 load_two(device const T* from) {
  const Two value = *(device const Two*)from;
  return float2(float(value.x), float(value.y));
}

// Two neighbours of a row, the second of which may lie outside it and is then zero.
template <bool EVEN>
inline float2 load_pair(device const T* from, bool second) {
  if (EVEN) {
    return load_two(from);
  }
  return float2(float(from[0]), second ? float(from[1]) : 0.0f);
}

// The two values of each of two centres, the second of which may lie outside the row.
template <bool EVEN>
inline float4 load_four(device const T* from, bool second) {
  if (EVEN) {
    const Four value = *(device const Four*)from;
    return float4(float(value.x), float(value.y), float(value.z), float(value.w));
  }
  const float2 low = load_two(from);
  const float2 high = second ? load_two(from + 2) : float2(0.0f, 0.0f);
  return float4(low.x, low.y, high.x, high.y);
}

inline void store_two(device T* to, float first, float second) {
  Two value;
  value.x = T(first);
  value.y = T(second);
  *(device Two*)to = value;
}

template <bool EVEN>
inline void store_four(device T* to, float4 values, bool second) {
  if (EVEN) {
    Four value;
    value.x = T(values.x);
    value.y = T(values.y);
    value.z = T(values.z);
    value.w = T(values.w);
    *(device Four*)to = value;
    return;
  }
  store_two(to, values.x, values.y);
  if (second) {
    store_two(to + 2, values.z, values.w);
  }
}

// Where the grid's third axis stands: a group, and the first of the CHANNELS channels of it that the thread sums. The
// last of a group's blocks reaches back into the one before it where CHANNELS does not divide them, so that no inner
// loop asks how many are left; the thread stores the channels from skip on only. In a group of fewer than CHANNELS
// channels, which the general kernels alone serve, the thread stores the first count ones.
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

// out[2y + a, 2x + b] = sum over u, v of masks[u, v, 2y + a, 2x + b] * features[y + u - P, x + v - P]
//
// Grid: (pairs of centres of a row, rows of centres, groups * blocks of channels). A thread holds the 2 * 4 results of
// its two centres in each of its channels. sizes: groups, channels of a group, H, W.
template <int K, bool EVEN>
[[kernel, max_total_threads_per_threadgroup(256)]] void carafe_doubling(
    device const T* features [[buffer(0)]],
    device const T* masks [[buffer(1)]],
    device T* out [[buffer(2)]],
    constant int* sizes [[buffer(3)]],
    uint3 at [[thread_position_in_grid]]) {
  constexpr int P = K / 2;
  constexpr int LEFT = (P + 1) / 2 * 2;
  const int channels = sizes[1], height = sizes[2], width = sizes[3];
  const int result_width = 2 * width;
  const uint plane = uint(height * width), result_plane = 4 * plane;
  const int x = 2 * int(at.x), y = int(at.y);
  const Block block(at.z, channels);
  if (x >= width || y >= height || block.group >= sizes[0]) {
    return;
  }
  const bool second = EVEN || x + 1 < width;
  const long first_plane = long(block.group) * channels + block.first;
  const int place = 2 * y * result_width + 2 * x;
  features += first_plane * plane;
  masks += long(block.group) * (K * K) * result_plane + place;
  out += first_plane * result_plane + place;

  float sums[CHANNELS][2][4];  // of centre x + i at (a, b): [i][2 * a + b]
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
#pragma unroll
    for (int o = 0; o < 4; ++o) {
      sums[c][0][o] = 0.0f;
      sums[c][1][o] = 0.0f;
    }
  }
  const int first_u = max(0, P - y), end_u = min(K, height + P - y);
  device const T* line = features + ((y + first_u - P) * width + x);
  device const T* weights = masks + long(first_u * K) * result_plane;
#pragma unroll 1
  for (int u = first_u; u < end_u; ++u) {
#pragma unroll
    for (int j = 0; j <= LEFT; ++j) {
      const int shift = 2 * j - LEFT;
      const int column = x + shift;
      if (shift != 0 && (column < 0 || column >= width)) {
        continue;
      }
      float2 pair[CHANNELS];
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        pair[c] = load_pair<EVEN>(line + c * plane + shift, column + 1 < width);
      }
      const int v = shift + P;
      if (v >= 0 && v < K) {
#pragma unroll
        for (int a = 0; a < 2; ++a) {
          const float4 mask = load_four<EVEN>(weights + v * result_plane + a * result_width, second);
#pragma unroll
          for (int c = 0; c < CHANNELS; ++c) {
            sums[c][0][2 * a] = fma(mask.x, pair[c].x, sums[c][0][2 * a]);
            sums[c][0][2 * a + 1] = fma(mask.y, pair[c].x, sums[c][0][2 * a + 1]);
            sums[c][1][2 * a] = fma(mask.z, pair[c].y, sums[c][1][2 * a]);
            sums[c][1][2 * a + 1] = fma(mask.w, pair[c].y, sums[c][1][2 * a + 1]);
          }
        }
      }
      if (v + 1 >= 0 && v + 1 < K) {
#pragma unroll
        for (int a = 0; a < 2; ++a) {
          const float2 mask = load_two(weights + (v + 1) * result_plane + a * result_width);
#pragma unroll
          for (int c = 0; c < CHANNELS; ++c) {
            sums[c][0][2 * a] = fma(mask.x, pair[c].y, sums[c][0][2 * a]);
            sums[c][0][2 * a + 1] = fma(mask.y, pair[c].y, sums[c][0][2 * a + 1]);
          }
        }
      }
      if (v - 1 >= 0 && v - 1 < K && second) {
#pragma unroll
        for (int a = 0; a < 2; ++a) {
          const float2 mask = load_two(weights + (v - 1) * result_plane + a * result_width + 2);
#pragma unroll
          for (int c = 0; c < CHANNELS; ++c) {
            sums[c][1][2 * a] = fma(mask.x, pair[c].x, sums[c][1][2 * a]);
            sums[c][1][2 * a + 1] = fma(mask.y, pair[c].x, sums[c][1][2 * a + 1]);
          }
        }
      }
    }
    line += width;
    weights += K * long(result_plane);
  }
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    if (c >= block.skip) {
#pragma unroll
      for (int a = 0; a < 2; ++a) {
        const float4 values =
            float4(sums[c][0][2 * a], sums[c][0][2 * a + 1], sums[c][1][2 * a], sums[c][1][2 * a + 1]);
        store_four<EVEN>(out + c * result_plane + a * result_width, values, second);
      }
    }
  }
}

// out[y, x] = sum over u, v, a, b of masks[u, v, 2q + a, 2r + b] * grad[2q + a, 2r + b], (q, r) = (y + P - u, x + P - v)
//
// A gather: each result is summed by one thread in one order. Grid: (pairs of a row, ROWS rows at a time, groups *
// blocks of channels). A thread holds the ROWS x 2 results (y, x) ... (y + ROWS - 1, x + 1), ROWS dividing y and 2
// dividing x, in each of its channels, and visits the rows of centres that they see; each gradient that it loads serves
// all rows of results that see it.
// sizes: groups, channels of a group, H, W.
template <int K, bool EVEN>
[[kernel, max_total_threads_per_threadgroup(256)]] void carafe_backward_features_doubling(
    device const T* grad [[buffer(0)]],
    device const T* masks [[buffer(1)]],
    device T* out [[buffer(2)]],
    constant int* sizes [[buffer(3)]],
    uint3 at [[thread_position_in_grid]]) {
  constexpr int P = K / 2;
  constexpr int LEFT = (P + 1) / 2 * 2;
  const int channels = sizes[1], height = sizes[2], width = sizes[3];
  const int result_width = 2 * width;
  const uint plane = uint(height * width), result_plane = 4 * plane;
  const int x = 2 * int(at.x), y = ROWS * int(at.y);
  const Block block(at.z, channels);
  if (x >= width || y >= height || block.group >= sizes[0]) {
    return;
  }
  const long first_plane = long(block.group) * channels + block.first;
  grad += first_plane * result_plane;
  masks += long(block.group) * (K * K) * result_plane;
  out += first_plane * plane + y * width + x;

  float sums[CHANNELS][ROWS][2];
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      sums[c][r][0] = sums[c][r][1] = 0.0f;
    }
  }
  // Row d of the K - 1 + ROWS rows of centres is y - P + d, and tap u = r + 2P - d of the row of results y + r.
  const int first_d = max(0, P - y), end_d = min(K - 1 + ROWS, height + P - y);
  const int place = 2 * (y - P + first_d) * result_width + 2 * x;
  device const T* line = grad + place;
  device const T* line_weights = masks + long((2 * P - first_d) * K) * result_plane + place;
#pragma unroll 1
  for (int d = first_d; d < end_d; ++d) {
#pragma unroll 1
    for (int a = 0; a < 2; ++a) {
#pragma unroll
      for (int j = 0; j <= LEFT; ++j) {
        const int shift = 2 * j - LEFT;
        const int column = x + shift;
        if (shift != 0 && (column < 0 || column >= width)) {
          continue;
        }
        const bool second = EVEN || column + 1 < width;
        float4 pair[CHANNELS];
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
          pair[c] = load_four<EVEN>(line + c * result_plane + 2 * shift, second);
        }
        const int v = P - shift;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          if (r > d || d - r >= K) {
            continue;
          }
          if (v >= 0 && v < K) {
            const float4 mask = load_four<EVEN>(line_weights + (r * K + v) * result_plane + 2 * shift, second);
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) {
              sums[c][r][0] = fma(mask.y, pair[c].y, fma(mask.x, pair[c].x, sums[c][r][0]));
              sums[c][r][1] = fma(mask.w, pair[c].w, fma(mask.z, pair[c].z, sums[c][r][1]));
            }
          }
          if (v + 1 >= 0 && v + 1 < K) {
            const float2 mask = load_two(line_weights + (r * K + v + 1) * result_plane + 2 * shift);
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) {
              sums[c][r][1] = fma(mask.y, pair[c].y, fma(mask.x, pair[c].x, sums[c][r][1]));
            }
          }
          if (v - 1 >= 0 && v - 1 < K && second) {
            const float2 mask = load_two(line_weights + (r * K + v - 1) * result_plane + 2 * shift + 2);
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) {
              sums[c][r][0] = fma(mask.y, pair[c].w, fma(mask.x, pair[c].z, sums[c][r][0]));
            }
          }
        }
      }
      line += result_width;
      line_weights += result_width;
    }
    line_weights -= K * long(result_plane);
  }
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    if (c >= block.skip) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (y + r < height) {
          device T* to = out + c * plane + r * width;
          if (EVEN) {
            store_two(to, sums[c][r][0], sums[c][r][1]);
          } else {
            to[0] = T(sums[c][r][0]);
            if (x + 1 < width) {
              to[1] = T(sums[c][r][1]);
            }
          }
        }
      }
    }
  }
}

// out[u, v, 2y + a, 2x + b] = sum over channels of grad[2y + a, 2x + b] * features[y + u - P, x + v - P]
//
// Grid: (SIMD * tiles, K, groups) in threadgroups of (SIMD, K, 1): one simdgroup for each kernel row u, all K of them
// on the same tile, so that they share its gradients and features in the cache. A tile is SIMD / splits pairs of
// centres in the order of memory; lane l stands for pair l % (SIMD / splits) and sums every splits-th channel from
// l / (SIMD / splits) on. So small maps too fill the GPU. The lanes of a pair are summed by shuffles, always in the
// same order. sizes: groups, channels of a group, H, W, splits (a power of two).
template <int K, bool EVEN>
[[kernel, max_total_threads_per_threadgroup(256)]] void carafe_backward_masks_doubling(
    device const T* grad [[buffer(0)]],
    device const T* features [[buffer(1)]],
    device T* out [[buffer(2)]],
    constant int* sizes [[buffer(3)]],
    uint3 at [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  constexpr int P = K / 2;
  constexpr int LEFT = (P + 1) / 2 * 2;
  const int channels = sizes[1], height = sizes[2], width = sizes[3], splits = sizes[4];
  const int result_width = 2 * width;
  const uint plane = uint(height * width), result_plane = 4 * plane;
  const int pairs = (width + 1) / 2, tile = SIMD / splits;
  const int u = int(at.y), group = int(at.z);
  const int asked = int(at.x) / SIMD * tile + int(lane) % tile;
  const int position = min(asked, pairs * height - 1);  // no lane leaves before the shuffles
  const int y = position / pairs, x = 2 * (position - y * pairs);
  const int row = y + u - P;
  const int last = (row < 0 || row >= height) ? 0 : channels;
  const bool second = EVEN || x + 1 < width;
  const int place = 2 * y * result_width + 2 * x;

  float sums[K][2][4];  // of tap v and centre x + i at (a, b): [v][i][2 * a + b]
#pragma unroll
  for (int v = 0; v < K; ++v) {
#pragma unroll
    for (int o = 0; o < 4; ++o) {
      sums[v][0][o] = sums[v][1][o] = 0.0f;
    }
  }
  const long first_plane = long(group) * channels + int(lane) / tile;
  device const T* grads = grad + first_plane * result_plane + place;
  device const T* line = features + first_plane * plane + clamp(row, 0, height - 1) * width + x;
  const long step = long(splits) * plane;
#pragma unroll 2
  for (int c = int(lane) / tile; c < last; c += splits) {
    float columns[2 * (LEFT + 1)];
#pragma unroll
    for (int j = 0; j <= LEFT; ++j) {
      const int shift = 2 * j - LEFT;
      const int column = x + shift;
      float2 pair = float2(0.0f, 0.0f);
      if (shift == 0 || (column >= 0 && column < width)) {
        pair = load_pair<EVEN>(line + shift, column + 1 < width);
      }
      columns[2 * j] = pair.x;
      columns[2 * j + 1] = pair.y;
    }
#pragma unroll
    for (int a = 0; a < 2; ++a) {
      const float4 g = load_four<EVEN>(grads + a * result_width, second);
#pragma unroll
      for (int v = 0; v < K; ++v) {
        const float left = columns[v - P + LEFT], right = columns[v - P + LEFT + 1];
        sums[v][0][2 * a] = fma(g.x, left, sums[v][0][2 * a]);
        sums[v][0][2 * a + 1] = fma(g.y, left, sums[v][0][2 * a + 1]);
        sums[v][1][2 * a] = fma(g.z, right, sums[v][1][2 * a]);
        sums[v][1][2 * a + 1] = fma(g.w, right, sums[v][1][2 * a + 1]);
      }
    }
    grads += 4 * step;
    line += step;
  }
  for (int distance = SIMD / 2; distance >= tile; distance /= 2) {
#pragma unroll
    for (int v = 0; v < K; ++v) {
#pragma unroll
      for (int o = 0; o < 4; ++o) {
        sums[v][0][o] += simd_shuffle_xor(sums[v][0][o], ushort(distance));
        sums[v][1][o] += simd_shuffle_xor(sums[v][1][o], ushort(distance));
      }
    }
  }
  if (asked != position || int(lane) >= tile) {
    return;
  }
  out += (long(group) * (K * K) + u * K) * result_plane + place;
#pragma unroll
  for (int v = 0; v < K; ++v) {
    const int column = x + v - P;
    const bool left = column >= 0 && column < width, right = column + 1 >= 0 && column + 1 < width;
#pragma unroll
    for (int a = 0; a < 2; ++a) {
      const float4 values = float4(
          left ? sums[v][0][2 * a] : 0.0f,
          left ? sums[v][0][2 * a + 1] : 0.0f,
          right ? sums[v][1][2 * a] : 0.0f,
          right ? sums[v][1][2 * a + 1] : 0.0f);
      store_four<EVEN>(out + v * result_plane + a * result_width, values, second);
    }
  }
}

// The sizes of the general kernels.
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

// out[i, j] = sum over u, v of masks[u, v, i, j] * features[i / s * t + u - p, j / s * t + v - p]
//
// Grid: (columns of results, rows of results, groups * blocks of channels). sizes: see Sizes.
[[kernel, max_total_threads_per_threadgroup(256)]] void carafe(
    device const T* features [[buffer(0)]],
    device const T* masks [[buffer(1)]],
    device T* out [[buffer(2)]],
    constant int* sizes [[buffer(3)]],
    uint3 at [[thread_position_in_grid]]) {
  const Sizes z(sizes);
  const int i = int(at.y), j = int(at.x);
  const Block block(at.z, z.channels);
  if (i >= z.result_height || j >= z.result_width || block.group >= z.groups) {
    return;
  }
  const int p = z.k / 2, y = i / z.s * z.t - p, x = j / z.s * z.t - p;
  const long first_plane = long(block.group) * z.channels + block.first;
  const int place = i * z.result_width + j;
  features += first_plane * z.plane;
  masks += long(block.group) * z.k * z.k * z.result_plane + place;
  out += first_plane * z.result_plane + place;

  float sums[CHANNELS];
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    sums[c] = 0.0f;
  }
  for (int u = max(0, -y); u < min(z.k, z.height - y); ++u) {
    for (int v = max(0, -x); v < min(z.k, z.width - x); ++v) {
      const float mask = float(masks[long(u * z.k + v) * z.result_plane]);
      const int from = (y + u) * z.width + x + v;
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        sums[c] = fma(mask, float(features[min(c, block.count - 1) * z.plane + from]), sums[c]);
      }
    }
  }
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
[[kernel, max_total_threads_per_threadgroup(256)]] void carafe_backward_features(
    device const T* grad [[buffer(0)]],
    device const T* masks [[buffer(1)]],
    device T* out [[buffer(2)]],
    constant int* sizes [[buffer(3)]],
    uint3 at [[thread_position_in_grid]]) {
  const Sizes z(sizes);
  const int y = int(at.y), x = int(at.x);
  const Block block(at.z, z.channels);
  if (y >= z.height || x >= z.width || block.group >= z.groups) {
    return;
  }
  const int p = z.k / 2;
  const long first_plane = long(block.group) * z.channels + block.first;
  grad += first_plane * z.result_plane;
  masks += long(block.group) * z.k * z.k * z.result_plane;
  out += first_plane * z.plane + y * z.width + x;

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
      device const T* weights = masks + long(u * z.k + v) * z.result_plane;
      for (int a = 0; a < z.s; ++a) {
        for (int b = 0; b < z.s; ++b) {
          const int from = (q * z.s + a) * z.result_width + r * z.s + b;
          const float mask = float(weights[from]);
#pragma unroll
          for (int c = 0; c < CHANNELS; ++c) {
            sums[c] = fma(mask, float(grad[min(c, block.count - 1) * z.result_plane + from]), sums[c]);
          }
        }
      }
    }
  }
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
[[kernel, max_total_threads_per_threadgroup(256)]] void carafe_backward_masks(
    device const T* grad [[buffer(0)]],
    device const T* features [[buffer(1)]],
    device T* out [[buffer(2)]],
    constant int* sizes [[buffer(3)]],
    uint3 at [[thread_position_in_grid]]) {
  const Sizes z(sizes);
  const int i = int(at.y), j = int(at.x);
  const int blocks = (z.k + TAPS - 1) / TAPS;
  const int kernel_row = int(at.z) / blocks;  // group * k + u
  const int group = kernel_row / z.k, u = kernel_row - group * z.k;
  const int first_v = (int(at.z) - kernel_row * blocks) * TAPS;
  if (i >= z.result_height || j >= z.result_width || group >= z.groups) {
    return;
  }
  const int p = z.k / 2, y = i / z.s * z.t + u - p, x = j / z.s * z.t + first_v - p;
  const int place = i * z.result_width + j;
  grad += long(group) * z.channels * z.result_plane + place;
  features += long(group) * z.channels * z.plane + clamp(y, 0, z.height - 1) * z.width;

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
    const float g = float(*grad);
#pragma unroll
    for (int v = 0; v < TAPS; ++v) {
      sums[v] = fma(g, float(features[column[v]]), sums[v]);
    }
    grad += z.result_plane;
    features += z.plane;
  }
  out += (long(kernel_row) * z.k + first_v) * z.result_plane + place;
#pragma unroll
  for (int v = 0; v < TAPS; ++v) {
    if (first_v + v < z.k) {
      out[long(v) * z.result_plane] = T(column[v] == x + v ? sums[v] : 0.0f);
    }
  }
}

#define INSTANTIATE(NAME, K)                                                                                        \
  template [[host_name(#NAME "_k" #K "_even")]] [[kernel]] decltype(NAME<K, true>) NAME<K, true>;                   \
  template [[host_name(#NAME "_k" #K "_odd")]] [[kernel]] decltype(NAME<K, false>) NAME<K, false>;

INSTANTIATE(carafe_doubling, 3)
INSTANTIATE(carafe_doubling, 5)
INSTANTIATE(carafe_backward_features_doubling, 3)
INSTANTIATE(carafe_backward_features_doubling, 5)
INSTANTIATE(carafe_backward_masks_doubling, 3)
INSTANTIATE(carafe_backward_masks_doubling, 5)
