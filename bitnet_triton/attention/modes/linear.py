"""Linear attention: a state of constant size instead of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from bitnet_triton.attention.checks import check_known, check_number
from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.linear_parts import (
    FEATURE_MAPS,
    GatedParts,
    PlainParts,
    constant_log_decay,
    unit,
)
from bitnet_triton.attention.masked import check_served
from bitnet_triton.attention.mode import Mode, Reads, Step, StepLayer, StepTensors
from bitnet_triton.cache import LastCall, Memory, StateLayer, latest
from bitnet_triton.cache.states import IS_TOKEN, POSITION, TURN
from bitnet_triton.kernels import linear_attention

GATED = ("gated_delta", "kda")
FORMS = (*GATED, "plain")
DECAYS = ("none", "retnet")


class _Written(NamedTuple):
    """What a call hands to the op."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    beta: Tensor | None = None


@dataclass(frozen=True)
class Linear(Mode):
    """Attention by a state that every token changes; what a token costs grows with nothing.

    Attributes:
        form: "gated_delta", the gated delta rule (arXiv:2412.06464) in the form of Qwen3-Next's
            layers: queries and keys of length 1, without rotary embedding, behind a short
            convolution; a gated norm behind it. "kda": the same with a decay of every channel
            (arXiv:2510.26692). "plain": sums of features of rotated keys (arXiv:2006.16236),
            normalised, and no further parameters.
        convolution: tokens that it sums, the gated forms alone; 1: there is none.
        feature_map: of the plain form: "elu" (elu(x) + 1), "relu", "performer"
            (arXiv:2009.14794), or "hedgehog" (arXiv:2402.04347), which is learned.
        decay: of the plain form: "none", or "retnet" (arXiv:2307.08621), constant by head.
    """

    form: str = "gated_delta"
    convolution: int = 4
    feature_map: str = "elu"
    decay: str = "none"

    def __post_init__(self) -> None:
        check_known("'form'", self.form, FORMS)
        check_known("'feature_map'", self.feature_map, FEATURE_MAPS)
        check_known("'decay'", self.decay, DECAYS)
        check_number("convolution", self.convolution, 1)
        others = ("feature_map", "decay") if self.is_gated else ("convolution",)
        for name in others:
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default:
                raise ValueError(
                    f"`attention`: {name!r}: form {self.form!r} of mode {self.name!r} has none, "
                    f"expected {default!r} (it is left out), got {getattr(self, name)!r}"
                )

    @property
    def is_gated(self) -> bool:
        """Whether the form is one of the delta rule."""
        return self.form in GATED

    @property
    def reads_hidden_states(self) -> bool:
        """Gates read them."""
        return self.is_gated

    @property
    def reads_keys(self) -> bool:
        """A state has none."""
        return False

    @property
    def takes_rotated(self) -> bool:
        """The delta rule finds a key where it stands; its decay tells how long ago."""
        return not self.is_gated

    def module(self, config: Any) -> nn.Module:
        """Return gates and convolution, or feature maps."""
        if self.is_gated:
            return GatedParts(config, self.form == "kda", self.convolution)
        return PlainParts(config, self.feature_map)

    def memory(self, other: Mode) -> Memory:
        """Return an empty state."""
        if other != self:
            raise ValueError(
                f"`attention`: {self.name!r} keeps a state and no keys: expected it in both phases "
                f"of a layer with the same settings, got {other!r} in the other one"
            )
        return StateLayer()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Map q [B T H D] and k, v [B T Hk D] to [B T H D]."""
        self._check(context)
        memory = context.memory
        inputs, gate, starts = None, None, context.tokens.cu_seqlens
        if self.is_gated:
            written, inputs, gate = self._gated(q, k, v, context)
        else:
            written = self._plain(q, k, v, context)
        if starts is not None:
            flat: list[Any] = [None if t is None else t.flatten(0, 1) for t in written]
            written = _Written(*flat)
        state = None if memory is None else memory.state
        normalize = not self.is_gated
        settings: Any = {"log_decay": written.log_decay, "beta": written.beta}
        out, new = linear_attention(
            *written[:3], **settings, normalize=normalize, initial_state=state, return_state=True,
            scale=1.0 if normalize else context.scale, cu_seqlens=starts,
        )  # fmt: skip
        if memory is not None:
            last = LastCall(
                *written[1:], normalize=normalize, state=state, inputs=inputs,
                used=context.tokens.used_q,
            )  # fmt: skip
            memory.keep(new, self._tail(inputs, q.shape[1], context), last)
        out = out.view(*q.shape[:3], out.shape[-1])
        if gate is not None:
            out = cast("GatedParts", context.module).norm(out, gate)
        return out

    def reads(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Reads:
        """Count the rows of the state."""
        rows = context.memory.state.shape[2] if context.memory is not None else q.shape[-1]
        return Reads(rows, rows)

    def step(self, memory: Memory, layer: StepLayer) -> Step | str:
        """Take the new token into the state, by launches that a recording replays."""
        if not isinstance(memory, StateLayer) or memory.state is None:
            return "its cache has no state"
        make = self._gated_step if self.is_gated else self._plain_step
        return make(memory, layer)

    def _gated_step(self, memory: StateLayer, layer: StepLayer) -> Step:
        # Triton is imported on first use
        from bitnet_triton.kernels.linear_attention.step import GatedStep, launch_gated_step

        module = cast("GatedParts", layer.module)
        gates, convolution = module.gates, module.convolution
        parts = GatedStep(
            inputs=gates.inputs.detach(),
            decay_out=None if gates.decay_out is None else gates.decay_out.detach(),
            gate_out=gates.gate_out.detach(),
            gate_bias=gates.gate_bias.detach(),
            log_rate=gates.log_rate.detach(),
            decay_bias=gates.decay_bias.detach(),
            convolution=None if convolution is None else convolution.weight.detach(),
            norm=module.norm.weight.detach(),
        )

        def run(step: StepTensors) -> Tensor:
            assert step.hidden_states is not None
            assert memory.states is not None
            return launch_gated_step(
                step.heads, step.hidden_states, parts, kv_heads=layer.kv_heads,
                scale=layer.scale, states=memory.states, tails=memory.tails,
                turn=step.places[TURN], is_token=step.places[IS_TOKEN],
            )  # fmt: skip

        return run

    def _plain_step(self, memory: StateLayer, layer: StepLayer) -> Step:
        from bitnet_triton.kernels.linear_attention.plain_step import PlainStep, launch_plain_step

        module, rates = cast("PlainParts", layer.module), None
        assert memory.state is not None
        if self.decay == "retnet":
            rates = constant_log_decay(layer.kv_heads, memory.state.device)
        parts = PlainStep(self.feature_map, *module.matrices(), rates)

        def run(step: StepTensors) -> Tensor:
            assert memory.states is not None
            return launch_plain_step(
                step.heads, parts, kv_heads=layer.kv_heads, cos=step.cos, sin=step.sin,
                states=memory.states, turn=step.places[TURN], is_token=step.places[IS_TOKEN],
                positions=step.places[POSITION],
            )  # fmt: skip

        return run

    def _gated(
        self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext
    ) -> tuple[_Written, Tensor | None, Tensor]:
        """Return what is written, the inputs [B R + T C] of the convolution, and the gate."""
        parts = cast("GatedParts", context.module)
        is_token = self._is_token(q, context)
        beta, log_decay, gate = parts.gates(context.hidden_states)
        inputs = None
        if parts.convolution is not None:
            inputs = torch.cat([t.flatten(2) for t in (q, k, v)], dim=-1)
            if is_token is not None:
                inputs = inputs * is_token[..., None]
            inputs = self._behind_former(inputs, context)
            mixed = parts.convolution(inputs, self._first(q, context))
            heads = [t.shape[2] for t in (q, k, v)]
            q, k, v = mixed.unflatten(-1, (-1, q.shape[-1])).split(heads, dim=2)
        q, k = unit(q), unit(k)
        if is_token is not None:  # padding leaves the state as it is
            k = k * is_token[..., None, None]
            beta = beta * is_token[..., None]
            log_decay = log_decay * is_token[(..., *[None] * (log_decay.ndim - 2))]
        return _Written(q, k, v, log_decay, beta), inputs, gate

    def _plain(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> _Written:
        q, k = cast("PlainParts", context.module)(q, k)
        is_token = self._is_token(q, context)
        log_decay = None
        if self.decay == "retnet":
            log_decay = constant_log_decay(k.shape[2], k.device).expand(k.shape[:3])
        if is_token is not None:
            k = k * is_token[..., None, None]
            log_decay = None if log_decay is None else log_decay * is_token[..., None]
        return _Written(q, k, v, log_decay)

    def _behind_former(self, inputs: Tensor, context: AttentionContext) -> Tensor:
        """Return inputs [B T C] of the convolution behind those that came before the call."""
        B, _, C = inputs.shape
        tail = None if context.memory is None else context.memory.tail
        if tail is None:
            tail = inputs.new_zeros(B, self.convolution - 1, C)
        return torch.cat([tail, inputs], dim=1)

    def _tail(self, inputs: Tensor | None, T: int, context: AttentionContext) -> Tensor | None:
        """Return the latest inputs [B R C] that are no padding."""
        if inputs is None:
            return None
        return latest(inputs, inputs.shape[1] - T, T, context.tokens.used_q)

    def _is_token(self, q: Tensor, context: AttentionContext) -> Tensor | None:
        """Return bool [B T], which tokens are no padding; None: all."""
        tokens = context.tokens
        left, used = tokens.leftpad, tokens.used_q
        column = torch.arange(q.shape[1], device=q.device)
        is_token = None
        if left is not None:
            is_token = column + tokens.offset >= left[:, None]
        if used is not None:
            before = column < used[:, None]
            is_token = before if is_token is None else is_token & before
        return is_token

    def _first(self, q: Tensor, context: AttentionContext) -> Tensor | None:
        """Return int64 [T], where the packed sequence of each token begins."""
        starts = context.tokens.cu_seqlens
        if starts is None:
            return None
        token = torch.arange(q.shape[0] * q.shape[1], device=q.device)
        return starts[torch.bucketize(token, starts[1:], right=True)].long()

    def _check(self, context: AttentionContext) -> None:
        check_served(self, context)
        if context.softcap is not None or context.s_aux is not None:
            raise ValueError(f"`attention`: {self.name!r} has no bounded scores and no sinks")
        if context.module is None:
            raise ValueError(f"`attention`: {self.name!r} needs a layer that holds its parameters")
        if context.is_cached and not isinstance(context.memory, StateLayer):
            raise ValueError(
                f"`past_key_values`: attention {self.name!r} takes no other cache than the one "
                "that the model makes, whose size does not change"
            )
        if context.tokens.cu_seqlens is not None and context.is_cached:
            raise ValueError("`position_ids`: packed sequences go without a cache")
