// AVX2 + FMA + F16C: one header for each format.
#include "avx2_bitmap.h"
#include "avx2_dense.h"
#include "avx2_pairs.h"

namespace wandapp {
namespace {

template <class T>
const Kernel* of_type(Format format) {
  if (format == Format::dense) return &kDense<T>;
  if (format == Format::nm_pairs) return &kPairs<T>;
  if (format == Format::bitmap) return &kBitmap<T>;
  return nullptr;
}

}  // namespace

const Kernel* avx2_kernel(Format format, Type type) {
  if (type == Type::bf16) return of_type<Bf16>(format);
  if (type == Type::fp16) return of_type<Fp16>(format);
  return of_type<float>(format);
}

}  // namespace wandapp
