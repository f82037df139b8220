"""Every Triton kernel, in every tile size in use, as GPUs that need not be here would run it.

What is known of code that has not changed comes from a table (``aot_table.py``).
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import random
import re
import warnings
from pathlib import Path

import pytest
import torch
import triton

from bitnet_triton.runtime.aot import TARGETS, markdown_table
from bitnet_triton.runtime.autotune import all_tiles, tiles_for
from bitnet_triton.runtime.gpu_targets import resident_warps

HERE = Path(__file__).parent
BF16, F32 = torch.bfloat16, torch.float32
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
    "attention_mass_decode", "project_row", "gating", "short_convolution", "gated_norm",
    "rms_norm_fwd", "rms_norm_quantize_fwd", "relu2_mul_norm_quantize_fwd", "silu_mul_quantize_fwd",
    "quantize_activations_fwd", "ternary_linear_fwd", "ternary_linear_fwd_one",
    "ternary_linear_fwd_few", "rotary_and_store", "flash_attention_decode",
    "flash_attention_decode_pattern", "flash_attention_decode_merge", "flash_attention_paged",
    "flash_attention_paged_merge", "write_pages", "split_activations_fwd",
    "int8_linear_fwd", "int8_linear_topk_fwd", "merge_best", "top_blocks_fwd", "top_blocks_merge",
    "pool_keys", "block_index_step", "lsh_hash", "lsh_mean_direction", "lsh_probe", "lsh_gather",
    "sign_scores", "verified_draw", "lsh_attention_hash", "lsh_attention_list",
    "lsh_attention_decode", "selected_blocks_fwd_rows", "linear_attention_decode",
    "compressed_attention_decode", "compressed_attention_take", "compress_step", "sparse_gates",
    "hadamard_fwd", "plain_features", "normalise",
    "quantised_attention_fwd", "quantised_attention_merge",
)  # fmt: skip
MANY_TOKENS = ("ternary_linear_fwd", "bit_linear_fwd", "bit_linear_fwd_from_codes")
FLOAT_PRODUCTS = (
    "ternary_linear_bwd", "bit_linear_bwd_dx", "bit_linear_bwd_dweight", "flash_attention_fwd",
    "flash_attention_bwd_dq", "flash_attention_bwd_dkdv", "flash_attention_decode",
    "flash_attention_decode_pattern", "flash_attention_paged",
    "attention_mass_fwd", "attention_mass_decode", "exact_attention_fwd", "exact_attention_bwd_dq",
    "exact_attention_bwd_dkdv", "exact_attention_select", "top_blocks_fwd",
    "lsh_gather", "verified_draw",
    "lsh_attention_fwd", "lsh_attention_bwd_dq", "lsh_attention_bwd_dkdv",
    "selected_blocks_fwd_rows", "selected_blocks_bwd_dq_rows", "selected_blocks_bwd_dkdv",
    "compressed_attention_fwd", "compressed_attention_bwd_dq", "compressed_attention_bwd_dkdv",
    "compressed_attention_decode", "quantised_attention_fwd",
)  # fmt: skip
# of which no GPU runs float32
NARROW_ALONE = ("quantised_attention_fwd",)
# that multiply in float32, and in TF32 what came as bfloat16 or float16
WIDE_PRODUCTS = (
    "linear_attention_pairs", "linear_attention_states", "linear_attention_out",
    "linear_attention_bwd_states", "linear_attention_bwd_pairs", "linear_attention_bwd_keys",
)  # fmt: skip
WIDE_INSTRUCTION = r"mma\.sync\S+tf32|wgmma\S+tf32|tcgen05\S+tf32|v_mfma_f32_\w+_f32"
# float32 whatever the inputs are: signs of products are all that is kept
EXACT_PRODUCTS = ("lsh_hash", "hadamard_fwd")
# lines of the table that every run compiles anew
SAMPLE = 16


def load(path):
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


table = load(HERE / "aot_table.py")
launches_of, launches_for = table.launches.launches_of, table.launches.launches_for
kernel_name, FAMILIES = table.launches.kernel_name, table.launches.FAMILIES
RELEASE, LINES = table.read_table()


@pytest.fixture(scope="module")
def lines(request, tmp_path_factory):
    """What was compiled, by digest; one worker of xdist compiles what the table lacks."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if hasattr(request.config, "workerinput") else base
    missing = [d for d in table.all_launches() if d not in LINES]
    if missing and triton.__version__ == RELEASE:
        lacks = f"aot.json lacks {len(missing)} of {len(table.all_launches())} launches"
        warnings.warn(f"{lacks}: run tests/kernels/aot_table.py --write", stacklevel=1)
    with (base / "aot-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fresh = base / "aot-fresh.json"
        if not fresh.exists():
            fresh.write_text(json.dumps(table.compile_all(missing) if missing else {}))
    return LINES | json.loads(fresh.read_text())


@pytest.fixture(scope="module")
def costs(lines):
    """Resources by the name of a launch and a target."""
    digest_of, by_launch = table.digest_of, {}
    for target in TARGETS:
        for name, launch in launches_of(target).items():
            line = lines[digest_of(launch, TARGETS[target])]
            by_launch[name, target] = table.resources(launch, target, line)
    return by_launch


def test_lines_of_the_table_are_what_compiling_gives(request):
    """Other lines in every run; a sweep over all is one command (``aot_table.py --all``)."""
    pairs = table.all_launches()
    known = sorted(LINES.keys() & pairs.keys())
    drawn = random.Random(request.config.option.seed).sample(known, min(SAMPLE, len(known)))
    if triton.__version__ != RELEASE:
        pytest.skip(f"the table is of Triton {RELEASE}")
    assert drawn, "none is known: run tests/kernels/aot_table.py --write"
    for found, line in table.compile_all(drawn).items():
        assert line == LINES[found], f"{line['kernel']} for {line['target']}"


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills_and_everything_fits(costs, target):
    assert {n for n, t in costs if t == target} == set(launches_of(target))
    for launch_name in launches_of(target):
        cost = costs[launch_name, target]
        assert cost.spills <= MOST_SPILLED, launch_name
        assert cost.registers > 4  # a copy needs no more than 6
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


def is_choice_by_codes(launch):
    return kernel_name(launch) == "top_blocks_fwd" and launch.args[1].dtype == torch.int8


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", FLOAT_PRODUCTS)
def test_other_products_run_in_their_own_precision(costs, kernel, target):
    """bfloat16 on matrix units, float32 never rounded to TF32."""
    chosen = [
        n for n, launch in launches_of(target).items()
        if kernel_name(launch) == kernel and not is_choice_by_codes(launch)
    ]  # fmt: skip
    expected = {BF16} if kernel in NARROW_ALONE else {BF16, F32}
    assert {launches_of(target)[n].args[0].dtype for n in chosen} == expected
    for launch_name in chosen:
        instructions = costs[launch_name, target].instructions
        if launches_of(target)[launch_name].args[0].dtype == BF16:
            assert instructions, launch_name
            assert all(re.match(BF16_INSTRUCTION[target], i) for i in instructions), launch_name
        else:
            assert all(re.search(r"v_mfma_f32_\w+_f32", i) for i in instructions), launch_name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", WIDE_PRODUCTS)
def test_wide_products_of_narrow_inputs_run_on_matrix_units(costs, kernel, target):
    """TF32 for bfloat16 inputs; of float32 inputs nothing is rounded."""
    chosen = [n for n, launch in launches_of(target).items() if kernel_name(launch) == kernel]
    precisions = {launches_of(target)[n].options["PRECISION"] for n in chosen}
    assert precisions == ({"ieee"} if target == "gfx942" else {"ieee", "tf32"})
    for launch_name in chosen:
        instructions = costs[launch_name, target].instructions
        if launches_of(target)[launch_name].options["PRECISION"] == "tf32":
            assert instructions, launch_name
            assert all(re.match(WIDE_INSTRUCTION, i) for i in instructions), launch_name
        else:
            assert all(re.search(r"v_mfma_f32_\w+_f32", i) for i in instructions), launch_name


@pytest.mark.parametrize("target", TARGETS)
def test_codes_of_an_index_are_multiplied_as_integers(costs, target):
    chosen = [
        n for n, launch in launches_of(target).items()
        if is_choice_by_codes(launch)
    ]  # fmt: skip
    assert chosen
    for launch_name in chosen:
        found = costs[launch_name, target].instructions
        assert found, launch_name
        assert all(re.match(INT8_INSTRUCTION[target], i) for i in found), launch_name


def test_many_tokens_multiply_by_whole_groups_of_warps_on_hopper(costs):
    """wgmma, which has twice the rate of mma.sync there."""
    chosen = [n for n, launch in launches_of("sm_90").items() if kernel_name(launch) in MANY_TOKENS]
    assert chosen
    for launch_name in chosen:
        assert all("wgmma" in i for i in costs[launch_name, "sm_90"].instructions), launch_name


def test_kernels_without_products_have_no_matrix_instruction(costs):
    multiply = INT8_PRODUCTS + FLOAT_PRODUCTS + WIDE_PRODUCTS + EXACT_PRODUCTS
    for (launch_name, target), cost in costs.items():
        if kernel_name(launches_of(target)[launch_name]) not in multiply:
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


def test_the_quantiser_rounds_its_product_before_it_rounds_to_integers(costs):
    """A fused multiply-add would skip the first rounding, and codes near ties would differ."""
    chosen = [n for n in launches_of("sm_90") if "quantize" in n]
    assert chosen
    for launch_name in chosen:
        # .rn forbids ptxas to fuse it
        assert costs[launch_name, "sm_90"].rounding == ("mul.rn.f32",), launch_name


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_of_a_decode_step_overlap_since_hopper(family):
    for launch in launches_for(family).values():
        overlaps = kernel_name(launch) in OVERLAPPED and family in ("sm_90", "sm_100")
        assert launch.options.get("launch_pdl", False) == overlaps
        assert launch.options.get("DEPENDENT", False) == overlaps


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("kernel", OVERLAPPED)
def test_a_kernel_touches_nothing_before_the_one_before_it_has_ended(costs, kernel, target):
    """Read in the machine code, where no compiler moves anything any more."""
    chosen = [n for n, launch in launches_of(target).items() if kernel_name(launch) == kernel]
    assert chosen
    for launch_name in chosen:
        events = costs[launch_name, target].events
        wait = events.index("wait")
        # fetched into the second-level cache, where it is seen if it changes
        fetches = kernel in ("ternary_linear_fwd_one", "ternary_linear_fwd_few")
        assert set(events[:wait]) == {"release"} | ({"prefetch"} if fetches else set())
        assert "memory" in events[wait:]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tile_size_in_the_table_is_compiled_above(family):
    launched = {
        (kernel_name(launch), key): value
        for launch in launches_for(family).values()
        for key, value in [(tuple(sorted(tile_options(launch).items())), launch)]
    }
    with tiles_for(family):
        table = all_tiles()
    expected = {
        (kernel, tuple(sorted(tiles.items())))
        for kernel, configurations in table.items()
        for tiles in configurations
    }
    # and others: tiles of few rows are no larger than these
    assert set(launched) >= expected


def tile_options(launch):
    known = {k for tiles in all_tiles()[kernel_name(launch)] for k in tiles}
    return {k: v for k, v in launch.options.items() if k in known}


def test_sizes_of_one_compile(lines):
    """Triton makes a constant of an integer argument that is 1; the kernel has to allow it."""
    launches = table.launches.sizes_of_one()
    assert len(launches) == 45
    for launch in launches:
        assert lines[table.digest_of(launch, TARGETS["sm_80"])]["spills"] == 0


def test_markdown_has_a_line_for_a_launch_and_a_column_for_a_target(costs):
    launch_name = next(n for n in launches_of("sm_100") if n.startswith("bit_linear_fwd"))
    rows = [costs[launch_name, target] for target in ("sm_100", "sm_120")]
    head, _, line = markdown_table(rows).splitlines()
    assert head == "| kernel | tensors | constants | sm_100 | sm_120 |"
    kernel, tensors, constants, *cells = line.strip("| ").split(" | ")
    assert (kernel, tensors.split()[0]) == ("bit_linear_fwd", "i8")
    assert "BLOCK_K=64" in constants
    for cell, row in zip(cells, rows, strict=True):
        assert cell == f"{row.registers}, 0, {row.shared}, {row.warps}, mma s8"
