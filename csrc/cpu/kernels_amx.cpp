// AMX: 32 rows of weights are expanded 512 columns at a time and multiplied with all tokens, 16 at once. bf16 only. With
// many tokens: amx_many.h.
//
// Compiled with AVX-512 (F, BW, VL, VBMI, VBMI2), which every processor with AMX has.
#include "amx_many.h"
#include "amx_rows.h"
#include "amx_tiles.h"
#include "amx_tokens.h"

namespace wandapp {
namespace {

constexpr int64_t kMostTokens = 256;
constexpr int64_t kMostPairs = kMostTokens / (2 * kTile);
// Prepared tokens, of the 2 MB of second-level cache; the rest is for sums and what comes from memory.
constexpr int64_t kPassBytes = 3 << 19;

// Tokens that one pass over the weight multiplies.
int64_t tokens_at_once(int64_t cols, int64_t) {
  const int64_t fitting = kPassBytes / static_cast<int64_t>(group_bytes(cols)) * kTile;
  return fitting < kTile ? kTile : at_most(fitting, kMostTokens);
}

size_t scratch_bytes(int64_t) { return static_cast<size_t>(kBlockBytes + kMostPairs * kSumBytes); }

// 32 rows in `weights`, all tokens: on to the sums of the columns before.
void multiply_block(const char* weights, const char* x, int64_t group_stride, int64_t tokens, int64_t steps, char* sums,
                    bool first) {
  for (int64_t m = 0; m < tokens; m += 2 * kTile, sums += kSumBytes) {
    if (first) {
      zero_sums();
    } else {
      load_sums(sums);
    }
    if (tokens - m > kTile) {
      multiply_two(weights, x, x + group_stride, steps, [] {});
    } else {
      multiply_one(weights, x, steps);
    }
    store_sums(sums);
    x += 2 * group_stride;
  }
}

void put_block(const float* sums, const Output<Bf16>& output, int64_t tokens, int64_t row, int64_t rows) {
  constexpr int64_t kSums = kTile * kTile;
  for (int64_t m = 0; m < tokens; m += 2 * kTile, sums += 4 * kSums) {
    const int64_t left = tokens - m;
    if (left > kTile) {
      put_pair(sums, output, m, at_most(left, 2 * kTile), row, rows);
      continue;
    }
    for (int64_t i = 0; i < rows; i += kTile) {
      const float* even = sums + 2 * i / kTile * kSums;
      put_sums(even, even + kSums, output, m, left, row + i, at_most(rows - i, kTile));
    }
  }
}

template <class Rows>
void run(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t tokens, int64_t first, int64_t last,
         void* scratch) {
  char* weights = static_cast<char*>(scratch);
  char* sums = weights + kBlockBytes;
  const char* x = static_cast<const char*>(prepared);
  const int64_t group_stride = static_cast<int64_t>(group_bytes(matrix.cols));
  const Output<Bf16> output(matrix, first_token);
  const Tiles tiles;
  Rows rows(matrix);
  for (int64_t r = first; r < last; r += kBlockRows) {
    const int64_t count = at_most(last - r, kBlockRows);
    rows.start(r, count);
    for (int64_t k = 0; k < matrix.cols; k += kBlockCols) {
      // Rows that are missing keep what was there: no other row's sums depend on them.
      const Place ahead = k + kBlockCols < matrix.cols ? Place{0, k + kBlockCols} : Place{kBlockRows, 0};
      for (int64_t i = 0; i < count; ++i) rows.expand({i, k}, weights + row_in_block(i), {ahead.i + i, ahead.k});
      multiply_block(weights, x + k / kStepCols * kTileBytes, group_stride, tokens,
                     steps_of(at_most(matrix.cols - k, kBlockCols)), sums, k == 0);
    }
    put_block(reinterpret_cast<const float*>(sums), output, tokens, r, count);
  }
}

template <class Rows>
constexpr Kernel kKernel{kBlockRows,       kTile,          group_bytes,  prepare_group, scratch_bytes, run<Rows>,
                         tokens_at_once, &kMany<Rows>, kManyTokens};

}  // namespace

const Kernel* amx_kernel(Format format, Type type) {
  if (type != Type::bf16) return nullptr;
  if (format == Format::dense) return &kKernel<DenseRows>;
  if (format == Format::nm) return &kKernel<NMRows>;
  if (format == Format::bitmap) return &kKernel<BitmapRows>;
  return nullptr;
}

}  // namespace wandapp
