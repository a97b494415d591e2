// out[m, n] = sum_k x[m, k] W[n, k] + bias[n] for an unstructured weight and few tokens m (see bitmap_panel.cuh).
//
// Weights are the A operand of mma.m16n8k16 (16 output rows), tokens the N = 8 operand. A warp walks over panels of one
// 16-row slab: values and bitmap arrive by cp.async, kStages - 1 panels ahead; the lanes gather their values from shared
// memory straight into fragments. Warps split K inside the CTA, CTAs split it in grid.y; both sums are added in a fixed
// order, so the result is the same every time.
//
// x: [tokens, columns], columns a multiple of 8, 16-byte aligned; out: [tokens, rows]; bias: [rows] or null.
// values, bitmaps, offsets: bitmap_panel.cuh. block: slabs_per_cta * warps_per_slab warps, kStages * kSlotBytes of shared
// memory a warp. grid: (slabs / slabs_per_cta rounded up, CTAs along K). Where grid.y > 1, partial holds [grid.y, grid.x,
// slabs_per_cta, tokens, 16] floats, and counters [grid.x] zeros, which every launch leaves as zeros.
#pragma once

#include "bitmap_panel.cuh"

namespace bitmap {

constexpr int kStages = 3;
constexpr int kMostThreads = 256;  // with 2 CTAs a multiprocessor: 128 registers a thread
constexpr int kPitch = 20;  // floats from one token to the next in the reduction: no bank conflicts

// Eight activations; zero where the token or the column does not exist.
template <class T>
__device__ __forceinline__ uint4 load_activations(const T* x, int token, int tokens, int column, int columns) {
    if (token >= tokens or column >= columns) return make_uint4(0, 0, 0, 0);
    return *reinterpret_cast<const uint4*>(x + static_cast<size_t>(token) * columns + column);
}

template <class T, int kTokenTiles>
__device__ __forceinline__ void decode(const uint4* __restrict__ values, const uint4* __restrict__ bitmaps,
                                       const int* __restrict__ offsets, const T* __restrict__ x,
                                       const T* __restrict__ bias, T* __restrict__ out, float* partial, u32* counters,
                                       int tokens, int rows, int columns, int warps_per_slab) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int g = lane / 4, t = lane % 4;
    const int slabs = (rows + kSlabRows - 1) / kSlabRows;
    const int panels = (columns + kPanelColumns - 1) / kPanelColumns;
    const int slabs_per_cta = static_cast<int>(blockDim.x) / 32 / warps_per_slab;
    const int first_slab = static_cast<int>(blockIdx.x) * slabs_per_cta;
    const int slab = first_slab + warp / warps_per_slab;
    u8* const shared = ptx::dynamic_shared();

    // This warp's panels
    const int parts = static_cast<int>(gridDim.y) * warps_per_slab;
    const int part = static_cast<int>(blockIdx.y) * warps_per_slab + warp % warps_per_slab;
    const int first = slab < slabs ? part * panels / parts : 0;
    const int last = slab < slabs ? (part + 1) * panels / parts : 0;
    const size_t slab_start = static_cast<size_t>(slab) * panels;
    const int* const ends = offsets + slab_start;
    u8* const slots = shared + warp * kStages * kSlotBytes;
    int filled = 0, used = 0;  // the slots that are filled and used next

    // One group per call, empty past the end, so that waiting for the oldest group is waiting for the oldest panel.
    int end = first < last ? ends[first] : 0;
    int next_end = first < last ? ends[first + 1] : 0;
    const auto fetch = [&](int panel) {
        if (panel < last) {
            const int begin = end;
            end = next_end;
            next_end = ends[panel + 2 <= last ? panel + 2 : last];
            copy_panel(ptx::shared_address(slots + filled * kSlotBytes), values + begin, end - begin,
                       bitmaps + (slab_start + panel) * (kBitmapBytes / 16), lane);
            filled = filled + 1 == kStages ? 0 : filled + 1;
        }
        ptx::cp_async_commit();
    };

    float sums[kTokenTiles][4] = {};
    for (int ahead = 0; ahead < kStages - 1; ++ahead) fetch(first + ahead);
    for (int panel = first; panel < last; ++panel) {
        uint4 activations[2][kTokenTiles][2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int tile = 0; tile < kTokenTiles; ++tile)
#pragma unroll
                for (int eighth = 0; eighth < 2; ++eighth)
                    activations[half][tile][eighth] =
                        load_activations(x, 8 * tile + g, tokens,
                                         kPanelColumns * panel + 64 * half + 32 * eighth + 8 * t, columns);

        ptx::cp_async_wait<kStages - 2>();
        ptx::sync_warp();  // the panel has landed for all lanes, and all have left the slot that is filled next
        fetch(panel + kStages - 1);

        const u8* const slot = slots + used * kSlotBytes;
        used = used + 1 == kStages ? 0 : used + 1;
        const uint2 words = ptx::load_shared(reinterpret_cast<const uint2*>(slot) + lane);
        ptx::SharedAddress kept = ptx::shared_address(slot + kBitmapBytes);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint4 a[4];
            expand_half(a, kept, half == 0 ? words.x : words.y);
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int tile = 0; tile < kTokenTiles; ++tile) {
                    const uint4& b = activations[half][tile][j / 2];
                    ptx::mma_m16n8k16<T>(sums[tile], a[j], j % 2 == 0 ? b.x : b.z, j % 2 == 0 ? b.y : b.w);
                }
        }
    }

    // Sum over the warps of a slab, in order
    ptx::cp_async_wait<0>();
    ptx::sync_cta();
    constexpr int kWarpFloats = 8 * kTokenTiles * kPitch;
    float* const reduction = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            ptx::store_shared(reduction + warp * kWarpFloats + (8 * tile + 2 * t + i % 2) * kPitch + g + i / 2 * 8,
                              sums[tile][i]);
    ptx::sync_cta();
    const int cta_outputs = slabs_per_cta * tokens * kSlabRows;
    const auto cta_sum = [&](int i) {
        const int row = i % kSlabRows, token = i / kSlabRows % tokens, local_slab = i / kSlabRows / tokens;
        float sum = 0.0f;
        for (int w = 0; w < warps_per_slab; ++w)
            sum += ptx::load_shared(reduction + (local_slab * warps_per_slab + w) * kWarpFloats + token * kPitch + row);
        return sum;
    };
    const auto write = [&](int i, float sum) {
        const int token = i / kSlabRows % tokens;
        const int row = (first_slab + i / kSlabRows / tokens) * kSlabRows + i % kSlabRows;
        if (row >= rows) return;
        if (bias != nullptr) sum += ptx::to_float(bias[row]);
        out[static_cast<size_t>(token) * rows + row] = ptx::from_float<T>(sum);
    };
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    if (gridDim.y == 1) {
        for (int i = thread; i < cta_outputs; i += threads) write(i, cta_sum(i));
        return;
    }

    // Sum over the CTAs along K, in order, by the one that arrives last. Its increment acquires what the others released
    // with theirs, for all its threads: barriers of the CTA stand on both sides.
    const size_t cta_stride = static_cast<size_t>(gridDim.x) * cta_outputs;
    float* const mine = partial + static_cast<size_t>(blockIdx.x) * cta_outputs;
    for (int i = thread; i < cta_outputs; i += threads) ptx::store_partial(mine + blockIdx.y * cta_stride + i, cta_sum(i));
    ptx::fence_device();
    ptx::sync_cta();
    u32* const arrived = reinterpret_cast<u32*>(shared);
    if (thread == 0) ptx::store_shared(arrived, ptx::atomic_increment_wrap(counters + blockIdx.x, gridDim.y - 1));
    ptx::sync_cta();
    if (ptx::load_shared(arrived) != gridDim.y - 1) return;
    for (int i = thread; i < cta_outputs; i += threads) {
        float sum = 0.0f;
        for (unsigned y = 0; y < gridDim.y; ++y) sum += ptx::load_partial(mine + y * cta_stride + i);
        write(i, sum);
    }
}

}  // namespace bitmap
