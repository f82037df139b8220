"""Decode steps whose kernels overlap, and that they compute what they do one after the other."""

from __future__ import annotations

import contextlib
import gc
import weakref
from dataclasses import replace

import pytest
import torch

from bench.case import Settings
from bench.cases import decode_steps
from bench.models import SHAPES, RandomModels
from bitnet_triton.models.fused.recording import Recording
from bitnet_triton.runtime import backend_objection
from bitnet_triton.runtime.overlap import in_order

needs_triton = pytest.mark.skipif(
    backend_objection("triton", torch.device("cpu")) is not None, reason="Triton cannot run here"
)


def inputs_on(device, B, steps):
    """Return a model of full width on a GPU, where launches of tiny ones would hardly overlap."""
    wide = device == "cuda"
    shape = replace(SHAPES["2b4t"], layers=6, vocab=1024) if wide else SHAPES["tiny"]
    settings = Settings(device=torch.device(device), seed=torch.initial_seed() % 2**31)
    ids = torch.randint(2, shape.vocab, (B, 64 + steps), device=device)
    return decode_steps.Inputs(RandomModels(shape, settings), ids[:, :64], ids[:, 64:])


@pytest.fixture
def written_by_nobody_else():
    """Nothing may stand between two kernels that overlap, as what fills new memory would."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before


@needs_triton
@pytest.mark.parametrize("B", [1, 4])
def test_kernels_that_overlap_give_the_bits_of_those_in_order(B, device, written_by_nobody_else):
    """A kernel that does not wait for its inputs gives other values, in one step or another."""
    inputs = inputs_on(device, B, steps=48 if device == "cuda" else 4)
    expected, _ = inputs.decode(in_order)
    for _ in range(3 if device == "cuda" else 1):
        hidden, _ = inputs.decode(contextlib.nullcontext)
        assert torch.equal(hidden, expected)


@needs_triton
def test_nothing_is_written_between_kernels_that_overlap(monkeypatch, written_by_nobody_else):
    filled = []

    def record(self, *args, record=Recording._record):
        with torch.profiler.profile() as profile:
            hidden = record(self, *args)
        filled.extend(e.key for e in profile.key_averages() if "fill" in e.key)
        return hidden

    monkeypatch.setattr(Recording, "_record", record)
    inputs_on("cpu", 1, steps=4).decode(contextlib.nullcontext)
    assert filled == []


@needs_triton
def test_a_recorded_step_is_timed_on_memory_that_is_still_there():
    inputs = inputs_on("cpu", 1, steps=4)
    build = decode_steps._recorded(contextlib.nullcontext)
    work = build(inputs)
    kept = weakref.ref(inputs.models.get("fused").model.decode_steps.recording)
    build(inputs)
    gc.collect()
    assert kept() is not None
    work.call()
    del work
    gc.collect()
    assert kept() is None
