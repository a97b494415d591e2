// Activations x [M, K] in shared memory, as the K x 8 operand of the tensor cores reads them.
//
// A tile holds kTokens tokens of kColumns columns: one row a token, columns contiguous, each row 16 bytes longer than
// its data. Rows then start in different banks, so that ldmatrix (8 rows of 16 bytes a phase) meets no bank conflict.
#pragma once

#include "ptx.cuh"

template <class T, int kTokens, int kColumns, int kThreads>
struct ActivationTile {
    static constexpr int kVector = 8;  // elements in 16 bytes
    static constexpr int kVectors = kColumns / kVector;
    static constexpr int kRowVectors = kVectors + 1;
    static constexpr int kTokenStep = kThreads / kVectors;
    static constexpr int kRowBytes = 16 * kRowVectors;
    static constexpr int kBytes = kTokens * kRowBytes;
    static_assert(kThreads % kVectors == 0, "the threads copy whole rows");

    // Zeroes the rows of the tokens that do not exist; copies never write them.
    static __device__ __forceinline__ void clear_missing(u8* tile, int tokens) {
        for (int first = tokens * kRowVectors; first < kTokens * kRowVectors; first += kThreads) {
            const int i = first + static_cast<int>(threadIdx.x);
            if (i < kTokens * kRowVectors)
                ptx::store_shared(reinterpret_cast<uint4*>(tile) + i, make_uint4(0, 0, 0, 0));
        }
    }

    // Whether every row of x (of `stride` elements) can be read by 16-byte copies.
    static __device__ __forceinline__ bool is_aligned(const T* x, int stride) {
        return stride % kVector == 0 and reinterpret_cast<u64>(x) % 16 == 0;
    }

    // Starts to copy columns [first, last) of `tokens` tokens of an aligned x (which points at the first one), as one
    // group of asynchronous copies. last - first is at most kColumns and a multiple of 8; columns at or beyond `stride`
    // become zero. A thread copies the same 8 columns of every kTokenStep-th token.
    static __device__ __forceinline__ void start_copy(u8* tile, const T* x, int tokens, int stride, int first,
                                                      int last) {
        const int vector = static_cast<int>(threadIdx.x) % kVectors;
        const int column = first + vector * kVector;
        const int bytes = column < stride ? 16 : 0;
        const T* source = x + (bytes > 0 ? column : 0);
#pragma unroll 1
        for (int token = static_cast<int>(threadIdx.x) / kVectors; token < tokens; token += kTokenStep)
            if (column < last)
                ptx::cp_async_16(tile + token * kRowBytes + vector * 16, source + static_cast<u64>(token) * stride,
                                 bytes);
        ptx::cp_async_commit();
    }

    // The same for any x, element by element, without asynchronous copies.
    static __device__ __forceinline__ void copy_elements(u8* tile, const T* x, int tokens, int stride, int first,
                                                         int last) {
#pragma unroll 1
        for (int begin = 0; begin < last - first; begin += kThreads) {
            const int column = begin + static_cast<int>(threadIdx.x);
            const T* source = x + first + column;
            u16* target = reinterpret_cast<u16*>(tile) + column;
#pragma unroll 1
            for (int left = tokens; left > 0; --left) {
                u16 bits = 0;
                if (first + column < stride) bits = ptx::load_constant(source).bits;
                if (first + column < last) ptx::store_shared(target, bits);
                source += stride;
                target += kRowBytes / sizeof(u16);
            }
        }
    }

    // b[i] = x[8 token_tile + g][column + 8i + 2t .. + 1]: the operand of 32 columns and 8 tokens.
    static __device__ __forceinline__ void load_fragment(u32 (&b)[4], const u8* tile, int token_tile, int column) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const int token = 8 * token_tile + lane % 8;
        ptx::ldmatrix_x4(b, tile + token * kRowBytes + (column + lane / 8 * kVector) * static_cast<int>(sizeof(T)));
    }
};
