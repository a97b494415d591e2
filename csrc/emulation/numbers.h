// fp16 and bf16 bits to numbers and back, rounding to nearest even as cvt.rn does.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../cuda/types.cuh"

namespace emulation {

inline float float_of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

template <class T>
float number(uint16_t bits);

template <>
inline float number<BFloat16>(uint16_t bits) {
    return float_of_bits(static_cast<uint32_t>(bits) << 16);
}

template <>
inline float number<Half>(uint16_t bits) {
    const int exponent = bits >> 10 & 0x1F;
    const int fraction = bits & 0x3FF;
    float magnitude;
    if (exponent == 0x1F)
        magnitude = fraction == 0 ? INFINITY : NAN;
    else if (exponent == 0)
        magnitude = std::ldexp(static_cast<float>(fraction), -24);
    else
        magnitude = std::ldexp(static_cast<float>(fraction + 0x400), exponent - 25);
    return bits & 0x8000 ? -magnitude : magnitude;
}

template <class T>
uint16_t rounded(float value);

template <>
inline uint16_t rounded<BFloat16>(float value) {
    if (std::isnan(value)) return 0x7FFF;
    const uint32_t bits = bits_of_float(value);
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

template <>
inline uint16_t rounded<Half>(float value) {
    if (std::isnan(value)) return 0x7FFF;
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const double magnitude = std::fabs(static_cast<double>(value));
    if (magnitude >= 65520.0) return static_cast<uint16_t>(sign | 0x7C00);
    int exponent = magnitude == 0 ? -14 : std::ilogb(magnitude);
    if (exponent < -14) exponent = -14;
    // nearbyint rounds halves to even; a carry into the next binade falls out of the addition below
    const double steps = std::nearbyint(std::ldexp(magnitude, 10 - exponent));
    const int biased = (exponent + 15) << 10;
    const int bits = steps < 1024 ? static_cast<int>(steps) : biased + static_cast<int>(steps) - 1024;
    return static_cast<uint16_t>(sign | bits);
}

}  // namespace emulation
