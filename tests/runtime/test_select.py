"""The choice of a backend: forced, else the first that can run."""

import importlib
import logging
import threading

import pytest
import torch

from bitnet_triton import BackendUnavailableError, use_backend
from bitnet_triton.runtime import (
    BACKENDS,
    Implementation,
    backend_objection,
    forced_backend,
    select,
)
from bitnet_triton.runtime.select import ENVIRONMENT_VARIABLE

CPU = torch.device("cpu")
ALL = {name: Implementation(lambda name=name: name) for name in BACKENDS}


def without(*names):
    return {name: value for name, value in ALL.items() if name not in names}


@pytest.fixture(autouse=True)
def _capable(monkeypatch):
    """Let each backend run on "cpu", none on "meta", and all but triton on "cuda"."""
    reasons = {("triton", "cuda"): "too old", **{(b, "meta"): f"no {b} there" for b in BACKENDS}}
    # the package has a function of the same name
    module = importlib.import_module("bitnet_triton.runtime.select")
    monkeypatch.setattr(module, "_device_objection", lambda *key: reasons.get(key))


def test_the_first_backend_that_can_run_is_chosen():
    assert select("op", ALL, CPU)() == "triton"
    assert select("op", without("triton"), CPU)() == "compile"
    assert select("op", ALL, torch.device("cuda"))() == "compile"
    assert select("op", {"reference": ALL["reference"]}, CPU)() == "reference"


def test_an_objection_to_the_arguments_passes_on_to_the_next_backend():
    def supports(size):
        return "too large" if size > 8 else None

    table = {**ALL, "triton": Implementation(lambda: "triton", supports)}
    assert select("op", table, CPU, 8)() == "triton"
    assert select("op", table, CPU, 9)() == "compile"


@pytest.mark.parametrize("name", BACKENDS)
def test_a_block_forces_a_backend_and_ends(name):
    with use_backend(name):
        assert forced_backend() == name
        assert select("op", ALL, CPU)() == name
    assert forced_backend() is None


@pytest.mark.parametrize("name", BACKENDS)
def test_the_environment_forces_a_backend(name, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, name)
    assert select("op", ALL, CPU)() == name


def test_the_block_wins_over_the_environment_and_the_inner_block_over_the_outer(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "compile")
    with use_backend("reference"):
        assert select("op", ALL, CPU)() == "reference"
        with use_backend("triton"):
            assert select("op", ALL, CPU)() == "triton"
        assert select("op", ALL, CPU)() == "reference"
    assert select("op", ALL, CPU)() == "compile"


def test_a_block_ends_with_an_exception():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert forced_backend() is None


def test_a_block_does_not_reach_other_threads():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(forced_backend()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_an_empty_variable_forces_nothing(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    assert forced_backend() is None


def test_unknown_names_are_refused(monkeypatch):
    expected = "expected one of triton, compile, reference, triton-cpu, got 'cuda'"
    with pytest.raises(ValueError, match=f"`backend`: {expected}"), use_backend("cuda"):
        pass
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(ValueError, match=f"{ENVIRONMENT_VARIABLE}: {expected}"):
        select("op", ALL, CPU)


def test_a_forced_backend_is_never_replaced():
    with use_backend("triton"):
        with pytest.raises(
            BackendUnavailableError,
            match=r"^op: backend `triton` was asked for but cannot run: too old$",
        ):
            select("op", ALL, torch.device("cuda"))
        with pytest.raises(BackendUnavailableError, match="op has no `triton` implementation"):
            select("op", without("triton"), CPU)
        table = {"triton": Implementation(lambda: None, lambda size: f"{size} is odd")}
        with pytest.raises(BackendUnavailableError, match="cannot run: 7 is odd"):
            select("op", table, CPU, 7)


def test_where_nothing_runs_every_reason_is_given():
    with pytest.raises(
        BackendUnavailableError,
        match=r"^op: no backend can run: triton: no triton there; "
        "compile: op has no `compile` implementation; reference: no reference there$",
    ):
        select("op", without("compile"), torch.device("meta"))


def test_a_choice_is_logged_once_for_each_op_and_device(caplog):
    caplog.set_level(logging.INFO, "bitnet_triton")
    for _ in range(3):
        select("one", ALL, CPU)
        select("two", without("triton"), CPU)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "one on cpu runs on backend `triton`"),
        ("INFO", "two on cpu runs on backend `compile`"),
    ]


def test_a_slow_choice_is_a_warning_with_the_reasons(caplog):
    caplog.set_level(logging.INFO, "bitnet_triton")
    for _ in range(2):
        select("one", ALL, torch.device("cuda"))
        select("two", without("triton", "compile"), CPU)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        (
            "WARNING",
            "one on cuda runs on the slow backend `compile` (triton: too old); "
            "`bitnet-triton doctor` tells of all ops",
        ),
        (
            "WARNING",
            "two on cpu runs on the slow backend `reference` (triton: two has no `triton` "
            "implementation; compile: two has no `compile` implementation); "
            "`bitnet-triton doctor` tells of all ops",
        ),
    ]


def test_a_reason_that_several_ops_share_is_one_warning(caplog):
    caplog.set_level(logging.INFO, "bitnet_triton")
    for op in ("one", "two", "three"):
        select(op, ALL, torch.device("cuda"))
    assert [(r.levelname, r.getMessage().split()[0]) for r in caplog.records] == [
        ("WARNING", "one"),
        ("INFO", "two"),
        ("INFO", "three"),
    ]


def test_a_forced_choice_is_not_logged(caplog):
    caplog.set_level(logging.INFO, "bitnet_triton")
    with use_backend("reference"):
        select("op", ALL, CPU)
    assert not caplog.records


def test_an_exception_in_a_capability_check_is_raised():
    def broken():
        raise ZeroDivisionError

    table = {**ALL, "triton": Implementation(lambda: None, broken)}
    with pytest.raises(ZeroDivisionError):
        select("op", table, CPU)


def test_objections_can_be_asked_for():
    assert backend_objection("reference", CPU) is None
    assert backend_objection("triton", torch.device("cuda")) == "too old"
