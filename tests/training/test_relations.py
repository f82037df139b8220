"""What is learned of a teacher, against the same written out; and which tokens take part."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bitnet_triton.training import relations as module
from bitnet_triton.training.packing import PackingCollator
from bitnet_triton.training.relations import (
    find_documents,
    logits_loss,
    projections,
    relation_loss,
)

DOCUMENTS = [(0, 0, 5), (0, 5, 6), (0, 6, 11), (1, 2, 9)]


def softmax(values):
    top = max(values)
    powers = [(value - top).exp() for value in values]
    return [power / sum(powers) for power in powers]


def divergence(teacher, student):
    return sum(p * (p.log() - q.log()) for p, q in zip(softmax(teacher), softmax(student)))


def written_out_relations(student, teacher, documents):
    """Every token of a document to every token of it, one head after another."""
    total, count = 0, 0
    for row, start, end in documents:
        for head in range(student.shape[2]):
            for i in range(start, end):
                found = [
                    [x[row, i, head].dot(x[row, j, head]) / math.sqrt(x.shape[-1])
                     for j in range(start, end)]
                    for x in (teacher, student)
                ]  # fmt: skip
                total, count = total + divergence(*found), count + 1
    return total / count


def vectors(dtype, heads=3, width=4):
    return torch.randn(2, 11, heads, width, dtype=torch.float64).to(dtype)


def both(fn, student, *args, **kwargs):
    student = student.detach().clone().requires_grad_()
    loss = fn(student, *args, **kwargs)
    loss.backward()
    return loss, student.grad


@pytest.mark.parametrize("at_once", [1, 60, 1 << 22])
def test_relations_are_those_written_out(at_once, monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", at_once)  # a head, some heads, all of them at a time
    student, teacher = vectors(torch.float64), vectors(torch.float64, width=6)
    loss, grad = both(relation_loss, student, teacher, DOCUMENTS)
    wanted, wanted_grad = both(written_out_relations, student, teacher, DOCUMENTS)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-10, atol=1e-14)
    assert not grad[1, :2].any()  # what is no document's
    assert not grad[1, 9:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_numbers_are_compared_in_float32_under_autocast_too(dtype):
    student, teacher = vectors(dtype), vectors(dtype)
    exact, exact_grad = both(relation_loss, student.double(), teacher.double(), DOCUMENTS)
    student.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = relation_loss(student, teacher, DOCUMENTS)
    loss.backward()
    grad = student.grad
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-7)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 4e-3}[dtype]
    assert (grad.double() - exact_grad).norm() < rounding * exact_grad.norm()


def test_no_matrix_of_all_tokens_and_heads_is_ever_there(monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", 64 * 64)
    sizes = []
    divergence = module._divergence

    def watched(student, teacher, scale):
        sizes.append(student.numel())
        return divergence(student, teacher, scale)

    monkeypatch.setattr(module, "_divergence", watched)
    x, y = (torch.randn(1, 128, 6, 8, requires_grad=True) for _ in range(2))
    relation_loss(x, y, [(0, 0, 64), (0, 64, 128)]).backward()
    assert max(sizes) == 64 * 64
    assert len(sizes) == 2 * 2 * 6  # made again in the backward
    assert y.grad is None


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("at_once", [1, 40, 1 << 22])
def test_logits_are_compared_as_written_out(temperature, at_once, monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", at_once)

    def written_out(student, teacher):
        rows = [
            divergence(list(wanted / temperature), list(some / temperature))
            for some, wanted in zip(student, teacher)
        ]
        return temperature**2 * sum(rows) / len(rows)

    student, teacher = (torch.randn(7, 13, dtype=torch.float64) * 3 for _ in range(2))
    loss, grad = both(logits_loss, student, teacher, temperature=temperature)
    wanted, wanted_grad = both(written_out, student, teacher)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-10, atol=1e-14)
    empty = logits_loss(student[:0], teacher[:0], temperature=temperature)
    assert empty.item() == 0


def test_like_is_like():
    x = torch.randn(2, 11, 3, 4, dtype=torch.float64)
    assert relation_loss(x, x, DOCUMENTS).abs() < 1e-12
    # turned as a whole, vectors stand to each other as before
    turn, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    assert relation_loss(x, x @ turn, DOCUMENTS).abs() < 1e-12
    assert logits_loss(x[0, :, 0], x[0, :, 0] + 3).abs() < 1e-12


def test_what_cannot_be_compared_is_named():
    x = torch.randn(1, 5, 3, 4)
    with pytest.raises(ValueError, match=r"`teacher`: expected \[B T H D\] with B T H \[1, 5, 3\]"):
        relation_loss(x, torch.randn(1, 5, 2, 4), [(0, 0, 5)])
    with pytest.raises(ValueError, match="`documents`: expected some tokens"):
        relation_loss(x, x, [])
    with pytest.raises(ValueError, match=r"`teacher`: expected logits \[5, 3\], got \[5, 4\]"):
        logits_loss(torch.randn(5, 3), torch.randn(5, 4))
    with pytest.raises(ValueError, match="`temperature`: expected a positive number, got 0"):
        logits_loss(torch.randn(5, 3), torch.randn(5, 3), temperature=0)


def test_documents_are_found_in_packed_rows_and_beside_padding():
    packed = PackingCollator()([{"input_ids": [1] * n} for n in (4, 1, 3)])
    wanted = [(0, 0, 4), (0, 4, 5), (0, 5, 8)]
    assert find_documents(packed) == wanted
    positions = {name: packed[name] for name in ("input_ids", "position_ids")}
    assert find_documents(positions) == wanted
    ids = torch.ones(3, 5, dtype=torch.long)
    assert find_documents({"input_ids": ids}) == [(0, 0, 5), (1, 0, 5), (2, 0, 5)]
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
    positions = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    assert find_documents(batch) == [(0, 2, 5), (1, 0, 4)]
    assert find_documents(batch | {"position_ids": positions}) == [
        (0, 2, 5), (1, 0, 2), (1, 2, 4),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="`attention_mask`: expected padding around a text"):
        find_documents({"input_ids": ids[:1], "attention_mask": torch.tensor([[1, 0, 1, 1, 1]])})


def test_a_packed_document_has_the_relations_that_it_has_alone():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    models = [LlamaForCausalLM(config).double().eval() for _ in range(2)]
    texts = [torch.randint(3, 50, (n,)).tolist() for n in (9, 1, 14)]

    def losses(batch):
        found = []
        for model in models:
            with projections(model.model, 1) as seen:
                model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
            found.append(seen)
        assert {name: tuple(x.shape[2:]) for name, x in found[0].items()} == {
            "q_proj": (4, 8), "k_proj": (2, 8), "v_proj": (2, 8),
        }  # fmt: skip
        documents = find_documents(batch)
        return torch.stack([relation_loss(found[0][n], found[1][n], documents) for n in found[0]])

    collate = PackingCollator()
    packed = losses(collate([{"input_ids": text} for text in texts]))
    alone = [losses(collate([{"input_ids": text}])) for text in texts]
    sizes = [len(text) for text in texts]
    mean = sum(size * loss for size, loss in zip(sizes, alone)) / sum(sizes)
    torch.testing.assert_close(packed, mean, rtol=1e-9, atol=1e-13)
    assert not any(module._forward_hooks for module in models[0].modules())
