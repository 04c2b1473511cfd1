#include "carafe.h"

#include <memory>
#include <new>

#include "carafe_kernels.h"
#include "instruction_set.h"
#include "parallel.h"

namespace omniops {
namespace {

// Multiplications for which another thread is worth its start, some tens of microseconds.
constexpr double kMultiplicationsPerThread = 4e6;
constexpr std::align_val_t kAlignment{64};

struct Release {
  void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
};

CarafeKernels kernels() {
#ifdef OMNIOPS_X86_DISPATCH
  switch (instruction_set()) {
    case InstructionSet::avx512:
      return avx512::carafe_kernel;
    case InstructionSet::avx2:
      return avx2::carafe_kernel;
    default:
      break;
  }
#endif
  return baseline::carafe_kernel;
}

}  // namespace

void carafe(CarafeOperator op, Dtype dtype, Layout layout, const CarafeSizes& sizes, const void* first,
            const void* second, void* result, std::int64_t threads) {
  const double multiplications = static_cast<double>(sizes.batch * sizes.groups * sizes.channels) *
                                 static_cast<double>(sizes.rows() * sizes.columns()) *
                                 static_cast<double>(sizes.scale * sizes.scale * sizes.kernel * sizes.kernel);
  if (static_cast<double>(threads - 1) * kMultiplicationsPerThread > multiplications) {
    threads = 1 + static_cast<std::int64_t>(multiplications / kMultiplicationsPerThread);
  }
  const CarafeKernel kernel = kernels()(op, dtype, layout);
  const CarafeTiling tiling = kernel.tiling(sizes, threads);
  parallel(tiling.tiles, threads, [&](Tickets& tickets) {
    const std::unique_ptr<void, Release> scratch(
        ::operator new(static_cast<std::size_t>(tiling.scratch_bytes), kAlignment));
    for (std::int64_t tile; tickets.take(tile);) {
      kernel.compute(sizes, tiling, first, second, result, tile, scratch.get());
    }
  });
}

}  // namespace omniops
