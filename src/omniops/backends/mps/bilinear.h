// Samples between the pixels of a map, and the cells between which these lie: what the Metal sources beside this file
// share. _library.py puts it into them, after vectors.h.

constant constexpr int BATCH = 2;  // records that a thread of sum_samples loads at a time

// Which of the four pixels around a position, of which the top left is (row, column), lie on the map, as bits: top left, top
// right, low left, low right.
inline int corners_on_map(int row, int column, int height, int width) {
  const bool top = row >= 0, low = row + 1 < height, left = column >= 0, right = column + 1 < width;
  return (top && left ? 1 : 0) | (top && right ? 2 : 0) | (low && left ? 4 : 0) | (low && right ? 8 : 0);
}

// WIDTH channels of each of the four pixels around a position, in that order, of which the first begins at from, the next
// right of it and those below that much farther; zero where there is no pixel.
template <int WIDTH, typename Scalar>
inline void load_pixels(
    device const Scalar* map, uint from, uint right, uint below, int corners, thread float* to) {
  const uint low = from + below;
  if (corners == 15) {
    load<WIDTH>(map + from, to);
    load<WIDTH>(map + (from + right), to + WIDTH);
    load<WIDTH>(map + low, to + 2 * WIDTH);
    load<WIDTH>(map + (low + right), to + 3 * WIDTH);
    return;
  }
#pragma unroll
  for (int w = 0; w < 4 * WIDTH; ++w) {
    to[w] = 0.0f;
  }
  if ((corners & 1) != 0) {
    load<WIDTH>(map + from, to);
  }
  if ((corners & 2) != 0) {
    load<WIDTH>(map + (from + right), to + WIDTH);
  }
  if ((corners & 4) != 0) {
    load<WIDTH>(map + low, to + 2 * WIDTH);
  }
  if ((corners & 8) != 0) {
    load<WIDTH>(map + (low + right), to + 3 * WIDTH);
  }
}

// What the samples of a cell give to each of its four pixels, in that order; to the first alone where they are of the
// nearest pixel. A cell has the number of its records and their end; a record is three floats' bits (the parts of a pixel
// that the sample lies below and to the right of the first, and its weight) and the number of its row of grad. Rows lie
// step apart, and begin at from.
template <int WIDTH, typename Scalar>
inline void sum_samples(
    device const Scalar* grad,
    device const int4* records,
    int2 cell,
    uint from,
    uint step,
    bool nearest,
    thread float* sums) {
#pragma unroll
  for (int w = 0; w < 4 * WIDTH; ++w) {
    sums[w] = 0.0f;
  }
  for (int k = cell.y - cell.x; k < cell.y; k += BATCH) {
    int4 record[BATCH];
    float gradient[BATCH * WIDTH];
#pragma unroll
    for (int r = 0; r < BATCH; ++r) {
      record[r] = records[min(k + r, cell.y - 1)];
    }
#pragma unroll
    for (int r = 0; r < BATCH; ++r) {
      load<WIDTH>(grad + (from + uint(record[r].w) * step), gradient + r * WIDTH);
    }
#pragma unroll
    for (int r = 0; r < BATCH; ++r) {
      if (k + r < cell.y) {
        const float right = as_type<float>(record[r].y), left = 1.0f - right, factor = as_type<float>(record[r].z);
        const float low = as_type<float>(record[r].x) * factor, top = (1.0f - as_type<float>(record[r].x)) * factor;
#pragma unroll
        for (int w = 0; w < WIDTH; ++w) {
          sums[w] += (top * left) * gradient[r * WIDTH + w];
        }
        if (!nearest) {
#pragma unroll
          for (int w = 0; w < WIDTH; ++w) {
            sums[WIDTH + w] += (top * right) * gradient[r * WIDTH + w];
            sums[2 * WIDTH + w] += (low * left) * gradient[r * WIDTH + w];
            sums[3 * WIDTH + w] += (low * right) * gradient[r * WIDTH + w];
          }
        }
      }
    }
  }
}
