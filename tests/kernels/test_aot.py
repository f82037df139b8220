"""Every Triton kernel, in every tile size in use, compiled for GPUs that need not be here.

As a script, print what each costs on each target: ``python tests/kernels/test_aot.py``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import triton

from bitnet_triton.kernels import Mask
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
    launch_silu_mul_quantize,
)
from bitnet_triton.kernels.rotary.decode import launch_rotary_and_store
from bitnet_triton.kernels.rotary.forward import launch_rotary
from bitnet_triton.kernels.ternary_linear.backward import launch_ternary_linear_bwd
from bitnet_triton.kernels.ternary_linear.launchers import packed_launcher
from bitnet_triton.runtime.aot import (
    TARGETS,
    Resources,
    compile_for,
    compile_launch,
    markdown_table,
    record_launches,
)
from bitnet_triton.runtime.autotune import all_tiles, largest_size, tiles_for
from bitnet_triton.runtime.gpu_targets import resident_warps

ROOT = Path(__file__).parents[2]
BF16, F32, I8, U8 = torch.bfloat16, torch.float32, torch.int8, torch.uint8
N, K = 6912, 2560  # the wide layer of the published 2B model
MMA_INT8 = r"mma\.sync\.aligned\.m16n8k32\.row\.col\.satfinite\.s32\.s8\.s8\.s32"
INT8_INSTRUCTION = {
    "sm_80": MMA_INT8,
    "sm_90": rf"{MMA_INT8}|wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8",
    "sm_100": MMA_INT8,  # Triton has no tcgen05 for integers
    "sm_120": MMA_INT8,
    "gfx942": r"v_mfma_i32_\w+_i8",
}
MMA_BF16 = r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32"
BF16_INSTRUCTION = {
    "sm_80": MMA_BF16,
    "sm_90": rf"{MMA_BF16}|wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16",
    "sm_100": rf"{MMA_BF16}|tcgen05\.mma\.cta_group::1\.kind::f16",
    "sm_120": MMA_BF16,
    "gfx942": r"v_mfma_f32_\w+_bf16",
}
# bytes of local memory: none with the release that tiles are chosen for (docs/gpu-kernels.md)
MOST_SPILLED = 0 if triton.__version__.startswith("3.7.") else 136
# of shared memory for a program; relatives of the other targets have 99 KB
LARGEST_KB = {"sm_90": 227, "sm_100": 227, "gfx942": 64}
# every kernel that multiplies matrices, by the type of its operands where they are bfloat16 or int8
INT8_PRODUCTS = (
    "ternary_linear_fwd", "ternary_linear_fwd_few", "bit_linear_fwd", "bit_linear_fwd_from_codes",
    "int8_linear_fwd", "int8_linear_topk_fwd",
)  # fmt: skip
# what a decode step is made of
OVERLAPPED = (
    "rms_norm_fwd", "rms_norm_quantize_fwd", "relu2_mul_norm_quantize_fwd", "silu_mul_quantize_fwd",
    "quantize_activations_fwd", "ternary_linear_fwd", "ternary_linear_fwd_one",
    "ternary_linear_fwd_few", "rotary_and_store", "flash_attention_decode",
    "flash_attention_decode_merge", "split_activations_fwd", "int8_linear_fwd",
    "int8_linear_topk_fwd", "merge_best",
)  # fmt: skip
MANY_TOKENS = ("ternary_linear_fwd", "bit_linear_fwd", "bit_linear_fwd_from_codes")
FLOAT_PRODUCTS = (
    "ternary_linear_bwd", "bit_linear_bwd_dx", "bit_linear_bwd_dweight", "flash_attention_fwd",
    "flash_attention_bwd_dq", "flash_attention_bwd_dkdv", "flash_attention_decode",
    "exact_attention_fwd", "exact_attention_bwd_dq",
    "exact_attention_bwd_dkdv", "exact_attention_select",
)  # fmt: skip


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
    launch_decode(q[:, :1], k, k, mask=Mask(window=1024, sinks=4), scale=D**-0.5)


def launch_exact_attention(D, dtype, mask):
    q, k = meta(1, 4096, 8, D, dtype=dtype), meta(1, 4096, 2, D, dtype=dtype)
    call = ExactCall(Call(mask, D**-0.5), top_k=32, threshold=0.1)
    out, lse = exact_launch.launch_forward(q, k, k, call)
    exact_launch.launch_backward(out, None, q, k, k, out, lse, call)


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
        launch_attention(128, BF16, Mask(window=1024, sinks=4))
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


def record_for(gpu):
    with tiles_for(gpu):
        return {name(launch): launch for launch in record_all()}


# tiles are not the same on all
LAUNCHES = {gpu: record_for(gpu) for gpu in ("cuda", "sm_90", "sm_100", "hip")}
HOPPER = LAUNCHES["sm_90"]


# target -> whose tiles it takes
FAMILY = {
    "sm_80": "cuda",
    "sm_90": "sm_90",
    "sm_100": "sm_100",
    "sm_120": "sm_100",
    "gfx942": "hip",
}


def launches_of(target):
    return LAUNCHES[FAMILY[target]]


def compile_part(target, part, parts):
    """Compile every ``parts``-th launch for a target."""
    chosen = list(launches_of(target).items())[part::parts]
    return {n: compile_for(launch, TARGETS[target]) for n, launch in chosen}


def compile_all(targets):
    """Return what every launch costs on every target, by both; processes share the work."""
    parts = os.cpu_count() or 1
    commands = [[sys.executable, __file__, target] for target in targets]
    commands = [[*c, str(part), str(parts)] for part in range(parts) for c in commands]

    def run(command):
        process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert process.returncode == 0, process.stderr
        return {(n, command[2]): read_back(r) for n, r in json.loads(process.stdout).items()}

    with ThreadPoolExecutor(parts) as pool:
        return {key: cost for costs in pool.map(run, commands) for key, cost in costs.items()}


def read_back(plain):
    """Return Resources of what JSON has made of them: lists, where they have tuples."""
    plain["constants"] = [tuple(pair) for pair in plain["constants"]]
    return Resources(**{k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()})


@pytest.fixture(scope="module")
def costs():
    return compile_all(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills_and_everything_fits(costs, target):
    assert {n for n, t in costs if t == target} == set(launches_of(target))
    for launch_name in launches_of(target):
        cost = costs[launch_name, target]
        assert cost.spills <= MOST_SPILLED, launch_name
        assert cost.registers > 8
        assert cost.shared <= LARGEST_KB.get(target, 99) * 1024, launch_name
        assert cost.warps >= 4, launch_name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", INT8_PRODUCTS)
def test_integer_products_run_on_int8_matrix_units(costs, kernel, target):
    chosen = [n for n, launch in launches_of(target).items() if kernel_name(launch) == kernel]
    assert chosen
    for launch_name in chosen:
        instructions = costs[launch_name, target].instructions
        assert instructions, launch_name
        assert all(re.match(INT8_INSTRUCTION[target], i) for i in instructions), launch_name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", FLOAT_PRODUCTS)
def test_other_products_run_in_their_own_precision(costs, kernel, target):
    """bfloat16 on matrix units, float32 never rounded to TF32."""
    chosen = [n for n, launch in launches_of(target).items() if kernel_name(launch) == kernel]
    assert {launches_of(target)[n].args[0].dtype for n in chosen} == {BF16, F32}
    for launch_name in chosen:
        instructions = costs[launch_name, target].instructions
        if launches_of(target)[launch_name].args[0].dtype == BF16:
            assert instructions, launch_name
            assert all(re.match(BF16_INSTRUCTION[target], i) for i in instructions), launch_name
        else:
            assert all(re.search(r"v_mfma_f32_\w+_f32", i) for i in instructions), launch_name


def test_many_tokens_multiply_by_whole_groups_of_warps_on_hopper(costs):
    """wgmma, which has twice the rate of mma.sync there."""
    chosen = [n for n, launch in HOPPER.items() if kernel_name(launch) in MANY_TOKENS]
    assert chosen
    for launch_name in chosen:
        assert all("wgmma" in i for i in costs[launch_name, "sm_90"].instructions), launch_name


def test_kernels_without_products_have_no_matrix_instruction(costs):
    for (launch_name, target), cost in costs.items():
        if kernel_name(launches_of(target)[launch_name]) not in INT8_PRODUCTS + FLOAT_PRODUCTS:
            assert cost.instructions == (), (launch_name, target)


def test_warps_on_a_multiprocessor_are_those_that_fit():
    """By hand: 65536 registers in four quarters, 228 KB less 1 KB a program, 64 warps."""
    h100, mi300 = TARGETS["sm_90"], TARGETS["gfx942"]
    assert resident_warps(h100, 8, registers=32, shared=0) == 64
    assert resident_warps(h100, 8, registers=129, shared=0) == 8  # 136: 3 warps a quarter
    assert resident_warps(h100, 4, registers=168, shared=0) == 12
    assert resident_warps(h100, 4, registers=32, shared=75 * 1024) == 12
    assert resident_warps(h100, 1, registers=32, shared=0) == 32  # programs
    assert resident_warps(h100, 4, registers=32, shared=228 * 1024) == 0
    assert resident_warps(mi300, 4, registers=256, shared=0) == 8
    assert resident_warps(mi300, 4, registers=64, shared=20 * 1024) == 12


@pytest.mark.parametrize("launch_name", [n for n in HOPPER if "quantize" in n])
def test_the_quantiser_rounds_its_product_before_it_rounds_to_integers(launch_name):
    """A fused multiply-add would skip the first rounding, and codes near ties would differ."""
    ptx = compile_launch(HOPPER[launch_name], TARGETS["sm_90"]).asm["ptx"]
    assert "mul.rn.f32" in ptx  # .rn forbids ptxas to fuse it
    assert "fma.rn.f32" not in ptx


@pytest.mark.parametrize("family", LAUNCHES)
def test_kernels_of_a_decode_step_overlap_since_hopper(family):
    for launch in LAUNCHES[family].values():
        overlaps = kernel_name(launch) in OVERLAPPED and family in ("sm_90", "sm_100")
        assert launch.options.get("launch_pdl", False) == overlaps
        assert launch.options.get("DEPENDENT", False) == overlaps


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("kernel", OVERLAPPED)
def test_a_kernel_touches_nothing_before_the_one_before_it_has_ended(kernel, target):
    """Read in the machine code, where no compiler moves anything any more."""
    chosen = [launch for launch in launches_of(target).values() if kernel_name(launch) == kernel]
    assert chosen
    for launch in chosen:
        instructions = sass(compile_launch(launch, TARGETS[target]))
        wait = next(i for i, line in enumerate(instructions) if "ACQBULK" in line)
        ahead = [line for line in instructions[:wait] if MEMORY.search(line)]
        # fetched into the second-level cache, where it is seen if it changes
        fetched = [line for line in ahead if "CCTL.E.PF2" in line]
        assert ahead == fetched, kernel
        assert bool(fetched) == (kernel in ("ternary_linear_fwd_one", "ternary_linear_fwd_few"))
        assert any("PREEXIT" in line for line in instructions[:wait]), kernel
        assert any(MEMORY.search(line) for line in instructions[wait:]), kernel


# global memory, by whatever instruction; shared memory has others
MEMORY = re.compile(r"\b(LD|ST|LDG|STG|LDGSTS|ATOM|ATOMG|RED|REDG|UTMA\w*|UBLK\w*|CCTL\w*)\b")


def sass(compiled):
    """Return the instructions of a kernel for an NVIDIA GPU, in order."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        text = subprocess.run([tool, binary], check=True, capture_output=True, text=True).stdout
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", text, re.M)


@pytest.mark.parametrize("family", LAUNCHES)
def test_every_tile_size_in_the_table_is_compiled_above(family):
    launched = {
        (kernel_name(launch), key): value
        for launch in LAUNCHES[family].values()
        for key, value in [(tuple(sorted(tile_options(launch).items())), launch)]
    }
    with tiles_for(family):
        table = all_tiles()
    expected = {
        (kernel, tuple(sorted(tiles.items())))
        for kernel, configurations in table.items()
        for tiles in configurations
    }
    assert set(launched) == expected


def tile_options(launch):
    known = {k for tiles in all_tiles()[kernel_name(launch)] for k in tiles}
    return {k: v for k, v in launch.options.items() if k in known}


def test_sizes_of_one_compile():
    """Triton makes a constant of an integer argument that is 1; the kernel has to allow it."""
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
    assert len(launches) == 42
    for launch in launches:
        assert compile_for(launch, TARGETS["sm_80"]).spills == 0


def test_the_table_has_a_line_for_a_launch_and_a_column_for_a_target():
    launch_name = next(n for n in HOPPER if n.startswith("bit_linear_fwd"))
    rows = [compile_for(HOPPER[launch_name], TARGETS[t]) for t in ("sm_90", "gfx942")]
    head, _, line = markdown_table(rows).splitlines()
    assert head == "| kernel | tensors | constants | sm_90 | gfx942 |"
    kernel, tensors, constants, *cells = line.strip("| ").split(" | ")
    assert (kernel, tensors.split()[0]) == ("bit_linear_fwd", "i8")
    assert "BLOCK_K=64" in constants
    for cell, row, instruction in zip(cells, rows, ("wgmma s8", "mfma i8")):
        assert cell == f"{row.registers}, 0, {row.shared}, {row.warps}, {instruction}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        part = compile_part(sys.argv[1], *map(int, sys.argv[2:]))
        json.dump({n: dataclasses.asdict(cost) for n, cost in part.items()}, sys.stdout)
    else:
        found = compile_all(TARGETS)
        names = list(dict.fromkeys(n for launches in LAUNCHES.values() for n in launches))
        rows = [found[n, t] for n in names for t in TARGETS if (n, t) in found]
        sys.stdout.write(markdown_table(rows) + "\n")
