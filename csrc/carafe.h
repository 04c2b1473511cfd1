// CARAFE on the CPU. Sees pointers and sizes only, so that one build serves every version of PyTorch.
//
// With centres (y, x) every `stride` pixels, p = kernel / 2, and a, b < scale the place in the block of a centre:
//
//   out[n, c, y*scale + a, x*scale + b] = sum over u, v < kernel of
//       masks[n, (g*kernel + u)*kernel + v, y*scale + a, x*scale + b]
//       * features[n, c, y*stride + u - p, x*stride + v - p]
#pragma once

#include <cstdint>

#include "dtype.h"

namespace omniops {

struct CarafeSizes {
  std::int64_t batch;
  std::int64_t groups;
  std::int64_t channels;  // of one group
  std::int64_t height;    // of the features
  std::int64_t width;
  std::int64_t kernel;
  std::int64_t scale;
  std::int64_t stride;

  std::int64_t rows() const { return (height + stride - 1) / stride; }  // of centres
  std::int64_t columns() const { return (width + stride - 1) / stride; }
};

enum class Layout { planar, channels_last };  // (N, C, H, W) or (N, H, W, C) in memory, dense

enum class CarafeOperator {
  forward,            // features, masks -> out
  backward_features,  // gradient of out, masks -> gradient of features
  backward_masks,     // gradient of out, features -> gradient of masks
};

// Computes `result` from its two arguments, all three of one dtype and layout, on at most `threads` threads.
// The result does not depend on the number of threads.
void carafe(CarafeOperator op, Dtype dtype, Layout layout, const CarafeSizes& sizes, const void* first,
            const void* second, void* result, std::int64_t threads);

}  // namespace omniops
