"""Launches that may start before the one before them has ended."""

import ctypes

import pytest
import torch

from bitnet_triton.runtime import overlap
from bitnet_triton.runtime.autotune import tiles_for
from bitnet_triton.runtime.overlap import can_overlap, in_order

AHEAD_OF_TIME = torch.device("meta")
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh():
    overlap._can.cache_clear()
    yield
    overlap._can.cache_clear()


class Driver:
    """What the CUDA driver library has, of some version."""

    def __init__(self, version, status=0):
        self._version, self._status = version, status

    def cuDriverGetVersion(self, version):
        version._obj.value = self._version
        return self._status


@pytest.fixture
def driver(monkeypatch):
    def use(library):
        def load(name):
            assert name == "libcuda.so.1"
            if isinstance(library, OSError):
                raise library
            return library

        monkeypatch.setattr(ctypes, "CDLL", load)

    return use


@pytest.mark.parametrize(
    ("gpu", "expected"), [("cuda", False), ("sm_90", True), ("sm_100", True), ("hip", False)]
)
def test_kernels_overlap_since_hopper(gpu, expected, driver):
    driver(Driver(13000))
    with tiles_for(gpu):
        assert can_overlap(GPU) == can_overlap(AHEAD_OF_TIME) == expected
        assert not can_overlap(torch.device("cpu"))


def test_inside_a_block_they_run_in_order():
    with tiles_for("sm_90"):
        with in_order():
            assert not can_overlap(AHEAD_OF_TIME)
        assert can_overlap(AHEAD_OF_TIME)


@pytest.mark.parametrize(
    ("library", "expected"),
    [
        (Driver(12020), False),
        (Driver(12030), True),
        (Driver(13000, status=3), False),
        (OSError("no driver"), False),
    ],
    ids=["too old", "records them", "fails", "is missing"],
)
def test_the_driver_has_to_record_such_launches(driver, library, expected):
    driver(library)
    with tiles_for("sm_90"):
        assert can_overlap(GPU) == expected
        assert can_overlap(AHEAD_OF_TIME)  # whatever the driver here is


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip, reason="needs CUDA")
def test_the_driver_tells_its_version():
    assert overlap._driver_version() >= 1000 * int(torch.version.cuda.split(".")[0])


def test_the_interpreter_knows_no_such_launch(monkeypatch):
    monkeypatch.setattr(overlap, "is_interpreted", lambda: True)
    with tiles_for("sm_90"):
        assert not can_overlap(AHEAD_OF_TIME)
