// A ring of blocks of a 2:4 weight in shared memory, for CTAs in which several warps multiply the same block: each round
// is one column of kRowBlocks blocks, copied asynchronously several rounds ahead. A block stays in fragment order, so
// that a lane's 16 bytes lie beside its neighbour's: no bank conflict.
#pragma once

#include "nm_fragment.cuh"
#include "nm_layout.cuh"
#include "ptx.cuh"

template <int kRowBlocks, int kThreads, int kStages>
struct NmWeightRing {
    static constexpr int kVectors = nm::kLoads * nm::kLanes;  // of values in a block, 16 bytes each
    static constexpr int kBlockBytes = 16 * (kVectors + nm::kLanes);
    static constexpr int kTileBytes = kRowBlocks * kBlockBytes;
    static constexpr int kBytes = kStages * kTileBytes;
    static_assert(kVectors % kThreads == 0, "at each copy all threads are in the same block");
    static_assert(kRowBlocks * nm::kLanes <= kThreads, "a thread copies one vector of metadata at most");

    const uint4* values;    // this thread's first vector of the next round
    const uint4* metadata;  // this thread's
    u64 row_stride;         // vectors of values from a block to the one below it
    int last_block;         // the last one below the first that exists; beyond it, it is copied again
    int rounds_left;
    ptx::SharedAddress end;
    ptx::SharedAddress write, read;  // the tile to be filled next; this lane's place in this warp's block

    // For `rounds` columns of blocks from the first block on; the matrix has `blocks` of them in a row.
    __device__ __forceinline__ NmWeightRing(u8* shared, const NmMatrix& weight, u64 first, int blocks, int rounds,
                                            int last_block_, int warp_block)
        : last_block(last_block_), rounds_left(rounds) {
        const int thread = static_cast<int>(threadIdx.x);
        const ptx::SharedAddress begin = ptx::shared_address(shared);
        const int mine = thread / nm::kLanes < last_block ? thread / nm::kLanes : last_block;
        values = weight.values + first * kVectors + thread;
        metadata = weight.metadata + (first + static_cast<u64>(mine) * blocks) * nm::kLanes + thread % nm::kLanes;
        row_stride = static_cast<u64>(blocks) * kVectors;
        end = begin + kBytes;
        write = begin;
        read = begin + warp_block * kBlockBytes + thread % nm::kLanes * 16;
    }

    // Starts to copy the next round, as part of the next group that is committed; beyond the last, nothing.
    __device__ __forceinline__ void start_copy() {
        const int thread = static_cast<int>(threadIdx.x);
        if (rounds_left > 0) {
#pragma unroll
            for (int i = 0; i < kRowBlocks * kVectors; i += kThreads) {
                const int block = i / kVectors, vector = i % kVectors;
                const u64 existing = block < last_block ? block : last_block;
                ptx::cp_async_16(write + block * kBlockBytes + (thread + vector) * 16,
                                 values + existing * row_stride + vector, 16);
            }
            if (thread < kRowBlocks * nm::kLanes)
                ptx::cp_async_16(write + thread / nm::kLanes * kBlockBytes + (kVectors + thread % nm::kLanes) * 16,
                                 metadata, 16);
        }
        values += kVectors;
        metadata += nm::kLanes;
        --rounds_left;
        write = after(write);
    }

    __device__ __forceinline__ void next_round() { read = after(read); }

    // This round's block of this warp.
    __device__ __forceinline__ void load_fragment(NmFragment& fragment) const {
        fragment.metadata = ptx::load_shared_128(read + kVectors * 16);
#pragma unroll
        for (int i = 0; i < nm::kLoads; ++i) fragment.values[i] = ptx::load_shared_128(read + i * nm::kLanes * 16);
    }

  private:
    __device__ __forceinline__ ptx::SharedAddress after(ptx::SharedAddress address) const {
        address += kTileBytes;
        return address < end ? address : address - kBytes;
    }
};
