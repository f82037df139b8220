"""WHAT is computed: the public ops."""

from bitnet_triton.kernels.attention_mass import attention_mass
from bitnet_triton.kernels.attention_mass.op import MASS_FWD
from bitnet_triton.kernels.bit_linear import bit_linear
from bitnet_triton.kernels.bit_linear.launchers import BIT_BWD_DWEIGHT, BIT_BWD_DX, BIT_FWD
from bitnet_triton.kernels.dense_linear import dense_linear, dense_linear_topk
from bitnet_triton.kernels.dense_linear.op import DENSE_FWD, DENSE_TOPK
from bitnet_triton.kernels.exact_attention import exact_attention
from bitnet_triton.kernels.exact_attention.launchers import EXACT_BWD, EXACT_FWD
from bitnet_triton.kernels.flash_attention import Mask, flash_attention, merge_attention
from bitnet_triton.kernels.flash_attention.launchers import ATTENTION_BWD, ATTENTION_FWD
from bitnet_triton.kernels.flash_attention.paged_op import PAGED_FWD
from bitnet_triton.kernels.hadamard import hadamard
from bitnet_triton.kernels.hadamard.op import HADAMARD_FWD
from bitnet_triton.kernels.int8_linear import Int8Weight, int8_linear, int8_linear_topk
from bitnet_triton.kernels.int8_linear.op import INT8_FWD, INT8_TOPK
from bitnet_triton.kernels.kv_pages import copy_pages, write_pages
from bitnet_triton.kernels.kv_pages.op import COPY_PAGES, WRITE_PAGES
from bitnet_triton.kernels.linear_attention import linear_attention
from bitnet_triton.kernels.linear_attention.launchers import LINEAR_BWD, LINEAR_FWD
from bitnet_triton.kernels.linear_cross_entropy import linear_cross_entropy
from bitnet_triton.kernels.linear_cross_entropy.launchers import ENTROPY_BWD, ENTROPY_FWD
from bitnet_triton.kernels.lsh_attention import bucket_attention, hash_buckets, lsh_attention
from bitnet_triton.kernels.lsh_attention.launchers import BUCKET_BWD, BUCKET_FWD
from bitnet_triton.kernels.lsh_sampling import (
    HashTables,
    SignCodes,
    lsh_sampling_attention,
    verified_sampling_attention,
)
from bitnet_triton.kernels.lsh_sampling.launchers import BUILD, HASH, SAMPLING
from bitnet_triton.kernels.lsh_sampling.verified import VERIFIED
from bitnet_triton.kernels.native_sparse import (
    SparseBlocks,
    compress_blocks,
    native_sparse_attention,
    select_blocks,
)
from bitnet_triton.kernels.native_sparse.attend import GATED_SUM_BWD, GATED_SUM_FWD
from bitnet_triton.kernels.native_sparse.compress import POOL_BWD, POOL_FWD
from bitnet_triton.kernels.native_sparse.launchers import COMPRESSED_BWD, COMPRESSED_FWD
from bitnet_triton.kernels.packing import TernaryWeight
from bitnet_triton.kernels.quantised_attention import KeyValueCodes, quantised_attention
from bitnet_triton.kernels.quantised_attention.op import QUANTISED_FWD
from bitnet_triton.kernels.quantize import quantize_activations, quantize_weight
from bitnet_triton.kernels.quantize.op import (
    ACTIVATIONS_FWD,
    ACTIVATIONS_SUMS_FWD,
    WEIGHT_STATS,
)
from bitnet_triton.kernels.rms_norm import (
    relu2_mul_norm_quantize,
    rms_norm,
    rms_norm_quantize,
    silu_mul_quantize,
)
from bitnet_triton.kernels.rms_norm.op import NORM_BWD, NORM_FWD
from bitnet_triton.kernels.rms_norm.quantized import NORM_QUANTIZE_FWD, RELU2_FWD, SILU_FWD
from bitnet_triton.kernels.rotary import apply_rotary, rotary_and_store, rotary_angles
from bitnet_triton.kernels.rotary.op import ROTARY, ROTARY_AND_STORE
from bitnet_triton.kernels.selected_blocks import selected_block_attention
from bitnet_triton.kernels.selected_blocks.launchers import SELECTED_BWD, SELECTED_FWD
from bitnet_triton.kernels.ternary_linear import (
    MergedTernaryWeight,
    ternary_linear,
    ternary_linear_quantized,
)
from bitnet_triton.kernels.ternary_linear.launchers import (
    QUANTIZED_FWD,
    TERNARY_BWD,
    TERNARY_FWD,
)
from bitnet_triton.kernels.top_blocks import Units, pool_keys, pool_last_keys, top_blocks
from bitnet_triton.kernels.top_blocks.op import TOP_BLOCKS
from bitnet_triton.kernels.top_blocks.pool_op import POOL_KEYS, POOL_LAST_KEYS

# op -> backend -> implementation: what `bitnet-triton doctor` reports on
IMPLEMENTATIONS = {
    "quantize_activations": ACTIVATIONS_FWD,
    "quantize_activations_sums": ACTIVATIONS_SUMS_FWD,
    "weight_stats": WEIGHT_STATS,
    "rms_norm": NORM_FWD,
    "rms_norm_bwd": NORM_BWD,
    "rms_norm_quantize": NORM_QUANTIZE_FWD,
    "relu2_mul_norm_quantize": RELU2_FWD,
    "silu_mul_quantize": SILU_FWD,
    "rotary": ROTARY,
    "rotary_and_store": ROTARY_AND_STORE,
    "ternary_linear": TERNARY_FWD,
    "ternary_linear_quantized": QUANTIZED_FWD,
    "ternary_linear_bwd": TERNARY_BWD,
    "dense_linear": DENSE_FWD,
    "dense_linear_topk": DENSE_TOPK,
    "int8_linear": INT8_FWD,
    "int8_linear_topk": INT8_TOPK,
    "bit_linear": BIT_FWD,
    "bit_linear_bwd_dx": BIT_BWD_DX,
    "bit_linear_bwd_dweight": BIT_BWD_DWEIGHT,
    "flash_attention": ATTENTION_FWD,
    "flash_attention_bwd": ATTENTION_BWD,
    "flash_attention_paged": PAGED_FWD,
    "attention_mass": MASS_FWD,
    "write_pages": WRITE_PAGES,
    "copy_pages": COPY_PAGES,
    "hadamard": HADAMARD_FWD,
    "quantised_attention": QUANTISED_FWD,
    "lsh_hash": HASH,
    "lsh_build": BUILD,
    "lsh_sampling": SAMPLING,
    "verified_sampling": VERIFIED,
    "exact_attention": EXACT_FWD,
    "exact_attention_bwd": EXACT_BWD,
    "selected_block_attention": SELECTED_FWD,
    "selected_block_attention_bwd": SELECTED_BWD,
    "bucket_attention": BUCKET_FWD,
    "bucket_attention_bwd": BUCKET_BWD,
    "linear_attention": LINEAR_FWD,
    "linear_attention_bwd": LINEAR_BWD,
    "linear_cross_entropy": ENTROPY_FWD,
    "linear_cross_entropy_bwd": ENTROPY_BWD,
    "top_blocks": TOP_BLOCKS,
    "pool_keys": POOL_KEYS,
    "pool_last_keys": POOL_LAST_KEYS,
    "compress_blocks": POOL_FWD,
    "compress_blocks_bwd": POOL_BWD,
    "compressed_attention": COMPRESSED_FWD,
    "compressed_attention_bwd": COMPRESSED_BWD,
    "gated_sum": GATED_SUM_FWD,
    "gated_sum_bwd": GATED_SUM_BWD,
}

__all__ = [
    "IMPLEMENTATIONS",
    "HashTables",
    "Int8Weight",
    "KeyValueCodes",
    "Mask",
    "MergedTernaryWeight",
    "SignCodes",
    "SparseBlocks",
    "TernaryWeight",
    "Units",
    "apply_rotary",
    "attention_mass",
    "bit_linear",
    "bucket_attention",
    "compress_blocks",
    "copy_pages",
    "dense_linear",
    "dense_linear_topk",
    "exact_attention",
    "flash_attention",
    "hadamard",
    "hash_buckets",
    "int8_linear",
    "int8_linear_topk",
    "linear_attention",
    "linear_cross_entropy",
    "lsh_attention",
    "lsh_sampling_attention",
    "merge_attention",
    "native_sparse_attention",
    "pool_keys",
    "pool_last_keys",
    "quantised_attention",
    "quantize_activations",
    "quantize_weight",
    "relu2_mul_norm_quantize",
    "rms_norm",
    "rms_norm_quantize",
    "rotary_and_store",
    "rotary_angles",
    "select_blocks",
    "selected_block_attention",
    "silu_mul_quantize",
    "ternary_linear",
    "ternary_linear_quantized",
    "top_blocks",
    "verified_sampling_attention",
    "write_pages",
]
