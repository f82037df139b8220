"""Launches, started or only recorded, and the tiles they take."""

import pytest
import torch

from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import all_tiles, largest_size, tiles
from bitnet_triton.runtime.launch import record_launches

started = []


class Kernel:
    def __getitem__(self, grid):
        return lambda *args, **options: started.append((grid, args, options))


@pytest.fixture(autouse=True)
def _forget():
    started.clear()


def test_a_launch_starts_the_kernel():
    launch(Kernel(), (2, 3))(1, "x", BLOCK=4)
    assert started == [((2, 3), (1, "x"), {"BLOCK": 4})]


def test_a_recorded_launch_starts_nothing_and_only_inside_the_block():
    kernel = Kernel()
    with record_launches() as launches:
        launch(kernel, (2, 3))(1, "x", BLOCK=4)
    assert started == []
    (recorded,) = launches
    assert (recorded.kernel, recorded.grid) == (kernel, (2, 3))
    assert (recorded.args, recorded.options) == ((1, "x"), {"BLOCK": 4})
    launch(kernel, (1,))()
    assert len(started) == len(launches) == 1


def test_tiles_are_the_first_that_are_large_enough():
    few, many = all_tiles()["ternary_linear_fwd"]
    assert tiles("ternary_linear_fwd", 1) == tiles("ternary_linear_fwd", 32) == few
    assert tiles("ternary_linear_fwd", 33) == tiles("ternary_linear_fwd", 10**9) == many
    assert few != many


def test_a_program_of_the_quantiser_holds_the_whole_row():
    largest = largest_size("quantize_activations_fwd")
    for length in (1, 1024, 1025, 6912, largest):
        block = tiles("quantize_activations_fwd", length)["BLOCK_K"]
        assert block >= length
        assert block & (block - 1) == 0
    with pytest.raises(StopIteration):
        tiles("quantize_activations_fwd", largest + 1)


def test_a_row_that_no_program_holds_is_refused_by_the_triton_quantiser():
    from bitnet_triton.kernels.quantize.op import ACTIVATIONS_FWD

    supports = ACTIVATIONS_FWD["triton"].supports
    largest = largest_size("quantize_activations_fwd")
    assert supports(torch.empty(1, largest, device="meta")) is None
    assert "at most" in supports(torch.empty(1, largest + 1, device="meta"))
