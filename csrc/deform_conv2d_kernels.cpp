// Compiled once for each instruction set, as carafe_kernels.cpp is. Vectorised along the channels of a run, which share
// the place of their samples; the places of a block of positions are found together, one tap after another.
#include "deform_conv2d_kernels.h"

#include "simd.h"

namespace omniops {
namespace OMNIOPS_NAMESPACE {
namespace {

using Index = std::int64_t;

// Positions, one after another in an image, whose places are found at once.
constexpr int kBlock = 16;

// A compile-time number, as an argument.
template <int value_>
struct Constant {
  static constexpr int value = value_;
};

OMNIOPS_INLINE void prefetch(const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#else
  (void)address;
#endif
}

// --- channels ---

template <int lanes, class A, class Work>
OMNIOPS_INLINE void rest(Index x, Index count, const Work& work) {
  if constexpr (lanes > 0) {
    if (x + lanes <= count) {
      work(Constant<lanes>{}, x);
      x += lanes;
    }
    rest<lanes / 2, A>(x, count, work);
  }
}

// Calls work(lanes, x) for vectors that cover 0 ... count - 1: as many whole ones as fit, then ever shorter ones.
template <class A, class Work>
OMNIOPS_INLINE void for_vectors(Index count, const Work& work) {
  Index x = 0;
  for (; x + kLanes<A> <= count; x += kLanes<A>) work(Constant<kLanes<A>>{}, x);
  rest<kLanes<A> / 2, A>(x, count, work);
}

// Fewer numbers in half precision than simd.h's load and store take: what is left of a run, or a short one.
template <int lanes, class T>
OMNIOPS_INLINE Vector<float, lanes> widen_few(Constant<lanes>, const T* source) {
  Vector<float, lanes> v;
  for (int i = 0; i < lanes; ++i) v[i] = widen(source[i]);
  return v;
}

template <int lanes, class T, class V>
OMNIOPS_INLINE void narrow_few(Constant<lanes>, V v, T* target) {
  for (int i = 0; i < lanes; ++i) narrow(static_cast<float>(v[i]), target[i]);
}

#if OMNIOPS_VECTOR_EXTENSION
template <int lanes>
OMNIOPS_INLINE Vector<float, lanes> widen_few(Constant<lanes>, const BFloat16* source) {
  return widen_bfloat16<lanes>(load_bits<Vector<std::uint16_t, lanes>>(source));
}

template <int lanes, class V>
OMNIOPS_INLINE void narrow_few(Constant<lanes>, V v, BFloat16* target) {
  const auto bits = narrow_to_bfloat16<lanes>(v);
  std::memcpy(target, &bits, sizeof bits);
}

#if defined(__F16C__)
OMNIOPS_INLINE Vector<float, 8> widen_few(Constant<8>, const Float16* source) {
  return (Vector<float, 8>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}
OMNIOPS_INLINE Vector<float, 4> widen_few(Constant<4>, const Float16* source) {
  return (Vector<float, 4>)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)));
}
#endif
#endif

// Numbers from any address and to any, fewer than kLanes too.
template <int lanes, class T>
OMNIOPS_INLINE Vector<Accumulator<T>, lanes> vector_at(const T* source) {
  using A = Accumulator<T>;
  if constexpr (sizeof(T) == sizeof(A)) {
    return load_bits<Vector<A, lanes>>(source);
  } else if constexpr (lanes == kLanes<A>) {
    return load(source);
  } else {
    return widen_few(Constant<lanes>{}, source);
  }
}

template <int lanes, class T>
OMNIOPS_INLINE void store_at(T* target, Vector<Accumulator<T>, lanes> v) {
  using A = Accumulator<T>;
  if constexpr (sizeof(T) == sizeof(A)) {
    std::memcpy(target, &v, sizeof v);
  } else if constexpr (lanes == kLanes<A>) {
    store(target, v);
  } else {
    narrow_few(Constant<lanes>{}, v, target);
  }
}

// Half by half, so that vectors stay in registers.
template <int lanes, class A>
OMNIOPS_INLINE A sum_of_lanes(Vector<A, lanes> v) {
  if constexpr (lanes * sizeof(A) > 16) {
    Vector<A, lanes / 2> half[2];
    std::memcpy(half, &v, sizeof v);
    return sum_of_lanes<lanes / 2, A>(half[0] + half[1]);
  } else {
    A lane[lanes];
    std::memcpy(lane, &v, sizeof v);
    return sum_of<A, lanes>(lane);
  }
}

// --- places ---

// The positions block, block + 1, ... of a call, as many as count says, and their places without offset.
template <class A>
struct Block {
  Index first;
  int count;
  Index image;    // which of the batch
  Index in_image;  // the first position, counted from the image's first
  A y[kBlock], x[kBlock];

  Block(const DeformConv2dSizes& sizes, Index begin, Index end) : first(begin) {
    const Index positions = sizes.out_height * sizes.out_width;
    count = static_cast<int>(end - begin < kBlock ? end - begin : kBlock);
    image = (sizes.first + begin) / positions;
    in_image = (sizes.first + begin) % positions;
    Index i = in_image / sizes.out_width, j = in_image % sizes.out_width;
    for (int b = 0; b < kBlock; ++b) {
      y[b] = static_cast<A>(i * sizes.stride_y - sizes.padding_y);
      x[b] = static_cast<A>(j * sizes.stride_x - sizes.padding_x);
      if (++j == sizes.out_width) {
        j = 0;
        ++i;
      }
    }
  }
};

// Which corners of a place lie on the map, as bits. In arrays of four they come in this order.
enum Corner { top_left = 1, top_right = 2, low_left = 4, low_right = 8, all_corners = 15 };

// Where the samples of an offset group lie for one tap and the positions of a block.
template <class A>
struct Places {
  std::int32_t top[kBlock], left[kBlock];  // -2 where no corner lies on the map
  std::int32_t corners[kBlock];
  A down[kBlock], right[kBlock];  // from the top left corner
  A weight[4][kBlock];            // of the corners
  A factor[kBlock];               // of the mask

  // A place outside of the map is moved to (-2, -2), infinite ones too, where it has finite weights for the zeros that
  // it sees. One that is not a number is not outside: its weights are not numbers.
  template <class T>
  Places(const DeformConv2dSizes& sizes, const Block<A>& block, Index group, Index tap, const T* offset,
         const T* mask) {
    const Index positions = sizes.out_height * sizes.out_width;
    const Index plane = (block.image * sizes.offset_groups + group) * sizes.taps() + tap;
    A moves_y[kBlock] = {}, moves_x[kBlock] = {};
    copy(offset + plane * 2 * positions + block.in_image, block.count, moves_y);
    copy(offset + (plane * 2 + 1) * positions + block.in_image, block.count, moves_x);
    if (mask != nullptr) {
      copy(mask + plane * positions + block.in_image, block.count, factor);
    } else {
      for (int b = 0; b < kBlock; ++b) factor[b] = 1;
    }
    const A tap_y = static_cast<A>(tap / sizes.kernel_width * sizes.dilation_y);
    const A tap_x = static_cast<A>(tap % sizes.kernel_width * sizes.dilation_x);
    A at_y[kBlock], at_x[kBlock];
    for (int b = 0; b < kBlock; ++b) {
      at_y[b] = block.y[b] + tap_y + moves_y[b];
      at_x[b] = block.x[b] + tap_x + moves_x[b];
    }
    const A height = static_cast<A>(sizes.height), width = static_cast<A>(sizes.width);
    floor_of(at_y, height, top);
    floor_of(at_x, width, left);
    for (int b = 0; b < kBlock; ++b) {
      const bool outside = (at_y[b] < -1) | (at_y[b] >= height) | (at_x[b] < -1) | (at_x[b] >= width);
      down[b] = outside ? 0 : at_y[b] - static_cast<A>(top[b]);
      right[b] = outside ? 0 : at_x[b] - static_cast<A>(left[b]);
    }
    for (int b = 0; b < kBlock; ++b) {
      weight[0][b] = (1 - down[b]) * (1 - right[b]);
      weight[1][b] = (1 - down[b]) * right[b];
      weight[2][b] = down[b] * (1 - right[b]);
      weight[3][b] = down[b] * right[b];
    }
    const std::int32_t last_row = static_cast<std::int32_t>(sizes.height - 1);
    const std::int32_t last_column = static_cast<std::int32_t>(sizes.width - 1);
    for (int b = 0; b < kBlock; ++b) {
      const std::int32_t above = (top[b] >= 0) & (top[b] <= last_row), below = (top[b] >= -1) & (top[b] < last_row);
      const std::int32_t before = (left[b] >= 0) & (left[b] <= last_column);
      const std::int32_t after = (left[b] >= -1) & (left[b] < last_column);
      corners[b] = (above & before) * top_left | (above & after) * top_right | (below & before) * low_left |
                   (below & after) * low_right;
    }
  }

  // -2, or a number from `size` on, for places from which no pixel is seen; -2 for what is not a number.
  static OMNIOPS_INLINE void floor_of(const A place[kBlock], A size, std::int32_t floor[kBlock]) {
    for (int b = 0; b < kBlock; ++b) {
      A safe = place[b] < size ? place[b] : size;
      safe = place[b] >= -2 ? safe : A(-2);
      const std::int32_t toward_zero = static_cast<std::int32_t>(safe);
      floor[b] = toward_zero - (static_cast<A>(toward_zero) > safe ? 1 : 0);
    }
  }

  // Fetches the next block's numbers, too: the planes of offset are too many streams for the processor to foresee.
  template <class T>
  static OMNIOPS_INLINE void copy(const T* source, int count, A* target) {
    prefetch(source + 2 * kBlock - 1);
    if (count == kBlock) {
      for (int b = 0; b < kBlock; b += kLanes<A>) store_at<kLanes<A>>(target + b, vector_at<kLanes<A>>(source + b));
    } else {
      for (int b = 0; b < kBlock; ++b) target[b] = b < count ? widen(source[b]) : 0;
    }
  }
};

// Distances in memory, worked out once.
struct Steps {
  Index right, down, image;    // in the image
  Index column, next_columns;  // in the columns, from tap to tap and from position to position

  explicit Steps(const DeformConv2dSizes& sizes)
      : right(sizes.channels),
        down(sizes.width * right),
        image(sizes.height * down),
        column(sizes.channels / sizes.groups),
        next_columns(sizes.taps() * column) {}

  // To the samples of a run at a position of the call.
  OMNIOPS_INLINE Index to_columns(const DeformConv2dRun& run, Index position, Index tap) const {
    return run.column + position * next_columns + tap * column;
  }

  // To a channel of the corners of a place, of which some may not lie on the map.
  template <class A>
  OMNIOPS_INLINE void to_corners(const Places<A>& places, int b, Index channel, Index to[4]) const {
    to[0] = places.top[b] * down + places.left[b] * right + channel;
    to[1] = to[0] + right;
    to[2] = to[0] + down;
    to[3] = to[2] + right;
  }
};

// A channel of the corners of a place, `zeros` for those that do not lie on the map.
template <class T>
struct Pixels {
  const T* corner[4];

  OMNIOPS_INLINE Pixels(const Steps& steps, const T* image, const Places<Accumulator<T>>& places, int b, Index channel,
                        const T* zeros) {
    Index to[4];
    steps.to_corners(places, b, channel, to);
    const std::int32_t corners = places.corners[b];
    for (int k = 0; k < 4; ++k) corner[k] = corners == all_corners || corners >> k & 1 ? image + to[k] : zeros;
  }
};

// Calls work(block, tap, run, places) for each block of the part's positions, each tap and each run.
template <class T, class Work>
OMNIOPS_INLINE void for_runs(const DeformConv2dSizes& sizes, const DeformConv2dPart& part, const void* offset,
                             const void* mask, const Work& work) {
  using A = Accumulator<T>;
  for (Index begin = part.begin; begin < part.end; begin += kBlock) {
    const Block<A> block(sizes, begin, part.end);
    for (Index tap = 0; tap < sizes.taps(); ++tap) {
      for (Index r = 0; r < part.run_count;) {
        const Index group = part.runs[r].offset_group;
        const Places<A> places(sizes, block, group, tap, static_cast<const T*>(offset), static_cast<const T*>(mask));
        for (; r < part.run_count && part.runs[r].offset_group == group; ++r) work(block, tap, part.runs[r], places);
      }
    }
  }
}

// --- the kernels ---

// T is what image, offset and mask are of, Column what columns are of. Everything between loads and stores is in A.
template <class T, class Column>
struct Kernels {
  using A = Accumulator<T>;

  static void sample(const DeformConv2dSizes& sizes, const DeformConv2dPart& part, const void* image,
                     const void* offset, const void* mask, const void* zeros, void* columns) {
    const Steps steps(sizes);
    for_runs<T>(sizes, part, offset, mask,
                [&](const Block<A>& block, Index tap, const DeformConv2dRun& run, const Places<A>& places) {
      const T* map = static_cast<const T*>(image) + block.image * steps.image;
      Column* out = static_cast<Column*>(columns) + steps.to_columns(run, block.first, tap);
      for (int b = 0; b < block.count; ++b, out += steps.next_columns) {
        const Pixels<T> at(steps, map, places, b, run.channel, static_cast<const T*>(zeros));
        const A weight[4] = {places.weight[0][b], places.weight[1][b], places.weight[2][b], places.weight[3][b]};
        const A factor = places.factor[b];
        for_vectors<A>(run.count, [&](auto lanes, Index x) {
          constexpr int n = decltype(lanes)::value;
          const auto value =
              (vector_at<n>(at.corner[0] + x) * weight[0] + vector_at<n>(at.corner[1] + x) * weight[1] +
               vector_at<n>(at.corner[2] + x) * weight[2] + vector_at<n>(at.corner[3] + x) * weight[3]) *
              factor;
          store_at<n>(out + x, value);
        });
      }
    });
  }

  static void by_offset_and_mask(const DeformConv2dSizes& sizes, const DeformConv2dPart& part, const void* by_columns,
                                 const void* image, const void* offset, const void* mask, const void* zeros,
                                 void* by_offset, void* by_mask) {
    const Steps steps(sizes);
    const Index positions = sizes.out_height * sizes.out_width;
    const Index group_channels = sizes.channels / sizes.offset_groups;
    A dots[4][kBlock];  // of the columns' gradient and the pixels of each corner
    for_runs<T>(sizes, part, offset, mask,
                [&](const Block<A>& block, Index tap, const DeformConv2dRun& run, const Places<A>& places) {
      const T* map = static_cast<const T*>(image) + block.image * steps.image;
      const Column* grad = static_cast<const Column*>(by_columns) + steps.to_columns(run, block.first, tap);
      const bool group_begins = run.channel == run.offset_group * group_channels;
      for (int b = 0; b < block.count; ++b, grad += steps.next_columns) {
        const Pixels<T> at(steps, map, places, b, run.channel, static_cast<const T*>(zeros));
        A dot[4];
        multiply(grad, at.corner, run.count, dot);
        for (int k = 0; k < 4; ++k) dots[k][b] = group_begins ? dot[k] : dots[k][b] + dot[k];
      }
      if (run.channel + run.count < (run.offset_group + 1) * group_channels) return;
      const Index plane = (block.image * sizes.offset_groups + run.offset_group) * sizes.taps() + tap;
      T* by_y = static_cast<T*>(by_offset) + plane * 2 * positions + block.in_image;
      T* by_x = by_y + positions;
      for (int b = 0; b < block.count; ++b) {
        const A down = places.down[b], right = places.right[b];
        const A by_down = (dots[2][b] - dots[0][b]) * (1 - right) + (dots[3][b] - dots[1][b]) * right;
        const A by_right = (dots[1][b] - dots[0][b]) * (1 - down) + (dots[3][b] - dots[2][b]) * down;
        narrow(places.factor[b] * by_down, by_y[b]);
        narrow(places.factor[b] * by_right, by_x[b]);
      }
      if (mask == nullptr) return;
      T* by_factor = static_cast<T*>(by_mask) + plane * positions + block.in_image;
      for (int b = 0; b < block.count; ++b) {
        narrow(dots[0][b] * places.weight[0][b] + dots[1][b] * places.weight[1][b] +
                   dots[2][b] * places.weight[2][b] + dots[3][b] * places.weight[3][b],
               by_factor[b]);
      }
    });
  }

  static OMNIOPS_INLINE void multiply(const Column* grad, const T* const pixel[4], Index count, A dot[4]) {
    Index x = 0;
    for (int k = 0; k < 4; ++k) dot[k] = 0;
    if (count >= kLanes<A>) {
      Vector<A> sums[4] = {};
      for (; x + kLanes<A> <= count; x += kLanes<A>) {
        const Vector<A> g = vector_at<kLanes<A>>(grad + x);
        for (int k = 0; k < 4; ++k) sums[k] = sums[k] + g * vector_at<kLanes<A>>(pixel[k] + x);
      }
      for (int k = 0; k < 4; ++k) dot[k] = sum_of_lanes<kLanes<A>, A>(sums[k]);
    }
    rest<kLanes<A> / 2, A>(x, count, [&](auto lanes, Index at) {
      constexpr int n = decltype(lanes)::value;
      const auto g = vector_at<n>(grad + at);
      for (int k = 0; k < 4; ++k) dot[k] += sum_of_lanes<n, A>(g * vector_at<n>(pixel[k] + at));
    });
  }

  static void by_image(const DeformConv2dSizes& sizes, const DeformConv2dPart& part, const void* by_columns,
                       const void* offset, const void* mask, void* by_image) {
    const Steps steps(sizes);
    for_runs<T>(sizes, part, offset, mask,
                [&](const Block<A>& block, Index tap, const DeformConv2dRun& run, const Places<A>& places) {
      A* map = static_cast<A*>(by_image) + block.image * steps.image;
      const Column* grad = static_cast<const Column*>(by_columns) + steps.to_columns(run, block.first, tap);
      for (int b = 0; b < block.count; ++b, grad += steps.next_columns) {
        const A weight[4] = {places.weight[0][b], places.weight[1][b], places.weight[2][b], places.weight[3][b]};
        const A factor = places.factor[b];
        Index to[4];
        steps.to_corners(places, b, run.channel, to);
        if (places.corners[b] == all_corners) {
          for_vectors<A>(run.count, [&](auto lanes, Index x) {
            const auto g = vector_at<decltype(lanes)::value>(grad + x) * factor;
            for (int k = 0; k < 4; ++k) add(g * weight[k], map + to[k] + x);
          });
        } else {
          for (int k = 0; k < 4; ++k) {
            if (!(places.corners[b] >> k & 1)) continue;
            A* pixel = map + to[k];
            for_vectors<A>(run.count, [&](auto lanes, Index x) {
              add(vector_at<decltype(lanes)::value>(grad + x) * factor * weight[k], pixel + x);
            });
          }
        }
      }
    });
  }

  template <class V>
  static OMNIOPS_INLINE void add(V value, A* target) {
    value = load_bits<V>(target) + value;
    std::memcpy(target, &value, sizeof value);
  }
};

template <class T, class Column = Accumulator<T>>
constexpr DeformConv2dKernels kernels() {
  return {Kernels<T, Column>::sample, Kernels<T, Column>::by_offset_and_mask, Kernels<T, Column>::by_image};
}

}  // namespace

DeformConv2dKernels deform_conv2d_kernels(Dtype dtype, Dtype columns) {
  switch (dtype) {
    case Dtype::float64:
      return kernels<double>();
    case Dtype::float32:
      return kernels<float>();
    case Dtype::float16:
      return kernels<Float16>();
    default:
      return columns == Dtype::bfloat16 ? kernels<BFloat16, BFloat16>() : kernels<BFloat16>();
  }
}

}  // namespace OMNIOPS_NAMESPACE
}  // namespace omniops
