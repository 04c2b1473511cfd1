// Union-find over runs, the maximal rows of foreground pixels: far fewer than pixels, and found 64 pixels at a time.
//
// An image is cut into strips of rows. Each strip finds its runs, unites those that touch within it and sums its areas
// (pass 1, in parallel); the strips are then united along their borders (few runs, one thread); each strip writes its
// part of the result (pass 2, in parallel). Runs are numbered in the order of their pixels and a set is represented by
// its first run, so the label is where that run starts, whatever the strips.
#include "connected_components.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "parallel.h"

#if defined(__SSE2__) || defined(_M_X64)
#include <emmintrin.h>
#define OMNIOPS_SSE2 1
#endif
#if defined(_MSC_VER)
#include <intrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace omniops {
namespace {

// Pixels for which another thread is worth its start, half a millisecond of work or a few: a scheduler may take as long
// to give a new thread a processor of its own. And rows of a strip for which its border is worth it.
constexpr std::int64_t kPixelsPerThread = 1 << 20;
constexpr std::int64_t kRowsPerStrip = 64;
constexpr std::int64_t kStripsPerThread = 4;

struct Run {
  std::int32_t start;   // flat index of the first pixel
  std::int32_t end;     // and of the one after the last
  std::int32_t parent;  // a run of the same component, itself for the first of a set and before itself for the others
  std::int32_t area;    // of the set, in its first run
};

// The runs of a strip are [begin, end) of the image's; those of its first row end at first_row_end, those of its last
// begin at last_row_begin.
struct Strip {
  std::int64_t first_pixel, last_pixel;
  std::int32_t begin, first_row_end, last_row_begin, end;
};

// Asks for huge pages under large memory that was just allocated and not written yet: the first write to each page is a
// fault, and with pages of 4 KiB those take longer than all the rest.
void expect_writes(void* memory, std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // From this size on the C library takes every allocation from the system anew, and gives it back.
  constexpr std::int64_t large = 1 << 25;
  constexpr std::uintptr_t page = 1 << 21;
  const std::uintptr_t first = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t begin = (first + page - 1) / page * page;
  const std::uintptr_t end = (first + static_cast<std::uintptr_t>(bytes)) / page * page;
  if (bytes >= large) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

int lowest_bit(std::uint64_t bits) {
#if defined(_MSC_VER)
  unsigned long index;
  _BitScanForward64(&index, bits);
  return static_cast<int>(index);
#else
  return __builtin_ctzll(bits);
#endif
}

// Bit i is set where the i-th of 64 bytes is not zero.
std::uint64_t bits_of(const std::uint8_t* bytes) {
  std::uint64_t bits = 0;
#if defined(OMNIOPS_SSE2)
  for (int i = 0; i < 4; ++i) {
    const __m128i chunk = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 16 * i));
    const unsigned zeros = static_cast<unsigned>(_mm_movemask_epi8(_mm_cmpeq_epi8(chunk, _mm_setzero_si128())));
    bits |= static_cast<std::uint64_t>(zeros ^ 0xffffu) << (16 * i);
  }
#else
  constexpr std::uint64_t low7 = 0x7f7f7f7f7f7f7f7f;
  for (int i = 0; i < 8; ++i) {
    std::uint64_t chunk = 0;
    for (int j = 0; j < 8; ++j) chunk |= static_cast<std::uint64_t>(bytes[8 * i + j]) << (8 * j);
    const std::uint64_t top = (((chunk & low7) + low7) | chunk) & ~low7;  // the top bit of each byte that is not zero
    bits |= ((top >> 7) * 0x0102040810204080 >> 56) << (8 * i);           // gathered into one byte
  }
#endif
  return bits;
}

template <class T>
std::uint64_t bits_of(const T* items) {
  std::uint8_t bytes[64];
  for (int i = 0; i < 64; ++i) bytes[i] = items[i] != 0;
  return bits_of(bytes);
}

// Appends the runs of one row, whose first pixel has the flat index `first`; returns their end.
template <class T>
Run* find_runs(const T* row, std::int32_t width, std::int32_t first, Run* run) {
  bool inside = false;
  for (std::int64_t x = 0; x < width; x += 64) {
    std::uint64_t bits;
    if (width - x >= 64) {
      bits = bits_of(row + x);
    } else {
      T rest[64] = {};
      std::memcpy(rest, row + x, static_cast<std::size_t>(width - x) * sizeof(T));
      bits = bits_of(rest);
    }
    std::uint64_t edges = bits ^ (bits << 1 | static_cast<std::uint64_t>(inside));
    const std::int32_t index = first + static_cast<std::int32_t>(x);
    if (inside && edges != 0) {
      run++->end = index + lowest_bit(edges);
      edges &= edges - 1;
    }
    while (edges != 0) {
      run->start = index + lowest_bit(edges);
      edges &= edges - 1;
      if (edges == 0) break;
      run++->end = index + lowest_bit(edges);
      edges &= edges - 1;
    }
    inside = bits >> 63 != 0;
  }
  if (inside) run++->end = first + width;
  return run;
}

std::int32_t find(Run* runs, std::int32_t i) {
  for (;;) {
    const std::int32_t parent = runs[i].parent, grandparent = runs[parent].parent;
    if (parent == grandparent) return parent;
    runs[i].parent = grandparent;
    i = grandparent;
  }
}

// Calls touch(above, below) for each two runs of neighbouring rows that touch, in order.
template <class Touch>
void for_each_touching(const Run* runs, std::int32_t above, std::int32_t above_end, std::int32_t below,
                       std::int32_t below_end, std::int32_t width, bool diagonals, const Touch& touch) {
  const std::int32_t reach = diagonals ? 1 : 0;
  for (; below < below_end; ++below) {
    // In the row above: flat indices of its pixels are `width` less. Its last may be 2**31 - 2 with `reach`.
    const std::int32_t start = runs[below].start - width - reach, end = runs[below].end - width + reach;
    while (above < above_end && runs[above].end <= start) ++above;
    for (std::int32_t i = above; i < above_end && runs[i].start < end; ++i) {
      touch(i, below);
      above = i;  // it may touch the next run too
    }
    if (above == above_end) break;
  }
}

template <class T>
void first_pass(const T* mask, std::int32_t width, bool diagonals, Run* runs, Strip& strip) {
  std::int32_t above = strip.begin, end = strip.begin;
  for (std::int64_t pixel = strip.first_pixel; pixel < strip.last_pixel; pixel += width) {
    const std::int32_t begin = end;
    end = static_cast<std::int32_t>(find_runs(mask + pixel, width, static_cast<std::int32_t>(pixel), runs + begin) -
                                    runs);
    for (std::int32_t i = begin; i < end; ++i) runs[i].parent = i;
    for_each_touching(runs, above, begin, begin, end, width, diagonals, [&](std::int32_t i, std::int32_t below) {
      const std::int32_t first = find(runs, i), own = runs[below].parent;
      if (own == below) {
        runs[below].parent = first;
      } else if (first != own) {
        // `own` is the first of its set: it was made so for this very run.
        const std::int32_t low = std::min(first, own), high = std::max(first, own);
        runs[high].parent = low;
        runs[below].parent = low;
      }
    });
    if (pixel == strip.first_pixel) strip.first_row_end = end;
    strip.last_row_begin = begin;
    above = begin;
  }
  strip.end = end;
  for (std::int32_t i = strip.begin; i < end; ++i) {
    const std::int32_t length = runs[i].end - runs[i].start;
    const std::int32_t first = runs[runs[i].parent].parent;  // those before i point to the first of their set already
    runs[i].parent = first;
    if (first == i) {
      runs[i].area = length;
    } else {
      runs[first].area += length;
    }
  }
}

// Unites the strips. Afterwards the parent of each run's parent is the first run of its component.
void unite(const std::vector<Strip>& strips, std::int32_t width, bool diagonals, Run* runs) {
  std::vector<std::int32_t> united;
  for (std::size_t s = 1; s < strips.size(); ++s) {
    const Strip &above = strips[s - 1], &below = strips[s];
    for_each_touching(runs, above.last_row_begin, above.end, below.begin, below.first_row_end, width, diagonals,
                      [&](std::int32_t i, std::int32_t j) {
                        const std::int32_t a = find(runs, i), b = find(runs, j);
                        if (a == b) return;
                        runs[std::max(a, b)].parent = std::min(a, b);
                        united.push_back(std::max(a, b));
                      });
  }
  for (const std::int32_t i : united) {
    const std::int32_t first = find(runs, i);
    runs[i].parent = first;
    runs[first].area += runs[i].area;
  }
}

// Sets [begin, end); may also write up to seven items more, but not from `limit` on. Most runs of a mask with many are
// short, and this knows no other length.
void fill(std::int32_t* out, std::int64_t begin, std::int64_t end, std::int64_t limit, std::int32_t value) {
  if (end - begin >= 64 || begin + 64 > limit) {
    std::fill(out + begin, out + end, value);
    return;
  }
  do {
    for (int i = 0; i < 8; ++i) out[begin + i] = value;
    begin += 8;
  } while (begin < end);
}

void second_pass(const Run* runs, const Strip& strip, std::int32_t* labels, std::int32_t* counts) {
  std::int64_t pixel = strip.first_pixel;
  const auto write = [&](std::int64_t end, std::int32_t label, std::int32_t count) {
    fill(labels, pixel, end, strip.last_pixel, label);
    fill(counts, pixel, end, strip.last_pixel, count);
    pixel = end;
  };
  for (std::int32_t i = strip.begin; i < strip.end; ++i) {
    const Run& first = runs[runs[runs[i].parent].parent];
    write(runs[i].start, 0, 0);
    write(runs[i].end, first.start + 1, first.area);
  }
  write(strip.last_pixel, 0, 0);
}

template <class T>
void connected_components(const T* mask, const MaskSizes& sizes, bool diagonals, std::int32_t* labels,
                          std::int32_t* counts, std::int64_t threads) {
  const std::int64_t pixels = sizes.height * sizes.width;
  const std::int32_t width = static_cast<std::int32_t>(sizes.width);
  const std::int64_t runs_per_row = (sizes.width + 1) / 2;
  // Memory that no run comes to is never touched.
  const auto runs_of = [&] {
    const std::int64_t max_runs = sizes.height * runs_per_row;
    std::unique_ptr<Run[]> runs(new Run[static_cast<std::size_t>(max_runs)]);
    expect_writes(runs.get(), max_runs * static_cast<std::int64_t>(sizeof(Run)));
    return runs;
  };
  for (std::int32_t* result : {labels, counts}) {
    expect_writes(result, sizes.batch * pixels * static_cast<std::int64_t>(sizeof *result));
  }

  threads = std::max<std::int64_t>(1, std::min(threads, sizes.batch * pixels / kPixelsPerThread));
  if (threads == 1 || sizes.batch >= kStripsPerThread * threads) {
    parallel(sizes.batch, threads, [&](Tickets& tickets) {
      const auto runs = runs_of();
      for (std::int64_t image; tickets.take(image);) {
        Strip strip{0, pixels, 0, 0, 0, 0};
        first_pass(mask + image * pixels, width, diagonals, runs.get(), strip);
        second_pass(runs.get(), strip, labels + image * pixels, counts + image * pixels);
      }
    });
    return;
  }
  const auto runs = runs_of();
  const std::int64_t count =
      std::max<std::int64_t>(1, std::min(kStripsPerThread * threads, sizes.height / kRowsPerStrip));
  std::vector<Strip> strips(static_cast<std::size_t>(count));
  for (std::int64_t image = 0; image < sizes.batch; ++image) {
    for (std::int64_t s = 0; s < count; ++s) {
      const std::int64_t row = sizes.height * s / count, last_row = sizes.height * (s + 1) / count;
      const std::int32_t begin = static_cast<std::int32_t>(row * runs_per_row);
      strips[static_cast<std::size_t>(s)] = {row * width, last_row * width, begin, begin, begin, begin};
    }
    parallel(count, threads, [&](Tickets& tickets) {
      for (std::int64_t s; tickets.take(s);) {
        first_pass(mask + image * pixels, width, diagonals, runs.get(), strips[static_cast<std::size_t>(s)]);
      }
    });
    unite(strips, width, diagonals, runs.get());
    parallel(count, threads, [&](Tickets& tickets) {
      for (std::int64_t s; tickets.take(s);) {
        second_pass(runs.get(), strips[static_cast<std::size_t>(s)], labels + image * pixels, counts + image * pixels);
      }
    });
  }
}

}  // namespace

void connected_components(const void* mask, std::int64_t item_size, const MaskSizes& sizes, bool diagonals,
                          std::int32_t* labels, std::int32_t* counts, std::int64_t threads) {
  switch (item_size) {
    case 1:
      return connected_components(static_cast<const std::uint8_t*>(mask), sizes, diagonals, labels, counts, threads);
    case 2:
      return connected_components(static_cast<const std::uint16_t*>(mask), sizes, diagonals, labels, counts, threads);
    case 4:
      return connected_components(static_cast<const std::uint32_t*>(mask), sizes, diagonals, labels, counts, threads);
    default:
      return connected_components(static_cast<const std::uint64_t*>(mask), sizes, diagonals, labels, counts, threads);
  }
}

}  // namespace omniops
