"""Deliberate faults in the sources of the 2:4 kernels: every one must be caught by `test_mutations.py`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """`old` occurs once in `file` and becomes `new`. `kernel`: which one shows it: decode, swiglu, gemm, gemm_shared
    (weights through shared memory) or pack."""

    name: str
    file: str
    old: str
    new: str
    kernel: str = "decode"


DECODE, ACTIVATIONS, SPLIT, PACK = "nm_decode.cuh", "activations.cuh", "split_k.cuh", "nm_pack.cuh"
FRAGMENT, OUTPUT = "nm_fragment.cuh", "output.cuh"
LAYOUT = "fragment_layout.py"

MUTATIONS = [
    # Weights
    Mutation("swapped_steps", FRAGMENT, "= values + kStep * nm::kRowTiles", "= values + (1 - kStep) * nm::kRowTiles"),
    Mutation("wrong_selector", FRAGMENT, "<T, kStep>(sums[1]", "<T, 1 - kStep>(sums[1]"),
    Mutation("wrong_metadata_word", FRAGMENT, "x, metadata.z)", "x, metadata.w)"),
    Mutation("wrong_row_tile", FRAGMENT, "(sums[2][n], step[2]", "(sums[2][n], step[3]"),
    Mutation("wrong_load", FRAGMENT, "block.values + i * nm::kLanes", "block.values + (i ^ 1) * nm::kLanes"),
    Mutation("half_a_block", FRAGMENT, "i < (kStep + 1) * nm::kRowTiles", "i < (kStep + 1) * nm::kRowTiles - 1"),
    Mutation("wrong_lane", DECODE, ".after(first_block, threadIdx.x % 32)", ".after(first_block, threadIdx.x % 16)"),
    Mutation("block_beyond_the_slice", DECODE, "Decode::kGroups + group < end; }", "Decode::kGroups + group <= end; }"),
    Mutation(
        "wrong_next_block",
        DECODE,
        "block = block.after(Decode::kGroups);\n        first",
        "block = block.after(1);\n        first",
    ),
    Mutation("slices_overlap", DECODE, "blocks) * (split + 1) / splits", "blocks) * (split + 1) / splits + 1"),
    Mutation(
        "wrong_row_block", DECODE, "static_cast<u64>(row_block) * blocks + first", "static_cast<u64>(row_block) + first"
    ),
    # Activations
    Mutation(
        "wrong_column", DECODE, "current, tile, group * nm::kBlock + 32)", "current, tile, group * nm::kBlock + 16)"
    ),
    Mutation("missing_wait", DECODE, "ptx::cp_async_wait<0>();\n        ptx::sync_cta();", "ptx::sync_cta();"),
    Mutation("missing_barrier", DECODE, "cp_async_wait<0>();\n        ptx::sync_cta();", "cp_async_wait<0>();"),
    Mutation("one_buffer", DECODE, "stage(1, 1 - kParity);", "stage(1, kParity);"),
    Mutation("wrong_buffer", DECODE, "tile = tiles + kParity * Tile", "tile = tiles + (1 - kParity) * Tile"),
    Mutation("missing_barrier_before_elements", DECODE, "ptx::sync_cta();\n            Tile::copy_el", "Tile::copy_el"),
    Mutation("missing_barrier_after_elements", DECODE, "nm::kBlock);\n            ptx::sync_cta();", "nm::kBlock);"),
    Mutation("wrong_fragment_token", ACTIVATIONS, "8 * token_tile + lane % 8", "8 * token_tile + lane / 4"),
    Mutation("wrong_fragment_column", ACTIVATIONS, "lane / 8 * kVector", "lane % 4 * kVector"),
    Mutation("reads_past_the_row", ACTIVATIONS, "column < stride ? 16 : 0", "column < stride + 8 ? 16 : 0"),
    Mutation("element_past_the_row", ACTIVATIONS, "if (first + column < stride) bits", "bits"),
    Mutation(
        "missing_tokens_not_cleared", ACTIVATIONS, "first = tokens * kRowVectors;", "first = kTokens * kRowVectors;"
    ),
    Mutation("wrong_token_step", ACTIVATIONS, "token += kTokenStep", "token += kTokenStep + 1"),
    Mutation("alignment_not_asked", ACTIVATIONS, "return stride % kVector == 0 and", "return stride % 4 == 0 and"),
    Mutation(
        "wrong_token_block", DECODE, "x + static_cast<u64>(first_token) * k", "x + 0 * static_cast<u64>(first_token)"
    ),
    # Sums
    Mutation("missing_barrier_before_sums", DECODE, "cp_async_wait<0>();\n    ptx::sync_cta();", "cp_async_wait<0>();"),
    Mutation("missing_barrier_after_sums", DECODE, "warp, 0, 0);\n    ptx::sync_cta();", "warp, 0, 0);"),
    Mutation("wrong_row_half", SPLIT, "+ 8 * (i / 2)", "+ 8 * (i % 2)"),
    Mutation("wrong_token_of_sum", SPLIT, "(8 * n + i % 2) * kStride", "(8 * n + i / 2) * kStride"),
    Mutation("wrong_slab", SPLIT, "shared + slab * kSlab +", "shared + (slab ^ 1) / 2 * kSlab +"),
    Mutation("a_warp_forgotten", SPLIT, "group < kGroups; ++group", "group < kGroups - 1; ++group"),
    Mutation("a_warp_twice", SPLIT, "int group = 1; group < kGroups", "int group = 0; group < kGroups"),
    Mutation("missing_fence", SPLIT, "ptx::fence_device();\n        ptx::sync_cta();", "ptx::sync_cta();"),
    Mutation("missing_barrier_of_splits", SPLIT, "fence_device();\n        ptx::sync_cta();", "fence_device();"),
    Mutation(
        "missing_barrier_of_arrival", SPLIT, "}\n        ptx::sync_cta();\n        ptx::fence", "}\n        ptx::fence"
    ),
    Mutation("first_instead_of_last", SPLIT, "(arrived) == static_cast<u32>(splits) - 1", "(arrived) == 0u"),
    Mutation(
        "counter_left_behind", SPLIT, "const u32 last = static_cast<u32>(splits) - 1;", "const u32 last = splits;"
    ),
    Mutation("a_split_forgotten", SPLIT, "int split = 0; split < splits", "int split = 1; split < splits"),
    Mutation(
        "shared_partials", DECODE, "partials + tile * splits * kMatrices", "partials + 0 * tile * splits * kMatrices"
    ),
    Mutation("shared_counter", DECODE, "parts, counters + tile,", "parts, counters,"),
    # Output
    Mutation("row_tail_not_dropped", DECODE, "if (row >= n) return;", ""),
    Mutation("row_tail_of_a_quad_not_dropped", OUTPUT, "if (row + i < n) target[i]", "target[i]"),
    Mutation("quads_where_rows_are_not_aligned", OUTPUT, "if (n % 4 == 0)", "if (n > 0)"),
    Mutation("quad_halves_swapped", OUTPUT, "(rounded[1].bits) << 16", "(rounded[3].bits) << 16"),
    Mutation("token_tail_not_dropped", SPLIT, "end = tokens * kRowQuads", "end = kQuads"),
    Mutation("bias_forgotten", OUTPUT, "if (bias == nullptr) return;", "if (bias != nullptr) return;"),
    Mutation("bias_of_another_row", OUTPUT, "load_constant(bias + row))", "load_constant(bias + row / 2))"),
    Mutation("bias_of_another_quad_row", OUTPUT, "load_constant(bias + row + 2)", "load_constant(bias + row + 1)"),
    Mutation("bias_past_the_last_row", OUTPUT, "if (row + 3 < n) value.w", "value.w"),
    Mutation("one_bias_for_both", DECODE, "add_bias(sum[1], up_bias", "add_bias(sum[1], bias", "swiglu"),
    Mutation("silu_of_up", DECODE, "silu(gate.x) * up.x", "silu(up.x) * gate.x", "swiglu"),
    Mutation("silu_of_up_last", DECODE, "silu(gate.w) * up.w", "silu(up.w) * gate.w", "swiglu"),
    Mutation("gate_and_up_swapped", DECODE, "Decode::kGroups ? up : weight", "Decode::kGroups ? weight : up", "swiglu"),
    Mutation(
        "up_summed_from_gate", SPLIT, "shared + matrix * kGroups * kSlab", "shared + 0 * matrix * kSlab", "swiglu"
    ),
    Mutation(
        "partials_of_one_matrix",
        SPLIT,
        "split * kMatrices + matrix) * kQuads + q, cta",
        "split * kMatrices) * kQuads + q, cta",
        "swiglu",
    ),
    # Packing
    Mutation("packed_row_half", PACK, "place.row + 8, place.column) << 16", "place.row, place.column) << 16", "pack"),
    Mutation("packed_halves_swapped", PACK, "lane / 4 + e / 2 % 2 * 8;", "lane / 4 + e / 4 * 8;", "pack"),
    Mutation("packed_step", PACK, "column_block * 32 + step * 16", "column_block * 32 + (1 - step) * 16", "pack"),
    Mutation("packed_padding", PACK, "u32 bits = nm::kPadding << 4 | nm::kPadding;", "u32 bits = 0;", "pack"),
    Mutation("packed_tail_of_a_byte", PACK, "& used) | (bits & ~used)", "& used)", "pack"),
    Mutation("packed_row_tail", PACK, "place.row < n and place.column", "place.column", "pack"),
    Mutation("unpacked_lane", PACK, "row % 8 * 4 + column % 8 / 2", "row % 8 * 4 + column % 4", "pack"),
    Mutation("unpacked_byte", PACK, "row / 8 % 2 * 2 + byte % 2]", "row / 8 % 2 * 2 + (1 - byte % 2)]", "pack"),
    Mutation("dense_row_half", PACK, "first_row + e % 2 * 8;", "first_row + e / 2 * 8;", "pack"),
    Mutation("dense_column", PACK, "first_column + e / 2 * 16;", "first_column + e / 2 * 8;", "pack"),
    Mutation("dense_metadata_lane", PACK, "= words[e / 2] >>", "= words[e % 2] >>", "pack"),
    Mutation("dense_nibble", PACK, "(e % 2 * 16 + lane % 4 * 4)", "(e / 2 * 16 + lane % 4 * 4)", "pack"),
    Mutation(
        "dense_positions_swapped", PACK, "0xFFFFu) << (16 * (nibble & 3))", "0xFFFFu) << (16 * (nibble >> 2))", "pack"
    ),
    Mutation("dense_step", PACK, "* 64 + step * 32 + lane % 4 * 4", "* 64 + (1 - step) * 32 + lane % 4 * 4", "pack"),
    Mutation("dense_row_tail", PACK, "if (row >= n) continue;", "", "pack"),
    Mutation("dense_column_tail", PACK, "if (column + i < k) target[i]", "target[i]", "pack"),
    Mutation("dense_vector_tail", PACK, "            if (column < k)\n                *rein", "*rein", "pack"),
    Mutation("dense_unaligned_rows", PACK, "if (k % 4 == 0) {", "if (k % 2 == 0) {", "pack"),
    # The layout in Python: caught by the unchanged kernel
    Mutation("value_order", LAYOUT, "(0, 4, 5, 1, 3, 7, 6, 2, 8)", "(0, 4, 5, 1, 3, 7, 2, 6, 8)", "layout"),
    Mutation("value_steps", LAYOUT, "(0, 4, 5, 1, 3, 7, 6, 2, 8)", "(0, 4, 6, 1, 3, 7, 5, 2, 8)", "layout"),
    Mutation("metadata_order", LAYOUT, "(0, 4, 3, 5, 1, 2)", "(0, 4, 5, 3, 1, 2)", "layout"),
    Mutation("nibble_swapped", LAYOUT, "pack_fields(fields, 2)", "pack_fields(fields.flip(1), 2)", "layout"),
    Mutation("illegal_padding", LAYOUT, "fields[:, 1::2] = 1", "fields[:, 1::2] = 0", "layout"),
]
