// CARAFE of (N, H, W, C) tensors, vectorised along the channels of a pixel.
//
// Here a mask is one number for a whole vector of channels, and a pixel outside of the map is simply not visited, so
// tensors are read where they lie. Only float16 and bfloat16, and channels that do not fill whole vectors, are first
// copied, widened and padded, for a tile at a time.
//
// The inner loops keep a block of sums in registers: the results of a centre's block share each feature (forward), taps
// and results share features and gradients (backward_masks), neighbouring features share each gradient
// (backward_features).
#pragma once

#include "carafe_tiles.h"

namespace omniops {
namespace OMNIOPS_NAMESPACE {
namespace channels_last {

// A tile at most, and the channels that are worked on at once: what they read fits a level-2 cache.
constexpr Index kTileRows = 8;
constexpr Index kTileColumns = 16;
constexpr Index kChannels = 64;
constexpr Index kReducedChannels = 256;  // of which backward_masks adds up the products before it goes on

// Vectors of channels that forward and backward_features sum at once.
constexpr int kVectors = 4;

// Results of a centre's block that forward and backward_masks sum at once.
constexpr int kResults = kRegisters / 8;

// Neighbouring features that backward_features sums at once.
constexpr int kFeatures = 2;

// A compile-time number, as an argument.
template <int value_>
struct Constant {
  static constexpr int value = value_;
};

// How a call's tensors lie in memory.
struct Strides {
  Index feature_pixel, feature_row, feature_image;
  Index mask_pixel, mask_row, mask_image;
  Index out_row, out_image;  // a pixel is as far as one of features

  explicit Strides(const CarafeSizes& sizes)
      : feature_pixel(sizes.groups * sizes.channels),
        feature_row(feature_pixel * sizes.width),
        feature_image(feature_row * sizes.height),
        mask_pixel(sizes.groups * sizes.kernel * sizes.kernel),
        mask_row(mask_pixel * sizes.columns() * sizes.scale),
        mask_image(mask_row * sizes.rows() * sizes.scale),
        out_row(feature_pixel * sizes.columns() * sizes.scale),
        out_image(out_row * sizes.rows() * sizes.scale) {}
};

struct Range {
  Index begin, end;

  Index size() const { return end - begin; }
};

// The taps of a centre, along one axis, that lie on the map.
OMNIOPS_INLINE Range taps_of(const CarafeSizes& sizes, Index centre, Index size) {
  const Index first = centre * sizes.stride - sizes.kernel / 2;
  return {larger(-first, 0), smaller(size - first, sizes.kernel)};
}

// The features that centres begin ... end - 1 see, along one axis.
OMNIOPS_INLINE Range features_of(const CarafeSizes& sizes, Index begin, Index end, Index size) {
  const Index p = sizes.kernel / 2;
  return {larger(begin * sizes.stride - p, 0), smaller((end - 1) * sizes.stride + p + 1, size)};
}

// The centres that see one of the features begin ... end - 1, along one axis.
OMNIOPS_INLINE Range centres_of(const CarafeSizes& sizes, Index begin, Index end, Index centres) {
  const Index p = sizes.kernel / 2;
  return {larger(divide_up(begin - p, sizes.stride), 0), smaller((end - 1 + p) / sizes.stride + 1, centres)};
}

// The most features that a number of centres see, and the most centres that see a number of features.
OMNIOPS_INLINE Index most_features(const CarafeSizes& sizes, Index centres) {
  return (centres - 1) * sizes.stride + sizes.kernel;
}
OMNIOPS_INLINE Index most_centres(const CarafeSizes& sizes, Index features) {
  return (features + sizes.kernel - 2) / sizes.stride + 1;
}

OMNIOPS_INLINE Range scaled(Range range, Index scale) { return {range.begin * scale, range.end * scale}; }

// Some numbers of each pixel of a rectangle, as accumulators: the tensor itself or a copy.
template <class T, class A = Accumulator<T>>
struct Region {
  const A* numbers;
  Index row, pixel;  // strides
  Index i0, j0;      // the first pixel

  const A* at(Index i, Index j) const { return numbers + (i - i0) * row + (j - j0) * pixel; }

  // `source` is the first of `count` numbers of pixel (0, 0). A copy has `spaced` numbers a pixel, zeros at the end.
  Region(const T* source, Index source_row, Index source_pixel, Range rows, Range columns, Index count, Index spaced,
         A* copy)
      : i0(rows.begin), j0(columns.begin) {
    source += i0 * source_row + j0 * source_pixel;
    if constexpr (sizeof(T) == sizeof(A)) {
      if (count == spaced) {
        numbers = source;
        row = source_row;
        pixel = source_pixel;
        return;
      }
    }
    numbers = copy;
    pixel = spaced;
    row = columns.size() * spaced;
    for (Index i = rows.begin; i < rows.end; ++i, source += source_row, copy += row) {
      if (source_pixel == count && count == spaced) {
        widen_row(source, row, copy);
      } else {
        for (Index j = 0; j < columns.size(); ++j) {
          widen_row(source + j * source_pixel, count, copy + j * spaced);
          fill_zero(copy + j * spaced + count, spaced - count);
        }
      }
    }
  }
};

OMNIOPS_INLINE CarafeTiling cut(const CarafeSizes& sizes, const Extent& extent, Index threads) {
  CarafeTiling tiling{};
  // Centres that are far apart share no features.
  tiling.rows = smaller(larger(kTileRows / sizes.stride, 1), extent.rows);
  tiling.columns = smaller(larger(kTileColumns / sizes.stride, 1), extent.columns);
  tiling.channels = 1;
  const Index wanted = threads > 1 ? 4 * threads : 1;
  while (tiling.rows > 1 && count_tiles(sizes, extent, tiling) < wanted) tiling.rows = divide_up(tiling.rows, 2);
  while (tiling.columns > kFeatures && count_tiles(sizes, extent, tiling) < wanted) {
    tiling.columns = round_up(divide_up(tiling.columns, 2), kFeatures);
  }
  tiling.tiles = count_tiles(sizes, extent, tiling);
  return tiling;
}

// Calls body(vectors, channel) to cover `channels` channels, up to `max_count` vectors at a time.
template <class A, int max_count, class Body>
OMNIOPS_INLINE void for_each_vector_block(Index channels, const Body& body) {
  constexpr Index lanes = kLanes<A>;
  Index c = 0;
  for (; c + (max_count - 1) * lanes < channels; c += max_count * lanes) body(Constant<max_count>{}, c);
  for (; c < channels; c += lanes) body(Constant<1>{}, c);
}

// Calls body(results, result) to cover the results of a centre's block, up to `max_count` at a time.
template <int max_count, class Body>
OMNIOPS_INLINE void for_each_result_block(Index scale, const Body& body) {
  Index result = 0;
  for (; result + max_count <= scale * scale; result += max_count) body(Constant<max_count>{}, result);
  for (; result < scale * scale; ++result) body(Constant<1>{}, result);
}

// --- forward ---

template <class T>
struct Forward {
  using A = Accumulator<T>;

  struct Buffers {
    Scratch scratch;
    A* masks;
    A* features;

    Buffers(const CarafeSizes& sizes, const CarafeTiling& tiling, void* memory)
        : scratch{static_cast<char*>(memory)},
          masks(scratch.take<A>(tiling.rows * tiling.columns * sizes.scale * sizes.scale * sizes.kernel *
                                sizes.kernel)),
          features(scratch.take<A>(most_features(sizes, tiling.rows) * most_features(sizes, tiling.columns) *
                                   kChannels)) {}
  };

  static Extent extent(const CarafeSizes& sizes) { return {sizes.rows(), sizes.columns(), 1}; }

  static CarafeTiling tiling(const CarafeSizes& sizes, Index threads) {
    CarafeTiling tiling = cut(sizes, extent(sizes), threads);
    tiling.scratch_bytes = Buffers(sizes, tiling, nullptr).scratch.used;
    return tiling;
  }

  static void compute(const CarafeSizes& sizes, const CarafeTiling& tiling, const void* features_address,
                      const void* masks_address, void* out_address, Index tile_index, void* memory) {
    const Tile tile = tile_at(sizes, extent(sizes), tiling, tile_index);
    const Strides strides(sizes);
    const Buffers buffers(sizes, tiling, memory);
    const Index taps = sizes.kernel * sizes.kernel;
    const T* features_start =
        static_cast<const T*>(features_address) + tile.n * strides.feature_image + tile.g * sizes.channels;
    const T* masks_start = static_cast<const T*>(masks_address) + tile.n * strides.mask_image + tile.g * taps;
    T* out = static_cast<T*>(out_address) + tile.n * strides.out_image + tile.g * sizes.channels;

    const Region<T> masks(masks_start, strides.mask_row, strides.mask_pixel, scaled({tile.y0, tile.y1}, sizes.scale),
                          scaled({tile.x0, tile.x1}, sizes.scale), taps, taps, buffers.masks);
    for (Index c0 = 0; c0 < sizes.channels; c0 += kChannels) {
      const Index channels = smaller(kChannels, sizes.channels - c0);
      const Region<T> features(features_start + c0, strides.feature_row, strides.feature_pixel,
                               features_of(sizes, tile.y0, tile.y1, sizes.height),
                               features_of(sizes, tile.x0, tile.x1, sizes.width), channels,
                               round_up(channels, kLanes<A>), buffers.features);
      for_each_result_block<kResults>(sizes.scale, [&](auto results, Index result) {
        constexpr int count = decltype(results)::value;
        for_each_vector_block<A, kVectors>(channels, [&](auto vectors, Index c) {
          for (Index y = tile.y0; y < tile.y1; ++y) {
            for (Index x = tile.x0; x < tile.x1; ++x) {
              reassemble<count, decltype(vectors)::value>(sizes, strides, features, masks, y, x, result, c,
                                                          channels - c, out + c0 + c);
            }
          }
        });
      });
    }
  }

  // `results` results of the block of centre (y, x), from `result` on, of `vectors` vectors of channels from c on.
  template <int results, int vectors>
  static void reassemble(const CarafeSizes& sizes, const Strides& strides, const Region<T>& features,
                         const Region<T>& masks, Index y, Index x, Index result, Index c, Index channels, T* out) {
    constexpr Index lanes = kLanes<A>;
    const Index s = sizes.scale, p = sizes.kernel / 2;
    const Range rows = taps_of(sizes, y, sizes.height), columns = taps_of(sizes, x, sizes.width);
    const A* mask[results];
    for (int r = 0; r < results; ++r) mask[r] = masks.at(y * s + (result + r) / s, x * s + (result + r) % s);
    Vector<A> sums[results][vectors] = {};
    for (Index u = rows.begin; u < rows.end; ++u) {
      const A* pixel = features.at(y * sizes.stride + u - p, x * sizes.stride + columns.begin - p) + c;
      for (Index v = columns.begin; v < columns.end; ++v, pixel += features.pixel) {
        Vector<A> feature[vectors];
        for (int i = 0; i < vectors; ++i) feature[i] = loaded(load(pixel + i * lanes));
        for (int r = 0; r < results; ++r) {
          const A weight = mask[r][u * sizes.kernel + v];
          for (int i = 0; i < vectors; ++i) sums[r][i] = sums[r][i] + feature[i] * weight;
        }
      }
    }
    for (int r = 0; r < results; ++r) {
      const Index i = y * s + (result + r) / s, j = x * s + (result + r) % s;
      T* pixel = out + i * strides.out_row + j * strides.feature_pixel;
      for (int v = 0; v < vectors; ++v) store(pixel + v * lanes, sums[r][v], channels - v * lanes);
    }
  }
};

// --- backward of the masks ---

template <class T>
struct BackwardMasks {
  using A = Accumulator<T>;

  struct Buffers {
    Scratch scratch;
    A* sums;
    A* features;
    A* grads;

    Buffers(const CarafeSizes& sizes, const CarafeTiling& tiling, void* memory)
        : scratch{static_cast<char*>(memory)},
          sums(scratch.take<A>(tiling.rows * tiling.columns * sizes.scale * sizes.scale * sizes.kernel *
                               sizes.kernel)),
          features(scratch.take<A>(most_features(sizes, tiling.rows) * most_features(sizes, tiling.columns) *
                                   kReducedChannels)),
          grads(scratch.take<A>(sizes.scale * sizes.scale * kReducedChannels)) {}
  };

  static Extent extent(const CarafeSizes& sizes) { return {sizes.rows(), sizes.columns(), 1}; }

  static CarafeTiling tiling(const CarafeSizes& sizes, Index threads) {
    CarafeTiling tiling = cut(sizes, extent(sizes), threads);
    tiling.scratch_bytes = Buffers(sizes, tiling, nullptr).scratch.used;
    return tiling;
  }

  static void compute(const CarafeSizes& sizes, const CarafeTiling& tiling, const void* grad_address,
                      const void* features_address, void* out_address, Index tile_index, void* memory) {
    const Tile tile = tile_at(sizes, extent(sizes), tiling, tile_index);
    const Strides strides(sizes);
    const Buffers buffers(sizes, tiling, memory);
    const Index s = sizes.scale, taps = sizes.kernel * sizes.kernel;
    const T* grads_start = static_cast<const T*>(grad_address) + tile.n * strides.out_image + tile.g * sizes.channels;
    const T* features_start =
        static_cast<const T*>(features_address) + tile.n * strides.feature_image + tile.g * sizes.channels;
    T* out = static_cast<T*>(out_address) + tile.n * strides.mask_image + tile.g * taps;

    // The sums of a tile lie as [centre][result of its block][tap].
    fill_zero(buffers.sums, (tile.y1 - tile.y0) * (tile.x1 - tile.x0) * s * s * taps);
    for (Index c0 = 0; c0 < sizes.channels; c0 += kReducedChannels) {
      const Index channels = smaller(kReducedChannels, sizes.channels - c0), spaced = round_up(channels, kLanes<A>);
      const Region<T> features(features_start + c0, strides.feature_row, strides.feature_pixel,
                               features_of(sizes, tile.y0, tile.y1, sizes.height),
                               features_of(sizes, tile.x0, tile.x1, sizes.width), channels, spaced, buffers.features);
      A* sums = buffers.sums;
      for (Index y = tile.y0; y < tile.y1; ++y) {
        for (Index x = tile.x0; x < tile.x1; ++x) {
          const Region<T> grads(grads_start + c0, strides.out_row, strides.feature_pixel, scaled({y, y + 1}, s),
                                scaled({x, x + 1}, s), channels, spaced, buffers.grads);
          for_each_result_block<kResults>(s, [&](auto results, Index result) {
            correlate_centre<decltype(results)::value>(sizes, grads, features, y, x, result, spaced, sums);
            sums += decltype(results)::value * taps;
          });
        }
      }
    }
    const A* sums = buffers.sums;
    for (Index y = tile.y0; y < tile.y1; ++y) {
      for (Index x = tile.x0; x < tile.x1; ++x) {
        for (Index result = 0; result < s * s; ++result, sums += taps) {
          const Index i = y * s + result / s, j = x * s + result % s;
          narrow_row(sums, taps, out + i * strides.mask_row + j * strides.mask_pixel);
        }
      }
    }
  }

  // Adds to the masks of `results` results of the block of centre (y, x), from `result` on.
  template <int results>
  static void correlate_centre(const CarafeSizes& sizes, const Region<T>& grads, const Region<T>& features, Index y,
                               Index x, Index result, Index channels, A* sums) {
    const Index s = sizes.scale, p = sizes.kernel / 2;
    const Range rows = taps_of(sizes, y, sizes.height), columns = taps_of(sizes, x, sizes.width);
    const A* grad[results];
    for (int r = 0; r < results; ++r) grad[r] = grads.at(y * s + (result + r) / s, x * s + (result + r) % s);
    for (Index u = rows.begin; u < rows.end; ++u) {
      for (Index v = columns.begin; v < columns.end;) {
        const A* feature = features.at(y * sizes.stride + u - p, x * sizes.stride + v - p);
        A* sum = sums + u * sizes.kernel + v;
        const auto add = [&](auto taps) {
          correlate<decltype(taps)::value>(channels, grad, feature, features.pixel, sum, sizes.kernel * sizes.kernel);
          v += decltype(taps)::value;
        };
        const Index left = columns.end - v;
        left >= 5 ? add(Constant<5>{}) : left >= 3 ? add(Constant<3>{}) : add(Constant<1>{});
      }
    }
  }

  // Adds the products of the gradients of `results` results with `taps` neighbouring features.
  template <int taps, int results>
  OMNIOPS_INLINE static void correlate(Index channels, const A* const (&grads)[results], const A* features, Index pixel,
                                       A* sums, Index sums_stride) {
    Vector<A> products[results][taps] = {};
    for (Index c = 0; c < channels; c += kLanes<A>) {
      Vector<A> grad[results];
      for (int r = 0; r < results; ++r) grad[r] = loaded(load(grads[r] + c));
      for (int v = 0; v < taps; ++v) {
        const Vector<A> feature = loaded(load(features + v * pixel + c));
        for (int r = 0; r < results; ++r) products[r][v] = products[r][v] + feature * grad[r];
      }
    }
    for (int r = 0; r < results; ++r) {
      for (int v = 0; v < taps; ++v) sums[r * sums_stride + v] += sum<A>(products[r][v]);
    }
  }
};

// --- backward of the features ---

template <class T>
struct BackwardFeatures {
  using A = Accumulator<T>;

  struct Buffers {
    Scratch scratch;
    A* masks;
    A* grads;

    Buffers(const CarafeSizes& sizes, const CarafeTiling& tiling, void* memory)
        : scratch{static_cast<char*>(memory)},
          masks(scratch.take<A>(pixels(sizes, tiling) * sizes.kernel * sizes.kernel)),
          grads(scratch.take<A>(pixels(sizes, tiling) * kChannels)) {}

    static Index pixels(const CarafeSizes& sizes, const CarafeTiling& tiling) {
      return most_centres(sizes, tiling.rows) * most_centres(sizes, tiling.columns) * sizes.scale * sizes.scale;
    }
  };

  static Extent extent(const CarafeSizes& sizes) { return {sizes.height, sizes.width, 1}; }

  static CarafeTiling tiling(const CarafeSizes& sizes, Index threads) {
    CarafeTiling tiling = cut(sizes, extent(sizes), threads);
    tiling.scratch_bytes = Buffers(sizes, tiling, nullptr).scratch.used;
    return tiling;
  }

  static void compute(const CarafeSizes& sizes, const CarafeTiling& tiling, const void* grad_address,
                      const void* masks_address, void* out_address, Index tile_index, void* memory) {
    const Tile tile = tile_at(sizes, extent(sizes), tiling, tile_index);
    const Strides strides(sizes);
    const Buffers buffers(sizes, tiling, memory);
    const Index taps = sizes.kernel * sizes.kernel;
    const T* grads_start = static_cast<const T*>(grad_address) + tile.n * strides.out_image + tile.g * sizes.channels;
    const T* masks_start = static_cast<const T*>(masks_address) + tile.n * strides.mask_image + tile.g * taps;
    T* out = static_cast<T*>(out_address) + tile.n * strides.feature_image + tile.g * sizes.channels;
    const Range rows = scaled(centres_of(sizes, tile.y0, tile.y1, sizes.rows()), sizes.scale);
    const Range columns = scaled(centres_of(sizes, tile.x0, tile.x1, sizes.columns()), sizes.scale);

    const Region<T> masks(masks_start, strides.mask_row, strides.mask_pixel, rows, columns, taps, taps, buffers.masks);
    for (Index c0 = 0; c0 < sizes.channels; c0 += kChannels) {
      const Index channels = smaller(kChannels, sizes.channels - c0);
      const Region<T> grads(grads_start + c0, strides.out_row, strides.feature_pixel, rows, columns, channels,
                            round_up(channels, kLanes<A>), buffers.grads);
      for_each_vector_block<A, kVectors>(channels, [&](auto vectors, Index c) {
        constexpr int count = decltype(vectors)::value;
        for (Index y = tile.y0; y < tile.y1; ++y) {
          T* row = out + y * strides.feature_row + c0 + c;
          Index x = tile.x0;
          for (; x + kFeatures <= tile.x1; x += kFeatures) {
            gather<kFeatures, count>(sizes, strides, grads, masks, y, x, c, channels - c, row);
          }
          for (; x < tile.x1; ++x) gather<1, count>(sizes, strides, grads, masks, y, x, c, channels - c, row);
        }
      });
    }
  }

  // `features` neighbouring features from (y, x) on, of `vectors` vectors of channels from c on.
  template <int features, int vectors>
  static void gather(const CarafeSizes& sizes, const Strides& strides, const Region<T>& grads, const Region<T>& masks,
                     Index y, Index x, Index c, Index channels, T* out) {
    constexpr Index lanes = kLanes<A>;
    const Index s = sizes.scale, k = sizes.kernel, p = k / 2;
    const Range rows = centres_of(sizes, y, y + 1, sizes.rows());
    const Range columns = centres_of(sizes, x, x + features, sizes.columns());
    Vector<A> sums[features][vectors] = {};
    for (Index i = rows.begin * s; i < rows.end * s; ++i) {
      const Index u = y + p - i / s * sizes.stride;
      for (Index centre = columns.begin; centre < columns.end; ++centre) {
        const Index v = x + p - centre * sizes.stride;  // the tap that sees the first feature, if it is one
        const A* mask = masks.at(i, centre * s) + u * k;
        const A* pixel = grads.at(i, centre * s) + c;
        const auto add = [&](auto is_tap) {
          for (Index b = 0; b < s; ++b, mask += masks.pixel, pixel += grads.pixel) {
            Vector<A> grad[vectors];
            for (int j = 0; j < vectors; ++j) grad[j] = loaded(load(pixel + j * lanes));
            for (int f = 0; f < features; ++f) {
              if (!is_tap(v + f)) continue;
              const A weight = mask[v + f];
              for (int j = 0; j < vectors; ++j) sums[f][j] = sums[f][j] + grad[j] * weight;
            }
          }
        };
        if (v >= 0 && v + features <= k) {
          add([](Index) { return true; });
        } else {
          add([k](Index tap) { return tap >= 0 && tap < k; });
        }
      }
    }
    for (int f = 0; f < features; ++f) {
      T* pixel = out + (x + f) * strides.feature_pixel;
      for (int j = 0; j < vectors; ++j) store(pixel + j * lanes, sums[f][j], channels - j * lanes);
    }
  }
};

}  // namespace channels_last
}  // namespace OMNIOPS_NAMESPACE
}  // namespace omniops
