"""Training: Trainer, gradient checkpointing, LoRA."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import bitnet_triton as bt
from bitnet_triton.nn import BitLinear, PackedBitLinear

TEXT = [1, 5, 23, 71, 8, 40, 12, 66, 31, 7, 90, 55]


class OneText(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return {"input_ids": torch.tensor(TEXT), "labels": torch.tensor(TEXT)}


def train(model, folder, **kwargs):
    settings = {"max_steps": 8, "learning_rate": 3e-3, "save_strategy": "no", **kwargs}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=OneText())
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_loss_goes_down(gradient_checkpointing, checkpoint, tmp_path):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("online"))
    _, losses = train(model, tmp_path, gradient_checkpointing=gradient_checkpointing)
    assert losses[-1] < 0.5 * losses[0]


def test_a_trained_model_saves_and_resumes(checkpoint, tmp_path):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("online"))
    trainer, _ = train(model, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    again = bt.BitNetForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    resumed = bt.BitNetForCausalLM.from_pretrained(checkpoint("online"))
    trainer = Trainer(model=resumed, args=trainer.args, train_dataset=OneText())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for key, tensor in model.state_dict().items():
        assert torch.allclose(resumed.state_dict()[key], tensor, atol=1e-6), key


def gradients(model):
    model.train()
    ids = torch.tensor([TEXT])
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_every_parameter_gets_the_gradient_of_transformers(checkpoint, load_theirs, error):
    folder = checkpoint("online", bias=True, rms_norm=True)
    ours = gradients(bt.BitNetForCausalLM.from_pretrained(folder))
    with torch.compiler.set_stance("force_eager"):
        theirs = gradients(load_theirs(folder))
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        if name.endswith("k_proj.bias"):  # softmax does not see it: rounding only
            continue
        assert error(ours[name], gradient) < 2e-3, name


def test_gradient_checkpointing_gives_the_same_gradients(checkpoint):
    plain = gradients(bt.BitNetForCausalLM.from_pretrained(checkpoint("online")))
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("online"))
    model.gradient_checkpointing_enable()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, plain[name]), name


def test_a_fresh_model_is_trainable_and_saves_as_online(tmp_path):
    config = bt.BitNetConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = bt.BitNetForCausalLM(config)
    assert sum(isinstance(m, BitLinear) for m in model.modules()) == 7
    ids = torch.randint(0, 32, (1, 6))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.save_pretrained(tmp_path)
    again = bt.BitNetForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_a_packed_model_is_not_trained_by_mistake(checkpoint, tmp_path):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("packed"))
    with pytest.raises(ValueError, match="fine-tuning on purely quantized models"):
        train(model, tmp_path)


@pytest.mark.peer
@pytest.mark.parametrize("format", ["online", "packed"])
def test_lora_trains_beside_ternary_weights(format, checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint(format))
    master = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    lora = peft.get_peft_model(model, config)
    _, losses = train(lora, tmp_path, learning_rate=3e-2)
    assert losses[-1] < losses[0]
    assert torch.equal(model.model.layers[0].self_attn.q_proj.base_layer.weight, master)

    lora.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([TEXT])
    lora.eval()
    with torch.no_grad():
        expected = lora(ids).logits
        base = bt.BitNetForCausalLM.from_pretrained(checkpoint(format))
        again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert torch.equal(again(ids).logits, expected)


@pytest.mark.peer
def test_lora_of_the_head_trains_beside_packed_weights(checkpoint):
    peft = pytest.importorskip("peft")
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("packed"))
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    lora = peft.get_peft_model(model, config)
    ids = torch.tensor([TEXT])
    lora(ids, labels=ids).loss.backward()
    grads = {n: p.grad for n, p in lora.named_parameters() if p.requires_grad}
    assert all("lora" in name for name in grads)
    assert all(grad is not None for grad in grads.values())


def test_gradients_flow_through_packed_weights(checkpoint):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("packed"))
    assert any(isinstance(m, PackedBitLinear) for m in model.modules())
    embeds = torch.randn(1, 5, 64, requires_grad=True)
    model(inputs_embeds=embeds).logits.square().mean().backward()
    assert embeds.grad.isfinite().all()
    assert embeds.grad.abs().sum() > 0
