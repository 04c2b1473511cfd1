// What multi_scale_deform_attn_kernels.cpp offers, once for each instruction set that it is compiled for.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace omniops {

// Points, one after another, whose samples are found at once: what the level of each says.
struct MultiScaleDeformAttnBlock {
  static constexpr int size = 16;
  std::int32_t height[size];  // both 0 where the level has no pixels
  std::int32_t width[size];
  std::int64_t first_pixel[size];  // of the level, among the share's
};

// Some levels, one after another, and the points there.
struct MultiScaleDeformAttnShare {
  std::int64_t queries;
  std::int64_t heads;
  std::int64_t channels;
  std::int64_t pixels;        // of all levels
  std::int64_t all_points;    // of all levels, for a query and head
  std::int64_t first_pixel;   // of these levels
  std::int64_t pixel_count;
  std::int64_t first_point;
  std::int64_t point_count;
  std::int64_t rows;  // queries whose samples are found at once
  const MultiScaleDeformAttnBlock* blocks;  // for the points of that many queries
};

// Where `copies` says so, the pixels of a head are copied first, one after another, which is worthwhile for many
// samples. `zeros` are as many as there are channels.
struct MultiScaleDeformAttnKernels {
  // The bytes that a thread needs, aligned to 64.
  std::int64_t (*scratch_bytes)(const MultiScaleDeformAttnShare& share, bool by_value, bool copies);
  // The queries begin ... end - 1 of a head of an image; for a share of all levels.
  void (*forward)(const MultiScaleDeformAttnShare& share, std::int64_t image, std::int64_t head, std::int64_t begin,
                  std::int64_t end, bool copies, const void* value, const void* sampling_locations,
                  const void* attention_weights, const void* zeros, void* out, void* scratch);
  // The gradients of a head of an image, as far as the share goes.
  void (*backward)(const MultiScaleDeformAttnShare& share, std::int64_t image, std::int64_t head, bool copies,
                   const void* grad, const void* value, const void* sampling_locations, const void* attention_weights,
                   const void* zeros, void* by_value, void* by_locations, void* by_weights, void* scratch);
};

namespace baseline {
MultiScaleDeformAttnKernels multi_scale_deform_attn_kernels(Dtype dtype, bool discrete);
}
#ifdef OMNIOPS_X86_DISPATCH
namespace avx2 {
MultiScaleDeformAttnKernels multi_scale_deform_attn_kernels(Dtype dtype, bool discrete);
}
namespace avx512 {
MultiScaleDeformAttnKernels multi_scale_deform_attn_kernels(Dtype dtype, bool discrete);
}
#endif

}  // namespace omniops
