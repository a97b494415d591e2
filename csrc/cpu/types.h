// Element types and their exact conversions. Everything is local to a translation unit: files compiled for different
// instruction sets must not share functions that the linker could merge.
#pragma once

#include <cstdint>
#include <cstring>

namespace wandapp {
namespace {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

[[maybe_unused]] inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

[[maybe_unused]] inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

[[maybe_unused]] inline float widen(float value) { return value; }
[[maybe_unused]] inline float widen(Bf16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
[[maybe_unused]] inline float widen(Fp16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return float_of(sign | bits_of(subnormal));
}

// Round to nearest, ties to even; NaN stays NaN.
template <class T>
T narrow(float value);

template <>
[[maybe_unused]] inline float narrow<float>(float value) {
  return value;
}

template <>
[[maybe_unused]] inline Bf16 narrow<Bf16>(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
[[maybe_unused]] inline Fp16 narrow<Fp16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal in fp16
    const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    half = (rounded - 0x38000000u) >> 13;
  } else {  // adding 0.5 aligns the subnormal's last bit with fp32's, so the addition rounds
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  }
  return {static_cast<uint16_t>(sign | half)};
}

}  // namespace
}  // namespace wandapp
