// Entry points of the 2:4 decode kernel, one for each element type and number of 8-token tiles (see nm_decode.cuh).
#include "nm_decode.cuh"

#define NM_DECODE(NAME, T, TILES)                                                                                      \
    extern "C" __global__ void __launch_bounds__(32 * kNmDecodeWarps, 2) nm_decode_##NAME(                             \
        const uint4* values, const uint4* metadata, const T* x, const T* bias, T* out, float4* partials,               \
        u32* counters, int n, int k, int m, int splits) {                                                              \
        nm_decode<T, TILES, 1>({values, metadata}, {nullptr, nullptr}, x, bias, static_cast<const T*>(nullptr), out,   \
                               partials, counters, n, k, m, splits);                                                   \
    }

// Two CTAs a multiprocessor up to 16 tokens; with 32, the accumulators take the registers of the second one.
#define NM_SWIGLU(NAME, T, TILES)                                                                                      \
    extern "C" __global__ void __launch_bounds__(32 * kNmDecodeWarps, TILES <= 2 ? 2 : 1) nm_swiglu_##NAME(            \
        const uint4* gate_values, const uint4* gate_metadata, const uint4* up_values, const uint4* up_metadata,        \
        const T* x, const T* gate_bias, const T* up_bias, T* out, float4* partials, u32* counters, int n, int k,       \
        int m, int splits) {                                                                                           \
        nm_decode<T, TILES, 2>({gate_values, gate_metadata}, {up_values, up_metadata}, x, gate_bias, up_bias, out,     \
                               partials, counters, n, k, m, splits);                                                   \
    }

NM_DECODE(fp16_8, Half, 1)
NM_DECODE(fp16_16, Half, 2)
NM_DECODE(bf16_8, BFloat16, 1)
NM_DECODE(bf16_16, BFloat16, 2)

NM_SWIGLU(fp16_8, Half, 1)
NM_SWIGLU(fp16_16, Half, 2)
NM_SWIGLU(fp16_32, Half, 4)
NM_SWIGLU(bf16_8, BFloat16, 1)
NM_SWIGLU(bf16_16, BFloat16, 2)
NM_SWIGLU(bf16_32, BFloat16, 4)
