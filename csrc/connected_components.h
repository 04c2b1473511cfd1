// Connected components of masks on the CPU. Sees pointers and sizes only, so that one build serves every PyTorch.
#pragma once

#include <cstdint>

namespace omniops {

struct MaskSizes {
  std::int64_t batch;
  std::int64_t height;
  std::int64_t width;  // height * width < 2**31
};

// Writes 1 + the smallest flat index y * width + x of a pixel's component to `labels`, the component's area to
// `counts`, and zeros to the background of both. `mask` holds integers of `item_size` (1, 2, 4 or 8) bytes, not zero in
// the foreground; all three are dense. The result does not depend on the number of threads, at most `threads`.
void connected_components(const void* mask, std::int64_t item_size, const MaskSizes& sizes, bool diagonals,
                          std::int32_t* labels, std::int32_t* counts, std::int64_t threads);

}  // namespace omniops
