"""What a model is trained on: phases, labels, budgets, and answers of its own."""

from __future__ import annotations

import json
import random

import pytest
import torch
from transformers import AutoTokenizer

import bitnet_triton as bt
from bitnet_triton.training import PackingCollator, documents
from bitnet_triton.training.answers import Answer
from bitnet_triton.training.documents import (
    SelfTeacher,
    draw_documents,
    line_documents,
    prompt_document,
    read_lines,
)
from bitnet_triton.training.packing import IGNORED
from bitnet_triton.training.tasks import Prompt, TextTokens, draw_prompt


@pytest.fixture(scope="module")
def tokens():
    return TextTokens(AutoTokenizer.from_pretrained(bt.RECALL_MODEL), held_out=False)


def draw(tokens, **changed):
    asked = {"total": 2000, "length": 250, "text": 0.25, "questions": ["prompt"], "seed": 0}
    return list(draw_documents(tokens, **{**asked, **changed}))


def test_documents_keep_the_budget_and_the_share_of_text(tokens):
    found = draw(tokens)
    assert [len(d["input_ids"]) for d in found] == [250] * 8
    texts = [d for d in found if d["prompt_len"] == 250]
    assert len(texts) == 2
    assert all(d["labels"] == d["input_ids"] for d in texts)
    assert found == draw(tokens)
    assert found != draw(tokens, seed=1)


def test_labels_are_answers_and_the_phase_begins_where_it_is_asked_to(tokens):
    _, prompt = draw_prompt(random.Random(0), tokens, 250)
    answers = [token for turn in prompt.turns for token in turn.answer]
    for question, generated in (("prompt", 0), ("decode", len(prompt.turns[0].question))):
        document = prompt_document(prompt, question)
        assert [t for t in document["labels"] if t != IGNORED] == answers
        first = next(i for i, t in enumerate(document["labels"]) if t != IGNORED)
        assert document["prompt_len"] == first - generated
        assert document["input_ids"][: len(prompt.context)] == prompt.context


def test_a_teacher_keeps_what_it_says_right(tokens, monkeypatch):
    rng = random.Random(3)
    names, prompt = draw_prompt(rng, tokens, 250)
    while len(prompt.turns) < 3:
        names, prompt = draw_prompt(rng, tokens, 250)
    asked = []

    def ask(model, tokens, task, prompts, *, question):
        asked.append(question)
        said = ["".join(turn.words) for turn in prompts[0].turns]
        said[1] = " none"
        return [[Answer(0.0, 0.0, text) for text in said]]

    monkeypatch.setattr(documents, "ask", ask)
    teacher = SelfTeacher(None, tokens)
    kept = teacher(names, prompt, "decode")
    assert asked == ["decode"]
    assert kept.turns == [prompt.turns[0], *prompt.turns[2:]]
    assert (teacher.asked, teacher.right) == (len(prompt.turns), len(prompt.turns) - 1)
    monkeypatch.setattr(documents, "ask", lambda *a, **k: [[Answer(0, 0, "x")] * len(names)])
    assert teacher(names, prompt, "prompt") is None


def test_packed_documents_train_under_the_mask_of_generation(tokens, packed_folder):
    model = bt.BitNetForCausalLM.from_pretrained(packed_folder, fuse=False)
    recipe = {"preset": "swaa", "window": 8, "sinks": 2, "full_decode": True, "full_layers": [1]}
    bt.set_attention(model, recipe)
    found = draw(tokens, total=240, length=80, text=0.4, questions=["prompt", "decode"])
    batch = PackingCollator(tell_prompts=True)(found)
    with torch.no_grad():
        packed, start = model(**batch).logits[0], 0
        for document in found:
            ids = torch.tensor([document["input_ids"]])
            prompt = document["prompt_len"]
            step = model(ids[:, :prompt], prompt_len=prompt, use_cache=True)
            logits = [step.logits[0]]
            for place in range(prompt, ids.shape[1]):
                step = model(
                    ids[:, place : place + 1], past_key_values=step.past_key_values,
                    prompt_len=prompt,
                )  # fmt: skip
                logits.append(step.logits[0])
            expected = torch.cat(logits)
            torch.testing.assert_close(
                packed[start : start + len(expected)], expected, rtol=1e-4, atol=1e-4
            )
            start += len(expected)


def test_files_become_documents(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(bt.RECALL_MODEL)
    path = tmp_path / "lines.jsonl"
    lines = [{"prompt": "one two", "answer": " three"}, {"text": "a b c " * 40}]
    path.write_text("\n".join(map(json.dumps, lines)))
    asked, *pieces = line_documents(tokenizer, read_lines(path), length=64)
    assert asked["input_ids"] == tokenizer("one two")["input_ids"] + asked["labels"][
        asked["prompt_len"] :
    ]  # fmt: skip
    *said, end = asked["labels"][asked["prompt_len"] :]
    assert tokenizer.decode(said) == " three"
    assert end == tokenizer.eos_token_id  # or a model would never learn to stop
    assert [len(piece["input_ids"]) for piece in pieces[:-1]] == [64] * (len(pieces) - 1)
    whole = [token for piece in pieces for token in piece["labels"]]
    assert whole == tokenizer("a b c " * 40)["input_ids"]
    # what a model says itself stands in place of the answer, if the two agree
    own = tokenizer(" Three!", add_special_tokens=False)["input_ids"]
    (kept, *_) = line_documents(
        tokenizer, read_lines(path)[:1], length=64, generate=lambda ids: own
    )
    assert kept["labels"][kept["prompt_len"] :] == own
    # shorter than the file's answer, and ended
    longer = [documents.Line("one two", " Three, four")]
    (kept,) = line_documents(tokenizer, longer, length=64, generate=lambda ids: [*own[:1], end])
    assert kept["labels"][kept["prompt_len"] :] == [*own[:1], end]
    other = tokenizer(" four", add_special_tokens=False)["input_ids"]
    assert not list(
        line_documents(tokenizer, read_lines(path)[:1], length=64, generate=lambda ids: other)
    )
    path.with_suffix(".txt").write_text("a b c", encoding="utf-8-sig")  # with a mark in front
    assert read_lines(path.with_suffix(".txt")) == [documents.Line("a b c")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "line 1: expected an object .* got no JSON"),
        (b'{"text": "a"}\n{"prompt": "a", "reply": "b"}', "line 2: .* got 'prompt', 'reply'"),
        (b"[]", "line 1: .* got list"),
        (b'{"text": " "}', "line 1: expected strings that are not empty"),
        (b"", "has no text"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_by_its_line(content, message, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"`data`: .*{message}"):
        read_lines(path)


def test_documents_that_do_not_fit_are_refused():
    tokenizer = AutoTokenizer.from_pretrained(bt.RECALL_MODEL)
    with pytest.raises(ValueError, match="`length`: document 1: expected at least"):
        list(line_documents(tokenizer, [documents.Line("a b " * 40, " c")], length=64))
    with pytest.raises(ValueError, match="`data`: document 1: expected an `answer`"):
        list(line_documents(tokenizer, [documents.Line("a", "")], length=64))


def test_documents_fit_where_a_word_has_several_tokens():
    tokens = TextTokens(AutoTokenizer.from_pretrained(bt.TINY_MODEL), held_out=False)
    assert tokens.per_word > 1
    seed = random.random()  # of this run's seed
    given = {"length": 512, "text": 0.0, "questions": ("prompt", "decode"), "seed": seed}
    drawn = list(draw_documents(tokens, total=60 * 512, **given))
    assert [len(document["input_ids"]) for document in drawn] == [512] * 60
    for document in drawn:
        assert any(label != -100 for label in document["labels"])


def test_nothing_to_draw_is_said_instead_of_sought_for_ever(tokens, monkeypatch):
    given = {"total": 300, "length": 100, "text": 0.0, "questions": ("prompt",), "seed": 1}
    asked = []
    with pytest.raises(ValueError, match=r"`self_distill`: .* none of 100 prompts"):
        next(draw_documents(tokens, teacher=lambda *prompt: asked.append(prompt), **given))
    assert len(asked) == 100
    monkeypatch.setattr(documents, "draw_prompt", lambda *_: ([], Prompt([], [], [])))
    with pytest.raises(ValueError, match=r"`length`: expected room for a task, .*, got 100"):
        next(draw_documents(tokens, teacher=lambda *prompt: asked.append(prompt), **given))
    assert len(asked) == 100


def test_strings_of_json_lines_hold_other_ends_of_lines(tmp_path):
    said = "one\u2028two\x85three"
    path = tmp_path / "said.jsonl"
    path.write_text(json.dumps({"text": said}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [line.prompt for line in read_lines(path)] == [said]
