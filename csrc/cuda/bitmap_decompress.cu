// Entry point of bitmap_decompress.cuh.
#include "bitmap_decompress.cuh"

extern "C" __global__ void __launch_bounds__(256, 4)
    bitmap_decompress_16(const uint4* values, const uint4* bitmaps, const int* offsets, u16* out, int rows, int columns) {
    bitmap::decompress(values, bitmaps, offsets, out, rows, columns);
}
