"""compile_by_kind: torch.compile with as many graphs as kinds of arguments, and no limit."""

import pytest
import torch
from torch import nn

from bitnet_triton.runtime import compile_by_kind


@pytest.fixture(autouse=True)
def graphs_compiled(monkeypatch):
    """Count graphs, compiled with the cheapest compiler, which runs the traced graph as it is."""
    graphs = []

    def counting(function, **options):
        def backend(graph, _):
            graphs.append(function.__name__)
            return graph

        return compile_(function, backend=backend, **options)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", counting)
    return graphs


@compile_by_kind
def product(x, weight, bias, factor):
    y = x * weight.float() * factor
    return y if bias is None else y + bias


def check(function, x, weight, bias, factor):
    expected = x.detach() * weight.detach().float() * factor
    expected = expected if bias is None else expected + bias.detach()
    y = function(x, weight, bias, factor)
    assert torch.equal(y, expected)
    assert not y.requires_grad


def test_sizes_share_a_graph_and_kinds_do_not(graphs_compiled):
    for size in (2, 5, 17, 64):
        check(product, torch.randn(size), torch.randn(size), None, 2)
    assert len(graphs_compiled) == 1
    check(product, torch.randn(1), torch.randn(1), None, 2)  # torch.compile specialises on 1
    check(product, torch.randn(4), torch.randn(4).half(), None, 2)
    check(product, torch.randn(4), torch.randn(4), torch.randn(4), 2)
    check(product, torch.randn(4), torch.randn(4), None, 3)
    check(product, torch.randn(4, 4), torch.randn(4), None, 2)
    check(product, torch.randn(8)[::2], torch.randn(4), None, 2)
    assert len(graphs_compiled) == 7


def test_parameters_and_gradients_need_no_graph_of_their_own(graphs_compiled):
    @compile_by_kind
    def negated(x):
        return -x

    x = torch.randn(4)
    for value in (x, x.clone().requires_grad_(), nn.Parameter(x), nn.Parameter(x, False)):
        with torch.no_grad():
            y = negated(value)
        assert torch.equal(y, -x)
        assert not y.requires_grad
    assert len(graphs_compiled) == 1


def test_more_kinds_than_the_recompile_limit_all_stay_compiled(graphs_compiled):
    @compile_by_kind
    def shifted(x, by):
        assert torch.compiler.is_compiling()  # a fall back to eager mode fails here
        return x + by

    with torch._dynamo.config.patch(recompile_limit=2):
        for size in (3, 5):
            for by in range(12):
                y = shifted(torch.zeros(size), by)
                assert torch.equal(y, torch.full((size,), float(by)))
    assert len(graphs_compiled) == 12


def test_equal_sizes_are_the_only_other_reason_for_a_graph(graphs_compiled):
    @compile_by_kind
    def outer(x, y):
        return x[:, None] * y

    for M, N in [(3, 3), (3, 4), (5, 5), (6, 7), (2, 9)]:
        assert outer(torch.ones(M), torch.ones(N)).shape == (M, N)
    assert len(graphs_compiled) == 2


def test_the_name_and_docstring_of_the_function_stay():
    @compile_by_kind
    def documented(x):
        """Say what it does."""
        return x

    assert documented.__name__ == "documented"
    assert documented.__doc__ == "Say what it does."
