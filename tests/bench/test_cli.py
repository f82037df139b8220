"""bitnet-triton bench forwards to the benchmarks of this checkout and to nothing else."""

import sys
import types
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bitnet_triton.cli import bench as command


@pytest.fixture
def app():
    app = typer.Typer()
    app.command(context_settings=command.CONTEXT_SETTINGS)(command.bench)
    return app


def test_help_and_options_reach_the_benchmarks(app):
    outcome = CliRunner().invoke(app, ["--list"])
    assert outcome.exit_code == 0, outcome.output
    outcome = CliRunner().invoke(app, ["ternary_linear", "--help"])
    assert outcome.exit_code == 0
    assert "bitnet-triton bench ternary_linear" in outcome.output


def test_exit_code_is_passed_on(app):
    assert CliRunner().invoke(app, ["ternary_linear", "--only", "Q=1"]).exit_code == 1
    assert CliRunner().invoke(app, ["no_such_case"]).exit_code == 2


def test_installed_package_says_where_the_benchmarks_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="benchmarks come with the source checkout"):
        command.load_benchmarks(tmp_path)


def test_unrelated_bench_beside_an_installed_package_is_not_run(tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").write_text("raise SystemExit('must not run')")
    with pytest.raises(FileNotFoundError, match="source checkout"):
        command.load_benchmarks(tmp_path)


def test_unrelated_bench_that_is_imported_is_not_run(monkeypatch):
    stranger = types.ModuleType("bench")
    stranger.__file__ = "elsewhere/bench.py"
    monkeypatch.setitem(sys.modules, "bench", stranger)
    with pytest.raises(RuntimeError, match="another module called `bench`"):
        command.load_benchmarks(Path(__file__).parents[2])


def test_checkout_wins_over_an_unrelated_bench_on_the_path(tmp_path, monkeypatch):
    (tmp_path / "bench.py").write_text("raise SystemExit('must not run')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n == "bench" or n.startswith("bench.")]:
        monkeypatch.delitem(sys.modules, name)
    checkout = Path(__file__).parents[2]
    module = command.load_benchmarks(checkout)
    assert Path(module.__file__) == checkout / "bench" / "__init__.py"
    monkeypatch.delitem(sys.modules, "bench")
