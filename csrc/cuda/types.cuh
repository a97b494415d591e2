// The two 16-bit storage types of the kernels, as plain bits: no toolkit header is needed, so NVRTC compiles this too.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

struct Half {
    u16 bits;
};

struct BFloat16 {
    u16 bits;
};
