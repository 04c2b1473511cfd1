// Compiled once for each instruction set, as carafe_kernels.cpp is. Vectorised along the channels of a run, which share
// the position of their samples; the samples of a block of positions are found together, one tap after another.
#include "deform_conv2d_kernels.h"

#include "bilinear.h"
#include "vectors.h"

namespace omniops {
namespace OMNIOPS_NAMESPACE {
namespace {

// Positions, one after another in an image, whose samples are found at once.
constexpr int kBlock = 16;

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

// --- samples ---

// The positions block, block + 1, ... of a call, as many as count says, and where they are without offset.
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

// Where the samples of an offset group lie for one tap and the positions of a block.
template <class A>
struct Samples {
  std::int32_t top[kBlock], left[kBlock];  // -2 where no corner lies on the map
  std::int32_t corners[kBlock];
  A down[kBlock], right[kBlock];  // from the top left corner
  A weight[4][kBlock];            // of the corners
  A factor[kBlock];               // of the mask

  // A sample outside of the map is moved to (-2, -2), infinite ones too, where it has finite weights for the zeros that
  // it sees. One that is not a number is not outside: its weights are not numbers.
  template <class T>
  Samples(const DeformConv2dSizes& sizes, const Block<A>& block, Index group, Index tap, const T* offset,
          const T* mask) {
    const Index positions = sizes.out_height * sizes.out_width;
    const Index plane = (block.image * sizes.offset_groups + group) * sizes.taps() + tap;
    A offset_y[kBlock] = {}, offset_x[kBlock] = {};
    copy(offset + plane * 2 * positions + block.in_image, block.count, offset_y);
    copy(offset + (plane * 2 + 1) * positions + block.in_image, block.count, offset_x);
    if (mask != nullptr) {
      copy(mask + plane * positions + block.in_image, block.count, factor);
    } else {
      for (int b = 0; b < kBlock; ++b) factor[b] = 1;
    }
    const A tap_y = static_cast<A>(tap / sizes.kernel_width * sizes.dilation_y);
    const A tap_x = static_cast<A>(tap % sizes.kernel_width * sizes.dilation_x);
    A at_y[kBlock], at_x[kBlock];
    for (int b = 0; b < kBlock; ++b) {
      at_y[b] = block.y[b] + tap_y + offset_y[b];
      at_x[b] = block.x[b] + tap_x + offset_x[b];
    }
    const A height = static_cast<A>(sizes.height), width = static_cast<A>(sizes.width);
    for (int b = 0; b < kBlock; ++b) {
      top[b] = floor_of(at_y[b], height);
      left[b] = floor_of(at_x[b], width);
    }
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
      corners[b] = corners_on_map(top[b], left[b], last_row, last_column);
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

  // To a channel of the corners of a sample, of which some may not lie on the map.
  template <class A>
  OMNIOPS_INLINE void to_corners(const Samples<A>& samples, int b, Index channel, Index to[4]) const {
    to[0] = samples.top[b] * down + samples.left[b] * right + channel;
    to[1] = to[0] + right;
    to[2] = to[0] + down;
    to[3] = to[2] + right;
  }
};

// A channel of the corners of a sample, `zeros` for those that do not lie on the map.
template <class T>
struct Pixels {
  const T* corner[4];

  OMNIOPS_INLINE Pixels(const Steps& steps, const T* image, const Samples<Accumulator<T>>& samples, int b,
                        Index channel, const T* zeros) {
    Index to[4];
    steps.to_corners(samples, b, channel, to);
    const std::int32_t corners = samples.corners[b];
    for (int k = 0; k < 4; ++k) corner[k] = corners == all_corners || corners >> k & 1 ? image + to[k] : zeros;
  }
};

// Calls work(block, tap, run, samples) for each block of the task's positions, each tap and each run.
template <class T, class Work>
OMNIOPS_INLINE void for_runs(const DeformConv2dSizes& sizes, const DeformConv2dTask& task, const void* offset,
                             const void* mask, const Work& work) {
  using A = Accumulator<T>;
  for (Index begin = task.begin; begin < task.end; begin += kBlock) {
    const Block<A> block(sizes, begin, task.end);
    for (Index tap = 0; tap < sizes.taps(); ++tap) {
      for (Index r = 0; r < task.run_count;) {
        const Index group = task.runs[r].offset_group;
        const Samples<A> samples(sizes, block, group, tap, static_cast<const T*>(offset), static_cast<const T*>(mask));
        for (; r < task.run_count && task.runs[r].offset_group == group; ++r) work(block, tap, task.runs[r], samples);
      }
    }
  }
}

// --- the kernels ---

// T is what image, offset and mask are of, Column what columns are of. Everything between loads and stores is in A.
template <class T, class Column>
struct Kernels {
  using A = Accumulator<T>;

  static void sample(const DeformConv2dSizes& sizes, const DeformConv2dTask& task, const void* image,
                     const void* offset, const void* mask, const void* zeros, void* columns) {
    const Steps steps(sizes);
    for_runs<T>(sizes, task, offset, mask,
                [&](const Block<A>& block, Index tap, const DeformConv2dRun& run, const Samples<A>& samples) {
      const T* map = static_cast<const T*>(image) + block.image * steps.image;
      Column* out = static_cast<Column*>(columns) + steps.to_columns(run, block.first, tap);
      for (int b = 0; b < block.count; ++b, out += steps.next_columns) {
        const Pixels<T> pixels(steps, map, samples, b, run.channel, static_cast<const T*>(zeros));
        const A weight[4] = {samples.weight[0][b], samples.weight[1][b], samples.weight[2][b], samples.weight[3][b]};
        const A factor = samples.factor[b];
        for_vectors<A>(run.count, [&](auto lanes, Index x) {
          constexpr int n = decltype(lanes)::value;
          const auto value =
              (vector_at<n>(pixels.corner[0] + x) * weight[0] + vector_at<n>(pixels.corner[1] + x) * weight[1] +
               vector_at<n>(pixels.corner[2] + x) * weight[2] + vector_at<n>(pixels.corner[3] + x) * weight[3]) *
              factor;
          store_at<n>(out + x, value);
        });
      }
    });
  }

  static void by_offset_and_mask(const DeformConv2dSizes& sizes, const DeformConv2dTask& task, const void* by_columns,
                                 const void* image, const void* offset, const void* mask, const void* zeros,
                                 void* by_offset, void* by_mask) {
    const Steps steps(sizes);
    const Index positions = sizes.out_height * sizes.out_width;
    const Index group_channels = sizes.channels / sizes.offset_groups;
    A dots[4][kBlock];  // of the columns' gradient and the pixels of each corner
    for_runs<T>(sizes, task, offset, mask,
                [&](const Block<A>& block, Index tap, const DeformConv2dRun& run, const Samples<A>& samples) {
      const T* map = static_cast<const T*>(image) + block.image * steps.image;
      const Column* grad = static_cast<const Column*>(by_columns) + steps.to_columns(run, block.first, tap);
      const bool group_begins = run.channel == run.offset_group * group_channels;
      for (int b = 0; b < block.count; ++b, grad += steps.next_columns) {
        const Pixels<T> pixels(steps, map, samples, b, run.channel, static_cast<const T*>(zeros));
        A dot[4];
        multiply(grad, pixels.corner, run.count, dot);
        for (int k = 0; k < 4; ++k) dots[k][b] = group_begins ? dot[k] : dots[k][b] + dot[k];
      }
      if (run.channel + run.count < (run.offset_group + 1) * group_channels) return;
      const Index plane = (block.image * sizes.offset_groups + run.offset_group) * sizes.taps() + tap;
      T* by_y = static_cast<T*>(by_offset) + plane * 2 * positions + block.in_image;
      T* by_x = by_y + positions;
      for (int b = 0; b < block.count; ++b) {
        const A down = samples.down[b], right = samples.right[b];
        const A by_down = (dots[2][b] - dots[0][b]) * (1 - right) + (dots[3][b] - dots[1][b]) * right;
        const A by_right = (dots[1][b] - dots[0][b]) * (1 - down) + (dots[3][b] - dots[2][b]) * down;
        narrow(samples.factor[b] * by_down, by_y[b]);
        narrow(samples.factor[b] * by_right, by_x[b]);
      }
      if (mask == nullptr) return;
      T* by_factor = static_cast<T*>(by_mask) + plane * positions + block.in_image;
      for (int b = 0; b < block.count; ++b) {
        narrow(dots[0][b] * samples.weight[0][b] + dots[1][b] * samples.weight[1][b] +
                   dots[2][b] * samples.weight[2][b] + dots[3][b] * samples.weight[3][b],
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
    rest<kLanes<A> / 2, A>(x, count, [&](auto lanes, Index offset) {
      constexpr int n = decltype(lanes)::value;
      const auto g = vector_at<n>(grad + offset);
      for (int k = 0; k < 4; ++k) dot[k] += sum_of_lanes<n, A>(g * vector_at<n>(pixel[k] + offset));
    });
  }

  static void by_image(const DeformConv2dSizes& sizes, const DeformConv2dTask& task, const void* by_columns,
                       const void* offset, const void* mask, void* by_image) {
    const Steps steps(sizes);
    for_runs<T>(sizes, task, offset, mask,
                [&](const Block<A>& block, Index tap, const DeformConv2dRun& run, const Samples<A>& samples) {
      A* map = static_cast<A*>(by_image) + block.image * steps.image;
      const Column* grad = static_cast<const Column*>(by_columns) + steps.to_columns(run, block.first, tap);
      for (int b = 0; b < block.count; ++b, grad += steps.next_columns) {
        const A weight[4] = {samples.weight[0][b], samples.weight[1][b], samples.weight[2][b], samples.weight[3][b]};
        const A factor = samples.factor[b];
        Index to[4];
        steps.to_corners(samples, b, run.channel, to);
        if (samples.corners[b] == all_corners) {
          for_vectors<A>(run.count, [&](auto lanes, Index x) {
            const auto g = vector_at<decltype(lanes)::value>(grad + x) * factor;
            for (int k = 0; k < 4; ++k) add(g * weight[k], map + to[k] + x);
          });
        } else {
          for (int k = 0; k < 4; ++k) {
            if (!(samples.corners[b] >> k & 1)) continue;
            A* pixel = map + to[k];
            for_vectors<A>(run.count, [&](auto lanes, Index x) {
              add(vector_at<decltype(lanes)::value>(grad + x) * factor * weight[k], pixel + x);
            });
          }
        }
      }
    });
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
