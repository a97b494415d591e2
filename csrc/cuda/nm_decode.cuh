// Decode with a 2:4 weight: y [M, N] = x [M, K] W^T + bias, or silu(x G^T + bias_g) * (x U^T + bias_u) for a pair G, U.
//
// The weight is the sparse A operand of mma.sp.m16n8k32 (16 output rows), the tokens are its 8 columns. A CTA owns 64
// rows, up to 8 * kTokenTiles tokens and a slice of K; its 8 warps take the 64 x 64 blocks of the slice in turn (of a
// pair, 4 warps take G and 4 take U). Each warp loads a block straight into registers with nine 16-byte loads a lane,
// the next block while it multiplies the current one; the CTA stages the activations of one round (8 blocks, or 4) in
// shared memory while it multiplies the round before. Partial sums meet in split_k.cuh in a fixed order.
//
//     grid   (splits * token blocks, row blocks), block 256 threads, shared memory kSharedBytes
//     x [M, K], bias [N] or null, out [M, N]: row-major; values and metadata: nm_layout.cuh, 16-byte aligned
//     partials: row blocks * token blocks * splits * matrices * 8 * kTokenTiles * 64 floats, 16-byte aligned, unused
//     where splits is 1
//     counters: row blocks * token blocks words, zero before the first launch; every launch leaves them zero
#pragma once

#include "activations.cuh"
#include "nm_fragment.cuh"
#include "nm_layout.cuh"
#include "output.cuh"
#include "ptx.cuh"
#include "split_k.cuh"

constexpr int kNmDecodeWarps = 8;

template <class T, int kTokenTiles, int kMatrices>
struct NmDecode {
    static constexpr int kTokens = 8 * kTokenTiles;
    static constexpr int kGroups = kNmDecodeWarps / kMatrices;  // warps that share a matrix
    static constexpr int kThreads = 32 * kNmDecodeWarps;
    static constexpr int kRoundColumns = nm::kBlock * kGroups;
    using Tile = ActivationTile<T, kTokens, kRoundColumns, kThreads>;
    using Sum = SplitK<nm::kBlock, kTokens, kMatrices, kGroups, kThreads>;
    static constexpr int kSharedBytes = 2 * Tile::kBytes > Sum::kBytes ? 2 * Tile::kBytes : Sum::kBytes;

    float sums[nm::kRowTiles][kTokenTiles][4] = {};

    static __device__ __forceinline__ float silu(float value) {
        constexpr float kLog2E = 1.4426950408889634f;
        return value / (1.0f + ptx::exp2_approx(-kLog2E * value));
    }

    static __device__ __forceinline__ float4 swiglu(const float4& gate, const float4& up) {
        return make_float4(silu(gate.x) * up.x, silu(gate.y) * up.y, silu(gate.z) * up.z, silu(gate.w) * up.w);
    }
};

// What is left of a CTA's slice of K: the blocks [first, end) of its row of blocks. A round takes kGroups of them, this
// warp the one with number `group`.
template <class T, int kTokenTiles, int kMatrices>
struct NmSlice {
    using Decode = NmDecode<T, kTokenTiles, kMatrices>;
    using Tile = typename Decode::Tile;

    NmMatrix block;  // the one this warp loads next
    int first, end, group;
    const T* x;
    int tokens, k;
    u8* tiles;  // activations: of this round and of the next

    __device__ __forceinline__ bool has(int round) const { return first + round * Decode::kGroups + group < end; }

    // Starts to copy the activations of a round, counted from this one, into the tile of that parity.
    __device__ __forceinline__ void stage(int round, int parity) const {
        const int begin = first + round * Decode::kGroups;
        if (begin >= end) return;
        const int last = begin + Decode::kGroups < end ? begin + Decode::kGroups : end;
        Tile::start_copy(tiles + parity * Tile::kBytes, x, tokens, k, begin * nm::kBlock, last * nm::kBlock);
    }

    // Step kStep of the block, whose first column in the tile is `column`.
    template <int kStep>
    static __device__ __forceinline__ void multiply(Decode& decode, const NmFragment& current, const u8* tile,
                                                    int column) {
        current.template multiply<T, kStep>(
            decode.sums, [&](u32(&x)[4], int n) { Tile::load_fragment(x, tile, n, column); });
    }

    __device__ __forceinline__ void next_round() {
        block = block.after(Decode::kGroups);
        first += Decode::kGroups;
    }

    // Multiplies this round, for which `current` was loaded, while `next` and the next activations are on their way.
    // The second half of `next` takes the registers that the first half of `current` leaves.
    template <int kParity>
    __device__ __forceinline__ void advance(Decode& decode, const NmFragment& current, NmFragment& next) {
        if (has(1)) next.load_first_half(block);
        ptx::cp_async_wait<0>();
        ptx::sync_cta();
        stage(1, 1 - kParity);
        if (has(0)) {
            const u8* tile = tiles + kParity * Tile::kBytes;
            multiply<0>(decode, current, tile, group * nm::kBlock);
            if (has(1)) next.load_second_half(block);
            multiply<1>(decode, current, tile, group * nm::kBlock + 32);
        }
        next_round();
    }

    // Multiplies all of it.
    __device__ __forceinline__ void run(Decode& decode) {
        NmFragment even, odd;
        if (has(0)) {
            even.load_first_half(block);
            even.load_second_half(block);
        }
        block = block.after(Decode::kGroups);
        stage(0, 0);
        Tile::clear_missing(tiles, tokens);
        Tile::clear_missing(tiles + Tile::kBytes, tokens);
        while (first < end) {
            advance<0>(decode, even, odd);
            if (first < end) advance<1>(decode, odd, even);
        }
    }

    // The same for activations that 16-byte copies cannot read (K no multiple of 8): one thing after the other.
    __device__ __forceinline__ void run_unaligned(Decode& decode) {
        Tile::clear_missing(tiles, tokens);
        for (; first < end; next_round()) {
            const int last = first + Decode::kGroups < end ? first + Decode::kGroups : end;
            ptx::sync_cta();
            Tile::copy_elements(tiles, x, tokens, k, first * nm::kBlock, last * nm::kBlock);
            ptx::sync_cta();
            if (not has(0)) continue;
            NmFragment current;
            current.load_first_half(block);
            current.load_second_half(block);
            multiply<0>(decode, current, tiles, group * nm::kBlock);
            multiply<1>(decode, current, tiles, group * nm::kBlock + 32);
        }
    }
};

// `up` is used where kMatrices is 2 only; then `weight` is the gate.
template <class T, int kTokenTiles, int kMatrices>
static __device__ __forceinline__ void nm_decode(NmMatrix weight, NmMatrix up, const T* x, const T* bias,
                                                 const T* up_bias, T* out, float4* partials, u32* counters, int n,
                                                 int k, int m, int splits) {
    using Decode = NmDecode<T, kTokenTiles, kMatrices>;
    using Sum = typename Decode::Sum;

    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int split = static_cast<int>(blockIdx.x) % splits;
    const int token_block = static_cast<int>(blockIdx.x) / splits;
    const int row_block = static_cast<int>(blockIdx.y);
    const int first_token = token_block * Decode::kTokens;
    const int tokens = m - first_token < Decode::kTokens ? m - first_token : Decode::kTokens;
    const int blocks = nm::blocks(k);
    u8* shared = ptx::dynamic_shared();

    // Multiply
    const int first = static_cast<int>(static_cast<long long>(blocks) * split / splits);
    const int end = static_cast<int>(static_cast<long long>(blocks) * (split + 1) / splits);
    const int group = warp % Decode::kGroups;
    const u64 first_block = static_cast<u64>(row_block) * blocks + first + group;
    const NmMatrix mine = kMatrices == 2 and warp >= Decode::kGroups ? up : weight;
    const NmMatrix block = mine.after(first_block, threadIdx.x % 32);
    const T* tokens_x = x + static_cast<u64>(first_token) * k;
    NmSlice<T, kTokenTiles, kMatrices> slice{block, first, end, group, tokens_x, tokens, k, shared};
    Decode decode;
    if (Decode::Tile::is_aligned(tokens_x, k))
        slice.run(decode);
    else
        slice.run_unaligned(decode);

    // Sum the warps, then the splits
    ptx::cp_async_wait<0>();
    ptx::sync_cta();
    float* deposits = reinterpret_cast<float*>(shared);
    Sum::deposit(deposits, decode.sums, warp, 0, 0);
    ptx::sync_cta();
    const u64 tile = static_cast<u64>(row_block) * (gridDim.x / splits) + token_block;
    float4* parts = partials + tile * splits * kMatrices * Sum::kQuads;
    if (splits > 1 and not Sum::publish(deposits, parts, counters + tile, split, splits, tokens)) return;

    // Store
    Sum::finish(deposits, parts, splits, tokens, [&](int q, float4 (&sum)[kMatrices]) {
        const int row = row_block * nm::kBlock + q % Sum::kRowQuads * 4;
        if (row >= n) return;
        add_bias(sum[0], bias, row, n);
        if constexpr (kMatrices == 2) {
            add_bias(sum[1], up_bias, row, n);
            sum[0] = Decode::swiglu(sum[0], sum[1]);
        }
        store_rows(out, sum[0], static_cast<u64>(first_token) + q / Sum::kRowQuads, row, n);
    });
}
