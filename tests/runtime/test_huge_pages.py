"""Large stores ask Linux for huge pages."""

import sys

import pytest
import torch

from bitnet_triton.cache import PagePool
from bitnet_triton.cache.growing import GrowingLayer
from bitnet_triton.runtime.huge_pages import in_huge_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")


def asks(memory):
    """Tell whether the middle of a tensor lies in memory for which huge pages are wished."""
    middle, is_there = memory.data_ptr() + memory.nbytes // 2, False
    with open("/proc/self/smaps") as file:
        for line in file:
            first = line.split()[0]
            if "-" in first and not first.endswith(":"):
                start, end = (int(part, 16) for part in first.split("-"))
                is_there = start <= middle < end
            elif is_there and first == "VmFlags:":
                return "hg" in line.split()
    raise AssertionError("no such memory")


def fresh(megabytes):
    return torch.empty(megabytes << 20, dtype=torch.uint8)


def test_large_memory_is_the_same_and_asks_for_huge_pages():
    memory, before = fresh(64), fresh(64)
    assert in_huge_pages(memory) is memory
    assert asks(memory)
    assert not asks(before)
    memory.fill_(3)
    assert (memory == 3).all()


def test_small_memory_and_that_of_other_devices_is_left_alone():
    small, other = fresh(1), torch.empty(64 << 20, device="meta")
    assert in_huge_pages(small) is small
    assert in_huge_pages(other) is other


def test_stores_of_caches_ask_for_huge_pages():
    pool = PagePool(16, 4096)
    k = torch.randn(1, 2, 1, 64)
    pool.prepare(2, k)
    assert asks(pool.store)
    layer = GrowingLayer()
    layer.update(k.expand(1, 2, 65536, 64), k.expand(1, 2, 65536, 64))
    assert asks(layer.key_store)
    assert asks(layer.value_store)
