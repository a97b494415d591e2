// Entry points of bitmap_pack.cuh: 8 warps a CTA, as many CTAs as a multiprocessor takes.
#include "bitmap_pack.cuh"

extern "C" __global__ void __launch_bounds__(256, 8)
    bitmap_pack_words(const u8* bitmap, uint2* words, int* counts, int* segments, int rows, int columns) {
    bitmap::pack_words(bitmap, words, counts, segments, rows, columns);
}

extern "C" __global__ void __launch_bounds__(256, 8)
    bitmap_unpack_words(const uint2* words, u8* bitmap, int* counts, int* segments, int rows, int columns) {
    bitmap::unpack_words(words, bitmap, counts, segments, rows, columns);
}

extern "C" __global__ void __launch_bounds__(256, 8)
    bitmap_pack_values(const u8* bitmap, const long long* starts, const int* offsets, const u16* values, u16* packed,
                       int rows, int columns) {
    bitmap::move_values<true>(bitmap, starts, offsets, values, packed, rows, columns);
}

extern "C" __global__ void __launch_bounds__(256, 8)
    bitmap_unpack_values(const u8* bitmap, const long long* starts, const int* offsets, const u16* packed, u16* values,
                         int rows, int columns) {
    bitmap::move_values<false>(bitmap, starts, offsets, packed, values, rows, columns);
}
