// A 2:4 weight from its canonical form into fragment order (nm_layout.cuh) and back.
//
// Canonical: values [N, kept], kept = K / 4 * 2 + min(K % 4, 2); indices [N, ceil(kept / 4)] bytes, two bits a value,
// little-endian. Neither kernel reads or writes outside its four tensors; both run once, when a model is loaded.
#pragma once

#include "nm_layout.cuh"
#include "ptx.cuh"

struct NmCanonical {
    int rows, kept, row_bytes;

    static __device__ __forceinline__ NmCanonical of(int n, int k) {
        const int tail = k % 4 < 2 ? k % 4 : 2;
        const int kept = k / 4 * 2 + tail;
        return {n, kept, (kept + 3) / 4};
    }

    // The bits of byte `byte` of a row that hold values.
    __device__ __forceinline__ u32 used(int byte) const {
        const int bits = 2 * kept - 8 * byte;
        return bits >= 8 ? 0xFFu : (1u << bits) - 1;
    }
};

// A row, and a column in the unit of what is asked: canonical values, or sixteenths (16 dense columns, 2 bytes).
struct NmPlace {
    int row, column;
};

// Element e (0 to 7) of vector `vector` = ((block * 2 + step) * 4 + row tile) * 32 + lane.
static __device__ __forceinline__ NmPlace nm_value_place(u64 vector, int e, int column_blocks) {
    const int lane = static_cast<int>(vector % 32);
    const int row_tile = static_cast<int>(vector / 32 % 4);
    const int step = static_cast<int>(vector / 128 % 2);
    const u64 block = vector / 256;
    const int column_block = static_cast<int>(block % column_blocks);
    const int row_block = static_cast<int>(block / column_blocks);
    const int row = row_block * 64 + row_tile * 16 + lane / 4 + e / 2 % 2 * 8;
    const int column = column_block * 32 + step * 16 + lane % 4 * 2 + e % 2 + e / 4 * 8;
    return {row, column};
}

// The low half of metadata word `word` = (block * 32 + lane) * 4 + row tile; the high half is 8 rows below.
static __device__ __forceinline__ NmPlace nm_metadata_place(u64 word, int column_blocks) {
    const int row_tile = static_cast<int>(word % 4);
    const int lane = static_cast<int>(word / 4 % 32);
    const u64 block = word / 128;
    const int column_block = static_cast<int>(block % column_blocks);
    const int row_block = static_cast<int>(block / column_blocks);
    return {row_block * 64 + row_tile * 16 + lane / 4, column_block * 4 + lane % 4};
}

// 16 bits of indices (8 values) of a row; the padding where the row has none.
static __device__ __forceinline__ u32 nm_indices(const u8* indices, const NmCanonical& shape, int row, int sixteenth) {
    u32 half = 0;
    for (int i = 0; i < 2; ++i) {
        const int byte = 2 * sixteenth + i;
        u32 bits = nm::kPadding << 4 | nm::kPadding;
        if (row < shape.rows and byte < shape.row_bytes) {
            const u32 used = shape.used(byte);
            bits = (indices[static_cast<u64>(row) * shape.row_bytes + byte] & used) | (bits & ~used);
        }
        half |= bits << (8 * i);
    }
    return half;
}

// Threads: one for each 16 bytes of packed values (256 a block of 64 x 64); the first half of them also write metadata.
static __device__ __forceinline__ void nm_pack_vector(const u16* values, const u8* indices, uint4* packed_values,
                                                      u32* metadata, int n, int k) {
    const NmCanonical shape = NmCanonical::of(n, k);
    const int column_blocks = nm::blocks(k);
    const u64 blocks = static_cast<u64>(nm::blocks(n)) * column_blocks;
    const u64 thread = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (thread < blocks * 256) {
        u32 words[4] = {0, 0, 0, 0};
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const NmPlace place = nm_value_place(thread, e, column_blocks);
            if (place.row < n and place.column < shape.kept) {
                const u32 value = values[static_cast<u64>(place.row) * shape.kept + place.column];
                words[e / 2] |= value << (16 * (e % 2));
            }
        }
        packed_values[thread] = make_uint4(words[0], words[1], words[2], words[3]);
    }
    if (thread < blocks * 128) {
        const NmPlace place = nm_metadata_place(thread, column_blocks);
        metadata[thread] = nm_indices(indices, shape, place.row, place.column) |
                           nm_indices(indices, shape, place.row + 8, place.column) << 16;
    }
}

// Threads: one for each value of the canonical weight; those below N * row_bytes also write a byte of indices.
static __device__ __forceinline__ void nm_unpack_value(const u16* packed_values, const u8* metadata, u16* values,
                                                       u8* indices, int n, int k) {
    const NmCanonical shape = NmCanonical::of(n, k);
    const int column_blocks = nm::blocks(k);
    const u64 thread = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (thread < static_cast<u64>(n) * shape.kept) {
        const int row = static_cast<int>(thread / shape.kept);
        const int column = static_cast<int>(thread % shape.kept);
        const u64 block = static_cast<u64>(row / 64) * column_blocks + column / 32;
        const int lane = row % 8 * 4 + column % 8 / 2;
        const u64 vector = ((block * 2 + column / 16 % 2) * 4 + row % 64 / 16) * 32 + lane;
        values[thread] = packed_values[vector * 8 + column / 8 % 2 * 4 + row / 8 % 2 * 2 + column % 2];
    }
    if (thread < static_cast<u64>(n) * shape.row_bytes) {
        const int row = static_cast<int>(thread / shape.row_bytes);
        const int byte = static_cast<int>(thread % shape.row_bytes);
        const u64 block = static_cast<u64>(row / 64) * column_blocks + byte / 8;
        const int lane = row % 8 * 4 + byte / 2 % 4;
        const u64 word = (block * 32 + lane) * 4 + row % 64 / 16;
        indices[thread] = static_cast<u8>(metadata[word * 4 + row / 8 % 2 * 2 + byte % 2] & shape.used(byte));
    }
}

// The dense weight [n, k] again. Threads: one for each 16 bytes of packed values, which are four groups of four columns:
// those of rows g and g + 8, twice.
static __device__ __forceinline__ void nm_decompress_vector(const uint4* packed_values, const u32* metadata, u16* out,
                                                            int n, int k) {
    const int column_blocks = nm::blocks(k);
    const u64 thread = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (thread >= static_cast<u64>(nm::blocks(n)) * column_blocks * 256) return;
    const int lane = static_cast<int>(thread % 32), row_tile = static_cast<int>(thread / 32 % 4);
    const int step = static_cast<int>(thread / 128 % 2);
    const u64 block = thread / 256;
    const int first_row = static_cast<int>(block / column_blocks) * 64 + row_tile * 16 + lane / 4;
    const int first_column = static_cast<int>(block % column_blocks) * 64 + step * 32 + lane % 4 * 4;
    const uint4 values = packed_values[thread];
    const u32 pairs[4] = {values.x, values.y, values.z, values.w};
    const u64 word = (block * 32 + lane / 4 * 4 + step * 2) * 4 + row_tile;
    const u32 words[2] = {metadata[word], metadata[word + 4]};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const int row = first_row + e % 2 * 8;
        const int column = first_column + e / 2 * 16;
        const u32 nibble = words[e / 2] >> (e % 2 * 16 + lane % 4 * 4) & 0xFu;
        const u64 group = static_cast<u64>(pairs[e] & 0xFFFFu) << (16 * (nibble & 3)) |
                          static_cast<u64>(pairs[e] >> 16) << (16 * (nibble >> 2));
        if (row >= n) continue;
        u16* target = out + static_cast<u64>(row) * k + column;
        if (k % 4 == 0) {
            if (column < k)
                *reinterpret_cast<uint2*>(target) = make_uint2(static_cast<u32>(group), static_cast<u32>(group >> 32));
            continue;
        }
        for (int i = 0; i < 4; ++i)
            if (column + i < k) target[i] = static_cast<u16>(group >> (16 * i));
    }
}
