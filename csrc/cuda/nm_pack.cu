// Entry points of the packing kernels of 2:4 weights (see nm_pack.cuh): 256 threads a CTA.
#include "nm_pack.cuh"

extern "C" __global__ void __launch_bounds__(256) nm_pack(const u16* values, const u8* indices, uint4* packed_values,
                                                          u32* metadata, int n, int k) {
    nm_pack_vector(values, indices, packed_values, metadata, n, k);
}

extern "C" __global__ void __launch_bounds__(256) nm_unpack(const u16* packed_values, const u8* metadata, u16* values,
                                                            u8* indices, int n, int k) {
    nm_unpack_value(packed_values, metadata, values, indices, n, k);
}

extern "C" __global__ void __launch_bounds__(256) nm_decompress(const uint4* packed_values, const u32* metadata, u16* out,
                                                                int n, int k) {
    nm_decompress_vector(packed_values, metadata, out, n, k);
}
