// AVX2 + FMA + F16C: one header for each format.
#include "avx2_bitmap.h"
#include "avx2_decompress.h"
#include "avx2_decompress_pairs.h"
#include "avx2_dense.h"
#include "avx2_pairs_many.h"
#include "avx2_windows_many.h"

namespace wandapp {
namespace {

template <class T>
const Kernel* of_type(Format format) {
  if (format == Format::dense) return &kDense<T>;
  if (format == Format::nm_pairs) return &kPairs<T>;
  if (format == Format::bitmap) return &kBitmap<T>;
  if (format == Format::bitmap_windows) return &kWindows<T>;
  return nullptr;
}

template <class T, class Out>
void decompress_to(Format format, const Matrix& matrix, int64_t first, int64_t last, void* out) {
  Out* rows = static_cast<Out*>(out);
  if (format == Format::nm) decompress_nm<T>(matrix, first, last, rows);
  if (format == Format::nm_pairs) decompress_pairs<T>(matrix, first, last, rows);
  if (format == Format::bitmap) decompress_bitmap<T>(matrix, first, last, rows);
}

template <class T, Format format>
void decompress(const Matrix& matrix, int64_t first, int64_t last, void* out, bool to_fp32) {
  if (to_fp32) {
    decompress_to<T, float>(format, matrix, first, last, out);
  } else {
    decompress_to<T, T>(format, matrix, first, last, out);
  }
}

template <class T>
Decompress decompress_of_type(Format format) {
  if (format == Format::nm) return decompress<T, Format::nm>;
  if (format == Format::nm_pairs) return decompress<T, Format::nm_pairs>;
  if (format == Format::bitmap) return decompress<T, Format::bitmap>;
  return nullptr;
}

}  // namespace

const Kernel* avx2_kernel(Format format, Type type) {
  if (type == Type::bf16) return of_type<Bf16>(format);
  if (type == Type::fp16) return of_type<Fp16>(format);
  return of_type<float>(format);
}

Decompress avx2_decompress(Format format, Type type) {
  if (type == Type::bf16) return decompress_of_type<Bf16>(format);
  if (type == Type::fp16) return decompress_of_type<Fp16>(format);
  return decompress_of_type<float>(format);
}

}  // namespace wandapp
