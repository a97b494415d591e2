// An unstructured weight from its canonical form into panels (bitmap_panel.cuh) and back, bit for bit.
//
// Canonical: bitmap [rows, ceil(columns / 8)] bytes, column j at bit j % 8 of byte j / 8; the kept values row after row. A
// row's part in a panel is a segment; segments are numbered as their values follow each other, row after row. Both ways are
// two launches with a running sum between them: the words (or the canonical bitmap) and how many values every panel and
// every segment keeps; then the values, from where their segment starts to where their panel starts, or back.
//
// One warp a panel. Lane 2 r + h holds 64 bits of it: row r, columns 64 h to 64 h + 63; what the order of the panel asks
// for comes from the lane that has it. Every bit outside the weight counts as removed, whatever the tensors hold there.
#pragma once

#include "bitmap_order.cuh"
#include "bitmap_panel.cuh"

namespace bitmap {

constexpr u32 kValuesOf16Bytes = 8;

struct PanelPlace {
    u32 lane;
    int rows, columns, panels;  // of the weight: rows, columns, panels of a slab
    long long index;
    int first_row, first_column;

    static __device__ __forceinline__ PanelPlace of_this_warp(int rows, int columns) {
        const int panels = (columns + kPanelColumns - 1) / kPanelColumns;
        const long long index = static_cast<long long>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
        return {threadIdx.x % 32, rows, columns, panels, index,
                static_cast<int>(index / panels) * kSlabRows, static_cast<int>(index % panels) * kPanelColumns};
    }

    __device__ __forceinline__ bool exists() const { return first_row < rows; }

    // The row and the first column of this lane's 64 bits.
    __device__ __forceinline__ int row() const { return first_row + static_cast<int>(lane / 2); }
    __device__ __forceinline__ int column() const { return first_column + static_cast<int>(lane % 2 * 64); }

    __device__ __forceinline__ int row_bytes() const { return (columns + 7) / 8; }

    __device__ __forceinline__ u64 segment() const {
        return static_cast<u64>(row()) * panels + first_column / kPanelColumns;
    }

    // The bits of this lane that are inside the weight.
    __device__ __forceinline__ u64 inside() const {
        const int left = columns - column();
        if (row() >= rows or left <= 0) return 0;
        return left >= 64 ? ~0ull : (1ull << left) - 1;
    }
};

__device__ __forceinline__ u64 shuffle_64(u64 value, u32 lane) {
    const int from = static_cast<int>(lane);
    const u32 low = ptx::shuffle(static_cast<u32>(value), from), high = ptx::shuffle(static_cast<u32>(value >> 32), from);
    return static_cast<u64>(high) << 32 | low;
}

// Bit i of `bits`: two halves instead of a shift by any of 64.
__device__ __forceinline__ u32 bit_at(u64 bits, u32 i) {
    return (i < 32 ? static_cast<u32>(bits) : static_cast<u32>(bits >> 32)) >> i % 32 & 1;
}

// This lane's bits of the canonical bitmap.
__device__ __forceinline__ u64 load_bits(const PanelPlace& panel, const u8* bitmap) {
    const u64 inside = panel.inside();
    const u8* const bytes = bitmap + static_cast<u64>(panel.row()) * panel.row_bytes() + panel.column() / 8;
    u64 bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (inside >> 8 * i & 0xFF) bits |= static_cast<u64>(bytes[i]) << 8 * i;
    return bits & inside;
}

// How many values the panel keeps, and each of its segments.
__device__ __forceinline__ void store_counts(const PanelPlace& panel, u64 bits, int* counts, int* segments) {
    u32 kept = ptx::popcount(bits);
    kept += ptx::shuffle_xor(kept, 1);
    if (panel.lane % 2 == 0 and panel.row() < panel.rows) segments[panel.segment()] = static_cast<int>(kept);
#pragma unroll
    for (int lanes = 2; lanes < 32; lanes *= 2) kept += ptx::shuffle_xor(kept, lanes);
    if (panel.lane == 0) counts[panel.index] = static_cast<int>(kept);
}

// Panels' words from the canonical bitmap; lane l makes words 2 l and 2 l + 1.
__device__ __forceinline__ void pack_words(const u8* bitmap, uint2* words, int* counts, int* segments, int rows,
                                           int columns) {
    const PanelPlace panel = PanelPlace::of_this_warp(rows, columns);
    if (not panel.exists()) return;
    const u64 bits = load_bits(panel, bitmap);
    u32 made[2] = {0, 0};
#pragma unroll
    for (u32 i = 0; i < 64; ++i) {
        const Place from = place_of_bit({2 * panel.lane + i / 32, i % 32});
        const u64 row_bits = shuffle_64(bits, 2 * from.row + from.column / 64);
        made[i / 32] |= bit_at(row_bits, from.column % 64) << i % 32;
    }
    words[panel.index * 32 + panel.lane] = make_uint2(made[0], made[1]);
    store_counts(panel, bits, counts, segments);
}

// The canonical bitmap from the panels' words.
__device__ __forceinline__ void unpack_words(const uint2* words, u8* bitmap, int* counts, int* segments, int rows,
                                             int columns) {
    const PanelPlace panel = PanelPlace::of_this_warp(rows, columns);
    if (not panel.exists()) return;
    const uint2 two = words[panel.index * 32 + panel.lane];
    const u64 own = static_cast<u64>(two.y) << 32 | two.x;
    u64 bits = 0;
#pragma unroll
    for (u32 i = 0; i < 64; ++i) {
        const Bit from = bit_of_place({panel.lane / 2, panel.lane % 2 * 64 + i});
        bits |= static_cast<u64>(bit_at(shuffle_64(own, from.word / 2), from.word % 2 * 32 + from.bit)) << i;
    }
    const u64 inside = panel.inside();
    bits &= inside;
    u8* const bytes = bitmap + static_cast<u64>(panel.row()) * panel.row_bytes() + panel.column() / 8;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (inside >> 8 * i & 0xFF) bytes[i] = static_cast<u8>(bits >> 8 * i);
    store_counts(panel, bits, counts, segments);
}

// Moves the values of a panel between the canonical order, where its segments start at `starts`, and its own, where it
// starts at 8 * offsets[panel]. kPack: into the panel, whose last 16 bytes are filled up with zeros.
template <bool kPack>
__device__ __forceinline__ void move_values(const u8* bitmap, const long long* starts, const int* offsets,
                                            const u16* source, u16* target, int rows, int columns) {
    const PanelPlace panel = PanelPlace::of_this_warp(rows, columns);
    if (not panel.exists()) return;
    const u64 bits = load_bits(panel, bitmap);
    const u32 first_half = ptx::shuffle(ptx::popcount(bits), panel.lane & ~1u);
    u64 start = panel.lane % 2 * first_half;
    if (panel.row() < rows) start += static_cast<u64>(starts[panel.segment()]);
    const u64 panel_start = static_cast<u64>(offsets[panel.index]) * kValuesOf16Bytes;
    u32 moved = 0;
#pragma unroll 4
    for (u32 step = 0; step < kSlabRows * kPanelColumns / 32; ++step) {
        const Place place = place_of_value(32 * step + panel.lane);
        const u32 holder = 2 * place.row + place.column / 64, column = place.column % 64;
        const u64 row_bits = shuffle_64(bits, holder);
        const u64 canonical = shuffle_64(start, holder) + ptx::popcount(row_bits & ((1ull << column) - 1));
        const bool kept = bit_at(row_bits, column) != 0;
        const u32 all_kept = ptx::ballot(kept);
        const u64 packed = panel_start + moved + ptx::popcount(all_kept & ((1u << panel.lane) - 1));
        if (kept) target[kPack ? packed : canonical] = source[kPack ? canonical : packed];
        moved += ptx::popcount(all_kept);
    }
    if (kPack and panel.lane < (kValuesOf16Bytes - moved % kValuesOf16Bytes) % kValuesOf16Bytes)
        target[panel_start + moved + panel.lane] = 0;
}

}  // namespace bitmap
