// AVX-512 (F, BW, VL, VBMI): one header for each format. Compiled three times: without BF16 dot products, with them, and
// with vpexpandw too.
//
// WANDAPP_AVX512_KERNEL: the name of the exported function.
#include "avx512_bitmap.h"
#include "avx512_dense.h"
#include "avx512_nm.h"

namespace wandapp {
namespace {

template <class T>
const Kernel* of_type(Format format) {
  if (format == Format::dense) return &kDense<T>;
  if (format == Format::nm) return &kNM<T>;
  if (format == Format::bitmap) return &kBitmap<T>;
  return nullptr;
}

}  // namespace

const Kernel* WANDAPP_AVX512_KERNEL(Format format, Type type) {
  if (type == Type::bf16) return of_type<Bf16>(format);
  if (type == Type::fp16) return of_type<Fp16>(format);
  return of_type<float>(format);
}

}  // namespace wandapp
