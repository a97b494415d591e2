// Portable C++: a row is expanded to fp32 once and multiplied with every token.
#include "windows.h"

namespace wandapp {
namespace {

// Row r into `row` (cols elements).
template <class T, class Out>
void expand_row(Format format, const Matrix& matrix, int64_t r, Out* row) {
  if (format == Format::dense) {
    const T* values = static_cast<const T*>(matrix.values) + r * matrix.cols;
    for (int64_t k = 0; k < matrix.cols; ++k) put(row, k, values[k]);
    return;
  }
  if (format == Format::nm) expand_nm<T>(matrix, r, row, 0);
  if (format == Format::nm_pairs) expand_nm_pairs<T>(matrix, r, row, 0);
  if (format == Format::bitmap) {
    expand_bitmap(matrix, r, row, 0, static_cast<const T*>(matrix.values) + matrix.offsets[r]);
  }
  if (format == Format::bitmap_windows) expand_windows<T>(matrix, r, row);
}

constexpr int kLanes = 8;

size_t token_bytes(int64_t cols) { return static_cast<size_t>(ceil_div(cols, 16)) * 16 * sizeof(float); }

template <class T>
bool prepare(const void* token, int64_t, int64_t cols, void* prepared) {
  const T* x = static_cast<const T*>(token);
  float* out = static_cast<float*>(prepared);
  float probe = 0;
  for (int64_t k = 0; k < cols; ++k) {
    out[k] = widen(x[k]);
    probe += out[k] * 0.0f;
  }
  return probe == 0.0f;
}

float dot(const float* a, const float* b, int64_t size) {
  float lanes[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) {
    for (int i = 0; i < kLanes; ++i) lanes[i] += a[k + i] * b[k + i];
  }
  for (int i = 0; k < size; ++k, ++i) lanes[i] += a[k] * b[k];
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

template <class T, Format format>
void run(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t tokens, int64_t first, int64_t last,
         void* scratch) {
  const T* bias = static_cast<const T*>(matrix.bias);
  T* out = static_cast<T*>(matrix.out) + first_token * matrix.rows;
  float* row = static_cast<float*>(scratch);
  const size_t stride = token_bytes(matrix.cols);
  for (int64_t r = first; r < last; ++r) {
    expand_row<T>(format, matrix, r, row);
    const float start = bias == nullptr ? 0.0f : widen(bias[r]);
    for (int64_t m = 0; m < tokens; ++m) {
      const float* x = reinterpret_cast<const float*>(static_cast<const char*>(prepared) + m * stride);
      out[m * matrix.rows + r] = narrow<T>(start + dot(row, x, matrix.cols));
    }
  }
}

template <class T, Format format>
constexpr Kernel kKernel{1, 1, token_bytes, prepare<T>, token_bytes, run<T, format>};

template <class T>
const Kernel* of_type(Format format) {
  switch (format) {
    case Format::dense:
      return &kKernel<T, Format::dense>;
    case Format::nm:
      return &kKernel<T, Format::nm>;
    case Format::nm_pairs:
      return &kKernel<T, Format::nm_pairs>;
    case Format::bitmap:
      return &kKernel<T, Format::bitmap>;
    case Format::bitmap_windows:
      return &kKernel<T, Format::bitmap_windows>;
  }
  return nullptr;
}

template <class T, Format format, class Out>
void expand_rows(const Matrix& matrix, int64_t first, int64_t last, Out* out) {
  if constexpr (format == Format::bitmap_windows) {
    expand_windows_rows<T>(matrix, first, last, out);
  } else {
    for (int64_t r = first; r < last; ++r) expand_row<T>(format, matrix, r, out + (r - first) * matrix.cols);
  }
}

template <class T, Format format>
void decompress(const Matrix& matrix, int64_t first, int64_t last, void* out, bool to_fp32) {
  if (to_fp32) {
    expand_rows<T, format>(matrix, first, last, static_cast<float*>(out));
  } else {
    expand_rows<T, format>(matrix, first, last, static_cast<T*>(out));
  }
}

template <class T>
Decompress decompress_of_type(Format format) {
  switch (format) {
    case Format::dense:
      return decompress<T, Format::dense>;
    case Format::nm:
      return decompress<T, Format::nm>;
    case Format::nm_pairs:
      return decompress<T, Format::nm_pairs>;
    case Format::bitmap:
      return decompress<T, Format::bitmap>;
    case Format::bitmap_windows:
      return decompress<T, Format::bitmap_windows>;
  }
  return nullptr;
}

}  // namespace

const Kernel* plain_kernel(Format format, Type type) {
  if (type == Type::bf16) return of_type<Bf16>(format);
  if (type == Type::fp16) return of_type<Fp16>(format);
  return of_type<float>(format);
}

Decompress plain_decompress(Format format, Type type) {
  if (type == Type::bf16) return decompress_of_type<Bf16>(format);
  if (type == Type::fp16) return decompress_of_type<Fp16>(format);
  return decompress_of_type<float>(format);
}

}  // namespace wandapp
