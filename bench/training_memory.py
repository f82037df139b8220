"""What a training step takes of the memory, by part: weights, gradients, optimizer, activations.

Activations are what a step has at its peak beyond the rest, with gradients of a step before. Models
of one and of two layers are measured, and every further layer counts as the second: few machines
could hold thirty with masters. That is exact for what is held. Of activations it is a lower bound
where the peak of a small model is behind its layers, at the gradient of a trained embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from transformers import PreTrainedModel

from bench.case import PeerMissingError, Settings
from bench.memory import peak_extra_bytes
from bench.models import RandomModels, Shape, state_bytes
from bench.peers import PEFT

PARTS = ("weights", "gradients", "optimizer", "activations")
LABELS = {
    "lora_packed": "LoRA beside packed weights",
    "lora_packed_loss": "the same, a loss without logits",
    "lora_autobitlinear": "LoRA beside hf autobitlinear",
    "full": "all of the model, masters in float32",
    "full_loss": "the same, a loss without logits",
}
_LOSS_ALONE = "_loss"  # ends the names of steps with `skip_logits`
_MEASURED = (1, 2)  # layers


def _with_adapters(model: PreTrainedModel) -> nn.Module:
    PEFT.need()
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))


def _models(models: RandomModels) -> dict[str, Callable[[], nn.Module]]:
    return {
        "lora_packed": lambda: _with_adapters(models.get("fused")),
        "lora_autobitlinear": lambda: _with_adapters(models.get("autobitlinear")),
        "full": lambda: models.get("masters").requires_grad_(),
    }


def measure(
    shape: Shape, names: Sequence[str], tokens: int, device: torch.device, checkpointing: bool
) -> list[dict[str, Any]]:
    """Return for each provider the bytes of each part, of a model of ``shape.layers`` layers.

    Args:
        shape: of the model.
        names: of the providers.
        tokens: of the one text of a step.
        device: where the step runs.
        checkpointing: each layer keeps its input alone, and runs again in the backward.
    """
    rows: list[dict[str, Any]] = []
    for name in names:
        row: dict[str, Any] = {"provider": name, "label": LABELS[name], "status": "measured"}
        try:
            few, more = [
                _step(replace(shape, layers=layers), name, tokens, device, checkpointing)
                for layers in _MEASURED
            ]
        except PeerMissingError as missing:
            rows.append(row | {"status": "missing", "reason": str(missing)})
            continue
        layer = {part: more[part] - few[part] for part in PARTS}
        row["layer_bytes"] = layer
        row["bytes"] = {part: few[part] + (shape.layers - 1) * layer[part] for part in PARTS}
        row["total_bytes"] = sum(row["bytes"].values())
        rows.append(row)
    return rows


def _step(
    shape: Shape, name: str, tokens: int, device: torch.device, checkpointing: bool
) -> dict[str, int]:
    models = RandomModels(shape, Settings(device=device))
    model = _models(models)[name.removesuffix(_LOSS_ALONE)]().train()
    more = {"skip_logits": True} if name.endswith(_LOSS_ALONE) else {}
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(shape.vocab, (1, tokens), device=device)

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            model(input_ids=ids, labels=ids, use_cache=False, **more).loss.backward()

    trained = [p for p in model.parameters() if p.requires_grad]
    # transformers decorates its BitNet layers with torch.compile
    with torch.compiler.set_stance("force_eager"):
        run()  # compiles, and makes the gradients: the step that is measured adds to them
        peak = peak_extra_bytes(run, device)
    gradients = sum(p.grad.nbytes for p in trained)
    optimizer = AdamW(trained, lr=0.0)
    optimizer.step()
    held = [v for state in optimizer.state.values() for v in state.values()]
    return {
        "weights": state_bytes(model),
        "gradients": gradients,
        "optimizer": sum(v.nbytes for v in held if isinstance(v, torch.Tensor)),
        "activations": peak,
    }
