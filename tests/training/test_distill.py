"""A run of ``distill``: what it leaves, what it refuses, and how it goes on if it was killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainingArguments

import bitnet_triton as bt
from bitnet_triton.models.convert import convert_checkpoint
from bitnet_triton.nn import PackedBitLinear
from bitnet_triton.training import PackingCollator
from bitnet_triton.training import distill as module
from bitnet_triton.training.distill import Distillation, distill
from bitnet_triton.training.distiller import Distiller, Lesson
from bitnet_triton.training.relations import find_documents, logits_loss, projections, relation_loss
from bitnet_triton.training.students import make_student

SIZES = {
    "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 2,
}  # fmt: skip
TEXT = "the red fox and the small bird read a long letter to the old king of the north\n" * 60


def dense(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a dense model, its tokenizer and a text."""
    folder = tmp_path_factory.mktemp("dense")
    dense().save_pretrained(folder)
    AutoTokenizer.from_pretrained(bt.RECALL_MODEL).save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


def job(folder, output, **changed):
    given = {
        "model": str(folder), "data": f"{folder}/text.txt", "tokens": 800, "length": 64,
        "row": 128, "rate": 1e-2, "save_every": 2, "temperature": 2.0, "accumulate": 2,
    }  # fmt: skip
    return Distillation(output=str(output), **{**given, **changed})


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """Return the folder of a whole run, its report, and what was told of it."""
    output, told = tmp_path_factory.mktemp("runs") / "run", []
    report = distill(job(folder, output), lambda *line: told.append(line))
    return output, report, told


def test_both_trainings_run_and_say_what_they_did(run):
    output, report, told = run
    assert report == json.loads((output / "report.json").read_text())
    losses = report["losses"]
    assert losses["student"] == report["continued"]["loss_before"]
    assert losses["continued"] == report["training"]["loss_before"]
    assert losses["trained"] < losses["continued"] < losses["student"]
    # the dense one has random weights: it knows as much as a guess among 1024
    assert losses["dense"] == pytest.approx(6.93, abs=0.2)
    tokens = [report[part]["tokens"] for part in ("continued", "training")]
    assert tokens[0] == pytest.approx(0.25 * sum(tokens), abs=64)
    steps = report["training"]["log"]
    assert all({"loss_logits", "loss_relations", "flips"} <= line.keys() for line in steps)
    assert not any("loss_logits" in line for line in report["continued"]["log"])
    assert {what for what, *_ in told} == {"continued", "trained"}


def test_no_document_that_is_measured_on_was_trained_on(run):
    output, report, _ = run
    parts = [
        (output / name).read_text().splitlines()
        for name in ("documents.jsonl", "continued.jsonl", "held_out.jsonl")
    ]
    assert [len(part) for part in parts[:2]] == [
        report["documents"] - len(parts[1]), len(parts[1])
    ]  # fmt: skip
    assert len(parts[2]) == report["held_out"] > 0


def test_the_result_loads_in_every_way(run, tmp_path):
    output, _, _ = run
    packed, trained = output / "model", output / "trained"
    ids = torch.arange(30)[None] + 3
    ours = bt.BitNetForCausalLM.from_pretrained(packed)
    assert isinstance(ours.model.layers[0].mlp.down_proj, PackedBitLinear)
    assert ours.config.hidden_act == "silu"
    assert ours.dtype == torch.bfloat16
    convert_checkpoint(packed, tmp_path / "masters", to="masters", dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = ours.float()(ids).logits
        masters = bt.BitNetForCausalLM.from_pretrained(tmp_path / "masters", dtype=torch.float32)
        torch.testing.assert_close(masters(ids).logits, wanted, rtol=1e-2, atol=1e-2)
        exact = bt.BitNetForCausalLM.from_pretrained(trained, dtype=torch.float32)
        torch.testing.assert_close(exact(ids).logits, wanted, rtol=5e-2, atol=5e-2)
        theirs = transformers.BitNetForCausalLM.from_pretrained(packed)
        assert type(theirs.model.layers[0]).__module__.startswith("transformers")
        with torch.compiler.set_stance("force_eager"):  # it compiles how it unpacks
            found = theirs(ids).logits.float()
        assert (found - wanted).norm() < 0.05 * wanted.norm()  # all of it in bfloat16
    tokenizer = AutoTokenizer.from_pretrained(packed)
    prompt = tokenizer(" the red fox", return_tensors="pt")
    written = ours.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert written.shape[1] == prompt["input_ids"].shape[1] + 5


def test_all_of_it_is_done_once(run, folder, monkeypatch):
    output, report, _ = run
    monkeypatch.setattr(module, "fit", None)
    monkeypatch.setattr(module, "make_student", None)
    assert distill(job(folder, output)) == report
    with pytest.raises(ValueError, match="holds a run with other temperature"):
        distill(job(folder, output, temperature=3.0))


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(run, folder, tmp_path):
    whole, first, _ = run
    killed = tmp_path / "killed"
    script = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[3]); import test_distill as t;"
        "die = lambda what, done, total, loss: what == 'trained' and done == 3 "
        "and os.kill(os.getpid(), signal.SIGKILL);"
        "t.distill(t.job(sys.argv[1], sys.argv[2]), die)"
    )
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(killed), str(Path(__file__).parent)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (killed / "checkpoints" / "trained" / "checkpoint-2").is_dir()
    assert not (killed / "trained").exists()
    steps = []
    second = distill(
        job(folder, killed), lambda what, done, total, loss: steps.append((what, done))
    )
    assert steps[0] == ("trained", 3)
    for name in ("trained", "model"):
        files = [load_file(run / name / "model.safetensors") for run in (whole, killed)]
        assert all(torch.equal(files[1][name], value) for name, value in files[0].items())
    kept = ("loss", "loss_logits", "loss_relations")
    logs = [[[line[n] for n in kept] for line in r["training"]["log"]] for r in (first, second)]
    assert logs[0] == logs[1]
    assert first["losses"] == second["losses"]


def packed_rows():
    sizes = [[9, 20], [31], [5, 6, 7], [12, 2]]
    return [
        [{"input_ids": [3 + (i * n) % 900 for i in range(n)], "prompt_len": 2} for n in row]
        for row in sizes
    ]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_loss_of_a_step_is_that_of_its_documents_whatever_the_rows(accumulate, tmp_path):
    """Four rows in one step of the trainer, and what they cost one by one, written out."""
    teacher = dense(1)
    ids = {"input_ids": torch.arange(30)[None] + 3}
    student = make_student(dense(), [ids])
    lesson = Lesson(teacher, 0.7, 1.3, temperature=2.0, layer=0)
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4 // accumulate, max_steps=1, logging_steps=1,
        gradient_accumulation_steps=accumulate, use_cpu=True, report_to=[], disable_tqdm=True,
        remove_unused_columns=False, learning_rate=1e-9, save_strategy="no",
    )  # fmt: skip
    collate = PackingCollator()
    trainer = Distiller(
        student, arguments, collate, train_dataset=packed_rows(), lesson=lesson
    )  # fmt: skip
    trainer.train()
    (line, _) = trainer.state.log_history

    rows, size = packed_rows(), 4 // accumulate
    batches = [collate(rows[start : start + size]) for start in range(0, 4, size)]
    found = {"loss": 0.0, "loss_logits": 0.0, "loss_relations": 0.0}
    items = sum((batch["labels"][:, 1:] != -100).sum().item() for batch in batches)
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        seen = []
        with torch.no_grad():
            for model in (student, teacher):
                with projections(model.model, 0) as projected:
                    seen.append((model(**inputs, use_cache=False).logits, projected))
        counts = batch["labels"][:, 1:] != -100
        share = counts.sum().item() / items
        logits, wanted = (logits[:, :-1][counts].double() for logits, _ in seen)
        plain = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:][counts])
        found["loss"] += share * plain.item()
        found["loss_logits"] += share * 0.7 * logits_loss(logits, wanted, temperature=2.0).item()
        found["loss_relations"] += share * 1.3 * sum(
            relation_loss(seen[0][1][name], seen[1][1][name], find_documents(batch)).item()
            for name in ("q_proj", "k_proj", "v_proj")
        )  # fmt: skip
    found["loss"] += found["loss_logits"] + found["loss_relations"]
    for name, value in found.items():
        assert line[name] == pytest.approx(value, rel=2e-3), name
    assert not any(p.grad is not None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"model": ""}, ValueError, "`model`: expected a dense model, got none"),
        ({"data": ""}, ValueError, "`data`: expected a text file or JSON lines, got none"),
        ({"continued": 1.0}, ValueError, "`continued`: expected a share below 1"),
        ({"continued": 1.5}, ValueError, "`continued`: expected a number of at least 0 and up to"),
        ({"temperature": 0}, ValueError, "`temperature`: expected a number above 0"),
        ({"relations": -1}, ValueError, "`relations`: expected a number of at least 0"),
        ({"teacher": 3}, TypeError, "`teacher`: expected a word"),
        ({"layer": 2}, ValueError, "`layer`: expected one of the 2 of the model, got 2"),
        ({"length": 512, "row": 512}, ValueError, "`length`: expected up to the 256 tokens"),
        ({"data": "nowhere.txt"}, ValueError, "`data`: .*nowhere.txt: No such file"),
        ({"corpus": "nowhere.txt"}, ValueError, "nowhere.txt: No such file"),
        ({"model": "no/where/at/all"}, ValueError, "`model`: expected a folder"),
        ({"model": str(bt.RECALL_MODEL)}, ValueError, "`model`: .*it is ternary already"),
    ],
)
def test_what_cannot_be_taught_is_refused_before_anything_is_written(
    changed, error, message, folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    changed = {"tokens": 1000, **changed}
    with pytest.raises(error, match=message):
        distill(job(folder, tmp_path / "run", **changed))
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_heads_teaches_logits_alone(folder, tmp_path):
    teacher = tmp_path / "teacher"
    torch.manual_seed(2)
    LlamaForCausalLM(
        LlamaConfig(**{**SIZES, "hidden_size": 48, "num_attention_heads": 2})
    ).save_pretrained(teacher)
    AutoTokenizer.from_pretrained(bt.RECALL_MODEL).save_pretrained(teacher)
    asked = {"teacher": str(teacher), "continued": 0.0, "tokens": 200}
    with pytest.raises(
        ValueError, match=r"`teacher`: relations .*\(4, 2\) as in the model, got \(2, 2\)"
    ):
        distill(job(folder, tmp_path / "run", **asked))
    report = distill(job(folder, tmp_path / "run", **asked, relations=0.0))
    assert report["continued"] is None
    assert report["losses"]["student"] == report["training"]["loss_before"]
    (line,) = report["training"]["log"]
    assert "loss_relations" not in line
    assert line["loss_logits"] > 0


def test_plain_text_comes_first_where_it_is_another_file(folder, tmp_path, monkeypatch):
    corpus, data = tmp_path / "corpus.txt", tmp_path / "tasks.jsonl"
    corpus.write_text(TEXT)
    line = {"prompt": " the red fox and the small", "answer": " bird"}
    data.write_text("".join(json.dumps(line) + "\n" for _ in range(20)))
    trained = []

    def fit(model, documents, held_out, *args):
        trained.append((documents, held_out))
        return {"loss_before": 2.0, "loss_after": 1.0}

    monkeypatch.setattr(module, "fit", fit)
    asked = {"data": str(data), "corpus": str(corpus), "continued": 0.8, "relations": 0.0}
    report = distill(job(folder, tmp_path / "run", **asked))
    (first, _), (second, held_out) = trained
    assert all(document["labels"] == document["input_ids"] for document in first)
    assert 500 < sum(len(document["labels"]) for document in first) <= 640
    assert all(-100 in document["labels"] for document in second + held_out)
    assert 100 < sum(len(document["labels"]) for document in second) <= 160
    assert len(held_out) == 1
    assert report["losses"]["continued"] == 1.0


@pytest.mark.parametrize("changed", ["data", "corpus"])
def test_files_go_by_what_they_say(changed, folder, tmp_path, monkeypatch):
    class ReachedError(Exception):
        pass

    def stop(*_):
        raise ReachedError

    monkeypatch.setattr(module, "_documents", stop)
    files = {}
    for name in ("data", "corpus"):
        files[name] = tmp_path / f"{name}.txt"
        files[name].write_text(f"{TEXT}{name}")

    def go(**other):
        paths = {name: str(path) for name, path in {**files, **other}.items()}
        distill(job(folder, tmp_path / "run", **paths))

    moved = tmp_path / "moved.txt"
    moved.write_text(files[changed].read_text())
    for path in (files[changed], moved):
        with pytest.raises(ReachedError):
            go(**{changed: path})
    files[changed].write_text(f"{TEXT}other")
    with pytest.raises(ValueError, match=f"`output`: .* holds a run with other {changed} .files"):
        go()
