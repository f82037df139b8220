"""Tuning: candidates, who wins, what is refused, and the command from end to end on a CPU."""

import json

import pytest
import torch
from typer.testing import CliRunner

from bench import tune as tuning
from bench.__main__ import app
from bench.case import Settings
from bench.tune import Job, choices, jobs, neighbours, tune
from bitnet_triton import use_backend
from bitnet_triton.runtime import autotune, backend_objection, measured
from bitnet_triton.runtime.launch import record_launches

CPU = torch.device("cpu")
KERNEL = "ternary_linear_fwd"
SETTINGS = Settings(rounds=3, block_s=0.002, budget_s=0.02, pause_s=0.0)
needs_triton = pytest.mark.skipif(
    backend_objection("triton", CPU) is not None, reason="Triton cannot run here"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measured.measured_tiles.cache_clear()
    yield measured.cache_file()
    measured.measured_tiles.cache_clear()


@pytest.fixture
def one_class(monkeypatch):
    """A kernel with one class, which has two tiles that halve and double."""
    monkeypatch.setitem(autotune.CPU, KERNEL, {1: {"BLOCK_M": 4, "BLOCK_R": 8}})


def fake_job(seconds, value=lambda tiles: 1.0):
    """Return a job whose call takes ``seconds(tiles)`` on a clock that ``fake_times`` reads."""

    def call():
        tiles = autotune.tiles(KERNEL, 1, CPU)
        if seconds(tiles) is None:
            raise RuntimeError("out of resource: shared memory\nand more")
        return torch.full((4,), value(tiles))

    return Job(KERNEL, 1, [call])


@pytest.fixture
def clock(monkeypatch):
    def install(seconds):
        def times(candidates, run, settings):
            return [[seconds(tiles)] * 3 for tiles in candidates]

        monkeypatch.setattr(tuning, "_times", times)

    return install


def test_neighbours_halve_and_double_one_size_and_stay_in_bounds():
    tiles = {"BLOCK_M": 16, "IN_PLACE": True, "num_warps": 16, "num_stages": 1}
    found = list(neighbours(tiles, torch.device("cuda")))
    assert found == [
        {**tiles, "BLOCK_M": 32}, {**tiles, "num_warps": 8}, {**tiles, "num_stages": 2},
    ]  # fmt: skip
    assert {t["BLOCK_M"] for t in neighbours({"BLOCK_M": 16}, CPU)} == {8, 32}
    # Triton refuses tiles of more than 2^20 values
    largest = {"BLOCK_R": 64, "BLOCK_K": 16384}
    found = [{**largest, "BLOCK_R": 32}, {**largest, "BLOCK_K": 8192}]
    assert list(neighbours(largest, CPU)) == found


@needs_triton
def test_climbs_over_several_steps_to_the_fastest(one_class, clock):
    def seconds(t):
        return 1.0 + abs(t["BLOCK_M"] - 16) + abs(t["BLOCK_R"] - 4)

    clock(seconds)
    outcome = tune(fake_job(seconds), SETTINGS)
    assert outcome.best == {"BLOCK_M": 16, "BLOCK_R": 4}
    assert outcome.shipped == {"BLOCK_M": 4, "BLOCK_R": 8}
    assert outcome.gain["median"] == seconds(outcome.shipped)
    assert autotune.tiles(KERNEL, 1, CPU) == outcome.shipped


@needs_triton
def test_gain_within_the_noise_leaves_the_shipped_tiles(one_class, clock):
    def seconds(t):
        return 1.0 if t["BLOCK_M"] == 4 else 0.98

    clock(seconds)
    outcome = tune(fake_job(seconds), SETTINGS)
    assert outcome.best == outcome.shipped
    assert choices([outcome], CPU) == []


@needs_triton
def test_wrong_and_failing_candidates_are_refused_with_the_reason(one_class, clock):
    def seconds(t):
        return None if t["BLOCK_R"] > 8 else 1.0 / t["BLOCK_M"]

    clock(seconds)
    job = fake_job(seconds, lambda t: 1.0 if t["BLOCK_M"] <= 4 else 1.5)
    outcome = tune(job, SETTINGS)
    assert outcome.best == outcome.shipped
    reasons = {r["reason"] for r in outcome.refused}
    assert reasons == {"relative error 0.5", "out of resource: shared memory"}


@needs_triton
def test_tuning_ends_with_what_was_in_use_before_even_if_it_fails(one_class):
    before = {"BLOCK_M": 2, "BLOCK_R": 2}
    measured.write_choices(measured.cache_file(), [measured.make_choice(KERNEL, 1, CPU, before)])
    with pytest.raises(RuntimeError):
        tune(fake_job(lambda _: None), SETTINGS)
    assert autotune.tiles(KERNEL, 1, CPU) == before


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="`kernel`: expected one of ternary_linear_fwd"):
        list(jobs("nothing", "tiny", SETTINGS))
    with pytest.raises(ValueError, match="`model`: expected one of 2b4t"):
        list(jobs(KERNEL, "nothing", SETTINGS))


def test_kernels_of_gpus_only_have_no_class_on_a_cpu():
    assert list(jobs("ternary_linear_fwd_few", "tiny", SETTINGS)) == []


@needs_triton
@pytest.mark.parametrize("kernel", ["int8_linear_fwd", "flash_attention_fwd"])
def test_calls_of_a_job_run_the_kernel_in_the_tiles_of_its_class(kernel, monkeypatch):
    monkeypatch.setattr(tuning, "_LARGEST_TOKENS", 64)
    size, make = next(iter(jobs(kernel, "tiny", SETTINGS)))
    tiles = dict(autotune.size_classes(kernel, CPU)[size])
    wanted = {**tiles, "BLOCK_N": tiles["BLOCK_N"] // 2}
    measured.measured_tiles("cpu")[kernel, size] = wanted
    (call,) = make().calls
    with use_backend("triton"), record_launches() as launches:
        call()
    (found,) = [launch for launch in launches if kernel in launch.kernel.__name__]
    assert {name: found.options[name] for name in wanted} == wanted


@needs_triton
def test_command_measures_writes_and_keeps(tmp_path, cache):
    target = tmp_path / "tune.json"
    arguments = [
        "tune", "--kernel", KERNEL, "--model", "tiny", "--size", "1", "--quick", "--device", "cpu",
        "--threads", "1", "--budget", "0.01", "--output", str(target),
    ]  # fmt: skip
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    (found,) = json.loads(target.read_text())["outcomes"]
    assert (found["kernel"], found["size"]) == (KERNEL, 1)
    assert found["tried"] >= 4
    assert found["refused"] == []
    assert found["kept"] == (found["best"] != found["shipped"]) == cache.exists()
    measured.measured_tiles.cache_clear()
    assert autotune.tiles(KERNEL, 1, CPU) == found["best"]


@needs_triton
def test_dry_run_keeps_nothing(clock, monkeypatch, tmp_path, cache):
    monkeypatch.setitem(autotune.CPU, KERNEL, {1: {"BLOCK_M": 1, "BLOCK_R": 16, "BLOCK_K": 64}})
    monkeypatch.setattr(tuning, "_STEPS", 1)
    clock(lambda t: 1.0 / t["BLOCK_M"])
    target = tmp_path / "tune.json"
    arguments = ["tune", "--kernel", KERNEL, "--model", "tiny", "--dry-run", "--quick"]
    outcome = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--output", str(target)])
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(target.read_text())["outcomes"][0]["kept"]
    assert not cache.exists()
