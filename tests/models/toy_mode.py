"""A mode from outside, whole: each head takes a learned share of the mean of all values so far."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from bitnet_triton.attention import Mode, check_served
from bitnet_triton.cache import Memory
from bitnet_triton.runtime import launch


@triton.jit
def _step(x_ptr, w_ptr, v_ptr, sums_ptr, places_ptr, out_ptr, B, room, K, H: tl.constexpr,
          Hk: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    b, h, d, k = tl.program_id(0), tl.program_id(1), tl.arange(0, D), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + b * K + k, mask=k < K, other=0.0).to(tl.float32)
    gate = tl.sigmoid(tl.sum(x * tl.load(w_ptr + h * K + k, mask=k < K, other=0.0)))
    kv, held, count = h // (H // Hk), tl.load(places_ptr + b), tl.load(places_ptr + B + b)
    at = sums_ptr + ((b * Hk + kv) * room + held) * D + d
    total = tl.load(at) + tl.load(v_ptr + (b * (H + 2 * Hk) + H + Hk + kv) * D + d)
    tl.store(at + D, total)
    tl.store(out_ptr + (b * H + h) * D + d, total / count * gate)


class RunningSums(Memory):  # of the values of the first n tokens, for each n: [B Hk n D]
    sums, leftpad = None, None

    def begin(self, call):
        self.leftpad = call.leftpad

    def update(self, keys, values, *args, **kwargs):
        if self.leftpad is not None:
            column = self.tokens + torch.arange(values.shape[2])
            values = values * (column >= self.leftpad[:, None])[:, None, :, None]
        n, end = self.tokens, self.tokens + values.shape[2]
        self.sums = self.sums if n else values[:, :, :1] * 0
        self.reserve(end - n)
        new = self.sums[:, :, n : n + 1] + values.cumsum(2)
        self.sums = self.sums.clone() if new.requires_grad else self.sums
        self.sums[:, :, n + 1 : end + 1], self.tokens = new, end
        return keys, values

    def can_take_back(self, n):
        return True

    def reorder_cache(self, rows):
        self.sums = self.sums[rows]

    def is_ready(self, B, dtype, device):
        return self.tokens > 0 and self.sums.shape[0] == B

    def reserve(self, new):
        if self.sums.shape[2] <= self.tokens + new:
            self.sums = torch.nn.functional.pad(self.sums, (0, 0, 0, self.tokens + new + 16))

    def address(self):
        return (self.sums,)

    def places(self, call):
        held = torch.full((self.sums.shape[0],), self.tokens)
        return torch.stack([held, held + 1 - (0 if call.leftpad is None else call.leftpad)]).int()


@dataclass(frozen=True)
class Toy(Mode):
    reads_hidden_states = True

    def memory(self, other):
        if other != self:
            raise ValueError(f"`attention`: 'toy' remembers sums alone, {other.name!r} needs keys")
        return RunningSums()

    def module(self, config):
        return torch.nn.Linear(config.hidden_size, config.num_attention_heads, bias=False)

    def __call__(self, q, k, v, context):
        check_served(self, context)
        memory, T, left = context.memory or RunningSums(), q.shape[1], context.tokens.leftpad
        if context.tokens.cu_seqlens is not None:
            raise ValueError("`position_ids`: attention 'toy' takes no packed sequences")
        if not memory.tokens:  # a call without a cache
            memory.leftpad = left
            memory.update(k.transpose(1, 2), v.transpose(1, 2))
        count = memory.tokens - T + 1 + torch.arange(T) - (0 if left is None else left[:, None])
        mean = memory.sums[:, :, : memory.tokens + 1][:, :, -T:]
        mean = mean / count.clamp_min(1).view(-1, 1, T, 1)
        mean = mean.repeat_interleave(q.shape[2] // k.shape[2], 1).transpose(1, 2)
        return mean * context.module(context.hidden_states).sigmoid()[..., None]

    def step(self, memory, layer):
        def run(step):
            (B, _, _, D), K = step.heads.shape, step.hidden_states.shape[-1]
            out = step.heads.new_empty(B, 1, layer.heads, D)
            launch(_step, (B, layer.heads))(
                step.hidden_states, layer.module.weight, step.heads, memory.sums, step.places,
                out, B, memory.sums.shape[2], K, H=layer.heads, Hk=layer.kv_heads, D=D,
                BLOCK=triton.next_power_of_2(K))  # fmt: skip
            return out

        return run
