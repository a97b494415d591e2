// Sums of partial results in a fixed order: the warps of a CTA through shared memory, the CTAs of a tile through a
// workspace. The result does not depend on which warp or CTA finishes first: it is the same, bit for bit, in every run.
#pragma once

#include "ptx.cuh"

// A CTA owns a tile of kOutputRows x kTokens of each of kMatrices products; kGroups groups of its warps share K. Sums
// are moved as quads: four rows of one token. Quad q of the tile is token q / kRowQuads, rows from 4 (q % kRowQuads).
template <int kOutputRows, int kTokens, int kMatrices, int kGroups, int kThreads>
struct SplitK {
    static constexpr int kRows = kOutputRows;
    static constexpr int kRowQuads = kRows / 4;
    static constexpr int kQuads = kTokens * kRowQuads;
    static constexpr int kStride = kRows + 4;  // of a token, in floats: lanes 4g + t then write banks 8t + g
    static constexpr int kSlab = kTokens * kStride;
    static constexpr int kBytes = kMatrices * kGroups * kSlab * static_cast<int>(sizeof(float));
    static_assert(kStride % 32 == 4, "deposits meet no bank conflict");

    // Quads a thread sums at once: their loads wait together, not one after the other.
    static constexpr int kAtOnce = kQuads < 4 * kThreads ? (kQuads + kThreads - 1) / kThreads : 4;

    // Accumulators of m16 tile m and n8 tile n, which begin at `row` and `token` of the tile, into part `slab` (matrix *
    // kGroups + group) of shared memory.
    template <int kTokenTiles>
    static __device__ __forceinline__ void deposit(float* shared, const float (&c)[4][kTokenTiles][4], int slab,
                                                   int row, int token) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        float* mine = shared + slab * kSlab + (token + 2 * (lane % 4)) * kStride + row + lane / 4;
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int n = 0; n < kTokenTiles; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    ptx::store_shared(mine + (8 * n + i % 2) * kStride + 16 * m + 8 * (i / 2), c[m][n][i]);
    }

    // Quad q, summed over the groups of `matrix`, first group first.
    static __device__ __forceinline__ float4 cta_sum(const float* shared, int matrix, int q) {
        const float* first = shared + matrix * kGroups * kSlab + q / kRowQuads * kStride + q % kRowQuads * 4;
        float4 sum = ptx::load_shared(reinterpret_cast<const float4*>(first));
#pragma unroll
        for (int group = 1; group < kGroups; ++group)
            sum = plus(sum, ptx::load_shared(reinterpret_cast<const float4*>(first + group * kSlab)));
        return sum;
    }

    // Publishes this CTA's sums as part `split` of `splits`; true in the CTA that comes last, for all its threads.
    static __device__ __forceinline__ bool publish(float* shared, float4* partials, u32* counter, int split, int splits,
                                                   int tokens) {
#pragma unroll 1
        for (int matrix = 0; matrix < kMatrices; ++matrix)
            for (int q = static_cast<int>(threadIdx.x); q < tokens * kRowQuads; q += kThreads)
                ptx::store_partials(partials + (split * kMatrices + matrix) * kQuads + q, cta_sum(shared, matrix, q));
        ptx::fence_device();
        ptx::sync_cta();
        u32* arrived = reinterpret_cast<u32*>(shared);
        if (threadIdx.x == 0) {
            const u32 last = static_cast<u32>(splits) - 1;
            ptx::store_shared(arrived, ptx::atomic_increment_wrap(counter, last));
        }
        ptx::sync_cta();
        ptx::fence_device();
        return ptx::load_shared(arrived) == static_cast<u32>(splits) - 1;
    }

    // The quads first, first + kThreads, ... of the product with `matrix`, summed over the parts, part 0 first.
    static __device__ __forceinline__ void device_sum(float4 (&sums)[kAtOnce], const float4* partials, int splits,
                                                      int matrix, int first, int end) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) sums[i] = make_float4(0, 0, 0, 0);
#pragma unroll 4
        for (int split = 0; split < splits; ++split)
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int q = first + i * kThreads;
                if (q < end)
                    sums[i] = plus(sums[i], ptx::load_partials(partials + (split * kMatrices + matrix) * kQuads + q));
            }
    }

    // The same quads, summed over the groups.
    static __device__ __forceinline__ void cta_sums(float4 (&sums)[kAtOnce], const float* shared, int matrix, int first,
                                                    int end) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int q = first + i * kThreads;
            if (q < end) sums[i] = cta_sum(shared, matrix, q);
        }
    }

    // Calls store(q, sums) for every quad of the first `tokens` tokens, with one sum for each matrix. `shared` holds the
    // deposits; `partials`, where splits is more than 1, all parts.
    template <class Store>
    static __device__ __forceinline__ void finish(const float* shared, const float4* partials, int splits, int tokens,
                                                  const Store& store) {
        const int end = tokens * kRowQuads;
        for (int first = static_cast<int>(threadIdx.x); first < end; first += kAtOnce * kThreads) {
            float4 sums[kMatrices][kAtOnce];
#pragma unroll
            for (int matrix = 0; matrix < kMatrices; ++matrix)
                if (splits > 1)
                    device_sum(sums[matrix], partials, splits, matrix, first, end);
                else
                    cta_sums(sums[matrix], shared, matrix, first, end);
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int q = first + i * kThreads;
                if (q >= end) break;
                float4 sum[kMatrices];
#pragma unroll
                for (int matrix = 0; matrix < kMatrices; ++matrix) sum[matrix] = sums[matrix][i];
                store(q, sum);
            }
        }
    }

  private:
    static __device__ __forceinline__ float4 plus(const float4& a, const float4& b) {
        return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
    }
};
