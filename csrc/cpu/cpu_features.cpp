// CPUID leaves 0, 1 and 7, and XCR0: the registers must be saved by the operating system too (Intel SDM, vol. 1, 13.3).
#include "cpu_features.h"

#include "tile_permission.h"

#if defined(__x86_64__)
#include <cpuid.h>

#include <cstdint>
#endif

namespace wandapp {

#if defined(__x86_64__)
namespace {

struct Features {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, avx512_vbmi2 = false, amx_bf16 = false, amx = false;

  Features() {
    uint32_t a, b, c, d;
    if (__get_cpuid(0, &a, &b, &c, &d) == 0) return;
    const bool intel = b == signature_INTEL_ebx && c == signature_INTEL_ecx && d == signature_INTEL_edx;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0) return;
    const auto bit = [](uint32_t word, int i) { return (word >> i & 1) != 0; };
    const bool fma = bit(c, 12), popcnt = bit(c, 23), osxsave = bit(c, 27), avx = bit(c, 28), f16c = bit(c, 29);
    if (!osxsave || !avx) return;
    uint32_t enabled, upper;
    __asm__("xgetbv" : "=a"(enabled), "=d"(upper) : "c"(0));
    const bool ymm = (enabled & 0x6) == 0x6, zmm = (enabled & 0xe6) == 0xe6, tiles = (enabled & 0x60000) == 0x60000;
    if (!ymm || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return;
    avx2 = bit(b, 5) && fma && f16c && popcnt;
    avx512 = avx2 && zmm && bit(b, 16) && bit(b, 30) && bit(b, 31) && bit(c, 1);
    amx_bf16 = tiles && bit(d, 22);
    const bool vbmi2 = bit(c, 6);
    amx = amx_bf16 && bit(d, 24) && avx512 && vbmi2;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d) == 0) return;
    avx512_bf16 = avx512 && bit(a, 5);
    avx512_vbmi2 = avx512_bf16 && vbmi2 && intel;
  }
};

const Features& features() {
  static const Features found;
  return found;
}

}  // namespace

bool has_avx2() { return features().avx2; }
bool has_avx512() { return features().avx512; }
bool has_avx512_bf16() { return features().avx512_bf16; }
bool has_avx512_vbmi2() { return features().avx512_vbmi2; }
bool has_amx() { return features().amx && may_use_tiles(); }
bool has_fast_bf16_gemm() { return features().avx512_bf16 || features().amx_bf16; }
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
bool has_avx512_vbmi2() { return false; }
bool has_amx() { return false; }
bool has_fast_bf16_gemm() { return false; }
#endif

}  // namespace wandapp
