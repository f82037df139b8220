"""A model is taught another attention, and what it has learned is where it should be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import bitnet_triton as bt
from bitnet_triton.models.convert import convert_checkpoint
from bitnet_triton.nn import BitLinear, PackedBitLinear
from bitnet_triton.training import adapt as module
from bitnet_triton.training import calibration, documents, evaluation
from bitnet_triton.training import fit as fitting
from bitnet_triton.training.adapt import adapt, pretrain
from bitnet_triton.training.documents import load_documents
from bitnet_triton.training.fit import mean_loss
from bitnet_triton.training.jobs import Adaptation, Calibration, Pretraining
from bitnet_triton.training.tasks import Prompt

SMALL = {
    "tokens": 700, "length": 100, "row": 200, "eval_length": 64, "eval_samples": 1,
    "eval_tasks": ["passkey"], "question": "prompt", "rate": 1e-3,
}  # fmt: skip
WINDOWS = "swaa-trained:window=16"


@pytest.fixture(autouse=True)
def little_text(monkeypatch):
    """Measure the loss on four windows of text."""
    monkeypatch.setattr(evaluation, "_TEXT_TOKENS", 4 * SMALL["eval_length"])


def job(folder, output, kind=Adaptation, **changed):
    return kind(
        **{"output": str(output), "model": folder, "attention": WINDOWS, **SMALL, **changed}
    )


def logits(folder):
    model = bt.BitNetForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(torch.arange(40)[None] + 3).logits


def test_adapters_stay_beside_packed_weights_and_load_with_them(packed_folder, tmp_path):
    pytest.importorskip("peft")
    told = []
    report = adapt(
        job(packed_folder, tmp_path / "run"), lambda what, done, total, loss: told.append(what)
    )
    model = tmp_path / "run" / "model"
    assert (model / "adapter_model.safetensors").exists()
    before = load_file(Path(packed_folder, "model.safetensors"))
    after = load_file(model / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)
    loaded = bt.BitNetForCausalLM.from_pretrained(model)
    assert loaded.config.attention["decode"] == {"mode": "full"}
    assert loaded.config.attention["prefill"][0]["window"] == 16
    adapters = [name for name, _ in loaded.named_parameters() if "lora_B" in name]
    assert len(adapters) == 6  # of q, k and v in two layers
    plain = bt.BitNetForCausalLM.from_pretrained(packed_folder, attention=loaded.config.attention)
    with torch.no_grad():
        ids = torch.arange(40)[None] + 3
        assert not torch.equal(loaded(ids).logits, plain(ids).logits)
    assert report["training"]["tokens"] == 700
    assert report["training"]["steps"] == 4
    assert report["training"]["trained"] == sum(
        p.numel() for n, p in loaded.named_parameters() if "lora_" in n
    )
    assert report["before"].keys() == {"full", "adapted"}
    assert report["after"]["adapted"]["accuracy"]["prompt"].keys() == {"passkey"}
    saved = json.loads((tmp_path / "run" / "report.json").read_text())
    assert saved["training"] == report["training"]
    assert {"train", "documents, train", "after: adapted passkey"} <= set(told)


@pytest.mark.slow
def test_a_killed_adaptation_ends_with_the_same_bits(packed_folder, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    more = {"save_every": 2, "eval_tasks": []}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    script = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[3]); import test_adapt as t;"
        "t.evaluation._TEXT_TOKENS = 256;"
        "die = lambda what, done, total, loss: what == 'train' and done == 3 "
        "and os.kill(os.getpid(), signal.SIGKILL);"
        "t.adapt(t.job(sys.argv[1], sys.argv[2], save_every=2, eval_tasks=[]), die)"
    )
    here = str(Path(__file__).parent)
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", script, packed_folder, str(killed), here],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (killed / "checkpoints" / "checkpoint-2").is_dir()
    assert not (killed / "model").exists()
    steps = []
    second = adapt(
        job(packed_folder, killed, **more),
        lambda what, done, total, loss: steps.append(done) if what == "train" else None,
    )
    assert steps == [3, 4]
    first = adapt(job(packed_folder, whole, **more))
    adapters = [load_file(run / "model" / "adapter_model.safetensors") for run in (whole, killed)]
    assert all(torch.equal(adapters[1][name], value) for name, value in adapters[0].items())
    losses = [[line["loss"] for line in r["training"]["log"]] for r in (first, second)]
    assert losses[0] == losses[1]
    for name in ("loss_before", "loss_after"):
        assert first["training"][name] == second["training"][name]
    # nothing is trained again where all is done
    monkeypatch.setattr(module, "fit", None)
    assert adapt(job(packed_folder, whole, **more)) == first


def test_all_weights_are_trained_from_masters_and_packed(packed_folder, tmp_path):
    report = adapt(job(packed_folder, tmp_path / "run", lora=False, rate=1e-2, eval_tasks=[]))
    assert report["training"]["what"] == "weights"
    masters = bt.BitNetForCausalLM.from_pretrained(tmp_path / "run" / "trained")
    packed = bt.BitNetForCausalLM.from_pretrained(tmp_path / "run" / "model")
    start = bt.BitNetForCausalLM.from_pretrained(packed_folder)
    assert any(isinstance(m, BitLinear) for m in masters.modules())
    layers = [n for n, m in packed.named_modules() if isinstance(m, PackedBitLinear)]
    assert layers
    change = 0
    for name in layers:
        weight = masters.get_submodule(name).weight
        codes = (weight / weight.abs().mean()).round().clamp(-1, 1)
        got = packed.get_submodule(name).ternary_weight.codes()
        assert torch.equal(got, codes.to(torch.int8)), name
        change += (got != start.get_submodule(name).ternary_weight.codes()).sum().item()
    assert change > 0
    line = report["training"]["log"][-1]
    assert {"flips", "share_zero", "quantization_error"} <= line.keys()


OWN_WEIGHTS = {
    "weights": {"attention": '{"prefill": ["full", "linear"], "decode": ["full", "linear"]}'},
    "module": {
        "attention": '{"mode": "indexed_blocks", "block": 8, "selected": 2, "stage": "dense"}'
    },
}


@pytest.mark.parametrize("what", OWN_WEIGHTS)
def test_weights_that_can_be_trained_already_are_read_where_they_lie(what, packed_folder, tmp_path):
    masters, run = tmp_path / "masters", tmp_path / "run"
    convert_checkpoint(packed_folder, masters, to="masters", dtype=torch.float32)
    before = load_file(masters / "model.safetensors")
    more = {"lora": False, "transfer": 1} if what == "weights" else {}
    report = adapt(job(str(masters), run, eval_tasks=[], **OWN_WEIGHTS[what], **more))
    assert report["training"]["what"] == what
    assert bool(report["training"]["transfer"]) == (what == "weights")
    assert not (run / "masters").exists()
    after = load_file(masters / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    packed = bt.BitNetForCausalLM.from_pretrained(run / "model")
    assert any(isinstance(m, PackedBitLinear) for m in packed.modules())
    if what == "module":  # the same codes as before
        start = bt.BitNetForCausalLM.from_pretrained(packed_folder)
        for name, layer in start.named_modules():
            if isinstance(layer, PackedBitLinear):
                codes = packed.get_submodule(name).ternary_weight.codes()
                assert torch.equal(codes, layer.ternary_weight.codes())


def test_merged_adapters_are_gone_and_their_loss_is_told(packed_folder, tmp_path):
    pytest.importorskip("peft")
    report = adapt(
        job(packed_folder, tmp_path / "run", merge=True, rate=3e-2, eval_tasks=[])
    )  # fmt: skip
    model = tmp_path / "run" / "model"
    assert not (model / "adapter_model.safetensors").exists()
    merge = report["training"]["merge"]
    assert 0 < merge["changed_codes"] < 1
    assert merge["logits_change"] > 0
    merged, beside = (
        mean_loss(
            bt.BitNetForCausalLM.from_pretrained(folder, fuse=False),
            load_documents(tmp_path / "run" / "held_out.jsonl"), SMALL["row"],
        )
        for folder in (model, tmp_path / "run" / "beside")
    )  # fmt: skip
    assert merge["loss"] == pytest.approx(merged, rel=1e-3)
    assert report["training"]["loss_after"] == pytest.approx(beside, rel=1e-3)
    assert merged != pytest.approx(beside, rel=1e-3)  # adapters are kept, and another model
    before = load_file(Path(packed_folder, "model.safetensors"))
    after = load_file(model / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(any(f".{p}_proj." in name for p in "qkv") for name in changed)


def test_a_mode_that_trains_its_own_weights_leaves_the_model_as_it_is(packed_folder, tmp_path):
    plan = '{"mode": "indexed_blocks", "block": 8, "selected": 2, "stage": "dense"}'
    report = adapt(job(packed_folder, tmp_path / "run", attention=plan, eval_tasks=[]))
    assert report["training"]["what"] == "module"
    assert report["before"].keys() == {"full"}  # the index knows nothing yet
    before = load_file(Path(packed_folder, "model.safetensors"))
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)
    own = {name: value for name, value in after.items() if name not in before}
    assert own
    assert all(".indexed_blocks." in name for name in own)
    assert sum(value.numel() for value in own.values()) == report["training"]["trained"]
    start = adapt(
        job(packed_folder, tmp_path / "still", attention=plan, eval_tasks=[], rate=1e-9)
    )  # fmt: skip
    still = load_file(tmp_path / "still" / "model" / "model.safetensors")
    assert any(not torch.equal(own[name], still[name]) for name in own)
    assert start["training"]["what"] == "module"


def test_training_from_scratch_learns_a_text_of_ones_own(packed_folder, tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("import os\n\n\ndef read_lines(path):\n    return path\n" * 150)
    report = pretrain(
        job(
            packed_folder, tmp_path / "run", Pretraining, attention="full", data=str(text),
            scratch=True, tokens=3000, rate=2e-2, warm_up=0.2, eval_tasks=None,
        )
    )  # fmt: skip
    trained = report["training"]
    assert all(line["flips"] > 0 for line in trained["log"][1:3])  # its weights are ternary
    assert report["before"] == {}
    assert report["after"]["adapted"]["accuracy"] == {"prompt": {}}
    assert trained["loss_after"] < 0.7 * trained["loss_before"]
    rates = [line["learning_rate"] for line in trained["log"]]
    assert max(rates) <= 2e-2
    half = len(rates) // 2 + 1
    assert rates[half] < rates[half - 2] * 0.8  # the second stage begins lower
    assert bt.BitNetForCausalLM.from_pretrained(tmp_path / "run" / "model").config.attention is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"attention": "lsh_sampling"}, "`attention`: 'lsh_sampling' has no gradient"),
        ({"attention": "slidin:window=3"}, "did you mean 'sliding'"),
        ({"attention": "native_sparse"}, "`lora`: the attention brings weights of its own"),
        ({"attention": "streaming:window=16"}, "`attention`: cannot be trained on packed"),
        ({"transfer": 1}, "`transfer`: expected a mode that brings weights"),
        (
            {"attention": "linear:form=plain", "transfer": 1, "lora": False},
            "`transfer`: expected a mode that brings weights .* got linear",
        ),
        ({"targets": ["q_prj"]}, "`targets`: .*q_prj"),
        ({"length": 1024, "tokens": 2000, "row": 0}, "`length`: expected up to 512, got 1024"),
        ({"data": "nowhere.txt"}, "`data`: .*nowhere.txt: No such file"),
        ({"model": "no/where/at/all"}, "`model`: expected a folder"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(
    changed, message, packed_folder, tmp_path, monkeypatch
):
    pytest.importorskip("peft")
    monkeypatch.setattr(fitting, "Trainer", TrainerCallback)  # which trains nothing
    with pytest.raises(ValueError, match=message):
        adapt(job(packed_folder, tmp_path / "run", **changed))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"tokens": 10}, ValueError, "`tokens`: expected at least a document of 100"),
        ({"row": 50}, ValueError, "`row`: expected at least a document"),
        ({"rate": 0}, ValueError, "`rate`: expected a number above 0"),
        ({"rate": "fast"}, TypeError, "`rate`: expected a number"),
        ({"rank": 1.5}, TypeError, "`rank`: expected an integer"),
        ({"text": 2}, ValueError, "`text`: .*up to 1, got 2"),
        ({"question": "later"}, ValueError, "`question`: expected prompt, decode or both"),
        ({"eval_tasks": ["recal"]}, ValueError, "`eval_tasks`: .*did you mean 'recall'"),
        ({"targets": "q_proj"}, TypeError, "`targets`: expected a list"),
        ({"merge": True, "lora": False}, ValueError, "`merge`: expected adapters"),
        ({"self_distill": "yes"}, TypeError, "`self_distill`: expected true or false"),
        ({"output": ""}, TypeError, "`output`: expected a word"),
    ],
)
def test_options_are_checked_when_they_are_made(changed, error, message):
    with pytest.raises(error, match=message):
        job("recall", changed.pop("output", "run"), **changed)


class ReachedError(Exception):
    pass


@pytest.fixture
def stops(monkeypatch):
    """Stop runs where they would make documents."""

    def stop(*_):
        raise ReachedError

    monkeypatch.setattr(module, "gather_documents", stop)
    monkeypatch.setattr(calibration, "gather_documents", stop)
    monkeypatch.setattr(module.Trainee, "try_step", lambda self: None)


KINDS = {
    "adapt": (adapt, Adaptation, {"lora": False, "eval_length": 64}),
    "train": (pretrain, Pretraining, {"eval_length": 64}),
    "calibrate": (calibration.calibrate, Calibration, {}),
}


@pytest.mark.parametrize(("run", "kind", "more"), KINDS.values(), ids=KINDS)
def test_data_go_by_what_they_say(run, kind, more, packed_folder, tmp_path, stops):
    names = ("tokens", "length", "question")
    given = {name: SMALL[name] for name in names} | more | {"attention": WINDOWS}

    def go(path):
        run(kind(output=str(tmp_path / "run"), model=str(packed_folder), data=str(path), **given))

    file, moved = tmp_path / "data.txt", tmp_path / "moved.txt"
    file.write_text("a red fox")
    moved.write_text("a red fox")
    for path in (file, moved):
        with pytest.raises(ReachedError):
            go(path)
    file.write_text("a red dog")
    with pytest.raises(ValueError, match=r"`output`: .* other data .files and models go by what"):
        go(file)


@pytest.mark.parametrize(("run", "kind", "more"), KINDS.values(), ids=KINDS)
def test_a_length_without_room_is_refused_before_a_folder_is_made(
    run, kind, more, packed_folder, tmp_path, stops, monkeypatch
):
    given = {"length": 64, "tokens": 64, "attention": WINDOWS} | more
    job = kind(output=str(tmp_path / "run"), model=str(packed_folder), **given)
    with monkeypatch.context() as patch:
        patch.setattr(documents, "draw_prompt", lambda *_: ([], Prompt([], [], [])))
        with pytest.raises(ValueError, match="`length`: expected room for a task"):
            run(job)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ReachedError):
        run(job)


def test_a_folder_of_something_else_is_refused(packed_folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes").write_text("mine")
    with pytest.raises(ValueError, match="`output`: expected a new folder"):
        pretrain(job(packed_folder, run, Pretraining))
    (run / "run.json").write_text(json.dumps({"seed": 7}))
    with pytest.raises(ValueError, match=r"holds a run with other .*seed"):
        pretrain(job(packed_folder, run, Pretraining))
    assert (run / "notes").read_text() == "mine"
