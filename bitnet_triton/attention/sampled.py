"""Modes that read a sample of the keys for each generated token; prompts read everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.masked import attend_and_tell, check_served
from bitnet_triton.attention.mode import Mode, Reads, Step, StepLayer, StepTensors
from bitnet_triton.attention.tokens import CAUSAL
from bitnet_triton.cache import Memory

# Attends with one query of each row, [B 1 H D], to the first rows of each: int32 [B]
Attend = Callable[[Tensor, Tensor], Tensor]


class SamplingMode(Mode):
    """A mode whose generated tokens read a sample, one after the other; not for training.

    Subclasses are frozen dataclasses of their settings, with ``attend`` and ``sampled_step``.
    """

    wants_prompt_len: ClassVar[bool] = True
    trains: ClassVar[str] = "nothing"

    def attend(self, k: Tensor, v: Tensor, prompt: int, context: AttentionContext) -> Attend | None:
        """Return what attends to k [B Tk Hk D] and v; None: everything is read all the same.

        Args:
            k: keys of all tokens, generated ones of the call among them.
            v: values.
            prompt: how many of them belong to the prompt.
            context: of the call.
        """
        raise NotImplementedError

    def count(
        self, q: Tensor, k: Tensor, v: Tensor, prompt: int, context: AttentionContext
    ) -> Reads | None:
        """Count what a generated query q [B 1 H D] reads; None: everything."""
        raise NotImplementedError

    def reads(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Reads:
        """Count the sample of the last query, and what it takes to find it."""
        tokens = int(context.tokens.offset) + q.shape[1]
        prompt = self._prompt_len(q.shape[1], context)
        found = None
        if prompt and prompt < tokens:
            found = self.count(q[:, -1:], k[:, :tokens], v[:, :tokens], prompt, context)
        left = context.tokens.leftpad
        seen = tokens - (0 if left is None else left.float().mean().item())
        return Reads(seen, seen) if found is None else found

    def sampled_step(self, memory: Memory, layer: StepLayer) -> Step | None:
        """Return one decode step as launches; None where it reads everything."""
        raise NotImplementedError

    def check_other(self, other: Mode) -> None:
        """Raise unless a memory that keeps everything serves the mode of the other phase."""
        if other.brings_memory and other.kept is None and other != self:
            raise ValueError(f"`attention`: no memory serves {self.name!r} and {other.name!r}")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Map q [B Tq H D] and k, v [B Tk Hk D] to [B Tq H D]."""
        check_served(self, context)
        Tq, offset = q.shape[1], int(context.tokens.offset)
        prompt = self._prompt_len(Tq, context)
        first = Tq if prompt is None else min(max(prompt - offset, 0), Tq)
        if first == Tq or not prompt:
            return attend_and_tell(q, k, v, CAUSAL, context)
        self._check(q, k, v, context)
        k, v = k[:, : offset + Tq], v[:, : offset + Tq]
        attend = self.attend(k, v, prompt, context)
        if attend is None:
            return attend_and_tell(q, k, v, CAUSAL, context)
        # queries of the prompt stand before all others: they see everything up to themselves
        outs = [attend_and_tell(q, k, v, CAUSAL, context)[:, :first]] if first else []
        for t in range(first, Tq):
            used = torch.full((q.shape[0],), offset + t + 1, dtype=torch.int32, device=k.device)
            outs.append(attend(q[:, t : t + 1], used))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

    def step(self, memory: Memory, layer: StepLayer) -> Step | str:
        """Write the new token into the memory, and read a sample; all, while the prompt lasts."""
        objection = memory.decode_objection(CAUSAL)
        if objection is not None:
            return objection
        sampled = self.sampled_step(memory, layer)
        if sampled is not None:
            return sampled

        def run(step: StepTensors) -> Tensor:
            q = memory.write(step.heads, step.cos, step.sin, step.places)
            return memory.decode(q, step.places, mask=CAUSAL, scale=layer.scale)[0]

        return run

    def _prompt_len(self, Tq: int, context: AttentionContext) -> int | None:
        """Return how many columns stand before the first generated one of all rows."""
        length = context.prompt_len
        if length is None or context.tokens.cu_seqlens is not None:
            if length is not None:
                raise ValueError(f"`prompt_len`: attention {self.name!r} takes no packed sequences")
            return None
        if isinstance(length, int):
            return length
        if not length.numel():
            return None
        least, most = (int(n) for n in length.aminmax())
        offset = int(context.tokens.offset)
        if least != most and least < offset + Tq and offset < most:
            raise ValueError(
                f"`prompt_len`: attention {self.name!r} takes prompts that end together in a call "
                f"that goes beyond one of them, got {least} up to {most}"
            )
        return most

    def _check(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> None:
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise ValueError(
                f"`attention`: {self.name!r} samples, which has no gradient; train with 'full'"
            )
        if context.softcap is not None or context.s_aux is not None:
            raise ValueError(f"`attention`: {self.name!r} goes without `softcap` and `s_aux`")
