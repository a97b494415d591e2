// Entry points of the 2:4 product for many tokens (see nm_gemm.cuh), one for each element type and tile. gemm_plan.py
// has the same tiles and chooses among them.
#include "nm_gemm.cuh"

//                row warps, token warps, groups, 8-token tiles of a warp, stages, fragments
using Nm128x32 = NmTile<2, 1, 4, 4, 4, 3>;
using Nm128x64 = NmTile<2, 1, 4, 8, 4, 2>;
using Nm128x128 = NmTile<2, 2, 1, 8, 3, 1>;
using Nm256x128 = NmTile<4, 2, 1, 8, 4, 1>;

#define NM_GEMM(NAME, T, TILE)                                                                                    \
    extern "C" __global__ void __launch_bounds__(Nm##TILE::kThreads, Nm##TILE::kCtas) nm_gemm_##NAME##_##TILE(    \
        const uint4* values, const uint4* metadata, const T* x, const T* bias, T* out, float4* partials,          \
        u32* counters, int n, int k, int m, int splits) {                                                         \
        nm_gemm<T, Nm##TILE>({values, metadata}, x, bias, out, partials, counters, n, k, m, splits);              \
    }

#define NM_GEMM_TILES(NAME, T) \
    NM_GEMM(NAME, T, 128x32)   \
    NM_GEMM(NAME, T, 128x64)   \
    NM_GEMM(NAME, T, 128x128)  \
    NM_GEMM(NAME, T, 256x128)

NM_GEMM_TILES(fp16, Half)
NM_GEMM_TILES(bf16, BFloat16)
