// One 64 x 64 block of a 2:4 weight in the registers of a warp, and its product with a tile of activations.
#pragma once

#include "nm_layout.cuh"
#include "ptx.cuh"

// Fragment-ordered blocks; a warp's pointers are those of the lane in the block it loads next.
struct NmMatrix {
    const uint4* values;
    const uint4* metadata;

    __device__ __forceinline__ NmMatrix after(u64 blocks, int lane = 0) const {
        return {values + blocks * nm::kLoads * nm::kLanes + lane, metadata + blocks * nm::kLanes + lane};
    }
};

// The block as a lane holds it.
struct NmFragment {
    uint4 values[nm::kLoads];
    uint4 metadata;

    __device__ __forceinline__ void load_first_half(const NmMatrix& block) {
        metadata = ptx::load_stream_128(block.metadata);
        load_values<0>(block);
    }

    __device__ __forceinline__ void load_second_half(const NmMatrix& block) { load_values<1>(block); }

    // sums += step kStep of the block (32 columns) times x: load(b, n) gives the operand of the step for 8 tokens.
    template <class T, int kStep, int kTokenTiles, class Load>
    __device__ __forceinline__ void multiply(float (&sums)[nm::kRowTiles][kTokenTiles][4], const Load& load) const {
        const uint4* step = values + kStep * nm::kRowTiles;
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
            u32 x[4];
            load(x, n);
            ptx::mma_sp_m16n8k32<T, kStep>(sums[0][n], step[0], x, metadata.x);
            ptx::mma_sp_m16n8k32<T, kStep>(sums[1][n], step[1], x, metadata.y);
            ptx::mma_sp_m16n8k32<T, kStep>(sums[2][n], step[2], x, metadata.z);
            ptx::mma_sp_m16n8k32<T, kStep>(sums[3][n], step[3], x, metadata.w);
        }
    }

  private:
    template <int kStep>
    __device__ __forceinline__ void load_values(const NmMatrix& block) {
#pragma unroll
        for (int i = kStep * nm::kRowTiles; i < (kStep + 1) * nm::kRowTiles; ++i)
            values[i] = ptx::load_stream_128(block.values + i * nm::kLanes);
    }
};
