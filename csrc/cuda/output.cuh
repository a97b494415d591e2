// The last step of a product y [M, N] = x W^T + bias: four rows of W, which are neighbours in y, for one token.
#pragma once

#include "ptx.cuh"

// value += bias of rows `row` to `row` + 3 of n, where there is a bias.
template <class T>
static __device__ __forceinline__ void add_bias(float4& value, const T* bias, int row, int n) {
    if (bias == nullptr) return;
    value.x += ptx::to_float(ptx::load_constant(bias + row));
    if (row + 1 < n) value.y += ptx::to_float(ptx::load_constant(bias + row + 1));
    if (row + 2 < n) value.z += ptx::to_float(ptx::load_constant(bias + row + 2));
    if (row + 3 < n) value.w += ptx::to_float(ptx::load_constant(bias + row + 3));
}

// y[token][row ..] = value; rows at or beyond n are dropped. y starts at a multiple of 8 bytes.
template <class T>
static __device__ __forceinline__ void store_rows(T* y, const float4& value, u64 token, int row, int n) {
    T* target = y + token * n + row;
    const T rounded[4] = {ptx::from_float<T>(value.x), ptx::from_float<T>(value.y), ptx::from_float<T>(value.z),
                          ptx::from_float<T>(value.w)};
    if (n % 4 == 0) {
        *reinterpret_cast<uint2*>(target) =
            make_uint2(rounded[0].bits | static_cast<u32>(rounded[1].bits) << 16,
                       rounded[2].bits | static_cast<u32>(rounded[3].bits) << 16);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (row + i < n) target[i] = rounded[i];
}
