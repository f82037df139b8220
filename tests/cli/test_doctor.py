"""``bitnet-triton doctor``: the choice it prints is the choice that is made."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bitnet_triton import triton_cpu
from bitnet_triton.cli import app
from bitnet_triton.cli.doctor import crowding
from bitnet_triton.kernels import IMPLEMENTATIONS, TernaryWeight, ternary_linear
from bitnet_triton.runtime.select import _device_objection

runner = CliRunner()


def doctor(*arguments):
    return runner.invoke(
        app, ["doctor", *arguments], catch_exceptions=False, env={"COLUMNS": "200"}
    )


def test_names_a_backend_for_every_op():
    lines = doctor().stdout.splitlines()
    for op in IMPLEMENTATIONS:
        (row,) = [line for line in lines if line.startswith(op + " ")]
        assert row.split()[1] in ("triton", "compile", "reference")


def test_prints_the_backend_that_really_runs(caplog):
    (row,) = [line for line in doctor().stdout.splitlines() if line.startswith("ternary_linear ")]
    with caplog.at_level(logging.INFO, logger="bitnet_triton"):
        weight = TernaryWeight.from_codes(torch.ones(4, 8, dtype=torch.int8), 1.0)
        ternary_linear(torch.ones(1, 8), weight)
    assert f"ternary_linear on cpu runs on backend `{row.split()[1]}`" in caplog.text


def test_shows_with_what_triton_kernels_are_compiled_for_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(triton_cpu, "report", lambda: REPORT)
    output = doctor().stdout
    assert "triton on cpu  /bin/c++: c++ 99.1" in output
    assert "instruction sets: avx2, fma" in output
    assert "compiled kernels: /somewhere, 3.5 MiB" in output


def test_says_why_triton_does_not_run_on_the_cpu(monkeypatch):
    monkeypatch.setattr(triton_cpu, "report", lambda: replace(REPORT, objection="no compiler"))
    monkeypatch.setattr(triton_cpu, "objection", lambda: "no compiler")
    _device_objection.cache_clear()
    try:
        output = doctor().stdout
    finally:
        _device_objection.cache_clear()
    assert "triton on cpu  no compiler" in output
    assert "not triton on cpu: no compiler" in output


REPORT = triton_cpu.Report(
    objection=None,
    compiler="/bin/c++: c++ 99.1",
    features=["avx2", "fma"],
    cache=Path("/somewhere"),
    cache_bytes=7 << 19,
    real_triton_cpu=False,
)


def test_shows_a_forced_backend(monkeypatch):
    monkeypatch.setenv("BITNET_TRITON_BACKEND", "reference")
    output = doctor().stdout
    assert "(forced: reference)" in output
    (row,) = [line for line in output.splitlines() if line.startswith("ternary_linear ")]
    assert row.split()[1] == "reference"


def test_checks_every_backend_that_can_run():
    output = doctor("--check").stdout
    assert "compile on cpu: agrees" in output
    assert "reference on cpu: agrees" in output


def test_a_backend_that_differs_fails_the_check(monkeypatch):
    monkeypatch.setattr("bitnet_triton.cli.doctor._worst_error", lambda *_: 0.1)
    result = doctor("--check")
    assert "DIFFERS" in result.stdout
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("threads", "cores", "load", "is_crowded"),
    [
        (2, 2, 0.0, False),
        (2, 2, 0.4, False),
        (2, 2, 1.5, True),
        (2, 2, 9.0, True),
        (1, 2, 9.0, False),  # one thread waits for nobody
        (8, 64, 32.0, False),
        (32, 64, 48.0, True),
    ],
)
def test_says_so_where_there_are_more_threads_than_free_cores(threads, cores, load, is_crowded):
    hint = crowding(threads, cores, load)
    assert (hint is not None) == is_crowded
    if hint:
        assert f"{threads} threads on {cores} cores, of which {max(cores - load, 0):.1f}" in hint
        assert "OMP_WAIT_POLICY=passive" in hint


@pytest.mark.parametrize(("load", "times"), [(50.0, 1), (0.0, 0)])
def test_prints_the_hint_beside_the_threads(monkeypatch, load, times):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    assert doctor().stdout.count("OMP_WAIT_POLICY=passive") == times


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_triton_runs_on_the_gpu():
    assert "triton on cuda:0: agrees" in doctor("--check").stdout
