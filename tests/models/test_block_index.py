"""The index of indexed_blocks in whole models: its loss, and parts that somebody has changed."""

import copy
import io

import pytest
import torch

import bitnet_triton as bt
from bitnet_triton.models.convert import convert_checkpoint
from bitnet_triton.models.mode_loss import _tell_untaken_loss

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
INDEXED = {"mode": "indexed_blocks", "block": 4, "selected": 3, "index_keys": "float"}

pytestmark = pytest.mark.usefixtures("default_backend")


def changed(attention=INDEXED):
    """Return a model whose index is not where it starts."""
    model = bt.BitNetForCausalLM(bt.BitNetConfig(**SIZES, attention=attention))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [
        layer.self_attn.indexed_blocks.query.weight.grad.clone() for layer in model.model.layers
    ]


def test_outputs_that_are_a_tuple_have_the_loss_of_the_index():
    model, ids = changed().train(), torch.randint(3, 96, (2, 21))
    outputs = model(ids, labels=ids)
    expected = gradients(model, outputs.loss)
    found = model(ids, labels=ids, return_dict=False)
    torch.testing.assert_close(found[0], outputs.loss)
    assert model.mode_loss > 0
    torch.testing.assert_close(gradients(model, found[0]), expected)


def test_a_loss_of_ones_own_can_take_that_of_the_index(caplog):
    model, ids = changed().train(), torch.randint(3, 96, (2, 21))
    expected = gradients(model, model(ids, labels=ids).loss)
    _tell_untaken_loss.cache_clear()
    with caplog.at_level("WARNING", logger="bitnet_triton"):
        for _ in range(2):
            logits = model(ids).logits
    assert [r.message for r in caplog.records if "take_mode_loss" in r.message]
    assert len(caplog.records) == 1
    own = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(gradients(model, own + model.take_mode_loss()), expected)
    assert model.take_mode_loss() is None
    model.eval()(ids)
    assert model.take_mode_loss() is None


def test_checkpointing_keeps_the_loss_of_the_index_or_is_refused():
    model, ids = changed().train(), torch.randint(3, 96, (2, 21))
    expected = gradients(model, model(ids, labels=ids).loss)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(model, model(ids, labels=ids).loss), expected)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="'indexed_blocks' would lose the loss"):
        model(ids, labels=ids)
    for layer in model.model.layers:
        layer.self_attn.indexed_blocks.requires_grad_(False)  # nothing to be lost
    model(ids, labels=ids).loss.backward()


def test_a_model_is_copied_and_saved_while_its_index_has_a_loss():
    model, ids = changed().train(), torch.randint(3, 96, (1, 13))
    logits = model(ids).logits  # nobody has taken the loss
    assert model.model.layers[0].self_attn.indexed_blocks.loss.requires_grad
    torch.testing.assert_close(copy.deepcopy(model)(ids).logits, logits)
    torch.save(model, io.BytesIO())


def packed(model, folder):
    model.save_pretrained(folder / "masters")
    convert_checkpoint(folder / "masters", folder / "packed", to="packed")
    return folder / "packed"


@pytest.mark.parametrize("decode", ["quest", "full"])
def test_steps_of_another_mode_leave_no_index_key_out(decode, tmp_path):
    """What one turn decodes, the prompt of the next finds by its index keys."""
    other = {"quest": {"mode": "quest", "page": 4, "budget": 12}, "full": "full"}[decode]
    path = packed(changed({"prefill": INDEXED, "decode": other}), tmp_path)
    ids, found = torch.randint(3, 96, (1, 60)), []
    with torch.no_grad():
        for fuse in (True, False):
            model, cache = bt.BitNetForCausalLM.from_pretrained(path, fuse=fuse), None
            for start in range(0, 60, 20):
                for t in (start, *range(start + 10, start + 20)):
                    part = ids[:, t : t + 10] if t == start else ids[:, t : t + 1]
                    out = model(part, past_key_values=cache, use_cache=True, prompt_len=start + 10)
                    cache = out.past_key_values
            found.append(model(ids[:, :9], past_key_values=cache, prompt_len=69).logits)
    assert (found[0] - found[1]).norm() <= 3e-2 * found[1].norm()


@pytest.mark.parametrize("change", ["hook", "other linear"])
def test_no_step_passes_over_a_part_that_was_changed(change, tmp_path):
    """Adapters replace a linear; a recorded step reads weights alone."""

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x).flip(-1)

    model = bt.BitNetForCausalLM.from_pretrained(packed(changed(), tmp_path))
    ids = torch.randint(3, 96, (1, 40))
    with torch.no_grad():
        for each in (False, True):  # a step was recorded before
            if each:
                for layer in model.model.layers:
                    index = layer.self_attn.indexed_blocks
                    if change == "hook":
                        index.query.register_forward_hook(lambda *args: args[-1].flip(-1))
                    else:
                        index.query.__class__ = Doubled
            cache = model(ids[:, :6], use_cache=True).past_key_values
            steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(6, 40)]
        whole = model(ids, use_cache=False).logits[:, 6:]
    found = torch.cat(steps, 1)
    assert (found - whole).norm() <= 3e-2 * whole.norm()
