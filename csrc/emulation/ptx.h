// Host twins of the functions of csrc/cuda/ptx.cuh: same names, same meaning, every access checked.
#pragma once

#include "cuda_host.h"
#include "lanes.h"
#include "numbers.h"
#include "shared_memory.h"

namespace ptx {

namespace detail {

inline void require_alignment(const void* address, size_t bytes, const char* what) {
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
        emulation::fail(std::string(what) + " of " + std::to_string(bytes) +
                        " bytes from an address that is not a multiple");
}

template <class T>
T load_aligned(const T* address) {
    require_alignment(address, sizeof(T), "global load");
    return *address;
}

inline emulation::SharedMemory& shared() { return *emulation::current_cta().shared; }

}  // namespace detail

// Shared memory ------------------------------------------------------------------------------------------------------

inline u8* dynamic_shared() { return detail::shared().data(); }

template <class T>
T load_shared(const T* address) {
    detail::shared().read(address, sizeof(T), alignof(T));
    return *address;
}

template <class T>
void store_shared(T* address, T value) {
    detail::shared().write(address, sizeof(T), alignof(T));
    *address = value;
}

using SharedAddress = uintptr_t;

inline SharedAddress shared_address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

inline uint4 load_shared_128(SharedAddress address) { return load_shared(reinterpret_cast<const uint4*>(address)); }

inline u32 take_shared_16(SharedAddress& address, u32 take) {
    if (take == 0) return 0;
    const u32 value = load_shared(reinterpret_cast<const u16*>(address));
    address += 2;
    return value;
}

inline void ldmatrix_x4(u32 (&destination)[4], const void* row) {
    detail::shared().read(row, 16, 16);
    struct Registers {
        u32 r[4];
    };
    using Row = const u8*;
    const auto result = emulation::warp_collective<Row, Registers>(
        "ldmatrix", static_cast<Row>(row), [](const Row* rows, Registers* results) {
            for (int lane = 0; lane < emulation::kWarpSize; ++lane)
                for (int tile = 0; tile < 4; ++tile)
                    std::memcpy(&results[lane].r[tile], rows[8 * tile + lane / 4] + 4 * (lane % 4), 4);
        });
    std::memcpy(destination, result.r, sizeof result.r);
}

inline void ldmatrix_x4(u32 (&destination)[4], SharedAddress row) {
    ldmatrix_x4(destination, reinterpret_cast<const void*>(row));
}

// Asynchronous copies ------------------------------------------------------------------------------------------------

inline void cp_async_16(void* shared, const void* global, int bytes) {
    detail::require_alignment(global, 16, "cp.async");
    if (bytes < 0 or bytes > 16) emulation::fail("cp.async of " + std::to_string(bytes) + " bytes");
    detail::shared().start_copy({0, static_cast<const u8*>(global), bytes}, shared);
}

inline void cp_async_16(SharedAddress shared, const void* global, int bytes) {
    cp_async_16(reinterpret_cast<void*>(shared), global, bytes);
}

inline void cp_async_16_if(bool wanted, SharedAddress shared, const void* global) {
    if (wanted) cp_async_16(reinterpret_cast<void*>(shared), global, 16);
}

inline void cp_async_commit() {
    emulation::Thread& thread = emulation::current_thread();
    thread.groups.push_back(std::move(thread.open_group));
    thread.open_group.clear();
}

template <int kPending>
void cp_async_wait() {
    auto& groups = emulation::current_thread().groups;
    while (groups.size() > kPending) {
        for (const emulation::AsyncCopy& copy : groups.front()) detail::shared().land(copy);
        groups.erase(groups.begin());
    }
}

// Global memory ------------------------------------------------------------------------------------------------------

inline uint4 load_stream_128(const uint4* address) { return detail::load_aligned(address); }
inline u32 load_stream_32(const u32* address) { return detail::load_aligned(address); }

template <class T>
T load_constant(const T* address) {
    return detail::load_aligned(address);
}

inline void store_partial(float* address, float value) {
    detail::require_alignment(address, sizeof(float), "global store");
    emulation::Thread& thread = emulation::current_thread();
    thread.stored_phase = static_cast<int>(thread.cta_phase);
    if (emulation::current_cta().announced_phase >= thread.stored_phase)
        emulation::fail("stores a partial sum after its CTA was counted as arrived, without a barrier between");
    thread.stores.push_back({address, value});
}

inline float load_partial(const float* address) { return detail::load_aligned(address); }

inline void store_partials(float4* address, const float4& value) {
    detail::require_alignment(address, sizeof(float4), "global store");
    store_partial(&address->x, value.x);
    store_partial(&address->y, value.y);
    store_partial(&address->z, value.z);
    store_partial(&address->w, value.w);
}

inline float4 load_partials(const float4* address) { return detail::load_aligned(address); }

inline void fence_device() {
    auto& stores = emulation::current_thread().stores;
    for (const emulation::PendingStore& store : stores) *store.address = store.value;
    stores.clear();
}

inline u32 atomic_increment_wrap(u32* address, u32 last) {
    emulation::Cta& cta = emulation::current_cta();
    const emulation::Thread& now = emulation::current_thread();
    cta.announced_phase = static_cast<int>(now.cta_phase);
    for (const emulation::Thread& thread : cta.threads) {
        if (not thread.stores.empty())
            emulation::fail("counts its CTA as arrived while partial sums are not published by a fence");
        if (thread.number != now.number and thread.stored_phase >= cta.announced_phase)
            emulation::fail("counts its CTA as arrived without a barrier after the partial sums of others");
    }
    const u32 old = detail::load_aligned(address);
    *address = old >= last ? 0 : old + 1;
    return old;
}

// Barriers and exchange inside a warp --------------------------------------------------------------------------------

inline void sync_cta() {
    emulation::meet(emulation::current_cta().barrier, "the barrier of the CTA", [] {});
    ++emulation::current_thread().cta_phase;
}

inline void sync_warp() {
    emulation::Thread& thread = emulation::current_thread();
    emulation::meet(emulation::current_cta().warps[thread.warp()].meeting, "the barrier of the warp", [] {});
    ++thread.warp_phase;
}

namespace detail {

struct Shuffled {
    u32 value;
    int source;
};

inline u32 exchange(const char* operation, u32 value, int source) {
    return emulation::warp_collective<Shuffled, u32>(operation, {value, source}, [](const Shuffled* in, u32* out) {
        for (int lane = 0; lane < emulation::kWarpSize; ++lane) out[lane] = in[in[lane].source].value;
    });
}

inline int lane() { return emulation::current_thread().lane(); }

}  // namespace detail

inline u32 shuffle(u32 value, int lane) { return detail::exchange("shfl.idx", value, lane & 31); }

inline u32 shuffle_xor(u32 value, int lanes) {
    return detail::exchange("shfl.bfly", value, (detail::lane() ^ lanes) & 31);
}

inline u32 shuffle_up(u32 value, int lanes) {
    const int source = detail::lane() - lanes;
    return detail::exchange("shfl.up", value, source < 0 ? detail::lane() : source);
}

inline u32 shuffle_up_add(u32 value, int lanes) {
    const u32 below = shuffle_up(value, lanes);
    return detail::lane() >= lanes ? value + below : value;
}

inline u32 ballot(bool predicate) {
    return emulation::warp_collective<bool, u32>("vote.ballot", predicate, [](const bool* in, u32* out) {
        u32 votes = 0;
        for (int lane = 0; lane < emulation::kWarpSize; ++lane) votes |= static_cast<u32>(in[lane]) << lane;
        for (int lane = 0; lane < emulation::kWarpSize; ++lane) out[lane] = votes;
    });
}

// Bits ---------------------------------------------------------------------------------------------------------------

inline int popcount(u32 value) { return __builtin_popcount(value); }
inline int popcount(u64 value) { return __builtin_popcountll(value); }

inline u32 permute_bytes(u32 low, u32 high, u32 selector) {
    const u64 bytes = static_cast<u64>(high) << 32 | low;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<u32>(bytes >> (8 * (selector >> 4 * i & 7)) & 0xFF) << 8 * i;
    return result;
}

template <class T>
T dot_bytes(u32 a, u32 b, T c) {
    for (int i = 0; i < 32; i += 8) c += (a >> i & 0xFF) * (b >> i & 0xFF);
    return c;
}

// Numbers ------------------------------------------------------------------------------------------------------------

inline float to_float(Half value) { return emulation::number<Half>(value.bits); }
inline float to_float(BFloat16 value) { return emulation::number<BFloat16>(value.bits); }

template <class T>
T from_float(float value) {
    return {emulation::rounded<T>(value)};
}

inline float exp2_approx(float value) { return std::exp2(value); }

// Tensor cores -------------------------------------------------------------------------------------------------------

namespace detail {

inline emulation::MmaOperand operand(const float (&c)[4], const uint4& a, const u32 (&b)[4], u32 metadata) {
    return {{c[0], c[1], c[2], c[3]}, {a.x, a.y, a.z, a.w}, {b[0], b[1], b[2], b[3]}, metadata};
}

inline void scatter(float (&c)[4], const emulation::Accumulator& result) { std::memcpy(c, result.c, sizeof c); }

}  // namespace detail

template <class T, int kSelector>
void mma_sp_m16n8k32(float (&c)[4], const uint4& a, const u32 (&b)[4], u32 metadata) {
    static_assert(kSelector == 0 or kSelector == 1, "the sparsity selector of m16n8k32 names a pair of lanes");
    const auto result = emulation::warp_collective<emulation::MmaOperand, emulation::Accumulator>(
        kSelector == 0 ? "mma.sp selector 0" : "mma.sp selector 1", detail::operand(c, a, b, metadata),
        [](const auto* lanes, auto* results) {
            emulation::mma_sp_m16n8k32(lanes, results, kSelector, &emulation::number<T>);
        });
    detail::scatter(c, result);
}

template <class T>
void mma_m16n8k16(float (&c)[4], const uint4& a, u32 b0, u32 b1) {
    const auto result = emulation::warp_collective<emulation::MmaOperand, emulation::Accumulator>(
        "mma", detail::operand(c, a, {b0, b1, 0, 0}, 0),
        [](const auto* lanes, auto* results) { emulation::mma_m16n8k16(lanes, results, &emulation::number<T>); });
    detail::scatter(c, result);
}

}  // namespace ptx
