"""Deliberate faults in the 2:4 kernel for many tokens: every one must be caught by `test_mutations.py`."""

from __future__ import annotations

from mutations import SPLIT, Mutation

GEMM, RING, WEIGHTS = "nm_gemm.cuh", "activation_ring.cuh", "nm_weight_ring.cuh"

GEMM_MUTATIONS = [
    # Tiles and slices
    Mutation("gemm_wrong_row_warp", GEMM, "warp / Shape::kTokenWarps % Shape", "warp % Shape", "gemm"),
    Mutation("gemm_wrong_token_warp", GEMM, "warp % Shape::kTokenWarps;", "warp / Shape::kTokenWarps % 2;", "gemm"),
    Mutation("gemm_wrong_split", GEMM, "static_cast<int>(blockIdx.x) / token_blocks;", "0;", "gemm"),
    Mutation(
        "gemm_slices_overlap", GEMM, "blocks) * (split + 1) / splits", "blocks) * (split + 1) / splits + 1", "gemm"
    ),
    Mutation("gemm_rows_past_the_weight", GEMM, "(row_warp < last_row ? row_warp : last_row)", "row_warp", "gemm"),
    Mutation("gemm_wrong_row_block", GEMM, "(row) * blocks + first", "(row) + first", "gemm"),
    Mutation("gemm_block_beyond_the_slice", GEMM, "left > round * Shape", "left >= round * Shape", "gemm"),
    Mutation("gemm_a_round_too_few", GEMM, "Shape::kGroups - 1) / Shape::kGroups", "0) / Shape::kGroups", "gemm"),
    Mutation("gemm_wrong_next_block", GEMM, "gemm.ring.next_round();\n        left", "left", "gemm"),
    Mutation("gemm_same_block", GEMM, "block = block.after(Shape::kGroups);\n        gemm.ring", "gemm.ring", "gemm"),
    Mutation(
        "gemm_wrong_fragment", GEMM, "(i + Shape::kFragments - 1) % Shape", "(i + Shape::kFragments) % Shape", "gemm"
    ),
    Mutation("gemm_wrong_step", GEMM, "(x, n, 32 * kStep)", "(x, n, 16 * kStep)", "gemm"),
    Mutation("gemm_wrong_token_block", GEMM, "x + static_cast<u64>(first_token) * k", "x", "gemm"),
    Mutation(
        "gemm_wrong_group_column",
        GEMM,
        "Shape::kWarpTokens, group * nm::kBlock}};",
        "Shape::kWarpTokens, 0}};",
        "gemm",
    ),
    Mutation(
        "gemm_missing_barrier_before_sums",
        GEMM,
        "cp_async_wait<0>();\n    ptx::sync_cta();",
        "cp_async_wait<0>();",
        "gemm",
    ),
    Mutation("gemm_copies_in_flight_at_the_sums", GEMM, "ptx::cp_async_wait<0>();\n", "", "gemm"),
    Mutation(
        "gemm_missing_barrier_after_sums",
        GEMM,
        "Shape::kWarpTokens);\n    ptx::sync_cta();",
        "Shape::kWarpTokens);",
        "gemm",
    ),
    Mutation("gemm_rows_of_sums", GEMM, "group, row_warp * nm::kBlock, token", "group, row_warp * 0, token", "gemm"),
    Mutation(
        "gemm_tokens_of_sums",
        GEMM,
        "nm::kBlock, token_warp * Shape::kWarpTokens);\n    ptx",
        "nm::kBlock, 0);\n    ptx",
        "gemm",
    ),
    Mutation("gemm_shared_partials", GEMM, "partials + tile * splits", "partials + 0 * tile * splits", "gemm"),
    Mutation("gemm_shared_counter", GEMM, "parts, counters + tile,", "parts, counters,", "gemm"),
    Mutation("gemm_row_tail_not_dropped", GEMM, "if (row >= n) return;", "", "gemm"),
    Mutation("gemm_bias_forgotten", GEMM, "add_bias(sum[0], bias, row, n);", "", "gemm"),
    Mutation(
        "gemm_output_of_another_token", GEMM, "q / Sum::kRowQuads, row, n)", "q % Sum::kRowQuads, row, n)", "gemm"
    ),
    Mutation(
        "quads_of_another_pass",
        SPLIT,
        "const int q = first + i * kThreads;\n                if (q < end)",
        "const int q = first;\n                if (q < end)",
        "gemm",
    ),
    Mutation(
        "quads_of_another_pass_of_a_cta",
        SPLIT,
        "const int q = first + i * kThreads;\n            if (q < end) sums",
        "const int q = first;\n            if (q < end) sums",
        "gemm",
    ),
    Mutation("ring_one_wait_late", RING, "cp_async_wait<kStages - 2>", "cp_async_wait<kStages - 1>", "gemm"),
    Mutation("ring_missing_barrier", RING, "ptx::sync_cta();", "", "gemm"),
    Mutation("ring_missing_commit", RING, "ptx::cp_async_commit();", "", "gemm"),
    Mutation("ring_never_wraps", RING, "return address < end ? address : address - kBytes;", "return address;", "gemm"),
    Mutation(
        "ring_tokens_past_the_last", RING, "wanted and token < tokens_left", "wanted and token <= tokens_left", "gemm"
    ),
    Mutation("ring_columns_past_the_last", RING, "columns_left > 0", "columns_left > -8", "gemm"),
    Mutation("ring_slice_ignored", RING, "(last < stride ? last : stride) - first", "last - first", "gemm"),
    Mutation("ring_same_columns", RING, "source += kColumns;", "", "gemm"),
    Mutation("ring_columns_not_counted", RING, "columns_left -= kColumns;", "", "gemm"),
    Mutation("ring_wrong_token", RING, "stride) * token,", "stride) * i,", "gemm"),
    Mutation("ring_wrong_place", RING, "write + token * Tile::kRowBytes", "write + i * Tile::kRowBytes", "gemm"),
    Mutation("ring_wrong_warp_token", RING, "(warp_token + thread % 8)", "(thread % 8)", "gemm"),
    Mutation("ring_wrong_fragment_token", RING, "thread % 8) * Tile", "thread / 4 % 8) * Tile", "gemm"),
    Mutation("ring_wrong_fragment_column", RING, "thread % 32 / 8 * 8", "thread % 32 / 16 * 8", "gemm"),
    # Weights through shared memory
    Mutation("shared_wrong_corner", GEMM, "(first_row) * blocks + first;", "(first_row) * blocks;", "gemm_shared"),
    Mutation(
        "shared_on_the_activations", GEMM, "{shared + Gemm::Ring::kBytes, weight", "{shared, weight", "gemm_shared"
    ),
    Mutation("shared_wrong_warp", GEMM, "last_row, row_warp}", "last_row, token_warp}", "gemm_shared"),
    Mutation("shared_same_block", GEMM, "weights.next_round();", "", "gemm_shared"),
    Mutation(
        "shared_read_too_early",
        GEMM,
        "gemm.ring.wait();\n            weights.load_fragment(fragment);",
        "weights.load_fragment(fragment);\n            gemm.ring.wait();",
        "gemm_shared",
    ),
    Mutation(
        "shared_copies_of_the_next_group",
        GEMM,
        "weights.start_copy();\n        gemm.ring.start_copy();",
        "gemm.ring.start_copy();\n        weights.start_copy();",
        "gemm_shared",
    ),
    Mutation(
        "shared_metadata_of_another_row",
        WEIGHTS,
        "static_cast<u64>(mine) * blocks)",
        "static_cast<u64>(mine))",
        "gemm_shared",
    ),
    Mutation(
        "shared_metadata_past_the_weight",
        WEIGHTS,
        "nm::kLanes < last_block ? thread / nm::kLanes : last_block;",
        "nm::kLanes;",
        "gemm_shared",
    ),
    Mutation(
        "shared_metadata_of_another_lane",
        WEIGHTS,
        "nm::kLanes + thread % nm::kLanes;",
        "nm::kLanes + thread % 16;",
        "gemm_shared",
    ),
    Mutation("shared_same_metadata", WEIGHTS, "metadata += nm::kLanes;", "", "gemm_shared"),
    Mutation("shared_values_of_another_row", WEIGHTS, "existing * row_stride", "0 * row_stride", "gemm_shared"),
    Mutation(
        "shared_values_past_the_weight", WEIGHTS, "block < last_block ? block : last_block", "block", "gemm_shared"
    ),
    Mutation("shared_half_a_block", WEIGHTS, "i += kThreads) {", "i += 2 * kThreads) {", "gemm_shared"),
    Mutation("shared_same_values", WEIGHTS, "values += kVectors;", "", "gemm_shared"),
    Mutation("shared_rounds_past_the_last", WEIGHTS, "--rounds_left;", "", "gemm_shared"),
    Mutation(
        "shared_never_wraps",
        WEIGHTS,
        "return address < end ? address : address - kBytes;",
        "return address;",
        "gemm_shared",
    ),
    Mutation(
        "shared_wrong_lane",
        WEIGHTS,
        "kBlockBytes + thread % nm::kLanes * 16;",
        "kBlockBytes + thread % 16 * 16;",
        "gemm_shared",
    ),
]
