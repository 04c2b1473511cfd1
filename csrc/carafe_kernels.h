// What carafe_kernels.cpp offers, once for each instruction set that it is compiled for.
#pragma once

#include <cstdint>

#include "carafe.h"

namespace omniops {

// The work of one call, cut into tiles that write disjoint parts of the result. How it is cut changes no result.
struct CarafeTiling {
  std::int64_t tiles;
  std::int64_t scratch_bytes;  // that each thread needs
  std::int64_t rows;           // of centres or features in a tile, at most
  std::int64_t columns;
  std::int64_t channels;
};

struct CarafeKernel {
  CarafeTiling (*tiling)(const CarafeSizes& sizes, std::int64_t threads);
  void (*compute)(const CarafeSizes& sizes, const CarafeTiling& tiling, const void* first, const void* second,
                  void* result, std::int64_t tile, void* scratch);
};

using CarafeKernels = CarafeKernel (*)(CarafeOperator op, Dtype dtype, Layout layout);

namespace baseline {
CarafeKernel carafe_kernel(CarafeOperator op, Dtype dtype, Layout layout);
}
#ifdef OMNIOPS_X86_DISPATCH
namespace avx2 {
CarafeKernel carafe_kernel(CarafeOperator op, Dtype dtype, Layout layout);
}
namespace avx512 {
CarafeKernel carafe_kernel(CarafeOperator op, Dtype dtype, Layout layout);
}
#endif

}  // namespace omniops
