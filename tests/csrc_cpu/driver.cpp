// Runs every kernel variant on the cases of a file: AVX-512 and AMX emulated, AVX2 where the processor has it. Every
// buffer is an allocation of its own, so that AddressSanitizer sees each byte read outside.
//
// A case: int64 format, type, tokens, rows, cols, result (0: x is not finite, 1: compare, 2: the weight is damaged, so
// that only memory is watched), then six blobs (x, values, meta, offsets, bias, dense weight) and two of doubles
// [tokens, rows]: the exact result and the largest error allowed (none where the result is infinite). A blob is an int64
// size and its bytes.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "linear.h"
#include "pieces.h"
#include "types.h"
#include "windows_packing.h"

namespace {

using namespace wandapp;

struct Blob {
  std::unique_ptr<char[]> data;
  int64_t size = 0;
};

int64_t read_int(std::ifstream& file) {
  int64_t value = 0;
  file.read(reinterpret_cast<char*>(&value), sizeof(value));
  return value;
}

Blob read_blob(std::ifstream& file) {
  Blob blob;
  blob.size = read_int(file);
  blob.data.reset(new char[static_cast<size_t>(blob.size)]);
  file.read(blob.data.get(), blob.size);
  return blob;
}

double element(Type type, const char* data, int64_t i) {
  if (type == Type::bf16) return widen(reinterpret_cast<const Bf16*>(data)[i]);
  if (type == Type::fp16) return widen(reinterpret_cast<const Fp16*>(data)[i]);
  return reinterpret_cast<const float*>(data)[i];
}

// Whether rows [first, last) come out as those of `dense`, bit for bit.
bool decompresses(Variant variant, Format format, Type type, const Matrix& matrix, const char* dense, int64_t first,
                  int64_t last, int threads) {
  const int64_t begin = first * matrix.cols, count = (last - first) * matrix.cols, size = element_size(type);
  const Decompress rows_of = find_decompress(variant, format, type);
  const std::unique_ptr<char[]> same(new char[static_cast<size_t>(count * size)]);
  decompress(rows_of, type, matrix, first, last, same.get(), false, threads);
  bool good = std::memcmp(same.get(), dense + begin * size, static_cast<size_t>(count * size)) == 0;
  const std::unique_ptr<float[]> wide(new float[static_cast<size_t>(count)]);
  decompress(rows_of, type, matrix, first, last, wide.get(), true, threads);
  for (int64_t i = 0; good && i < count; ++i) {
    good = bits_of(wide[static_cast<size_t>(i)]) == bits_of(static_cast<float>(element(type, dense, begin + i)));
  }
  return good;
}

// Whether a weight of the bitmap format comes back from windows bit for bit.
bool comes_back(Type type, const Matrix& matrix, const Blob& values, const Blob& meta) {
  const int64_t blocks = (matrix.rows + 15) / 16;
  const std::unique_ptr<int64_t[]> offsets(new int64_t[static_cast<size_t>(blocks + 1)]());
  if (!count_windows(matrix, offsets.get() + 1, 3)) return false;
  for (int64_t i = 0; i < blocks; ++i) offsets[static_cast<size_t>(i + 1)] += offsets[static_cast<size_t>(i)];
  const size_t steps = static_cast<size_t>(offsets[static_cast<size_t>(blocks)]);
  const std::unique_ptr<char[]> packed(new char[steps * 32 * static_cast<size_t>(element_size(type))]);
  const std::unique_ptr<uint8_t[]> columns(new uint8_t[steps / 2 * 36]);
  pack_windows(type, matrix, offsets.get(), packed.get(), columns.get(), 3);
  Matrix windows = matrix;
  windows.values = packed.get();
  windows.meta = columns.get();
  windows.offsets = offsets.get();
  const std::unique_ptr<char[]> back(new char[static_cast<size_t>(values.size)]);
  const std::unique_ptr<uint8_t[]> bitmap(new uint8_t[static_cast<size_t>(meta.size)]);
  return unpack_windows(type, windows, matrix.offsets, back.get(), bitmap.get(), 3) &&
         std::memcmp(back.get(), values.data.get(), static_cast<size_t>(values.size)) == 0 &&
         std::memcmp(bitmap.get(), meta.data.get(), static_cast<size_t>(meta.size)) == 0;
}

// Whether rows with very different bytes are cut as promised: in order, between blocks, nothing left out, no piece above
// half a thread's share of what was left by more than two blocks of rows and what `shares` rounds.
bool cuts_evenly(Format format, int threads) {
  constexpr int64_t kRows = 4099, kCols = 64;
  const int64_t block = format == Format::bitmap_windows ? 16 : 1;
  const int64_t bytes_each = format == Format::bitmap_windows ? 82 : 2;
  std::vector<int64_t> offsets = {0};
  for (int64_t r = 0; r < kRows; r += block) offsets.push_back(offsets.back() + (r > 1000 ? 0 : r % 3 * 32));
  Matrix matrix{nullptr, nullptr, offsets.data(), nullptr, nullptr, kRows, kCols};
  const std::unique_ptr<const int64_t[]> shares = find_shares(format, Type::bf16, matrix);
  matrix.shares = shares.get();
  Kernel kernel = *find_kernel(Variant::plain, Format::bitmap, Type::bf16);
  kernel.row_multiple = block;
  const int64_t row_bytes = format == Format::bitmap ? kCols / 8 : 0;
  const auto before = [&](int64_t row) {
    return offsets[static_cast<size_t>((row + block - 1) / block)] * bytes_each + row * row_bytes;
  };
  const int64_t total = before(kRows);
  int64_t done = 0;
  for (const Piece& piece : cut(kernel, format, Type::bf16, {matrix}, threads)) {
    const int64_t bytes = before(piece.last) - before(piece.first), left = total - before(piece.first);
    const int64_t rounded = 2 * total / 256 + 2 * kCols * bytes_each;
    if (piece.first != done || piece.first % block != 0 || piece.last <= piece.first) return false;
    if (bytes > left / (2 * threads) + rounded) return false;
    done = piece.last;
  }
  return done == kRows;
}

}  // namespace

int main(int, char** arguments) {
  std::ifstream file(arguments[1], std::ios::binary);
  const int64_t cases = read_int(file);
  const std::pair<const char*, Variant> variants[] = {{"plain", Variant::plain},
                                                      {"avx2", Variant::avx2},
                                                      {"avx512", Variant::avx512},
                                                      {"avx512_bf16", Variant::avx512_bf16},
                                                      {"avx512_vbmi2", Variant::avx512_vbmi2},
                                                      {"amx", Variant::amx}};
  int64_t runs = 0, failures = 0;
  for (const Format format : {Format::bitmap, Format::bitmap_windows}) {
    for (int threads : {2, 3, 16}) {
      if (cuts_evenly(format, threads)) continue;
      ++failures;
      std::printf("format %d is cut unevenly for %d threads\n", static_cast<int>(format), threads);
    }
  }
  for (int64_t c = 0; c < cases; ++c) {
    const auto format = static_cast<Format>(read_int(file));
    const auto type = static_cast<Type>(read_int(file));
    const int64_t tokens = read_int(file), rows = read_int(file), cols = read_int(file);
    const int64_t result = read_int(file);
    const bool finite = result != 0, damaged = result == 2;
    const Blob x = read_blob(file), values = read_blob(file), meta = read_blob(file), offsets = read_blob(file),
               bias = read_blob(file), dense = read_blob(file), exact = read_blob(file), allowed = read_blob(file);
    const Matrix weight{values.data.get(), meta.data.get(), reinterpret_cast<const int64_t*>(offsets.data.get()),
                        nullptr,           nullptr,         rows,
                        cols};
    if (format == Format::bitmap) {
      ++runs;
      if (!comes_back(type, weight, values, meta) && !damaged) {
        ++failures;
        std::printf("windows, type %d: %ld x %ld does not come back\n", static_cast<int>(type), rows, cols);
      }
    }
    for (const auto& [name, variant] : variants) {
      if (!has_avx2() && (variant == Variant::avx2 || format == Format::bitmap_windows)) continue;
      for (int64_t first = 0; first < rows; ++first) {
        const bool good = decompresses(variant, format, type, weight, dense.data.get(), first, rows, 1) &&
                          decompresses(variant, format, type, weight, dense.data.get(), 0, first + 1, 3);
        ++runs;
        if (good || damaged) continue;
        ++failures;
        std::printf("%s, format %d, type %d: decompressing %ld x %ld, row %ld\n", name, static_cast<int>(format),
                    static_cast<int>(type), rows, cols, first);
      }
      const Kernel* kernel = find_kernel(variant, format, type);
      if (kernel == nullptr) continue;
      const std::unique_ptr<const int64_t[]> shares = find_shares(format, type, weight);
      Matrix matrix = weight;
      matrix.shares = shares.get();
      matrix.bias = bias.size == 0 ? nullptr : bias.data.get();
      const auto right = [&](const std::string& out, bool said_finite) {
        if (said_finite != finite) return false;
        for (int64_t i = 0; finite && !damaged && i < tokens * rows; ++i) {
          const double want = reinterpret_cast<const double*>(exact.data.get())[i];
          const double got = element(type, out.data(), i);
          const double most = reinterpret_cast<const double*>(allowed.data.get())[i];
          if (std::isinf(want) ? got != want : !(std::abs(got - want) <= most)) return false;
        }
        return true;
      };
      // The kernel for many tokens with few too, where it would not be chosen.
      for (const Kernel* one : {kernel, tokens < kernel->many_tokens ? kernel->many : nullptr}) {
        std::string first_result;
        for (int threads = 1; one != nullptr && threads <= 3; ++threads) {
          std::string out(static_cast<size_t>(tokens * rows * element_size(type)), '\x7f'), again = out;
          matrix.out = out.data();
          std::vector<Matrix> matrices = {matrix};
          if (threads == 3) {  // two weights in one call, which a piece may span
            matrices.push_back(matrix);
            matrices.back().out = again.data();
          }
          const bool good = right(out, linear(*one, format, type, matrices, x.data.get(), tokens, threads));
          ++runs;
          if (threads == 1) first_result = out;
          if (good && out == first_result && (threads != 3 || again == first_result)) continue;
          ++failures;
          std::printf("%s%s, format %d, type %d: %ld tokens, %ld x %ld, %d threads\n", name,
                      one == kernel ? "" : " for many tokens", static_cast<int>(format), static_cast<int>(type), tokens,
                      rows, cols, threads);
        }
      }
    }
  }
  std::printf("%ld runs, %ld failures\n", runs, failures);
  return !file || failures != 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}
