"""The suite for GPUs, on a CPU at small sizes: what it reports, what it skips, when it fails."""

import contextlib
import dataclasses
import gc
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bench import gpu_suite
from bench.case import Settings
from bench.measure import Row, spread
from bench.models import SHAPES
from bench.suite import SECTIONS, check_attention, check_linear, plan, show, steps
from bench.suite.checks import Checks, assert_codes_close
from bench.suite.plan import Clock, Item, Outcome, Plan, Section, run_section
from bench.suite.targets import QUANTIZED, TARGETS, Target, ratio_to
from bitnet_triton.kernels.rms_norm.op import NORM_FWD
from bitnet_triton.kernels.ternary_linear.launchers import QUANTIZED_FWD
from bitnet_triton.models.fused.recording import Recording
from bitnet_triton.runtime import Implementation, backend_objection
from bitnet_triton.testing import assert_close

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(
    backend_objection("triton", CPU) is not None, reason="Triton cannot run here"
)


def run(tmp_path, *arguments):
    """Run the command; return its exit code, its output and its JSON."""
    target = tmp_path / "suite.json"
    command = ["--device", "cpu", "--output", str(target), *arguments]
    outcome = CliRunner().invoke(gpu_suite.app, command)
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), outcome.output
    return outcome.exit_code, outcome.output, json.loads(target.read_text())


def passed(name="one"):
    return [{"name": name, "op": "op", "status": "passed", "reason": ""}]


def section(items, name="some", weight=1.0, guess_s=0.0):
    return Section(name, "Some", "check", weight, guess_s, lambda _: items)


def tell(_):
    pass


@needs_triton
def test_quick_run_checks_times_and_writes_everything(tmp_path):
    names = ["norms", "linears", "prefill", "decode"]
    code, output, data = run(
        tmp_path, "--quick", *(x for n in names for x in ("--section", n)), "--seed", "5"
    )
    assert code == 0, output
    assert [s["name"] for s in data["sections"]] == names
    checks = [r for s in data["sections"][:2] for r in s["results"]]
    assert {r["status"] for r in checks} == {"passed"}
    assert {r["op"] for r in checks} == {
        "quantize_activations", "quantize_weight", "rms_norm", "rms_norm_quantize",
        "relu2_mul_norm_quantize", "ternary_linear", "ternary_linear_quantized", "bit_linear",
        "int8_linear", "dense_linear",
    }  # fmt: skip
    # what a quick run leaves out is named
    assert all(s["skipped"] for s in data["sections"][:2])
    rows = [r for s in data["sections"][2:] for r in s["results"]]
    assert {r["status"] for r in rows} == {"timed"}
    assert all(r["error"] <= r["tolerance"] and r["flops"] > 0 for r in rows)
    assert {b for r in rows for b in r["ratios"]} == {"bf16", "int_mm", "sdpa"}
    assert data["peaks"]["read_bytes_per_s"] > 0
    assert data["settings"]["seed"] == 5
    assert data["targets"] == []
    assert "not judged on a CPU" in output


@needs_triton
@pytest.mark.slow
def test_every_section_runs_in_full_at_small_sizes(tmp_path):
    # the masks of attention compile for two minutes: tests/kernels/flash_attention has them
    names = [s.name for s in SECTIONS if s.name != "attentions"]
    chosen = [x for name in names for x in ("--section", name)]
    code, output, data = run(tmp_path, "--budget", "3000", *chosen)
    assert code == 0, output
    assert [s["name"] for s in data["sections"]] == names
    assert not any(s["skipped"] for s in data["sections"])
    for row in (r for s in data["sections"] for r in s["results"]):
        assert row["status"] in ("passed", "timed", "missing"), row["name"]
        assert row["status"] != "missing" or row["peer"]


@needs_triton
def test_attention_is_checked_forward_backward_and_decoding(monkeypatch):
    wanted = ("D=128 bf16", "decode one query padded bf16", "[2, 3, 5, 6] bf16", "1 tokens a row")
    items = check_attention.items(Plan(Settings()))
    chosen = [i for i in items if i.name.startswith(("flash_attention window", "apply_rotary",
              "rotary_and", "flash_attention decode")) and any(w in i.name for w in wanted)
              and "fp" not in i.name]  # fmt: skip
    assert len(chosen) == len(wanted)
    outcome = run_section(section(chosen), Plan(Settings()), time.monotonic() + 100, tell)
    assert [r["reason"] for r in outcome.results] == [""] * len(wanted)
    names = " ".join(i.name for i in items)
    for kind in ("causal", "full", "sinks", "dilation", "global", "packed", "padding", "softcap"):
        assert f"flash_attention {kind}" in names


@needs_triton
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda y: y.index_fill_(-1, torch.tensor([7]), 3.0), "elements are off"),
        (torch.empty_like, "result[0, 0] is nan"),
    ],
    ids=["one column", "nothing is written"],
)
def test_wrong_kernel_is_named_and_the_others_go_on(change, reason, tmp_path, monkeypatch):
    right = NORM_FWD["triton"].run
    wrong = Implementation(lambda *args: change(right(*args)))
    monkeypatch.setitem(NORM_FWD, "triton", wrong)
    code, output, data = run(tmp_path, "--quick", "--section", "norms")
    assert code == 1
    status = {r["name"]: r["status"] for r in data["sections"][0]["results"]}
    assert [name for name, s in status.items() if s == "failed"] == ["rms_norm 5x100 bf16"]
    assert len(status) == 5
    assert "FAILED rms_norm 5x100 bf16" in output
    assert reason in next(
        r["reason"] for r in data["sections"][0]["results"] if r["status"] == "failed"
    )


@needs_triton
def test_wrong_kernel_is_not_timed(tmp_path, monkeypatch):
    right = QUANTIZED_FWD["triton"].run
    monkeypatch.setitem(QUANTIZED_FWD, "triton", Implementation(lambda *args: right(*args) * 1.05))
    code, _, data = run(tmp_path, "--quick", "--section", "gemv", "--section", "prefill")
    assert code == 1
    rows = [r for s in data["sections"] for r in s["results"]]
    failed = [r for r in rows if r["status"] == "failed"]
    assert {r["provider"] for r in failed} == {QUANTIZED}
    assert len(failed) == len({r["name"].split(":")[0] for r in rows}) == 4
    assert all(r["seconds"] is None for r in failed)
    assert {r["status"] for r in rows if r["provider"] != QUANTIZED} == {"timed"}


def test_peer_that_fails_does_not_fail_the_run():
    row = {"name": "x", "status": "failed", "reason": "no"}
    assert Outcome("a", "A", "speed", [row | {"peer": True}]).failed == []
    assert Outcome("a", "A", "speed", [row | {"peer": False}]).failed


def test_forced_backend_that_cannot_run_is_a_failure_and_no_reference_instead():
    from bitnet_triton.kernels import rms_norm

    checks = Checks(Plan(Settings()))
    checks.add("rms_norm", "too wide", lambda: rms_norm(torch.ones(1, 16385), torch.ones(16385)))
    outcome = run_section(section(checks.items), Plan(Settings()), time.monotonic() + 9, tell)
    assert outcome.results[0]["status"] == "failed"
    assert "BackendUnavailableError" in outcome.results[0]["reason"]


def test_checks_see_memory_that_nobody_wrote_and_leave_the_settings():
    before = torch.are_deterministic_algorithms_enabled()
    checks, seen = Checks(Plan(Settings())), []
    checks.add("op", "x", lambda: seen.append(torch.empty(9)), backend=None)
    checks.items[0].run()
    assert seen[0].isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before


@needs_triton
def test_nothing_is_written_between_kernels_that_overlap(monkeypatch):
    """A kernel that fills new memory would wait for the one before, in place of ours."""
    filled = []

    def record(self, model, launchers, record=Recording._record):
        with torch.profiler.profile() as profile:
            hidden = record(self, model, launchers)
        filled.extend(e.key for e in profile.key_averages() if "fill" in e.key)
        return hidden

    monkeypatch.setattr(Recording, "_record", record)
    items = steps.checks(Plan(Settings()))
    outcome = run_section(section(items[:1]), Plan(Settings()), time.monotonic() + 60, tell)
    assert outcome.results[0]["reason"] == ""
    assert filled == []


@needs_triton
def test_a_recorded_step_is_timed_on_memory_that_is_still_there():
    inputs = steps._inputs(SHAPES["tiny"], 1, 8, 4, Settings())
    build = steps._recorded(contextlib.nullcontext)
    work = build(inputs)
    kept = weakref.ref(inputs.models.get("fused").model.decode_steps.recording)
    build(inputs)
    gc.collect()
    assert kept() is not None
    work.call()
    del work
    gc.collect()
    assert kept() is None


def test_codes_may_be_off_by_one_beside_a_tie_and_no_more():
    exact = torch.zeros(1000, dtype=torch.float64)
    near, far, many = (exact.to(torch.int8) for _ in range(3))
    near[3], far[3], many[:11] = 1, 2, 1
    assert_codes_close(near, exact)
    with pytest.raises(AssertionError, match="off by 2"):
        assert_codes_close(far, exact)
    with pytest.raises(AssertionError, match=r"1.10% of the codes"):
        assert_codes_close(many, exact)


def test_sums_of_many_terms_in_float32_may_be_added_one_by_one_and_have_to_be_right():
    terms, shape = 6912, (4, 64)
    dy, weight = torch.randn(shape[0], terms), torch.randint(-1, 2, (terms, shape[1])).float()
    one_by_one = torch.zeros(shape)
    for n in range(terms):
        one_by_one += dy[:, n : n + 1] * weight[n]
    exact = dy.double() @ weight.double()

    def check(sums, name="d0"):
        limits = check_linear._limits_of_sums(name, dy @ weight, exact, {"d0": terms})
        assert_close(name, sums, exact, eager=dy @ weight, **limits)

    check(one_by_one)
    # a factor shows in the whole or in the largest element, whichever is seen first
    with pytest.raises(AssertionError, match="d0: "):
        check(one_by_one * (1 + 1e-5))
    with pytest.raises(AssertionError, match="elements are off"):
        check(one_by_one.index_fill(1, torch.tensor(3), 0.0))
    assert check_linear._limits_of_sums("y", one_by_one, exact, {"d0": terms}) == {}
    assert check_linear._limits_of_sums("d0", one_by_one.bfloat16(), exact, {"d0": terms}) == {}


def test_what_does_not_fit_into_the_time_is_listed(tmp_path):
    code, output, data = run(tmp_path, "--budget", "0.001", "--section", "norms")
    skipped = data["sections"][0]["skipped"]
    assert code == 0
    assert data["sections"][0]["results"] == []
    assert len(skipped) > 20
    assert all("s are left" in item["reason"] for item in skipped)
    assert f"{len(skipped)} skipped" in output


def test_item_starts_only_if_the_longest_so_far_would_end_in_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(plan.time, "monotonic", lambda: now[0])

    def take(seconds):
        now[0] += seconds
        return passed()

    items = [Item(str(s), lambda s=s: take(s)) for s in (1, 4, 3, 3, 1)]
    outcome = run_section(section(items), Plan(Settings()), 10.0, tell)
    assert len(outcome.results) == 3
    assert [s["name"] for s in outcome.skipped] == ["3", "1"]
    assert outcome.skipped[0]["reason"] == "needs about 4 s, 2 s are left"


def test_quick_run_starts_by_a_short_guess_and_leaves_out_what_compiles_for_long(tmp_path):
    items, end = [Item("a", passed)], time.monotonic() + 10.0
    for quick, left_out in ((True, 0), (False, 1)):
        outcome = run_section(section(items, guess_s=60.0), Plan(Settings(), quick), end, tell)
        assert len(outcome.skipped) == left_out
    _, _, data = run(tmp_path, "--quick", "--section", "model")
    assert [r["provider"] for r in data["sections"][0]["results"]] == ["bitnet_triton_dynamic"]


def test_section_gets_no_more_time_than_its_most(monkeypatch):
    monkeypatch.setattr(plan.time, "monotonic", lambda: 0.0)
    clock = Clock(100.0, [dataclasses.replace(section([]), most_s=20.0), section([])])
    assert clock.next_deadline() == 20.0
    assert clock.next_deadline() == 100.0


def test_time_that_a_section_leaves_goes_to_those_after_it(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(plan.time, "monotonic", lambda: now[0])
    clock = Clock(100.0, [section([], weight=w) for w in (1, 1, 2)])
    assert clock.next_deadline() == 25.0
    now[0] = 10.0
    assert clock.next_deadline() == 10.0 + 90.0 / 3
    now[0] = 70.0
    assert clock.next_deadline() == 100.0


def test_error_outside_of_a_comparison_is_a_failure_with_its_name():
    def broken():
        raise RuntimeError("no kernel image\nand a long story")

    items = [Item("a", broken), Item("b", lambda: passed("b"))]
    outcome = run_section(section(items), Plan(Settings()), time.monotonic() + 9, tell)
    assert outcome.results[0] == {
        "name": "a", "status": "failed", "reason": "RuntimeError: no kernel image",
    }  # fmt: skip
    assert outcome.results[1]["status"] == "passed"


def test_after_an_illegal_access_the_rest_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(plan, "broken_device", lambda _, after: f"stopped in {after}")
    items = [Item(n, lambda n=n: passed(n)) for n in "abc"]
    outcome = run_section(section(items), Plan(Settings()), time.monotonic() + 9, tell)
    assert len(outcome.results) == 1
    assert {s["reason"] for s in outcome.skipped} == {"stopped in a"}


@needs_triton
@pytest.mark.slow
def test_several_processes_check_what_one_does_on_inputs_of_their_own(tmp_path):
    seed = ("--quick", "--section", "norms", "--section", "linears", "--seed", "5")
    code, output, data = run(tmp_path, *seed, "--jobs", "2")
    assert code == 0, output
    _, _, alone = run(tmp_path, *seed, "--jobs", "1")
    for section, expected in zip(data["sections"], alone["sections"], strict=True):
        assert [r["name"] for r in section["results"]] == [r["name"] for r in expected["results"]]
        assert section["skipped"] == expected["skipped"]
        assert {r["status"] for r in section["results"]} == {"passed"}


WORKER_ITEMS = """
import os
import torch
from bench.suite.plan import Item

def drawn():
    value = torch.rand(1).item()
    return [{"name": str(value), "status": "passed", "reason": "", "process": os.getpid()}]

def wrong():
    raise AssertionError("y: off by 3")

def draw(plan):
    return [Item(str(i), drawn) for i in range(6)] + [Item("wrong", wrong)]

def long():
    torch.rand(2**22).sort()  # a process takes its time to be gone
    return drawn()

def die(plan):
    return [Item("dies", lambda: os._exit(3))] + [Item(str(i), long) for i in range(29)]
"""


def checks_in_processes(name, tmp_path, monkeypatch, heard=tell):
    """Run a section of a module that processes can import, two items at a time."""
    (tmp_path / "worker_items.py").write_text(WORKER_ITEMS)
    monkeypatch.syspath_prepend(tmp_path)
    items = getattr(importlib.import_module("worker_items"), name)
    sections = [Section(n, "Some", "check", 1.0, 0.0, items) for n in ("first", "second")]
    target = tmp_path / "suite.json"
    return gpu_suite.run_suite(Plan(Settings(seed=4)), sections, 200.0, target, heard, jobs=2)


def test_processes_draw_by_the_place_of_an_item_and_tell_failures(tmp_path, monkeypatch):
    heard = []
    first, second = checks_in_processes("draw", tmp_path, monkeypatch, heard.append)
    expected = [torch.rand(1, generator=torch.Generator().manual_seed(4 + i)) for i in range(6)]
    assert [r["name"] for r in first.results[:6]] == [str(value.item()) for value in expected]
    used = {r["process"] for r in [*first.results[:6], *second.results[:6]]}
    assert len(used) <= 2
    assert os.getpid() not in used
    assert first.failed == [
        {"name": "wrong", "status": "failed", "reason": "AssertionError: y: off by 3"}
    ]
    assert "first: FAILED wrong: AssertionError: y: off by 3" in heard
    assert multiprocessing.active_children() == []


def test_after_a_process_died_the_rest_is_skipped_and_the_next_section_runs(tmp_path, monkeypatch):
    for outcome in checks_in_processes("die", tmp_path, monkeypatch):
        assert outcome.failed[0]["name"] == "dies"
        assert "BrokenProcessPool" in outcome.failed[0]["reason"]
        assert outcome.skipped
        assert all("a process ended in" in s["reason"] for s in outcome.skipped)
        assert len(outcome.results) + len(outcome.skipped) == 30


def test_killed_run_leaves_what_it_has(tmp_path):
    def killed():
        raise KeyboardInterrupt

    target = tmp_path / "suite.json"
    sections = [
        section([Item("a", passed)], "first"),
        section([Item("b", killed)], "second"),
    ]
    with pytest.raises(KeyboardInterrupt):
        gpu_suite.run_suite(Plan(Settings()), sections, 60.0, target, tell)
    assert [s["name"] for s in json.loads(target.read_text())["sections"]] == ["first"]


def test_after_a_device_stopped_the_other_sections_are_skipped_with_the_reason(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(gpu_suite, "broken_device", lambda _, after: f"stopped in {after}")
    sections = [section([Item(n, passed)], n) for n in ("first", "second", "third")]
    target = tmp_path / "suite.json"
    outcomes = gpu_suite.run_suite(Plan(Settings()), sections, 60.0, target, tell)
    assert [len(o.results) for o in outcomes] == [1, 0, 0]
    written = json.loads(target.read_text())["sections"]
    reasons = [s["reason"] for each in written for s in each["skipped"]]
    assert reasons == ["stopped in first"] * 2


def outcome_of(*ratios, status="timed", M=4096, provider=QUANTIZED):
    rows = []
    for ratio in ratios:
        row = Row(
            {"M": M, "K": 4096, "N": 14336}, provider, "bitnet_triton", status=status,
            seconds=spread([2e-3]), ratios={"bf16": spread([ratio])}, share_of_peak=0.75,
            bound="memory",
        )  # fmt: skip
        rows.append(row.to_dict() | {"name": "row", "flops": 1e12, "unit": "", "peer": False})
    return Outcome("prefill", "Prefill", "speed", rows)


@pytest.mark.parametrize(
    ("outcomes", "verdict", "worst"),
    [
        ([outcome_of(1.9, 1.4)], "met", 1.4),
        ([outcome_of(1.9, 1.39)], "missed", 1.39),
        ([outcome_of(2.0, M=1)], "not measured", None),
        ([], "not measured", None),
        ([outcome_of(2.0), outcome_of(2.0, status="failed")], "missed", 2.0),
    ],
)
def test_worst_row_decides_about_a_target(outcomes, verdict, worst):
    judged = TARGETS[0].judge(outcomes)
    assert (judged["verdict"], judged["value"]) == (verdict, worst)


def test_target_for_the_best_row_of_ours_needs_one_of_them():
    target = dataclasses.replace(TARGETS[0], provider=None)
    rows = [outcome_of(1.2), outcome_of(1.5, provider="bitnet_triton")]
    peer, broken = outcome_of(9.0, provider="bf16"), outcome_of(3.0, status="failed")
    judged = target.judge([*rows, peer, broken])
    assert (judged["verdict"], judged["value"]) == ("met", 1.5)
    assert target.judge([outcome_of(1.2)])["verdict"] == "missed"
    assert target.judge([peer])["verdict"] == "not measured"


def test_product_of_quantised_tokens_and_the_one_that_quantises_have_a_target_each():
    both = [outcome_of(1.6), outcome_of(1.3, provider="bitnet_triton")]
    judged = [target.judge(both) for target in TARGETS if target.section == "prefill"]
    assert [(j["value"], j["verdict"]) for j in judged] == [(1.6, "met"), (1.3, "missed")]
    few = [outcome_of(5.0, M=1), outcome_of(3.0, M=2), outcome_of(9.0, M=16)]
    for outcome in few:
        outcome.name = "gemv"
    judged = [target.judge(few) for target in TARGETS if target.section == "gemv"]
    ratios = [(j["value"], j["verdict"], j["points"]) for j in judged if j["unit"] == "x"]
    assert ratios == [(5.0, "met", 1), (3.0, "missed", 2)]


def test_rows_that_make_tokens_show_their_rate_and_the_highest_that_memory_allows():
    outcome = outcome_of(2.0)
    outcome.results[0] |= {"unit": "tokens", "units": 4}
    data = show.result(Plan(Settings()), "command", 540.0, [outcome])
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show.print_result(data, console)
    text = console.export_text()
    assert "tokens/s of at most" in text
    assert "2000 of 2667" in text  # 4 tokens in 2 ms, at 75 % of what is possible


def test_figures_of_the_targets_are_those_they_name():
    row = outcome_of(3.0).results[0]
    by_unit = {t.unit: t.figure(row) for t in TARGETS}
    assert by_unit == {"x": 3.0, "%": 75.0, "TFLOP/s": 500.0, "tokens/s": 500.0}
    assert TARGETS[2].figure(row | {"bound": "compute"}) is None
    assert ratio_to("flash")(row) is None


def test_targets_are_printed_with_their_verdicts(monkeypatch):
    data = show.result(Plan(Settings()), "command", 540.0, [outcome_of(1.2)])
    data["machine"]["gpu"] = "NVIDIA H100 80GB HBM3"
    data["targets"] = [target.judge([outcome_of(1.2)]) for target in TARGETS]
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show.print_result(data, console)
    text = console.export_text()
    assert "missed" in text
    assert text.count("not measured") == len(TARGETS) - 1
    assert "1.2 x" in text
    assert "(of 1 measured)" in text
    assert "the targets are for" not in text


def test_targets_point_at_sections_and_points_that_exist():
    settings = dataclasses.replace(Settings(), device=torch.device("cuda"))
    for target in TARGETS:
        assert isinstance(target, Target)
        (found,) = [s for s in SECTIONS if s.name == target.section]
        names = [item.name for item in found.items(Plan(settings))]
        points = [dict(pair.split("=") for pair in name.split()) for name in names]
        points = [{k: int(v) if v.isdigit() else v for k, v in p.items()} for p in points]
        assert any(target.matches(point) for point in points), target.title


def test_bad_arguments_end_with_one_line(capsys):
    for arguments in (["--section", "nothing"], ["--device", "abacus"], ["--no-such-option"]):
        with pytest.raises(SystemExit) as stop:
            gpu_suite.main(arguments)
        assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert "`section`: expected one of norms, linears" in errors
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
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "attention_backward" in run.stdout
