"""Feature maps of linear attention: what their products are, and what they teach."""

import math

import pytest
import torch

from bitnet_triton.kernels import linear_attention
from bitnet_triton.nn import Hedgehog, Performer, elu_plus_one
from bitnet_triton.nn.feature_maps import orthogonal_rows

D = 16


def test_performer_is_unbiased():
    """The mean over draws is exp(q . k / sqrt(D)) within its standard error."""
    # of longer ones the products have so heavy a tail that draws do not tell their own error
    q, k = (0.3 * torch.randn(8, D) for _ in range(2))
    draws, first = 600, int(torch.randint(2**30, ()))
    products = torch.stack(
        [
            (Performer(D, 2 * D, seed=first + i)(q) * Performer(D, 2 * D, seed=first + i)(k)).sum(
                -1
            )
            for i in range(draws)
        ]
    ).double()
    exact = ((q * k).sum(-1).double() / math.sqrt(D)).exp()
    error = products.std(0) / math.sqrt(draws)
    # of eight pairs one is beyond 5 standard errors in some 200000 runs
    assert ((products.mean(0) - exact).abs() <= 5 * error).all()


def test_more_features_of_performer_err_less():
    q, k = (0.3 * torch.randn(64, D) for _ in range(2))
    exact = ((q * k).sum(-1) / math.sqrt(D)).exp()

    def error(features):
        drawn = (Performer(D, features, seed=i) for i in range(30))
        squares = [((m(q) * m(k)).sum(-1) / exact - 1).square().mean() for m in drawn]
        return torch.stack(squares).mean().sqrt()

    # 1 / sqrt(F): sixteen times as many features leave a quarter
    assert error(16 * D) < 0.4 * error(D)


def test_rows_are_orthogonal_and_uniform():
    rows = orthogonal_rows(2 * D + 3, D, seed=1).double()
    assert rows.shape == (2 * D + 3, D)
    product = rows[:D] @ rows[:D].t()
    off = product - product.diagonal().diag()
    assert off.abs().max() <= 1e-5
    drawn = torch.stack([orthogonal_rows(D, D, seed=i) for i in range(2000)])
    # a Gaussian row has mean 0 and variance 1 in each direction; without the signs of R it has not
    assert (drawn.mean(0).abs() <= 5.5 / math.sqrt(2000)).all()
    assert (drawn.var(0) - 1).abs().max() <= 5.5 * math.sqrt(2 / 2000)


def test_queries_of_any_length_stay_finite():
    performer = Performer(D, 32)
    q = torch.randn(1, 5, 2, D)
    features = performer(q)
    shifted = performer(q, queries=True)
    ratio = features / shifted
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio), rtol=1e-4, atol=0)
    assert performer(300 * q, queries=True).amax(-1).allclose(torch.tensor(32**-0.5))


def test_performer_attends_nearly_as_softmax_does():
    q, k = (0.3 * torch.randn(1, 40, 2, D) for _ in range(2))
    v = torch.randn(1, 40, 2, D)
    performer = Performer(D, 2048)
    ours = linear_attention(performer(q, queries=True), performer(k), v, normalize=True, scale=1.0)
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    exact = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
    error = (ours - exact.transpose(1, 2)).norm() / exact.norm()
    assert error < 0.1


def test_equal_seeds_give_equal_rows_and_redrawing_others():
    one, other = Performer(D, seed=3), Performer(D, seed=3)
    assert torch.equal(one.rows, other.rows)
    assert one.features == 48  # 16 ln 16 = 44.4
    one.redraw(4)
    assert not torch.equal(one.rows, other.rows)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.rows, other.rows)


def test_hedgehog_begins_as_a_softmax_of_its_input_and_learns():
    hedgehog = Hedgehog(3, D)
    x = torch.randn(2, 5, 3, D)
    y = hedgehog(x)
    torch.testing.assert_close(y, torch.cat((x, -x), -1).softmax(-1))
    torch.testing.assert_close(y.sum(-1), torch.ones(2, 5, 3))
    y[:, :, 1].square().sum().backward()
    changed = hedgehog.weight.grad.flatten(1).any(1)
    assert changed.tolist() == [False, True, False]  # each head has its own
    assert hedgehog(x.bfloat16()).dtype == torch.bfloat16


def test_elu_plus_one_is_positive_and_smooth():
    x = torch.tensor([-3.0, 0.0, 2.0], requires_grad=True)
    torch.testing.assert_close(elu_plus_one(x), torch.tensor([math.exp(-3), 1.0, 3.0]))
    elu_plus_one(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([math.exp(-3), 1.0, 1.0]))


@pytest.mark.parametrize(("arguments", "name"), [((0,), "D"), ((16, 0), "features")])
def test_what_is_wrong_is_named(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`: expected at least 1, got 0"):
        Performer(*arguments)
