"""Every launch of every Triton kernel, in every tile size in use, on tensors that hold nothing."""

from __future__ import annotations

import functools

import torch

from bitnet_triton.kernels import KeyValueCodes, Mask, SparseBlocks
from bitnet_triton.kernels.attention_mass.decode import launch_decode_mass
from bitnet_triton.kernels.attention_mass.forward import launch_mass
from bitnet_triton.kernels.bit_linear.backward import (
    launch_bit_linear_bwd_dweight,
    launch_bit_linear_bwd_dx,
    launch_bit_linear_bwd_scale,
)
from bitnet_triton.kernels.bit_linear.forward import (
    launch_bit_linear_codes,
    launch_bit_linear_fwd,
    launch_bit_linear_fwd_from_codes,
)
from bitnet_triton.kernels.exact_attention import launch as exact_launch
from bitnet_triton.kernels.exact_attention.arguments import ExactCall
from bitnet_triton.kernels.flash_attention.arguments import Call
from bitnet_triton.kernels.flash_attention.decode import launch_decode
from bitnet_triton.kernels.flash_attention.decode_pattern import launch_decode_pattern
from bitnet_triton.kernels.flash_attention.launch import launch_backward, launch_forward
from bitnet_triton.kernels.flash_attention.operands import SinkQuery
from bitnet_triton.kernels.flash_attention.paged import launch_paged
from bitnet_triton.kernels.flash_attention.paged_call import PagedCall
from bitnet_triton.kernels.hadamard.forward import launch_hadamard
from bitnet_triton.kernels.int8_linear.forward import (
    launch_int8_linear,
    launch_int8_linear_topk,
    launch_split_activations,
)
from bitnet_triton.kernels.kv_pages.forward import launch_copy_pages, launch_write_pages
from bitnet_triton.kernels.linear_attention import launch as linear_launch
from bitnet_triton.kernels.linear_attention.decode import launch_decode as launch_linear_decode
from bitnet_triton.kernels.linear_attention.plain_step import PlainStep, launch_plain_step
from bitnet_triton.kernels.linear_attention.step import GatedStep, launch_gated_step
from bitnet_triton.kernels.linear_cross_entropy.backward import launch_cross_entropy_bwd
from bitnet_triton.kernels.linear_cross_entropy.forward import launch_cross_entropy
from bitnet_triton.kernels.lsh_attention import backward as bucket_backward
from bitnet_triton.kernels.lsh_attention.arguments import BucketCall, Directions
from bitnet_triton.kernels.lsh_attention.decode import launch_bucket_step, launch_hash_step
from bitnet_triton.kernels.lsh_attention.forward import launch_forward as launch_bucket_forward
from bitnet_triton.kernels.lsh_sampling.build import launch_build
from bitnet_triton.kernels.lsh_sampling.gather import Angles, Parts, Rows, launch_gather
from bitnet_triton.kernels.lsh_sampling.hash import (
    launch_hash_keys,
    launch_hash_queries,
    launch_hash_token,
    launch_mean_direction,
)
from bitnet_triton.kernels.lsh_sampling.probe import launch_probe
from bitnet_triton.kernels.lsh_sampling.select import launch_sign_scores
from bitnet_triton.kernels.lsh_sampling.verified import Verified, triton_verified
from bitnet_triton.kernels.native_sparse import launch as sparse_launch
from bitnet_triton.kernels.native_sparse import pool as sparse_pool
from bitnet_triton.kernels.native_sparse.arguments import SparseCall
from bitnet_triton.kernels.native_sparse.decode import launch_compressed_decode
from bitnet_triton.kernels.native_sparse.gates import launch_gated_sum, launch_gated_sum_bwd
from bitnet_triton.kernels.native_sparse.step import launch_compress_step, launch_gates
from bitnet_triton.kernels.quantised_attention.forward import launch_quantised_attention
from bitnet_triton.kernels.quantize.forward import (
    launch_quantize_activations,
    launch_quantize_with_sums,
    launch_weight_stats,
)
from bitnet_triton.kernels.rms_norm.backward import launch_rms_norm_bwd
from bitnet_triton.kernels.rms_norm.forward import (
    launch_relu2_mul_norm_quantize,
    launch_rms_norm,
    launch_rms_norm_quantize,
    launch_silu_mul_quantize,
)
from bitnet_triton.kernels.rotary.decode import launch_rotary_and_store
from bitnet_triton.kernels.rotary.forward import launch_rotary
from bitnet_triton.kernels.selected_blocks import launch as selected_launch
from bitnet_triton.kernels.selected_blocks.arguments import SelectedCall
from bitnet_triton.kernels.selected_blocks.decode import launch_selected_decode
from bitnet_triton.kernels.ternary_linear.backward import launch_ternary_linear_bwd
from bitnet_triton.kernels.ternary_linear.launchers import packed_launcher
from bitnet_triton.kernels.top_blocks import Units
from bitnet_triton.kernels.top_blocks.forward import launch_top_blocks
from bitnet_triton.kernels.top_blocks.index_step import launch_block_index_step
from bitnet_triton.kernels.top_blocks.op import choice_objection
from bitnet_triton.kernels.top_blocks.pool import launch_pool_keys
from bitnet_triton.runtime.aot import record_launches
from bitnet_triton.runtime.autotune import largest_size, tiles_for

BF16, F32, I8, U8 = torch.bfloat16, torch.float32, torch.int8, torch.uint8
I32 = torch.int32
N, K = 6912, 2560  # the wide layer of the published 2B model
# target -> whose tiles it takes; they are not the same on all
FAMILY = {
    "sm_80": "cuda",
    "sm_90": "sm_90",
    "sm_100": "sm_100",
    "sm_120": "sm_100",
    "gfx942": "hip",
}
FAMILIES = tuple(dict.fromkeys(FAMILY.values()))


def meta(*shape, dtype=F32):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_packed(M, dtype, bias, N=N, K=K):
    """Start the kernels of ternary_linear, forward and backward."""
    a, a_scale, packed, scale = meta(M, K, dtype=I8), meta(M, 1), meta(N // 4, K, dtype=U8), meta(1)
    a_sum, R = meta(M, dtype=torch.int32), N // 4
    packed_launcher(a, packed)(a, a_scale, a_sum, packed, scale, bias, None, [R], dtype)
    if M > 32:
        launch_ternary_linear_bwd(meta(M, N, dtype=dtype), packed, scale)


def launch_fused(M, dtype, N=N, K=K):
    """Start the kernels of a fused layer."""
    x, weight, gate_up = meta(M, K, dtype=dtype), meta(K, dtype=dtype), meta(M, 2 * K, dtype=dtype)
    launch_rms_norm(x, weight, 1e-5)
    launch_rms_norm_bwd(x, x, weight, 1e-5, True)
    quantized = launch_rms_norm_quantize(x, weight, 1e-5)
    launch_relu2_mul_norm_quantize(gate_up, weight, 1e-5)
    packed, residual = meta(N // 4, K, dtype=U8), meta(M, N, dtype=dtype)
    launch = packed_launcher(quantized[0], packed)
    launch(*quantized, packed, meta(1), None, residual, [N // 4], dtype)
    for parts in (2, 3):
        # as in every published model, a part starts at a multiple of 16
        other = 16 if N >= 256 else 1
        rows = [N // 4 - other * (parts - 1)] + [other] * (parts - 1)
        launch(*quantized, packed, meta(parts), None, None, rows, dtype)


def launch_int8(M, dtype, bias, N=N, K=K):
    """Start the kernels of int8_linear and of its largest outputs."""
    x, codes, scale = meta(M, K, dtype=dtype), meta(N, K, dtype=I8), meta(N)
    launch_int8_linear(x, codes, scale, bias)
    for k in (1, 16):
        launch_int8_linear_topk(x, codes, scale, bias, k)


def launch_rotated(D, dtype, B=2, T=3, H=20, Hk=5):
    """Start the kernels of rotary embeddings."""
    rows, table = meta(1, T, D, dtype=dtype), meta(9, D, dtype=dtype)
    qkv, cache = meta(B, T, H + 2 * Hk, D, dtype=dtype), meta(B, 9, Hk, D, dtype=dtype)
    slots = meta(B, dtype=torch.int32)
    for backward in (False, True):
        launch_rotary(qkv[:, :, :H], rows, rows, backward)
    launch_rotary_and_store(qkv, table, table, cache, cache, slots, slots)
    launch_rotary_and_store(qkv, rows, rows, cache, cache, slots, None)


def launch_trained(M, dtype, weight_dtype, binary, N=N, K=K):
    """Start the kernels of bit_linear, forward and backward."""
    a, a_scale, stats = meta(M, K, dtype=I8), meta(M, 1), meta(2)
    weight, dy = meta(N, K, dtype=weight_dtype), meta(M, N, dtype=dtype)
    launch_weight_stats(weight)
    few = min(M, largest_size("bit_linear_fwd"))
    launch_bit_linear_fwd(a[:few], a_scale[:few], weight, stats, None, binary, dtype)
    launch_bit_linear_bwd_dx(dy, weight, stats, binary)
    launch_bit_linear_bwd_dweight(dy, a, a_scale, weight_dtype)


def launch_trained_once(M, dtype, weight_dtype, binary, bias=None, N=N, K=K):
    """Start the kernels of bit_linear around operands that are made once."""
    a, a_scale, stats = meta(M, K, dtype=I8), meta(M, 1), meta(2)
    weight = meta(N, K, dtype=weight_dtype)
    launch_bit_linear_fwd_from_codes(a, a_scale, weight, stats, bias, binary, dtype)
    launch_bit_linear_codes(weight, stats, binary, dtype)
    launch_bit_linear_bwd_scale(meta(M, K), stats, dtype)
    launch_bit_linear_bwd_scale(a, a_scale, dtype)


def launch_attention(D, dtype, mask, softcap=None):
    """Start the kernels of attention: forward, backward and one step of decoding."""
    q, k = meta(1, 4096, 8, D, dtype=dtype), meta(1, 4096, 2, D, dtype=dtype)
    call = Call(mask, D**-0.5, softcap)
    out, lse = launch_forward(q, k, k, call)
    launch_backward(out, None, q, k, k, out, lse, call)
    launch_mass(q, k, lse, call)
    length = meta(1, dtype=torch.int32)
    launch_decode_mass(
        q[:, :1], k, lse[:, :, :1], meta(1, k.shape[2], k.shape[1]), scale=D**-0.5,
        leftpad_k=length, seqused_k=length,
    )  # fmt: skip
    launch_decode(q[:, :1], k, k, mask=Mask(window=1024, sinks=4), scale=D**-0.5)
    launch_decode_patterns(q[:, :1], k, meta(4096, D, dtype=dtype))
    launch_pages(q[0], meta(64, 64, 2, D, dtype=dtype), mask)


def launch_decode_patterns(q, k, table):
    """Start one step of decoding as "fixed", "longformer" and "streaming" have it."""
    first = SinkQuery(q, table, table, last=1027)
    for mask, query in (
        (Mask(pattern="fixed", block=128, summary=4), None),
        (Mask(window=512, dilation=2, global_tokens=(8,)), None),
        (Mask(window=1024, sinks=4), first),
    ):
        positions = None if query is None else meta(1, dtype=torch.int32)
        launch_decode_pattern(q, k, k, mask=mask, scale=0.1, sink_query=query, positions=positions)


def launch_pages(q, pages, mask):
    """Start the kernels over pages: of sequences of one query and of many, and of a batch."""
    one, batch = (
        PagedCall(mask, 0.1, None, meta(8, 8, dtype=I32), meta(8, dtype=I32), starts)
        for starts in (meta(9, dtype=I32), None)
    )
    launch_paged(q, pages, pages, one)
    launch_paged(q[:8, None], pages, pages, batch)
    new = q[:8, : pages.shape[2]]
    launch_write_pages(pages, pages, new, new, meta(8, dtype=torch.int64))
    launch_copy_pages(pages, meta(4, 2, dtype=torch.int64))


def launch_codes(D, dtype):
    """Start attention over codes: one query, merged with other keys, and many."""
    used = meta(1, dtype=torch.int32)
    for bits in (4, 8):
        codes = KeyValueCodes.empty(1, 2, 256, D, bits, torch.device("meta"), rotate=True)
        for Tq in (1, 64) if bits == 4 else (1,):
            q = meta(1, Tq, 8, D, dtype=dtype)
            more = (meta(1, Tq, 8, D, dtype=dtype), meta(1, 8, Tq)) if bits == 4 else None
            launch_quantised_attention(q, codes, used, scale=D**-0.5, more=more)


def launch_exact_attention(D, dtype, mask):
    """Start the kernels of attention to the largest scores, forward and backward."""
    q, k = meta(1, 4096, 8, D, dtype=dtype), meta(1, 4096, 2, D, dtype=dtype)
    call = ExactCall(Call(mask, D**-0.5), top_k=32, threshold=0.1)
    out, lse = exact_launch.launch_forward(q, k, k, call)
    exact_launch.launch_backward(out, None, q, k, k, out, lse, call)


def launch_choice_of_blocks(D, dtype):
    """Start the kernels that choose blocks, of a prompt and of one token, by units of each kind."""
    q, codes = meta(1, 4096, 8, D, dtype=dtype), meta(1, 4096, 1, D, dtype=I8)
    scale, settings = meta(1, 4096, 1), {"initial": 1, "local": 1, "tokens": 4096}
    for queries in (q, q[:, :1]):
        index, chosen = queries[:, :, :2], {"block": 128, "selected": 16, "sets": 2, **settings}
        launch_top_blocks(index, meta(1, 4096, 1, D, dtype=dtype), units=Units(), **chosen)
        if choice_objection(q, codes) is None:
            launch_top_blocks(index, codes, units=Units(), scale=scale, **chosen)
        for units, block in ((Units("mean", 16, 32), 64), (Units("bounds", 16, 16), 16)):
            k = meta(1, 4096, 2, D, dtype=dtype)
            rows = meta(1, units.rows(4096), 2, units.width(D), dtype=dtype)
            launch_pool_keys(k, rows, units=units, last=1)
            chosen = {"block": block, "selected": 16, "sets": 2, **settings}
            launch_top_blocks(queries, rows, units=units, **chosen)
    table, weight, slots = meta(9, D, dtype=dtype), meta(D, K, dtype=dtype), meta(1, dtype=I32)
    for keys, scales in ((meta(1, 9, 1, D, dtype=dtype), None), (codes, scale)):
        launch_block_index_step(
            meta(1, K, dtype=dtype), meta(2 * D, K, dtype=dtype), weight, weight[:, 0],
            weight[:, 0],
            table, table, keys, scales, slots, slots, 1e-5,
        )  # fmt: skip


def launch_chosen_blocks(D, dtype, group):
    """Start the kernels of attention to chosen blocks, forward, backward and a step of decoding."""
    q, k = meta(1, 4096, 2 * group, D, dtype=dtype), meta(1, 4096, 2, D, dtype=dtype)
    indices = meta(1, 4096, 2, 16, dtype=torch.int32)
    call = SelectedCall(indices, 64, True, D**-0.5)
    out, lse = selected_launch.launch_forward(q, k, k, call)
    selected_launch.launch_backward(out, None, q, k, k, out, lse, call)
    length = meta(1, dtype=torch.int32)
    launch_selected_decode(
        q[:, :1], k, k, indices[:, :1], block=64, scale=0.1, leftpad=length, seqused=length
    )


def launch_buckets(D, dtype, T=4096, H=4, rounds=2):
    """Start the kernels of attention inside of buckets, forward and backward, and of a step."""
    qk, inverse = meta(1, T, H, D, dtype=dtype), meta(1, H, T)
    call = BucketCall(*(meta(rounds, 1, H, T, dtype=I32) for _ in range(4)), True, D**-0.5)
    out, lse = launch_bucket_forward(qk, qk, inverse, call)
    bucket_backward.launch_backward(out, qk, qk, inverse, out, lse, call)
    numbers, used = meta(1, H, rounds, T, dtype=I32), meta(1, dtype=I32)
    for rows, widths in ((meta(1, 16 * rounds, D), (16,)), (meta(1, 20 * rounds, D), (8, 12))):
        launch_hash_step(qk, Directions(rows, widths, True), numbers, used)
    launch_hash_step(qk, Directions(meta(H, 16, D, dtype=dtype), (16,), False), numbers, used)
    launch_bucket_step(qk, qk, numbers, window=64, scale=0.1, leftpad=used, used=used)


def launch_sampling(D, dtype, T=4096, H=20, Hk=5, bits=10, tables=148):
    """Start the kernels of attention by sampling: tables, and a step with each way to share."""
    q, k = meta(1, 1, H, D, dtype=dtype), meta(1, T, Hk, D, dtype=dtype)
    planes, centre, norms = meta(bits, tables, D), meta(1, Hk, D), meta(1, Hk, T)
    codes, tail = (meta(1, Hk, tables, n, dtype=torch.int16) for n in (T, 2048))
    used = meta(1, dtype=torch.int32)
    if (D, dtype) in ((128, BF16), (64, F32)):
        launch_hash_keys(k, planes, centre, codes, norms)
    launch_hash_token(k, planes, centre, tail, norms, used, 0)
    ids, offsets = launch_build(codes, bits, 0, used)
    direction, bounds = launch_mean_direction(q, Hk), meta(2, dtype=torch.int32)
    for share, asked, parts in (("own", q, 1), ("union", q, 4), ("proposal", direction, 1)):
        lists, part = (H if share == "own" else Hk), tables // parts
        found = meta(1, lists, part * parts, dtype=torch.int16)
        launch_hash_queries(asked, planes, found, parts)
        rows, counts = launch_probe(
            found, ids, offsets[None], tail, bounds, tables=part, length=T, used=used
        )
        angles = Angles(centre, norms, None if asked is q else asked, bits, part)
        launch_gather(
            q, k, k, Rows(rows, counts, bounds), Parts.empty(q, 17, D), part0=0,
            exact=(4, 64), scale=0.1, angles=angles, kind=share, leftpad=used, used=used,
        )  # fmt: skip
    if (D, dtype) == (128, BF16):
        launch_sign_scores(meta(1, H, D // 16, dtype=torch.int16), tail[:, :, : D // 16])
    bounds = meta(1, T // 32, Hk, 2 * D, dtype=dtype)
    # the choice of 32 pages has 8 bytes of local memory for heads of 64 on sm_120, and in float32
    # 8 to 16 bytes on sm_90, sm_100 and sm_120; for heads of 64 any choice of pages of 32 has 8
    pages = 16 if D == 64 or dtype == F32 else 32
    if (D, dtype) != (64, F32):
        call = Verified(bounds, used, used, 32, pages, 1, 3, 256, 3, "normal", 0.1, 0.1, 0.1)
        triton_verified(q, k, k, call)


def launch_native_sparse(D, dtype, group):
    """Start the kernels of native sparse attention, forward, backward and a step of decoding."""
    H, blocks = 2 * group, SparseBlocks()
    q, x, k = (meta(1, *shape, D, dtype=dtype) for shape in ((4096, H), (4096, 2), (255, 2)))
    weights, length = meta(2, 32, dtype=dtype), meta(1, dtype=torch.int32)
    y = sparse_pool.launch_pool(x, weights, None, 255, 32, 16)
    sparse_pool.launch_pool_bwd(y, weights, None, 4096, 32, 16)
    sparse_pool.launch_pool_bwd_dw(y, x, weights, None, 32, 16)
    call = SparseCall(blocks, D**-0.5, 4096, select=True)
    out, lse, _ = sparse_launch.launch_forward(q, k, k, call)
    sparse_launch.launch_backward(out, q, k, k, out, lse, call)
    choice = SparseCall(blocks, D**-0.5, 4096, attend=False, select=True, keeps_lse=False)
    sparse_launch.launch_forward(q, k, k, choice)
    gates = meta(1, 4096, H, 3, dtype=dtype)
    launch_gated_sum_bwd(launch_gated_sum(out, out, out, gates), out, out, out, gates)
    cos = meta(4096, D, dtype=dtype)
    launch_compress_step(
        x, x, k, k, blocks=blocks, weights=(weights, weights), places=(None, None), cos=cos,
        sin=cos, positions=meta(1, 4096, dtype=torch.int32), leftpad=length, used=length,
        position=length,
    )  # fmt: skip
    launch_compressed_decode(
        q[:, :1], k, k, blocks=blocks, scale=0.1, tokens=4096, leftpad=length, used=length
    )
    launch_gates(meta(1, 1, 2560, dtype=dtype), meta(3 * H, 2560, dtype=dtype), meta(3 * H))


def launch_linear_attention(D, dtype, of_channels):
    """Start the kernels of the delta rule: forward, backward and one step of decoding."""
    q, k = meta(1, 4096, 8, D, dtype=dtype), meta(1, 4096, 4, D, dtype=dtype)
    beta, state = meta(1, 4096, 4), meta(1, 4, D, D)
    log_decay = meta(1, 4096, 4, D) if of_channels else beta
    inputs = (q, k, k, log_decay, beta, state, None, D**-0.5)
    out, _ = linear_launch.launch_forward(*inputs, False)
    linear_launch.launch_backward(out, state, *inputs)
    one = [t[:, :1] for t in (q, k, k, log_decay, beta)]
    launch_linear_decode(
        *one[:3], log_decay=one[3], beta=one[4], scale=0.1, before=state, after=state
    )
    inner = (D if of_channels else 4) + 4 + D
    parts = GatedStep(
        inputs=meta(inner, 2560, dtype=dtype),
        decay_out=meta(4 * D, D, dtype=dtype) if of_channels else None,
        gate_out=meta(8 * D, D, dtype=dtype),
        gate_bias=meta(8 * D, dtype=dtype),
        log_rate=meta(4, dtype=dtype),
        decay_bias=meta(4 * D if of_channels else 4, dtype=dtype),
        convolution=meta(16 * D, 4, dtype=dtype),
        norm=meta(D, dtype=dtype),
    )
    launch_gated_step(
        meta(1, 1, 16, D, dtype=dtype), meta(1, 1, 2560, dtype=dtype), parts, kv_heads=4,
        scale=0.1, states=meta(2, 1, 4, D, D), tails=meta(2, 1, 3, 16 * D, dtype=dtype),
        turn=meta(1, dtype=torch.int32), is_token=meta(1, dtype=torch.int32),
    )  # fmt: skip
    if not of_channels:
        launch_plain(D, dtype)


def launch_plain(D, dtype):
    """Start the kernels of a decode step of the plain forms."""
    one, angles = meta(1, dtype=torch.int32), meta(4096, D, dtype=dtype)
    matrices = {
        "elu": (), "relu": (), "performer": (None, meta(640, D)),
        "hedgehog": (meta(8, D, D, dtype=dtype), meta(4, D, D, dtype=dtype)),
    }  # fmt: skip
    for feature_map, given in matrices.items():
        parts = PlainStep(feature_map, *given)._replace(log_decay=meta(4))
        launch_plain_step(
            meta(1, 1, 16, D, dtype=dtype), parts, kv_heads=4, cos=angles, sin=angles,
            states=meta(2, 1, 4, parts.features(D), D + 1), turn=one, is_token=one, positions=one,
        )  # fmt: skip


def launch_entropy(M, V, first, dtype):
    """Start the kernels of linear_cross_entropy."""
    logits, labels, stats = meta(M, V, dtype=dtype), meta(M, dtype=torch.int64), meta(M, 2)
    for with_gradient in (False, True):
        launch_cross_entropy(logits, labels, with_gradient)
    launch_cross_entropy_bwd(logits, labels, stats, meta(M), first)


def record_all():
    """Return each launch that differs in kernel, dtypes or tiles from the others."""
    with record_launches() as launches:
        for dtype in (BF16, F32):
            for length in (640, 2560, 6912, 28672):
                launch_quantize_activations(meta(4, length, dtype=dtype))
                launch_quantize_with_sums(meta(4, length, dtype=dtype))
            for length in (640, 6912, 14336):
                launch_silu_mul_quantize(meta(4, 2 * length, dtype=dtype))
            for M in (1, 8, 16, 32, 64, 512, 2048):
                launch_packed(M, dtype, meta(N, dtype=dtype))
                launch_fused(M, dtype)
                launch_fused(M, dtype, N=2560)
            launch_entropy(256, 128256, 0, dtype)
            for width in (640, 6912, 16384):
                launch_fused(1, dtype, K=width)
            launch_trained(2048, dtype, dtype, binary=False)
            launch_trained_once(2048, dtype, dtype, binary=False, bias=meta(N, dtype=dtype))
            # no whole number of tiles
            launch_trained_once(2048, dtype, dtype, binary=True, K=K + 16)
            for head in (128, 256):
                launch_rotated(head, dtype)
            for M in (1, 8, 64):
                launch_int8(M, dtype, meta(N, dtype=dtype) if M == 1 else None)
            for length in (2560, 6912, 28672):
                launch_split_activations(meta(4, length, dtype=dtype))
        for D, dtype in ((64, BF16), (128, BF16), (256, BF16), (64, F32), (128, F32)):
            launch_attention(D, dtype, Mask())
            launch_exact_attention(D, dtype, Mask(sinks=4))
            launch_hadamard(meta(64, D, dtype=dtype), meta(D, D), dtype)
            if D <= 128 and dtype == BF16:
                launch_codes(D, dtype)
            launch_choice_of_blocks(D, dtype)
            launch_chosen_blocks(D, dtype, group=4)
            launch_buckets(D, dtype)
            launch_sampling(D, dtype)
            launch_native_sparse(D, dtype, group=4)
        for D, dtype, of_channels in (
            (128, BF16, True), (128, BF16, False), (128, F32, True), (128, F32, False),
            (256, BF16, True),
        ):  # fmt: skip
            launch_linear_attention(D, dtype, of_channels)
        launch_attention(128, BF16, Mask(window=1024, sinks=4))
        launch_chosen_blocks(128, BF16, group=16)
        launch_native_sparse(128, BF16, group=16)
        launch_packed(2048, BF16, None)
        launch_trained(2048, BF16, F32, binary=False)  # autocast
        launch_trained(2048, BF16, BF16, binary=True)
        launch_trained_once(2048, BF16, F32, binary=False)  # autocast
    return launches


def name(launch):
    tensors = [a.dtype for a in launch.args if isinstance(a, torch.Tensor)]
    dtypes = "-".join(str(d).removeprefix("torch.") for d in tensors)
    constants = "-".join(f"{v}" for v in launch.options.values())
    return f"{kernel_name(launch)}-{dtypes}-{constants}"


def kernel_name(launch):
    return launch.kernel.__name__.strip("_").removesuffix("_kernel")


@functools.cache
def launches_for(family):
    """Return the launches of a family of GPUs by their names."""
    with tiles_for(family):
        return {name(launch): launch for launch in record_all()}


def launches_of(target):
    return launches_for(FAMILY[target])


@functools.cache
def sizes_of_one():
    """Return launches whose integer arguments are 1, of which Triton makes constants."""
    with record_launches() as launches:
        launch_quantize_activations(meta(1, 1))
        for M in (1, 2, 64):
            launch_packed(M, F32, meta(4), N=4, K=1)
        launch_trained(1, F32, F32, binary=False, N=1, K=1)
        launch_trained_once(1, F32, F32, binary=False, N=1, K=1)
        launch_fused(1, F32, N=12, K=1)
        launch_rotated(2, F32, B=1, T=1, H=1, Hk=1)
        for M in (1, 64):
            launch_int8(M, F32, meta(1), N=1, K=1)
        launch_entropy(1, 1, 1, F32)
    return launches
