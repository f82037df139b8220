import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bench.__main__ import app
from bench.case import Settings
from bench.cases import small_batches, ternary_linear
from bench.machine import command_line, copies_beyond_cache, last_level_cache_bytes
from bench.measure import Row, spread
from bench.memory import peak_extra_bytes
from bench.peaks import Peaks, measure_peaks
from bench.plot import draw
from bench.report import duration, read_json, result, size, times, write_json
from bench.table import print_table

ROUNDS = {"bitnet_triton": [1e-3, 2e-3, 1e-3], "torch_bf16": [4e-3, 8e-3, 4e-3]}


def rows():
    point = {"M": 1, "cache": "cold", "K": 2560, "N": 6912}
    timed = [
        Row(
            point, name, name, rounds=rounds, seconds=spread(rounds), first_call_s=1.5,
            peak_extra_bytes=3_000_000, error=1e-3, share_of_peak=0.5, bound="memory",
            ratios={"torch_bf16": {"median": 4.0, "p20": 3.9, "p80": 4.1}},
        )
        for name, rounds in ROUNDS.items()
    ]  # fmt: skip
    refused = Row(point, "torch_fp32", "F.linear fp32", status="failed", reason="error too large")
    missing = Row(point, "transformers", "BitLinear", status="missing", reason="not installed")
    return [*timed, refused, missing]


@pytest.fixture
def data():
    peaks = Peaks(2e10, "torch.sum of float32", {"bf16": 3e11})
    return result(ternary_linear.case(), rows(), [Settings()], {1: peaks}, (0.1, 0.2))


def test_json_round_trip(data, tmp_path):
    write_json(data, tmp_path / "new" / "r.json")
    assert read_json(tmp_path / "new" / "r.json") == data


def test_json_names_no_host_and_no_folder(data):
    text = json.dumps(data)
    hostname = Path("/proc/sys/kernel/hostname")
    if hostname.exists():
        assert hostname.read_text().strip() not in json.dumps(data["machine"])
    assert str(Path.cwd()) not in text
    assert str(Path.home()) + "/" not in text


def test_json_says_what_the_figures_depend_on(data):
    assert data["machine"]["cpu"]
    assert data["software"]["versions"]["torch"] == torch.__version__
    assert data["settings"]["threads"] == [1]
    assert data["command"].startswith("python -m bench")
    assert data["software"]["backends"]["reference"] == "available"


def test_command_is_told_without_folders(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/a/bench/__main__.py", "model", "--output", "/b/r.json"])
    assert command_line() == "python -m bench model --output r.json"
    monkeypatch.setattr(sys, "argv", ["/a/bin/bitnet-triton", "bench", "model"])
    assert command_line() == "bitnet-triton bench model"


def test_foreign_json_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"rows": []}')
    (tmp_path / "b.json").write_text("{")
    for name in ("a.json", "b.json"):
        with pytest.raises(ValueError, match=name):
            read_json(tmp_path / name)


def test_table_shows_speed_ratio_and_reasons(data):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_table(data, console)
    text = console.export_text()
    for wanted in ("1 ms", "4.00 (3.90-4.10)", "error too large", "not installed", "20.0 GB/s"):
        assert wanted in text


def test_plot_is_drawn_from_the_json_alone(data, tmp_path):
    pytest.importorskip("matplotlib")
    write_json(data, tmp_path / "r.json")
    outcome = CliRunner().invoke(app, ["plot", str(tmp_path / "r.json")])
    assert outcome.exit_code == 0, outcome.output
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_the_footer_of_a_plot_with_one_panel_is_not_cut(data, tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    agg = pytest.importorskip("matplotlib.backends.backend_agg")
    drawn, save = [], figures.Figure.savefig
    monkeypatch.setattr(
        figures.Figure, "savefig", lambda self, to: drawn.append(save(self, to) or self)
    )
    draw(data, tmp_path / "r.png")
    (figure,) = drawn
    (footer,) = (text for text in figure.texts if "measured reads" in text.get_text())
    ends = footer.get_window_extent(agg.FigureCanvasAgg(figure).get_renderer())
    assert 0 <= ends.x0 < ends.x1 <= figure.bbox.x1
    assert 0 <= ends.y0 < ends.y1 <= figure.bbox.y1


def test_curve_says_where_it_rises_and_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    case, rows = small_batches.case(), []
    for M, call_s in ((1, 1.0), (2, 1.5), (4, 6.0), (8, 8.0)):  # of a token: 1, 0.75, 1.5, 1
        point = {"M": M, "cache": "hot", "K": 64, "N": 32}
        for name, seconds in (("bitnet_triton", call_s), ("torch_bf16", 1.0)):
            spreads = spread([seconds] * 3)
            rows.append(
                Row(point, name, name, seconds=spreads, units=M, first_call_s=1.0, error=0.0)
            )
    peaks = Peaks(2e10, "torch.sum of float32", {})
    data = result(case, rows, [Settings()], {1: peaks}, (0.1, 0.2))
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_table(data, console)
    text = console.export_text()
    assert (
        "bitnet_triton, cache=hot K=64 N=32: the time of one of the tokens rises at M=4 (+100%)\n"
        in text
    )
    assert "torch_bf16, cache=hot K=64 N=32: the time of one of the tokens falls all along" in text
    draw(data, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_digits_of_a_ratio():
    assert [times(r) for r in (0.0123, 0.5, 1.234, 12.34, 123.4)] == [
        "0.012", "0.50", "1.23", "12.3", "123",
    ]  # fmt: skip


def test_peak_memory_counts_what_lives_at_once():
    x = torch.zeros(1000)

    def call():
        doubled = x * 2
        tripled = doubled + x
        del doubled
        return tripled * 2  # two results of 4000 bytes at a time

    assert 8000 <= peak_extra_bytes(call, x.device) < 8100


def test_numbers_have_units():
    assert [duration(s) for s in (2.5, 0.0123, 4.56e-6)] == ["2.5 s", "12.3 ms", "4.56 us"]
    assert [size(b) for b in (None, 1500, 2e6, 3e9)] == ["", "1.5 kB", "2 MB", "3 GB"]


def test_copies_exceed_the_cache():
    cache = last_level_cache_bytes() or 1
    held = 1_000_000
    assert copies_beyond_cache(held, torch.device("cpu")) * held >= 4 * cache
    assert copies_beyond_cache(2**40, torch.device("cpu")) == 2


def test_peaks_are_positive_and_named():
    peaks = measure_peaks(Settings(), buffer_bytes=2**22, size=64)
    assert peaks.read_bytes_per_s > 0
    assert peaks.read_by.startswith("torch.")
    assert set(peaks.flops_per_s) >= {"fp32"}


def test_module_runs_as_a_command():
    checkout = Path(__file__).parents[2]
    outcome = subprocess.run(
        [sys.executable, "-m", "bench", "--list"],
        cwd=checkout, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for wanted in ("ternary_linear", "bit_linear", "model", "bitnet.cpp"):
        assert wanted in outcome.stdout
