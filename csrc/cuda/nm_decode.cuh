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
//     partials: row blocks * token blocks * splits * matrices * 8 * kTokenTiles * 64 floats, unused where splits is 1
//     counters: row blocks * token blocks words, zero before the first launch; every launch leaves them zero
#pragma once

#include "activations.cuh"
#include "nm_layout.cuh"
#include "ptx.cuh"
#include "split_k.cuh"

constexpr int kNmDecodeWarps = 8;

// Fragment-ordered blocks; a warp's pointers are those of the lane in the block it loads next.
struct NmMatrix {
    const uint4* values;
    const uint4* metadata;

    __device__ __forceinline__ NmMatrix after(u64 blocks, int lane = 0) const {
        return {values + blocks * nm::kLoads * nm::kLanes + lane, metadata + blocks * nm::kLanes + lane};
    }
};

// One 64 x 64 block of weights as a lane holds it.
struct NmFragment {
    uint4 values[nm::kLoads];
    uint4 metadata;

    __device__ __forceinline__ void load_first_half(const NmMatrix& block) {
        metadata = ptx::load_stream_128(block.metadata);
        load_values<0>(block);
    }

    __device__ __forceinline__ void load_second_half(const NmMatrix& block) { load_values<1>(block); }

  private:
    template <int kStep>
    __device__ __forceinline__ void load_values(const NmMatrix& block) {
#pragma unroll
        for (int i = kStep * nm::kRowTiles; i < (kStep + 1) * nm::kRowTiles; ++i)
            values[i] = ptx::load_stream_128(block.values + i * nm::kLanes);
    }
};

template <class T, int kTokenTiles, int kMatrices>
struct NmDecode {
    static constexpr int kTokens = 8 * kTokenTiles;
    static constexpr int kGroups = kNmDecodeWarps / kMatrices;  // warps that share a matrix
    static constexpr int kThreads = 32 * kNmDecodeWarps;
    static constexpr int kRoundColumns = nm::kBlock * kGroups;
    using Tile = ActivationTile<T, kTokens, kRoundColumns, kThreads>;
    using Sum = SplitK<kTokens, kMatrices, kGroups>;
    static constexpr int kSharedBytes = 2 * Tile::kBytes > Sum::kBytes ? 2 * Tile::kBytes : Sum::kBytes;

    float sums[nm::kRowTiles][kTokenTiles][4] = {};

    // sums += step kStep of the block (32 columns) times x; `column` is its first column in the tile.
    template <int kStep>
    __device__ __forceinline__ void multiply(const NmFragment& block, const u8* tile, int column) {
        const uint4* values = block.values + kStep * nm::kRowTiles;
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
            u32 x[4];
            Tile::load_fragment(x, tile, n, column);
            ptx::mma_sp_m16n8k32<T, kStep>(sums[0][n], values[0], x, block.metadata.x);
            ptx::mma_sp_m16n8k32<T, kStep>(sums[1][n], values[1], x, block.metadata.y);
            ptx::mma_sp_m16n8k32<T, kStep>(sums[2][n], values[2], x, block.metadata.z);
            ptx::mma_sp_m16n8k32<T, kStep>(sums[3][n], values[3], x, block.metadata.w);
        }
    }

    static __device__ __forceinline__ float silu(float value) {
        constexpr float kLog2E = 1.4426950408889634f;
        return value / (1.0f + ptx::exp2_approx(-kLog2E * value));
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
            decode.template multiply<0>(current, tile, group * nm::kBlock);
            if (has(1)) next.load_second_half(block);
            decode.template multiply<1>(current, tile, group * nm::kBlock + 32);
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
            decode.template multiply<0>(current, tiles, group * nm::kBlock);
            decode.template multiply<1>(current, tiles, group * nm::kBlock + 32);
        }
    }
};

// `up` is used where kMatrices is 2 only; then `weight` is the gate.
template <class T, int kTokenTiles, int kMatrices>
static __device__ __forceinline__ void nm_decode(NmMatrix weight, NmMatrix up, const T* x, const T* bias,
                                                 const T* up_bias, T* out, float* partials, u32* counters, int n,
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
    Sum::deposit(deposits, decode.sums);
    ptx::sync_cta();
    const u64 tile = static_cast<u64>(row_block) * (gridDim.x / splits) + token_block;
    float* parts = partials + tile * splits * kMatrices * Sum::kElements;
    if (splits > 1 and not Sum::publish(deposits, parts, counters + tile, split, splits, tokens)) return;

    // Store
    for (int e = static_cast<int>(threadIdx.x); e < tokens * Sum::kRows; e += Decode::kThreads) {
        const int row = row_block * nm::kBlock + e % Sum::kRows;
        if (row >= n) continue;
        float value[kMatrices];
#pragma unroll
        for (int matrix = 0; matrix < kMatrices; ++matrix) {
            value[matrix] = splits > 1 ? Sum::device_sum(parts, splits, matrix, e) : Sum::cta_sum(deposits, matrix, e);
            const T* term = matrix == 0 ? bias : up_bias;
            if (term != nullptr) value[matrix] += ptx::to_float(ptx::load_constant(term + row));
        }
        if constexpr (kMatrices == 2) value[0] = Decode::silu(value[0]) * value[1];
        out[static_cast<u64>(first_token + e / Sum::kRows) * n + row] = ptx::from_float<T>(value[0]);
    }
}
