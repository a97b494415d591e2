// How nm_decode is cut over a GPU: the launch as a pure function of the shape. plan.py is the same in Python.
//
// One CTA owns 64 rows, one block of tokens and 1/splits of K. More splits fill the GPU evenly, but their partial sums
// are written, awaited and read again. The cost of a choice is counted in bytes that a multiprocessor reads: its even share
// of the weight, or what the busiest one reads where that takes longer, since one alone is faster than one among all; what
// is not bytes (a CTA's start, the wait for the last CTA) is entered as the bytes that pass meanwhile.
#pragma once

struct NmDecodePlan {
    int token_tiles;   // of 8 tokens, in a CTA: 1 or 2, of a SwiGLU pair 4 too
    int token_blocks;  // CTAs along M
    int row_blocks;    // CTAs along N
    int splits;        // CTAs along K
    int shared_bytes;
    long long partials;  // floats of the workspace
    long long counters;  // words of the workspace
};

namespace nm_plan {

constexpr int kBlockBytes = 64 * 64 * 9 / 8;  // of weights, 16 bit
constexpr int kWarps = 8;
constexpr int kMostSplits = 32;
constexpr long long kStartBytes = 4096;
constexpr long long kWaitBytes = 32768;

constexpr long long ceil_divide(long long a, long long b) { return (a + b - 1) / b; }

constexpr long long cost(long long row_blocks, long long column_blocks, long long token_blocks, long long tokens,
                         long long matrices, long long multiprocessors, long long splits) {
    const long long ctas = ceil_divide(row_blocks * token_blocks * splits, multiprocessors);
    const long long share = row_blocks * token_blocks * column_blocks * matrices * kBlockBytes / multiprocessors;
    const long long busiest = ctas * ceil_divide(column_blocks, splits) * matrices * kBlockBytes * 4 / 7;
    const long long partial = tokens * 64 * 4 * matrices;
    const long long reduction = splits == 1 ? 0 : kWaitBytes + (ctas + splits) * partial;
    return (share > busiest ? share : busiest) + ctas * kStartBytes + reduction;
}

}  // namespace nm_plan

// y [m, n] = x [m, k] W^T for `matrices` weights (1, or 2 for a SwiGLU pair) on a GPU with `multiprocessors`.
constexpr NmDecodePlan plan_nm_decode(int n, int k, int m, int multiprocessors, int matrices) {
    NmDecodePlan plan{};
    plan.token_tiles = m <= 8 ? 1 : m <= 16 or matrices == 1 ? 2 : 4;
    const int tokens = 8 * plan.token_tiles;
    plan.token_blocks = static_cast<int>(nm_plan::ceil_divide(m, tokens));
    plan.row_blocks = static_cast<int>(nm_plan::ceil_divide(n, 64));
    const long long column_blocks = nm_plan::ceil_divide(k, 64);
    plan.splits = 1;
    long long best = -1;
    for (int splits = 1; splits <= nm_plan::kMostSplits and splits <= column_blocks; ++splits) {
        const long long cost = nm_plan::cost(plan.row_blocks, column_blocks, plan.token_blocks, tokens, matrices,
                                             multiprocessors, splits);
        if (best < 0 or cost < best) {
            best = cost;
            plan.splits = splits;
        }
    }
    const int round_columns = 64 * nm_plan::kWarps / matrices;
    const int activations = 2 * tokens * (2 * round_columns + 16);
    const int sums = nm_plan::kWarps * tokens * (64 + 4) * 4;
    plan.shared_bytes = activations > sums ? activations : sums;
    const long long tiles = static_cast<long long>(plan.row_blocks) * plan.token_blocks;
    plan.partials = plan.splits == 1 ? 0 : tiles * plan.splits * matrices * tokens * 64;
    plan.counters = plan.splits == 1 ? 0 : tiles;
    return plan;
}
