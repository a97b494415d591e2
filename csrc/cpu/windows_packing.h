// From the bitmap format to bitmap_windows and back (windows.h).
#pragma once

#include <cstdint>

#include "kernels.h"

namespace wandapp {

// Steps of every block of 4 rows, steps[ceil(rows / 4)]. `bitmap` is the meta of the bitmap format.
void count_windows(const uint8_t* bitmap, int64_t rows, int64_t cols, int64_t* steps, int threads);

// `from`: a weight of the bitmap format. `values` and `words` have room for the steps that `offsets` [blocks + 1], the
// running sum of count_windows, gives each block.
void pack_windows(Type type, const Matrix& from, const int64_t* offsets, void* values, uint32_t* words, int threads);

// `from`: a weight of the format bitmap_windows. Into values [nnz] and bitmap [rows, ceil(cols / 8)] of the bitmap
// format, whose row_offsets [rows + 1] are known.
void unpack_windows(Type type, const Matrix& from, const int64_t* row_offsets, void* values, uint8_t* bitmap,
                    int threads);

}  // namespace wandapp
