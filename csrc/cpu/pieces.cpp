#include "pieces.h"

#include <algorithm>
#include <numeric>

#include "windows.h"

namespace wandapp {
namespace {

#ifdef WANDAPP_PIECE_BYTES  // for tests, which cut small weights too
constexpr int64_t kMinPieceBytes = WANDAPP_PIECE_BYTES;
#else
constexpr int64_t kMinPieceBytes = 64 << 10;  // below this, handing out a piece costs more than it saves
#endif
constexpr int64_t kShares = 256;

// Bytes of the first `rows` rows.
int64_t bytes_before(Format format, Type type, const Matrix& matrix, int64_t rows) {
  const int64_t element = element_size(type);
  if (format == Format::dense) return rows * matrix.cols * element;
  if (format == Format::bitmap) return matrix.offsets[rows] * element + rows * ceil_div(matrix.cols, 8);
  if (format == Format::bitmap_windows) {
    return matrix.offsets[ceil_div(rows, kWindowRows)] * (kSlots * element + kPairBytes / kPair);
  }
  return rows * kept_per_row(matrix.cols) * (4 * element + 1) / 4;
}

// About the row that `at` of the `bytes` are before.
int64_t row_at(const Matrix& matrix, int64_t bytes, int64_t at) {
  if (matrix.shares == nullptr) return matrix.rows * at / bytes;
  const int64_t share = at * kShares / bytes, within = at * kShares % bytes;
  if (share == kShares) return matrix.rows;
  const int64_t* begin = matrix.shares + share;
  return begin[0] + (begin[1] - begin[0]) * within / bytes;
}

}  // namespace

std::vector<Piece> cut(const Kernel& kernel, Format format, Type type, const std::vector<Matrix>& matrices,
                       int threads) {
  std::vector<int64_t> bytes;
  for (const Matrix& matrix : matrices) {
    bytes.push_back(std::max<int64_t>(bytes_before(format, type, matrix, matrix.rows), 1));
  }
  int64_t left = std::accumulate(bytes.begin(), bytes.end(), int64_t{0});
  int64_t size = 0;  // still to come of the piece that is being cut: a piece may end in the next matrix
  std::vector<Piece> pieces;
  for (size_t m = 0; m < matrices.size(); ++m) {
    const Matrix& matrix = matrices[m];
    int64_t first = 0, at = 0;
    while (at < bytes[m]) {
      if (size == 0) {
        size = threads == 1 ? left : std::max(left / (2 * threads), kMinPieceBytes);
        if (left - size < kMinPieceBytes) size = left;
      }
      const int64_t taken = std::min(size, bytes[m] - at);
      size -= taken;
      left -= taken;
      at += taken;
      const int64_t row = at == bytes[m] ? matrix.rows : row_at(matrix, bytes[m], at);
      const int64_t last = std::min(ceil_div(row, kernel.row_multiple) * kernel.row_multiple, matrix.rows);
      if (last <= first) continue;
      pieces.push_back({&matrix, first, last});
      first = last;
    }
  }
  return pieces;
}

std::unique_ptr<const int64_t[]> find_shares(Format format, Type type, const Matrix& matrix) {
  if (format != Format::bitmap && format != Format::bitmap_windows) return nullptr;
  std::unique_ptr<int64_t[]> shares(new int64_t[kShares + 1]);
  const int64_t bytes = bytes_before(format, type, matrix, matrix.rows);
  int64_t row = 0;
  for (int64_t share = 0; share < kShares; ++share) {
    while (row < matrix.rows && bytes_before(format, type, matrix, row) * kShares < bytes * share) ++row;
    shares[static_cast<size_t>(share)] = row;
  }
  shares[kShares] = matrix.rows;
  return shares;
}

}  // namespace wandapp
