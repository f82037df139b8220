"""linear_cross_entropy against the formula in float64, on every backend."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bitnet_triton.kernels import linear_cross_entropy
from bitnet_triton.kernels.flops import register_flop_formulas
from bitnet_triton.kernels.linear_cross_entropy.launchers import run_backward, run_forward
from bitnet_triton.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from bitnet_triton.testing import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# tokens, width, words; the blocks of a program hold 1024 words
SHAPES = [(1, 1, 1), (7, 24, 100), (37, 16, 1030), (130, 33, 2500)]
IGNORED = -100

pytestmark = [
    pytest.mark.backends("triton", "reference"),
    pytest.mark.usefixtures("forced_backend"),
]


def inputs(shape, dtype, device, unlabelled="some"):
    N, D, V = shape
    hidden = torch.randn(N, D, device=device).to(dtype)
    weight = (torch.randn(V, D, device=device) / D**0.5).to(dtype)
    labels = torch.randint(V, (N,), device=device)
    if unlabelled == "some":
        labels[1::3] = IGNORED
    elif unlabelled == "all":
        labels[:] = IGNORED
    return hidden, weight, labels


def run(function, hidden, weight, labels, dlosses, learns, **kwargs):
    hidden = hidden.detach().requires_grad_()
    weight = weight.detach().requires_grad_(learns)
    losses = function(hidden, weight, labels, **kwargs)
    losses.backward(dlosses.to(losses.dtype))
    found = {"losses": losses.detach(), "dhidden": hidden.grad}
    return found | ({"dweight": weight.grad} if learns else {})


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("chunk", [None, 1, 5])
@pytest.mark.parametrize("unlabelled", ["some", "none"])
def test_matches_reference(shape, dtype, learns, chunk, unlabelled, device, backend):
    hidden, weight, labels = inputs(shape, dtype, device, unlabelled)
    dlosses = torch.randn(shape[0], device=device)
    rest = labels, dlosses, learns
    ours = run(linear_cross_entropy, hidden, weight, *rest, chunk=chunk)
    exact = run(linear_cross_entropy_reference, hidden.double(), weight.double(), *rest)
    assert ours["losses"].dtype == torch.float32
    if shape[2] == 1:  # one word is sure: nothing is lost, and nothing learned
        assert all(not value.any() for value in ours.values())
        return
    eager = run(linear_cross_entropy_reference, hidden, weight, *rest)
    # losses come in float32 of logits that were rounded to the dtype: the limits of that dtype
    narrow = {**ours, "losses": ours["losses"].to(dtype)}
    # a product of one row, a chunk of one token, adds up the words one after the other
    worst = 1e-5 if dtype == torch.float32 else None
    for name, value in exact.items():
        assert_close(name, narrow[name], value, eager=eager[name], worst=worst)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_losses_are_those_of_the_rounded_logits_in_float32(dtype, device, backend):
    hidden, weight, labels = inputs((50, 16, 1100), dtype, device)
    expected = F.cross_entropy(
        F.linear(hidden, weight).double(), labels, ignore_index=IGNORED, reduction="none"
    )
    found = linear_cross_entropy(hidden, weight, labels)
    # a product of other rows may sum in another order, and a logit fall on the other side of a tie
    assert ((found - expected).abs() > 1e-5).float().mean() < 0.05
    assert_close("losses", found, expected, rms=1e-3, worst=3e-2)


def test_a_sure_token_keeps_the_digits_of_its_loss(device, backend):
    """As the difference of two sums of 80, a loss of 1e-7 would be 0 or 8e-6."""
    weight = torch.tensor([[80.0], [64.0], [63.0]], device=device)
    losses = linear_cross_entropy(
        torch.ones(1, 1, device=device), weight, weight.new_zeros(1).long()
    )
    exact = torch.log1p(torch.tensor([-16.0, -17.0], dtype=torch.float64).exp().sum())
    # 1 + 1.5e-7 is rounded to a neighbour of 1
    assert 0.5 < losses.item() / exact.item() < 2


@pytest.mark.parametrize("learns", [False, True])
def test_without_any_label_nothing_is_multiplied_and_nothing_learned(learns, device, backend):
    hidden, weight, labels = inputs((9, 8, 70), torch.float32, device, "all")
    hidden[:] = torch.nan
    found = run(linear_cross_entropy, hidden, weight, labels, torch.ones(9, device=device), learns)
    for name, value in found.items():
        assert not value.any(), name
    empty = run(linear_cross_entropy, hidden[:0], weight, labels[:0], hidden[:0, 0], learns)
    assert empty["losses"].shape == (0,)
    assert not empty.get("dweight", weight.new_zeros(1)).any()


@pytest.mark.parametrize("learns", [False, True])
def test_tokens_without_a_label_do_not_change_the_others(learns, device, backend):
    hidden, weight, labels = inputs((20, 8, 90), torch.float32, device)
    dlosses = torch.randn(20, device=device)
    clean = run(linear_cross_entropy, hidden, weight, labels, dlosses, learns)
    hidden[labels == IGNORED] = torch.nan
    for name, value in run(linear_cross_entropy, hidden, weight, labels, dlosses, learns).items():
        assert torch.equal(value, clean[name]), name


def test_dimensions_stay_and_gaps_are_closed(device, backend):
    hidden = torch.randn(3, 5, 16, device=device)
    weight = torch.randn(40, 32, device=device)
    labels = torch.randint(40, (5, 3), device=device)
    found = linear_cross_entropy(hidden[..., ::2], weight[:, 3:11], labels.t())
    plain = linear_cross_entropy(
        hidden[..., ::2].contiguous(), weight[:, 3:11].contiguous(), labels.t().contiguous()
    )
    assert found.shape == (3, 5)
    assert torch.equal(found, plain)
    alone = linear_cross_entropy(hidden[0, 0, :8], weight[:, :8].contiguous(), labels[0, 0])
    assert alone.shape == ()


@pytest.mark.parametrize("learns", [False, True])
def test_backward_runs_twice_and_accumulates(learns, device, backend):
    hidden, weight, labels = inputs((12, 8, 50), torch.float32, device)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(learns)]
    losses = linear_cross_entropy(*leaves, labels)
    losses.sum().backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves if leaf.requires_grad]
    losses.sum().backward()
    for leaf, gradient in zip(leaves, once):
        assert torch.equal(leaf.grad, 2 * gradient)
    losses = linear_cross_entropy(*leaves, labels)
    (gradient,) = torch.autograd.grad(losses.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_frozen_input_and_a_gradient_that_nobody_wants(device, backend):
    hidden, weight, labels = inputs((6, 8, 50), torch.float32, device)
    weight.requires_grad_()
    linear_cross_entropy(hidden, weight, labels).sum().backward()
    both = run(linear_cross_entropy, hidden, weight, labels, hidden.new_ones(6), True)
    assert torch.equal(weight.grad, both["dweight"])
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad


class MostFloats(TorchDispatchMode):
    """Notes the size of the largest float tensor that an operation makes."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.most = max(self.most, value.numel())
        return out


@pytest.mark.parametrize("unlabelled", ["some", "none"])
def test_no_more_logits_than_those_of_a_chunk_are_there(unlabelled, device, backend):
    N, D, V, chunk = 64, 4, 1024, 8
    hidden, weight, labels = inputs((N, D, V), torch.float32, device, unlabelled)
    with MostFloats() as forward:
        _, stats, _ = run_forward(hidden, weight, labels, IGNORED, chunk, True)
    assert forward.most == chunk * V
    with MostFloats() as backward:
        run_backward(hidden[:, 0], hidden, weight, labels, stats, IGNORED, chunk, True)
    assert backward.most <= chunk * V


@pytest.mark.parametrize("learns", [False, True])
def test_compiles_in_one_graph(learns, device):
    hidden, weight, labels = inputs((11, 8, 60), torch.float32, device)
    rest = labels, torch.randn(11, device=device), learns
    eager = run(linear_cross_entropy, hidden, weight, *rest)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for name, value in run(compiled, hidden, weight, *rest).items():
        assert torch.equal(value, eager[name]), name


def test_the_registered_ops_keep_the_rules(device):
    hidden, weight, labels = inputs((5, 4, 30), torch.float32, device)
    ops = torch.ops.bitnet_triton
    for learns in (False, True):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(learns)
        arguments = (*leaves, labels, IGNORED, 2, not learns)
        torch.library.opcheck(ops.linear_cross_entropy_fwd.default, arguments)


def test_products_are_counted(device):
    from torch.utils.flop_counter import FlopCounterMode

    register_flop_formulas()
    hidden, weight, labels = inputs((6, 8, 50), torch.float32, device, "none")
    product = 2 * 6 * 8 * 50
    for learns, products in ((False, 2), (True, 4)):
        with FlopCounterMode(display=False) as counter:
            run(linear_cross_entropy, hidden, weight, labels, hidden.new_ones(6), learns)
        assert counter.get_total_flops() == products * product
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear_cross_entropy(hidden, weight, labels)
    assert counter.get_total_flops() == product


def test_the_reference_passes_gradcheck():
    hidden, weight, labels = inputs((5, 3, 7), torch.float64, "cpu")
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy_reference(h, w, labels), leaves
    )


@pytest.mark.parametrize("wrong", [-1, 30, -100])
def test_a_label_that_is_no_word_is_named(wrong, device):
    hidden, weight, labels = inputs((5, 4, 30), torch.float32, device, "none")
    labels[3] = wrong
    with pytest.raises(
        ValueError, match=rf"`labels`: expected words from 0 to 29 or -7, got {wrong}"
    ):
        linear_cross_entropy(hidden, weight, labels, ignore_index=-7)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden": [1.0]}, TypeError, "`hidden`: expected a torch.Tensor, got list"),
        ({"weight": 1.0}, TypeError, "`weight`: expected a torch.Tensor, got float"),
        ({"labels": 3}, TypeError, "`labels`: expected a torch.Tensor, got int"),
        ({"hidden": torch.ones(5, 4).half()}, TypeError, "`hidden`: expected dtype float32"),
        ({"weight": torch.ones(9, 4).double()}, TypeError, "`weight`: expected dtype float32 or"),
        ({"labels": torch.ones(5)}, TypeError, "`labels`: expected dtype int64, got float32"),
        ({"hidden": torch.ones(5, 3)}, ValueError, r"`hidden`: .* with D=4, got \[5, 3\]"),
        ({"hidden": torch.ones(())}, ValueError, r"`hidden`: .* got \[\]"),
        ({"weight": torch.ones(0, 4)}, ValueError, r"`weight`: expected \[V D\], each at least 1"),
        ({"labels": torch.zeros(4).long()}, ValueError, r"`labels`: expected \[5\], .* got \[4\]"),
        ({"labels": torch.zeros(5, device="meta").long()}, ValueError, "`labels`: .* on cpu"),
        ({"hidden": torch.ones(5, 4, device="meta")}, ValueError, "`hidden`: .* on cpu"),
        ({"chunk": 0}, ValueError, "`chunk`: expected a positive number of tokens, got 0"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, error, message):
    right = {
        "hidden": torch.ones(5, 4), "weight": torch.ones(9, 4), "labels": torch.zeros(5).long(),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        linear_cross_entropy(**right | arguments)
