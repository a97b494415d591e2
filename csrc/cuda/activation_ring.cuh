// A ring of tiles of activations (activations.cuh) that asynchronous copies fill several rounds ahead: what a CTA with
// many tokens reads. Each thread keeps where its share of the next copy comes from; tokens and columns that do not exist
// become zero.
#pragma once

#include "activations.cuh"
#include "ptx.cuh"

template <class T, int kTokens, int kColumns, int kThreads, int kStages>
struct ActivationRing {
    using Tile = ActivationTile<T, kTokens, kColumns, kThreads>;
    static constexpr int kBytes = kStages * Tile::kBytes;
    static constexpr int kCopies = kTokens / Tile::kTokenStep;  // of 16 bytes, by each thread for one tile
    static_assert(kTokens % Tile::kTokenStep == 0, "every thread copies as much");

    const T* source;         // this thread's next columns of its first token
    int stride;              // of x, in elements
    int tokens_left;         // from its first token on
    int columns_left;        // from its next columns on
    ptx::SharedAddress end;  // of the ring
    ptx::SharedAddress write, read;  // this thread's place in the tile to be filled next, this lane's in the current one

    // For columns [first, last) of `tokens` tokens of x, from which the first one is read in rows of `stride`; the warp
    // multiplies the tokens of a tile from `warp_token` on and its columns from `warp_column` on.
    __device__ __forceinline__ ActivationRing(u8* shared, const T* x, int tokens, int stride_, int first, int last,
                                              int warp_token, int warp_column)
        : stride(stride_) {
        const int thread = static_cast<int>(threadIdx.x);
        const int token = thread / Tile::kVectors;
        const int vector = thread % Tile::kVectors;
        const ptx::SharedAddress begin = ptx::shared_address(shared);
        source = x + static_cast<u64>(token) * stride + first + vector * Tile::kVector;
        tokens_left = tokens - token;
        columns_left = (last < stride ? last : stride) - first - vector * Tile::kVector;
        end = begin + kBytes;
        write = begin + token * Tile::kRowBytes + vector * 16;
        read = begin + (warp_token + thread % 8) * Tile::kRowBytes + (warp_column + thread % 32 / 8 * 8) * 2;
    }

    // Starts to copy the next round, as one group; rounds beyond the last column copy nothing but zeros.
    __device__ __forceinline__ void start_copy() {
        const bool wanted = columns_left > 0;
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
            const int token = i * Tile::kTokenStep;
            ptx::cp_async_16(write + token * Tile::kRowBytes, source + static_cast<long long>(stride) * token,
                             wanted and token < tokens_left ? 16 : 0);
        }
        ptx::cp_async_commit();
        source += kColumns;
        columns_left -= kColumns;
        write = after(write);
    }

    // Waits until this round's tile is complete for all threads, and all have left the one that is filled next.
    __device__ __forceinline__ void wait() const {
        ptx::cp_async_wait<kStages - 2>();
        ptx::sync_cta();
    }

    __device__ __forceinline__ void next_round() { read = after(read); }

    // b[i] = x[8 token_tile + g][column + 8i + 2t .. + 1], counted from the warp's token and column.
    __device__ __forceinline__ void load_fragment(u32 (&b)[4], int token_tile, int column) const {
        ptx::ldmatrix_x4(b, read + 8 * token_tile * Tile::kRowBytes + 2 * column);
    }

  private:
    __device__ __forceinline__ ptx::SharedAddress after(ptx::SharedAddress address) const {
        address += Tile::kBytes;
        return address < end ? address : address - kBytes;
    }
};
