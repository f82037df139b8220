"""Every Triton kernel, in every tile size in use, compiled for GPUs that need not be here.

As a script, print what each costs on each target: ``python tests/kernels/test_aot.py``.
"""

from __future__ import annotations

import functools
import sys

import pytest
import torch

from bitnet_triton.kernels import Mask
from bitnet_triton.kernels.bit_linear.backward import (
    launch_bit_linear_bwd_dweight,
    launch_bit_linear_bwd_dx,
)
from bitnet_triton.kernels.bit_linear.forward import launch_bit_linear_fwd
from bitnet_triton.kernels.flash_attention.arguments import Call
from bitnet_triton.kernels.flash_attention.decode import launch_decode
from bitnet_triton.kernels.flash_attention.launch import launch_backward, launch_forward
from bitnet_triton.kernels.int8_linear.forward import (
    launch_int8_linear,
    launch_int8_linear_topk,
    launch_split_activations,
)
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
)
from bitnet_triton.kernels.rotary.decode import launch_rotary_and_store
from bitnet_triton.kernels.rotary.forward import launch_rotary
from bitnet_triton.kernels.ternary_linear.backward import launch_ternary_linear_bwd
from bitnet_triton.kernels.ternary_linear.decode import launch_ternary_linear_fwd_row
from bitnet_triton.kernels.ternary_linear.forward import launch_ternary_linear_fwd
from bitnet_triton.runtime.aot import (
    TARGETS,
    compile_for,
    compile_launch,
    markdown_table,
    record_launches,
)
from bitnet_triton.runtime.autotune import all_tiles

BF16, F32, I8, U8 = torch.bfloat16, torch.float32, torch.int8, torch.uint8
N, K = 6912, 2560  # the wide layer of the published 2B model
INT8_INSTRUCTION = {
    "sm_80": "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
    "sm_90": ".s32.s8.s8",  # mma.sync or wgmma, by tile size
    "gfx942": "_i8",
}


def meta(*shape, dtype=F32):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_packed(M, dtype, bias, N=N, K=K):
    """Start the kernels of ternary_linear, forward and backward."""
    a, a_scale, packed, scale = meta(M, K, dtype=I8), meta(M, 1), meta(N // 4, K, dtype=U8), meta(1)
    launch = launch_ternary_linear_fwd_row if M == 1 else launch_ternary_linear_fwd
    a_sum, R = meta(M, dtype=torch.int32), N // 4
    launch(a, a_scale, a_sum, packed, scale, bias, None, [R], dtype)
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
    launch = launch_ternary_linear_fwd_row if M == 1 else launch_ternary_linear_fwd
    launch(*quantized, packed, meta(1), None, residual, [N // 4], dtype)
    for parts in (2, 3):
        rows = [N // 4 - parts + 1] + [1] * (parts - 1)
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
    launch_bit_linear_fwd(a, a_scale, weight, stats, None, binary, dtype)
    launch_bit_linear_bwd_dx(dy, weight, stats, binary)
    launch_bit_linear_bwd_dweight(dy, a, a_scale, weight_dtype)


def launch_attention(D, dtype, mask, softcap=None):
    """Start the kernels of attention: forward, backward and one step of decoding."""
    q, k = meta(1, 4096, 8, D, dtype=dtype), meta(1, 4096, 2, D, dtype=dtype)
    call = Call(mask, D**-0.5, softcap)
    out, lse = launch_forward(q, k, k, call)
    launch_backward(out, None, q, k, k, out, lse, call)
    launch_decode(q[:, :1], k, k, mask=Mask(window=1024, sinks=4), scale=D**-0.5)


def record_all():
    """Return each launch that differs in kernel, dtypes or tiles from the others."""
    with record_launches() as launches:
        for dtype in (BF16, F32):
            for length in (640, 2560, 6912, 28672):
                launch_quantize_activations(meta(4, length, dtype=dtype))
                launch_quantize_with_sums(meta(4, length, dtype=dtype))
            for M in (1, 16, 2048):
                launch_packed(M, dtype, meta(N, dtype=dtype))
                launch_fused(M, dtype)
            for width in (640, 6912, 16384):
                launch_fused(1, dtype, K=width)
            launch_trained(2048, dtype, dtype, binary=False)
            for head in (128, 256):
                launch_rotated(head, dtype)
            for M in (1, 64):
                launch_int8(M, dtype, meta(N, dtype=dtype) if M == 1 else None)
            for length in (2560, 6912, 28672):
                launch_split_activations(meta(4, length, dtype=dtype))
        for D, dtype in ((128, BF16), (256, BF16), (64, F32), (128, F32)):
            launch_attention(D, dtype, Mask())
        launch_attention(128, BF16, Mask(window=1024, sinks=4))
        launch_packed(2048, BF16, None)
        launch_trained(2048, BF16, F32, binary=False)  # autocast
        launch_trained(2048, BF16, BF16, binary=True)
    return launches


def name(launch):
    tensors = [a.dtype for a in launch.args if isinstance(a, torch.Tensor)]
    dtypes = "-".join(str(d).removeprefix("torch.") for d in tensors)
    constants = "-".join(f"{v}" for v in launch.options.values())
    return f"{launch.kernel.__name__.strip('_')}-{dtypes}-{constants}"


LAUNCHES = {name(launch): launch for launch in record_all()}


@functools.cache
def resources(launch_name, target):
    return compile_for(LAUNCHES[launch_name], TARGETS[target])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("launch_name", LAUNCHES)
def test_compiles_without_spills_for(launch_name, target):
    cost = resources(launch_name, target)
    assert cost.spills == 0
    assert cost.registers > 8
    # what a program may use: 64 KB on gfx942, 99 KB on the smallest relatives of sm_80 and sm_90
    assert cost.shared <= (64 if target == "gfx942" else 99) * 1024


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "launch_name",
    [
        n
        for n in LAUNCHES
        if n.startswith(("ternary_linear_fwd_kernel", "bit_linear_fwd_kernel", "int8_linear"))
    ],
)
def test_integer_products_run_on_int8_matrix_units(launch_name, target):
    instructions = resources(launch_name, target).instructions
    assert instructions
    assert all(INT8_INSTRUCTION[target] in i for i in instructions)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("launch_name", [n for n in LAUNCHES if "linear_bwd" in n])
def test_gradients_multiply_in_their_own_precision(launch_name, target):
    """bfloat16 on matrix units, float32 never rounded to TF32."""
    launch = LAUNCHES[launch_name]
    instructions = resources(launch_name, target).instructions
    if launch.args[0].dtype == BF16:
        assert instructions
        assert all("bf16" in i for i in instructions)
    else:
        assert all("f32_32x32x2_f32" in i for i in instructions)


@pytest.mark.parametrize("launch_name", [n for n in LAUNCHES if "quantize" in n])
def test_the_quantiser_rounds_its_product_before_it_rounds_to_integers(launch_name):
    """A fused multiply-add would skip the first rounding, and codes near ties would differ."""
    ptx = compile_launch(LAUNCHES[launch_name], TARGETS["sm_90"]).asm["ptx"]
    assert "mul.rn.f32" in ptx  # .rn forbids ptxas to fuse it
    assert "fma.rn.f32" not in ptx


def test_every_tile_size_in_the_table_is_compiled_above():
    launched = {
        (launch.kernel.__name__.strip("_").removesuffix("_kernel"), key): value
        for launch in LAUNCHES.values()
        for key, value in [(tuple(sorted(tile_options(launch).items())), launch)]
    }
    expected = {
        (kernel, tuple(sorted(tiles.items())))
        for kernel, configurations in all_tiles().items()
        for tiles in configurations
    }
    assert set(launched) == expected


def tile_options(launch):
    return {k: v for k, v in launch.options.items() if k.startswith(("BLOCK", "num_"))}


def test_sizes_of_one_compile():
    """Triton makes a constant of an integer argument that is 1; the kernel has to allow it."""
    with record_launches() as launches:
        launch_quantize_activations(meta(1, 1))
        for M in (1, 2, 64):
            launch_packed(M, F32, meta(4), N=4, K=1)
        launch_trained(1, F32, F32, binary=False, N=1, K=1)
        launch_fused(1, F32, N=12, K=1)
        launch_rotated(2, F32, B=1, T=1, H=1, Hk=1)
        for M in (1, 64):
            launch_int8(M, F32, meta(1), N=1, K=1)
    assert len(launches) == 37
    for launch in launches:
        assert compile_for(launch, TARGETS["sm_80"]).spills == 0


def test_the_table_has_a_line_for_a_launch_and_a_column_for_a_target():
    launch_name = next(n for n in LAUNCHES if n.startswith("bit_linear_fwd"))
    rows = [resources(launch_name, target) for target in ("sm_90", "gfx942")]
    head, _, line = markdown_table(rows).splitlines()
    assert head == "| kernel | tensors | constants | sm_90 | gfx942 |"
    kernel, tensors, constants, *cells = line.strip("| ").split(" | ")
    assert (kernel, tensors.split()[0]) == ("bit_linear_fwd", "i8")
    assert "BLOCK_K=64" in constants
    for cell, row, instruction in zip(cells, rows, ("wgmma s8", "mfma i8")):
        assert cell == f"{row.registers}, 0, {row.shared}, {instruction}"


if __name__ == "__main__":
    sys.stdout.write(markdown_table([resources(n, t) for n in LAUNCHES for t in TARGETS]) + "\n")
