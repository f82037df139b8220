"""Tiles of the kernels on GPUs.

Each compiles without register spills for every target in the ahead-of-time test
(docs/gpu-kernels.md). Those for sm_90 were measured on an H200; the others are chosen on paper.
"""

from __future__ import annotations

from bitnet_triton.runtime.tiles_cpu import ANY, Tiles

# Added to the size of float32 heads, whose products run on no matrix units
FLOAT32 = 1024

# Forward and dq where rows select by scores: as large as fits beside what the selection needs
_SELECTED: dict[int, Tiles] = {
    256: {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    FLOAT32 + 64: {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    FLOAT32 + 128: {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
}

# Also where it takes keys or rows from a list, and of exact attention
_DKDV: dict[int, Tiles] = {
    128: {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
    256: {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    FLOAT32 + 128: {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
}

# kernel -> the largest size of a shape class -> its tiles. The size is the number of rows of
# activations (few for decoding, many for prefill and training), or what the launcher says
GPU: dict[str, dict[int, Tiles]] = {
    "quantize_activations_fwd": {  # the length of a row
        1024: {"BLOCK_K": 1024, "num_warps": 4},
        4096: {"BLOCK_K": 4096, "num_warps": 4},
        8192: {"BLOCK_K": 8192, "num_warps": 8},
        32768: {"BLOCK_K": 32768, "num_warps": 16},
    },
    "weight_sums_fwd": {  # the number of elements
        ANY: {"BLOCK": 4096, "BLOCKS": 8, "num_warps": 8},
    },
    "weight_stats_fwd": {  # the number of programs of the kernel before it
        ANY: {"BLOCK": 1024, "num_warps": 4},
    },
    "rms_norm_fwd": {  # the length of a row, here and below
        1024: {"BLOCK_D": 1024, "num_warps": 4},
        4096: {"BLOCK_D": 4096, "num_warps": 8},
        16384: {"BLOCK_D": 16384, "num_warps": 16},
    },
    "rms_norm_bwd": {
        1024: {"BLOCK_D": 1024, "num_warps": 4},
        4096: {"BLOCK_D": 4096, "num_warps": 8},
        16384: {"BLOCK_D": 16384, "num_warps": 16},
    },
    "rms_norm_quantize_fwd": {
        1024: {"BLOCK_D": 1024, "num_warps": 4},
        4096: {"BLOCK_D": 4096, "num_warps": 8},
        16384: {"BLOCK_D": 16384, "num_warps": 16},
    },
    "relu2_mul_norm_quantize_fwd": {
        1024: {"BLOCK_F": 1024, "num_warps": 4},
        8192: {"BLOCK_F": 8192, "num_warps": 8},
        16384: {"BLOCK_F": 16384, "num_warps": 16},
    },
    "silu_mul_quantize_fwd": {
        1024: {"BLOCK_F": 1024, "num_warps": 4},
        8192: {"BLOCK_F": 8192, "num_warps": 8},
        # twice as long spills with any number of warps
        16384: {"BLOCK_F": 16384, "num_warps": 16},
    },
    "ternary_linear_fwd": {
        # 256 outputs by 64 tokens for 4 warps, two programs a multiprocessor; twice that for 8:
        # the most accumulators that registers hold, and the fewest bytes read for a product
        1024: {
            "BLOCK_M": 64,
            "BLOCK_R": 64,
            "BLOCK_K": 64,
            "IN_PLACE": True,
            "num_warps": 4,
            "num_stages": 3,
        },
        ANY: {
            "BLOCK_M": 64,
            "BLOCK_R": 128,
            "BLOCK_K": 128,
            "IN_PLACE": True,
            "num_warps": 8,
            "num_stages": 3,
        },
    },
    "ternary_linear_fwd_few": {
        # 16 columns even for one token: AMD has no instruction for 8. 32 KB of weights in flight
        16: {
            "BLOCK_M": 16,
            "BLOCK_R": 16,
            "BLOCK_K": 128,
            "SLICES": 8,
            "num_warps": 8,
            "num_stages": 3,
        },
        32: {
            "BLOCK_M": 32,
            "BLOCK_R": 16,
            "BLOCK_K": 128,
            "SLICES": 4,
            "num_warps": 4,
            "num_stages": 3,
        },
        64: {
            "BLOCK_M": 64,
            "BLOCK_R": 16,
            "BLOCK_K": 64,
            "SLICES": 4,
            "num_warps": 4,
            "num_stages": 3,
        },
    },
    "ternary_linear_bwd": {
        ANY: {"BLOCK_M": 32, "BLOCK_K": 64, "BLOCK_R": 32, "num_warps": 4, "num_stages": 2},
    },
    # here and below: with 64 rows on the left, Triton 3.7 multiplies float32 as TF32 on sm_100,
    # whatever precision is asked for
    "ternary_linear_bwd_float32": {
        ANY: {"BLOCK_M": 32, "BLOCK_K": 32, "BLOCK_R": 32, "num_warps": 4, "num_stages": 2},
    },
    "bit_linear_fwd": {  # for few tokens: more take the kernel from codes
        256: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
    },
    "bit_linear_fwd_from_codes": {
        ANY: {
            "BLOCK_M": 128,
            "BLOCK_N": 128,
            "BLOCK_K": 128,
            "GROUP": 8,
            "num_warps": 8,
            "num_stages": 3,
        },
    },
    "bit_linear_codes": {  # the number of elements
        ANY: {"BLOCK": 4096, "num_warps": 8},
    },
    "bit_linear_bwd_scale": {
        ANY: {"BLOCK_M": 4, "BLOCK_K": 512, "num_warps": 4},
    },
    "bit_linear_bwd_dx": {
        ANY: {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
    },
    "bit_linear_bwd_dweight": {
        ANY: {"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 2},
    },
    "bit_linear_bwd_dweight_float32": {
        ANY: {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
    },
    "split_activations_fwd": {  # the length of a row
        4096: {"BLOCK_K": 4096, "num_warps": 4},
        8192: {"BLOCK_K": 8192, "num_warps": 8},
        32768: {"BLOCK_K": 32768, "num_warps": 16},
    },
    "int8_linear_fwd": {
        8: {"BLOCK_M": 8, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
        ANY: {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    },
    "int8_linear_topk_fwd": {
        8: {"BLOCK_M": 8, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
        ANY: {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    },
    "merge_best": {  # the number of candidates
        ANY: {"BLOCK_C": 1024, "num_warps": 4},
    },
    "rotary": {  # the size of a head
        128: {"BLOCK_H": 32, "num_warps": 4},
        ANY: {"BLOCK_H": 8, "num_warps": 4},
    },
    "rotary_and_store": {
        128: {"BLOCK_H": 32, "num_warps": 4},
        ANY: {"BLOCK_H": 8, "num_warps": 4},
    },
    "flash_attention_fwd": {  # the size of a head, and _FLOAT32 more of float32, here and below
        # a tile of keys serves 128 queries: with 64, the second-level cache would be the limit
        128: {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        256: {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        FLOAT32 + 64: {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
        FLOAT32 + 128: {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    },
    "exact_attention_fwd": _SELECTED,
    "exact_attention_bwd_dq": _SELECTED,
    "exact_attention_select": {
        256: {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
        FLOAT32 + 64: {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
        FLOAT32 + 128: {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
    },
    "flash_attention_bwd_delta": {
        ANY: {"BLOCK_M": 32, "num_warps": 8},
    },
    "flash_attention_bwd_dq": {
        128: {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        256: {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
        FLOAT32 + 64: {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
        FLOAT32 + 128: {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    },
    "flash_attention_bwd_dkdv": _DKDV,
    "flash_attention_bwd_dkdv_listed": _DKDV,
    "exact_attention_bwd_dkdv": _DKDV,
    "flash_attention_decode": {
        # with fewer warps, float32 heads of 128 values spill on sm_90
        ANY: {"BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    },
    "flash_attention_decode_merge": {
        ANY: {"num_warps": 4},
    },
}

# What is not as on NVIDIA: larger tiles spill on gfx942, or exceed its 64 KB of shared memory
_AMD: dict[str, dict[int, Tiles]] = {
    "flash_attention_fwd": {
        **GPU["flash_attention_fwd"],
        128: {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    },
    "flash_attention_bwd_dq": {
        **GPU["flash_attention_bwd_dq"],
        128: {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    },
}
for _name in (
    "flash_attention_bwd_dkdv", "flash_attention_bwd_dkdv_listed", "exact_attention_bwd_dkdv",
):  # fmt: skip
    _AMD[_name] = {
        **_DKDV,
        128: {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
    }
# What other GPUs have no instruction for
_NVIDIA: dict[str, dict[int, Tiles]] = {
    "ternary_linear_fwd_one": {  # the length of a row
        4096: {"BLOCK_R": 4, "BLOCK_K": 128, "UNROLL": 4, "num_warps": 4},
        ANY: {"BLOCK_R": 2, "BLOCK_K": 512, "UNROLL": 4, "num_warps": 4},
    },
}

# What is not as on other NVIDIA GPUs, where shared memory is smaller and there is no wgmma
_SM90: dict[str, dict[int, Tiles]] = {
    # two programs of four warps a multiprocessor: a barrier holds up one of them only
    "ternary_linear_fwd": {
        ANY: {
            "BLOCK_M": 64,
            "BLOCK_R": 64,
            "BLOCK_K": 128,
            "IN_PLACE": True,
            "num_warps": 4,
            "num_stages": 3,
        },
    },
    # a slice more costs more to add up than it gains, unless there are few rows
    "ternary_linear_fwd_few": {
        8: {
            "BLOCK_M": 8,
            "BLOCK_R": 16,
            "BLOCK_K": 256,
            "SLICES": 2,
            "num_warps": 2,
            "num_stages": 5,
        },
        16: {
            "BLOCK_M": 16,
            "BLOCK_R": 16,
            "BLOCK_K": 256,
            "SLICES": 2,
            "num_warps": 2,
            "num_stages": 5,
        },
        32: GPU["ternary_linear_fwd_few"][32],
        64: GPU["ternary_linear_fwd_few"][64],
    },
    "ternary_linear_fwd_few_narrow": {
        8: {
            "BLOCK_M": 8,
            "BLOCK_R": 16,
            "BLOCK_K": 256,
            "SLICES": 4,
            "num_warps": 4,
            "num_stages": 4,
        },
        16: {
            "BLOCK_M": 16,
            "BLOCK_R": 16,
            "BLOCK_K": 256,
            "SLICES": 4,
            "num_warps": 4,
            "num_stages": 4,
        },
        32: GPU["ternary_linear_fwd_few"][32],
        64: GPU["ternary_linear_fwd_few"][64],
    },
    "bit_linear_fwd": {
        256: {"BLOCK_M": 256, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    },
    "bit_linear_fwd_from_codes": {
        # of a plain int8 product: 1.02 POPS for 2048 tokens, 2560 -> 6912
        ANY: {
            "BLOCK_M": 128,
            "BLOCK_N": 128,
            "BLOCK_K": 128,
            "GROUP": 8,
            "num_warps": 4,
            "num_stages": 3,
        },
    },
    "int8_linear_fwd": {
        4: {"BLOCK_M": 4, "BLOCK_N": 64, "BLOCK_K": 256, "num_warps": 4, "num_stages": 3},
        **GPU["int8_linear_fwd"],
    },
    "int8_linear_topk_fwd": {
        4: {"BLOCK_M": 4, "BLOCK_N": 64, "BLOCK_K": 256, "num_warps": 4, "num_stages": 3},
        **GPU["int8_linear_topk_fwd"],
    },
    "flash_attention_fwd": {
        **GPU["flash_attention_fwd"],
        64: {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 3},
        128: {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    },
    "flash_attention_bwd_dq": {
        **GPU["flash_attention_bwd_dq"],
        64: {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        128: {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    },
    "flash_attention_bwd_dkdv": {
        **_DKDV,
        64: {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        128: {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
    },
    "flash_attention_decode": {
        128: {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        **GPU["flash_attention_decode"],
    },
}


def _in_order(*tables: dict[str, dict[int, Tiles]]) -> dict[str, dict[int, Tiles]]:
    """Merge tables, a later one in place of an earlier one, with their classes by size."""
    merged = {kernel: classes for table in tables for kernel, classes in table.items()}
    return {kernel: dict(sorted(classes.items())) for kernel, classes in merged.items()}


# what a GPU is called -> its tables. Later ones than Hopper (sm_100, sm_120) are called sm_100
GPU_TABLES = {
    "cuda": _in_order(GPU, _NVIDIA),
    "sm_90": _in_order(GPU, _NVIDIA, _SM90),
    "sm_100": _in_order(GPU, _NVIDIA),
    "hip": _in_order(GPU, _AMD),
}
