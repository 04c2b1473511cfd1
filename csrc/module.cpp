// The Python module omniops._C. Tensors come as addresses; omniops.backends.cpu vouches for shapes and layouts.
#include <nanobind/nanobind.h>

#include <cstdint>

#include "carafe.h"
#include "instruction_set.h"

namespace nb = nanobind;

namespace {

template <omniops::CarafeOperator op>
void carafe(std::uintptr_t first, std::uintptr_t second, std::uintptr_t result, omniops::Dtype dtype,
            bool channels_last, std::int64_t batch, std::int64_t channels, std::int64_t height, std::int64_t width,
            std::int64_t kernel_size, std::int64_t group_size, std::int64_t scale_factor, std::int64_t stride,
            std::int64_t threads) {
  const omniops::CarafeSizes sizes{batch, group_size,  channels / group_size, height,
                                   width, kernel_size, scale_factor,          stride};
  omniops::carafe(op, dtype, channels_last ? omniops::Layout::channels_last : omniops::Layout::planar, sizes,
                  reinterpret_cast<const void*>(first), reinterpret_cast<const void*>(second),
                  reinterpret_cast<void*>(result), threads);
}

template <omniops::CarafeOperator op>
void define_carafe(nb::module_& module, const char* name) {
  module.def(name, carafe<op>, nb::call_guard<nb::gil_scoped_release>(), nb::arg("first"), nb::arg("second"),
             nb::arg("result"), nb::arg("dtype"), nb::arg("channels_last"), nb::arg("batch"), nb::arg("channels"),
             nb::arg("height"), nb::arg("width"), nb::arg("kernel_size"), nb::arg("group_size"),
             nb::arg("scale_factor"), nb::arg("stride"), nb::arg("threads"));
}

}  // namespace

NB_MODULE(_C, module) {
  module.doc() = "The CPU kernels of omniops.";
  nb::enum_<omniops::Dtype>(module, "Dtype")
      .value("float64", omniops::Dtype::float64)
      .value("float32", omniops::Dtype::float32)
      .value("float16", omniops::Dtype::float16)
      .value("bfloat16", omniops::Dtype::bfloat16);
  module.def(
      "instruction_set", [] { return omniops::name(omniops::instruction_set()); },
      "The instruction set whose kernels serve here: avx512, avx2 or baseline.");
  define_carafe<omniops::CarafeOperator::forward>(module, "carafe");
  define_carafe<omniops::CarafeOperator::backward_features>(module, "carafe_backward_features");
  define_carafe<omniops::CarafeOperator::backward_masks>(module, "carafe_backward_masks");
}
