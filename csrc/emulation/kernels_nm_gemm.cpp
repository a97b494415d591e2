// The 2:4 product for many tokens, callable by name.
#include "../cuda/nm_gemm.cu"
#include "runner.h"

namespace {

using emulation::Kernel;

// The shared memory that the kernel itself computes, for a test against gemm_plan.py.
template <class Shape>
void shared_bytes(long long* out) {
    if (threadIdx.x == 0) *out = NmGemm<Half, Shape>::kSharedBytes;
}

#define REGISTER(TILE)                                                    \
    const Kernel fp16_##TILE("nm_gemm_fp16_" #TILE, &nm_gemm_fp16_##TILE); \
    const Kernel bf16_##TILE("nm_gemm_bf16_" #TILE, &nm_gemm_bf16_##TILE); \
    const Kernel bytes_##TILE("nm_gemm_shared_" #TILE, &shared_bytes<Nm##TILE>)

REGISTER(128x32);
REGISTER(128x64);
REGISTER(128x128);
REGISTER(256x128);

}  // namespace
