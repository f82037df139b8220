"""Fresh inputs in every run, uninitialised memory that shows, and the devices and backends here."""

from __future__ import annotations

import collections
import itertools
import json
import os
import random
import time
import zlib
from pathlib import Path

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
SLOWEST_FILES = 12

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
    parser.addoption(
        "--only-on", choices=("cpu", "cuda"), help="the tests of kernels, compiled for this device"
    )
    parser.addoption(
        "--until", type=float, default=None, help="skip what has not begun by then (Unix time)"
    )
    parser.addoption("--every", action="store_true", help="whole grids, in place of all pairs")
    parser.addoption("--results", type=Path, default=None, help="write a JSON line for each test")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if hasattr(config, "workerinput"):  # a worker of xdist: the seed of its controller
        config.option.seed = config.workerinput["seed"]
    elif config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**31)
    if getattr(config.option, "hypothesis_seed", "") is None:
        config.option.hypothesis_seed = config.option.seed
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Results(config.option.results))
    # an output element that nobody writes is NaN, not yesterday's right answer
    # (a GPU has no such algorithm for some of what references do)
    torch.use_deterministic_algorithms(True, warn_only=config.option.only_on == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Hand the seed to a worker of xdist."""
    node.workerinput["seed"] = node.config.option.seed


def pytest_report_header(config):
    return f"seed: {config.option.seed} (repeat with --seed {config.option.seed})"


def pytest_generate_tests(metafunc):
    """Run a test on every device, and with ``backend`` on every pair that can run here."""
    only = metafunc.config.option.only_on
    devices = [only] if only else DEVICES
    if "backend" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("backends")
        backends = marker.args if marker else BACKENDS
        if only and "triton" in backends:
            backends = ["triton"]
        pairs = [
            (device, backend)
            for device in devices
            for backend in backends
            if backend_objection(backend, torch.device(device)) is None
        ]
        metafunc.parametrize(("device", "backend"), pairs, ids=["-".join(p) for p in pairs])
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    """Choose among what ``-k`` and the like have left."""
    result = yield
    if config.option.only_on:
        items[:] = in_turns(config, [i for i in items if is_on(i, config.option.only_on)])
    if not config.option.every:
        kept = set(pairwise(items, config.option.seed))
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
    # what takes long first: at the end no process waits for another
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    return result


def parameters(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


def is_on(item, device):
    on_gpu = device == "cuda" and item.get_closest_marker("gpu")
    return parameters(item).get("device") == device or bool(on_gpu)


def in_turns(config, items):
    """Return items so that files take turns: time that ends too early ends for none first."""
    items = list(items)
    random.Random(config.option.seed).shuffle(items)
    places, seen = {}, collections.Counter()
    for item in items:
        places[item] = seen[item.path]
        seen[item.path] += 1
    return sorted(items, key=places.__getitem__)


def pairwise(items, seed):
    """Return items; of each grid that is marked so few that all pairs of values still meet.

    Which ones is drawn anew in every run: the seed is in its header.
    """
    grids = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("pairwise") and len(parameters(item)) > 2:
            grids[item.nodeid.split("[")[0]].append(item)
        else:
            yield item
    for name, grid in grids.items():
        random.Random(seed + zlib.crc32(name.encode())).shuffle(grid)
        pairs = {item: set(pairs_of(parameters(item))) for item in grid}
        left = set().union(*pairs.values())
        while left:
            item = max(grid, key=lambda item: len(pairs[item] & left))
            left -= pairs[item]
            yield item


def pairs_of(params):
    return itertools.combinations(sorted((name, str(value)) for name, value in params.items()), 2)


def pytest_runtest_setup(item):
    until = item.config.option.until
    if until is not None and time.time() > until:
        pytest.skip("no time left")


class Results:
    """Where the time of a run went, and its results for another program.

    Args:
        path: gets a JSON line for each test; None: nothing is written.
    """

    def __init__(self, path):
        self.path, self.seconds = path, collections.Counter()

    def pytest_runtest_logreport(self, report):
        self.seconds[report.location[0]] += report.duration
        if self.path is None or (report.when != "call" and report.passed):
            return
        reason = ""
        if report.skipped:
            reason = report.longrepr[2]
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message if crash else str(report.longrepr)
        line = {"name": report.nodeid, "outcome": report.outcome, "reason": reason}
        with self.path.open("a") as file:
            file.write(json.dumps(line | {"seconds": report.duration}) + "\n")

    def pytest_terminal_summary(self, terminalreporter):
        slowest = self.seconds.most_common(SLOWEST_FILES)
        terminalreporter.write_sep("-", f"slowest files, of {self.seconds.total():.0f} s in tests")
        for file, seconds in slowest:
            terminalreporter.write_line(f"{seconds:6.1f} s  {file}")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid):
    """Give up a process whose GPU has stopped answering: xdist goes on in another one."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            os.write(2, f"{nodeid}: the device stopped working: {error}\n".encode())
            os._exit(1)


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
