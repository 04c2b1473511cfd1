// Compiled once for each instruction set, as carafe_kernels.cpp is. Vectorised along the channels of a head, which have
// the samples of its points in common; the samples of a block of points are found together.
#include "multi_scale_deform_attn_kernels.h"

#include "bilinear.h"
#include "vectors.h"

namespace omniops {
namespace OMNIOPS_NAMESPACE {
namespace {

using Share = MultiScaleDeformAttnShare;
using LevelBlock = MultiScaleDeformAttnBlock;

constexpr int kBlock = LevelBlock::size;
constexpr Index kCacheLine = 64;

// Pixels, which lie a stride apart, between the one that is written or copied and the one that is fetched.
constexpr Index kAhead = 8;

// Rounds products that are to be added to something: a fused multiplication and addition would find another place than
// PyTorch's two operators do, and with it another pixel.
template <class A>
OMNIOPS_INLINE void round_products(A (&products)[kBlock]) {
#if OMNIOPS_VECTOR_EXTENSION
  __asm__("" : "+m"(products));
#else
  (void)products;
#endif
}

// --- samples ---

// Where the samples of a block of points lie, from their locations and weights.
template <class A>
struct Samples {
  Index pixel[kBlock];           // the top left corner
  std::int32_t corners[kBlock];  // on the map
  A height[kBlock], width[kBlock];
  A down[kBlock], right[kBlock];  // from the top left corner
  A weight[4][kBlock];            // of the corners
  A factor[kBlock];               // of the point; 0 where its level has no pixels

  // A sample outside of the map gets finite weights for the zeros that it sees. One that is not a number is not
  // outside: its weights are not numbers.
  OMNIOPS_INLINE void find(const LevelBlock& levels, A (&x)[kBlock], A (&y)[kBlock]) {
    for (int b = 0; b < kBlock; ++b) {
      height[b] = static_cast<A>(levels.height[b]);
      width[b] = static_cast<A>(levels.width[b]);
      y[b] *= height[b];
      x[b] *= width[b];
    }
    round_products(x);
    round_products(y);
    std::int32_t top[kBlock], left[kBlock];
    for (int b = 0; b < kBlock; ++b) {
      const A at_y = y[b] - A(0.5), at_x = x[b] - A(0.5);
      const bool outside = (at_y <= -1) | (at_y >= height[b]) | (at_x <= -1) | (at_x >= width[b]) | (height[b] <= 0);
      top[b] = floor_of(at_y, height[b]);
      left[b] = floor_of(at_x, width[b]);
      down[b] = outside ? 0 : at_y - static_cast<A>(top[b]);
      right[b] = outside ? 0 : at_x - static_cast<A>(left[b]);
      const std::int32_t on_map = corners_on_map(top[b], left[b], levels.height[b] - 1, levels.width[b] - 1);
      corners[b] = outside ? 0 : on_map;
    }
    for (int b = 0; b < kBlock; ++b) {
      weight[0][b] = (1 - down[b]) * (1 - right[b]);
      weight[1][b] = (1 - down[b]) * right[b];
      weight[2][b] = down[b] * (1 - right[b]);
      weight[3][b] = down[b] * right[b];
    }
    for (int b = 0; b < kBlock; ++b) {
      pixel[b] = levels.first_pixel[b] + static_cast<Index>(top[b]) * levels.width[b] + left[b];
    }
  }

  // The pixel that is nearest, as the top left corner.
  OMNIOPS_INLINE void find_nearest(const LevelBlock& levels, A (&x)[kBlock], A (&y)[kBlock]) {
    for (int b = 0; b < kBlock; ++b) {
      y[b] *= static_cast<A>(levels.height[b]);
      x[b] *= static_cast<A>(levels.width[b]);
    }
    round_products(x);
    round_products(y);
    for (int b = 0; b < kBlock; ++b) {
      const Index row = clamp_index(y[b] + A(0.5), levels.height[b]);
      const Index column = clamp_index(x[b] + A(0.5), levels.width[b]);
      pixel[b] = levels.first_pixel[b] + row * levels.width[b] + column;
      corners[b] = levels.height[b] > 0 ? top_left : 0;
      weight[0][b] = 1;
    }
  }

  // What is not a number counts as 0.
  static OMNIOPS_INLINE std::int32_t clamp_index(A position, std::int32_t size) {
    A safe = position > 0 ? position : 0;
    safe = safe < static_cast<A>(size) ? safe : static_cast<A>(size);
    const std::int32_t found = static_cast<std::int32_t>(safe);
    return found < size ? found : size - 1;
  }
};

template <class N>
OMNIOPS_INLINE void prefetch_row(const N* row, Index count) {
  for (Index x = 0; x < count; x += kCacheLine / Index(sizeof(N))) prefetch(row + x);
}

// --- the kernels ---

// T is what value is of. Everything between loads and stores is in A. `corners` is 4, or 1 where only the nearest pixel
// is sampled.
template <class T, int corners>
struct Kernels {
  using A = Accumulator<T>;

  // The samples of `count` points, of which `in_row` lie one after another, and those rows `step` apart.
  static void find_samples(const Share& share, Index count, Index in_row, Index step, const A* locations,
                           const A* weights, Samples<A>* samples) {
    Index row = 0, k = 0;
    for (Index begin = 0; begin < count; begin += kBlock, ++samples) {
      A x[kBlock] = {}, y[kBlock] = {}, factor[kBlock] = {};
      const int in_block = static_cast<int>(count - begin < kBlock ? count - begin : kBlock);
      for (int b = 0; b < in_block;) {
        const Index index = row * step + k;
        const int run = static_cast<int>(in_row - k < in_block - b ? in_row - k : in_block - b);
        for (int i = 0; i < run; ++i) {
          x[b + i] = locations[2 * (index + i)];
          y[b + i] = locations[2 * (index + i) + 1];
          factor[b + i] = weights[index + i];
        }
        b += run;
        k += run;
        if (k == in_row) {
          k = 0;
          ++row;
        }
      }
      const LevelBlock& levels = share.blocks[begin / kBlock];
      for (int b = 0; b < kBlock; ++b) samples->factor[b] = levels.height[b] > 0 ? factor[b] : 0;
      if constexpr (corners == 4) {
        samples->find(levels, x, y);
      } else {
        samples->find_nearest(levels, x, y);
      }
    }
  }

  // The corners of a sample, `zeros` for those that do not lie on the map.
  struct Pixels {
    const T* corner[corners];

    OMNIOPS_INLINE Pixels(const Samples<A>& samples, const LevelBlock& levels, int b, const T* map, Index stride,
                          const T* zeros) {
      const T* first = map + samples.pixel[b] * stride;
      const Index below = levels.width[b] * stride;
      const std::int32_t on_map = samples.corners[b];
      for (int c = 0; c < corners; ++c) {
        const Index to = (c & 1 ? stride : 0) + (c & 2 ? below : 0);
        corner[c] = on_map >> c & 1 ? first + to : zeros;
      }
    }
  };

  static std::int64_t scratch_bytes(const Share& share, bool by_value, bool copies) {
    const Index numbers = share.pixel_count * share.channels;
    return places_bytes(share) + numbers * Index((by_value ? sizeof(A) : 0) + (copies ? sizeof(T) : 0));
  }

  static Index places_bytes(const Share& share) {
    const Index bytes = (share.rows * share.point_count + kBlock - 1) / kBlock * Index(sizeof(Samples<A>));
    return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
  }

  // Several sums at once, so that none waits for the one before.
  template <int vectors>
  static constexpr int kSums = vectors * corners <= kRegisters / 2 ? corners : 1;

  // Calls work(vectors, lanes, x) for the channels from x on that `vectors` of so many lanes take, until all are.
  template <class Work>
  static OMNIOPS_INLINE void for_chunks(Index channels, const Work& work) {
    constexpr int lanes = kLanes<A>;
    Index x = 0;
    for (; x + 4 * lanes <= channels; x += 4 * lanes) work(Constant<4>{}, Constant<lanes>{}, x);
    if (x + 2 * lanes <= channels) {
      work(Constant<2>{}, Constant<lanes>{}, x);
      x += 2 * lanes;
    }
    rest<lanes, A>(x, channels, [&](auto some, Index offset) { work(Constant<1>{}, some, offset); });
  }

  // `lanes` * `vectors` channels of the sum over the points begin ... end - 1.
  template <int vectors, int lanes>
  static OMNIOPS_INLINE void sum_samples(const Share& share, const Samples<A>* samples, Index begin, Index end,
                                         const T* map, Index stride, const T* zeros, T* out) {
    constexpr int count = kSums<vectors>;
    Vector<A, lanes> sums[vectors][count] = {};
    for (Index s = begin; s < end; ++s) {
      const Samples<A>& block = samples[s / kBlock];
      const int b = static_cast<int>(s % kBlock);
      const Pixels pixels(block, share.blocks[s / kBlock], b, map, stride, zeros);
      const A factor = block.factor[b];
      for (int c = 0; c < corners; ++c) {
        const A weight = corners == 1 ? factor : block.weight[c][b] * factor;
        for (int v = 0; v < vectors; ++v) {
          sums[v][c % count] = sums[v][c % count] + vector_at<lanes>(pixels.corner[c] + v * lanes) * weight;
        }
      }
    }
    for (int v = 0; v < vectors; ++v) {
      for (int c = 1; c < count; ++c) sums[v][0] = sums[v][0] + sums[v][c];
      store_at<lanes>(out + v * lanes, sums[v][0]);
    }
  }

  // The pixels of a head in the share's levels, where they lie in value or as they were copied from there.
  struct Map {
    const T* pixels;
    Index stride;  // from pixel to pixel

    OMNIOPS_INLINE Map(const Share& share, Index image, Index head, const void* value)
        : pixels(static_cast<const T*>(value) + start(share, image, head)), stride(share.heads * share.channels) {}

    static OMNIOPS_INLINE Index start(const Share& share, Index image, Index head) {
      return ((image * share.pixels + share.first_pixel) * share.heads + head) * share.channels;
    }

    // One pixel after another: so they share no sets of the caches with other heads' pixels, and fit in there.
    OMNIOPS_INLINE void copy(const Share& share, void* target) {
      T* to = static_cast<T*>(target);
      const T* from = pixels;
      for (Index pixel = 0; pixel < share.pixel_count; ++pixel, from += stride) {
        if (pixel + kAhead < share.pixel_count) prefetch_row(from + kAhead * stride, share.channels);
        copy_row(from, share.channels, to + pixel * share.channels);
      }
      pixels = to;
      stride = share.channels;
    }

    static OMNIOPS_INLINE void copy_row(const T* from, Index count, T* to) {
      constexpr Index some = 16 / sizeof(T);
      Index x = 0;
      for (; x + some <= count; x += some) std::memcpy(to + x, from + x, 16);
      for (; x < count; ++x) to[x] = from[x];
    }
  };

  // All at once, so that the memory has more to fetch at a time than it would for one sample after another.
  static OMNIOPS_INLINE void prefetch_pixels(const Share& share, Index count, const Samples<A>* samples,
                                             const Map& map) {
    for (Index s = 0; s < count; ++s) {
      const Pixels pixels(samples[s / kBlock], share.blocks[s / kBlock], static_cast<int>(s % kBlock), map.pixels,
                      map.stride, map.pixels);
      for (int c = 0; c < corners; ++c) prefetch_row(pixels.corner[c], share.channels);
    }
  }

  static void forward(const Share& share, Index image, Index head, Index begin, Index end, bool copies,
                      const void* value, const void* sampling_locations, const void* attention_weights,
                      const void* zeros, void* out, void* scratch) {
    const Index points = share.point_count, channels = share.channels, stride = share.heads * channels;
    const Index step = share.heads * points;
    Samples<A>* samples = static_cast<Samples<A>*>(scratch);
    const T* none = static_cast<const T*>(zeros);
    Map map(share, image, head, value);
    if (copies) map.copy(share, static_cast<char*>(scratch) + places_bytes(share));
    for (Index query = begin; query < end; query += share.rows) {
      const Index rows = end - query < share.rows ? end - query : share.rows;
      const Index row = (image * share.queries + query) * share.heads + head;
      const A* locations = static_cast<const A*>(sampling_locations) + 2 * row * points;
      const A* weights = static_cast<const A*>(attention_weights) + row * points;
      T* target = static_cast<T*>(out) + row * channels;
      find_samples(share, rows * points, points, step, locations, weights, samples);
      if (!copies) prefetch_pixels(share, rows * points, samples, map);
      for (Index r = 0; r < rows; ++r) {
        if (query + rows + r < end) {
          prefetch_row(locations + 2 * (rows + r) * step, 2 * points);
          prefetch_row(weights + (rows + r) * step, points);
        }
        for_chunks(channels, [&](auto vectors, auto lanes, Index x) {
          sum_samples<decltype(vectors)::value, decltype(lanes)::value>(
              share, samples, r * points, (r + 1) * points, map.pixels + x, map.stride, none, target + r * stride + x);
        });
      }
    }
  }

  static void backward(const Share& share, Index image, Index head, bool copies, const void* grad, const void* value,
                       const void* sampling_locations, const void* attention_weights, const void* zeros,
                       void* by_value, void* by_locations, void* by_weights, void* scratch) {
    const Index channels = share.channels, stride = share.heads * channels, points = share.point_count;
    const Index step = share.heads * share.all_points;
    Samples<A>* samples = static_cast<Samples<A>*>(scratch);
    A* by_map = reinterpret_cast<A*>(static_cast<char*>(scratch) + places_bytes(share));
    const bool by_points = by_locations != nullptr || by_weights != nullptr;
    Map map(share, image, head, value);
    if (copies && by_points) map.copy(share, by_map + (by_value == nullptr ? 0 : share.pixel_count * channels));
    if (by_value != nullptr) fill_zero(by_map, share.pixel_count * channels);
    for (Index query = 0; query < share.queries && points > 0; query += share.rows) {
      const Index rows = share.queries - query < share.rows ? share.queries - query : share.rows;
      const Index row = (image * share.queries + query) * share.heads + head;
      const Index first = row * share.all_points + share.first_point;
      const A* locations = static_cast<const A*>(sampling_locations) + 2 * first;
      const A* weights = static_cast<const A*>(attention_weights) + first;
      A* of_locations = by_locations == nullptr ? nullptr : static_cast<A*>(by_locations) + 2 * first;
      A* of_weights = by_weights == nullptr ? nullptr : static_cast<A*>(by_weights) + first;
      const T* g = static_cast<const T*>(grad) + row * channels;
      find_samples(share, rows * points, points, step, locations, weights, samples);
      if (!copies && by_points) prefetch_pixels(share, rows * points, samples, map);
      for (Index r = 0; r < rows; ++r) {
        if (query + rows + r < share.queries) {
          const Index next = (rows + r) * step;
          prefetch_row(locations + 2 * next, 2 * points);
          prefetch_row(weights + next, points);
          prefetch_row(g + (rows + r) * stride, channels);
          if (of_locations != nullptr) prefetch_row(of_locations + 2 * next, 2 * points);
          if (of_weights != nullptr) prefetch_row(of_weights + next, points);
        }
        if (by_value == nullptr) continue;
        for_chunks(channels, [&](auto vectors, auto lanes, Index x) {
          add_to_pixels<decltype(vectors)::value, decltype(lanes)::value>(share, samples, r * points, (r + 1) * points,
                                                                          g + r * stride + x, by_map + x);
        });
      }
      if (by_points) find_by_points(share, samples, rows, step, g, map, zeros, of_locations, of_weights);
    }
    if (by_value == nullptr) return;
    T* target = static_cast<T*>(by_value) + Map::start(share, image, head);
    for (Index pixel = 0; pixel < share.pixel_count; ++pixel) {
      if (pixel + kAhead < share.pixel_count) prefetch_row(target + (pixel + kAhead) * stride, channels);
      narrow_row(by_map + pixel * channels, channels, target + pixel * stride);
    }
  }

  // Adds the gradient of `lanes` * `vectors` channels of a query to the pixels of its points begin ... end - 1.
  template <int vectors, int lanes>
  static OMNIOPS_INLINE void add_to_pixels(const Share& share, const Samples<A>* samples, Index begin, Index end,
                                           const T* grad, A* map) {
    const Index right = share.channels;
    Vector<A, lanes> g[vectors];
    for (int v = 0; v < vectors; ++v) g[v] = vector_at<lanes>(grad + v * lanes);
    for (Index s = begin; s < end; ++s) {
      const Samples<A>& block = samples[s / kBlock];
      const int b = static_cast<int>(s % kBlock);
      const std::int32_t on_map = block.corners[b];
      const Index below = share.blocks[s / kBlock].width[b] * right;
      const Index to[4] = {0, right, below, below + right};
      A* first = map + block.pixel[b] * right;
      const A factor = block.factor[b];
      for (int c = 0; c < corners; ++c) {
        if (!(on_map >> c & 1)) continue;
        const A weight = corners == 1 ? factor : factor * block.weight[c][b];
        for (int v = 0; v < vectors; ++v) add(g[v] * weight, first + to[c] + v * lanes);
      }
    }
  }

  static constexpr int kFolded = kLanes<A> < 4 ? kLanes<A> : 4;

  // Sums that together make that of all lanes, kFolded of kLanes.
  template <int lanes>
  static OMNIOPS_INLINE auto folded(Vector<A, lanes> v) {
    if constexpr (lanes > 4) {
      Vector<A, lanes / 2> half[2];
      std::memcpy(half, &v, sizeof v);
      return folded<lanes / 2>(half[0] + half[1]);
    } else {
      return v;
    }
  }

  // The products of a gradient and the corners of sample b, which `partial` has the sums of.
  static OMNIOPS_INLINE void multiply_pixels(const Pixels& pixels, const T* grad, Index channels, int b,
                                             A (&partial)[corners][kBlock][kFolded]) {
    constexpr int lanes = kLanes<A>;
    Vector<A> dot[corners] = {};
    Index x = 0;
    for (; x + lanes <= channels; x += lanes) {
      const Vector<A> g = load(grad + x);
      for (int c = 0; c < corners; ++c) dot[c] = dot[c] + g * load(pixels.corner[c] + x);
    }
    if (x < channels) {
      const Vector<A> g = load(grad + x, channels - x);
      for (int c = 0; c < corners; ++c) dot[c] = dot[c] + g * load(pixels.corner[c] + x, channels - x);
    }
    for (int c = 0; c < corners; ++c) {
      const auto few = folded<lanes>(dot[c]);
      std::memcpy(partial[c][b], &few, sizeof few);
    }
  }

  // The gradients of the points of `rows` queries, `step` apart.
  static OMNIOPS_INLINE void find_by_points(const Share& share, const Samples<A>* samples, Index rows, Index step,
                                            const T* grad, const Map& map, const void* zeros, A* by_locations,
                                            A* by_weights) {
    const Index points = share.point_count, channels = share.channels, stride = share.heads * channels;
    const Index count = rows * points;
    const T* none = static_cast<const T*>(zeros);
    Index k = 0, to = 0;
    for (Index begin = 0; begin < count; begin += kBlock, ++samples) {
      const LevelBlock& levels = share.blocks[begin / kBlock];
      const int in_block = static_cast<int>(count - begin < kBlock ? count - begin : kBlock);
      A partial[corners][kBlock][kFolded];
      Index target[kBlock];
      for (int c = 0; c < corners; ++c) {
        if (in_block < kBlock) fill_zero(partial[c][in_block], (kBlock - in_block) * kFolded);
      }
      for (int b = 0; b < in_block; ++b) {
        // Where a level has no pixels, what is not finite in grad is not multiplied by zero.
        multiply_pixels({*samples, levels, b, map.pixels, map.stride, none}, levels.height[b] > 0 ? grad : none,
                        channels, b, partial);
        target[b] = to + k;
        if (++k == points) {
          k = 0;
          to += step;
          grad += stride;
        }
      }
      A dots[corners][kBlock];
      for (int c = 0; c < corners; ++c) {
        for (int b = 0; b < kBlock; ++b) dots[c][b] = sum_of<A, kFolded>(partial[c][b]);
      }
      A by_x[kBlock], by_y[kBlock], by_weight[kBlock];
      if constexpr (corners == 1) {
        for (int b = 0; b < kBlock; ++b) {
          by_x[b] = by_y[b] = 0;
          by_weight[b] = dots[0][b];
        }
      } else {
        for (int b = 0; b < kBlock; ++b) {
          const A down = samples->down[b], right = samples->right[b];
          const A by_right = (dots[1][b] - dots[0][b]) * (1 - down) + (dots[3][b] - dots[2][b]) * down;
          const A by_down = (dots[2][b] - dots[0][b]) * (1 - right) + (dots[3][b] - dots[1][b]) * right;
          by_x[b] = samples->factor[b] * samples->width[b] * by_right;
          by_y[b] = samples->factor[b] * samples->height[b] * by_down;
          by_weight[b] = dots[0][b] * samples->weight[0][b] + dots[1][b] * samples->weight[1][b] +
                         dots[2][b] * samples->weight[2][b] + dots[3][b] * samples->weight[3][b];
        }
      }
      for (int b = 0; b < in_block; ++b) {
        if (by_weights != nullptr) by_weights[target[b]] = by_weight[b];
        if (by_locations == nullptr) continue;
        by_locations[2 * target[b]] = by_x[b];
        by_locations[2 * target[b] + 1] = by_y[b];
      }
    }
  }
};

template <class T, int corners>
constexpr MultiScaleDeformAttnKernels kernels() {
  return {Kernels<T, corners>::scratch_bytes, Kernels<T, corners>::forward, Kernels<T, corners>::backward};
}

template <class T>
constexpr MultiScaleDeformAttnKernels kernels(bool discrete) {
  return discrete ? kernels<T, 1>() : kernels<T, 4>();
}

}  // namespace

MultiScaleDeformAttnKernels multi_scale_deform_attn_kernels(Dtype dtype, bool discrete) {
  switch (dtype) {
    case Dtype::float64:
      return kernels<double>(discrete);
    case Dtype::float16:
      return kernels<Float16>(discrete);
    case Dtype::bfloat16:
      return kernels<BFloat16>(discrete);
    default:
      return kernels<float>(discrete);
  }
}

}  // namespace OMNIOPS_NAMESPACE
}  // namespace omniops
