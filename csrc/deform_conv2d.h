// The samples of a deformable convolution on the CPU, and their gradients; the matrix products are PyTorch's.
//
// For each offset group, tap t = (u, v) and position (i, j) of the result, a sample of a channel of the map lies at
//
//   y = i*stride - padding + u*dilation + offset[n, (d*K + t)*2, i, j]          (x alike, from the next channel)
//
// and is the bilinear interpolation there, zero outside of the map, times mask[n, d*K + t, i, j].
#pragma once

#include <cstdint>

#include "dtype.h"

namespace omniops {

struct DeformConv2dSizes {
  std::int64_t channels;  // of the map
  std::int64_t height;
  std::int64_t width;
  std::int64_t out_height;  // of the result
  std::int64_t out_width;
  std::int64_t kernel_height;
  std::int64_t kernel_width;
  std::int64_t stride_y;
  std::int64_t stride_x;
  std::int64_t padding_y;
  std::int64_t padding_x;
  std::int64_t dilation_y;
  std::int64_t dilation_x;
  std::int64_t groups;  // of the weight
  std::int64_t offset_groups;
  std::int64_t first;  // of the positions that a call is for, p = (n * out_height + i) * out_width + j
  std::int64_t count;

  std::int64_t taps() const { return kernel_height * kernel_width; }
};

// Both take an image (N, H, W, C), an offset and a mask (N, ..., H_out, W_out), where mask may be null, all of one
// dtype, and columns (groups, count, taps, C / groups) of what that is accumulated in, float64 for float64 and else
// float32; columns of bfloat16 may be bfloat16 too. All are dense. They run on at most `threads` threads, whose number
// changes no result. No side of the image may have 2**30 pixels.

// Fills the columns with samples.
void deform_conv2d_sample(Dtype dtype, Dtype columns_dtype, const DeformConv2dSizes& sizes, const void* image,
                          const void* offset, const void* mask, void* columns, std::int64_t threads);

// From the gradient of the columns writes that of their positions' offset and mask (null where mask is), of their
// dtype, and adds their part of the image's, which is float64 or float32.
void deform_conv2d_gradients(Dtype dtype, Dtype columns_dtype, const DeformConv2dSizes& sizes, const void* by_columns,
                             const void* image, const void* offset, const void* mask, void* by_image, void* by_offset,
                             void* by_mask, std::int64_t threads);

}  // namespace omniops
