"""What modes bring along learns, layer by layer, to give what another attention gave there.

The first stage of a conversion to linear attention (arXiv:2402.04347, arXiv:2410.10254): a layer
is judged by its own output for the inputs that it has in the teacher, so that no layer has to wait
for those below it. The loss of the model follows in a second stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_triton.training.documents import Document
from bitnet_triton.training.packing import PackingCollator, pack_rows
from bitnet_triton.training.reach import begin_as

# Steps done, steps in all, loss
Progress = Callable[[int, int, float], None]
_FLOOR = 1e-12  # of the square of an output


def transfer(
    student: nn.Module,
    teacher: nn.Module,
    documents: Sequence[Document],
    *,
    row: int,
    rate: float,
    progress: Progress | None = None,
) -> list[float]:
    """Train what the modes of a model bring along, and nothing else, in place.

    The gated delta rule begins with what can be read off the teacher (``begin_as``).
    One step of AdamW a row, at a rate that falls by a cosine. The loss is the mean over layers of
    the squared error of the attention's output (behind its output projection), as a share of the
    spread of the teacher's over tokens: most of that output is the same everywhere.

    Args:
        student: ``BitNetForCausalLM``; its other weights are the teacher's.
        teacher: ``BitNetForCausalLM`` with the attention that is copied.
        documents: packed into rows.
        row: tokens of a row.
        rate: peak learning rate.
        progress: called after each step.

    Returns:
        The error of each step.

    Raises:
        ValueError: no mode of the student brings anything along.
    """
    parameters = [p for layer in _converted(student) for p in _brought(layer)]
    if not parameters:
        raise ValueError("`attention`: expected a mode with weights of its own to transfer to")
    rows = list(pack_rows(documents, row))
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(rows))
    collate = PackingCollator(tell_prompts=True)
    begin_as(student, teacher, _arguments(collate([rows[0]]), student))
    losses = []
    for step, documents_of_row in enumerate(rows):
        loss = layer_error(student, teacher, collate([documents_of_row]))
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if progress is not None:
            progress(step + 1, len(rows), losses[-1])
    return losses


def layer_error(student: nn.Module, teacher: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Return the mean over converted layers of |out - teacher's|^2 / |teacher's - its mean|^2.

    Args:
        student: each of its attention layers gets the teacher's inputs.
        teacher: of as many layers.
        batch: arguments of both models; labels are not looked at.
    """
    batch = _arguments(batch, student)
    with torch.no_grad(), ExitStack() as stack:
        seen = [stack.enter_context(_watched(layer)) for layer in _layers(teacher)]
        _decoder(teacher)(**batch, use_cache=False)
    errors = []
    with ExitStack() as stack:
        made = [
            stack.enter_context(_watched(layer, ins))
            for layer, (ins, _) in zip(_layers(student), seen)
        ]
        _decoder(student)(**batch, use_cache=False)
        for layer, (_, out), (_, wanted) in zip(_layers(student), made, seen):
            if any(True for _ in _brought(layer)):
                out, wanted = out.float(), wanted.float()
                spread = (wanted - wanted.mean(dim=(0, 1))).square().sum().clamp_min(_FLOOR)
                errors.append((out - wanted).square().sum() / spread)
    return torch.stack(errors).mean()


def _arguments(batch: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return a batch without its labels, where the model is."""
    device = next(model.parameters()).device
    return {
        k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"
    }


@contextmanager
def _watched(layer: nn.Module, instead: Tensor | None = None) -> Iterator[list[Tensor]]:
    """Give a list that holds input and output of an attention layer once it has run.

    Args:
        layer: takes and returns hidden states [B T K].
        instead: the layer gets these; None: its own.
    """
    found: list[Tensor] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        own = args[0] if args else kwargs["hidden_states"]
        given = own if instead is None else instead
        found[:] = [given]
        if args:
            return (given, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": given}

    def behind(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    hooks = (
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(behind),
    )
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _decoder(model: Any) -> nn.Module:
    return model.model


def _layers(model: nn.Module) -> list[Any]:
    return [layer.self_attn for layer in _decoder(model).layers]  # type: ignore[union-attr]


def _converted(model: nn.Module) -> list[Any]:
    return [layer for layer in _layers(model) if any(True for _ in _brought(layer))]


def _brought(layer: Any) -> Iterator[nn.Parameter]:
    """Yield the parameters that modes have brought to an attention layer."""
    for name in getattr(layer, "brought", ()):
        yield from getattr(layer, name).parameters()
