// Fragment maps: PTX ISA 9.1, 9.7.14.5.8 (m16n8k16) and 9.7.14.6 (sparse m16n8k32).
#include "lanes.h"

namespace emulation {

namespace {

// Registers are pairs of 16-bit elements: element 0 in the low half.
uint16_t half_of(const uint32_t* registers, int element) {
    return static_cast<uint16_t>(registers[element / 2] >> (16 * (element % 2)));
}

// Element i of lane 4g + t of the 16 x 16 A fragment (compressed columns for the sparse form).
int a_row(int lane, int i) { return lane / 4 + (i / 2 % 2 == 1 ? 8 : 0); }
int a_column(int lane, int i) { return 2 * (lane % 4) + i % 2 + (i >= 4 ? 8 : 0); }

// Element i of the K x 8 B fragment: (row, column) = (b_row, lane / 4).
int b_row(int lane, int i) { return 2 * (lane % 4) + i % 2 + 8 * (i / 2); }

// Element i of the 16 x 8 accumulator.
int c_row(int lane, int i) { return lane / 4 + (i >= 2 ? 8 : 0); }
int c_column(int lane, int i) { return 2 * (lane % 4) + i % 2; }

// The lane whose metadata register describes columns 16h to 16h + 15 of row g (low half) and g + 8 (high half).
int metadata_lane(int row, int column, int selector) { return 4 * (row % 8) + 2 * selector + column / 16; }

// The two positions of the group of four that starts at logical `column` (0 to 31) of `row`: a nibble of the metadata.
unsigned metadata_nibble(const MmaOperand* lanes, int row, int column, int selector) {
    const uint32_t word = lanes[metadata_lane(row, column, selector)].metadata;
    return word >> ((row >= 8 ? 16 : 0) + column % 16) & 0xF;
}

void accumulate(const MmaOperand* lanes, const double (&product)[16][8], Accumulator* results) {
    for (int lane = 0; lane < kWarpSize; ++lane)
        for (int i = 0; i < 4; ++i)
            results[lane].c[i] =
                static_cast<float>(lanes[lane].c[i] + product[c_row(lane, i)][c_column(lane, i)]);
}

}  // namespace

void mma_m16n8k16(const MmaOperand* lanes, Accumulator* results, Number number) {
    double a[16][16], b[16][8], product[16][8] = {};
    for (int lane = 0; lane < kWarpSize; ++lane) {
        for (int i = 0; i < 8; ++i) a[a_row(lane, i)][a_column(lane, i)] = number(half_of(lanes[lane].a, i));
        for (int i = 0; i < 4; ++i) b[b_row(lane, i)][lane / 4] = number(half_of(lanes[lane].b, i));
    }
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 8; ++n) product[m][n] += a[m][k] * b[k][n];
    accumulate(lanes, product, results);
}

void mma_sp_m16n8k32(const MmaOperand* lanes, Accumulator* results, int selector, Number number) {
    double a[16][16], b[32][8], product[16][8] = {};
    for (int lane = 0; lane < kWarpSize; ++lane) {
        for (int i = 0; i < 8; ++i) a[a_row(lane, i)][a_column(lane, i)] = number(half_of(lanes[lane].a, i));
        for (int i = 0; i < 8; ++i) b[b_row(lane, i)][lane / 4] = number(half_of(lanes[lane].b, i));
    }
    for (int m = 0; m < 16; ++m) {
        for (int group = 0; group < 8; ++group) {
            const unsigned nibble = metadata_nibble(lanes, m, 4 * group, selector);
            const int first = nibble & 3, second = nibble >> 2;
            if (first >= second)
                fail("mma.sp metadata of row " + std::to_string(m) + ", group " + std::to_string(group) + " is " +
                     std::to_string(nibble) + ": the two positions do not ascend");
            for (int n = 0; n < 8; ++n) {
                product[m][n] += a[m][2 * group] * b[4 * group + first][n];
                product[m][n] += a[m][2 * group + 1] * b[4 * group + second][n];
            }
        }
    }
    accumulate(lanes, product, results);
}

}  // namespace emulation
