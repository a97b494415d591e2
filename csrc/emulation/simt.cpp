#include "simt.h"

#include <ucontext.h>

#include <exception>
#include <numeric>

#include "shared_memory.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

struct Fiber {
    static constexpr size_t kStackBytes = 256 * 1024;
    ucontext_t context;
    std::unique_ptr<uint8_t[]> stack{new uint8_t[kStackBytes]};
    bool finished = false;
    const Rendezvous* waits_for = nullptr;
    unsigned generation = 0;
    std::exception_ptr error;

    bool runnable() const { return not finished and (waits_for == nullptr or waits_for->generation != generation); }
};

namespace {

ucontext_t scheduler;
Thread* running = nullptr;
Cta* active = nullptr;
const std::function<void()>* program = nullptr;

// AddressSanitizer must know which stack is in use: each switch is announced before, and confirmed after.
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
void* scheduler_shadow = nullptr;

void announce(void** save, const void* stack, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(save, stack, bytes);
#else
    (void)save, (void)stack, (void)bytes;
#endif
}

void confirm(void* shadow, const void** stack, size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(shadow, stack, bytes);
#else
    (void)shadow, (void)stack, (void)bytes;
#endif
}

void switch_to_scheduler(Fiber& fiber) {
    void* shadow = nullptr;
    announce(fiber.finished ? nullptr : &shadow, scheduler_stack, scheduler_stack_bytes);
    swapcontext(&fiber.context, &scheduler);
    confirm(shadow, &scheduler_stack, &scheduler_stack_bytes);
}

void switch_to(Thread& thread) {
    running = &thread;
    announce(&scheduler_shadow, thread.fiber->stack.get(), Fiber::kStackBytes);
    swapcontext(&scheduler, &thread.fiber->context);
    confirm(scheduler_shadow, nullptr, nullptr);
    running = nullptr;
}

void fiber_main() {
    confirm(nullptr, &scheduler_stack, &scheduler_stack_bytes);
    Fiber& fiber = *running->fiber;
    try {
        (*program)();
        for (const auto& group : running->groups)
            if (not group.empty()) fail("the thread exits with a cp.async still in flight");
        if (not running->open_group.empty()) fail("the thread exits with a cp.async that was never committed");
        for (const PendingStore& store : running->stores) *store.address = store.value;
    } catch (...) {
        fiber.error = std::current_exception();
    }
    fiber.finished = true;
    switch_to_scheduler(fiber);
}

std::string place(const Thread& thread) {
    return "CTA (" + std::to_string(active->index.x) + ", " + std::to_string(active->index.y) + ", " +
           std::to_string(active->index.z) + "), thread " + std::to_string(thread.number);
}

void prepare(Fiber& fiber) {
    fiber.finished = false;
    fiber.waits_for = nullptr;
    fiber.error = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
}

void run_cta(Cta& cta, std::vector<Fiber>& fibers, bool reversed) {
    active = &cta;
    const int count = static_cast<int>(cta.threads.size());
    for (int i = 0; i < count; ++i) {
        cta.threads[i].fiber = &fibers[i];
        prepare(fibers[i]);
    }
    int finished = 0;
    while (finished < count) {
        bool progress = false;
        for (int i = 0; i < count; ++i) {
            Thread& thread = cta.threads[reversed ? count - 1 - i : i];
            if (not thread.fiber->runnable()) continue;
            switch_to(thread);
            progress = true;
            if (thread.fiber->error) std::rethrow_exception(thread.fiber->error);
            finished += thread.fiber->finished;
        }
        if (progress) continue;
        for (const Thread& thread : cta.threads)
            if (not thread.fiber->finished)
                throw EmulationError(place(thread) + ": waits for ever in " + thread.fiber->waits_for->operation +
                                     ", which only " + std::to_string(thread.fiber->waits_for->arrived) + " of " +
                                     std::to_string(thread.fiber->waits_for->expected) + " threads have reached");
    }
}

}  // namespace

Thread& current_thread() { return *running; }
Cta& current_cta() { return *active; }

void fail(const std::string& what) { throw EmulationError(place(*running) + ": " + what); }

void meet(Rendezvous& meeting, const char* operation, const std::function<void()>& complete) {
    if (meeting.arrived > 0 and std::strcmp(meeting.operation, operation) != 0)
        fail(std::string("reaches ") + operation + " while others of the group wait in " + meeting.operation);
    meeting.operation = operation;
    if (++meeting.arrived == meeting.expected) {
        complete();
        meeting.arrived = 0;
        ++meeting.generation;
        return;
    }
    Fiber& fiber = *running->fiber;
    fiber.waits_for = &meeting;
    fiber.generation = meeting.generation;
    switch_to_scheduler(fiber);
    fiber.waits_for = nullptr;
}

// The CTA that runs at `step`; every CTA once.
static uint64_t visited(uint64_t step, uint64_t ctas, Order order) {
    if (order == Order::kForward) return step;
    if (order == Order::kReversed) return ctas - 1 - step;
    uint64_t stride = ctas * 5 / 8 + 1;
    while (std::gcd(stride, ctas) != 1) ++stride;
    return step * stride % ctas;
}

void launch(const Launch& shape, const std::function<void()>& kernel) {
    if (shape.threads == 0 or shape.threads > 1024 or shape.threads % kWarpSize != 0)
        throw EmulationError("a CTA has 32 to 1024 threads, in whole warps");
    program = &kernel;
    std::vector<Fiber> fibers(shape.threads);
    const uint64_t ctas = uint64_t{shape.grid.x} * shape.grid.y * shape.grid.z;
    for (uint64_t step = 0; step < ctas; ++step) {
        const uint64_t i = visited(step, ctas, shape.order);
        Cta cta;
        cta.grid = shape.grid;
        cta.block = {shape.threads, 1, 1};
        cta.index.x = static_cast<unsigned>(i % shape.grid.x);
        cta.index.y = static_cast<unsigned>(i / shape.grid.x % shape.grid.y);
        cta.index.z = static_cast<unsigned>(i / shape.grid.x / shape.grid.y);
        cta.shared = std::make_unique<SharedMemory>(shape.shared_bytes);
        cta.warps.resize(shape.threads / kWarpSize);
        for (Warp& warp : cta.warps) warp.meeting.expected = kWarpSize;
        cta.barrier.expected = static_cast<int>(shape.threads);
        cta.threads.resize(shape.threads);
        for (unsigned t = 0; t < shape.threads; ++t) {
            cta.threads[t].number = static_cast<int>(t);
            cta.threads[t].index = {t, 0, 0};
        }
        run_cta(cta, fibers, shape.order == Order::kReversed);
    }
}

}  // namespace emulation
