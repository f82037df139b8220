import dataclasses
import json
import re
import runpy
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.case import Settings
from bench.cases import make_case, triton_cpu
from bench.measure import measure_point
from bitnet_triton import triton_cpu as backend

ROOT = Path(__file__).parents[2]
SETTINGS = Settings(rounds=3, block_s=1e-3, budget_s=0.1)
OBJECTION = backend.objection()
# Every kernel once; the case has more points, which take longer to compile
POINTS = [
    ("attention_causal", "bf16"),
    ("attention_full", "fp32"),
    ("linear", "int8"),
    ("matmul", "fp32"),
    ("softmax", "fp32"),
    ("launch", "fp32"),
]

compiles = pytest.mark.skipif(OBJECTION is not None, reason=str(OBJECTION))


def tiny(op, dtype):
    case = make_case("triton_cpu", shape="tiny")
    (point,) = case.select_points({"op": [op], "dtype": [dtype]})
    return case, point


def measure(case, point):
    rows = measure_point(case, point, case.providers, SETTINGS)
    return {row.provider: row for row in rows}


@compiles
@pytest.mark.parametrize(("op", "dtype"), POINTS)
def test_kernel_and_torch_agree_with_float64(op, dtype):
    rows = measure(*tiny(op, dtype))
    assert [(row.status, row.reason) for row in rows.values()] == [("timed", "")] * 2
    assert max(row.error for row in rows.values()) <= triton_cpu.TOLERANCE[dtype]
    assert rows["triton_cpu"].ratios["torch"]["median"] > 0


@pytest.mark.parametrize(("op", "of_floats"), [("linear", "linear"), ("matmul", "mm")])
def test_products_are_compared_with_the_function_for_their_dtype_and_order(op, of_floats):
    names = {}
    for dtype in triton_cpu.DTYPES:
        case, point = tiny(op, dtype)
        work = case.providers["torch"].build(case.inputs(**point, settings=SETTINGS))
        names[dtype] = work.details["function"]
    assert names == {"fp32": of_floats, "bf16": of_floats, "int8": "_int_mm"}


def test_error_that_only_bf16_may_make_is_refused_in_fp32(monkeypatch):
    def off(x, y):
        return lambda: (x + y) * 1.001

    add = dataclasses.replace(triton_cpu.OPS["add"], ours=lambda kernels, x, y: off(x, y))
    monkeypatch.setitem(triton_cpu.OPS, "add", add)
    monkeypatch.setattr(backend, "objection", lambda: None)
    row = measure(*tiny("add", "fp32"))["triton_cpu"]
    assert row.status == "failed"
    assert row.reason == "ValueError: relative error 0.001 exceeds 2e-06"


def test_missing_compiler_is_listed_with_the_reason(monkeypatch):
    monkeypatch.setattr(backend, "objection", lambda: "no C++ compiler")
    rows = measure(*tiny("add", "fp32"))
    assert (rows["triton_cpu"].status, rows["triton_cpu"].reason) == ("missing", "no C++ compiler")
    assert rows["torch"].status == "timed"


@compiles
def test_interpreter_runs_the_same_kernel_on_the_same_inputs():
    case = make_case("triton_cpu", shape="tiny", interpreter=True)
    (point,) = case.select_points({"op": ["linear"]})
    rows = measure(case, point)
    assert [(row.provider, row.status, row.reason) for row in rows.values()] == [
        (name, "timed", "") for name in ("triton_cpu", "torch", "interpreter")
    ]
    assert rows["triton_cpu"].ratios["interpreter"]["median"] > 1


def test_interpreter_has_a_result_file_of_its_own():
    assert make_case("triton_cpu").name == "triton_cpu"
    case = make_case("triton_cpu", interpreter=True)
    assert case.name == "triton_cpu_interpreter"
    assert {point["dtype"] for point in case.grid} == {"fp32"}


def test_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="`shape`: expected one of full, tiny, got '2b4t'"):
        make_case("triton_cpu", shape="2b4t")


@compiles
def test_command_writes_json_and_plot(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("bench.run.measure_limits", small_limits)
    target = tmp_path / "triton_cpu.json"
    arguments = ["triton_cpu", "--shape", "tiny", "--quick", "--threads", "1"]
    arguments += ["--only", "op=softmax,launch", "--output", str(target)]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    data = json.loads(target.read_text())
    assert {row["point"]["op"] for row in data["rows"]} == {"softmax", "launch"}
    assert {row["status"] for row in data["rows"]} == {"timed"}, outcome.output
    assert {row["share_of_peak"] for row in data["rows"]} == {None}
    assert target.with_suffix(".png").stat().st_size > 10_000


def small_limits(settings):
    from bench.peaks import measure_limits

    return measure_limits(settings, buffer_bytes=2**22, size=64)


@compiles
def test_kernel_in_the_readme_runs(tmp_path, capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```py\n(.*?)```", readme, flags=re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(example, encoding="utf-8")
    runpy.run_path(str(script))
    assert capsys.readouterr().out == "True\n"


def test_ternary_linear_says_which_backend_ran():
    case = make_case("ternary_linear")
    inputs = case.inputs(M=2, K=64, N=32, settings=SETTINGS)
    chosen = case.providers["bitnet_triton"]
    expected = f"{'triton' if OBJECTION is None else 'compile'} on cpu"
    assert chosen.build(inputs).details["backend"] == expected
    assert chosen.note.startswith(f"backend: {expected}")
    forced = case.providers["reference"].build(inputs)
    assert forced.details["backend"] == "reference on cpu"


def test_ternary_linear_measures_few_rows():
    rows = {point["M"] for point in make_case("ternary_linear").grid}
    assert rows == {1, 2, 4, 8, 16, 32, 512}
