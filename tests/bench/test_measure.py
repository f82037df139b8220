import dataclasses
import itertools
import time

import pytest
import torch

from bench.case import Case, PeerMissingError, Provider, Settings, Work
from bench.measure import measure_point, ratios, relative_error, spread
from bench.peaks import Peaks, Reads, best_possible_seconds

SETTINGS = Settings(rounds=3, block_s=1e-4, budget_s=0.5, seed=3)


def make_inputs(size, settings):
    return torch.randn(size, generator=settings.generator)


def missing(inputs):
    raise PeerMissingError("no such library")


def broken(inputs):
    raise RuntimeError("cannot run\nsecond line")


def case(**providers):
    built = {
        name: Provider(name, build, tolerance=1e-3, note="a note")
        for name, build in providers.items()
    }
    return Case(
        name="square",
        title="Square",
        grid=[{"size": 8}],
        inputs=make_inputs,
        reference=lambda x: x.double() ** 2,
        providers=built,
        baselines=("ours",),
        flops=lambda size: size,
    )


def square(inputs):
    return Work(lambda: inputs**2, read_bytes=4 * inputs.numel(), details={"copies": 1})


def measure(case):
    rows = measure_point(case, case.grid[0], case.select_providers([]), SETTINGS)
    return {row.provider: row for row in rows}


def test_median_and_percentiles_of_known_values():
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == pytest.approx(
        {"median": 3.5, "p20": 2.0, "p80": 5.0}
    )


def test_ratio_is_taken_round_by_round():
    # a machine that halves its speed in the second round: the ratio does not move
    assert ratios([2.0, 4.0, 2.0], [1.0, 2.0, 1.0]) == {"median": 2.0, "p20": 2.0, "p80": 2.0}


def test_ratio_of_unequal_rounds_takes_those_of_both():
    assert ratios([2.0, 6.0, 9.0], [1.0]) == {"median": 2.0, "p20": 2.0, "p80": 2.0}


def test_right_provider_is_timed():
    row = measure(case(ours=square))["ours"]
    assert row.status == "timed"
    assert len(row.rounds) == 3
    assert row.seconds == spread(row.rounds)
    assert row.ratios["ours"] == {"median": 1.0, "p20": 1.0, "p80": 1.0}
    assert row.error < 1e-6
    assert row.details == {"copies": 1}


def test_wrong_provider_is_refused_and_not_timed():
    timed = itertools.count()

    def wrong(inputs):
        def call():
            next(timed)
            return inputs**2 * 1.01

        return Work(call)

    row = measure(case(ours=square, wrong=wrong))["wrong"]
    assert row.status == "failed"
    assert row.reason == "relative error 0.01 exceeds 0.001"
    assert row.rounds == []
    assert next(timed) == 1  # called once, for the check


def test_nan_is_refused():
    row = measure(case(ours=lambda x: Work(lambda: x * float("nan"))))["ours"]
    assert (row.status, row.error) == ("failed", float("inf"))


def test_missing_peer_is_listed_with_the_reason():
    row = measure(case(ours=square, peer=missing))["peer"]
    assert (row.status, row.reason, row.seconds) == ("missing", "no such library", None)


def test_provider_that_raises_is_listed_with_the_error():
    row = measure(case(ours=square, peer=broken))["peer"]
    assert (row.status, row.reason) == ("failed", "RuntimeError: cannot run")


def test_absent_baseline_leaves_no_ratio():
    row = measure(case(ours=missing, other=square))["other"]
    assert row.status == "timed"
    assert row.ratios == {}


def test_one_wrong_output_among_several_is_seen():
    x = torch.randn(4)
    good = {"y": x, "dx": x}
    assert relative_error(good, good) == 0
    assert relative_error({"y": x, "dx": 2 * x}, good) == pytest.approx(1)
    with pytest.raises(ValueError, match="expected outputs y, dx, got y"):
        relative_error({"y": x}, good)
    with pytest.raises(ValueError, match=r"y: expected \[4\], got \[2, 2\]"):
        relative_error({"y": x.view(2, 2), "dx": x}, good)


def test_share_is_taken_round_by_round_from_the_reads_beside():
    # reads at half the speed in every second call: the share of a memory-bound call must follow
    peaks = Peaks(1e9, "read", {})
    reads = Reads(lambda: time.sleep(2e-3), 1_000_000)
    work = Work(lambda: time.sleep(4e-3), output=lambda: torch.ones(1), read_bytes=1_000_000)
    bound = dataclasses.replace(case(ours=lambda _: work), reference=lambda _: torch.ones(1))
    (row,) = measure_point(bound, bound.grid[0], bound.providers, SETTINGS, peaks, reads=reads)
    assert row.read_bytes_per_s["median"] == pytest.approx(5e8, rel=0.3)
    # by the peaks it would be a quarter
    assert row.share_of_peak == pytest.approx(0.5, rel=0.3)
    assert row.bound == "memory"


def test_what_does_not_compile_is_warm_after_its_check():
    calls = itertools.count()

    def build(x):
        return Work(lambda: next(calls), output=lambda: x, compiles=False)

    row = measure(dataclasses.replace(case(ours=build), reference=lambda x: x))["ours"]
    assert row.status == "timed"
    assert row.peak_extra_bytes is None


def test_share_refers_to_the_limit_that_binds():
    peaks = Peaks(1e9, "read", {"int8": 1e12})
    assert best_possible_seconds(peaks, 1e9, 1e9, "int8") == (1.0, "memory")
    assert best_possible_seconds(peaks, 1e6, 2e12, "int8") == (2.0, "compute")
    assert best_possible_seconds(peaks, 1e6, 2e12, "bf16") == (1e-3, "memory")  # rate not known
    assert best_possible_seconds(peaks, 1e9, 1e9, "int8", 2e9) == (0.5, "memory")


def test_grid_and_providers_are_chosen_by_name():
    square_case = case(ours=square, other=square)
    assert square_case.select_points({"size": ["8"]}) == [{"size": 8}]
    assert list(square_case.select_providers(["other"])) == ["other"]
    with pytest.raises(ValueError, match="keys size, got 'length'"):
        square_case.select_points({"length": ["8"]})
    with pytest.raises(ValueError, match="size is one of 8, got '9'"):
        square_case.select_points({"size": ["9"]})
    with pytest.raises(ValueError, match="square has ours, other; got 'mine'"):
        square_case.select_providers(["mine"])


def test_settings_refuse_zero():
    with pytest.raises(ValueError, match="`rounds`: expected at least 1, got 0"):
        Settings(rounds=0)
    with pytest.raises(ValueError, match="`budget_s`: expected more than 0, got 0"):
        Settings(budget_s=0)
