import dataclasses
import itertools
from collections import Counter

import pytest
import torch

from bench.case import Settings, Work
from bench.turns import count_rounds, orders, time_in_turns

SETTINGS = Settings(rounds=15, block_s=0.1, budget_s=12.0, pause_s=0.0)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7])
def test_everybody_starts_and_follows_everybody_equally_often(count):
    names = "abcdefg"[:count]
    rounds = orders(names)
    assert all(sorted(row) == list(names) for row in rounds)
    assert len(set(Counter(row[0] for row in rounds).values())) == 1
    neighbours = Counter(pair for row in rounds for pair in itertools.pairwise(row))
    assert set(neighbours) == set(itertools.permutations(names, 2))
    assert len(set(neighbours.values())) <= 1


def test_share_of_the_budget_decides_about_the_rounds():
    assert count_rounds(0.001, 4, SETTINGS) == 15  # all of them
    assert count_rounds(0.5, 4, SETTINGS) == 6  # 3 s are its share
    assert count_rounds(2.0, 4, SETTINGS) == 3  # the least
    assert count_rounds(5.0, 4, SETTINGS) == 2  # three exceed the whole budget
    assert count_rounds(50.0, 4, SETTINGS) == 1


def test_slow_provider_takes_part_in_the_first_rounds_only():
    order = []
    # long calls, so that each turn is one call
    works = {name: Work(lambda name=name: order.append(name)) for name in "ab"}
    settings = dataclasses.replace(SETTINGS, rounds=4)
    times = time_in_turns(works, {"a": 0.3, "b": 8.0}, settings)
    assert [len(times[name]) for name in "ab"] == [4, 1]
    assert "".join(order) == "abaaa"


def test_long_calls_are_timed_one_by_one_on_every_device():
    calls = itertools.count()
    cuda = dataclasses.replace(SETTINGS, rounds=1, device=torch.device("cuda"))
    time_in_turns({"a": Work(lambda: next(calls))}, {"a": 0.3}, cuda)
    assert next(calls) == 1
