"""A decode step inside of buckets: its token hashed and near ones found, or all keys hashed anew.

Both give what the latest token of a text reads in mode ``reformer``, with the settings that are its
defaults. Steps stand at places of the text that lie far apart, one after the other, so that each
reads rows that the one before did not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from bench.case import Case, Provider, Settings, Work
from bitnet_triton.kernels import hash_buckets
from bitnet_triton.kernels.lsh_attention.arguments import Directions
from bitnet_triton.kernels.lsh_attention.buckets import rotation_rows
from bitnet_triton.kernels.lsh_attention.step import BUCKET_STEP
from bitnet_triton.runtime import capture

_STEPS = 16
_WINDOW = 64
_HASH: dict[str, Any] = {"rounds": 4, "buckets": 32, "seed": 0}


@dataclass(frozen=True, eq=False)
class Inputs:
    """One point: qk, v [1 T H D] as a cache holds them, and after how many tokens steps stand."""

    qk: Tensor
    v: Tensor
    lengths: list[int]

    @property
    def scale(self) -> float:
        """What multiplies the scores."""
        return self.qk.shape[-1] ** -0.5


def make_inputs(T: int, H: int, D: int, settings: Settings) -> Inputs:
    """Draw keys and values."""
    qk, v = (
        torch.randn(1, H, T, D, generator=settings.generator, device=settings.device)
        .to(settings.dtype)
        .transpose(1, 2)
        for _ in range(2)
    )
    return Inputs(qk, v, [T - i * T // (2 * _STEPS) for i in range(_STEPS)])


def _anew(inputs: Inputs, length: int) -> Tensor:
    qk, v = inputs.qk[:, :length], inputs.v[:, :length]
    numbers = hash_buckets(qk, **_HASH).permute(0, 2, 3, 1)
    return BUCKET_STEP["reference"].run(qk, v, numbers, _WINDOW, inputs.scale, None)


def _outputs(inputs: Inputs) -> Tensor:
    return torch.cat([_anew(inputs, length) for length in inputs.lengths])


def _hashed_anew(inputs: Inputs) -> Work:
    turns = cycle(inputs.lengths)
    return Work(
        call=lambda: _anew(inputs, next(turns)), output=lambda: _outputs(inputs), compiles=False,
        read_bytes=inputs.qk.nbytes + inputs.v.nbytes,
    )  # fmt: skip


def _recorded(inputs: Inputs) -> Work:
    from bitnet_triton.kernels.lsh_attention.decode import launch_bucket_step, launch_hash_step

    qk, v, device = inputs.qk, inputs.v, inputs.qk.device
    rounds, buckets = _HASH["rounds"], _HASH["buckets"]
    rows = rotation_rows(qk.shape[-1], rounds, buckets, _HASH["seed"], device)
    directions = Directions(rows, (buckets // 2,), is_signed=True)
    numbers = hash_buckets(qk, **_HASH).permute(0, 2, 3, 1).contiguous()

    def record(length: int) -> tuple[Callable[[], None], Tensor]:
        used = torch.full((1,), length, dtype=torch.int32, device=device)
        slots = used - 1

        def step() -> Tensor:
            launch_hash_step(qk, directions, numbers, slots)
            return launch_bucket_step(qk, v, numbers, window=_WINDOW, scale=inputs.scale, used=used)

        step()  # compiled and loaded
        with capture(device) as graph:
            out = step()
        return graph.replay, out

    with torch.no_grad(), torch.inference_mode(False):
        steps = [record(length) for length in inputs.lengths]
    turns = cycle(replay for replay, _ in steps)

    def output() -> Tensor:
        for replay, _ in steps:
            replay()
        return torch.cat([out for _, out in steps])

    rows_read = rounds * _WINDOW * qk.shape[2] * (qk.shape[3] + v.shape[3]) * qk.element_size()
    return Work(call=lambda: next(turns)(), output=output, read_bytes=rows_read)


def _flops(T: int, H: int, D: int) -> float:
    """Count those of a step that hashes its own token: products with rows and with rotations."""
    return H * D * (4.0 * _HASH["rounds"] * _WINDOW + _HASH["rounds"] * _HASH["buckets"])


def case() -> Case:
    """Return the case."""
    return Case(
        name="bucket_steps",
        title="Decoding inside of buckets",
        grid=[{"T": T, "H": 8, "D": 128} for T in (2048, 8192, 32768)],
        inputs=make_inputs,
        reference=_outputs,
        providers={
            "recorded": Provider("recorded step, buckets kept", _recorded, 8e-3),
            "hashed_anew": Provider(
                "all keys hashed anew, in PyTorch", _hashed_anew, 8e-3,
                note="what a step was before caches kept buckets",
            ),
        },
        baselines=("hashed_anew",),
        flops=_flops,
        panels=(("H", "D"), ()),
        curve="T",
    )  # fmt: skip
