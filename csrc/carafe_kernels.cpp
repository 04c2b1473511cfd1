// Compiled once for each instruction set, with its flags and OMNIOPS_NAMESPACE. Separate compilation, unlike the
// compiler's own function multi-versioning, reaches through templates and lambdas, lets the width of a vector and the
// blocking follow the instruction set, and does not ask for ifunc, which only some systems have.
#include "carafe_kernels.h"

#include "carafe_channels_last.h"
#include "carafe_planar.h"

namespace omniops {
namespace OMNIOPS_NAMESPACE {
namespace {

template <class Operation>
CarafeKernel kernel() {
  return {Operation::tiling, Operation::compute};
}

template <class T>
CarafeKernel kernel_for(CarafeOperator op, Layout layout) {
  const bool by_row = layout == Layout::planar;
  switch (op) {
    case CarafeOperator::backward_features:
      return by_row ? kernel<planar::BackwardFeatures<T>>() : kernel<channels_last::BackwardFeatures<T>>();
    case CarafeOperator::backward_masks:
      return by_row ? kernel<planar::BackwardMasks<T>>() : kernel<channels_last::BackwardMasks<T>>();
    default:
      return by_row ? kernel<planar::Forward<T>>() : kernel<channels_last::Forward<T>>();
  }
}

}  // namespace

CarafeKernel carafe_kernel(CarafeOperator op, Dtype dtype, Layout layout) {
  switch (dtype) {
    case Dtype::float64:
      return kernel_for<double>(op, layout);
    case Dtype::float16:
      return kernel_for<Float16>(op, layout);
    case Dtype::bfloat16:
      return kernel_for<BFloat16>(op, layout);
    default:
      return kernel_for<float>(op, layout);
  }
}

}  // namespace OMNIOPS_NAMESPACE
}  // namespace omniops
