// Cuts the work of a call into tiles whose scratch memory stays in a core's cache.
#pragma once

#include "carafe_kernels.h"
#include "simd.h"

namespace omniops {
namespace OMNIOPS_NAMESPACE {

using Index = std::int64_t;

OMNIOPS_INLINE Index smaller(Index x, Index y) { return x < y ? x : y; }
OMNIOPS_INLINE Index larger(Index x, Index y) { return x > y ? x : y; }
OMNIOPS_INLINE Index divide_up(Index x, Index y) { return x > 0 ? (x + y - 1) / y : -(-x / y); }  // y > 0
OMNIOPS_INLINE Index round_up(Index x, Index y) { return divide_up(x, y) * y; }

// What there is to cut, of each of batch x groups.
struct Extent {
  Index rows;
  Index columns;
  Index channels;
};

// One tile: the half-open ranges of an Extent that it covers.
struct Tile {
  Index n, g;
  Index y0, y1, x0, x1, c0, c1;
};

OMNIOPS_INLINE Index count_tiles(const CarafeSizes& sizes, const Extent& extent, const CarafeTiling& tiling) {
  return sizes.batch * sizes.groups * divide_up(extent.channels, tiling.channels) *
         divide_up(extent.rows, tiling.rows) * divide_up(extent.columns, tiling.columns);
}

OMNIOPS_INLINE Tile tile_at(const CarafeSizes& sizes, const Extent& extent, const CarafeTiling& tiling, Index tile) {
  const auto take = [&tile](Index count) {
    const Index index = tile % count;
    tile /= count;
    return index;
  };
  Tile t;
  t.x0 = take(divide_up(extent.columns, tiling.columns)) * tiling.columns;
  t.y0 = take(divide_up(extent.rows, tiling.rows)) * tiling.rows;
  t.c0 = take(divide_up(extent.channels, tiling.channels)) * tiling.channels;
  t.g = take(sizes.groups);
  t.n = tile;
  t.x1 = smaller(t.x0 + tiling.columns, extent.columns);
  t.y1 = smaller(t.y0 + tiling.rows, extent.rows);
  t.c1 = smaller(t.c0 + tiling.channels, extent.channels);
  return t;
}

// Memory for the numbers of a tile, taken one array after another; with a null pointer, only counted.
struct Scratch {
  char* memory;
  Index used = 0;

  template <class A>
  A* take(Index numbers) {
    A* array = memory == nullptr ? nullptr : reinterpret_cast<A*>(memory + used);
    used += round_up(numbers * static_cast<Index>(sizeof(A)), 64);
    return array;
  }
};

}  // namespace OMNIOPS_NAMESPACE
}  // namespace omniops
