"""A mode from outside does what ours do: no file of the package knows it (``toy_mode.py``)."""

import copy
import importlib.util
import logging
from pathlib import Path

import pytest
import torch

import bitnet_triton as bt
from bitnet_triton.attention import MODES
from bitnet_triton.cache import Call, GrowingLayer
from bitnet_triton.models.fused.layer import FusedDecoderLayer
from bitnet_triton.models.fused.recording import RecordedStep, Recording

PATH = Path(__file__).with_name("toy_mode.py")
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
PADDED = torch.tensor([[0, 0, 0, 1, 9, 30, 7], [1, 5, 23, 71, 8, 40, 6]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])

pytestmark = pytest.mark.usefixtures("default_backend")


@pytest.fixture
def toy(monkeypatch):
    """Register the mode as its user would, and forget it with the test."""
    spec = importlib.util.spec_from_file_location("toy_mode", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "toy_mode", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(MODES, "toy", module.Toy)
    bt.register_mode("toy", module.Toy)
    return module


@pytest.fixture
def replays(monkeypatch):
    seen = []
    replay = Recording.replay

    def count(recording, *args):
        seen.append(recording)
        return replay(recording, *args)

    monkeypatch.setattr(Recording, "replay", count)
    return seen


@pytest.fixture
def folder(toy, tmp_path):
    """A packed checkpoint whose gates and weights differ by head and layer."""
    from bitnet_triton.models.convert import convert_checkpoint

    model = bt.BitNetForCausalLM(bt.BitNetConfig(**SIZES, attention="toy"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "masters")
    convert_checkpoint(tmp_path / "masters", tmp_path / "packed", to="packed")
    return tmp_path / "packed"


def load(folder, **kwargs):
    return bt.BitNetForCausalLM.from_pretrained(folder, **kwargs)


def close(a, b):
    # a code beside a tie may fall to its other side; a wrong sum moves logits by whole units
    return (a - b).norm() <= 3e-2 * b.norm()


def generate(model, ids=PADDED, mask=MASK, **kwargs):
    kwargs = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **kwargs}
    return model.generate(ids, attention_mask=mask, **kwargs)


def test_it_computes_the_mean_of_what_came_before(folder):
    """By the formula, value by value: gates of the hidden states, sums of the values."""
    model, seen = load(folder, fuse=False), {}
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "v_proj", "o_proj", "attn_sub_norm"):
        attention.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, (args[0], output))
        )
    with torch.no_grad():
        model(PADDED[1:], use_cache=False)
    hidden, values = seen["q_proj"][0], seen["v_proj"][1].unflatten(-1, (2, 16))
    gate = (hidden @ attention.toy.weight.T).sigmoid()
    mean = values.cumsum(1) / torch.arange(1, 8)[:, None, None]
    expected = (mean.repeat_interleave(2, 2) * gate[..., None]).flatten(2)
    torch.testing.assert_close(seen["attn_sub_norm"][0], expected)


def test_fused_layers_compute_the_same(folder):
    with torch.no_grad():
        plain = load(folder, fuse=False)(PADDED, attention_mask=MASK).logits
        model = load(folder)
        assert any(isinstance(layer, FusedDecoderLayer) for layer in model.model.layers)
        assert close(model(PADDED, attention_mask=MASK).logits[1], plain[1])
        assert close(model(PADDED, attention_mask=MASK).logits[0, 3:], plain[0, 3:])


def test_its_parameters_are_dense_saved_and_loaded(folder, tmp_path):
    model = load(folder)
    gates = [layer.self_attn.toy for layer in model.model.layers]
    assert [type(gate) for gate in gates] == [torch.nn.Linear] * 2
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.config.attention == {"mode": "toy"}
    for gate, layer in zip(gates, again.model.layers):
        assert torch.equal(gate.weight, layer.self_attn.toy.weight)
    with torch.no_grad():
        assert torch.equal(again(PADDED).logits, model(PADDED).logits)


def test_steps_are_recorded_and_are_one_forward(folder, replays):
    model = load(folder)
    with torch.no_grad():
        ids = torch.randint(3, 96, (2, 30))
        cache = model(ids[:, :8], use_cache=True).past_key_values
        logits = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(8, 30)]
        whole = model(ids, use_cache=False).logits[:, 8:]
    assert close(torch.cat(logits, 1), whole)
    assert len(replays) >= 19  # but for steps in which the memory has grown


def test_generation_with_padding_and_beams_is_that_of_single_launches(folder, replays):
    plain, model = load(folder, fuse=False), load(folder)
    assert torch.equal(generate(model), generate(plain))
    assert len(replays) >= 18
    assert torch.equal(generate(model, num_beams=3), generate(plain, num_beams=3))
    alone = generate(model, PADDED[:1, 3:], MASK[:1, 3:])
    assert torch.equal(generate(model)[:1, 3:], alone)


def test_a_cache_is_cropped_and_an_assistant_helps(folder):
    model = load(folder)
    # transformers takes pad tokens that an assistant reads for padding
    alone = {"ids": PADDED[1:], "mask": MASK[1:], "suppress_tokens": [0]}
    twin = copy.deepcopy(model)
    assert torch.equal(generate(model, assistant_model=twin, **alone), generate(model, **alone))
    with torch.no_grad():
        cache = model(PADDED[1:], use_cache=True).past_key_values
        cache.crop(-3)
        again = model(PADDED[1:, 4:], past_key_values=cache).logits
        assert close(again, model(PADDED[1:]).logits[:, 4:])


def test_its_parameters_are_trained(toy):
    model = bt.BitNetForCausalLM(bt.BitNetConfig(**SIZES, attention="toy")).train()
    loss = model(PADDED, attention_mask=MASK, labels=PADDED).loss
    loss.backward()
    for layer in model.model.layers:
        assert layer.self_attn.toy.weight.grad.abs().sum() > 0


def test_a_loaded_model_takes_it_up(toy, checkpoint):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("packed"))
    assert bt.set_attention(model, "toy") is model
    assert any(isinstance(layer, FusedDecoderLayer) for layer in model.model.layers)
    assert generate(model).shape == (2, 31)
    bt.set_attention(model, "full")
    assert not hasattr(model.model.layers[0].self_attn, "toy")


def test_what_it_cannot_do_is_refused_by_name(toy, folder, caplog):
    with pytest.raises(ValueError, match="'toy' remembers sums alone, 'full' needs keys"):
        bt.BitNetConfig(**SIZES, attention={"prefill": "full", "decode": "toy"})
    model = load(folder)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with pytest.raises(ValueError, match="'toy' takes no packed sequences"):
        model(PADDED[1:], position_ids=packed, use_cache=False)
    with pytest.raises(ValueError, match="attention 'toy' takes padding on one side of a row"):
        model(PADDED, attention_mask=torch.ones(2, 1, 7, 7, dtype=torch.bool), use_cache=False)
    with pytest.raises(TypeError, match="`kind`: expected a frozen dataclass"):
        bt.register_mode("other", dict)
    with pytest.raises(ValueError, match="`name`: 'full' is"):
        bt.register_mode("full", type("Other", (toy.Toy,), {}))
    with pytest.raises(bt.CheckpointError, match="toy"):
        bt.BitNetForCausalLM.from_pretrained(bt.TINY_MODEL, attention="toy")


def test_a_mode_without_a_step_says_so_once(folder, toy, replays, caplog, monkeypatch):
    monkeypatch.setattr(toy.Toy, "step", lambda self, memory, layer: "it is shy")
    model = load(folder)
    with caplog.at_level(logging.INFO, logger="bitnet_triton"):
        generate(model)
    assert not replays
    (line,) = [r.message for r in caplog.records if "decode step" in r.message]
    assert line.endswith("attention 'toy' of layer 0: it is shy")


def test_its_memory_is_told_once_that_the_prompt_is_over(folder, toy, monkeypatch, replays):
    told = []
    monkeypatch.setattr(toy.Toy, "wants_prompt_len", True)
    monkeypatch.setattr(
        toy.RunningSums, "prompt_is_over", lambda memory: told.append(memory.tokens), raising=False
    )
    model = load(folder)
    output = generate(model, return_dict_in_generate=True)
    assert replays
    assert told == [7, 7]  # once a layer, with the prompt in it
    # a second turn: its tokens are a prompt again
    turn = torch.cat([output.sequences, PADDED[1:].expand(2, -1)], 1)
    mask = torch.cat([MASK, torch.ones(2, turn.shape[1] - 7, dtype=MASK.dtype)], 1)
    generate(model, turn, mask, past_key_values=output.past_key_values)
    assert told == [7, 7, 38, 38]


def test_its_places_are_its_own_where_a_cache_of_keys_has_an_equal_key(toy, monkeypatch):
    monkeypatch.setattr(toy.RunningSums, "places_key", lambda memory: memory.tokens)
    memories, keys = [GrowingLayer(), toy.RunningSums()], torch.ones(2, 1, 5, 4)
    with torch.no_grad():
        for memory in memories:
            memory.update(keys, keys)
    assert memories[0].places_key() == memories[1].places_key()
    call = Call(5, position=5)
    step = RecordedStep.build(call, memories, (toy.Toy(),) * 2, [(), ()], pinned=False)
    for memory, rows in zip(memories, step.rows):
        assert torch.equal(step.places[rows], memory.places(call))
