// The words of CUDA C++ that kernels use besides ptx::, for the host compiler.
#pragma once

#include <cstddef>

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

#define threadIdx (emulation::current_thread().index)
#define blockIdx (emulation::current_cta().index)
#define blockDim (emulation::current_cta().block)
#define gridDim (emulation::current_cta().grid)
