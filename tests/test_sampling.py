"""Which tests a run takes of a grid that multiplies, and in which order."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

VALUES = {"shape": [(1, 2), (3, 4), (5, 6)], "dtype": ["a", "b", "c", "d"], "backend": ["x", "y"]}


@pytest.fixture(scope="module")
def conftest():
    path = Path(__file__).with_name("conftest.py")
    specification = importlib.util.spec_from_file_location("sampling", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


class Item(SimpleNamespace):
    """A test with parameters and markers; equal to itself alone."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def get_closest_marker(self, name):
        return name if name in self.markers else None


def grid(markers=("pairwise",), path="a.py"):
    return [
        Item(
            nodeid=f"{path}::test[{values}]", path=path, markers=markers,
            callspec=SimpleNamespace(params=dict(zip(VALUES, values))),
        )
        for values in itertools.product(*VALUES.values())
    ]  # fmt: skip


def pairs(items):
    found = [item.callspec.params.items() for item in items]
    return {pair for params in found for pair in itertools.combinations(params, 2)}


def test_every_pair_of_values_meets_in_half_of_the_grid(conftest):
    items = grid()
    for seed in range(5):
        kept = list(conftest.pairwise(items, seed))
        assert pairs(kept) == pairs(items)
        assert 12 <= len(kept) <= 16 < len(items) == 24


def test_seeds_draw_different_samples_and_repeat_them(conftest):
    def drawn(seed):
        return {item.nodeid for item in conftest.pairwise(grid(), seed)}

    assert drawn(3) == drawn(3)
    assert len({frozenset(drawn(seed)) for seed in range(5)}) > 1


def test_other_tests_all_stay(conftest):
    items = [*grid(markers=()), *grid(path="b.py")[:1]]
    assert set(conftest.pairwise(items, 1)) == set(items)


def test_files_take_turns(conftest):
    config = SimpleNamespace(option=SimpleNamespace(seed=4))
    items = [*grid(path="a.py"), *grid(path="b.py")[:3]]
    ordered = conftest.in_turns(config, items)
    assert set(ordered) == set(items)
    assert [item.path for item in ordered[:6]].count("b.py") == 3
    assert [item.nodeid for item in ordered] != [item.nodeid for item in items]


def test_a_device_has_its_tests_and_a_gpu_those_that_are_marked_for_it(conftest):
    on_cpu, marked, other = (
        Item(markers=m, callspec=SimpleNamespace(params=p))
        for m, p in (((), {"device": "cpu"}), (("gpu",), {}), ((), {}))
    )
    assert [conftest.is_on(i, "cpu") for i in (on_cpu, marked, other)] == [True, False, False]
    assert [conftest.is_on(i, "cuda") for i in (on_cpu, marked, other)] == [False, True, False]
