// One CTA at a time, every CUDA thread a fiber: a thread runs until it waits for its warp or its CTA.
//
// What the model holds kernels to:
//  * a collective (shuffle, mma, barrier) completes when all 32 lanes, or all threads of the CTA, have reached it;
//    lanes that meet in different collectives, or an exit while others wait, are errors;
//  * a barrier ends a phase: shared memory written by one thread may be read by another only in a later phase;
//  * cp.async data are not visible before their wait, fp32 partial sums not before a fence; when a thread counts its
//    CTA as arrived (the atomic), no partial sum of the CTA may be pending, or stored in the same phase.
// Every violation throws EmulationError, which ends the launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulation {

constexpr int kWarpSize = 32;
constexpr size_t kExchangeBytes = 96;  // the largest operand of one lane (mma.sp: 4 + 4 + 4 + 1 registers)

struct EmulationError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

struct Fiber;
class SharedMemory;

struct AsyncCopy {
    size_t offset;          // in shared memory
    const uint8_t* source;  // global memory, read when the copy lands
    int bytes;              // the rest of the 16 is filled with zeros
};

struct PendingStore {
    float* address;
    float value;
};

struct Thread {
    Index index;
    int number = 0;
    unsigned cta_phase = 0;   // barriers of the CTA this thread has passed
    unsigned warp_phase = 0;  // warp barriers it has passed
    std::vector<AsyncCopy> open_group;
    std::vector<std::vector<AsyncCopy>> groups;  // committed, oldest first
    std::vector<PendingStore> stores;            // partial sums not yet visible to other threads
    int stored_phase = -1;                       // the CTA phase of the last partial sum stored
    Fiber* fiber = nullptr;

    int warp() const { return number / kWarpSize; }
    int lane() const { return number % kWarpSize; }
};

// A meeting point: the last of `expected` threads completes it and starts the next generation.
struct Rendezvous {
    int expected = 0;
    int arrived = 0;
    unsigned generation = 0;
    const char* operation = nullptr;
};

struct Warp {
    Rendezvous meeting;
    uint8_t operands[kWarpSize][kExchangeBytes];
    uint8_t results[kWarpSize][kExchangeBytes];
};

struct Cta {
    Index index, block, grid;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Rendezvous barrier;
    int announced_phase = -1;  // the phase in which a thread last counted the CTA as arrived (atomic)
    std::unique_ptr<SharedMemory> shared;
};

Thread& current_thread();
Cta& current_cta();

[[noreturn]] void fail(const std::string& what);

// Joins `meeting` under the name `operation`. The last thread to arrive runs `complete` before the others go on.
void meet(Rendezvous& meeting, const char* operation, const std::function<void()>& complete);

// A warp collective: `compute(operands, results)` sees the operands of all 32 lanes and fills their results.
template <class Operand, class Result, class Compute>
Result warp_collective(const char* operation, const Operand& operand, Compute compute) {
    static_assert(sizeof(Operand) <= kExchangeBytes and sizeof(Result) <= kExchangeBytes, "lane exchange is too small");
    Thread& thread = current_thread();
    Warp& warp = current_cta().warps[thread.warp()];
    std::memcpy(warp.operands[thread.lane()], &operand, sizeof operand);
    meet(warp.meeting, operation, [&] {
        Operand operands[kWarpSize];
        Result results[kWarpSize] = {};
        for (int lane = 0; lane < kWarpSize; ++lane)
            std::memcpy(&operands[lane], warp.operands[lane], sizeof(Operand));
        compute(operands, results);
        for (int lane = 0; lane < kWarpSize; ++lane)
            std::memcpy(warp.results[lane], &results[lane], sizeof(Result));
    });
    Result result;
    std::memcpy(&result, warp.results[thread.lane()], sizeof result);
    return result;
}

// CTAs first to last; CTAs and the threads in them last to first; CTAs in strides, so that neighbours are far apart.
enum class Order : unsigned { kForward, kReversed, kStrided };

struct Launch {
    Index grid{1, 1, 1};
    unsigned threads = 32;
    size_t shared_bytes = 0;
    Order order = Order::kForward;  // results must not depend on it
};

// Runs `kernel` once for every thread of the grid.
void launch(const Launch& shape, const std::function<void()>& kernel);

}  // namespace emulation
