// The 2:4 kernels and their launch plan, callable by name.
#include "../cuda/nm_decode.cu"
#include "../cuda/nm_pack.cu"
#include "../cuda/plan.h"
#include "runner.h"

namespace {

using emulation::Kernel;

// Seven integers of the plan, and the shared memory the kernel itself computes, for tests against plan.py.
void nm_plan(long long* out, int n, int k, int m, int multiprocessors, int matrices) {
    if (threadIdx.x != 0) return;
    const NmDecodePlan p = plan_nm_decode(n, k, m, multiprocessors, matrices);
    const long long fields[] = {p.token_tiles,  p.token_blocks, p.row_blocks, p.splits,
                                p.shared_bytes, p.partials,     p.counters};
    for (long long field : fields) *out++ = field;
}

const Kernel plan("nm_plan", &nm_plan);
const Kernel pack("nm_pack", &nm_pack);
const Kernel unpack("nm_unpack", &nm_unpack);
const Kernel decompress("nm_decompress", &nm_decompress);

#define DECODE(NAME) const Kernel decode_##NAME("nm_decode_" #NAME, &nm_decode_##NAME)
#define SWIGLU(NAME) const Kernel swiglu_##NAME("nm_swiglu_" #NAME, &nm_swiglu_##NAME)

DECODE(fp16_8);
DECODE(fp16_16);
DECODE(bf16_8);
DECODE(bf16_16);
SWIGLU(fp16_8);
SWIGLU(fp16_16);
SWIGLU(fp16_32);
SWIGLU(bf16_8);
SWIGLU(bf16_16);
SWIGLU(bf16_32);

}  // namespace
