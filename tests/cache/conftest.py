"""Texts that are read through a memory, beside dense attention over the rows it should keep."""

from __future__ import annotations

import pytest
import torch

import bitnet_triton as bt
from bitnet_triton.attention import AttentionContext
from bitnet_triton.attention.context import LayerInputs
from bitnet_triton.attention.modes.full import Full
from bitnet_triton.attention.tokens import Tokens
from bitnet_triton.cache import Call, begin_call, parse_memory
from bitnet_triton.testing import assert_close

H, HK, D = 4, 2, 16
FREQUENCIES = 1 / 1000.0 ** (torch.arange(0, D, 2) / D)


def rotate(x, positions):
    """Turn x [B T H D] to positions [B T]."""
    angle = (positions[..., None] * FREQUENCIES.to(x.dtype))[:, :, None]
    first, second = x.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Text:
    """Queries, keys and values of a batch, and what a memory has been told of them.

    ``kept`` says by row and head which columns a memory should hold; ``follow`` is the policy, in
    plain words: it gets the probabilities of a call [Tq, columns], in float64, and says what stays.
    """

    def __init__(self, memory, policy, T=120, lefts=(0, 0), prompt=None):
        self.memory, self.policy, self.prompt = memory, policy, prompt
        self.lefts, B = lefts, len(lefts)
        self.plain, k = (torch.randn(B, T, heads, D) for heads in (H, HK))
        # keys that differ in length: scores that are far from equal
        k = k * torch.rand(B, T, HK, 1) * 3
        self.v = torch.randn(B, T, HK, D)
        self.positions = (torch.arange(T) - torch.tensor(lefts)[:, None]).clamp_min(0)
        self.q, self.k = rotate(self.plain, self.positions), rotate(k, self.positions)
        self.columns = 0
        self.kept = [[[] for _ in range(HK)] for _ in lefts]
        self.widest = 0

    def read(self, T):
        """Let the memory and the policy read T tokens; check outputs and what is held."""
        memory, start, end = self.memory, self.columns, self.columns + T
        left = torch.tensor(self.lefts).int() if any(self.lefts) else None
        begin_call([memory], Call(start, left, frequencies=FREQUENCIES, prompt_len=self.prompt))
        q, k, v = (t[:, start:end].clone() for t in (self.q, self.k, self.v))
        angle = self.positions[:, start:end, None] * FREQUENCIES.repeat(2)
        context = AttentionContext(
            layer=0, scale=D**-0.5, tokens=Tokens(offset=start, leftpad=left),
            inputs=LayerInputs(None, (angle.cos(), angle.sin()), memory, is_cached=True),
        )  # fmt: skip
        held = memory.update(k.transpose(1, 2), v.transpose(1, 2))
        self.widest = max(self.widest, held[0].shape[2])
        out = Full()(q, *(t.transpose(1, 2) for t in held), context)
        is_prompt = self.prompt is None or start < self.prompt
        exact = torch.stack([self._row(b, start, end, is_prompt) for b in range(len(self.lefts))])
        # the sums of a few dozen products in another order
        # exponentials of scores whose rounding grows with them; a wrong key is off by 0.01 or more
        assert_close("out", out, exact, worst=2e-5)
        self.columns = end
        assert memory.get_seq_length() == end
        for t in (q, k, v):  # whoever still looks there, shows it
            t.fill_(float("nan"))
        self.check()
        return out

    def _row(self, b, start, end, is_prompt):
        out = torch.zeros(end - start, H, D, dtype=torch.float64)
        new = list(range(max(start, self.lefts[b]), end))
        if not new:
            return out
        for h in range(HK):
            self.kept[b][h] = self.policy.before(b, h, self.kept[b][h], new, self)
            columns = [*self.kept[b][h], *new]
            seen = torch.tensor(columns)[None] <= torch.tensor(new)[:, None]
            probabilities = 0
            for g in range(H // HK):
                head = h * (H // HK) + g
                q, k, v = (
                    t.double() for t in (
                        self.q[b, new, head], self.k[b, columns, h], self.v[b, columns, h]
                    )
                )  # fmt: skip
                P = (q @ k.T * D**-0.5).masked_fill(~seen, float("-inf")).softmax(-1)
                out[len(out) - len(new) :, head] = P @ v
                probabilities = probabilities + P
            self.kept[b][h] = self.policy.after(b, h, columns, new, probabilities, self, is_prompt)
        return out

    def check(self):
        """Check that the memory holds what it should, in its order, and nothing else."""
        memory = self.memory
        lengths = [len(self.kept[b][0]) for b in range(len(self.lefts))]
        assert memory.held == max(lengths) or memory.padding is not None
        for b, rows in enumerate(self.kept):
            empty = 0 if memory.padding is None else int(memory.padding[b])
            assert memory.held - empty == lengths[b]
            for h, columns in enumerate(rows):
                for held, all_of_them in ((memory.keys, self.k), (memory.values, self.v)):
                    assert torch.equal(held[b, h, empty:], all_of_them[b, columns, h])


class Policy:
    """What stays, in plain words: the ``budget`` best of a list of columns, by a score of each."""

    first = 0

    def __init__(self, budget):
        self.budget = budget

    def limit(self, b, seen, text):
        if isinstance(self.budget, int):
            return self.budget
        tokens = (seen if text.prompt is None else text.prompt) - text.lefts[b]
        return max(1, -int(-tokens * self.budget // 1))

    def best(self, columns, scores, keep, last):
        """Return ``keep`` of the columns in their order; of equal ones, the newer."""
        safe = columns[: min(self.first, keep)]
        last = min(last, keep - len(safe))
        safe = safe + [c for c in columns[len(columns) - last :] if c not in safe]
        rest = sorted((c for c in columns if c not in safe), key=lambda c: (-scores[c], -c))
        return sorted(safe + rest[: keep - len(safe)])

    def before(self, b, h, kept, new, text):
        return kept

    def after(self, b, h, columns, new, probabilities, text, is_prompt):
        raise NotImplementedError


class Latest(Policy):
    """The later, the better; the first four stay."""

    first = 4

    def _fewer(self, limit):
        return limit - max(limit // 32, 1)

    def before(self, b, h, kept, new, text):
        limit = self.limit(b, text.columns + len(new), text)
        if len(new) > 1 or len(kept) < limit:
            return kept
        return self.cut(b, h, kept, self._fewer(limit), limit)

    def after(self, b, h, columns, new, probabilities, text, is_prompt):
        limit = self.limit(b, new[-1] + 1, text)
        self.told(b, h, columns, new, probabilities)
        return self.cut(b, h, columns, limit, limit) if len(columns) > limit else columns

    def told(self, b, h, columns, new, probabilities):
        pass

    def cut(self, b, h, columns, keep, limit):
        return self.best(columns, {c: c for c in columns}, keep, 0)


class H2O(Latest):
    """What has received most; half of the budget is for the latest."""

    first = 0

    def __init__(self, budget):
        super().__init__(budget)
        self.received = {}

    def told(self, b, h, columns, new, probabilities):
        for column, given in zip(columns, probabilities.sum(0).tolist()):
            self.received[b, h, column] = self.received.get((b, h, column), 0) + given

    def cut(self, b, h, columns, keep, limit):
        scores = {c: self.received[b, h, c] for c in columns}
        return self.best(columns, scores, keep, -(-limit // 2))


class H2OAverage(H2O):
    """What has received most from each query since it came."""

    def cut(self, b, h, columns, keep, limit):
        scores = {c: self.received[b, h, c] / (self.seen - c) for c in columns}
        return self.best(columns, scores, keep, -(-limit // 2))

    def before(self, b, h, kept, new, text):
        self.seen = text.columns
        return super().before(b, h, kept, new, text)

    def after(self, b, h, columns, new, probabilities, text, is_prompt):
        self.seen = new[-1] + 1
        return super().after(b, h, columns, new, probabilities, text, is_prompt)


class SnapKV(Policy):
    """What the last 16 queries of a prompt look at, each with two neighbours on both sides."""

    window = 16

    def after(self, b, h, columns, new, probabilities, text, is_prompt):
        limit = self.limit(b, new[-1] + 1, text)
        own = [c for c in new if c >= text.lefts[b]]
        if not is_prompt or len(own) <= self.window or len(columns) <= limit:
            return columns
        sums = probabilities[-self.window :].sum(0)[: -self.window].tolist()
        scores = dict.fromkeys(columns, 0.0)
        for i in range(len(sums)):
            scores[columns[i]] = sum(sums[max(i - 2, 0) : i + 3]) / 5
        return self.best(columns, scores, limit, self.window)


class ExpectedAttention(Policy):
    """What queries of the next 512 positions give, if they are distributed as those of the call."""

    first = 4
    least = 16

    def after(self, b, h, columns, new, probabilities, text, is_prompt):
        limit = self.limit(b, new[-1] + 1, text)
        own = [c for c in new if c >= text.lefts[b]]
        if not is_prompt or len(own) <= self.least or len(columns) <= limit:
            return columns
        group = H // HK
        own = [c for c in new if c >= text.lefts[b] + 4]
        last = int(text.positions[b, new[-1]])
        # the matrix of each later position, one by one
        steps = torch.arange(last + 1, last + 513)
        basis = torch.eye(D).double().expand(1, 512, D, D)
        turned = rotate(basis, steps[None])[0]  # [512 D D]: where each vector of a basis goes
        R = turned.mean(0).T
        score = 0
        for g in range(group):
            q = text.plain[b, own, h * group + g].double()
            mean = R @ q.mean(0)
            centred = q - q.mean(0)
            covariance = R @ (centred.T @ centred / len(own)) @ R.T
            k = text.k[b, columns, h].double()
            logits = k @ mean / D**0.5 + ((k @ covariance) * k).sum(-1) / (2 * D)
            score = score + logits.softmax(-1)
        score = score / group * text.v[b, columns, h].double().norm(dim=-1)
        return self.best(columns, dict(zip(columns, score.tolist())), limit, 0)


POLICIES = {
    "h2o": (H2O, {}),
    "h2o_average": (H2OAverage, {"name": "h2o", "average": True}),
    "snapkv": (SnapKV, {"window": 16}),
    "expected_attention": (ExpectedAttention, {"least": 16}),
    "latest": (Latest, {}),
}


@pytest.fixture
def text_of():
    """Return a function that makes a ``Text``, of a policy by name and a budget."""

    def make(name, budget, **kwargs):
        policy, settings = POLICIES[name]
        memory = parse_memory({"name": name, "budget": budget, **settings}).memory()
        return Text(memory, policy(budget), **kwargs)

    return make


@pytest.fixture(scope="session")
def full_model():
    """Return the embedded recall model in float32, fused, with a plan."""
    return bt.BitNetForCausalLM.from_pretrained(
        bt.RECALL_MODEL, attention="full", dtype=torch.float32
    ).eval()
