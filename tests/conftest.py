"""Fresh inputs in every run, uninitialised memory that shows, and the devices and backends here."""

from __future__ import annotations

import os
import random
import zlib

# cuBLAS reads it when it starts; without it, deterministic algorithms raise on a GPU
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from torch import Tensor, nn

from bitnet_triton import use_backend
from bitnet_triton.nn import BitLinear, PackedBitLinear
from bitnet_triton.runtime import BACKENDS, backend_objection
from bitnet_triton.runtime.select import ENVIRONMENT_VARIABLE, forget_logged_choices

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

# How far activations have to stay from rounding ties, in codes. Rounding in float32 was seen to
# part two right programs by 1.2e-4: codes up to 127 in steps of 8e-6, through two layers
MARGIN = 1e-3


def pytest_addoption(parser):
    parser.addoption(
        "--seed", type=int, default=None, help="repeat a run; its seed is in its header"
    )
    parser.addoption(
        "--peer-all", action="store_true", help="run all of transformers' own tests (tests/peer)"
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


def distances_from_ties(models, ids: Tensor, **kwargs) -> Tensor:
    """Return how far the worst activation of each token [B T] stays from a tie, in codes."""
    from transformers.integrations.bitnet import AutoBitLinear
    from transformers.integrations.bitnet import BitLinear as HfBitLinear

    found = [torch.full(ids.shape, 0.5)]

    def look(module, args):
        x = args[0] if module.rms_norm is None else module.rms_norm(args[0])
        codes = x * (127 / x.abs().amax(-1, keepdim=True).clamp_min(1e-5))
        found.append((codes - codes.floor() - 0.5).abs().amin(-1).detach())

    kinds = (HfBitLinear, AutoBitLinear, BitLinear, PackedBitLinear)
    for model in models:
        linears = [module for module in model.modules() if isinstance(module, kinds)]
        # a kind that nobody looks at would let every sequence pass
        assert linears or getattr(model.config, "quantization_config", None) is None
        # fused layers that have hooks run module by module: the same but for rounding
        hooks = [module.register_forward_pre_hook(look) for module in linears]
        # transformers decorates its BitNet layers with torch.compile
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), use_backend("reference"):
            if hooks:
                model(ids, use_cache=False, **kwargs)
        for hook in hooks:
            hook.remove()
    return torch.stack(found).amin(0)


@pytest.fixture
def steady_ids():
    """Fresh sequences [B T] whose activations stay far from rounding ties in all given models.

    Two right programs that differ in the last bit may round an activation near a tie to different
    codes, and the logits then differ a thousand times more than the bit. Among thousands of
    activations one is always near a tie, so sequences grow token by token: of many tokens one is
    taken whose own activations stay away. What comes later changes nothing at earlier places.
    Further arguments go to the models, with one row for all sequences.
    """

    def draw(*models: nn.Module, B: int = 8, T: int = 5, tries: int = 64, **kwargs) -> Tensor:
        size = models[0].config.vocab_size
        rows = torch.arange(B)
        for _ in range(9):
            ids = torch.randint(3, size, (B, T))
            for t in range(T):
                tried = ids.repeat_interleave(tries, 0)
                tried[:, t] = torch.randint(3, size, (B * tries,))
                distances = distances_from_ties(models, tried, **kwargs)[:, t].view(B, tries)
                is_far = (distances >= MARGIN).float()
                ids = tried.view(B, tries, T)[rows, is_far.argmax(1)]
            if distances_from_ties(models, ids, **kwargs).min() >= MARGIN:
                return ids
        raise AssertionError("no sequence keeps its activations from ties")

    return draw
