#include "multi_scale_deform_attn.h"

#include <algorithm>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "instruction_set.h"
#include "multi_scale_deform_attn_kernels.h"
#include "parallel.h"

namespace omniops {
namespace {

using Block = MultiScaleDeformAttnBlock;

// Numbers sampled for which another thread is worth its start, some tens of microseconds.
constexpr double kNumbersPerThread = 2e5;

// Queries that a thread takes at once.
constexpr std::int64_t kQueries = 8;

// Samples for each pixel of a head for which it is worthwhile to copy the pixels.
constexpr std::int64_t kSamplesPerCopy = 2;

// Points whose samples are found before any of them is read, at least; of whole queries.
constexpr std::int64_t kPoints = 4 * Block::size;

constexpr std::align_val_t kAlignment{64};

struct Release {
  void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
};
using Memory = std::unique_ptr<void, Release>;

Memory scratch(std::int64_t bytes) { return Memory(::operator new(static_cast<std::size_t>(bytes), kAlignment)); }

MultiScaleDeformAttnKernels kernels(Dtype dtype, bool discrete) {
#ifdef OMNIOPS_X86_DISPATCH
  switch (instruction_set()) {
    case InstructionSet::avx512:
      return avx512::multi_scale_deform_attn_kernels(dtype, discrete);
    case InstructionSet::avx2:
      return avx2::multi_scale_deform_attn_kernels(dtype, discrete);
    default:
      break;
  }
#endif
  return baseline::multi_scale_deform_attn_kernels(dtype, discrete);
}

void check(const MultiScaleDeformAttnSizes& sizes) {
  for (const MultiScaleDeformAttnLevel& level : sizes.levels) {
    if (std::max(level.height, level.width) >= std::int64_t{1} << 30) {
      throw std::invalid_argument("a level of value must have fewer than 2**30 rows and columns");
    }
  }
}

std::int64_t pixels_of(const MultiScaleDeformAttnLevel& level) { return level.height * level.width; }

// A share of the levels begin ... end - 1, with what it points at.
struct Levels {
  std::vector<Block> blocks;
  MultiScaleDeformAttnShare share{};

  Levels(const MultiScaleDeformAttnSizes& sizes, std::size_t begin, std::size_t end) {
    share.queries = sizes.queries;
    share.heads = sizes.heads;
    share.channels = sizes.channels;
    for (std::size_t l = 0; l < sizes.levels.size(); ++l) {
      const MultiScaleDeformAttnLevel& level = sizes.levels[l];
      if (l < begin) {
        share.first_pixel += pixels_of(level);
        share.first_point += level.points;
      } else if (l < end) {
        share.pixel_count += pixels_of(level);
        share.point_count += level.points;
      }
      share.pixels += pixels_of(level);
      share.all_points += level.points;
    }
    share.rows = share.point_count == 0 ? 1 : std::max<std::int64_t>(1, kPoints / share.point_count);
    blocks.resize(static_cast<std::size_t>((share.rows * share.point_count + Block::size - 1) / Block::size));
    std::size_t index = 0;
    for (std::int64_t row = 0; row < share.rows; ++row) {
      std::int64_t first_pixel = 0;
      for (std::size_t l = begin; l < end; ++l) {
        const MultiScaleDeformAttnLevel& level = sizes.levels[l];
        const bool has_pixels = pixels_of(level) > 0;
        for (std::int64_t point = 0; point < level.points; ++point, ++index) {
          Block& block = blocks[index / Block::size];
          block.height[index % Block::size] = has_pixels ? static_cast<std::int32_t>(level.height) : 0;
          block.width[index % Block::size] = has_pixels ? static_cast<std::int32_t>(level.width) : 0;
          block.first_pixel[index % Block::size] = first_pixel;
        }
        first_pixel += pixels_of(level);
      }
    }
    share.blocks = blocks.data();
  }
};

std::int64_t number_of_threads(const MultiScaleDeformAttnSizes& sizes, std::int64_t points, std::int64_t max_threads) {
  const double numbers = static_cast<double>(sizes.batch * sizes.queries * sizes.heads) *
                         static_cast<double>(points * sizes.channels);
  const double worth = std::min(static_cast<double>(max_threads), numbers / kNumbersPerThread);
  return std::max<std::int64_t>(1, static_cast<std::int64_t>(worth));
}

// Whether threads that take a head at once have the same work.
bool takes_heads(const MultiScaleDeformAttnSizes& sizes, std::int64_t threads) {
  const std::int64_t maps = sizes.batch * sizes.heads;
  return maps % threads == 0 || maps >= 4 * threads;
}

bool copies(const MultiScaleDeformAttnSizes& sizes, const MultiScaleDeformAttnShare& share) {
  return sizes.heads > 1 && sizes.queries * share.all_points >= kSamplesPerCopy * share.pixels;
}

}  // namespace

void multi_scale_deform_attn(Dtype dtype, const MultiScaleDeformAttnSizes& sizes, const void* value,
                             const void* sampling_locations, const void* attention_weights, void* out,
                             std::int64_t threads) {
  check(sizes);
  const MultiScaleDeformAttnKernels kernel = kernels(dtype, sizes.discrete);
  const Levels all(sizes, 0, sizes.levels.size());
  const std::vector<double> zeros(static_cast<std::size_t>(sizes.channels));
  threads = number_of_threads(sizes, all.share.all_points, threads);
  const bool copied = copies(sizes, all.share) && takes_heads(sizes, threads);
  const std::int64_t queries = copied ? sizes.queries : kQueries;
  const std::int64_t tiles = (sizes.queries + queries - 1) / queries;
  const std::int64_t heads = copied ? 1 : sizes.heads;  // of a ticket
  parallel(sizes.batch * sizes.heads / heads * tiles, threads, [&](Tickets& tickets) {
    const Memory memory = scratch(kernel.scratch_bytes(all.share, false, copied));
    for (std::int64_t ticket; tickets.take(ticket);) {
      const std::int64_t begin = ticket % tiles * queries, end = std::min(begin + queries, sizes.queries);
      for (std::int64_t map = ticket / tiles * heads; map < (ticket / tiles + 1) * heads; ++map) {
        kernel.forward(all.share, map / sizes.heads, map % sizes.heads, begin, end, copied, value, sampling_locations,
                       attention_weights, zeros.data(), out, memory.get());
      }
    }
  });
}

void multi_scale_deform_attn_backward(Dtype dtype, const MultiScaleDeformAttnSizes& sizes, const void* grad,
                                      const void* value, const void* sampling_locations, const void* attention_weights,
                                      void* by_value, void* by_locations, void* by_weights, std::int64_t threads) {
  check(sizes);
  const MultiScaleDeformAttnKernels kernel = kernels(dtype, sizes.discrete);
  // Any query may add to any pixel of its head, so a thread takes all queries of a head, in one order however the
  // levels are shared out: one after another for more threads than there is work for otherwise.
  std::vector<Levels> shares;
  if (takes_heads(sizes, threads)) {
    shares.emplace_back(sizes, 0, sizes.levels.size());
  } else {
    for (std::size_t l = 0; l < sizes.levels.size(); ++l) shares.emplace_back(sizes, l, l + 1);
  }
  const bool copied = copies(sizes, shares.front().share);
  const std::vector<double> zeros(static_cast<std::size_t>(sizes.channels));
  std::int64_t bytes = 0;
  for (const Levels& levels : shares) {
    bytes = std::max(bytes, kernel.scratch_bytes(levels.share, by_value != nullptr, copied));
  }
  const std::int64_t maps = sizes.batch * sizes.heads, units = static_cast<std::int64_t>(shares.size()) * maps;
  threads = number_of_threads(sizes, shares.front().share.all_points, threads);
  parallel(units, threads, [&](Tickets& tickets) {
    const Memory memory = scratch(bytes);
    for (std::int64_t unit; tickets.take(unit);) {
      // Threads that work at the same time write the points of different heads, not of one, which share cache lines.
      const MultiScaleDeformAttnShare& share = shares[static_cast<std::size_t>(unit / maps)].share;
      kernel.backward(share, unit % maps / sizes.heads, unit % maps % sizes.heads, copied, grad, value,
                      sampling_locations, attention_weights, zeros.data(), by_value, by_locations, by_weights,
                      memory.get());
    }
  });
}

}  // namespace omniops
