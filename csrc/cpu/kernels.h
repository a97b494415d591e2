// What a variant (plain, AVX2, AVX-512) offers for one weight format and element type.
//
//   out[m, r] = bias[r] + sum over k of W[r, k] * x[m, k],   accumulated in fp32, rounded once
//
// Formats of W [rows, cols]; T is the element type of W, x, bias and out:
//   dense     values T [rows, cols]
//   nm        2:4, values T [rows, kept], meta = 2-bit positions, little-endian, every row starts on a byte;
//             kept = cols / 4 * 2 + min(cols % 4, 2)
//   nm_pairs  2:4 in blocks of 4 rows, see avx2_pairs.h
//   bitmap    values T [nnz], meta = one bit a column, little-endian, every row starts on a byte;
//             offsets int64 [rows + 1], from 0 to nnz, a row at most cols on: offsets_fit
//   bitmap_windows  unstructured in blocks of 16 rows, see windows.h
//
// Positions and bits that no compression makes (a column that is not there, a bit without a value) give wrong results,
// but nothing outside the tensors is read or written. The meta of bitmap_windows is trusted.
#pragma once

#include <cstddef>
#include <cstdint>

namespace wandapp {

enum class Format { dense, nm, nm_pairs, bitmap, bitmap_windows };
enum class Type { bf16, fp16, fp32 };

struct Matrix {
  const void* values;
  const void* meta;
  const int64_t* offsets;
  const void* bias;  // T [rows] or null
  void* out;         // T [tokens, rows]
  int64_t rows;
  int64_t cols;
  const int64_t* shares = nullptr;  // see find_shares; null: rows are taken for equal
};

struct Kernel {
  // Rows are handed out in multiples of this.
  int64_t row_multiple;
  // Tokens that are prepared together, a group, and its bytes.
  int64_t group_tokens;
  size_t (*group_bytes)(int64_t cols);
  // Bring `count` tokens [count, cols] of a group into the order and type that `run` reads; false when one holds NaN or
  // infinity.
  bool (*prepare)(const void* tokens, int64_t count, int64_t cols, void* prepared);
  // Bytes of 64-byte aligned memory that `run` needs for itself.
  size_t (*scratch_bytes)(int64_t cols);
  // Rows [first, last) for `tokens` prepared tokens, which are outputs first_token and following; whole groups, but for
  // the last.
  void (*run)(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t tokens, int64_t first,
              int64_t last, void* scratch);
  // Of `tokens`, those for one `run`, a multiple of a group; null: as many as the cache holds.
  int64_t (*tokens_at_once)(int64_t cols, int64_t tokens) = nullptr;
  // Another kernel of the same format, which is faster with this many tokens; null where there is none.
  const Kernel* many = nullptr;
  int64_t many_tokens = 0;
};

// Null where the variant has no kernel for the format.
const Kernel* plain_kernel(Format format, Type type);
const Kernel* avx2_kernel(Format format, Type type);
const Kernel* avx512_kernel(Format format, Type type);
const Kernel* avx512_bf16_kernel(Format format, Type type);
const Kernel* avx512_vbmi2_kernel(Format format, Type type);
const Kernel* amx_kernel(Format format, Type type);

// Rows [first, last) of W as dense rows in `out` (last - first rows of cols elements): in W's type, or widened to fp32.
using Decompress = void (*)(const Matrix& matrix, int64_t first, int64_t last, void* out, bool to_fp32);

// Null where the variant has none for the format. The plain one has all. AVX2's is bound by memory where it was measured,
// so AVX-512 has none of its own.
Decompress plain_decompress(Format format, Type type);
Decompress avx2_decompress(Format format, Type type);

}  // namespace wandapp
