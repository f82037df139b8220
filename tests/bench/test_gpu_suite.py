"""The suite for GPUs, on a CPU at small sizes: what it reports, what it skips, when it fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bench import gpu_suite, gpu_tests
from bench.case import Case, Provider, Settings, Work
from bench.gpu_report import Outcome, print_result, result
from bench.gpu_sections import SECTIONS, Section
from bench.gpu_suite import Run, run_section, run_suite
from bench.gpu_targets import TARGETS, ratio_to
from bench.gpu_tests import run_tests, summary
from bench.measure import Row, spread
from bitnet_triton.runtime import backend_objection

QUANTIZED = "bitnet_triton_quantized"
CHECKOUT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    backend_objection("triton", torch.device("cpu")) is not None, reason="Triton cannot run here"
)
WRONG = """
import os, pytest, torch

def test_right(device, backend):
    assert (device, backend) == ("cpu", "triton")

@pytest.mark.parametrize("n", range(3))
def test_wrong(n, device):
    assert n != 1, "a wrong result"

def test_of_no_device():
    raise SystemExit("never asked for")
"""


def run(tmp_path, *arguments):
    """Run the command; return its exit code, its output and its JSON."""
    target = tmp_path / "suite.json"
    command = ["--device", "cpu", "--output", str(target), *arguments]
    outcome = CliRunner().invoke(gpu_suite.app, command)
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), outcome.output
    return outcome.exit_code, outcome.output, json.loads(target.read_text())


def folder_of(folder, tests):
    """Make a folder of tests beside the options that ours have."""
    folder.mkdir()
    shutil.copy(CHECKOUT / "tests" / "conftest.py", folder)
    (folder / "test_some.py").write_text(tests)
    return folder


def tell(_):
    pass


def clock(monkeypatch):
    """Let time stand still but for what is added to the first element."""
    now = [0.0]
    monkeypatch.setattr(gpu_suite.time, "monotonic", lambda: now[0])
    return now


def section(name="some", value=1.0, points=1, spend=lambda: None, **more):
    """Return a section of points whose provider gives ``value`` where 1 is right."""

    def build(_):
        spend()
        return Work(lambda: torch.full((3,), value))

    case = Case(
        name=name, title=name.title(), grid=[], inputs=lambda **_: None,
        reference=lambda _: torch.ones(3), baselines=(), flops=lambda n: 1.0,
        providers={"bitnet_triton": Provider("ours", build, 1e-3),
                   "peer": Provider("theirs", build, 1e-3)},
    )  # fmt: skip
    grid = [{"n": n} for n in range(points)]
    settings = {"guess_s": 0.0, "forced": False, **more}
    return Section(name, lambda _: case, grid, grid, ("bitnet_triton",), **settings)


def settled(quick=False, budget_s=60.0):
    return Run(Settings(rounds=1, block_s=1e-4, budget_s=1e-3), quick, budget_s)


@needs_triton
@pytest.mark.slow
def test_a_quick_run_tests_times_and_writes_everything(tmp_path):
    chosen = [x for s in SECTIONS for x in ("--section", s.name)]
    tests = folder_of(tmp_path / "tests", WRONG.replace("n != 1", "n < 3"))
    arguments = [*chosen, "--section", "tests", "--test", str(tests), "--seed", "5"]
    code, output, data = run(tmp_path, "--quick", "--budget", "6000", *arguments)
    assert code == 0, output
    assert [s["name"] for s in data["sections"]] == [s.name for s in SECTIONS]
    for found, expected in zip(data["sections"], SECTIONS, strict=True):
        # what a quick run leaves out is named
        assert len(found["skipped"]) == len(expected.small) - expected.quick, found["name"]
        rows = found["rows"]
        assert {r["status"] for r in rows if r["provider"].startswith("bitnet")} == {"timed"}
        assert {r["status"] for r in rows} <= {"timed", "missing"}, rows
        assert all(r["error"] <= r["tolerance"] for r in rows if r["status"] == "timed")
    baselines = {b for s in data["sections"] for r in s["rows"] for b in r["ratios"]}
    assert baselines >= {"torch_bf16", "torch_int8", "sdpa", "sdpa_flash", "torch_bf16_recorded"}
    assert sum(data["tests"]["files"].popitem()[1].values()) == 4
    assert data["peaks"]["read_bytes_per_s"] > 0
    assert data["settings"]["seed"] == 5
    assert data["targets"] == []
    assert "not judged on a CPU" in output
    quick = {s.name: [r["provider"] for r in found["rows"]]
             for s, found in zip(SECTIONS, data["sections"])}  # fmt: skip
    assert quick["model"] == ["bitnet_triton_dynamic"]
    assert "flex" not in quick["attention"]


def test_tests_run_on_one_device_with_its_kernels_and_failures_have_names(tmp_path):
    folder = folder_of(tmp_path / "tests", WRONG)
    found = run_tests("cpu", budget_s=600, seed=3, jobs=2, paths=[str(folder)])
    (counts,) = found["files"].values()
    assert counts == {"passed": 3, "failed": 1}
    (failure,) = found["failed"]
    assert "test_wrong[cpu-1]" in failure["name"]
    assert "a wrong result" in failure["reason"]
    assert found["skipped"] == {}


def test_what_has_not_begun_in_time_is_skipped_and_counted(tmp_path):
    folder = folder_of(tmp_path / "tests", WRONG)
    found = run_tests("cpu", budget_s=-1, seed=3, jobs=1, paths=[str(folder)])
    assert found["failed"] == []
    assert found["skipped"] == {"no time left": 4}


def test_a_run_of_the_tests_that_breaks_is_a_failure(monkeypatch):
    broken = subprocess.CompletedProcess([], 2, "", "ImportError: no kernels")
    monkeypatch.setattr(gpu_tests.subprocess, "run", lambda *_, **__: broken)
    (failure,) = run_tests("cpu", budget_s=60, seed=3, jobs=1)["failed"]
    assert failure == {"name": "the run of the tests", "reason": "ImportError: no kernels"}
    assert summary([], "", 1.0)["failed"][0]["reason"] == "no test ran"


def test_a_kernel_that_is_wrong_is_not_timed_and_fails_the_run(tmp_path, monkeypatch):
    wrong, right = section("wrong", value=1.05), section("right")
    monkeypatch.setattr(gpu_suite, "SECTIONS", (wrong, right))
    run, target = settled(), tmp_path / "suite.json"
    run_suite(run, ["wrong", "right"], target, tell)
    rows = [row for s in json.loads(target.read_text())["sections"] for row in s["rows"]]
    assert [row["status"] for row in rows] == ["failed", "timed"]
    assert "exceeds" in rows[0]["reason"]
    assert rows[0]["seconds"] is None
    assert run.failed


def test_a_peer_that_fails_does_not_fail_the_run():
    run = settled()
    run.outcomes.append(
        run_section(replace(section(value=2.0), providers=("peer",)), run, 9e9, tell)
    )
    assert run.outcomes[0].rows[0].status == "failed"
    assert not run.failed


def test_a_point_starts_only_if_the_longest_so_far_would_end_in_time(monkeypatch):
    now, spans = clock(monkeypatch), iter([1, 4, 3, 3, 1])

    def spend():
        now[0] += next(spans)

    outcome = run_section(section(points=5, spend=spend), settled(), 10.0, tell)
    assert len(outcome.rows) == 3
    assert [s["name"] for s in outcome.skipped] == ["n=3", "n=4"]
    assert outcome.skipped[0]["reason"] == "needs about 4 s, 2 s are left"


def test_a_quick_run_starts_by_a_short_guess(monkeypatch):
    clock(monkeypatch)
    for quick, left_out in ((True, 0), (False, 1)):
        outcome = run_section(section(guess_s=60.0), settled(quick), 10.0, tell)
        assert len(outcome.skipped) == left_out


def test_time_that_a_section_leaves_goes_to_those_after_it(tmp_path, monkeypatch):
    now, deadlines = clock(monkeypatch), []
    sections = [section(n, weight=w) for n, w in (("a", 1), ("b", 1), ("c", 2))]
    sections.append(section("d", weight=1, most_s=7.0))
    ends = iter([10.0, 70.0, 80.0, 81.0])

    def timed(section, run, deadline, tell):
        deadlines.append(deadline)
        now[0] = next(ends)
        return Outcome(section.name, "", "")

    monkeypatch.setattr(gpu_suite, "SECTIONS", sections)
    monkeypatch.setattr(gpu_suite, "run_section", timed)
    monkeypatch.setattr(gpu_suite, "measure_peaks", lambda *_, **__: None)
    run_suite(settled(budget_s=100.0), "abcd", tmp_path / "suite.json", tell)
    assert deadlines == [20.0, 10.0 + 90.0 / 4, 70.0 + 30.0 * 2 / 3, 87.0]


def test_a_killed_run_leaves_what_it_has(tmp_path, monkeypatch):
    def killed():
        raise KeyboardInterrupt

    sections = (section("first"), section("second", spend=killed))
    monkeypatch.setattr(gpu_suite, "SECTIONS", sections)
    target = tmp_path / "suite.json"
    with pytest.raises(KeyboardInterrupt):
        run_suite(settled(), ["first", "second"], target, tell)
    assert [s["name"] for s in json.loads(target.read_text())["sections"]] == ["first"]


def test_after_a_device_stopped_the_rest_is_skipped_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "_broken_device", lambda _, after: f"stopped at {after['n']}")
    monkeypatch.setattr(gpu_suite, "SECTIONS", (section("first", points=2), section("second")))
    run = settled()
    run_suite(run, ["first", "second"], tmp_path / "suite.json", tell)
    assert [len(o.rows) for o in run.outcomes] == [1, 0]
    reasons = [s["reason"] for o in run.outcomes for s in o.skipped]
    assert reasons == ["stopped at 0"] * 2


def outcome_of(*ratios, name="prefill", status="timed", M=4096, provider=QUANTIZED):
    rows = [
        Row(
            {"M": M, "K": 4096, "N": 14336}, provider, "bitnet_triton", status=status,
            seconds=spread([2e-3]), ratios={"torch_bf16": spread([ratio])}, share_of_peak=0.75,
            bound="memory", units=4,
        )
        for ratio in ratios
    ]  # fmt: skip
    return Outcome(name, "Prefill", "tokens", rows, [1e12] * len(rows))


def judge(target, outcomes):
    return target.judge([outcome.to_dict() for outcome in outcomes])


@pytest.mark.parametrize(
    ("outcomes", "verdict", "worst"),
    [
        ([outcome_of(1.9, 1.4)], "met", 1.4),
        ([outcome_of(1.9, 1.39)], "missed", 1.39),
        ([outcome_of(2.0, name="gemv")], "not measured", None),
        ([outcome_of(2.0, provider="bitnet_triton")], "not measured", None),
        ([], "not measured", None),
        ([outcome_of(2.0), outcome_of(2.0, status="failed")], "missed", 2.0),
    ],
)
def test_the_worst_row_decides_about_a_target(outcomes, verdict, worst):
    judged = judge(TARGETS[0], outcomes)
    assert (judged["verdict"], judged["value"]) == (verdict, worst)


def test_a_target_for_the_best_row_of_ours_needs_one_of_them():
    target = replace(TARGETS[0], provider=None)
    rows = [outcome_of(1.2), outcome_of(1.5, provider="bitnet_triton")]
    peer, broken = outcome_of(9.0, provider="torch_bf16"), outcome_of(3.0, status="failed")
    judged = judge(target, [*rows, peer, broken])
    assert (judged["verdict"], judged["value"]) == ("met", 1.5)
    assert judge(target, [outcome_of(1.2)])["verdict"] == "missed"
    assert judge(target, [peer])["verdict"] == "not measured"


def test_few_tokens_and_one_have_targets_of_their_own():
    few = [outcome_of(r, name="gemv", M=M) for r, M in ((5.0, 1), (3.0, 2), (9.0, 16))]
    judged = [judge(target, few) for target in TARGETS if target.section == "gemv"]
    ratios = [(j["value"], j["verdict"], j["points"]) for j in judged if j["unit"] == "x"]
    assert ratios == [(5.0, "met", 1), (3.0, "missed", 2)]


def test_figures_of_the_targets_are_those_they_name():
    row = outcome_of(3.0).to_dict()["rows"][0]
    by_unit = {t.unit: t.figure(row) for t in TARGETS if t.section != "training"}
    assert by_unit == {"x": 3.0, "%": 75.0, "TFLOP/s": 500.0, "tokens/s": 2000.0}
    assert TARGETS[2].figure(row | {"bound": "compute"}) is None
    assert ratio_to("flash")(row) is None


def test_results_and_targets_are_printed(monkeypatch):
    run = settled()
    run.outcomes.append(outcome_of(1.2))
    run.tests = summary([{"name": "a::b", "outcome": "failed", "reason": "wrong"}], "", 1.0)
    data = result(run)
    data["machine"]["gpu"] = "NVIDIA H100 80GB HBM3"
    data["targets"] = [judge(target, run.outcomes) for target in TARGETS]
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_result(data, console)
    text = console.export_text()
    assert "2000 of 2667" in text  # 4 tokens in 2 ms, at 75 % of what is possible
    assert "FAILED a::b: wrong" in text
    assert text.count("not measured") == len(TARGETS) - 1
    assert "1.2 x" in text
    assert "(of 1 measured)" in text
    assert "the targets are for" not in text


def test_targets_point_at_sections_providers_and_points_that_exist():
    for target in TARGETS:
        (found,) = [s for s in SECTIONS if s.name == target.section]
        assert target.provider is None or target.provider in found.providers
        assert any(target.matches(point) for point in found.points), target.title


@pytest.mark.parametrize("section", SECTIONS, ids=[s.name for s in SECTIONS])
def test_sections_name_providers_and_keys_that_the_case_has(section):
    case = section.case("tiny")
    assert set(section.providers) <= set(case.providers)
    assert set(section.slow) <= set(section.providers)
    for point in (*section.points, *section.small):
        assert case.flops(**point) > 0


def test_bad_arguments_end_with_one_line(capsys):
    for arguments in (["--section", "nothing"], ["--device", "abacus"], ["--no-such-option"]):
        with pytest.raises(SystemExit) as stop:
            gpu_suite.main(arguments)
        assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert "`section`: expected one of tests, prefill" in errors
    assert "`device`: expected cpu, cuda or auto, got 'abacus'" in errors


def test_runs_without_the_optional_packages():
    """As on a machine that has PyTorch, Triton and transformers, and not this package."""
    code = (
        "import sys\n"
        "for name in ('matplotlib', 'peft', 'llama_cpp', 'psutil'): sys.modules[name] = None\n"
        "from bench.gpu_suite import main\n"
        "main(['--list'])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "attention_backward" in run.stdout
