// Linear layers over the kernels of one variant: activations are prepared once, rows are shared out by bytes.
#pragma once

#include <vector>

#include "kernels.h"

namespace wandapp {

enum class Variant { plain, avx2, avx512, avx512_bf16, avx512_vbmi2, amx };

const Kernel* find_kernel(Variant variant, Format format, Type type);

// out = x W^T + bias for every matrix of `matrices`, which share the input x [tokens, cols] and the kernel. The result
// does not depend on `threads`. Returns false, with outputs not to be used, when x holds NaN or infinity and W is
// sparse: a removed weight would hide it, where a dense zero would give NaN.
bool linear(const Kernel& kernel, Format format, Type type, const std::vector<Matrix>& matrices, const void* x,
            int64_t tokens, int threads);

// Whether the offsets of a bitmap weight with `values` values keep its kernels inside their memory.
bool offsets_fit(const int64_t* offsets, int64_t rows, int64_t cols, int64_t values);

// The fastest that the variant's processor runs; there is one for every format.
Decompress find_decompress(Variant variant, Format format, Type type);

// Rows [first, last) of W, of `type`, as dense rows in `out`: in W's type, or widened to fp32.
void decompress(Decompress rows_of, Type type, const Matrix& matrix, int64_t first, int64_t last, void* out,
                bool to_fp32, int threads);

}  // namespace wandapp
