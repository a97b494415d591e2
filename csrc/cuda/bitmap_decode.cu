// Entry points of bitmap_decode.cuh: one for each element type and for up to 8 or 16 tokens.
#include "bitmap_decode.cuh"

#define DECODE(NAME, TYPE, TILES)                                                                                      \
    extern "C" __global__ void __launch_bounds__(bitmap::kMostThreads, 2)                                                      \
        NAME(const uint4* values, const uint4* bitmaps, const int* offsets, const TYPE* x, const TYPE* bias, TYPE* out, \
             float* partial, u32* counters, int tokens, int rows, int columns, int warps_per_slab) {                   \
        bitmap::decode<TYPE, TILES>(values, bitmaps, offsets, x, bias, out, partial, counters, tokens, rows, columns,          \
                            warps_per_slab);                                                                           \
    }

DECODE(bitmap_decode_fp16_8, Half, 1)
DECODE(bitmap_decode_fp16_16, Half, 2)
DECODE(bitmap_decode_bf16_8, BFloat16, 1)
DECODE(bitmap_decode_bf16_16, BFloat16, 2)
