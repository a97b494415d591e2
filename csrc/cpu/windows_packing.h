// From the bitmap format to bitmap_windows and back (windows.h).
#pragma once

#include <cstdint>

#include "kernels.h"

namespace wandapp {

constexpr int64_t kMostColumns = 1 << 16;  // of a weight in windows: the first column of one has 16 bits

// Steps of every block of 16 rows of `from`, a weight of the bitmap format: steps[ceil(rows / 16)]. False where a row of the
// bitmap does not have as many bits before column `cols` as `offsets` gives it values: it must not be packed.
bool count_windows(const Matrix& from, int64_t* steps, int threads);

// `from`: a weight of the bitmap format, of at most kMostColumns. `values` and `meta` have room for the steps that
// `offsets` [blocks + 1], the running sum of count_windows, gives each block.
void pack_windows(Type type, const Matrix& from, const int64_t* offsets, void* values, uint8_t* meta, int threads);

// `from`: a weight of the format bitmap_windows. Into values [nnz] and bitmap [rows, ceil(cols / 8)] of the bitmap
// format, whose row_offsets [rows + 1] are known; false, with nothing written, where a row has another number of weights.
bool unpack_windows(Type type, const Matrix& from, const int64_t* row_offsets, void* values, uint8_t* bitmap,
                    int threads);

}  // namespace wandapp
