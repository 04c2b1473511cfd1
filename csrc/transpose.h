// Transposed copies of matrices. Sees pointers and sizes only, so that one build serves every version of PyTorch.
#pragma once

#include <cstdint>

namespace omniops {

// Writes each of `batch` matrices of `rows` rows to `target` as one of `columns` rows. Items are of `item_size` bytes, 2,
// 4 or 8, and both are dense. Runs on at most `threads` threads.
void transpose(std::int64_t item_size, std::int64_t batch, std::int64_t rows, std::int64_t columns, const void* source,
               void* target, std::int64_t threads);

}  // namespace omniops
