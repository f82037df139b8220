import pytest
import torch
from typer.testing import CliRunner

from bench.__main__ import app
from bench.case import Settings
from bench.cases import make_case
from bench.grid import parse_pairs, points_of_shapes, steps
from bench.peaks import measure_limits
from bench.report import read_json


def shapes(*texts):
    return points_of_shapes(make_case("ternary_linear"), [parse_pairs("shape", t) for t in texts])


def test_shapes_take_the_place_of_the_grid():
    assert shapes("M=7,K=64,N=96,cache=hot", "K=128") == [
        {"M": 7, "cache": "hot", "K": 64, "N": 96},
        {"M": 1, "cache": "cold", "K": 128, "N": 2560},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("M", r"`shape`: expected KEY=VALUE\[,KEY=VALUE\], got 'M'"),
        ("M=1,M=2", "`shape`: M stands twice in 'M=1,M=2'"),
        ("m=1", "ternary_linear has the keys M, cache, K, N; got 'm'"),
        ("M=0", "`shape`: expected a positive number for M, got '0'"),
        ("M=1.5", "`shape`: expected a positive number for M, got '1.5'"),
        ("cache=warm", "`shape`: expected cache to be cold or hot, got 'warm'"),
    ],
)
def test_wrong_shape_is_refused_by_name(text, message):
    with pytest.raises(ValueError, match=message):
        shapes(text)


def test_command_measures_the_shapes_that_it_is_given(tmp_path, monkeypatch):
    limits = measure_limits(Settings(), buffer_bytes=2**22, size=64)
    monkeypatch.setattr("bench.run.measure_limits", lambda settings: limits)
    target = tmp_path / "r.json"
    arguments = ["ternary_linear", "--shape", "M=1,K=64,N=32,cache=hot", "--threads", "1"]
    arguments += ["--dtype", "bf16", "--dtype", "fp32", "--provider", "torch_bf16"]
    outcome = CliRunner().invoke(app, [*arguments, "--quick", "--output", str(target)])
    assert outcome.exit_code == 0, outcome.output
    points = [row["point"] for row in read_json(target)["rows"]]
    shape = {"M": 1, "cache": "hot", "K": 64, "N": 32}
    assert points == [{**shape, "dtype": "bf16"}, {**shape, "dtype": "fp32"}]
    outcome = CliRunner().invoke(app, ["ternary_linear", "--shape", "Q=1"])
    assert str(outcome.exception).startswith("`shape`: ternary_linear has the keys M, cache, K, N")


def test_points_name_only_what_the_run_has_several_of():
    points = [{"M": 1}, {"M": 2}]
    (one, _) = steps(points, Settings(), ["fp16"], [3])
    assert one.shown == {"M": 1}
    assert (one.settings.dtype, one.settings.threads) == (torch.float16, 3)
    several = steps(points, Settings(), ["bf16", "fp32"], [1, 2])
    assert [step.shown["M"] for step in several] == [1, 2] * 4
    assert {(step.shown["dtype"], step.shown["threads"]) for step in several} == {
        ("bf16", 1), ("bf16", 2), ("fp32", 1), ("fp32", 2),
    }  # fmt: skip
    assert all(step.shown["threads"] == step.settings.threads for step in several)


@pytest.mark.parametrize(
    "option",
    [["--dtype", "int4"], ["--threads", "-1"], ["--device", "tpu"], ["--only", "M"]],
    ids=" ".join,
)
def test_option_that_cannot_be_is_refused(option):
    assert CliRunner().invoke(app, ["ternary_linear", *option]).exit_code == 2
