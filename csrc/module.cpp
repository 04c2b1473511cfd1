// The Python module omniops._C. Tensors come as addresses; omniops.backends.cpu vouches for shapes and layouts.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdint>
#include <vector>

#include "carafe.h"
#include "connected_components.h"
#include "deform_conv2d.h"
#include "instruction_set.h"
#include "multi_scale_deform_attn.h"
#include "transpose.h"

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

using Pair = std::array<std::int64_t, 2>;  // vertical, horizontal

// What the calls of a kind have in common, made once: a conversion of so many arguments takes longer than a small map.
struct DeformConv2d {
  omniops::Dtype dtype, columns_dtype;
  omniops::DeformConv2dSizes sizes;

  DeformConv2d(omniops::Dtype dtype, omniops::Dtype columns_dtype, std::int64_t channels, Pair size, Pair out_size,
               Pair kernel_size, Pair stride, Pair padding, Pair dilation, std::int64_t groups,
               std::int64_t offset_groups)
      : dtype(dtype),
        columns_dtype(columns_dtype),
        sizes{channels,  size[0],    size[1],    out_size[0], out_size[1], kernel_size[0], kernel_size[1], stride[0],
              stride[1], padding[0], padding[1], dilation[0], dilation[1], groups,         offset_groups,  0,
              0} {}

  omniops::DeformConv2dSizes of(std::int64_t first, std::int64_t count) const {
    omniops::DeformConv2dSizes chunk = sizes;
    chunk.first = first;
    chunk.count = count;
    return chunk;
  }
};

void deform_conv2d_sample(const DeformConv2d& call, std::int64_t first, std::int64_t count, std::uintptr_t image,
                          std::uintptr_t offset, std::uintptr_t mask, std::uintptr_t columns, std::int64_t threads) {
  omniops::deform_conv2d_sample(call.dtype, call.columns_dtype, call.of(first, count),
                                reinterpret_cast<const void*>(image), reinterpret_cast<const void*>(offset),
                                reinterpret_cast<const void*>(mask), reinterpret_cast<void*>(columns), threads);
}

void deform_conv2d_gradients(const DeformConv2d& call, std::int64_t first, std::int64_t count,
                             std::uintptr_t by_columns, std::uintptr_t image, std::uintptr_t offset,
                             std::uintptr_t mask, std::uintptr_t by_image, std::uintptr_t by_offset,
                             std::uintptr_t by_mask, std::int64_t threads) {
  omniops::deform_conv2d_gradients(call.dtype, call.columns_dtype, call.of(first, count),
                                   reinterpret_cast<const void*>(by_columns), reinterpret_cast<const void*>(image),
                                   reinterpret_cast<const void*>(offset), reinterpret_cast<const void*>(mask),
                                   reinterpret_cast<void*>(by_image), reinterpret_cast<void*>(by_offset),
                                   reinterpret_cast<void*>(by_mask), threads);
}

void define_deform_conv2d(nb::module_& module) {
  nb::class_<DeformConv2d>(module, "DeformConv2d")
      .def(nb::init<omniops::Dtype, omniops::Dtype, std::int64_t, Pair, Pair, Pair, Pair, Pair, Pair, std::int64_t,
                    std::int64_t>(),
           nb::arg("dtype"), nb::arg("columns_dtype"), nb::arg("channels"), nb::arg("size"), nb::arg("out_size"),
           nb::arg("kernel_size"), nb::arg("stride"), nb::arg("padding"), nb::arg("dilation"), nb::arg("groups"),
           nb::arg("offset_groups"));
  module.def("deform_conv2d_sample", deform_conv2d_sample, nb::call_guard<nb::gil_scoped_release>(), nb::arg("call"),
             nb::arg("first"), nb::arg("count"), nb::arg("image"), nb::arg("offset"), nb::arg("mask"),
             nb::arg("columns"), nb::arg("threads"));
  module.def("deform_conv2d_gradients", deform_conv2d_gradients, nb::call_guard<nb::gil_scoped_release>(),
             nb::arg("call"), nb::arg("first"), nb::arg("count"), nb::arg("by_columns"), nb::arg("image"),
             nb::arg("offset"), nb::arg("mask"), nb::arg("by_image"), nb::arg("by_offset"), nb::arg("by_mask"),
             nb::arg("threads"));
}

void connected_components(std::uintptr_t mask, std::int64_t item_size, std::int64_t batch, std::int64_t height,
                          std::int64_t width, bool diagonals, std::uintptr_t labels, std::uintptr_t counts,
                          std::int64_t threads) {
  omniops::connected_components(reinterpret_cast<const void*>(mask), item_size, {batch, height, width}, diagonals,
                                reinterpret_cast<std::int32_t*>(labels), reinterpret_cast<std::int32_t*>(counts),
                                threads);
}

// What the calls of a kind have in common, made once.
struct MultiScaleDeformAttn {
  omniops::Dtype dtype;
  omniops::MultiScaleDeformAttnSizes sizes;

  MultiScaleDeformAttn(omniops::Dtype dtype, std::int64_t batch, std::int64_t queries, std::int64_t heads,
                       std::int64_t channels, const std::vector<std::int64_t>& spatial_shapes,
                       const std::vector<std::int64_t>& points_per_level, bool discrete)
      : dtype(dtype), sizes{batch, queries, heads, channels, {}, discrete} {
    for (std::size_t l = 0; l < points_per_level.size(); ++l) {
      sizes.levels.push_back({spatial_shapes.at(2 * l), spatial_shapes.at(2 * l + 1), points_per_level[l]});
    }
  }
};

void multi_scale_deform_attn(const MultiScaleDeformAttn& call, std::uintptr_t value, std::uintptr_t sampling_locations,
                             std::uintptr_t attention_weights, std::uintptr_t out, std::int64_t threads) {
  omniops::multi_scale_deform_attn(call.dtype, call.sizes, reinterpret_cast<const void*>(value),
                                   reinterpret_cast<const void*>(sampling_locations),
                                   reinterpret_cast<const void*>(attention_weights), reinterpret_cast<void*>(out),
                                   threads);
}

void multi_scale_deform_attn_backward(const MultiScaleDeformAttn& call, std::uintptr_t grad, std::uintptr_t value,
                                      std::uintptr_t sampling_locations, std::uintptr_t attention_weights,
                                      std::uintptr_t by_value, std::uintptr_t by_locations, std::uintptr_t by_weights,
                                      std::int64_t threads) {
  omniops::multi_scale_deform_attn_backward(
      call.dtype, call.sizes, reinterpret_cast<const void*>(grad), reinterpret_cast<const void*>(value),
      reinterpret_cast<const void*>(sampling_locations), reinterpret_cast<const void*>(attention_weights),
      reinterpret_cast<void*>(by_value), reinterpret_cast<void*>(by_locations), reinterpret_cast<void*>(by_weights),
      threads);
}

void define_multi_scale_deform_attn(nb::module_& module) {
  nb::class_<MultiScaleDeformAttn>(module, "MultiScaleDeformAttn")
      .def(nb::init<omniops::Dtype, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                    const std::vector<std::int64_t>&, const std::vector<std::int64_t>&, bool>(),
           nb::arg("dtype"), nb::arg("batch"), nb::arg("queries"), nb::arg("heads"), nb::arg("channels"),
           nb::arg("spatial_shapes"), nb::arg("points_per_level"), nb::arg("discrete"));
  module.def("multi_scale_deform_attn", multi_scale_deform_attn, nb::call_guard<nb::gil_scoped_release>(),
             nb::arg("call"), nb::arg("value"), nb::arg("sampling_locations"), nb::arg("attention_weights"),
             nb::arg("out"), nb::arg("threads"));
  module.def("multi_scale_deform_attn_backward", multi_scale_deform_attn_backward,
             nb::call_guard<nb::gil_scoped_release>(), nb::arg("call"), nb::arg("grad"), nb::arg("value"),
             nb::arg("sampling_locations"), nb::arg("attention_weights"), nb::arg("by_value"),
             nb::arg("by_locations"), nb::arg("by_weights"), nb::arg("threads"));
}

void transpose(std::int64_t item_size, std::int64_t batch, std::int64_t rows, std::int64_t columns,
               std::uintptr_t source, std::uintptr_t target, std::int64_t threads) {
  omniops::transpose(item_size, batch, rows, columns, reinterpret_cast<const void*>(source),
                     reinterpret_cast<void*>(target), threads);
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
  module.def("connected_components", connected_components, nb::call_guard<nb::gil_scoped_release>(), nb::arg("mask"),
             nb::arg("item_size"), nb::arg("batch"), nb::arg("height"), nb::arg("width"), nb::arg("diagonals"),
             nb::arg("labels"), nb::arg("counts"), nb::arg("threads"));
  define_deform_conv2d(module);
  define_multi_scale_deform_attn(module);
  module.def("transpose", transpose, nb::call_guard<nb::gil_scoped_release>(), nb::arg("item_size"), nb::arg("batch"),
             nb::arg("rows"), nb::arg("columns"), nb::arg("source"), nb::arg("target"), nb::arg("threads"));
}
