// What deform_conv2d_kernels.cpp offers, once for each instruction set that it is compiled for.
#pragma once

#include <cstdint>

#include "deform_conv2d.h"

namespace omniops {

// Channels that lie in one offset group, and in columns together.
struct DeformConv2dRun {
  std::int64_t offset_group;
  std::int64_t channel;  // the first
  std::int64_t count;
  std::int64_t column;  // where the first channel's samples begin in the columns
};

// A part of a call's work: some runs, in order of their channels, at the positions begin ... end - 1 of the call's,
// counted from 0, all of one image.
struct DeformConv2dTask {
  const DeformConv2dRun* runs;
  std::int64_t run_count;
  std::int64_t begin;
  std::int64_t end;
};

struct DeformConv2dKernels {
  // `zeros` are as many as the longest run has channels.
  void (*sample)(const DeformConv2dSizes& sizes, const DeformConv2dTask& task, const void* image, const void* offset,
                 const void* mask, const void* zeros, void* columns);
  // Takes all runs of each of its offset groups.
  void (*by_offset_and_mask)(const DeformConv2dSizes& sizes, const DeformConv2dTask& task, const void* by_columns,
                             const void* image, const void* offset, const void* mask, const void* zeros,
                             void* by_offset, void* by_mask);
  // Adds to the channels of its runs and the image of its positions.
  void (*by_image)(const DeformConv2dSizes& sizes, const DeformConv2dTask& task, const void* by_columns,
                   const void* offset, const void* mask, void* by_image);
};

namespace baseline {
DeformConv2dKernels deform_conv2d_kernels(Dtype dtype, Dtype columns);
}
#ifdef OMNIOPS_X86_DISPATCH
namespace avx2 {
DeformConv2dKernels deform_conv2d_kernels(Dtype dtype, Dtype columns);
}
namespace avx512 {
DeformConv2dKernels deform_conv2d_kernels(Dtype dtype, Dtype columns);
}
#endif

}  // namespace omniops
