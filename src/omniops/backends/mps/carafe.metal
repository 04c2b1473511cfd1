// CARAFE on Apple GPUs; omniops/ops/carafe.py has the formula and the names.
//
// N batch and G channel groups are one axis here, "group" = n * G + g, since features, masks and results of (n, g) lie
// together in memory. All tensors are contiguous and start at a multiple of four elements. A plane (H, W) of any of them
// has fewer than 2^28 elements and there are fewer than 2^31 planes. Sums are in float.
//
// Addresses are the kernel's argument, which is the same for all threads, and an offset of 32 bits, as 64-bit integers
// are slow on these GPUs. It is signed: what cannot wrap, a compiler may take apart. So no tensor has 2^31 elements or
// more, but for the general kernels WIDE.
//
// carafe_*_doubling serve kernel_size K, scale_factor 2, stride 1. A thread owns two neighbouring centres, x and x + 1
// with x even, so that rows of features are read in pairs and rows of masks, gradients and results in fours; EVEN says
// that the width is even, so that the pairs and fours are aligned and lie in the map as a whole or not at all.
// With P = K / 2 the columns x - P ... x + 1 + P that the two centres see are read as pairs from x - LEFT on. Of the
// four products of a pair with the two centres, two fall on the same tap v, the others on v + 1 and v - 1. What one step
// multiplies is loaded first, all of it and without a branch, so that its loads wait for memory together; what lies
// outside the map is zero, features and masks alike, as neither may spoil a sum where it is not finite.
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
constant constexpr int ROWS = 2;      // the rows of results that a thread of carafe_backward_features_doubling owns
constant constexpr int TAPS = 4;      // the taps of one kernel row that a thread of carafe_backward_masks owns
constant constexpr int SIMD = 32;
constant constexpr int AHEAD = 4;  // the channels that a thread of carafe_backward_masks_doubling loads at once

// Of carafe_doubling: what a thread loads for a step takes twice the registers in float.
constant constexpr int FORWARD_CHANNELS = sizeof(T) == 4 ? 4 : 8;

// Vectors of two and four, and their bits, which become zero at once where nothing is loaded.
template <typename Scalar>
struct Vectors;
template <>
struct Vectors<float> {
  typedef float2 two;
  typedef float4 four;
  typedef uint2 bits_two;
  typedef uint4 bits_four;
};
template <>
struct Vectors<half> {
  typedef half2 two;
  typedef half4 four;
  typedef uint bits_two;
  typedef uint2 bits_four;
};
template <>
struct Vectors<bfloat> {
  typedef bfloat2 two;
  typedef bfloat4 four;
  typedef uint bits_two;
  typedef uint2 bits_four;
};
typedef Vectors<T>::two Two;
typedef Vectors<T>::four Four;
typedef Vectors<T>::bits_two BitsOfTwo;
typedef Vectors<T>::bits_four BitsOfFour;

// Two neighbours, zero where not inside.
inline Two load_two(device const T* from, int at, bool inside) {
  BitsOfTwo bits = BitsOfTwo(0u);
  if (inside) {
    bits = *(device const BitsOfTwo*)(from + at);
  }
  return as_type<Two>(bits);
}

// Two neighbours of a row, the second of which may lie outside it and is then zero.
template <bool EVEN>
inline Two load_pair(device const T* from, int at, bool inside, bool second) {
  if (EVEN) {
    return load_two(from, at, inside);
  }
  Two value;
  value.x = inside ? from[at] : T(0.0f);
  value.y = inside && second ? from[at + 1] : T(0.0f);
  return value;
}

// The two values of each of two centres, the second of which may lie outside the row.
template <bool EVEN>
inline Four load_four(device const T* from, int at, bool inside, bool second) {
  if (EVEN) {
    BitsOfFour bits = BitsOfFour(0u);
    if (inside) {
      bits = *(device const BitsOfFour*)(from + at);
    }
    return as_type<Four>(bits);
  }
  const Two low = load_two(from, at, inside), high = load_two(from, at + 2, inside && second);
  Four value;
  value.x = low.x;
  value.y = low.y;
  value.z = high.x;
  value.w = high.y;
  return value;
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
// Where the grid's third axis stands: a group, and the first of the C channels of it that the thread sums. The last of a
// group's blocks reaches back into the one before it where C does not divide them, so that no inner loop asks how many
// are left; the thread stores the channels from skip on only. In a group of fewer than C channels, which the general
// kernels alone serve, the thread stores the first count ones.
template <int C>
struct Block {
  int group, first, skip, count;

  Block(uint z, int channels) {
    const int blocks = (channels + C - 1) / C;
    group = int(z) / blocks;
    const int own = (int(z) - group * blocks) * C;
    first = max(0, min(own, channels - C));
    skip = own - first;
    count = min(C, channels);
  }
};

// out[2y + a, 2x + b] = sum over u, v of masks[u, v, 2y + a, 2x + b] * features[y + u - P, x + v - P]
//
// Grid: (pairs of centres of a row, rows of centres, groups * blocks of channels). A thread holds the 2 * 4 results of
// its two centres in each of its C channels. sizes: groups, channels of a group, H, W.
template <int K, bool EVEN, int C>
[[kernel, max_total_threads_per_threadgroup(128)]] void carafe_doubling(
    device const T* features [[buffer(0)]],
    device const T* masks [[buffer(1)]],
    device T* out [[buffer(2)]],
    constant int* sizes [[buffer(3)]],
    uint3 at [[thread_position_in_grid]]) {
  constexpr int P = K / 2;
  constexpr int LEFT = (P + 1) / 2 * 2;
  const int channels = sizes[1], height = sizes[2], width = sizes[3];
  const int result_width = 2 * width;
  const int plane = height * width, result_plane = 4 * plane;
  const int x = 2 * int(at.x), y = int(at.y);
  const Block<C> block(at.z, channels);
  if (x >= width || y >= height || block.group >= sizes[0]) {
    return;
  }
  const bool second = EVEN || x + 1 < width;
  const int first_plane = block.group * channels + block.first;
  const int place = 2 * y * result_width + 2 * x;
  float sums[C][2][4];  // of centre x + i at (a, b): [i][2 * a + b]
#pragma unroll
  for (int c = 0; c < C; ++c) {
#pragma unroll
    for (int o = 0; o < 4; ++o) {
      sums[c][0][o] = 0.0f;
      sums[c][1][o] = 0.0f;
    }
  }
  const int first_u = max(0, P - y), end_u = min(K, height + P - y);
  int line = first_plane * plane + (y + first_u - P) * width + x;
  int weights = (block.group * (K * K) + first_u * K) * result_plane + place;
#pragma unroll 1
  for (int u = first_u; u < end_u; ++u) {
#pragma unroll
    for (int j = 0; j <= LEFT; ++j) {
      const int shift = 2 * j - LEFT, v = shift + P;
      const int column = x + shift;
      const bool inside = shift == 0 || (column >= 0 && column < width);
      const bool right_inside = inside && (EVEN || column + 1 < width);
      Four mask[2];
      Two low[2], high[2];
#pragma unroll
      for (int a = 0; a < 2; ++a) {
        const int from = weights + v * result_plane + a * result_width;
        if (v >= 0 && v < K) {
          mask[a] = load_four<EVEN>(masks, from, inside, second && right_inside);
        }
        if (v + 1 >= 0 && v + 1 < K) {
          low[a] = load_two(masks, from + result_plane, right_inside);
        }
        if (v - 1 >= 0 && v - 1 < K) {
          high[a] = load_two(masks, from - result_plane + 2, inside && second);
        }
      }
      Two pair[C];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        pair[c] = load_pair<EVEN>(features, line + c * plane + shift, inside, right_inside);
      }
#pragma unroll
      for (int a = 0; a < 2; ++a) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
          const float left = float(pair[c].x), right = float(pair[c].y);
          if (v >= 0 && v < K) {
            sums[c][0][2 * a] = fma(float(mask[a].x), left, sums[c][0][2 * a]);
            sums[c][0][2 * a + 1] = fma(float(mask[a].y), left, sums[c][0][2 * a + 1]);
            sums[c][1][2 * a] = fma(float(mask[a].z), right, sums[c][1][2 * a]);
            sums[c][1][2 * a + 1] = fma(float(mask[a].w), right, sums[c][1][2 * a + 1]);
          }
          if (v + 1 >= 0 && v + 1 < K) {
            sums[c][0][2 * a] = fma(float(low[a].x), right, sums[c][0][2 * a]);
            sums[c][0][2 * a + 1] = fma(float(low[a].y), right, sums[c][0][2 * a + 1]);
          }
          if (v - 1 >= 0 && v - 1 < K) {
            sums[c][1][2 * a] = fma(float(high[a].x), left, sums[c][1][2 * a]);
            sums[c][1][2 * a + 1] = fma(float(high[a].y), left, sums[c][1][2 * a + 1]);
          }
        }
      }
    }
    line += width;
    weights += K * result_plane;
  }
  const int to = first_plane * result_plane + place;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (c >= block.skip) {
#pragma unroll
      for (int a = 0; a < 2; ++a) {
        const float4 values =
            float4(sums[c][0][2 * a], sums[c][0][2 * a + 1], sums[c][1][2 * a], sums[c][1][2 * a + 1]);
        store_four<EVEN>(out + (to + c * result_plane + a * result_width), values, second);
      }
    }
  }
}

// What a row of results of carafe_backward_features_doubling's centres gives to the rows FROM ... TO - 1 of ROWS rows of
// features, from the pairs of centres that see them. line: of the gradients, at column 2x; weights: of tap (u, 0) of the
// first of the ROWS rows, there too, the next row's being K planes on.
template <int K, bool EVEN, int C, int FROM, int TO>
inline void add_row(
    device const T* grad,
    device const T* masks,
    int line,
    int weights,
    int result_plane,
    int x,
    int width,
    thread float (&sums)[C][ROWS][2]) {
  constexpr int P = K / 2;
  constexpr int LEFT = (P + 1) / 2 * 2;
#pragma unroll
  for (int j = 0; j <= LEFT; ++j) {
    const int shift = 2 * j - LEFT, v = P - shift;
    const int column = x + shift;
    const bool inside = shift == 0 || (column >= 0 && column < width);
    const bool second = EVEN || column + 1 < width;
    Four mask[ROWS];
    Two low[ROWS], high[ROWS];
#pragma unroll
    for (int r = FROM; r < TO; ++r) {
      const int from = weights + 2 * shift + (r * K + v) * result_plane;
      if (v >= 0 && v < K) {
        mask[r] = load_four<EVEN>(masks, from, inside, second);
      }
      if (v + 1 >= 0 && v + 1 < K) {
        low[r] = load_two(masks, from + result_plane, inside);
      }
      if (v - 1 >= 0 && v - 1 < K) {
        high[r] = load_two(masks, from - result_plane + 2, inside && second);
      }
    }
    Four quad[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      quad[c] = load_four<EVEN>(grad, line + 2 * shift + c * result_plane, inside, second);
    }
#pragma unroll
    for (int r = FROM; r < TO; ++r) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        float left = sums[c][r][0], right = sums[c][r][1];
        const float g0 = float(quad[c].x), g1 = float(quad[c].y), g2 = float(quad[c].z), g3 = float(quad[c].w);
        if (v >= 0 && v < K) {
          left = fma(float(mask[r].y), g1, fma(float(mask[r].x), g0, left));
          right = fma(float(mask[r].w), g3, fma(float(mask[r].z), g2, right));
        }
        if (v + 1 >= 0 && v + 1 < K) {
          right = fma(float(low[r].y), g1, fma(float(low[r].x), g0, right));
        }
        if (v - 1 >= 0 && v - 1 < K) {
          left = fma(float(high[r].y), g3, fma(float(high[r].x), g2, left));
        }
        sums[c][r][0] = left;
        sums[c][r][1] = right;
      }
    }
  }
}

// out[y, x] = sum over u, v, a, b of masks[u, v, 2q + a, 2r + b] * grad[2q + a, 2r + b], (q, r) = (y + P - u, x + P - v)
//
// A gather: each result is summed by one thread in one order. Grid: (pairs of a row, ROWS rows at a time, groups *
// blocks of channels). A thread holds the ROWS x 2 results (y, x) ... (y + 1, x + 1), y and x even, in each of its C
// channels, and visits the rows of centres that they see: the first only the upper row of results sees, the last only
// the lower one, and each gradient of those in between serves both. sizes: groups, channels of a group, H, W.
template <int K, bool EVEN, int C>
[[kernel, max_total_threads_per_threadgroup(128)]] void carafe_backward_features_doubling(
    device const T* grad [[buffer(0)]],
    device const T* masks [[buffer(1)]],
    device T* out [[buffer(2)]],
    constant int* sizes [[buffer(3)]],
    uint3 at [[thread_position_in_grid]]) {
  constexpr int P = K / 2;
  const int channels = sizes[1], height = sizes[2], width = sizes[3];
  const int result_width = 2 * width;
  const int plane = height * width, result_plane = 4 * plane;
  const int x = 2 * int(at.x), y = ROWS * int(at.y);
  const Block<C> block(at.z, channels);
  if (x >= width || y >= height || block.group >= sizes[0]) {
    return;
  }
  const int first_plane = block.group * channels + block.first;
  float sums[C][ROWS][2];
#pragma unroll
  for (int c = 0; c < C; ++c) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      sums[c][r][0] = sums[c][r][1] = 0.0f;
    }
  }
  // Row d of centres is y - P + d, and has tap u = 2P - d for the upper row of results, u + 1 for the lower one.
  const int line = first_plane * result_plane + 2 * (y - P) * result_width + 2 * x;
  const int weights = (block.group * (K * K) + 2 * P * K) * result_plane + 2 * (y - P) * result_width + 2 * x;
  const int next_line = 2 * result_width, next_weights = next_line - K * result_plane;
#pragma unroll 1
  for (int a = 0; a < 2; ++a) {
    const int from = a * result_width;
    if (y >= P) {
      add_row<K, EVEN, C, 0, 1>(grad, masks, line + from, weights + from, result_plane, x, width, sums);
    }
#pragma unroll 1
    for (int d = max(1, P - y); d < min(K, height + P - y); ++d) {
      add_row<K, EVEN, C, 0, 2>(
          grad, masks, line + from + d * next_line, weights + from + d * next_weights, result_plane, x, width, sums);
    }
    if (y + K - P < height) {
      add_row<K, EVEN, C, 1, 2>(
          grad, masks, line + from + K * next_line, weights + from + K * next_weights, result_plane, x, width, sums);
    }
  }
  const int to = first_plane * plane + y * width + x;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (c >= block.skip) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (y + r < height) {
          device T* row = out + (to + c * plane + r * width);
          if (EVEN) {
            store_two(row, sums[c][r][0], sums[c][r][1]);
          } else {
            row[0] = T(sums[c][r][0]);
            if (x + 1 < width) {
              row[1] = T(sums[c][r][1]);
            }
          }
        }
      }
    }
  }
}

// What one channel has of a pair of centres, for one kernel row.
template <int K, bool EVEN>
struct Channel {
  Two pair[(K / 2 + 1) / 2 * 2 + 1];
  Four quad[2];

  void load(device const T* grad, device const T* features, int grads, int line, int x, int width) {
    constexpr int LEFT = (K / 2 + 1) / 2 * 2;
#pragma unroll
    for (int j = 0; j <= LEFT; ++j) {
      const int shift = 2 * j - LEFT, column = x + shift;
      const bool inside = shift == 0 || (column >= 0 && column < width);
      pair[j] = load_pair<EVEN>(features, line + shift, inside, column + 1 < width);
    }
#pragma unroll
    for (int a = 0; a < 2; ++a) {
      quad[a] = load_four<EVEN>(grad, grads + a * 2 * width, true, x + 1 < width);
    }
  }

  void add(thread float (&sums)[K][2][4]) const {
    constexpr int P = K / 2, LEFT = (P + 1) / 2 * 2;
    float columns[2 * (LEFT + 1)];
#pragma unroll
    for (int j = 0; j <= LEFT; ++j) {
      columns[2 * j] = float(pair[j].x);
      columns[2 * j + 1] = float(pair[j].y);
    }
#pragma unroll
    for (int a = 0; a < 2; ++a) {
      const float g0 = float(quad[a].x), g1 = float(quad[a].y), g2 = float(quad[a].z), g3 = float(quad[a].w);
#pragma unroll
      for (int v = 0; v < K; ++v) {
        const float left = columns[v - P + LEFT], right = columns[v - P + LEFT + 1];
        sums[v][0][2 * a] = fma(g0, left, sums[v][0][2 * a]);
        sums[v][0][2 * a + 1] = fma(g1, left, sums[v][0][2 * a + 1]);
        sums[v][1][2 * a] = fma(g2, right, sums[v][1][2 * a]);
        sums[v][1][2 * a + 1] = fma(g3, right, sums[v][1][2 * a + 1]);
      }
    }
  }
};

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
  const int plane = height * width, result_plane = 4 * plane;
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
  const int first_plane = group * channels + int(lane) / tile;
  int grads = first_plane * result_plane + place;
  int line = first_plane * plane + clamp(row, 0, height - 1) * width + x;
  const int step = splits * plane;
  int c = int(lane) / tile;
  for (; c + (AHEAD - 1) * splits < last; c += AHEAD * splits) {
    Channel<K, EVEN> loaded[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      loaded[i].load(grad, features, grads + 4 * i * step, line + i * step, x, width);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      loaded[i].add(sums);
    }
    grads += 4 * AHEAD * step;
    line += AHEAD * step;
  }
  for (; c < last; c += splits) {
    Channel<K, EVEN> loaded;
    loaded.load(grad, features, grads, line, x, width);
    loaded.add(sums);
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
  const int to = (group * (K * K) + u * K) * result_plane + place;
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
      store_four<EVEN>(out + (to + v * result_plane + a * result_width), values, second);
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

// The offsets of the general kernels.
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
    uint3 at [[thread_position_in_grid]]) {
  typedef typename Offsets<WIDE>::type Offset;
  const Sizes z(sizes);
  const int i = int(at.y), j = int(at.x);
  const Block<CHANNELS> block(at.z, z.channels);
  if (i >= z.result_height || j >= z.result_width || block.group >= z.groups) {
    return;
  }
  const int p = z.k / 2, y = i / z.s * z.t - p, x = j / z.s * z.t - p;
  const Offset first_plane = Offset(block.group) * z.channels + block.first;
  const int place = i * z.result_width + j;
  const Offset lines = first_plane * z.plane;
  const Offset weights = Offset(block.group) * z.k * z.k * z.result_plane + place;

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
  out += first_plane * z.result_plane + place;
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
    uint3 at [[thread_position_in_grid]]) {
  typedef typename Offsets<WIDE>::type Offset;
  const Sizes z(sizes);
  const int y = int(at.y), x = int(at.x);
  const Block<CHANNELS> block(at.z, z.channels);
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
    uint3 at [[thread_position_in_grid]]) {
  typedef typename Offsets<WIDE>::type Offset;
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
  Offset grads = Offset(group) * z.channels * z.result_plane + place;
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
  out += (Offset(kernel_row) * z.k + first_v) * z.result_plane + place;
#pragma unroll
  for (int v = 0; v < TAPS; ++v) {
    if (first_v + v < z.k) {
      out[Offset(v) * z.result_plane] = T(column[v] == x + v ? sums[v] : 0.0f);
    }
  }
}

// A name for every variant: of the general kernels by their offsets, of the others by kernel_size and width.
#define INSTANTIATE(NAME, ...) template [[host_name(NAME)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;

INSTANTIATE("carafe", carafe<false>)
INSTANTIATE("carafe_wide", carafe<true>)
INSTANTIATE("carafe_backward_features", carafe_backward_features<false>)
INSTANTIATE("carafe_backward_features_wide", carafe_backward_features<true>)
INSTANTIATE("carafe_backward_masks", carafe_backward_masks<false>)
INSTANTIATE("carafe_backward_masks_wide", carafe_backward_masks<true>)

#define INSTANTIATE_DOUBLING(K, EVEN, SUFFIX)                                                                     \
  INSTANTIATE("carafe_doubling_" SUFFIX, carafe_doubling<K, EVEN, FORWARD_CHANNELS>)                              \
  INSTANTIATE("carafe_backward_features_doubling_" SUFFIX, carafe_backward_features_doubling<K, EVEN, CHANNELS>) \
  INSTANTIATE("carafe_backward_masks_doubling_" SUFFIX, carafe_backward_masks_doubling<K, EVEN>)

INSTANTIATE_DOUBLING(3, true, "k3_even")
INSTANTIATE_DOUBLING(3, false, "k3_odd")
INSTANTIATE_DOUBLING(5, true, "k5_even")
INSTANTIATE_DOUBLING(5, false, "k5_odd")
