// Many tokens times a 2:4 weight: y [M, N] = x [M, K] W^T + bias.
//
// The weight is the sparse A operand of mma.sp.m16n8k32 (16 output rows), the tokens are its 8 columns. A CTA owns a
// tile of rows x tokens and a slice of K. Its warps stand in a grid of kRowWarps x kTokenWarps, each with 64 rows, and
// kGroups such grids take the 64-column blocks of the slice in turn. Activations come by asynchronous copies into a ring of
// kStages buffers, one of them a round (kGroups blocks), so that one barrier a round is enough. Weights go straight into
// registers, kFragments - 1 blocks ahead; where kFragments is 1, they come through a ring as well, which warps with the
// same rows share. Partial sums meet in split_k.cuh in a fixed order.
//
//     grid   (token blocks * splits, row blocks), token blocks first: CTAs that run together share weights
//     block  kThreads, shared memory kSharedBytes
//     x [M, K], bias [N] or null, out [M, N]: row-major, K a multiple of 8; values and metadata: nm_layout.cuh. All but
//     the bias begin at a multiple of 16 bytes
//     partials: row blocks * token blocks * splits * rows * tokens of a tile floats, 16-byte aligned, unused where
//     splits is 1
//     counters: row blocks * token blocks words, zero before the first launch; every launch leaves them zero
#pragma once

#include "activation_ring.cuh"
#include "nm_fragment.cuh"
#include "nm_layout.cuh"
#include "nm_weight_ring.cuh"
#include "output.cuh"
#include "ptx.cuh"
#include "split_k.cuh"

// kTokenTiles: groups of 8 tokens of a warp.
template <int kRowWarps_, int kTokenWarps_, int kGroups_, int kTokenTiles_, int kStages_, int kFragments_>
struct NmTile {
    static constexpr int kRowWarps = kRowWarps_;
    static constexpr int kTokenWarps = kTokenWarps_;
    static constexpr int kGroups = kGroups_;
    static constexpr int kTokenTiles = kTokenTiles_;
    static constexpr int kStages = kStages_;
    static constexpr int kFragments = kFragments_;
    static constexpr int kThreads = 32 * kRowWarps * kTokenWarps * kGroups;
    static constexpr int kRows = nm::kBlock * kRowWarps;
    static constexpr int kWarpTokens = 8 * kTokenTiles;
    static constexpr int kTokens = kWarpTokens * kTokenWarps;
    static constexpr int kRoundColumns = nm::kBlock * kGroups;
    static_assert(kFragments > 1 or kGroups == 1, "the ring of weights holds one column of blocks a round");
    // As many CTAs a multiprocessor as the registers of eight warps with 64 x 64 accumulators leave.
    static constexpr int kCtas = 256 / kThreads;
};

// The sums of a warp, and the activations they are made of.
template <class T, class Shape>
struct NmGemm {
    using Ring = ActivationRing<T, Shape::kTokens, Shape::kRoundColumns, Shape::kThreads, Shape::kStages>;
    using WeightRing = NmWeightRing<Shape::kRowWarps, Shape::kThreads, Shape::kStages>;
    using Sum = SplitK<Shape::kRows, Shape::kTokens, 1, Shape::kGroups, Shape::kThreads>;
    static constexpr int kRings = Ring::kBytes + (Shape::kFragments == 1 ? WeightRing::kBytes : 0);
    static constexpr int kSharedBytes = kRings > Sum::kBytes ? kRings : Sum::kBytes;

    Ring ring;
    float sums[nm::kRowTiles][Shape::kTokenTiles][4] = {};

    template <int kStep, class Fragment>
    __device__ __forceinline__ void multiply(const Fragment& fragment) {
        fragment.template multiply<T, kStep>(
            sums, [&](u32(&x)[4], int n) { ring.load_fragment(x, n, 32 * kStep); });
    }
};

// A slice of K, as a warp sees it that loads its blocks straight into registers.
template <class T, class Shape>
struct NmSliceOfRegisters {
    NmGemm<T, Shape>& gemm;
    NmMatrix block;  // the one to be loaded next
    int left;        // blocks from this warp's current one to the end of the slice; every kGroups-th is this warp's

    __device__ __forceinline__ bool has(int round) const { return left > round * Shape::kGroups; }

    // Multiplies this round, for which `now` was loaded, while the blocks and the activations behind it are on their
    // way. The second half of `later` takes the registers that the first half of `now` leaves.
    __device__ __forceinline__ void advance(const NmFragment& now, NmFragment& later) {
        const bool more = has(Shape::kFragments - 1);
        if (more) later.load_first_half(block);
        gemm.ring.wait();
        gemm.ring.start_copy();
        if (has(0)) gemm.template multiply<0>(now);
        if (more) later.load_second_half(block);
        if (has(0)) gemm.template multiply<1>(now);
        block = block.after(Shape::kGroups);
        gemm.ring.next_round();
        left -= Shape::kGroups;
    }

    __device__ __forceinline__ void run(int rounds) {
        NmFragment fragments[Shape::kFragments];
#pragma unroll
        for (int round = 0; round < Shape::kFragments - 1; ++round) {
            if (has(round)) {
                fragments[round].load_first_half(block);
                fragments[round].load_second_half(block);
            }
            block = block.after(Shape::kGroups);
        }
#pragma unroll 1
        for (int stage = 0; stage < Shape::kStages - 1; ++stage) gemm.ring.start_copy();
#pragma unroll 1
        while (rounds > 0)
#pragma unroll
            for (int i = 0; i < Shape::kFragments; ++i) {
                if (rounds-- == 0) return;
                advance(fragments[i], fragments[(i + Shape::kFragments - 1) % Shape::kFragments]);
            }
    }
};

// The same for a warp that shares its blocks with others, through shared memory.
template <class T, class Shape>
struct NmSliceOfShared {
    NmGemm<T, Shape>& gemm;
    typename NmGemm<T, Shape>::WeightRing weights;

    __device__ __forceinline__ void start_copy() {
        weights.start_copy();
        gemm.ring.start_copy();  // commits both
    }

    __device__ __forceinline__ void run(int rounds) {
#pragma unroll 1
        for (int stage = 0; stage < Shape::kStages - 1; ++stage) start_copy();
#pragma unroll 1
        for (; rounds > 0; --rounds) {
            NmFragment fragment;
            gemm.ring.wait();
            weights.load_fragment(fragment);
            start_copy();
            gemm.template multiply<0>(fragment);
            gemm.template multiply<1>(fragment);
            weights.next_round();
            gemm.ring.next_round();
        }
    }
};

template <class T, class Shape>
static __device__ __forceinline__ void nm_gemm(NmMatrix weight, const T* x, const T* bias, T* out, float4* partials,
                                               u32* counters, int n, int k, int m, int splits) {
    using Gemm = NmGemm<T, Shape>;
    using Sum = typename Gemm::Sum;

    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int token_warp = warp % Shape::kTokenWarps;
    const int row_warp = warp / Shape::kTokenWarps % Shape::kRowWarps;
    const int group = warp / (Shape::kTokenWarps * Shape::kRowWarps);
    const int token_blocks = static_cast<int>(gridDim.x) / splits;
    const int token_block = static_cast<int>(blockIdx.x) % token_blocks;
    const int split = static_cast<int>(blockIdx.x) / token_blocks;
    const int first_token = token_block * Shape::kTokens;
    const int tokens = m - first_token < Shape::kTokens ? m - first_token : Shape::kTokens;
    const int blocks = nm::blocks(k);
    u8* shared = ptx::dynamic_shared();

    // Multiply. Beyond the weight's last block of rows that block is read once more: nothing else is there.
    const int first = static_cast<int>(static_cast<long long>(blocks) * split / splits);
    const int end = static_cast<int>(static_cast<long long>(blocks) * (split + 1) / splits);
    const int rounds = (end - first + Shape::kGroups - 1) / Shape::kGroups;
    const int first_row = static_cast<int>(blockIdx.y) * Shape::kRowWarps;
    const int last_row = nm::blocks(n) - 1 - first_row;
    Gemm gemm{{shared, x + static_cast<u64>(first_token) * k, tokens, k, first * nm::kBlock, end * nm::kBlock,
               token_warp * Shape::kWarpTokens, group * nm::kBlock}};
    if constexpr (Shape::kFragments == 1) {
        const u64 corner = static_cast<u64>(first_row) * blocks + first;
        NmSliceOfShared<T, Shape> slice{
            gemm, {shared + Gemm::Ring::kBytes, weight, corner, blocks, rounds, last_row, row_warp}};
        slice.run(rounds);
    } else {
        const int row = first_row + (row_warp < last_row ? row_warp : last_row);
        const u64 corner = static_cast<u64>(row) * blocks + first + group;
        NmSliceOfRegisters<T, Shape> slice{gemm, weight.after(corner, threadIdx.x % 32), end - first - group};
        slice.run(rounds);
    }

    // Sum the groups, then the splits
    ptx::cp_async_wait<0>();
    ptx::sync_cta();
    float* deposits = reinterpret_cast<float*>(shared);
    Sum::deposit(deposits, gemm.sums, group, row_warp * nm::kBlock, token_warp * Shape::kWarpTokens);
    ptx::sync_cta();
    const u64 tile = static_cast<u64>(blockIdx.y) * token_blocks + token_block;
    float4* parts = partials + tile * splits * Sum::kQuads;
    if (splits > 1 and not Sum::publish(deposits, parts, counters + tile, split, splits, tokens)) return;

    // Store
    Sum::finish(deposits, parts, splits, tokens, [&](int q, float4 (&sum)[1]) {
        const int row = static_cast<int>(blockIdx.y) * Shape::kRows + q % Sum::kRowQuads * 4;
        if (row >= n) return;
        add_bias(sum[0], bias, row, n);
        store_rows(out, sum[0], static_cast<u64>(first_token) + q / Sum::kRowQuads, row, n);
    });
}
