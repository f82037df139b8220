"""Calibration finds the layers that a model needs, and says truly what changing them harms."""

from __future__ import annotations

import itertools
import json
import statistics

import pytest
import torch
import torch.nn.functional as F

import bitnet_triton as bt
from bitnet_triton.attention import AttentionPlan
from bitnet_triton.training import Calibration, calibrate, calibration, parse_setting
from bitnet_triton.training.documents import load_documents

SMALL = {"tokens": 400, "length": 128, "question": "prompt"}


def job(folder, output, **changed):
    """Ask for a calibration: by answers of the recall model, by the text of a random one."""
    given = {"output": str(output), "model": str(folder), "attention": "sliding:window=16"}
    text = 0.0 if folder == bt.RECALL_MODEL else 1.0
    return Calibration(**{**given, **SMALL, "text": text, **changed})


def harm(folder, attention, documents):
    """Return what a plan adds to the loss of answers, by whole logits of a model loaded with it."""
    whole, changed = (
        bt.BitNetForCausalLM.from_pretrained(folder, attention=plan, fuse=False)
        for plan in ({"mode": "full"}, attention)
    )
    found = []
    for document in documents:
        ids, labels = (torch.tensor(document[name]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            known, moved = (
                model(ids[None], prompt_len=document["prompt_len"]).logits[0, :-1].double()
                for model in (whole, changed)
            )
        right = (known.argmax(-1) == labels[1:]) & (labels[1:] != -100)
        losses = [F.cross_entropy(logits[right], labels[1:][right]) for logits in (moved, known)]
        found.append((losses[0] - losses[1]).item())
    return found


def test_the_layer_that_recall_needs_is_found_and_its_plan_is_the_best(tmp_path):
    """The recall model finds with its middle layer; all plans of one and of two are compared."""
    for count in (1, 2):
        report = calibrate(job(bt.RECALL_MODEL, tmp_path / str(count), full_layers=count))
        documents = load_documents(tmp_path / str(count) / "documents.jsonl")
        assert len(documents) == report["documents"] == 3
        assert report["layers"][0]["layer"] == 1
        harms = [row["harm"] for row in report["layers"]]
        assert harms == sorted(harms, reverse=True)
        changed = {"mode": "sliding", "window": 16}
        every = {
            chosen: {"prefill": layers, "decode": layers}
            for chosen in itertools.combinations(range(3), count)
            for layers in [[{"mode": "full"} if i in chosen else changed for i in range(3)]]
        }
        found = {full: harm(bt.RECALL_MODEL, plan, documents) for full, plan in every.items()}
        best = min(found, key=lambda full: sum(found[full]))
        chosen = report["plans"][report["chosen"]]
        assert tuple(chosen["full"]) == best
        for plan in report["plans"].values():
            if wanted := found.get(tuple(plan["full"])):
                mean, error = statistics.fmean(wanted), statistics.stdev(wanted) / 3**0.5
                close = {"rel": 1e-3, "abs": 1e-4}
                assert plan["harm"] == pytest.approx(mean, **close)
                assert plan["error"] == pytest.approx(error, **close)
        rules = [plan["full"] for name, plan in report["plans"].items() if name.startswith("every")]
        assert sorted(rules) == ([[0], [1], [2]] if count == 1 else [[0, 2]])
        assert report["attention"] == chosen["attention"]
        file = tmp_path / str(count) / "attention.json"
        setting = parse_setting(str(file))
        plan = AttentionPlan.from_config(setting.attention, 3)
        assert [mode.sees_everything for mode in plan.prefill] == [i in best for i in range(3)]
        loaded = bt.BitNetForCausalLM.from_pretrained(
            bt.RECALL_MODEL, attention=json.loads(file.read_text())
        )
        assert loaded.attention_plan == plan


def test_a_preset_keeps_its_settings_and_gets_other_layers(tmp_path):
    report = calibrate(
        job(bt.RECALL_MODEL, tmp_path, attention="swaa-trained:window=16", full_layers=0.34)
    )
    assert report["attention"] == {"preset": "swaa-trained", "window": 16, "full_layers": [1]}
    plan = AttentionPlan.from_config(report["attention"], 3)
    assert [mode.sees_everything for mode in plan.prefill] == [False, True, False]
    assert all(mode.sees_everything for mode in plan.decode)


def test_layers_that_are_full_anyhow_stay_so_and_count(packed_folder, tmp_path):
    windows = {"mode": "sliding", "window": 16}
    layers = [{"mode": "full"}, windows]
    attention = {"prefill": layers, "decode": layers}
    report = calibrate(job(packed_folder, tmp_path, attention=attention, full_layers=1))
    assert [row["layer"] for row in report["layers"]] == [1]
    assert {name: plan["full"] for name, plan in report["plans"].items()} == {
        "most harmed": [0], "every 2 from 0": [0], "no other layer": [0],
    }  # fmt: skip
    with pytest.raises(ValueError, match="`full_layers`: expected 1 to 1 of 2 layers, got 0"):
        calibrate(job(packed_folder, tmp_path, attention=attention, full_layers=0))


def test_tokens_count_that_full_attention_expects(monkeypatch):
    """Of an answer, what is predicted right; of a text, everything but its first token."""
    model = bt.BitNetForCausalLM.from_pretrained(bt.RECALL_MODEL, attention="full")
    ids = torch.randint(5, model.config.vocab_size, (40,)).tolist()
    with torch.no_grad():
        likely = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
    wrong = [(token + 1) % model.config.vocab_size for token in likely]
    # what stands in the text is read, what the labels say is asked for
    labels = [-100] * 30 + [likely[29], wrong[30], likely[31], -100, wrong[33], *likely[34:39]]
    answers = {"input_ids": ids, "labels": labels, "prompt_len": 30}
    text = {"input_ids": ids, "labels": ids, "prompt_len": 40}
    unknown = {"input_ids": ids, "labels": [-100] * 30 + wrong[29:39], "prompt_len": 30}
    found = calibration.known_answers(model, [answers, unknown, text])
    kept = [-100] * 30 + [likely[29], -100, likely[31], -100, -100, *likely[34:39]]
    assert found == [{**answers, "labels": kept}, text]
    monkeypatch.setattr(calibration, "_POSITIONS", 7)
    losses = calibration.answer_losses(model, [answers, text])
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    for document, loss in zip((answers, text), losses):
        wanted = F.cross_entropy(logits, torch.tensor(document["labels"][1:])).item()
        assert loss == pytest.approx(wanted, rel=1e-3)


def test_a_model_that_answers_nothing_is_told_so(packed_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "known_answers", lambda model, documents: [])
    with pytest.raises(ValueError, match="`data`: with full attention, the model predicts nothing"):
        calibrate(job(packed_folder, tmp_path, text=0.0))


def test_a_killed_calibration_goes_on(packed_folder, tmp_path, monkeypatch):
    class KilledError(Exception):
        pass

    def die(what, done, total, loss):
        if what == "one layer":
            raise KilledError

    measured = []
    measure = calibration._Harms._measure
    monkeypatch.setattr(
        calibration._Harms,
        "_measure",
        lambda self, full: measured.append(full) or measure(self, full),
    )
    with pytest.raises(KilledError):
        calibrate(job(packed_folder, tmp_path / "killed"), die)
    assert [len(full) for full in measured] == [2, 0, 1]  # both layers, none, and one
    report = calibrate(job(packed_folder, tmp_path / "killed"))
    assert len(measured) == len(set(measured)) == 4
    whole = calibrate(job(packed_folder, tmp_path / "whole"))
    assert report["plans"] == whole["plans"]
    assert report["layers"] == whole["layers"]
    monkeypatch.setattr(calibration._Harms, "_measure", None)
    assert calibrate(job(packed_folder, tmp_path / "whole")) == whole
    with pytest.raises(ValueError, match=r"holds a run with other .*attention"):
        calibrate(job(packed_folder, tmp_path / "whole", attention="sliding:window=17"))


def test_a_rule_that_harms_less_than_the_most_harmed_layers_is_chosen(packed_folder, tmp_path):
    """Layers 0 and 1 do the same, so neither harms alone; layers 2 and 3 harm a little."""

    def harms(what, plans):
        found = [
            0.1 * (2 not in full) + 0.2 * (3 not in full) + 5.0 * (not full & {0, 1}) + 0.01
            for full in plans
        ]
        return [[harm - 0.5, harm + 0.5] for harm in found]

    config = bt.BitNetConfig.from_pretrained(packed_folder)
    config.num_hidden_layers = 4
    asked = job(packed_folder, tmp_path, full_layers=2)
    report = calibration._choose(asked, calibration._Target(asked, config), harms)
    assert [row["layer"] for row in report["layers"]] == [3, 2, 0, 1]
    assert report["plans"]["most harmed"]["full"] == [2, 3]
    assert report["chosen"] == "every 2 from 1"
    assert report["plans"]["every 2 from 1"]["harm"] == pytest.approx(0.11)
    assert {row["error"] for row in report["plans"].values()} == {pytest.approx(0.5)}
    assert report["attention"] == report["plans"]["every 2 from 1"]["attention"]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"attention": "checkpoint"}, ValueError, "`attention`: expected what to change layers to"),
        ({"attention": "linear"}, ValueError, "'linear' brings weights of its own"),
        ({"attention": "slidin"}, ValueError, "did you mean 'sliding'"),
        ({"attention": "nowhere.json"}, ValueError, "`attention`: expected a file .*nowhere.json"),
        ({"attention": 3}, TypeError, "`attention`: expected a word"),
        ({"attention": "sliding:window=500"}, ValueError, "as good as full attention on documents"),
        ({"full_layers": 3}, ValueError, "`full_layers`: expected up to 2, got 3"),
        ({"full_layers": 2}, ValueError, "`full_layers`: expected 0 to 1 of 2 layers, got 2"),
        ({"full_layers": 1.5}, ValueError, "`full_layers`: expected a share below 1 or a number"),
        ({"self_distill": "yes"}, TypeError, "`self_distill`: expected true or false"),
        ({"length": 1024, "tokens": 2048}, ValueError, "`length`: expected up to 512"),
    ],
)
def test_what_cannot_be_calibrated_is_named(changed, error, message, packed_folder, tmp_path):
    with pytest.raises(error, match=message):
        calibrate(job(packed_folder, tmp_path / "run", **changed))
