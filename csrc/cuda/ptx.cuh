// Every PTX instruction the kernels use, one small named function each, without logic of their own.
//
// A kernel touches shared memory and synchronises only through these functions. Compiled with WANDAPP_EMULATION, the
// same names come from csrc/emulation/ptx.h: a model of 32 lanes that runs a kernel's source on the host and checks it.
//
// PTX ISA: https://docs.nvidia.com/cuda/parallel-thread-execution (sections named below are those of version 9.1).
#pragma once

#include "types.cuh"

#ifdef WANDAPP_EMULATION
#include "../emulation/ptx.h"
#else

#define PTX_FUNCTION static __device__ __forceinline__

namespace ptx {

// Shared memory ------------------------------------------------------------------------------------------------------

// The CTA's dynamic shared memory (the size given at the launch), aligned to 16 bytes.
PTX_FUNCTION u8* dynamic_shared() {
    extern __shared__ __align__(16) u8 storage[];
    return storage;
}

using SharedAddress = u32;

PTX_FUNCTION SharedAddress shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

template <class T>
PTX_FUNCTION T load_shared(const T* address) {
    return *address;
}

template <class T>
PTX_FUNCTION void store_shared(T* address, T value) {
    *address = value;
}

PTX_FUNCTION uint4 load_shared_128(SharedAddress address) {
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(address)
                 : "memory");
    return value;
}

// Where `take` is not 0, the 16 bits at `address`, which moves on by 2 bytes; else 0.
PTX_FUNCTION u32 take_shared_16(SharedAddress& address, u32 take) {
    u32 value;
    asm volatile("{ .reg .pred taken;\n"
                 "  setp.ne.u32 taken, %2, 0;\n"
                 "  mov.u32 %0, 0;\n"
                 "  @taken ld.shared.u16 %0, [%1];\n"
                 "  @taken add.u32 %1, %1, 2; }"
                 : "=&r"(value), "+r"(address)
                 : "r"(take)
                 : "memory");
    return value;
}

// Four 8x8 tiles of 16-bit elements (9.7.14.5.15): lane 8i + r gives the address of row r (16 bytes) of tile i; lane
// 4g + t receives elements 2t, 2t+1 of row g of tile i in destination[i].
PTX_FUNCTION void ldmatrix_x4(u32 (&destination)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(destination[0]), "=r"(destination[1]), "=r"(destination[2]), "=r"(destination[3])
                 : "r"(row)
                 : "memory");
}

PTX_FUNCTION void ldmatrix_x4(u32 (&destination)[4], const void* row) { ldmatrix_x4(destination, shared_address(row)); }

// Asynchronous copies (9.7.9.25.3) -----------------------------------------------------------------------------------

// 16 bytes of shared memory: the first `bytes` (0 to 16) come from global memory, the others become zero.
PTX_FUNCTION void cp_async_16(SharedAddress shared, const void* global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

PTX_FUNCTION void cp_async_16(void* shared, const void* global, int bytes) {
    cp_async_16(shared_address(shared), global, bytes);
}

// 16 bytes, where `wanted`; a predicate instead of a branch, so that neighbouring copies share their address.
PTX_FUNCTION void cp_async_16_if(bool wanted, SharedAddress shared, const void* global) {
    asm volatile("{ .reg .pred wanted;\n"
                 "  setp.ne.u32 wanted, %0, 0;\n"
                 "  @wanted cp.async.cg.shared.global [%1], [%2], 16; }" ::"r"(static_cast<u32>(wanted)),
                 "r"(shared), "l"(global)
                 : "memory");
}

PTX_FUNCTION void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are still in flight.
template <int kPending>
PTX_FUNCTION void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Global memory (9.7.9.8) --------------------------------------------------------------------------------------------

// 16 or 4 bytes of weights: read once by one CTA, constant during the kernel, so not kept in L1.
PTX_FUNCTION uint4 load_stream_128(const uint4* address) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address));
    return value;
}

PTX_FUNCTION u32 load_stream_32(const u32* address) {
    u32 value;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.u32 %0, [%1];" : "=r"(value) : "l"(address));
    return value;
}

// One 16-bit element that is constant during the kernel (an activation, a bias).
template <class T>
PTX_FUNCTION T load_constant(const T* address) {
    T value;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(value.bits) : "l"(address));
    return value;
}

// fp32 partial sums that pass between CTAs: through L2, never from a stale L1 line.
PTX_FUNCTION void store_partial(float* address, float value) {
    asm volatile("st.global.cg.f32 [%0], %1;" ::"l"(address), "f"(value) : "memory");
}

PTX_FUNCTION float load_partial(const float* address) {
    float value;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(address) : "memory");
    return value;
}

// Four of them at once.
PTX_FUNCTION void store_partials(float4* address, const float4& value) {
    asm volatile("st.global.cg.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(value.x), "f"(value.y), "f"(value.z),
                 "f"(value.w)
                 : "memory");
}

PTX_FUNCTION float4 load_partials(const float4* address) {
    float4 value;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                 : "l"(address)
                 : "memory");
    return value;
}

// Orders this thread's earlier accesses before its later ones, seen by the whole device (9.7.13.4).
PTX_FUNCTION void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Returns the old count; the new one is 0 where the old one was `last` or more, else one more (9.7.13.5).
PTX_FUNCTION u32 atomic_increment_wrap(u32* address, u32 last) {
    u32 old;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(last) : "memory");
    return old;
}

// Barriers and exchange inside a warp (9.7.13.1, 9.7.9.6) ------------------------------------------------------------

PTX_FUNCTION void sync_cta() { __syncthreads(); }

PTX_FUNCTION void sync_warp() { __syncwarp(); }

PTX_FUNCTION u32 shuffle(u32 value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

PTX_FUNCTION u32 shuffle_xor(u32 value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }

// The value `lanes` below this one; lanes without such a neighbour keep their own.
PTX_FUNCTION u32 shuffle_up(u32 value, int lanes) { return __shfl_up_sync(0xffffffffu, value, lanes); }

// value plus the one `lanes` below; lanes without such a neighbour keep their own: a step of a warp's running sum.
PTX_FUNCTION u32 shuffle_up_add(u32 value, int lanes) {
    u32 sum;
    asm volatile("{ .reg .pred inside; .reg .u32 below;\n"
                 "  shfl.sync.up.b32 below|inside, %1, %2, 0, 0xffffffff;\n"
                 "  mov.u32 %0, %1;\n"
                 "  @inside add.u32 %0, %1, below; }"
                 : "=&r"(sum)
                 : "r"(value), "r"(lanes));
    return sum;
}

PTX_FUNCTION u32 ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

// Bits ---------------------------------------------------------------------------------------------------------------

PTX_FUNCTION int popcount(u32 value) { return __popc(value); }

PTX_FUNCTION int popcount(u64 value) { return __popcll(value); }

// Byte i of the result is byte (selector >> 4i & 7) of the eight bytes high:low (prmt).
PTX_FUNCTION u32 permute_bytes(u32 low, u32 high, u32 selector) { return __byte_perm(low, high, selector); }

// c + the sum over i of byte i of a times byte i of b, all unsigned (dp4a).
PTX_FUNCTION u32 dot_bytes(u32 a, u32 b, u32 c) {
    u32 sum;
    asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}

// Numbers (9.7.9.21, 9.7.4) ------------------------------------------------------------------------------------------

PTX_FUNCTION float to_float(Half value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

PTX_FUNCTION float to_float(BFloat16 value) { return __uint_as_float(static_cast<u32>(value.bits) << 16); }

template <class T>
__device__ __forceinline__ T from_float(float value);

template <>
__device__ __forceinline__ Half from_float<Half>(float value) {
    Half result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float value) {
    BFloat16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

// 2^value
PTX_FUNCTION float exp2_approx(float value) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

// Tensor cores -------------------------------------------------------------------------------------------------------
// g = lane / 4, t = lane % 4. Accumulators (16 x 8): c0, c1 = row g, columns 2t, 2t+1; c2, c3 = row g + 8.

#define PTX_MMA_SP(TYPE)                                                                                            \
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE                       \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"         \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                  \
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata), \
                   "n"(kSelector))

// c += A B with A 16 x 32 in 2:4 (9.7.14.6). a.x, a.z: row g, compressed columns 2t, 2t+1 and 8 + 2t, 9 + 2t; a.y,
// a.w: row g + 8. b[i]: rows 8i + 2t, 8i + 2t + 1 of column g. Lane 4g + 2 kSelector + h supplies the metadata of row g
// (low half) and g + 8 (high half), columns 16h to 16h + 15: one nibble a group of four, ascending positions.
template <class T, int kSelector>
struct SparseMma;

template <int kSelector>
struct SparseMma<Half, kSelector> {
    static __device__ __forceinline__ void run(float (&c)[4], const uint4& a, const u32 (&b)[4], u32 metadata) {
        PTX_MMA_SP("f16");
    }
};

template <int kSelector>
struct SparseMma<BFloat16, kSelector> {
    static __device__ __forceinline__ void run(float (&c)[4], const uint4& a, const u32 (&b)[4], u32 metadata) {
        PTX_MMA_SP("bf16");
    }
};

#undef PTX_MMA_SP

template <class T, int kSelector>
PTX_FUNCTION void mma_sp_m16n8k32(float (&c)[4], const uint4& a, const u32 (&b)[4], u32 metadata) {
    SparseMma<T, kSelector>::run(c, a, b, metadata);
}

#define PTX_MMA(TYPE)                                                                                              \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                            \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                            \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                 \
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1))

// c += A B with A 16 x 16 dense (9.7.14.5.8). a.x, a.z: row g, columns 2t, 2t+1 and 8 + 2t, 9 + 2t; a.y, a.w: row
// g + 8. b0, b1: rows 2t, 2t+1 and 8 + 2t, 9 + 2t of column g.
PTX_FUNCTION void mma_m16n8k16(float (&c)[4], const uint4& a, u32 b0, u32 b1, Half) { PTX_MMA("f16"); }

PTX_FUNCTION void mma_m16n8k16(float (&c)[4], const uint4& a, u32 b0, u32 b1, BFloat16) { PTX_MMA("bf16"); }

#undef PTX_MMA

template <class T>
PTX_FUNCTION void mma_m16n8k16(float (&c)[4], const uint4& a, u32 b0, u32 b1) {
    mma_m16n8k16(c, a, b0, b1, T{});
}

}  // namespace ptx

#undef PTX_FUNCTION
#endif
