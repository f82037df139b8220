"""``skip_logits``: the loss and the gradients of all logits, without them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bitnet_triton as bt
from bitnet_triton.kernels.linear_cross_entropy import op
from bitnet_triton.models import head_loss
from bitnet_triton.nn import quantize_head, token_loss

TEXT = torch.tensor([[1, 5, 23, 71, 8, 40, 12, 66, 31, 7, 90, 55], [3, 9, 27, 4, 12, 36] + [0] * 6])
LABELS = TEXT.clone()
LABELS[0, :4] = -100
LABELS[1, 6:] = -100


def lora(model, targets, **kwargs):
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False, **kwargs}
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **settings))


def step(model, labels=LABELS, **kwargs):
    model.zero_grad()
    outputs = model.train()(TEXT, labels=labels, **kwargs)
    outputs.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return outputs, grads


def compare(model, error, limit=1e-5, **kwargs):
    """Take a step with logits and one without; both have to lose and to learn the same."""
    outputs, expected = step(model, **kwargs)
    skipped, found = step(model, skip_logits=True, **kwargs)
    assert outputs.logits is not None
    assert skipped.logits is None
    assert error(skipped.loss, outputs.loss) < limit
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert error(found[name], gradient) < limit, name


@pytest.fixture
def small_pieces(monkeypatch):
    """Let the logits of three tokens be there at a time."""
    for module in (token_loss, op):
        monkeypatch.setattr(module, "tokens_at_once", lambda words: 3)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["labels", "num_items_in_batch", "shift_labels"])
def test_masters_learn_what_they_learn_from_logits(tied, name, checkpoint, error):
    values = {"labels": LABELS, "num_items_in_batch": 7, "shift_labels": LABELS.flip(1)}
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("online", tied=tied))
    compare(model, error, **{name: values[name]})


@pytest.mark.peer
@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    "kwargs",
    [
        {"targets": "all-linear"},  # the head is none of them
        {"targets": ["q_proj", "lm_head"]},
        {"targets": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"targets": ["q_proj", "lm_head"], "lora_dropout": 0.5},
    ],
    ids=["no head", "head", "another head", "head with dropout"],
)
def test_adapters_learn_what_they_learn_from_logits(kwargs, checkpoint, error):
    model = lora(bt.BitNetForCausalLM.from_pretrained(checkpoint("packed")), **kwargs)
    if "lora_dropout" not in kwargs:
        compare(model, error)
        return
    torch.manual_seed(0)
    first, grads = step(model, skip_logits=True)
    torch.manual_seed(0)
    again, same = step(model, skip_logits=True)
    assert torch.equal(first.loss, again.loss)  # also what is run again in the backward
    assert all(torch.equal(same[name], gradient) for name, gradient in grads.items())
    assert step(model, skip_logits=True)[0].loss != first.loss


@pytest.mark.peer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_the_loss_is_that_of_bfloat16_logits(dtype, checkpoint, error):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("packed", dtype=dtype))
    # gradients are rounded to eight bits on their way through two layers: 0.022 was seen
    with torch.autocast("cpu", torch.bfloat16):
        compare(lora(model, "all-linear"), error, limit=8e-2)


def test_an_int8_head_is_evaluated_as_it_is(checkpoint, error):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("packed"))
    dense = model(TEXT, labels=LABELS).loss
    quantize_head(model)
    with torch.no_grad():
        expected = model(TEXT, labels=LABELS).loss
        assert error(model(TEXT, labels=LABELS, skip_logits=True).loss, expected) < 1e-6
    assert expected != dense


def test_without_any_label_the_loss_is_nan_and_nothing_is_learned(checkpoint):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("online"))
    labels = torch.full_like(TEXT, -100)
    for skip in (False, True):
        outputs, grads = step(model, labels=labels, skip_logits=skip)
        assert outputs.loss.isnan()
        assert all(gradient is not None and not gradient.any() for gradient in grads.values())
        outputs, _ = step(model, labels=labels, skip_logits=skip, num_items_in_batch=3)
        assert outputs.loss == 0


class MostFloats(TorchDispatchMode):
    """Notes the size of the largest float tensor that an operation makes."""

    def __init__(self, model):
        super().__init__()
        self.most = 0
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
            if is_float and value.untyped_storage().data_ptr() not in self.known:
                self.most = max(self.most, value.numel())
        return out


@pytest.mark.peer
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_a_step_holds_no_logits_of_all_tokens(targets, checkpoint, small_pieces):
    options = '{"vocab_size": 4096}'
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("packed", config=options))
    model = lora(model, targets)
    found = {}
    for skip in (False, True):
        with MostFloats(model) as floats:
            step(model, skip_logits=skip)
        found[skip] = floats.most
    assert found[False] >= TEXT.numel() * 4096
    # a gradient of the head's adapter is one as well
    assert found[True] <= 4 * 4096


def test_a_hook_on_the_head_sees_all_logits_and_is_told_of(checkpoint, caplog, error):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("online"))
    head_loss.tell_reader.cache_clear()
    expected = model(TEXT, labels=LABELS)
    seen = []
    handle = model.lm_head.register_forward_hook(lambda head, args, out: seen.append(out))
    with caplog.at_level("WARNING", logger="bitnet_triton"):
        outputs = model(TEXT, labels=LABELS, skip_logits=True)
    assert torch.equal(seen[0], expected.logits)
    assert torch.equal(outputs.loss, expected.loss)
    assert outputs.logits is None
    assert "logits" not in [*outputs]
    assert "`skip_logits` saves no memory: hooks on the output head" in caplog.text
    handle.remove()
    assert error(model(TEXT, labels=LABELS, skip_logits=True).loss, expected.loss) < 1e-6
    assert len(seen) == 1


def test_a_loss_function_of_ones_own_gets_logits(checkpoint):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("online"))
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    outputs = model(TEXT, labels=LABELS)
    skipped = model(TEXT, labels=LABELS, skip_logits=True)
    assert torch.equal(skipped.loss, outputs.logits.sum())
    assert skipped.logits is None


def test_what_else_a_call_returns_stays(checkpoint, error):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("packed"))
    kwargs = {"labels": LABELS, "output_hidden_states": True, "use_cache": True}
    outputs, skipped = model(TEXT, **kwargs), model(TEXT, skip_logits=True, **kwargs)
    assert [*skipped] == [name for name in outputs if name != "logits"]
    assert len(skipped.hidden_states) == 3
    assert skipped.past_key_values.get_seq_length() == TEXT.shape[1]
    loss, *_ = model(TEXT, skip_logits=True, return_dict=False, **kwargs)
    assert torch.equal(loss, skipped.loss)
    assert model(TEXT, skip_logits=False).logits is not None


@pytest.mark.parametrize("layers", ["checkpointing", "reversible"])
def test_layers_that_run_again_learn_the_same(layers, checkpoint, error):
    options = {"reversible": True, "use_cache": False} if layers == "reversible" else {}
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("online"), **options)
    if layers == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compare(model, error)


def test_a_compiled_model_loses_the_same(checkpoint, error):
    folder = checkpoint("online", config='{"num_hidden_layers": 1}')
    model = bt.BitNetForCausalLM.from_pretrained(folder)
    expected, grads = step(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    model.zero_grad()
    loss = compiled(TEXT, labels=LABELS, skip_logits=True, use_cache=False).loss
    loss.backward()
    assert error(loss, expected.loss) < 1e-5
    for name, parameter in model.named_parameters():
        assert error(parameter.grad, grads[name]) < 1e-4, name
    torch.compiler.reset()


def test_skipping_what_is_asked_for_is_refused(checkpoint):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("packed"))
    with pytest.raises(ValueError, match="`skip_logits`: expected `labels` to return a loss of"):
        model(TEXT, skip_logits=True)
    for keep in (1, torch.tensor([0])):
        with pytest.raises(ValueError, match="`logits_to_keep`: expected 0 beside `skip_logits`"):
            model(TEXT, labels=LABELS, skip_logits=True, logits_to_keep=keep)
    with pytest.raises(ValueError, match="`labels`: expected words from 0 to 95 or -100, got 96"):
        model(TEXT, labels=TEXT + 6, skip_logits=True)
