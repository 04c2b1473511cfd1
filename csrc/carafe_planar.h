// CARAFE of (N, C, H, W) tensors, vectorised along a row of the result.
//
// The features of a tile are first packed as the result sees them: each row is split into phases, by x modulo the
// stride, and each number repeated `scale` times. Then tap v of the result's column j is number
// j + (v / stride) * scale of phase v % stride, for any scale and stride, and the inner loops neither gather nor
// interleave nor look at borders, as the rows are padded with zeros. The masks are packed in the order in which the
// inner loops take them, one stream. Either is packed once for many taps or channels, which is also where float16 and
// bfloat16 become float.
//
// The inner loops keep a block of sums in registers, so that they load less than they multiply: forward shares a mask
// among a block of channels and a feature among two rows of results, backward_features a mask among channels and a
// gradient among two rows of features, backward_masks a gradient among taps and a feature among two rows of results.
#pragma once

#include "carafe_tiles.h"

namespace omniops {
namespace OMNIOPS_NAMESPACE {
namespace planar {

// Masks of a row of centres, and of a tile, in bytes. With the features beside them they fit a level-2 cache.
constexpr Index kRowBytes = 128 << 10;
constexpr Index kTileBytes = 256 << 10;
constexpr Index kTileRows = 8;

// Channels that share a loaded mask while `rows` rows share a loaded feature, with half of the registers for sums.
template <int rows>
constexpr int kChannelBlock = kRegisters / 2 / rows < 8 ? kRegisters / 2 / rows : 8;

// Channels of which backward_masks adds up the products before it goes on to the next sums.
constexpr Index kReductionBlock = 16;

// Columns in the layout of the header comment.
template <class A>
struct Line {
  Index width;         // of the result
  Index vectors;       // that cover it
  Index reach;         // the last tap's shift in its phase, in columns of centres
  Index phases;        // that have taps
  Index phase_length;  // numbers in one
  Index length;        // numbers in all

  Line(const CarafeSizes& sizes, Index columns)
      : width(columns * sizes.scale),
        vectors(divide_up(width, kLanes<A>)),
        reach((sizes.kernel - 1) / sizes.stride),
        phases(smaller(sizes.kernel, sizes.stride)),
        phase_length(round_up(reach * sizes.scale + vectors * kLanes<A>, kLanes<A>)),
        length(phase_length * phases) {}
};

// An odd number of cache lines between channels, so that the same index in each lies in another set of the cache.
template <class A>
OMNIOPS_INLINE Index channel_distance(Index numbers) {
  constexpr Index line = 64 / sizeof(A);
  return (divide_up(numbers, line) | 1) * line;
}

template <class A>
CarafeTiling cut(const CarafeSizes& sizes, const Extent& extent, Index channel_block, Index threads) {
  const Index bytes =
      sizes.kernel * sizes.kernel * sizes.scale * sizes.scale * static_cast<Index>(sizeof(A));  // of a centre's masks
  Index unit = kLanes<A>;  // columns of centres that fill whole vectors
  for (Index s = sizes.scale; unit > 1 && s % 2 == 0; s /= 2) unit /= 2;
  CarafeTiling tiling{};
  tiling.columns = larger(kRowBytes / bytes, unit);
  tiling.columns = round_up(divide_up(extent.columns, divide_up(extent.columns, tiling.columns)), unit);
  tiling.columns = smaller(tiling.columns, extent.columns);
  // Rows that are far apart share no features.
  const Index rows = smaller(kTileBytes / (bytes * tiling.columns), kTileRows / sizes.stride);
  tiling.rows = smaller(larger(rows, 1), extent.rows);
  tiling.channels = extent.channels;
  // Some tiles for each thread, so that none waits long for another at the end.
  const Index wanted = threads > 1 ? 4 * threads : 1;
  if (channel_block > 0) {
    const Index split = divide_up(wanted, count_tiles(sizes, extent, tiling));
    tiling.channels = round_up(divide_up(extent.channels, split), channel_block);
  }
  while (tiling.rows > 1 && count_tiles(sizes, extent, tiling) < wanted) tiling.rows = divide_up(tiling.rows, 2);
  tiling.tiles = count_tiles(sizes, extent, tiling);
  return tiling;
}

template <Index scale>
struct Scale {
  OMNIOPS_INLINE constexpr operator Index() const { return scale; }
};

// Calls body(scale) with a number known to the compiler where scale is one of the usual.
template <class Body>
OMNIOPS_INLINE void with_constant_scale(Index scale, const Body& body) {
  switch (scale) {
    case 1:
      return body(Scale<1>{});
    case 2:
      return body(Scale<2>{});
    case 3:
      return body(Scale<3>{});
    case 4:
      return body(Scale<4>{});
    default:
      return body(scale);
  }
}

// The numbers begin ... end - 1 of a phase of a packed row that lie on the map, before they are repeated.
struct PhaseRange {
  Index begin, end;
};

// A row of features as the centres x0 ... x0 + columns - 1 see it. Its ranges are found once for many rows, as
// divisions take long.
template <class A>
struct Row {
  Index first;      // of the features, which may lie outside of the map
  Index low, high;  // of those that lie on it
  PhaseRange* ranges;

  Row(const CarafeSizes& sizes, const Line<A>& line, Index x0, Index columns, PhaseRange* memory)
      : first(x0 * sizes.stride - sizes.kernel / 2), low(larger(first, 0)), ranges(memory) {
    const Index t = sizes.stride, count = columns + line.reach;
    high = smaller(first + count * t, sizes.width);
    for (Index phase = 0; phase < line.phases; ++phase) {
      const Index begin = smaller(larger(divide_up(low - first - phase, t), 0), count);
      ranges[phase] = {begin, larger(smaller(divide_up(high - first - phase, t), count), begin)};
    }
  }
};

// `widened` has room for the features of the row.
template <class T, class A = Accumulator<T>>
void pack_row(const CarafeSizes& sizes, const Line<A>& line, const Row<A>& layout, const T* row, A* widened,
              A* target) {
  const Index s = sizes.scale, t = sizes.stride;
  const A* source;  // of feature `low`
  if constexpr (sizeof(T) == sizeof(A)) {
    source = row + layout.low;
  } else {
    widen_row(row + layout.low, layout.high - layout.low, widened);
    source = widened;
  }
  for (Index phase = 0; phase < line.phases; ++phase, target += line.phase_length) {
    const Index begin = layout.ranges[phase].begin, end = layout.ranges[phase].end;
    const A* from = source + (layout.first + phase - layout.low) + begin * t;
    A* to = target + begin * s;
    fill_zero(target, begin * s);
    with_constant_scale(s, [&](auto scale) {
      for (Index i = 0; i < end - begin; ++i) {
        const A number = from[i * t];
        for (Index b = 0; b < scale; ++b) to[i * scale + b] = number;
      }
    });
    fill_zero(target + end * s, line.phase_length - end * s);
  }
}

// Rows y0 ... y1 - 1 of the features of one channel, some of which may lie outside of the map.
template <class T, class A = Accumulator<T>>
void pack_features(const CarafeSizes& sizes, const Line<A>& line, const Row<A>& row, const T* features, Index y0,
                   Index y1, A* widened, A* target) {
  for (Index y = y0; y < y1; ++y, target += line.length) {
    if (y >= 0 && y < sizes.height) {
      pack_row<T>(sizes, line, row, features + y * sizes.width, widened, target);
    } else {
      fill_zero(target, line.length);
    }
  }
}

// Where tap v lies in a packed row of features, for v = 0 ... kernel - 1.
template <class A>
OMNIOPS_INLINE void tap_offsets(const CarafeSizes& sizes, const Line<A>& line, Index* offset) {
  for (Index v = 0; v < sizes.kernel; ++v) {
    offset[v] = v % sizes.stride * line.phase_length + v / sizes.stride * sizes.scale;
  }
}

// Calls body(row, rows) for the rows of a block of results two by two, the last one alone where scale is odd.
template <class Body>
OMNIOPS_INLINE void for_each_two(Index scale, const Body& body) {
  for (Index a = 0; a < scale; a += 2) body(a, smaller(2, scale - a));
}

// The masks of a tile of centres lie in scratch memory in the order in which the inner loops take them,
// [row of centres][two rows of results][vector][tap][row][lane]. Calls body(tap, row of the result, column from the
// tile's first, columns left, index in scratch memory) for each vector of them.
template <class A, class Body>
OMNIOPS_INLINE void for_each_mask_vector(const CarafeSizes& sizes, const Tile& tile, const Body& body) {
  constexpr Index lanes = kLanes<A>;
  const Index s = sizes.scale, taps = sizes.kernel * sizes.kernel, width = (tile.x1 - tile.x0) * s;
  Index start = 0;
  for (Index y = tile.y0; y < tile.y1; ++y) {
    for_each_two(s, [&](Index a, Index rows) {
      for (Index tap = 0; tap < taps; ++tap) {
        for (Index r = 0; r < rows; ++r) {
          Index index = start + (tap * rows + r) * lanes;
          for (Index x = 0; x < width; x += lanes, index += taps * rows * lanes) {
            body(tap, y * s + a + r, x, width - x, index);
          }
        }
      }
      start += divide_up(width, lanes) * taps * rows * lanes;
    });
  }
}

// The size of a block of sums, as a type.
template <int taps_, int rows_>
struct Block {
  static constexpr int taps = taps_, rows = rows_;
};

// --- forward ---

template <class T>
struct ForwardBuffers {
  using A = Accumulator<T>;
  Line<A> line;
  Index channel_stride;  // of features
  Scratch scratch;
  A* masks;
  A* features;
  A* widened;
  Index* offset;
  PhaseRange* ranges;

  ForwardBuffers(const CarafeSizes& sizes, const CarafeTiling& tiling, void* memory)
      : line(sizes, tiling.columns),
        channel_stride(
            channel_distance<A>(((tiling.rows - 1) * sizes.stride + sizes.kernel) * line.length)),
        scratch{static_cast<char*>(memory)},
        masks(scratch.take<A>(tiling.rows * sizes.scale * line.vectors * sizes.kernel * sizes.kernel * kLanes<A>)),
        features(scratch.take<A>(kChannelBlock<1> * channel_stride)),
        widened(scratch.take<A>(smaller((tiling.columns + line.reach) * sizes.stride, sizes.width))),
        offset(scratch.take<Index>(sizes.kernel)),
        ranges(scratch.take<PhaseRange>(line.phases)) {}
};

// `channels` channels of `rows` rows of results, from packed features and masks.
template <class T, int channels, int rows, class A = Accumulator<T>>
void reassemble(const CarafeSizes& sizes, const Line<A>& line, Index width, const A* features, Index channel_stride,
                const Index* offset, const A* masks, T* out) {
  constexpr int lanes = kLanes<A>;
  const Index out_row = sizes.columns() * sizes.scale;
  const Index out_channel = out_row * sizes.rows() * sizes.scale;
  for (Index x = 0; x < width; x += lanes) {
    Vector<A> sums[channels][rows] = {};
    const A* row = features + x;
    for (Index u = 0; u < sizes.kernel; ++u, row += line.length) {
      for (Index v = 0; v < sizes.kernel; ++v, masks += rows * lanes) {
        const A* tap = row + offset[v];
        Vector<A> mask[rows];
        for (int r = 0; r < rows; ++r) mask[r] = loaded(load(masks + r * lanes));
        for (int c = 0; c < channels; ++c) {
          const Vector<A> feature = loaded(load(tap + c * channel_stride));
          for (int r = 0; r < rows; ++r) sums[c][r] = sums[c][r] + feature * mask[r];
        }
      }
    }
    for (int c = 0; c < channels; ++c) {
      for (int r = 0; r < rows; ++r) store(out + c * out_channel + r * out_row + x, sums[c][r], width - x);
    }
  }
}

template <class T>
struct Forward {
  using A = Accumulator<T>;

  static Extent extent(const CarafeSizes& sizes) { return {sizes.rows(), sizes.columns(), sizes.channels}; }

  static CarafeTiling tiling(const CarafeSizes& sizes, Index threads) {
    CarafeTiling tiling = cut<A>(sizes, extent(sizes), kChannelBlock<2>, threads);
    tiling.scratch_bytes = ForwardBuffers<T>(sizes, tiling, nullptr).scratch.used;
    return tiling;
  }

  static void compute(const CarafeSizes& sizes, const CarafeTiling& tiling, const void* features_address,
                      const void* masks_address, void* out_address, Index tile_index, void* memory) {
    const Tile tile = tile_at(sizes, extent(sizes), tiling, tile_index);
    const ForwardBuffers<T> buffers(sizes, tiling, memory);
    const Index s = sizes.scale, taps = sizes.kernel * sizes.kernel, group = tile.n * sizes.groups + tile.g;
    const Index out_row = sizes.columns() * s, out_channel = out_row * sizes.rows() * s;
    const T* features = static_cast<const T*>(features_address) + group * sizes.channels * sizes.height * sizes.width;
    const T* masks = static_cast<const T*>(masks_address) + group * taps * out_channel;
    T* out = static_cast<T*>(out_address) + group * sizes.channels * out_channel;

    tap_offsets(sizes, buffers.line, buffers.offset);
    const Row<A> row(sizes, buffers.line, tile.x0, tile.x1 - tile.x0, buffers.ranges);
    pack_masks(sizes, buffers, tile, masks);
    for (Index c = tile.c0; c < tile.c1;) {
      const Index block = tile.c1 - c >= kChannelBlock<2> ? kChannelBlock<2> : 1;
      for (Index i = 0; i < block; ++i) {
        const Index y = tile.y0 * sizes.stride - sizes.kernel / 2;
        pack_features<T>(sizes, buffers.line, row, features + (c + i) * sizes.height * sizes.width, y,
                         y + (tile.y1 - tile.y0 - 1) * sizes.stride + sizes.kernel, buffers.widened,
                         buffers.features + i * buffers.channel_stride);
      }
      T* block_out = out + c * out_channel + tile.x0 * s;
      if (block > 1) {
        reassemble_tile<kChannelBlock<2>>(sizes, buffers, tile, block_out);
      } else {
        reassemble_tile<1>(sizes, buffers, tile, block_out);
      }
      c += block;
    }
  }

  static void pack_masks(const CarafeSizes& sizes, const ForwardBuffers<T>& buffers, const Tile& tile,
                         const T* masks) {
    const Index out_row = sizes.columns() * sizes.scale;
    for_each_mask_vector<A>(sizes, tile, [&](Index tap, Index row, Index x, Index count, Index index) {
      const T* source = masks + (tap * sizes.rows() * sizes.scale + row) * out_row + tile.x0 * sizes.scale + x;
      store(buffers.masks + index, load(source, count));
    });
  }

  template <int channels>
  static void reassemble_tile(const CarafeSizes& sizes, const ForwardBuffers<T>& buffers, const Tile& tile, T* out) {
    const Index s = sizes.scale, width = (tile.x1 - tile.x0) * s, out_row = sizes.columns() * s;
    const Index row_numbers = divide_up(width, kLanes<A>) * kLanes<A> * sizes.kernel * sizes.kernel;
    const A* masks = buffers.masks;
    for (Index y = tile.y0; y < tile.y1; ++y) {
      const A* features = buffers.features + (y - tile.y0) * sizes.stride * buffers.line.length;
      for_each_two(s, [&](Index a, Index rows) {
        T* to = out + (y * s + a) * out_row;
        if (rows == 2) {
          reassemble<T, channels, 2>(sizes, buffers.line, width, features, buffers.channel_stride, buffers.offset,
                                     masks, to);
        } else {
          reassemble<T, channels, 1>(sizes, buffers.line, width, features, buffers.channel_stride, buffers.offset,
                                     masks, to);
        }
        masks += rows * row_numbers;
      });
    }
  }
};

// --- backward of the masks ---

template <class T>
struct BackwardMasksBuffers {
  using A = Accumulator<T>;
  Line<A> line;
  Index feature_stride;  // between channels
  Index grad_row;
  Index grad_stride;  // between channels
  Scratch scratch;
  A* sums;
  A* features;
  A* grads;
  A* widened;
  Index* offset;
  PhaseRange* ranges;

  BackwardMasksBuffers(const CarafeSizes& sizes, const CarafeTiling& tiling, void* memory)
      : line(sizes, tiling.columns),
        feature_stride(channel_distance<A>(((tiling.rows - 1) * sizes.stride + sizes.kernel) * line.length)),
        grad_row(line.vectors * kLanes<A>),
        grad_stride(channel_distance<A>(tiling.rows * sizes.scale * grad_row)),
        scratch{static_cast<char*>(memory)},
        sums(scratch.take<A>(tiling.rows * sizes.scale * grad_row * sizes.kernel * sizes.kernel)),
        features(scratch.take<A>(kReductionBlock * feature_stride)),
        grads(scratch.take<A>(kReductionBlock * grad_stride)),
        widened(scratch.take<A>(smaller((tiling.columns + line.reach) * sizes.stride, sizes.width))),
        offset(scratch.take<Index>(sizes.kernel)),
        ranges(scratch.take<PhaseRange>(line.phases)) {}
};

// Adds to the sums of `taps` taps and `rows` rows the products of `channels` channels of features and gradients.
template <int taps, int rows, class A>
OMNIOPS_INLINE void correlate(Index channels, const A* features, Index feature_stride, const Index* offset,
                              const A* grads, Index grad_stride, Index grad_row, A* sums) {
  constexpr int lanes = kLanes<A>;
  Vector<A> sum[taps][rows];
  Index tap_offset[taps];
  for (int v = 0; v < taps; ++v) {
    tap_offset[v] = offset[v];
    for (int r = 0; r < rows; ++r) sum[v][r] = load(sums + (v * rows + r) * lanes);
  }
  for (Index c = 0; c < channels; ++c, features += feature_stride, grads += grad_stride) {
    Vector<A> grad[rows];
    for (int r = 0; r < rows; ++r) grad[r] = loaded(load(grads + r * grad_row));
    for (int v = 0; v < taps; ++v) {
      const Vector<A> feature = loaded(load(features + tap_offset[v]));
      for (int r = 0; r < rows; ++r) sum[v][r] = sum[v][r] + feature * grad[r];
    }
  }
  for (int v = 0; v < taps; ++v) {
    for (int r = 0; r < rows; ++r) store(sums + (v * rows + r) * lanes, sum[v][r]);
  }
}

template <class T>
struct BackwardMasks {
  using A = Accumulator<T>;
  using Buffers = BackwardMasksBuffers<T>;

  static Extent extent(const CarafeSizes& sizes) { return {sizes.rows(), sizes.columns(), 1}; }

  static CarafeTiling tiling(const CarafeSizes& sizes, Index threads) {
    CarafeTiling tiling = cut<A>(sizes, extent(sizes), 0, threads);
    tiling.scratch_bytes = Buffers(sizes, tiling, nullptr).scratch.used;
    return tiling;
  }

  static void compute(const CarafeSizes& sizes, const CarafeTiling& tiling, const void* grad_address,
                      const void* features_address, void* out_address, Index tile_index, void* memory) {
    const Tile tile = tile_at(sizes, extent(sizes), tiling, tile_index);
    const Buffers buffers(sizes, tiling, memory);
    const Index s = sizes.scale, taps = sizes.kernel * sizes.kernel, group = tile.n * sizes.groups + tile.g;
    const Index out_row = sizes.columns() * s, plane = out_row * sizes.rows() * s;
    const Index y = tile.y0 * sizes.stride - sizes.kernel / 2;
    const T* grads = static_cast<const T*>(grad_address) + group * sizes.channels * plane + tile.x0 * s;
    const T* features = static_cast<const T*>(features_address) + group * sizes.channels * sizes.height * sizes.width;
    T* out = static_cast<T*>(out_address) + group * taps * plane;

    tap_offsets(sizes, buffers.line, buffers.offset);
    const Row<A> row(sizes, buffers.line, tile.x0, tile.x1 - tile.x0, buffers.ranges);
    fill_zero(buffers.sums, (tile.y1 - tile.y0) * s * buffers.grad_row * taps);
    for (Index c = 0; c < sizes.channels; c += kReductionBlock) {
      const Index channels = smaller(kReductionBlock, sizes.channels - c);
      for (Index i = 0; i < channels; ++i) {
        pack_features<T>(sizes, buffers.line, row, features + (c + i) * sizes.height * sizes.width, y,
                         y + (tile.y1 - tile.y0 - 1) * sizes.stride + sizes.kernel, buffers.widened,
                         buffers.features + i * buffers.feature_stride);
        pack_grads(sizes, buffers, tile, grads + (c + i) * plane, buffers.grads + i * buffers.grad_stride);
      }
      correlate_tile(sizes, buffers, tile, channels);
    }
    write_masks(sizes, buffers, tile, out);
  }

  static void pack_grads(const CarafeSizes& sizes, const Buffers& buffers, const Tile& tile, const T* grads,
                         A* target) {
    const Index out_row = sizes.columns() * sizes.scale, width = (tile.x1 - tile.x0) * sizes.scale;
    for (Index i = tile.y0 * sizes.scale; i < tile.y1 * sizes.scale; ++i, target += buffers.grad_row) {
      widen_row(grads + i * out_row, width, target);
      fill_zero(target + width, buffers.grad_row - width);
    }
  }

  static void correlate_tile(const CarafeSizes& sizes, const Buffers& buffers, const Tile& tile, Index channels) {
    constexpr Index lanes = kLanes<A>;
    const Index s = sizes.scale, vectors = divide_up((tile.x1 - tile.x0) * s, lanes);
    A* sums = buffers.sums;
    for (Index y = 0; y < tile.y1 - tile.y0; ++y) {
      for_each_two(s, [&](Index a, Index rows) {
        for (Index x = 0; x < vectors * lanes; x += lanes) {
          const A* features = buffers.features + y * sizes.stride * buffers.line.length + x;
          const A* grads = buffers.grads + (y * s + a) * buffers.grad_row + x;
          for (Index u = 0; u < sizes.kernel; ++u, features += buffers.line.length) {
            for (Index v = 0; v < sizes.kernel;) {
              const auto add = [&](auto taps_and_rows) {
                constexpr int taps = decltype(taps_and_rows)::taps, count = decltype(taps_and_rows)::rows;
                correlate<taps, count>(channels, features, buffers.feature_stride, buffers.offset + v, grads,
                                       buffers.grad_stride, buffers.grad_row, sums);
                sums += taps * count * lanes;
                v += taps;
              };
              const Index left = sizes.kernel - v;
              if (rows == 2) {
                left >= 5 ? add(Block<5, 2>{}) : left >= 3 ? add(Block<3, 2>{}) : add(Block<1, 2>{});
              } else {
                left >= 5 ? add(Block<5, 1>{}) : left >= 3 ? add(Block<3, 1>{}) : add(Block<1, 1>{});
              }
            }
          }
        }
      });
    }
  }

  static void write_masks(const CarafeSizes& sizes, const Buffers& buffers, const Tile& tile, T* out) {
    for_each_mask_vector<A>(sizes, tile, [&](Index tap, Index row, Index x, Index count, Index index) {
      const Index out_row = sizes.columns() * sizes.scale;
      T* target = out + (tap * sizes.rows() * sizes.scale + row) * out_row + tile.x0 * sizes.scale + x;
      store(target, load(buffers.sums + index), count);
    });
  }
};

// --- backward of the features ---
//
// A centre x' sees feature x of the map with tap v where x + p = x' * stride + v: in block i = (x + p) / stride of
// phase (x + p) % stride = v % stride, where x' = i - v / stride. So the columns of a tile are blocks i, each a sum
// over the taps of its phase, and the `scale` neighbours of a block add up to the gradient of the feature.

template <class T>
struct BackwardFeaturesBuffers {
  using A = Accumulator<T>;
  Line<A> line;
  Index sums_length;  // numbers in a phase of the sums
  Index grad_stride;  // between channels
  Scratch scratch;
  A* masks;
  A* grads;
  A* sums;
  A* feature_row;

  BackwardFeaturesBuffers(const CarafeSizes& sizes, const CarafeTiling& tiling, void* memory)
      : line(sizes, tiling.columns),
        sums_length(line.vectors * kLanes<A>),
        grad_stride(channel_distance<A>(((tiling.rows + sizes.kernel - 2) / sizes.stride + 1) * sizes.scale *
                                        line.phase_length)),
        scratch{static_cast<char*>(memory)},
        masks(scratch.take<A>(tiling.rows * sizes.scale * sums_length * sizes.kernel * sizes.kernel)),
        grads(scratch.take<A>(kChannelBlock<1> * grad_stride)),
        sums(scratch.take<A>(2 * kChannelBlock<1> * line.phases * sums_length)),
        feature_row(scratch.take<A>(smaller(tiling.columns * sizes.stride, sizes.width))) {}
};

template <class T>
struct BackwardFeatures {
  using A = Accumulator<T>;
  using Buffers = BackwardFeaturesBuffers<T>;

  static Index first_block(const CarafeSizes& sizes) { return sizes.kernel / 2 / sizes.stride; }

  static Extent extent(const CarafeSizes& sizes) {
    const Index last = (sizes.width - 1 + sizes.kernel / 2) / sizes.stride;
    return {sizes.height, last + 1 - first_block(sizes), sizes.channels};
  }

  static CarafeTiling tiling(const CarafeSizes& sizes, Index threads) {
    CarafeTiling tiling = cut<A>(sizes, extent(sizes), kChannelBlock<2>, threads);
    tiling.scratch_bytes = Buffers(sizes, tiling, nullptr).scratch.used;
    return tiling;
  }

  // The centres y' of which tap u = y + p - y' * stride lies on row y, for one of the rows y0 ... y1 - 1.
  static Index first_centre(const CarafeSizes& sizes, Index y0) {
    return larger(divide_up(y0 + sizes.kernel / 2 - (sizes.kernel - 1), sizes.stride), 0);
  }
  static Index end_centre(const CarafeSizes& sizes, Index y1) {
    return smaller((y1 - 1 + sizes.kernel / 2) / sizes.stride + 1, sizes.rows());
  }

  // Rows of features that are summed at once, from y on: with a stride of 1 two rows see the same gradients.
  static Index rows_at(const CarafeSizes& sizes, const Tile& tile, Index y) {
    return sizes.stride == 1 && y + 1 < tile.y1 ? 2 : 1;
  }

  static bool is_tap(const CarafeSizes& sizes, Index u) { return u >= 0 && u < sizes.kernel; }

  static void compute(const CarafeSizes& sizes, const CarafeTiling& tiling, const void* grad_address,
                      const void* masks_address, void* out_address, Index tile_index, void* memory) {
    Tile tile = tile_at(sizes, extent(sizes), tiling, tile_index);
    tile.x0 += first_block(sizes);
    tile.x1 += first_block(sizes);
    const Buffers buffers(sizes, tiling, memory);
    const Index group = tile.n * sizes.groups + tile.g;
    const Index plane = sizes.rows() * sizes.columns() * sizes.scale * sizes.scale;
    const Index out_plane = sizes.height * sizes.width;
    const T* masks = static_cast<const T*>(masks_address) + group * sizes.kernel * sizes.kernel * plane;
    const T* grads = static_cast<const T*>(grad_address) + group * sizes.channels * plane;
    T* out = static_cast<T*>(out_address) + group * sizes.channels * out_plane;

    pack_masks(sizes, buffers, tile, masks);
    for (Index c = tile.c0; c < tile.c1;) {
      const Index block = tile.c1 - c >= kChannelBlock<2> ? kChannelBlock<2> : 1;
      for (Index i = 0; i < block; ++i) {
        pack_grads(sizes, buffers, tile, grads + (c + i) * plane, buffers.grads + i * buffers.grad_stride);
      }
      if (block > 1) {
        gather_tile<kChannelBlock<2>>(sizes, buffers, tile, out + c * out_plane);
      } else {
        gather_tile<1>(sizes, buffers, tile, out + c * out_plane);
      }
      c += block;
    }
  }

  // Calls body(centre row y', row a of its block, tap v, row r) for each mask row that the rows y, y + 1, ... of phase
  // `phase` see, in the order of the inner loops.
  template <class Body>
  static void for_each_mask_row(const CarafeSizes& sizes, Index y, Index rows, Index phase, const Body& body) {
    for (Index centre = first_centre(sizes, y); centre < end_centre(sizes, y + rows); ++centre) {
      for (Index a = 0; a < sizes.scale; ++a) {
        for (Index v = phase; v < sizes.kernel; v += sizes.stride) {
          for (Index r = 0; r < rows; ++r) {
            if (is_tap(sizes, y + r + sizes.kernel / 2 - centre * sizes.stride)) body(centre, a, v, r);
          }
        }
      }
    }
  }

  // [rows of features][phase][vector][row of centres][row of the block][tap][row of features][lane]
  static void pack_masks(const CarafeSizes& sizes, const Buffers& buffers, const Tile& tile, const T* masks) {
    constexpr Index lanes = kLanes<A>;
    const Index s = sizes.scale, width = (tile.x1 - tile.x0) * s;
    const Index out_row = sizes.columns() * s, plane = out_row * sizes.rows() * s;
    A* target = buffers.masks;
    for (Index y = tile.y0, rows; y < tile.y1; y += rows) {
      rows = rows_at(sizes, tile, y);
      for (Index phase = 0; phase < buffers.line.phases; ++phase) {
        Index distance = 0;  // between vectors
        for_each_mask_row(sizes, y, rows, phase, [&](Index, Index, Index, Index) { distance += lanes; });
        A* pointer = target;
        for_each_mask_row(sizes, y, rows, phase, [&](Index centre, Index a, Index v, Index r) {
          const Index u = y + r + sizes.kernel / 2 - centre * sizes.stride;
          const T* source = masks + (u * sizes.kernel + v) * plane + (centre * s + a) * out_row;
          const Index first = (tile.x0 - v / sizes.stride) * s;
          A* to = pointer;
          for (Index x = first; x < first + width; x += lanes, to += distance) {
            store(to, load_within(source, x, out_row));
          }
          pointer += lanes;
        });
        target += divide_up(width, lanes) * distance;
      }
    }
  }

  // Numbers x, x + 1, ... of a row, zero where the row has none.
  static Vector<A> load_within(const T* row, Index x, Index count) {
    if (x >= 0) return load(row + x, larger(count - x, 0));
    A buffer[kLanes<A>] = {};
    for (Index i = -x; i < kLanes<A> && x + i < count; ++i) buffer[i] = widen(row[x + i]);
    return load(buffer);
  }

  // [row of centres][row of the block][column], padded with zeros for the taps that reach over the border.
  static void pack_grads(const CarafeSizes& sizes, const Buffers& buffers, const Tile& tile, const T* grads,
                         A* target) {
    const Index s = sizes.scale, out_row = sizes.columns() * s, phase_length = buffers.line.phase_length;
    const Index first = (tile.x0 - buffers.line.reach) * s;
    const Index begin = smaller(larger(-first, 0), phase_length);
    const Index end = larger(smaller(out_row - first, phase_length), begin);
    const Index last_row = end_centre(sizes, tile.y1) * s;
    for (Index i = first_centre(sizes, tile.y0) * s; i < last_row; ++i, target += phase_length) {
      fill_zero(target, begin);
      widen_row(grads + i * out_row + first + begin, end - begin, target + begin);
      fill_zero(target + end, phase_length - end);
    }
  }

  template <int channels>
  static void gather_tile(const CarafeSizes& sizes, const Buffers& buffers, const Tile& tile, T* out) {
    const A* masks = buffers.masks;
    for (Index y = tile.y0, rows; y < tile.y1; y += rows) {
      rows = rows_at(sizes, tile, y);
      for (Index phase = 0; phase < buffers.line.phases; ++phase) {
        if (rows == 2) {
          masks = gather<channels, 2>(sizes, buffers, tile, y, phase, masks);
        } else {
          masks = gather<channels, 1>(sizes, buffers, tile, y, phase, masks);
        }
      }
      for (Index r = 0; r < rows; ++r) {
        for (int c = 0; c < channels; ++c) {
          fold(sizes, buffers, tile, buffers.sums + (r * channels + c) * buffers.line.phases * buffers.sums_length,
               out + (c * sizes.height + y + r) * sizes.width);
        }
      }
    }
  }

  // The sums of `rows` rows of features and `channels` channels, of one phase. Returns where the next masks lie.
  template <int channels, int rows>
  static const A* gather(const CarafeSizes& sizes, const Buffers& buffers, const Tile& tile, Index y, Index phase,
                         const A* masks) {
    constexpr Index lanes = kLanes<A>;
    const Index width = (tile.x1 - tile.x0) * sizes.scale;
    const Index begin = first_centre(sizes, y), end = end_centre(sizes, y + rows);
    const Index row = buffers.line.phase_length;
    const A* first = buffers.grads + (begin - first_centre(sizes, tile.y0)) * sizes.scale * row +
                     buffers.line.reach * sizes.scale - phase / sizes.stride * sizes.scale;
    for (Index x = 0; x < width; x += lanes) {
      Vector<A> sums[rows][channels] = {};
      const A* grads = first + x;
      for (Index centre = begin; centre < end; ++centre) {
        const Index u = y + sizes.kernel / 2 - centre * sizes.stride;
        for (Index a = 0; a < sizes.scale; ++a, grads += row) {
          if (rows == 1 || !is_tap(sizes, u + 1)) {
            masks = add_taps<channels, 1>(sizes, phase, grads, buffers.grad_stride, masks, sums);
          } else if (!is_tap(sizes, u)) {
            masks = add_taps<channels, 1>(sizes, phase, grads, buffers.grad_stride, masks, sums + rows - 1);
          } else {
            masks = add_taps<channels, rows>(sizes, phase, grads, buffers.grad_stride, masks, sums);
          }
        }
      }
      for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < channels; ++c) {
          A* target = buffers.sums + ((r * channels + c) * buffers.line.phases + phase) * buffers.sums_length + x;
          store(target, sums[r][c]);
        }
      }
    }
    return masks;
  }

  template <int channels, int rows>
  OMNIOPS_INLINE static const A* add_taps(const CarafeSizes& sizes, Index phase, const A* grads, Index grad_stride,
                                          const A* masks, Vector<A> (*sums)[channels]) {
    constexpr Index lanes = kLanes<A>;
    for (Index v = phase; v < sizes.kernel; v += sizes.stride, grads -= sizes.scale, masks += rows * lanes) {
      Vector<A> mask[rows];
      for (int r = 0; r < rows; ++r) mask[r] = loaded(load(masks + r * lanes));
      for (int c = 0; c < channels; ++c) {
        const Vector<A> grad = loaded(load(grads + c * grad_stride));
        for (int r = 0; r < rows; ++r) sums[r][c] = sums[r][c] + grad * mask[r];
      }
    }
    return masks;
  }

  // One row of features: each is the sum of a block of `scale`.
  static void fold(const CarafeSizes& sizes, const Buffers& buffers, const Tile& tile, const A* sums, T* out) {
    const Index s = sizes.scale, t = sizes.stride, p = sizes.kernel / 2;
    const Index begin = larger(tile.x0 * t - p, 0), end = smaller(tile.x1 * t - p, sizes.width);
    A* row = buffers.feature_row;
    fill_zero(row, end - begin);
    for (Index phase = 0; phase < buffers.line.phases; ++phase) {
      const Index first = begin + (phase + t - (begin + p) % t) % t;  // feature of this phase
      const A* from = sums + phase * buffers.sums_length + ((first + p) / t - tile.x0) * s;
      with_constant_scale(s, [&](auto scale) {
        A* to = row + (first - begin);
        for (Index i = 0; i * t < end - first; ++i) {
          A sum = from[i * scale];
          for (Index b = 1; b < scale; ++b) sum += from[i * scale + b];
          to[i * t] = sum;
        }
      });
    }
    narrow_row(row, end - begin, out + begin);
  }
};

}  // namespace planar
}  // namespace OMNIOPS_NAMESPACE
}  // namespace omniops
