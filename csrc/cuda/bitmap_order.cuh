// Where a weight of a panel stands: its bit among the panel's 64 words, its value among the panel's values.
//
// All that packing knows of the order that bitmap_panel.cuh describes: another order is another text here, and in
// bitmap_layout.py, which packs with torch.
#pragma once

#include "types.cuh"

namespace bitmap {

// Row (0 to 15) and column (0 to 127) inside a panel. (Unsigned, like all here: divided by powers of two.)
struct Place {
    u32 row, column;
};

// Bit (0 to 31) of word (0 to 63, as they lie in memory).
struct Bit {
    u32 word, bit;
};

__device__ __forceinline__ Place place_of_bit(Bit at) {
    const u32 lane = at.word / 2, half = at.word % 2, q = at.bit / 4;
    return {lane / 4 + at.bit / 2 % 2 * 8, 64 * half + q / 4 * 32 + lane % 4 * 8 + q % 4 * 2 + at.bit % 2};
}

__device__ __forceinline__ Bit bit_of_place(Place at) {
    const u32 lane = at.row % 8 * 4 + at.column / 8 % 4, half = at.column / 64;
    const u32 q = at.column / 32 % 2 * 4 + at.column % 8 / 2;
    return {2 * lane + half, 4 * q + at.row / 8 * 2 + at.column % 2};
}

// Values follow each other as these places do, the removed ones left out; `number` from 0 to 2047.
__device__ __forceinline__ Place place_of_value(u32 number) {
    const u32 half = number / 1024, q = number / 128 % 8, lane = number / 4 % 32;
    return place_of_bit({2 * lane + half, 4 * q + number % 4});
}

}  // namespace bitmap
