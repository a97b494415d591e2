// What the processor and the operating system allow, asked at run time.
#pragma once

namespace wandapp {

bool has_avx2();         // AVX2, FMA, F16C, POPCNT
bool has_avx512();       // AVX-512 F, BW, VL, VBMI, and the above
bool has_avx512_bf16();  // AVX512-BF16, and the above
// AVX512-VBMI2, and the above, on a processor of Intel: AMD's have the instructions too, but slow ones.
bool has_avx512_vbmi2();
bool has_amx();             // AMX-TILE, AMX-BF16, AVX512-VBMI2, and the permission of the system to use tiles
bool has_fast_bf16_gemm();  // AMX-BF16 or AVX512-BF16: dense libraries multiply bf16 natively

}  // namespace wandapp
