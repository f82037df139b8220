"""attn_implementation="bitnet_triton" while torch.compile traces a model, without a cache."""

import pytest
import torch
from torch.fx import GraphModule
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertModel,
)
from transformers import masking_utils as hf

import bitnet_triton.models  # noqa: F401  registers the name
from bitnet_triton import BitNetConfig, BitNetForCausalLM
from bitnet_triton.attention.hub import describe_mask

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=4)),
    "bitnet": (BitNetForCausalLM, BitNetConfig(**SIZES)),
}
T = 14
PACKED = torch.cat([torch.arange(5), torch.arange(7), torch.arange(2)]).expand(2, T)


class Graphs(list):
    """A backend of torch.compile that keeps the graphs, and runs them as they are."""

    def __call__(self, module, inputs):
        self.append(module)
        return module

    def functions(self):
        """Return the names of all functions that the graphs call, nested ones too."""
        parts = [m for graph in self for m in graph.modules() if isinstance(m, GraphModule)]
        return {str(node.target) for part in parts for node in part.graph.nodes}


@pytest.fixture(params=FAMILIES)
def model(request):
    family, config = FAMILIES[request.param]
    model = family(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, 0.0, 1.0 if "embed" in name else 0.2)
    yield model
    torch.compiler.reset()


def trained(model, forward, ids, **inputs):
    """Return the loss of a step and its gradient."""
    model.zero_grad()
    loss = forward(ids, labels=ids, use_cache=False, **inputs).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_a_training_step_runs_the_op_and_no_attention_of_torch(packed, model, steady_ids):
    places = PACKED if packed else torch.arange(T).expand(2, T)
    model.set_attn_implementation("eager")
    inputs = {"position_ids": places} if packed else {}
    inputs["ids"] = steady_ids(model, B=2, T=T, position_ids=places[:1])
    loss, grad = trained(model, model.forward, **inputs)

    model.set_attn_implementation("bitnet_triton")
    graphs = Graphs()
    compiled = torch.compile(model.forward, fullgraph=True, backend=graphs)
    ours, our_grad = trained(model, compiled, **inputs)

    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_grad, grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item())
    functions = graphs.functions()
    assert any("flash_attention_fwd" in name for name in functions)
    assert not any("scaled_dot_product" in name or "softmax" in name for name in functions)


def test_one_graph_serves_plain_and_packed_batches(model, steady_ids):
    model.set_attn_implementation("bitnet_triton")
    graphs = Graphs()
    compiled = torch.compile(model.forward, fullgraph=True, backend=graphs)
    for places in (torch.arange(T).expand(2, T), PACKED):
        ids = steady_ids(model, B=2, T=T, position_ids=places[:1])
        ours = compiled(ids, position_ids=places, use_cache=False).logits
        theirs = model(ids, position_ids=places, use_cache=False).logits
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bitnet"], indirect=True)
def test_inductor_trains(model, steady_ids):
    # it drops what has no effect: the check of the mask has one
    model.set_attn_implementation("bitnet_triton")
    inputs = {"position_ids": PACKED}
    inputs["ids"] = steady_ids(model, B=2, T=T, position_ids=PACKED[:1])
    loss, grad = trained(model, model.forward, **inputs)
    compiled = torch.compile(model.forward, fullgraph=True)
    ours, our_grad = trained(model, compiled, **inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_grad, grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item())


def every_second(b, h, i, j):
    return j % 2 == 0


def far(b, h, i, j):
    return i - j >= 1


@pytest.mark.parametrize("other", [every_second, far])
def test_a_joint_that_is_no_packing_is_caught_as_it_runs(other):
    def describe(x):
        mask = describe_mask(1, T, T, mask_function=hf.and_masks(hf.causal_mask_function, other))
        return x + mask.cu_seqlens[0]

    compiled = torch.compile(describe, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="`attention_mask`: not that of packed sequences"):
        compiled(torch.zeros(1))


def test_windows_to_both_sides_stay_a_matrix():
    model = ModernBertModel(
        ModernBertConfig(
            vocab_size=96, hidden_size=64, intermediate_size=100, num_hidden_layers=2,
            num_attention_heads=4, local_attention=4, global_attn_every_n_layers=2,
            pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2,
        )
    ).eval()  # fmt: skip
    ids = torch.randint(3, 96, (2, T))
    results = []
    for name in ("eager", "bitnet_triton"):
        model.set_attn_implementation(name)
        compiled = torch.compile(model.forward, backend="eager")
        with torch.no_grad():
            results.append(compiled(ids).last_hidden_state)
        torch.compiler.reset()
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
