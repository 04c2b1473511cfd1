#include "transpose.h"

#include <algorithm>

#include "parallel.h"

namespace omniops {
namespace {

// Bytes for which another thread is worth its start, some tens of microseconds.
constexpr std::int64_t kBytesPerThread = 1 << 18;

// Items of a side of a tile: whole cache lines of each row that is read and of each that is written.
constexpr std::int64_t kTile = 64;

// The rows begin ... end - 1 of a matrix.
template <class T>
void transpose_rows(std::int64_t rows, std::int64_t columns, std::int64_t begin, std::int64_t end, const T* source,
                    T* target) {
  // Rows that lie a power of two apart share few lines of a cache. So a tile goes by way of a copy, whose do not.
  T tile[kTile][kTile + 16 / sizeof(T)];
  for (std::int64_t column = 0; column < columns; column += kTile) {
    const std::int64_t width = std::min(kTile, columns - column);
    for (std::int64_t i = begin; i < end; ++i) {
      const T* const row = source + i * columns + column;
      for (std::int64_t j = 0; j < width; ++j) tile[j][i - begin] = row[j];
    }
    for (std::int64_t j = 0; j < width; ++j) std::copy_n(tile[j], end - begin, target + (column + j) * rows + begin);
  }
}

template <class T>
void transpose(std::int64_t batch, std::int64_t rows, std::int64_t columns, const T* source, T* target,
               std::int64_t threads) {
  const std::int64_t strips = (rows + kTile - 1) / kTile, items = rows * columns;
  const std::int64_t bytes = batch * items * static_cast<std::int64_t>(sizeof(T));
  parallel(batch * strips, std::min(threads, 1 + bytes / kBytesPerThread), [&](Tickets& tickets) {
    for (std::int64_t ticket; tickets.take(ticket);) {
      const std::int64_t matrix = ticket / strips, begin = ticket % strips * kTile;
      transpose_rows(rows, columns, begin, std::min(begin + kTile, rows), source + matrix * items,
                     target + matrix * items);
    }
  });
}

}  // namespace

void transpose(std::int64_t item_size, std::int64_t batch, std::int64_t rows, std::int64_t columns, const void* source,
               void* target, std::int64_t threads) {
  switch (item_size) {
    case 2:
      return transpose(batch, rows, columns, static_cast<const std::uint16_t*>(source),
                       static_cast<std::uint16_t*>(target), threads);
    case 4:
      return transpose(batch, rows, columns, static_cast<const std::uint32_t*>(source),
                       static_cast<std::uint32_t*>(target), threads);
    default:
      return transpose(batch, rows, columns, static_cast<const std::uint64_t*>(source),
                       static_cast<std::uint64_t*>(target), threads);
  }
}

}  // namespace omniops
