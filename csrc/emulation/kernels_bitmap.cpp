// The kernels of an unstructured weight, callable by name.
#include "../cuda/bitmap_decode.cuh"
#include "../cuda/bitmap_decompress.cuh"
#include "../cuda/bitmap_pack.cu"
#include "runner.h"

namespace {

template <class T, int kTokenTiles>
void decode(const uint4* values, const uint4* bitmaps, const int* offsets, const T* x, const T* bias, T* out,
            float* partial, u32* counters, int tokens, int rows, int columns, int warps_per_slab) {
    bitmap::decode<T, kTokenTiles>(values, bitmaps, offsets, x, bias, out, partial, counters, tokens, rows, columns,
                                   warps_per_slab);
}

const emulation::Kernel kFp16Up8("bitmap_decode_fp16_8", &decode<Half, 1>);
const emulation::Kernel kFp16Up16("bitmap_decode_fp16_16", &decode<Half, 2>);
const emulation::Kernel kBf16Up8("bitmap_decode_bf16_8", &decode<BFloat16, 1>);
const emulation::Kernel kBf16Up16("bitmap_decode_bf16_16", &decode<BFloat16, 2>);
const emulation::Kernel kDecompress("bitmap_decompress_16", &bitmap::decompress);
const emulation::Kernel kPackWords("bitmap_pack_words", &bitmap_pack_words);
const emulation::Kernel kUnpackWords("bitmap_unpack_words", &bitmap_unpack_words);
const emulation::Kernel kPackValues("bitmap_pack_values", &bitmap_pack_values);
const emulation::Kernel kUnpackValues("bitmap_unpack_values", &bitmap_unpack_values);

}  // namespace
