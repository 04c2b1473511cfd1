// What samples between the pixels of a map have in common.
#pragma once

#include <cstdint>

#include "simd.h"

namespace omniops {
namespace OMNIOPS_NAMESPACE {

// Which corners of a sample lie on the map, as bits. In arrays of four they come in this order.
enum Corner { top_left = 1, top_right = 2, low_left = 4, low_right = 8, all_corners = 15 };

// The corners on the map of `last_row` + 1 rows and `last_column` + 1 columns.
OMNIOPS_INLINE std::int32_t corners_on_map(std::int32_t top, std::int32_t left, std::int32_t last_row,
                                           std::int32_t last_column) {
  const std::int32_t above = (top >= 0) & (top <= last_row), below = (top >= -1) & (top < last_row);
  const std::int32_t before = (left >= 0) & (left <= last_column), after = (left >= -1) & (left < last_column);
  return (above & before) * top_left | (above & after) * top_right | (below & before) * low_left |
         (below & after) * low_right;
}

// -2, or a number from `size` on, for positions from which no pixel is seen; -2 for what is not a number.
template <class A>
OMNIOPS_INLINE std::int32_t floor_of(A position, A size) {
  A safe = position < size ? position : size;
  safe = position >= -2 ? safe : A(-2);
  const std::int32_t toward_zero = static_cast<std::int32_t>(safe);
  return toward_zero - (static_cast<A>(toward_zero) > safe ? 1 : 0);
}

}  // namespace OMNIOPS_NAMESPACE
}  // namespace omniops
