// The tensor-core instructions as functions of 32 lanes: fragments gathered, multiplied, scattered (lanes.cpp).
#pragma once

#include <cstdint>

#include "simt.h"

namespace emulation {

struct MmaOperand {
    float c[4];
    uint32_t a[4];
    uint32_t b[4];
    uint32_t metadata;
};

struct Accumulator {
    float c[4];
};

// How a 16-bit element is read as a number: number<Half> or number<BFloat16> of numbers.h.
using Number = float (*)(uint16_t);

void mma_m16n8k16(const MmaOperand* lanes, Accumulator* results, Number number);

// Throws EmulationError where the two positions of a group do not ascend.
void mma_sp_m16n8k32(const MmaOperand* lanes, Accumulator* results, int selector, Number number);

}  // namespace emulation
