// Sums of partial results in a fixed order: the warps of a CTA through shared memory, the CTAs of a row block through a
// workspace. The result does not depend on which warp or CTA finishes first: it is the same, bit for bit, in every run.
#pragma once

#include "ptx.cuh"

// kWarps warps each hold 64 rows x kTokens tokens in mma accumulators; each kGroups of them belong to one matrix.
// Element e of the result is token e / 64, row e % 64.
template <int kTokens, int kMatrices, int kGroups>
struct SplitK {
    static constexpr int kRows = 64;
    static constexpr int kElements = kTokens * kRows;
    static constexpr int kWarps = kMatrices * kGroups;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kStride = kRows + 4;  // of a token, in floats: lanes 4g + t then write banks 8t + g
    static constexpr int kBytes = kWarps * kTokens * kStride * static_cast<int>(sizeof(float));

    // Accumulators of m16 tile m and n8 tile n, into this warp's part of shared memory.
    static __device__ __forceinline__ void deposit(float* shared, const float (&c)[4][kTokens / 8][4]) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        float* mine = shared + static_cast<int>(threadIdx.x) / 32 * kTokens * kStride;
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int token = 8 * n + 2 * (lane % 4) + i % 2;
                    const int row = 16 * m + lane / 4 + 8 * (i / 2);
                    ptx::store_shared(mine + token * kStride + row, c[m][n][i]);
                }
    }

    // The sum of element e over the warps of `matrix`, first warp first.
    static __device__ __forceinline__ float cta_sum(const float* shared, int matrix, int e) {
        const float* first = shared + (matrix * kGroups * kTokens + e / kRows) * kStride + e % kRows;
        float sum = 0;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) sum += ptx::load_shared(first + group * kTokens * kStride);
        return sum;
    }

    // Publishes this CTA's sums as part `split` of `splits`; true in the CTA that comes last, for all its threads.
    static __device__ __forceinline__ bool publish(float* shared, float* partials, u32* counter, int split, int splits,
                                                   int tokens) {
#pragma unroll 1
        for (int matrix = 0; matrix < kMatrices; ++matrix)
            for (int e = static_cast<int>(threadIdx.x); e < tokens * kRows; e += kThreads)
                ptx::store_partial(partials + (split * kMatrices + matrix) * kElements + e, cta_sum(shared, matrix, e));
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

    // The sum of element e over the parts, part 0 first.
    static __device__ __forceinline__ float device_sum(const float* partials, int splits, int matrix, int e) {
        float sum = 0;
#pragma unroll 4
        for (int split = 0; split < splits; ++split)
            sum += ptx::load_partial(partials + (split * kMatrices + matrix) * kElements + e);
        return sum;
    }
};
