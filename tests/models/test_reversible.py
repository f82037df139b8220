"""Reversible layers in a model: the gradients of the plain function, flat memory, and refusals."""

import contextlib
import json
import logging

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments
from transformers.models.bitnet.modeling_bitnet import apply_rotary_pos_emb, repeat_kv

import bitnet_triton as bt
from bench.memory import peak_extra_bytes
from bitnet_triton.models.bitnet import reversible

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MODES = [
    None,
    "full",
    {"mode": "sliding", "window": 4, "sinks": 1},
    {"mode": "reformer", "rounds": 2, "buckets": 4, "window": 4, "pattern": "chunk"},
    {"mode": "native_sparse", "block": 8, "stride": 4, "selected": 2, "initial": 1, "local": 1,
     "window": 4, "selection": 8},
    {"prefill": {"mode": "sliding", "window": 4}, "decode": "full"},
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("default_backend")


def build(attention=None, dense=True, **changes):
    changes |= {"quantization_config": None} if dense else {}
    config = bt.BitNetConfig(**SIZES | {"reversible": True, "attention": attention} | changes)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = bt.BitNetForCausalLM(config)
        for name, parameter in model.named_parameters():
            mean, std = (1.0, 0.2) if "norm" in name else (0.0, 0.15)
            torch.nn.init.normal_(parameter, mean, 1.0 if "embed" in name else std)
    return model.train()


def drawn(rows=2, tokens=20):
    return torch.randint(3, 96, (rows, tokens))


def gradients(model, ids, call=None, **kwargs):
    """Return the loss and the gradients of all parameters."""
    model.zero_grad()
    labels = ids.clone()
    labels[:, :6] = -100
    loss = (model if call is None else call)(input_ids=ids, labels=labels, **kwargs).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def check(ours, plain, limit=1e-4):
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        error = (ours[name] - expected).norm() / expected.norm().clamp_min(1e-9)
        assert error < limit, (name, error)


def by_the_formula(model, ids):
    """Return logits by y1 = x1 + attention(x2), y2 = x2 + mlp(y1), in plain PyTorch."""
    decoder, config = model.model, model.config
    x1 = x2 = decoder.embed_tokens(ids)
    turns = decoder.rotary_emb(x1, position_ids=torch.arange(ids.shape[1])[None])
    groups = config.num_attention_heads // config.num_key_value_heads
    for layer in decoder.layers:
        a, x = layer.self_attn, layer.input_layernorm(x2)
        q, k, v = (
            t.unflatten(-1, (-1, a.head_dim)).transpose(1, 2)
            for t in (a.q_proj(x), a.k_proj(x), a.v_proj(x))
        )
        q, k = apply_rotary_pos_emb(q, k, *turns)
        k, v = repeat_kv(k, groups), repeat_kv(v, groups)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x1 = x1 + a.o_proj(a.attn_sub_norm(out))
        x2 = x2 + layer.mlp(layer.post_attention_layernorm(x1))
    return model.lm_head(decoder.norm((x1 + x2) / 2))


@pytest.mark.parametrize("attention", [None, "full"])
def test_it_is_the_published_formula(attention):
    model, ids = build(attention, num_key_value_heads=2), drawn()
    ours = gradients(model, ids)
    model.zero_grad()
    logits = by_the_formula(model, ids)
    loss = F.cross_entropy(logits[:, 5:-1].flatten(0, 1), ids[:, 6:].flatten())
    loss.backward()
    check(ours, {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}})
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", MODES, ids=str)
def test_gradients_are_those_with_activations_kept(attention):
    model, ids = build(attention), drawn()
    check(gradients(model, ids), gradients(model, ids, output_hidden_states=True))


def test_gradients_of_ternary_masters_and_autocast():
    model, ids = build("full", dense=False), drawn()
    check(gradients(model, ids), gradients(model, ids, output_hidden_states=True), 1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(model, ids)
        check(ours, gradients(model, ids, output_hidden_states=True), 5e-2)


def test_narrow_weights_have_wide_streams():
    model, ids = build("full").bfloat16(), drawn()
    seen = []
    handle = model.model.layers[1].register_forward_hook(lambda *a: seen.append(a[-1]))
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    handle.remove()
    assert {h.dtype for h in hidden} == {torch.bfloat16}
    assert [t.dtype for t in seen[0]] == [torch.bfloat16, torch.float32, torch.float32]
    check(gradients(model, ids), gradients(model, ids, output_hidden_states=True), 5e-2)


def test_padding_and_packed_texts_are_as_ever():
    model, ids = build("full").eval(), drawn()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        alone = model(ids[:1, 5:]).logits
        padded = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
        place = torch.cat([torch.arange(8), torch.arange(12)])[None]
        packed = model(ids[:1], position_ids=place).logits
        parts = [model(ids[:1, :8]).logits, model(ids[:1, 8:]).logits]
    torch.testing.assert_close(padded.logits[:1, 5:], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed, torch.cat(parts, 1), rtol=1e-4, atol=1e-4)


def test_hidden_states_are_means_of_both_streams():
    model, ids = build().eval(), drawn()
    seen = []
    handles = [
        layer.register_forward_hook(lambda *a: seen.append(a[-1])) for layer in model.model.layers
    ]
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    expected = [model.model.embed_tokens(ids), *[(y1 + y2) / 2 for _, y1, y2 in seen]]
    expected[-1] = model.model.norm(expected[-1])
    for found, wanted in zip(hidden, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    assert attentions is not None


def activations(depth, **changes):
    model = build("full", num_hidden_layers=depth, **changes)
    ids = drawn(1, 512)

    def step():
        model.model(ids).last_hidden_state.sum().backward()

    step()  # the gradients are there, and so are the kernels
    return peak_extra_bytes(step, torch.device("cpu"))


def test_memory_does_not_grow_with_depth():
    peaks = [activations(depth) for depth in (4, 8, 16)]
    assert max(peaks) < 1.1 * min(peaks), peaks
    assert activations(16, reversible=False) > 3 * peaks[-1]  # what is counted does grow


@contextlib.contextmanager
def one_process(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_gradients_under_ddp_and_sharded_as_a_whole(tmp_path):
    model, ids = build("full"), drawn()
    plain = gradients(model, ids)
    with one_process(tmp_path):
        check(gradients(model, ids, DistributedDataParallel(model)), plain)
        sharded = fully_shard(build("full"), mesh=init_device_mesh("cpu", (1,)))
        found = gradients(sharded, ids)
        check({n: getattr(g, "full_tensor", lambda g=g: g)() for n, g in found.items()}, plain)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_layers_that_are_sharded_apart_keep_their_activations(tmp_path, caplog):
    model, ids = build("full"), drawn()
    plain = gradients(model, ids)
    reversible._tell_hooks.cache_clear()
    with one_process(tmp_path), caplog.at_level(logging.WARNING, logger="bitnet_triton"):
        mesh, sharded = init_device_mesh("cpu", (1,)), build("full")
        names = sharded._no_split_modules
        parts = [m for m in sharded.modules() if type(m).__name__ in names]
        for part in [*parts, sharded]:
            fully_shard(part, mesh=mesh)
        found = gradients(sharded, ids)
        check({n: getattr(g, "full_tensor", lambda g=g: g)() for n, g in found.items()}, plain)
    assert len(parts) == 3
    assert "keep their activations" in caplog.text


def test_compiled_it_trains_outside_of_the_graph_and_predicts_inside():
    model, ids = build("full"), drawn()
    plain = gradients(model, ids)
    compiled = torch.compile(model, backend="eager")
    check(gradients(model, ids, compiled), plain)
    model = build().eval()
    whole = torch.compile(model.model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(whole(ids)[0], model.model(ids)[0])


def test_trainer_takes_it(tmp_path):
    model = build("full", dense=False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    settings = {"max_steps": 2, "learning_rate": 1e-2, "use_cpu": True, "report_to": [],
                "disable_tqdm": True, "save_strategy": "no"}  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in drawn(8)]
    Trainer(model, TrainingArguments(tmp_path, **settings), train_dataset=data).train()
    unchanged = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    assert unchanged == []
    settings["gradient_checkpointing"] = True
    trainer = Trainer(model, TrainingArguments(tmp_path, **settings), train_dataset=data)
    with pytest.raises(ValueError, match="`gradient_checkpointing`: reversible layers"):
        trainer.train()


@pytest.mark.peer
def test_adapters_learn_beside_packed_weights(checkpoint):
    peft = pytest.importorskip("peft")
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint(), reversible=True, use_cache=False)
    targets = ["q_proj", "v_proj", "down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets)).train()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = drawn()
    ours = gradients(adapted, ids)
    assert len(ours) == 1 + 2 * 2 * len(targets)
    check(ours, gradients(adapted, ids, output_hidden_states=True), 1e-2)


def test_packed_weights_run_module_by_module(checkpoint, logits, log, error, steady_ids):
    settings = {"reversible": True, "use_cache": False}
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint(), **settings)
    assert any("two streams" in line for line in log())
    with pytest.raises(ValueError, match="two streams"):
        bt.fuse(model)
    ids = steady_ids(model)
    with bt.use_backend("reference"):
        expected = logits(model, ids)
    assert error(logits(model, ids), expected) < 1e-5
    plain = bt.BitNetForCausalLM.from_pretrained(checkpoint())
    assert error(logits(plain, ids), expected) > 1e-2  # another function of the same weights


def test_a_checkpoint_remembers_it(tmp_path):
    model, ids = build(), drawn()
    model.eval().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "bitnet_triton"
    assert written["reversible"] is True
    again = bt.BitNetForCausalLM.from_pretrained(tmp_path)
    assert type(again.model.layers[0]) is reversible.ReversibleDecoderLayer
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert "reversible" not in bt.BitNetConfig(**SIZES).to_dict()
    assert bt.BitNetConfig(**SIZES).to_dict()["model_type"] == "bitnet"


@pytest.mark.parametrize("attention", [None, "full"])
def test_generation_goes_without_a_cache(attention):
    model, ids = build(attention).eval(), drawn(2, 6)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    written = model.generate(ids, **settings)
    for _ in range(5):
        with torch.no_grad():
            best = model(ids, use_cache=False).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, best[:, None]], 1)
    assert torch.equal(written, ids)
    beams = model.generate(ids[:, :6], **settings, num_beams=2, use_cache=False)
    assert beams.shape == ids.shape


@pytest.mark.parametrize("attention", [None, "full"])
def test_a_cache_is_refused(attention):
    model, ids = build(attention).eval(), drawn()
    with pytest.raises(ValueError, match="`use_cache`: reversible layers"):
        model(ids, use_cache=True)
    with pytest.raises(ValueError, match="reversible layers make their inputs again"):
        model.generate(ids, max_new_tokens=2, use_cache=True)
    cache = build(attention, reversible=False).eval()(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="`past_key_values`: reversible layers"):
        model(ids, past_key_values=cache)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"use_cache": True}, ValueError, "`use_cache`: expected False beside `reversible`"),
        ({"reversible": 1}, TypeError, "`reversible`: expected True or False, got int"),
        ({"attention": "routing"}, ValueError, "'routing' cannot run again in the backward"),
        ({"attention": "indexed_blocks"}, ValueError, "'indexed_blocks' cannot run again"),
    ],
)
def test_what_cannot_be_is_named(settings, kind, message):
    with pytest.raises(kind, match=message):
        bt.BitNetConfig(**SIZES | {"reversible": True} | settings)


def test_another_attention_that_cannot_be_changes_nothing():
    model, ids, sliding = build("full"), drawn(), {"mode": "sliding", "window": 4}
    with pytest.raises(ValueError, match="'routing' cannot run again"):
        bt.models.bitnet.set_attention(model, "routing")
    assert model.config.attention["mode"] == "full"
    bt.models.bitnet.set_attention(model, sliding)
    check(gradients(model, ids), gradients(build(sliding), ids))


def test_a_plain_checkpoint_that_is_made_reversible_says_what_to_do(checkpoint):
    with pytest.raises(ValueError, match="`use_cache`: expected False"):
        bt.BitNetForCausalLM.from_pretrained(checkpoint(), reversible=True)
