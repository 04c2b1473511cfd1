// Multi-scale deformable attention on the CPU, and its gradients.
//
// Head m of query q of image n samples value at K points, those of level l among that level's pixels. With x and y from
// sampling_locations[n, q, m, k], a point lies at
//
//   h = y * H_l - 0.5,   w = x * W_l - 0.5
//
// and its sample is the bilinear interpolation of the D channels there, zero outside of the map; or, where the
// attention is discrete, the pixel at row trunc(y * H_l + 0.5) and column trunc(x * W_l + 0.5), moved into the map. The
// result is the sum over k of the samples times attention_weights[n, q, m, k].
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"

namespace omniops {

struct MultiScaleDeformAttnLevel {
  std::int64_t height;
  std::int64_t width;
  std::int64_t points;  // of each query and head
};

struct MultiScaleDeformAttnSizes {
  std::int64_t batch;
  std::int64_t queries;
  std::int64_t heads;
  std::int64_t channels;  // of a head
  std::vector<MultiScaleDeformAttnLevel> levels;
  bool discrete;
};

// Both take value (N, S, M, D) of one dtype, and sampling_locations (N, Q, M, K, 2), x then y, and attention_weights
// (N, Q, M, K) of what that is accumulated in, float64 for float64 and else float32. All are dense. They run on at most
// `threads` threads, whose number changes no result. No side of a level may have 2**30 pixels.

// Fills out (N, Q, M, D), of value's dtype.
void multi_scale_deform_attn(Dtype dtype, const MultiScaleDeformAttnSizes& sizes, const void* value,
                             const void* sampling_locations, const void* attention_weights, void* out,
                             std::int64_t threads);

// From grad, of out's shape and dtype, fills the gradients, of their tensors' shapes and dtypes; null for those that
// nobody wants.
void multi_scale_deform_attn_backward(Dtype dtype, const MultiScaleDeformAttnSizes& sizes, const void* grad,
                                      const void* value, const void* sampling_locations, const void* attention_weights,
                                      void* by_value, void* by_locations, void* by_weights, std::int64_t threads);

}  // namespace omniops
