"""Launches that may start before the one before them has ended."""

import pytest
import torch

from bitnet_triton.runtime import overlap
from bitnet_triton.runtime.autotune import tiles_for
from bitnet_triton.runtime.overlap import can_overlap, in_order

GPU = torch.device("meta")


@pytest.fixture(autouse=True)
def fresh():
    overlap._driver_records_overlap.cache_clear()
    yield
    overlap._driver_records_overlap.cache_clear()


@pytest.mark.parametrize(
    ("gpu", "expected"), [("cuda", False), ("sm_90", True), ("sm_100", True), ("hip", False)]
)
def test_kernels_overlap_since_hopper(gpu, expected):
    with tiles_for(gpu):
        assert can_overlap(GPU) == expected
        assert not can_overlap(torch.device("cpu"))


def test_inside_a_block_they_run_in_order():
    with tiles_for("sm_90"):
        with in_order():
            assert not can_overlap(GPU)
        assert can_overlap(GPU)


@pytest.mark.parametrize(("driver", "expected"), [(12020, False), (12030, True), (13000, True)])
def test_the_driver_has_to_record_such_launches(monkeypatch, driver, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    with tiles_for("sm_90"):
        assert can_overlap(GPU) == expected


def test_the_interpreter_knows_no_such_launch(monkeypatch):
    monkeypatch.setattr(overlap, "is_interpreted", lambda: True)
    with tiles_for("sm_90"):
        assert not can_overlap(GPU)
