// Small kernels that test the emulation itself: each does one thing right, and wrong when `fault` says so.
#include "cuda/ptx.cuh"
#include "emulation/runner.h"

namespace {

using emulation::Kernel;

enum Fault {
    kNone,
    kMissingWait,
    kMissingCommit,
    kMissingBarrier,
    kMissingBarrierBeforeWrite,
    kNeverWritten,
    kSharedOutOfBounds,
    kGlobalOutOfBounds,
    kLanesDisagree,
    kEarlyExit,
    kMisaligned,
    kMissingFence,
    kCopyStillInFlight,
};

// Each of 64 threads: 16 bytes through shared memory to the thread on the other side, a warp sum, a partial sum.
void machine(const uint4* in, float* out, float* partial, int fault) {
    const int thread = static_cast<int>(threadIdx.x);
    const int other = 63 - thread;
    uint4* shared = reinterpret_cast<uint4*>(ptx::dynamic_shared());

    if (fault != kNeverWritten or thread != 5) ptx::cp_async_16(shared + thread, in + thread, 16);
    if (fault != kMissingCommit) ptx::cp_async_commit();
    if (fault != kMissingWait) ptx::cp_async_wait<0>();
    if (fault != kMissingBarrier) ptx::sync_cta();
    const uint4 value = ptx::load_shared(shared + (fault == kSharedOutOfBounds ? other + 1 : other));
    if (fault != kMissingBarrierBeforeWrite) ptx::sync_cta();
    ptx::store_shared(shared + thread, make_uint4(value.x + 1, 0, 0, 0));
    ptx::sync_cta();

    if (fault == kEarlyExit and thread == 40) return;
    u32 sum = ptx::load_shared(shared + other).x;
    if (fault == kLanesDisagree and thread == 3)
        sum += ptx::shuffle_up(sum, 1);
    else
        sum += ptx::shuffle_xor(sum, 1);

    const u32* last = reinterpret_cast<const u32*>(in + 63) + 3;
    if (fault == kGlobalOutOfBounds) sum += ptx::load_stream_32(last + 1);
    if (fault == kMisaligned) sum += ptx::load_stream_128(reinterpret_cast<const uint4*>(last - 5)).x;

    ptx::store_partial(partial + thread, static_cast<float>(sum));
    if (fault != kMissingFence) ptx::fence_device();
    ptx::sync_cta();
    out[thread] = ptx::load_partial(partial + other);
    if (fault == kCopyStillInFlight) {
        ptx::cp_async_16(shared + thread, in + thread, 16);
        ptx::cp_async_commit();
    }
}

// One warp, registers as lanes hold them: d += A B.
template <class T, int kSelector>
void sparse_mma(const uint4* a, const uint4* b, const u32* metadata, float* d) {
    const int lane = static_cast<int>(threadIdx.x);
    float c[4];
    for (int i = 0; i < 4; ++i) c[i] = d[4 * lane + i];
    ptx::mma_sp_m16n8k32<T, kSelector>(c, a[lane], {b[lane].x, b[lane].y, b[lane].z, b[lane].w}, metadata[lane]);
    for (int i = 0; i < 4; ++i) d[4 * lane + i] = c[i];
}

template <class T>
void dense_mma(const uint4* a, const uint2* b, float* d) {
    const int lane = static_cast<int>(threadIdx.x);
    float c[4];
    for (int i = 0; i < 4; ++i) c[i] = d[4 * lane + i];
    ptx::mma_m16n8k16<T>(c, a[lane], b[lane].x, b[lane].y);
    for (int i = 0; i < 4; ++i) d[4 * lane + i] = c[i];
}

// Every bit pattern of T to fp32, and every fp32 of `in` to T.
template <class T>
void convert(const float* in, u16* rounded, float* widened, int count) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += 32) rounded[i] = ptx::from_float<T>(in[i]).bits;
    for (int i = static_cast<int>(threadIdx.x); i < 65536; i += 32) widened[i] = ptx::to_float(T{static_cast<u16>(i)});
}

const Kernel k0("machine", &machine);
const Kernel k1("sparse_mma_fp16_0", &sparse_mma<Half, 0>);
const Kernel k2("sparse_mma_fp16_1", &sparse_mma<Half, 1>);
const Kernel k3("sparse_mma_bf16_0", &sparse_mma<BFloat16, 0>);
const Kernel k4("sparse_mma_bf16_1", &sparse_mma<BFloat16, 1>);
const Kernel k5("dense_mma_fp16", &dense_mma<Half>);
const Kernel k6("dense_mma_bf16", &dense_mma<BFloat16>);
const Kernel k7("convert_fp16", &convert<Half>);
const Kernel k8("convert_bf16", &convert<BFloat16>);

}  // namespace
