"""What memories keep beside kvpress: our side answers as ``evaluate`` does; tables are right."""

import json

import pytest
import torch
from transformers import AutoTokenizer
from transformers.cache_utils import DynamicCache
from typer.testing import CliRunner

import bitnet_triton as bt
from bench.__main__ import app
from bench.eviction import (
    BUDGETS,
    PAIRS,
    TWICE,
    Kvpress,
    Ours,
    OursTwice,
    ask,
    compare,
    kept_rows,
    label,
    spell,
)
from bitnet_triton.training.answers import ask as ask_by_generate
from bitnet_triton.training.answers import make_prompts
from bitnet_triton.training.perplexity import windows
from bitnet_triton.training.tasks import TASKS, TextTokens


@pytest.fixture(scope="module")
def tokens():
    return TextTokens(AutoTokenizer.from_pretrained(bt.RECALL_MODEL))


@pytest.fixture(scope="module")
def sides():
    return [side(bt.RECALL_MODEL, torch.float32) for side in (Ours, OursTwice)]


def test_all_choices_from_one_reading_answer_as_each_alone(tokens, sides):
    prompt = next(make_prompts("recall", TASKS["recall"], tokens, 300, 1, [0.5], seed_of_run()))
    found = {}
    for side in sides:
        found |= ask(side, tokens, "recall", prompt, "unseen")
    assert found["plain 1"]["score"] >= 50  # what it was trained for
    rows = kept_rows(len(prompt.context), 0.2)
    for name in (*PAIRS, TWICE[0]):
        memory = f"{name}{',' if ':' in name else ':'}budget={rows}"
        alone = ask_by_generate(
            sides[0].model, tokens, TASKS["recall"], [prompt], question="decode", cache=memory
        )[0]
        score = 100 * sum(answer.score for answer in alone) / len(alone)
        one = found[label((name, 0.2))]
        # one answer may turn: steps that are recorded add up in another order
        assert abs(one["score"] - score) <= 101 / len(alone), name
        # three layers with 4 heads of 64 float32, keys and values
        assert one["bytes"] == rows * 3 * 2 * 4 * 64 * 4


def test_a_question_that_is_seen_ends_with_a_token_that_is_not(tokens, sides, monkeypatch):
    prompt = next(make_prompts("copy", TASKS["copy"], tokens, 300, 1, [0.5], 3))
    read = []
    before = Ours.read
    monkeypatch.setattr(Ours, "read", lambda side, ids: (read.append(ids), before(side, ids))[1])
    ask(sides[0], tokens, "copy", prompt, "seen")
    assert read[0].tolist() == [prompt.context + prompt.turns[0].question[:-1]]


def test_text_through_what_is_kept_costs_what_it_costs_without_a_cache(tokens, sides):
    text = windows(tokens, 256, 1)[0]
    found = spell(sides[0], tokens, text)
    ids = torch.tensor([text])
    with torch.no_grad():
        logits = sides[0].model(ids, use_cache=False).logits[0, 128:-1].double()
    nats = torch.nn.functional.cross_entropy(logits, ids[0, 129:], reduction="sum")
    size = len(tokens.tokenizer.decode(text[129:]).encode())
    exact = float(nats) / size / torch.log(torch.tensor(2.0)).item()
    # codes of activations may turn where pieces are read
    assert found["plain 1"]["score"] == pytest.approx(exact, rel=0.02)
    assert set(found) == {"plain 1", *(label((n, s)) for n in PAIRS for s in BUDGETS)}


def test_differences_are_taken_prompt_by_prompt():
    found = compare([100, 50, 0, 50], [50, 50, 0, 0])
    assert found["difference"] == 25
    # differences 50, 0, 0, 50: their standard deviation is 28.87
    assert found["half_interval"] == pytest.approx(1.96 * 28.8675 / 2, rel=1e-4)


def test_the_command_goes_on_and_names_what_is_missing(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("bench.peers.KVPRESS.__class__.missing", lambda self: "kvpress: not there")
    target = tmp_path / "eviction.json"
    command = ["eviction", "--parts", str(tmp_path / "parts"), "--task", "recall", "--length"]
    command += ["256", "--question", "unseen", "--output", str(target), "--threads", "1"]
    for samples in (1, 2):
        outcome = CliRunner().invoke(app, [*command, "--samples", str(samples)])
        assert outcome.exit_code == 0, outcome.output
    data = json.loads(target.read_text())
    assert data["missing"] == "kvpress: not there"
    rows = data["table"]["unseen"]["recall"]["rows"]
    assert {row["n"] for row in rows.values()} == {2}
    assert "kvzip 0.1" in rows
    assert target.with_suffix(".png").stat().st_size > 10_000
    lines = (tmp_path / "parts" / "256-0-unseen-recall.jsonl").read_text().splitlines()
    assert len(lines) == 4  # two prompts, each read once by each of our two sides
    wrong = CliRunner().invoke(app, [*command, "--task", "recal"])
    assert isinstance(wrong.exception, ValueError)


@pytest.mark.peer
def test_presses_keep_what_they_keep_by_themselves(tokens):
    pytest.importorskip("kvpress")
    side = Kvpress(bt.RECALL_MODEL, torch.float32)
    ids = torch.randint(10, 1000, (1, 200))
    with torch.inference_mode():
        (here,) = [r for r in side._scored(ids) if r.choices[0][1] == 0.2]
        for row, (name, share) in enumerate(here.choices):
            cache = DynamicCache(config=side.model.config)
            side.model.set_attn_implementation("eager")
            with side.press(name, share)(side.model):
                side.model(ids, past_key_values=cache, use_cache=True)
            for one, other in zip(cache.layers, here.cache.layers):
                assert torch.equal(one.keys[0].sort(1).values, other.keys[row].sort(1).values)


def seed_of_run():
    return int(torch.randint(1000, (1,)))
