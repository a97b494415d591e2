// The dense weight [rows, columns] from the panels of bitmap_panel.cuh, 16-bit elements of any type.
//
// One warp a panel: it arrives in shared memory, expands into fragments as for the product, and leaves in 16-byte stores,
// 64 bytes of a row from four lanes.
//
// grid: panels / warps of a CTA, rounded up; shared memory: kSlotBytes a warp.
#pragma once

#include "bitmap_panel.cuh"

namespace bitmap {

// Eight elements from `column` on; those outside the weight are dropped.
__device__ __forceinline__ void store_columns(u16* row, int column, int columns, const u32 (&pairs)[4]) {
    if (columns % 8 == 0) {
        if (column < columns)
            *reinterpret_cast<uint4*>(row + column) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (column + i < columns) row[column + i] = static_cast<u16>(pairs[i / 2] >> 16 * (i % 2));
}

__device__ __forceinline__ void decompress(const uint4* __restrict__ values, const uint4* __restrict__ bitmaps,
                                           const int* __restrict__ offsets, u16* __restrict__ out, int rows, int columns) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int g = lane / 4, t = lane % 4;
    const int panels = (columns + kPanelColumns - 1) / kPanelColumns;
    const int slabs = (rows + kSlabRows - 1) / kSlabRows;
    const long long index = static_cast<long long>(blockIdx.x) * (blockDim.x / 32) + warp;
    if (index >= static_cast<long long>(slabs) * panels) return;
    const int slab = static_cast<int>(index / panels), panel = static_cast<int>(index % panels);

    u8* const slot = ptx::dynamic_shared() + warp * kSlotBytes;
    const int begin = offsets[index];
    copy_panel(ptx::shared_address(slot), values + begin, offsets[index + 1] - begin,
               bitmaps + index * (kBitmapBytes / 16), lane);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::sync_warp();

    const uint2 words = ptx::load_shared(reinterpret_cast<const uint2*>(slot) + lane);
    ptx::SharedAddress kept = ptx::shared_address(slot + kBitmapBytes);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        uint4 a[4];
        expand_half(a, kept, half == 0 ? words.x : words.y);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = kSlabRows * slab + g + 8 * r;
            if (row >= rows) continue;
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const uint4 &first = a[2 * part], &second = a[2 * part + 1];
                const u32 pairs[4] = {r == 0 ? first.x : first.y, r == 0 ? first.z : first.w,
                                      r == 0 ? second.x : second.y, r == 0 ? second.z : second.w};
                store_columns(out + static_cast<size_t>(row) * columns,
                              kPanelColumns * panel + 64 * half + 32 * part + 8 * t, columns, pairs);
            }
        }
    }
}

}  // namespace bitmap
