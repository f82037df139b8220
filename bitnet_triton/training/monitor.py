"""What ternary weights do while they are trained: their shares, how many flip, what rounding costs.

A loss curve does not tell a model whose codes have frozen from one whose codes never settle.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from bitnet_triton.kernels import quantize_weight
from bitnet_triton.nn import BitLinear


class TernaryMonitor(TrainerCallback):
    """Adds to each line of the log of ``Trainer``, and of ``state.log_history``.

    ``share_minus``, ``share_zero``, ``share_plus``: of all ternary codes. ``flips``: share of codes
    that the step before the line has changed, where ``logging_steps`` say that a line follows (not
    by ``logging_strategy="epoch"``). ``quantization_error``: norm of what rounding takes
    from the weights over the norm of the weights. ``tokens_per_second`` since the line before, if
    ``TrainingArguments.include_num_input_tokens_seen`` counts them. ``memory_gb``: the peak, of the
    accelerator where there is one, of the process otherwise.

    For one step before each line it keeps a byte for each ternary weight. Only masters that are
    trained are looked at: packed weights neither flip nor move. In sharded training all processes
    gather a layer at a time.

    ``Trainer`` calls those that report (wandb, TensorBoard) before the callbacks that it is given:
    ``TernaryMonitor().attach(trainer)`` instead of ``callbacks=`` lets them see these values too.
    """

    def __init__(self) -> None:
        self._codes: dict[str, Tensor] = {}
        self._found: dict[str, float] = {}
        self._since: tuple[float, int] | None = None

    def attach(self, trainer: Trainer) -> None:
        """Watch a trainer, ahead of all other callbacks: they find what is added to a line."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._since = time.perf_counter(), state.num_input_tokens_seen

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the codes, if a line follows this step."""
        if _is_logged(args, state, state.global_step + 1):
            layers = _trained_layers(kwargs["model"])
            self._codes = {name: quantize_weight(_whole(layer))[0] for name, layer in layers}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the weights after the step."""
        if self._codes:
            self._found = _describe(kwargs["model"], self._codes)
            self._codes = {}

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add to a line about training; those about evaluation stay as they are."""
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs:
            return
        found = self._found
        if not found and _trained_layers(kwargs["model"]):
            found = _describe(kwargs["model"])
        more = {**found, **self._speed(state), "memory_gb": _peak_memory() / 1e9}
        logs.update(more)
        if state.log_history:
            state.log_history[-1].update(more)
        self._found = {}

    def _speed(self, state: Any) -> dict[str, float]:
        now, seen = time.perf_counter(), state.num_input_tokens_seen
        since, self._since = self._since, (now, seen)
        if since is None or seen == since[1]:
            return {}
        return {"tokens_per_second": (seen - since[1]) / (now - since[0])}


def _is_logged(args: Any, state: Any, step: int) -> bool:
    every = state.logging_steps or args.logging_steps
    return bool(every) and (step % every == 0 or (step == 1 and args.logging_first_step))


def _trained_layers(model: nn.Module) -> list[tuple[str, BitLinear]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BitLinear)
        and module.levels == "ternary"
        and module.weight.requires_grad
    ]


def _whole(layer: BitLinear) -> Tensor:
    weight: Any = layer.weight.detach()
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def _describe(model: nn.Module, before: dict[str, Tensor] | None = None) -> dict[str, float]:
    """Look at all codes, and at how many are others than before."""
    counts = torch.zeros(4, dtype=torch.float64)  # of -1, 0, 1, and of flips
    lost, norm = 0.0, 0.0
    for name, layer in _trained_layers(model):
        weight = _whole(layer).float()
        codes, scale = quantize_weight(weight)
        old = codes if before is None else before[name]
        found = [(codes == code).sum() for code in (-1, 0, 1)] + [(codes != old).sum()]
        counts += torch.stack(found).cpu()
        lost += (weight - codes * scale).square().sum().item()
        norm += weight.square().sum().item()
    shares = (counts / counts[:3].sum()).tolist()
    names = ("share_minus", "share_zero", "share_plus", "flips")[: 4 if before else 3]
    return {**dict(zip(names, shares)), "quantization_error": (lost / norm) ** 0.5}


def _peak_memory() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not there on Windows, where torch has a GPU or no Triton

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
