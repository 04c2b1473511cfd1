// CARAFE on Apple GPUs, for scale_factor 2, stride 1 and kernel_size K; omniops/ops/carafe.py has the formula and the
// names. carafe.metal serves everything else.
//
// N batch and G channel groups are one axis here, "group" = n * G + g, since features, masks and results of (n, g) lie
// together in memory. All tensors are contiguous, start at a multiple of four elements and have fewer than 2^31. Sums
// are in float.
//
// Addresses are the kernel's argument, which is the same for all threads, and an offset of 32 bits, as 64-bit integers
// are slow on these GPUs. It is signed: what cannot wrap, a compiler may take apart.
//
// A thread owns two neighbouring centres, x and x + 1 with x even, so that rows of features are read in pairs and rows
// of masks, gradients and results in fours; EVEN says that the width is even, so that the pairs and fours are aligned
// and lie in the map as a whole or not at all. With P = K / 2 the columns x - P ... x + 1 + P that the two centres see
// are read as pairs from x - LEFT on. Of the four products of a pair with the two centres, two fall on the same tap v,
// the others on v + 1 and v - 1.
//
// What one step multiplies is loaded first, all of it and without a branch, so that its loads wait for memory together.
// What lies outside the map is zero, features and masks alike, as neither may spoil a sum where it is not finite.
//
// ASCII and Metal 3.1 only: PyTorch hands the source to the compiler so.

#include <metal_stdlib>
using namespace metal;

// The dtype of the tensors: float, half or bfloat. Who compiles the source says which.
#ifndef SCALAR
#define SCALAR float
#endif
typedef SCALAR T;

constant constexpr int CHANNELS = 8;  // the channels of one group that a thread of carafe_backward_features owns
constant constexpr int ROWS = 2;      // and its rows of results
constant constexpr int AHEAD = 4;     // the channels that a thread of carafe_backward_masks loads at once
constant constexpr int SIMD = 32;

// The channels that a thread of carafe owns. What it loads for a step takes twice the registers in float.
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
inline Two load_two(device const T* from, int index, bool inside) {
  BitsOfTwo bits = BitsOfTwo(0u);
  if (inside) {
    bits = *(device const BitsOfTwo*)(from + index);
  }
  return as_type<Two>(bits);
}

// Two neighbours of a row, the second of which may lie outside it and is then zero.
template <bool EVEN>
inline Two load_pair(device const T* from, int index, bool inside, bool second) {
  if (EVEN) {
    return load_two(from, index, inside);
  }
  Two value;
  value.x = inside ? from[index] : T(0.0f);
  value.y = inside && second ? from[index + 1] : T(0.0f);
  return value;
}

// The two values of each of two centres, the second of which may lie outside the row.
template <bool EVEN>
inline Four load_four(device const T* from, int index, bool inside, bool second) {
  if (EVEN) {
    BitsOfFour bits = BitsOfFour(0u);
    if (inside) {
      bits = *(device const BitsOfFour*)(from + index);
    }
    return as_type<Four>(bits);
  }
  const Two low = load_two(from, index, inside), high = load_two(from, index + 2, inside && second);
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

// Where the grid's third axis stands: a group, and the first of the C channels of it that the thread sums. The last of
// a group's blocks reaches back into the one before it where C does not divide them, so that no inner loop asks how
// many are left; the thread stores the channels from skip on only. No group has fewer than C channels.
template <int C>
struct Block {
  int group, first, skip;

  Block(uint z, int channels) {
    const int blocks = (channels + C - 1) / C;
    group = int(z) / blocks;
    const int own = (int(z) - group * blocks) * C;
    first = min(own, channels - C);
    skip = own - first;
  }
};

// out[2y + a, 2x + b] = sum over u, v of masks[u, v, 2y + a, 2x + b] * features[y + u - P, x + v - P]
//
// Grid: (pairs of centres of a row, rows of centres, groups * blocks of channels). A thread holds the 2 * 4 results of
// its two centres in each of its C channels. sizes: groups, channels of a group, H, W.
template <int K, bool EVEN, int C>
[[kernel, max_total_threads_per_threadgroup(128)]] void carafe(
    device const T* features [[buffer(0)]],
    device const T* masks [[buffer(1)]],
    device T* out [[buffer(2)]],
    constant int* sizes [[buffer(3)]],
    uint3 gid [[thread_position_in_grid]]) {
  constexpr int P = K / 2;
  constexpr int LEFT = (P + 1) / 2 * 2;
  const int channels = sizes[1], height = sizes[2], width = sizes[3];
  const int result_width = 2 * width;
  const int plane = height * width, result_plane = 4 * plane;
  const int x = 2 * int(gid.x), y = int(gid.y);
  const Block<C> block(gid.z, channels);
  if (x >= width || y >= height || block.group >= sizes[0]) {
    return;
  }
  const bool second = EVEN || x + 1 < width;
  const int first_plane = block.group * channels + block.first;
  const int pixel = 2 * y * result_width + 2 * x;
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
  int weights = (block.group * (K * K) + first_u * K) * result_plane + pixel;
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
  const int to = first_plane * result_plane + pixel;
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

// What a row of results of carafe_backward_features's centres gives to the rows FROM ... TO - 1 of ROWS rows of
// features, from the pairs of centres that see them. line: of the gradients, at column 2x; weights: of tap (u, 0) of
// the first of the ROWS rows, there too, the next row's being K planes on.
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

// out[y, x] = sum over u, v, a, b of masks[u, v, 2q + a, 2r + b] * grad[2q + a, 2r + b],
//     (q, r) = (y + P - u, x + P - v)
//
// A gather: each result is summed by one thread in one order. Grid: (pairs of a row, ROWS rows at a time, groups *
// blocks of channels). A thread holds the ROWS x 2 results (y, x) ... (y + 1, x + 1), y and x even, in each of its C
// channels, and visits the rows of centres that they see: the first only the upper row of results sees, the last only
// the lower one, and each gradient of those in between serves both. sizes: groups, channels of a group, H, W.
template <int K, bool EVEN, int C>
[[kernel, max_total_threads_per_threadgroup(128)]] void carafe_backward_features(
    device const T* grad [[buffer(0)]],
    device const T* masks [[buffer(1)]],
    device T* out [[buffer(2)]],
    constant int* sizes [[buffer(3)]],
    uint3 gid [[thread_position_in_grid]]) {
  constexpr int P = K / 2;
  const int channels = sizes[1], height = sizes[2], width = sizes[3];
  const int result_width = 2 * width;
  const int plane = height * width, result_plane = 4 * plane;
  const int x = 2 * int(gid.x), y = ROWS * int(gid.y);
  const Block<C> block(gid.z, channels);
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
[[kernel, max_total_threads_per_threadgroup(256)]] void carafe_backward_masks(
    device const T* grad [[buffer(0)]],
    device const T* features [[buffer(1)]],
    device T* out [[buffer(2)]],
    constant int* sizes [[buffer(3)]],
    uint3 gid [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  constexpr int P = K / 2;
  constexpr int LEFT = (P + 1) / 2 * 2;
  const int channels = sizes[1], height = sizes[2], width = sizes[3], splits = sizes[4];
  const int result_width = 2 * width;
  const int plane = height * width, result_plane = 4 * plane;
  const int pairs = (width + 1) / 2, tile = SIMD / splits;
  const int u = int(gid.y), group = int(gid.z);
  const int asked = int(gid.x) / SIMD * tile + int(lane) % tile;
  const int position = min(asked, pairs * height - 1);  // no lane leaves before the shuffles
  const int y = position / pairs, x = 2 * (position - y * pairs);
  const int row = y + u - P;
  const int last = (row < 0 || row >= height) ? 0 : channels;
  const bool second = EVEN || x + 1 < width;
  const int pixel = 2 * y * result_width + 2 * x;

  float sums[K][2][4];  // of tap v and centre x + i at (a, b): [v][i][2 * a + b]
#pragma unroll
  for (int v = 0; v < K; ++v) {
#pragma unroll
    for (int o = 0; o < 4; ++o) {
      sums[v][0][o] = sums[v][1][o] = 0.0f;
    }
  }
  const int first_plane = group * channels + int(lane) / tile;
  int grads = first_plane * result_plane + pixel;
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
  const int to = (group * (K * K) + u * K) * result_plane + pixel;
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

#define INSTANTIATE(NAME, FUNCTION, ...) \
  template [[host_name(NAME)]] [[kernel]] decltype(FUNCTION<__VA_ARGS__>) FUNCTION<__VA_ARGS__>;

#define INSTANTIATE_ALL(K, EVEN, SUFFIX)                                                                     \
  INSTANTIATE("carafe_" SUFFIX, carafe, K, EVEN, FORWARD_CHANNELS)                                           \
  INSTANTIATE("carafe_backward_features_" SUFFIX, carafe_backward_features, K, EVEN, CHANNELS)               \
  INSTANTIATE("carafe_backward_masks_" SUFFIX, carafe_backward_masks, K, EVEN)
INSTANTIATE_ALL(3, true, "k3_even")
INSTANTIATE_ALL(3, false, "k3_odd")
INSTANTIATE_ALL(5, true, "k5_even")
INSTANTIATE_ALL(5, false, "k5_odd")
