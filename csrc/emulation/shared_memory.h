// Shared memory of one CTA: exactly as large as the launch asked for, poisoned, and with a memory of who touched what.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "simt.h"

namespace emulation {

class SharedMemory {
  public:
    explicit SharedMemory(size_t bytes);
    ~SharedMemory();
    SharedMemory(const SharedMemory&) = delete;
    SharedMemory& operator=(const SharedMemory&) = delete;

    uint8_t* data() { return data_; }

    // Each checks bounds, alignment and order, and records the access of the running thread.
    void read(const void* address, size_t bytes, size_t alignment);
    void write(const void* address, size_t bytes, size_t alignment);

    void start_copy(AsyncCopy copy, void* destination);  // cp.async: joins the running thread's open group
    void land(const AsyncCopy& copy);

  private:
    struct Access {
        int thread = -1;  // the last one; kSeveral where more than one warp is concerned
        int warp = -1;
        unsigned cta_phase = 0, warp_phase = 0;
    };
    struct Byte {
        Access writer, reader;
        bool in_flight = false;
    };

    size_t locate(const void* address, size_t bytes, size_t alignment) const;
    void mark_written(size_t offset, size_t bytes, const char* what);

    uint8_t* data_;
    size_t bytes_;
    std::vector<Byte> shadow_;
};

}  // namespace emulation
