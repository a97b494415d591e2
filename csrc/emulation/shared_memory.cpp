#include "shared_memory.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace emulation {

namespace {

constexpr int kSeveral = -2;
constexpr std::align_val_t kAlignment{128};
constexpr uint8_t kPoison = 0xFF;  // a NaN in fp32, fp16 and bf16, and a huge index

// Whether an earlier access of another thread is separated from the running thread by a barrier of the CTA or warp.
template <class Access>
bool ordered_before(const Access& earlier, const Thread& now) {
    if (earlier.thread == -1 or earlier.thread == now.number) return true;
    if (earlier.cta_phase < now.cta_phase) return true;
    return earlier.warp == now.warp() and earlier.warp_phase < now.warp_phase;
}

std::string at(size_t offset) { return " at byte " + std::to_string(offset) + " of shared memory"; }

std::string by(int thread) { return thread == kSeveral ? "several threads" : "thread " + std::to_string(thread); }

}  // namespace

SharedMemory::SharedMemory(size_t bytes)
    : data_(static_cast<uint8_t*>(::operator new(bytes, kAlignment))), bytes_(bytes), shadow_(bytes) {
    std::memset(data_, kPoison, bytes);
}

SharedMemory::~SharedMemory() { ::operator delete(data_, kAlignment); }

size_t SharedMemory::locate(const void* address, size_t bytes, size_t alignment) const {
    const auto offset = static_cast<ptrdiff_t>(reinterpret_cast<intptr_t>(address) - reinterpret_cast<intptr_t>(data_));
    if (offset < 0 or static_cast<size_t>(offset) + bytes > bytes_)
        fail("access out of bounds: byte " + std::to_string(offset) + " of " + std::to_string(bytes_) +
             " bytes of shared memory");
    if (offset % static_cast<ptrdiff_t>(alignment) != 0)
        fail("access of " + std::to_string(bytes) + " bytes not aligned to " + std::to_string(alignment) +
             at(static_cast<size_t>(offset)));
    return static_cast<size_t>(offset);
}

void SharedMemory::read(const void* address, size_t bytes, size_t alignment) {
    const size_t offset = locate(address, bytes, alignment);
    const Thread& now = current_thread();
    for (size_t i = offset; i < offset + bytes; ++i) {
        Byte& byte = shadow_[i];
        if (byte.in_flight) fail("read of a cp.async that has not been waited for" + at(i));
        if (byte.writer.thread == -1) fail("read of memory that was never written" + at(i));
        if (not ordered_before(byte.writer, now))
            fail("read without a barrier after the write of " + by(byte.writer.thread) + at(i));
        Access& reader = byte.reader;
        if (reader.thread == -1 or reader.cta_phase != now.cta_phase) {
            reader = {now.number, now.warp(), now.cta_phase, now.warp_phase};
        } else {
            if (reader.thread != now.number) reader.thread = kSeveral;
            if (reader.warp != now.warp()) reader.warp = kSeveral;
            reader.warp_phase = std::max(reader.warp_phase, now.warp_phase);
        }
    }
}

void SharedMemory::mark_written(size_t offset, size_t bytes, const char* what) {
    const Thread& now = current_thread();
    for (size_t i = offset; i < offset + bytes; ++i) {
        Byte& byte = shadow_[i];
        if (not ordered_before(byte.reader, now))
            fail(std::string(what) + " without a barrier after the read of " + by(byte.reader.thread) + at(i));
        if (not ordered_before(byte.writer, now))
            fail(std::string(what) + " without a barrier after the write of " + by(byte.writer.thread) + at(i));
        byte.writer = {now.number, now.warp(), now.cta_phase, now.warp_phase};
    }
}

void SharedMemory::write(const void* address, size_t bytes, size_t alignment) {
    const size_t offset = locate(address, bytes, alignment);
    for (size_t i = offset; i < offset + bytes; ++i)
        if (shadow_[i].in_flight) fail("write over a cp.async in flight" + at(i));
    mark_written(offset, bytes, "write");
}

void SharedMemory::start_copy(AsyncCopy copy, void* destination) {
    copy.offset = locate(destination, 16, 16);
    for (size_t i = copy.offset; i < copy.offset + 16; ++i)
        if (shadow_[i].in_flight) fail("cp.async over another one in flight" + at(i));
    mark_written(copy.offset, 16, "cp.async");
    for (size_t i = copy.offset; i < copy.offset + 16; ++i) shadow_[i].in_flight = true;
    std::memset(data_ + copy.offset, kPoison, 16);
    current_thread().open_group.push_back(copy);
}

void SharedMemory::land(const AsyncCopy& copy) {
    std::memset(data_ + copy.offset, 0, 16);
    if (copy.bytes > 0) std::memcpy(data_ + copy.offset, copy.source, static_cast<size_t>(copy.bytes));
    for (size_t i = copy.offset; i < copy.offset + 16; ++i) shadow_[i].in_flight = false;
    mark_written(copy.offset, 16, "cp.async");
}

}  // namespace emulation
