"""Fresh inputs in every run, uninitialised memory that shows, and the devices and backends here."""

from __future__ import annotations

import os
import random
import zlib

# cuBLAS reads it when it starts; without it, deterministic algorithms raise on a GPU
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from bitnet_triton.runtime import BACKENDS, backend_objection
from bitnet_triton.runtime.select import ENVIRONMENT_VARIABLE, forget_logged_choices

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pytest_addoption(parser):
    parser.addoption(
        "--seed", type=int, default=None, help="repeat a run; its seed is in its header"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if hasattr(config, "workerinput"):  # a worker of xdist: the seed of its controller
        config.option.seed = config.workerinput["seed"]
    elif config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**31)
    if getattr(config.option, "hypothesis_seed", "") is None:
        config.option.hypothesis_seed = config.option.seed
    # an output element that nobody writes is NaN, not yesterday's right answer
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Hand the seed to a worker of xdist."""
    node.workerinput["seed"] = node.config.option.seed


def pytest_report_header(config):
    return f"seed: {config.option.seed} (repeat with --seed {config.option.seed})"


def pytest_generate_tests(metafunc):
    """Run a test on every device, and with ``backend`` on every pair that can run here."""
    if "backend" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("backends")
        pairs = [
            (device, backend)
            for device in DEVICES
            for backend in (marker.args if marker else BACKENDS)
            if backend_objection(backend, torch.device(device)) is None
        ]
        metafunc.parametrize(("device", "backend"), pairs, ids=["-".join(p) for p in pairs])
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def _fresh_state(request, monkeypatch):
    """Seed every test by its name, so that it can be repeated alone; force no backend."""
    name = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(request.config.option.seed + name)
    random.seed(request.config.option.seed + name)
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    forget_logged_choices()
