"""What the tests of native sparse attention share: the choice of blocks by the formulas."""

import pytest
import torch

from bitnet_triton.kernels.native_sparse.reference import (
    block_scores_reference,
    compressed_attention_reference,
    select_reference,
)


@pytest.fixture
def chosen_by_formula():
    """A function that returns the blocks of queries [B Tq H D], and the scores of all blocks."""

    def choose(q, kc, blocks, Tk):
        before = Tk - q.shape[1]
        weights = compressed_attention_reference(
            q.double(), kc.double(), kc.double(), blocks=blocks, scale=q.shape[-1] ** -0.5,
            before=before,
        )[2]  # fmt: skip
        count = -(-Tk // blocks.selection)
        scores = block_scores_reference(weights, blocks=blocks, Hk=kc.shape[2], count=count)
        return select_reference(scores, blocks=blocks, before=before), scores

    return choose


@pytest.fixture
def check_choice(chosen_by_formula):
    """A function that holds chosen blocks beside exact scores.

    Where two are equal to rounding, either is right.
    """

    def check(indices, q, kc, blocks, Tk):
        expected, scores = chosen_by_formula(q, kc, blocks, Tk)
        assert indices.dtype == torch.int32
        assert torch.equal(indices < 0, expected < 0)
        ordered = indices.sort(-1)[0]
        assert ((ordered.diff(dim=-1) > 0) | (ordered[..., 1:] < 0)).all()  # none twice
        own = (torch.arange(q.shape[1]) + Tk - q.shape[1])[None, :, None, None] // blocks.selection
        assert (indices <= own).all()
        forced = ((expected < blocks.initial) | (expected > own - blocks.local)) & (expected >= 0)
        assert torch.equal(indices[forced], expected[forced])
        places = (
            indices.clamp_min(0).long().transpose(1, 2),
            expected.clamp_min(0).long().transpose(1, 2),
        )
        got, want = (scores.gather(-1, place) for place in places)
        assert (got - want).abs().max() <= 1e-5
        return expected

    return check
