// The panel of an unstructured weight: 16 rows x 128 columns, 2048 positions, as the tensor cores take them.
//
// Lane 4g + t owns rows g and g + 8 and, in each 32 columns, the 8 from 8t on: 16 bytes of an activation, and lanes side by
// side. The 16 columns of a half (64 columns) are the A operand of four mma.m16n8k16: their element 4j + 2h + e is column
// 8h + 2t + e of k-step j. Its bits are one 32-bit word per half, q = 2j + h,
//
//     bit 4q + 2r + e:   row g + 8r, column 64 half + 32 (q / 4) + 8t + 2 (q % 4) + e        (q = 0..7, r, e = 0..1)
//
// and the kept values follow in the order (half, q, lane, r, e). So the values of one q are contiguous over the warp, a
// lane's are next to each other, and a lane finds its first one by counting the bits of the lanes below it.
//
// In memory: bitmap[panel][lane] = two words (256 bytes a panel); values of a panel from 16 * offsets[panel] bytes on.
// A panel starts on 16 bytes; panels of one 16-row slab lie side by side.
#pragma once

#include "ptx.cuh"

namespace bitmap {

constexpr int kSlabRows = 16;
constexpr int kPanelColumns = 128;
constexpr int kBitmapBytes = 32 * 8;
constexpr int kMostValueBytes = kSlabRows * kPanelColumns * 2;
constexpr int kSlotBytes = kBitmapBytes + kMostValueBytes;  // a panel in shared memory: bitmap, then values

// Starts the copy of a panel: `units` times 16 bytes of values, and the bitmap. The caller commits the group.
__device__ __forceinline__ void copy_panel(ptx::SharedAddress slot, const uint4* values, int units, const uint4* bitmap,
                                           int lane) {
    ptx::cp_async_16_if(lane < kBitmapBytes / 16, slot + 16 * lane, bitmap + lane);
#pragma unroll
    for (int i = 0; i < kMostValueBytes / 512; ++i)
        ptx::cp_async_16_if(lane + 32 * i < units, slot + kBitmapBytes + 16 * lane + 512 * i, values + lane + 32 * i);
}

// For every nibble q of `word`, the set bits in the lanes below (`before`) and in the whole warp (`total`), one byte
// each: even q in [0], odd q in [1], byte q / 2. A byte holds at most 128.
struct NibblePrefix {
    u32 before[2], total[2];
};

__device__ __forceinline__ NibblePrefix nibble_prefix(u32 word) {
    const u32 pairs = word - (word >> 1 & 0x55555555u);
    const u32 nibbles = (pairs & 0x33333333u) + (pairs >> 2 & 0x33333333u);
    NibblePrefix prefix;
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
        const u32 own = nibbles >> 4 * odd & 0x0F0F0F0Fu;
        u32 sum = own;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) sum = ptx::shuffle_up_add(sum, distance);
        prefix.before[odd] = sum - own;
        prefix.total[odd] = ptx::shuffle(sum, 31);
    }
    return prefix;
}

// Half a panel as the A operands of its four k-steps. `values` is where those of this half start; it moves to their end.
__device__ __forceinline__ void expand_half(uint4 (&a)[4], ptx::SharedAddress& values, u32 word) {
    const NibblePrefix prefix = nibble_prefix(word);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        u32 element[2][2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const u32 two_bytes = 2u << 8 * j;  // picks byte j, times the size of a value
            ptx::SharedAddress next = ptx::dot_bytes(prefix.before[h], two_bytes, values);
            values = ptx::dot_bytes(prefix.total[h], two_bytes, values);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const u32 first_bit = 1u << (8 * j + 4 * h + 2 * r);
                const u32 low = ptx::take_shared_16(next, word & first_bit);
                const u32 high = ptx::take_shared_16(next, word & first_bit << 1);
                element[h][r] = ptx::permute_bytes(low, high, 0x5410);
            }
        }
        a[j] = make_uint4(element[0][0], element[0][1], element[1][0], element[1][1]);
    }
}

}  // namespace bitmap
