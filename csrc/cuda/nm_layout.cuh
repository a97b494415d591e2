// Fragment order of a 2:4 weight W [N, K]: what a warp of the decode kernel loads, in the order it loads it.
//
// W is cut into blocks of 64 rows x 64 columns (N and K padded up; padding: value 0, nibble 0x4). One block is
//     values    [2 steps][4 row tiles][32 lanes][8]   16-bit elements, 4096 bytes: step s = columns 32s to 32s + 31
//     metadata  [32 lanes][4 row tiles]               32-bit words, 512 bytes
// and blocks follow each other [ceil(N / 64)][ceil(K / 64)]. A lane's 16 bytes of values are its A registers of one
// mma.sp.m16n8k32, its 16 bytes of metadata serve the whole block (both steps: selector = step). With g = lane / 4,
// t = lane % 4 and compressed columns c (16 of them a step):
//     values   elements 0,1: row g, c = 2t, 2t+1        elements 4,5: row g, c = 8+2t, 9+2t
//              elements 2,3: row g+8, c = 2t, 2t+1      elements 6,7: row g+8, c = 8+2t, 9+2t
//     metadata bits 0-15: row g, columns 16t to 16t+15 of the block;  bits 16-31: row g+8; one nibble a group of four
// Source: PTX ISA 9.1, section 9.7.14.6.2 (matrix fragments of mma.sp.m16n8k32, selectors 0 and 1).
#pragma once

#include "ptx.cuh"

namespace nm {

constexpr int kBlock = 64;                             // rows, and columns, of a block
constexpr int kSteps = 2;                              // mma.sp along K in a block
constexpr int kRowTiles = 4;                           // mma.sp along N in a block
constexpr int kLanes = 32;
constexpr int kLoads = kSteps * kRowTiles;             // 16-byte loads of values, for one lane and block
constexpr int kValuesPerBlock = kBlock * kBlock / 2;
constexpr u32 kPadding = 0x4;                          // positions 0 and 1

static __device__ __forceinline__ int blocks(int extent) { return (extent + kBlock - 1) / kBlock; }

}  // namespace nm
