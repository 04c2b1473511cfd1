#include "deform_conv2d.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "deform_conv2d_kernels.h"
#include "instruction_set.h"
#include "parallel.h"

namespace omniops {
namespace {

// Numbers of columns for which another thread is worth its start, some tens of microseconds.
constexpr double kNumbersPerThread = 2e5;

// Positions that a thread takes at once.
constexpr std::int64_t kTile = 64;

// In which different threads should not write.
constexpr std::int64_t kCacheLine = 64;

DeformConv2dKernels kernels(Dtype dtype, Dtype columns) {
  const Dtype accumulator = dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
  if (columns != accumulator && (dtype != Dtype::bfloat16 || columns != Dtype::bfloat16)) {
    throw std::invalid_argument("deform_conv2d has no kernels for columns of this dtype");
  }
#ifdef OMNIOPS_X86_DISPATCH
  switch (instruction_set()) {
    case InstructionSet::avx512:
      return avx512::deform_conv2d_kernels(dtype, columns);
    case InstructionSet::avx2:
      return avx2::deform_conv2d_kernels(dtype, columns);
    default:
      break;
  }
#endif
  return baseline::deform_conv2d_kernels(dtype, columns);
}

std::int64_t number_of_threads(const DeformConv2dSizes& sizes, std::int64_t max_threads) {
  const double numbers = static_cast<double>(sizes.count) * static_cast<double>(sizes.taps() * sizes.channels);
  const double worth = std::min(static_cast<double>(max_threads), numbers / kNumbersPerThread);
  return std::max<std::int64_t>(1, static_cast<std::int64_t>(worth));
}

// The channels begin ... end - 1, cut where an offset group or a weight group ends.
std::vector<DeformConv2dRun> runs_of(const DeformConv2dSizes& sizes, std::int64_t begin, std::int64_t end) {
  const std::int64_t in_offset_group = sizes.channels / sizes.offset_groups;
  const std::int64_t in_group = sizes.channels / sizes.groups;
  std::vector<DeformConv2dRun> runs;
  while (begin < end) {
    const std::int64_t offset_group = begin / in_offset_group, group = begin / in_group;
    const std::int64_t next = std::min({(offset_group + 1) * in_offset_group, (group + 1) * in_group, end});
    const std::int64_t column = group * sizes.count * sizes.taps() * in_group + begin - group * in_group;
    runs.push_back({offset_group, begin, next - begin, column});
    begin = next;
  }
  return runs;
}

void check(const DeformConv2dSizes& sizes) {
  if (std::max(sizes.height, sizes.width) >= std::int64_t{1} << 30) {
    throw std::invalid_argument("input must have fewer than 2**30 rows and columns");
  }
}

// Calls work(begin, end) with positions of one image, which together are all of the call's.
template <class Work>
void for_images(const DeformConv2dSizes& sizes, const Work& work) {
  const std::int64_t positions = sizes.out_height * sizes.out_width;
  for (std::int64_t begin = 0; begin < sizes.count;) {
    const std::int64_t end = std::min(begin + positions - (sizes.first + begin) % positions, sizes.count);
    work(begin, end);
    begin = end;
  }
}

std::vector<DeformConv2dTask> tiles_of(const DeformConv2dSizes& sizes, const std::vector<DeformConv2dRun>& runs) {
  std::vector<DeformConv2dTask> tiles;
  for_images(sizes, [&](std::int64_t begin, std::int64_t end) {
    for (; begin < end; begin += kTile) {
      tiles.push_back({runs.data(), static_cast<std::int64_t>(runs.size()), begin, std::min(begin + kTile, end)});
    }
  });
  return tiles;
}

}  // namespace

void deform_conv2d_sample(Dtype dtype, Dtype columns_dtype, const DeformConv2dSizes& sizes, const void* image,
                          const void* offset, const void* mask, void* columns, std::int64_t threads) {
  check(sizes);
  const DeformConv2dKernels kernel = kernels(dtype, columns_dtype);
  const std::vector<DeformConv2dRun> runs = runs_of(sizes, 0, sizes.channels);
  const std::vector<DeformConv2dTask> tiles = tiles_of(sizes, runs);
  const std::vector<double> zeros(static_cast<std::size_t>(sizes.channels / sizes.offset_groups));
  parallel(static_cast<std::int64_t>(tiles.size()), number_of_threads(sizes, threads), [&](Tickets& tickets) {
    for (std::int64_t tile; tickets.take(tile);) {
      kernel.sample(sizes, tiles[static_cast<std::size_t>(tile)], image, offset, mask, zeros.data(), columns);
    }
  });
}

void deform_conv2d_gradients(Dtype dtype, Dtype columns_dtype, const DeformConv2dSizes& sizes, const void* by_columns,
                             const void* image, const void* offset, const void* mask, void* by_image, void* by_offset,
                             void* by_mask, std::int64_t threads) {
  check(sizes);
  const DeformConv2dKernels kernel = kernels(dtype, columns_dtype);
  threads = number_of_threads(sizes, threads);

  // Any position may add to any pixel, so the gradient of the image is shared out by channels, and each thread sees
  // all positions in the same order. That work comes first, being in larger pieces than the rest.
  const std::int64_t in_line = kCacheLine / (dtype == Dtype::float64 ? 8 : 4);
  const std::int64_t lines = (sizes.channels + in_line - 1) / in_line;
  const std::int64_t shares = std::min(threads, lines);
  std::vector<std::vector<DeformConv2dRun>> shared_runs;
  for (std::int64_t share = 0; share < shares; ++share) {
    const std::int64_t begin = lines * share / shares * in_line, end = lines * (share + 1) / shares * in_line;
    shared_runs.push_back(runs_of(sizes, begin, std::min(end, sizes.channels)));
  }
  std::vector<DeformConv2dTask> tasks;
  for_images(sizes, [&](std::int64_t begin, std::int64_t end) {
    for (const std::vector<DeformConv2dRun>& runs : shared_runs) {
      tasks.push_back({runs.data(), static_cast<std::int64_t>(runs.size()), begin, end});
    }
  });
  const std::vector<DeformConv2dRun> runs = runs_of(sizes, 0, sizes.channels);
  const std::vector<DeformConv2dTask> tiles = tiles_of(sizes, runs);
  const std::vector<double> zeros(static_cast<std::size_t>(sizes.channels / sizes.offset_groups));

  parallel(static_cast<std::int64_t>(tasks.size() + tiles.size()), threads, [&](Tickets& tickets) {
    for (std::int64_t ticket; tickets.take(ticket);) {
      const std::size_t i = static_cast<std::size_t>(ticket);
      if (i < tasks.size()) {
        kernel.by_image(sizes, tasks[i], by_columns, offset, mask, by_image);
      } else {
        kernel.by_offset_and_mask(sizes, tiles[i - tasks.size()], by_columns, image, offset, mask, zeros.data(),
                                  by_offset, by_mask);
      }
    }
  });
}

}  // namespace omniops
