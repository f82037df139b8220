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
from bitnet_triton.training.calibration import Cost
from bitnet_triton.training.documents import load_documents

SMALL = {"tokens": 400, "length": 128, "question": "prompt"}


def job(folder, output, **changed):
    given = {"output": str(output), "model": str(folder), "attention": "sliding:window=16"}
    return Calibration(**{**given, **SMALL, **changed})


def added(folder, attention, documents):
    """Return what a plan adds to the costs of answers, by whole logits of a model with it."""
    whole, changed = (
        bt.BitNetForCausalLM.from_pretrained(folder, attention=plan, fuse=False)
        for plan in ({"mode": "full"}, attention)
    )
    found = []
    for document in documents:
        ids, labels = (torch.tensor(document[name]) for name in ("input_ids", "labels"))
        counts = labels[1:] != -100
        costs = []
        for model in (changed, whole):
            with torch.no_grad():
                logits = model(ids[None], prompt_len=document["prompt_len"]).logits[0, :-1]
            p = logits.double().softmax(-1).gather(1, ids[1:, None])[counts]
            costs.append(torch.stack([1 - p, -p.log()]).mean((1, 2)))
        found.append((costs[0] - costs[1]).tolist())
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
        found = {full: added(bt.RECALL_MODEL, plan, documents) for full, plan in every.items()}
        best = min(found, key=lambda full: sum(harm for harm, _ in found[full]))
        chosen = report["plans"][report["chosen"]]
        assert tuple(chosen["full"]) == best
        for plan in report["plans"].values():
            if wanted := found.get(tuple(plan["full"])):
                harms, losses = zip(*wanted)
                close = {"rel": 1e-3, "abs": 1e-4}
                assert plan["harm"] == pytest.approx(statistics.fmean(harms), **close)
                assert plan["error"] == pytest.approx(statistics.stdev(harms) / 3**0.5, **close)
                assert plan["loss"] == pytest.approx(statistics.fmean(losses), **close)
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


def test_answers_cost_what_their_labels_say(monkeypatch):
    """The labels are asked for, not what stands in the text; predictions are taken in parts."""
    monkeypatch.setattr(calibration, "_POSITIONS", 7)
    model = bt.BitNetForCausalLM.from_pretrained(bt.RECALL_MODEL, attention="full")
    ids, other = (torch.randint(5, model.config.vocab_size, (40,)) for _ in range(2))
    labels = torch.where(torch.arange(40) < 20, -100, other)
    labels[30] = -100
    texts = [(ids, labels, 20), (ids, ids, 40)]
    costs = calibration.answer_costs(
        model,
        [
            {"input_ids": ids.tolist(), "labels": labels.tolist(), "prompt_len": prompt_len}
            for ids, labels, prompt_len in texts
        ],
    )
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1].double()
    for (_, labels, _), cost in zip(texts, costs):
        losses = F.cross_entropy(logits, labels[1:], reduction="none")[labels[1:] != -100]
        assert cost.loss == pytest.approx(losses.mean().item(), rel=1e-3)
        assert cost.missed == pytest.approx((1 - (-losses).exp()).mean().item(), rel=1e-3)


def test_what_changes_nothing_is_told(packed_folder, tmp_path):
    """Blocks that a mode's settings do not tell about: found out by trying it on the documents."""
    with pytest.raises(ValueError, match="as good as full attention on documents of up to 128"):
        calibrate(job(packed_folder, tmp_path, attention="local:block=256"))


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
        losses = [-harm for harm in found]  # is told, and not what layers are chosen by
        return [
            [Cost(harm - 0.5, loss), Cost(harm + 0.5, loss)] for harm, loss in zip(found, losses)
        ]

    config = bt.BitNetConfig.from_pretrained(packed_folder)
    config.num_hidden_layers = 4
    asked = job(packed_folder, tmp_path, full_layers=2)
    report = calibration._choose(asked, calibration._Target(asked, config), harms)
    assert [row["layer"] for row in report["layers"]] == [3, 2, 0, 1]
    assert report["plans"]["most harmed"]["full"] == [2, 3]
    assert report["chosen"] == "every 2 from 1"
    assert report["plans"]["every 2 from 1"]["harm"] == pytest.approx(0.11)
    assert report["plans"]["every 2 from 1"]["loss"] == pytest.approx(-0.11)
    assert all(row["error"] == pytest.approx(0.5) for row in report["plans"].values())
    assert report["attention"] == report["plans"]["every 2 from 1"]["attention"]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"attention": "checkpoint"}, ValueError, "`attention`: expected what to change layers to"),
        ({"attention": "linear"}, ValueError, "'linear' brings weights of its own"),
        ({"attention": "slidin"}, ValueError, "did you mean 'sliding'"),
        ({"attention": "nowhere.json"}, ValueError, "`attention`: expected a file .*nowhere.json"),
        ({"attention": 3}, TypeError, "`attention`: expected a word"),
        ({"attention": "sliding:window=128"}, ValueError, "128 tokens .`length`.; lower its `win"),
        ({"attention": "swaa-trained"}, ValueError, "as good as full .* raise `length`"),
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
    assert not (tmp_path / "run").exists()  # nothing was computed
