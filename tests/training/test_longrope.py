"""Factors that a search finds never fall, are the same after a kill, and load in transformers."""

from __future__ import annotations

import json
from itertools import pairwise
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitnet_triton as bt
from bitnet_triton.cli import app
from bitnet_triton.models.extend import extend_context, stretch_of
from bitnet_triton.training import longrope as module
from bitnet_triton.training.longrope import LongRopeJob, loss_of, search_longrope
from bitnet_triton.training.monotone import evolve, mutate
from bitnet_triton.training.tasks.haystack import documentation

SEEDS = {"PI": (4.0,) * 8, "NTK": tuple(4 ** (i / 7) for i in range(8)), "none": (1.0,) * 8}


def distance(factors):
    wanted = [1, 1, 1.5, 2, 2.5, 2.5, 3, 4.5]
    return sum((a - b) ** 2 for a, b in zip(factors, wanted))


def test_lists_never_fall_and_get_better():
    found = list(evolve(SEEDS, distance, most=5, population=16, rounds=30, seed=0))
    for generation in found:
        for _, factors in generation.ranked:
            assert all(a <= b for a, b in pairwise(factors))
            assert factors[0] >= 1
            assert factors[-1] <= 5
    best = [generation.ranked[0][0] for generation in found]
    assert best == sorted(best, reverse=True)
    assert best[-1] < 0.25 * min(map(distance, SEEDS.values()))


def test_a_seed_gives_one_search():
    sizes = {"most": 5, "population": 8, "rounds": 3}
    runs = [list(evolve(SEEDS, distance, seed=seed, **sizes)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_mutations_keep_between_neighbours_that_stand_off_the_grid():
    rng = Random(0)
    tight = (1.0, 1.123456, 1.123457, 1.126, 3.0)
    for _ in range(200):
        child = mutate(tight, 3.0, rng)
        assert all(a <= b for a, b in pairwise((1.0, *child, 3.0)))


def test_seeds_are_what_transformers_divides_by(packed_folder):
    model = bt.BitNetForCausalLM.from_pretrained(packed_folder)
    plain = model.base_model.rotary_emb.inv_freq.clone()
    for method in ("linear", "ntk", "yarn"):
        factors = torch.tensor(stretch_of(model, 4, method), dtype=torch.float64)
        extended = bt.BitNetForCausalLM.from_pretrained(packed_folder)
        slower = extend_context(extended, 4, method).base_model.rotary_emb.inv_freq
        torch.testing.assert_close(plain / factors, slower.double(), rtol=2e-6, atol=0)
    assert torch.equal(model.base_model.rotary_emb.inv_freq, plain)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(documentation(held_out=False)[:20_000], encoding="utf-8")
    return str(path)


@pytest.fixture
def short_model(packed_folder, tmp_path):
    """A model that says it was trained on 64 tokens."""
    model = bt.BitNetForCausalLM.from_pretrained(packed_folder, fuse=False)
    folder = tmp_path / "short"
    model.config.max_position_embeddings = 64
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((module.Path(packed_folder) / name).read_bytes())
    return str(folder)


@pytest.fixture
def job(short_model, text_file, tmp_path):
    def make(name, **changed):
        small = {"factor": 4, "samples": 2, "population": 6, "generations": 2, "recover": True}
        options = {"model": short_model, "texts": [text_file], **small, **changed}
        return LongRopeJob(output=str(tmp_path / name), **options)

    return make


def test_a_killed_search_goes_on_to_the_same_result(job, tmp_path, monkeypatch):
    whole = search_longrope(job("whole"))
    real, calls = loss_of, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "loss_of", killed)
    with pytest.raises(KeyboardInterrupt):
        search_longrope(job("killed"))
    assert search_longrope(job("killed")) == whole
    # what was known was not asked for again
    asked = (tmp_path / "whole" / "lines.jsonl").read_text().splitlines()
    assert len(calls) == len(asked) + 1
    with pytest.raises(ValueError, match="holds a run with other factor"):
        search_longrope(job("whole", factor=8))


def test_the_result_is_a_checkpoint_of_transformers_with_the_losses_that_were_found(job, tmp_path):
    report = search_longrope(job("run", attention_factor=1.05))
    folder = tmp_path / "run" / "model"
    parameters = json.loads((folder / "config.json").read_text())["rope_parameters"]
    assert parameters["rope_type"] == "longrope"
    assert parameters["original_max_position_embeddings"] == 64
    assert parameters["attention_factor"] == 1.05
    for stage in ("long", "short"):
        factors = parameters[f"{stage}_factor"]
        assert factors == report[stage]["factors"]
        assert all(a <= b for a, b in pairwise([1.0, *factors]))
        assert report[stage]["loss"] <= min(report[stage]["seeds"].values())

    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ours = bt.BitNetForCausalLM.from_pretrained(folder)
    assert type(theirs).__module__.startswith("transformers.")
    assert ours.config.max_position_embeddings == 256
    for length in (50, 200):
        ids = torch.randint(3, 1000, (1, length))
        with torch.no_grad():
            want, got = (model(ids, use_cache=False).logits for model in (theirs, ours))
        torch.testing.assert_close(got, want, rtol=1e-2, atol=2e-2 * want.abs().max().item())

    # the model that stayed in memory was judged by the factors that it was given
    tokens = module.TextTokens(module.AutoTokenizer.from_pretrained(folder), held_out=False)
    for stage, length in (("long", 256), ("short", 64)):
        probes = module._probes(job("run"), tokens, length)
        again = loss_of(ours, f"{stage}_factor", tuple(report[stage]["factors"]), probes)
        assert again == pytest.approx(report[stage]["loss"], rel=1e-6)
        other = loss_of(ours, f"{stage}_factor", (9.0,) * len(report[stage]["factors"]), probes)
        assert other != pytest.approx(again, rel=1e-6)


def test_needles_are_judged_by_their_answers_alone(job, packed_folder):
    tokens = module.TextTokens(module.AutoTokenizer.from_pretrained(packed_folder), held_out=False)
    probes = module._probes(job("run", fitness="needles", samples=3), tokens, 256)
    for ids, wanted in probes:
        assert len(ids) == 256
        said = tokens.tokenizer.decode([ids[place] for place in wanted])
        asked = tokens.tokenizer.decode(ids).split("[note]")
        name = asked[-1].split("[ask] ")[1].split()[0]
        # text goes on behind a note without a space
        assert any(note.startswith(f" {name}{said}") for note in asked[1:])
        assert asked[-1].endswith(f"{name}{said}")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"factor": 1}, "`factor`: expected a number above 1, got 1"),
        ({"fitness": "speed"}, "`fitness`: expected text or needles, got 'speed'"),
        ({"texts": []}, "`texts`: expected at least one file to search on, got none"),
        ({"population": 2}, "`population`: expected an integer of at least 4, got 2"),
        ({"length": 64}, "`length`: expected more than the trained 64 tokens, got 64"),
        ({"texts": ["/nowhere"]}, "`texts`: expected a file in UTF-8, got /nowhere"),
        ({"samples": 999}, "`texts`: expected 999 stretches of 255 tokens, got"),
    ],
)
def test_what_cannot_be_searched_is_named(job, changed, message):
    with pytest.raises(ValueError, match=message):
        search_longrope(job("run", **changed))


def test_the_command_says_what_it_found(short_model, text_file, tmp_path):
    from typer.testing import CliRunner

    out = tmp_path / "run"
    options = ["--factor", "2", "--samples", "1", "--population", "4", "--generations", "1"]
    ran = CliRunner().invoke(
        app,
        ["longrope", "--model", short_model, "--text", text_file, "--output", str(out), *options],
    )
    assert ran.exit_code == 0, ran.output
    report = json.loads((out / "report.json").read_text())
    assert f"{report['long']['loss']:.4f}" in ran.output
    assert report["rope_parameters"]["short_factor"] == [1.0] * len(report["long"]["factors"])
