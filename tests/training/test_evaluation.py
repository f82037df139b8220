"""``evaluate``: what it finds, what it refuses before it begins, and how a killed run goes on."""

import dataclasses

import pytest
import torch
from transformers import AutoTokenizer

import bitnet_triton as bt
from bitnet_triton.training import Setting, combine, evaluation, parse_setting, subject
from bitnet_triton.training.answers import ask, make_prompts
from bitnet_triton.training.evaluation import load
from bitnet_triton.training.perplexity import bits, windows
from bitnet_triton.training.settings import make_cache
from bitnet_triton.training.tasks import TASKS, TextTokens

QUICK = {"lengths": [256], "samples": 6, "text": False, "batch_size": 2}


@pytest.fixture(scope="module")
def tokens():
    return TextTokens(AutoTokenizer.from_pretrained(bt.RECALL_MODEL))


def means(report, setting):
    return {
        (task, length): score.mean
        for task, by_length in report.scores[setting].items()
        for length, score in by_length.items()
    }


def test_far_facts_are_lost_by_windows_and_kept_by_selection():
    settings = ["full", "sliding:window=64", "streaming:window=64", "top_k:keys=51"]
    report = bt.evaluate(
        bt.RECALL_MODEL, ["passkey", "needles", "recall"], [512], [0.1, 0.5], settings, samples=8,
        text=False,
    )  # fmt: skip
    full, *windowed, selected = (means(report, setting) for setting in settings)
    assert min(full.values()) > 0.8
    assert min(selected.values()) > 0.7
    for found in windowed:
        assert max(found.values()) < 0.4
    rows = [report.footprints[setting][512]["rows_decode"] for setting in settings]
    assert rows == [512, 64, 68, 51]
    held = [report.footprints[setting][512]["cache_bytes"] for setting in settings]
    assert held[1] < held[2] < held[0] / 4
    assert held[3] == held[0]


def test_near_facts_are_kept_by_windows():
    report = bt.evaluate(
        bt.RECALL_MODEL, ["needles"], [512], [0.99], ["sliding:window=64"], samples=8, text=False
    )
    assert report.scores["sliding:window=64"]["needles"][512].mean > 0.8


def test_questions_can_be_read_by_the_mode_of_decoding():
    """A plan that is blind only when it decodes answers questions of the prompt."""
    window = {"mode": "sliding", "window": 32}
    setting = Setting("blind", {"prefill": {"mode": "full"}, "decode": window})
    scores = [
        bt.evaluate(
            bt.RECALL_MODEL, ["needles"], [256], [0.3], [setting], question=question, samples=8,
            text=False,
        ).scores["blind"]["needles"][256].mean
        for question in ("prompt", "decode")
    ]  # fmt: skip
    assert scores[0] > 0.8 > 0.3 > scores[1]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches_of_transformers_give_the_same_answers(cache, tokens):
    model = load(str(bt.RECALL_MODEL), parse_setting("full"), fuse=True)
    prompts = list(make_prompts("recall", TASKS["recall"], tokens, 256, 2, [], 0))
    own, other = (
        ask(model, tokens, TASKS["recall"], prompts, cache=kind) for kind in ("own", cache)
    )
    assert own == other
    assert sum(answer.score for answers in own for answer in answers) > 8


def test_answers_are_what_one_call_predicts(tokens):
    """``ask`` goes turn by turn through a cache; a model without one says the same."""
    model = load(str(bt.RECALL_MODEL), parse_setting("full"))
    (prompt,) = make_prompts("recall", TASKS["recall"], tokens, 256, 1, [], 0)
    (answers,) = ask(model, tokens, TASKS["recall"], [prompt])
    ids = list(prompt.context)
    for turn, answer in zip(prompt.turns, answers):
        ids += turn.question
        with torch.no_grad():
            ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        assert "".join(tokens.words(ids[-1:])) == answer.said


def test_bits_are_those_of_the_models_own_loss(tokens):
    model = load(str(bt.RECALL_MODEL), parse_setting("checkpoint"))
    (text,) = windows(tokens, 200, 1)
    pieces = bits(model, tokens, [text])
    assert len(text) == 200
    ids = torch.tensor([text])
    loss = model(ids, labels=ids).loss.item() / torch.log(torch.tensor(2.0)).item()
    assert sum(p["tokens"] for p in pieces) == 199
    assert sum(p["bits"] for p in pieces) / 199 == pytest.approx(loss, rel=1e-4)
    whole = tokens.tokenizer.decode(text[1:]).encode()
    assert sum(p["bytes"] for p in pieces) == len(whole)


def test_text_goes_through_a_memory_that_is_chosen_by_name(tokens):
    model = bt.BitNetForCausalLM.from_pretrained(bt.RECALL_MODEL, attention="full")
    (text,) = windows(tokens, 300, 1)
    plain = bits(model, tokens, [text])
    cost = {}
    for name in ("latest:budget=1.0", "latest:budget=16"):
        cost[name] = bits(model, tokens, [text], make_cache(name, model, 300))
    kept, dropped = ([piece["bits"] for piece in pieces] for pieces in cost.values())
    # codes of activations may fall to the other side of a tie where calls are cut otherwise
    assert sum(kept) == pytest.approx(sum(piece["bits"] for piece in plain), rel=1e-2)
    assert dropped[:4] == pytest.approx(kept[:4], rel=1e-6)  # the prompt
    assert sum(dropped[4:]) != pytest.approx(sum(kept[4:]), rel=1e-2)


def test_rope_parameters_reach_the_model():
    setting = parse_setting("full", rope="linear:factor=4")
    assert setting.name == "full linear:factor=4"
    model = load(str(bt.RECALL_MODEL), setting)
    plain = load(str(bt.RECALL_MODEL), parse_setting("full"))
    assert torch.allclose(model.model.rotary_emb.inv_freq * 4, plain.model.rotary_emb.inv_freq)


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    tasks, settings = ["passkey", "recall"], ["full", "sliding:window=32"]
    whole = bt.evaluate(bt.RECALL_MODEL, tasks, settings=settings, **QUICK)

    calls = []

    def dies(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bt.evaluate(
            bt.RECALL_MODEL, tasks, settings=settings, output=tmp_path, progress=dies, **QUICK
        )
    again = []
    resumed = bt.evaluate(
        bt.RECALL_MODEL, tasks, settings=settings, output=tmp_path,
        progress=lambda *args: again.append(args), **QUICK,
    )  # fmt: skip
    # 2 settings x 2 tasks x 3 batches, 5 of them before; the table is that of a run in one go
    assert len(again) == 12 - 5
    assert resumed.scores == whole.scores
    assert resumed.footprints == whole.footprints

    def never(*args, **kwargs):
        raise AssertionError("a run that is finished measures nothing")

    monkeypatch.setattr(evaluation, "ask", never)
    done = bt.evaluate(bt.RECALL_MODEL, tasks, settings=settings, output=tmp_path, **QUICK)
    assert done.scores == whole.scores


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["needels"]}, "unknown task 'needels'; did you mean 'needle"),
        ({"lengths": [4097]}, "`lengths`: 'checkpoint': expected at most 4096 tokens, got 4097"),
        ({"lengths": [16]}, "`length`: expected room for"),
        ({"depths": [2]}, "`depths`: expected 0 to 1, got 2"),
        ({"settings": ["slidng:window=4"]}, "'slidng:window=4'.*did you mean 'sliding'"),
        ({"settings": ["sliding"]}, "'sliding'.*'window' is missing"),
        (
            {"settings": [Setting("odd", {"mode": "longformer", "window": [4, 5, 6]})]},
            "'window': expected one number or",
        ),
        (
            {"settings": [Setting("far", rope={"rope_type": "llama3"})]},
            "'far': 'factor' is missing",
        ),
        ({"settings": ["full", "full"]}, "`settings`: expected different names"),
        ({"settings": [{"full": 1}]}, "`settings`: expected"),
        ({"question": "both"}, "`question`: expected prompt or decode, got 'both'"),
        ({"samples": 0}, "`samples`: expected at least 1"),
        ({"model": "no/such/place"}, "`model`: expected a folder .* got no/such/place"),
        ({"model": 7}, "`model`: expected a model, a folder or a name, got int"),
        ({"model": torch.nn.Linear(2, 2)}, "`model`: expected a BitNetForCausalLM.* got Linear"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(tmp_path, arguments, message):
    arguments = {"model": bt.RECALL_MODEL, "output": tmp_path / "new", **arguments}
    with pytest.raises((ValueError, TypeError), match=message):
        bt.evaluate(**arguments)
    assert not (tmp_path / "new").exists()


def test_a_model_in_memory_is_measured_as_its_folder_is_and_stays_as_it_is():
    model = bt.BitNetForCausalLM.from_pretrained(bt.RECALL_MODEL)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    settings = ["full", "sliding:window=32"]
    there = bt.evaluate(bt.RECALL_MODEL, ["recall"], settings=settings, **QUICK)
    here = bt.evaluate(model, ["recall"], settings=settings, **QUICK)
    assert here.scores == there.scores
    assert here.footprints == there.footprints
    assert model.attention_plan is None
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_changed_weights_of_a_model_in_memory_count():
    model = bt.BitNetForCausalLM.from_pretrained(bt.RECALL_MODEL)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
    report = bt.evaluate(model, ["passkey"], **QUICK)
    assert report.scores["checkpoint"]["passkey"][256].mean < 0.5


def test_a_model_in_memory_without_a_tokenizer_is_refused():
    model = bt.BitNetForCausalLM.from_pretrained(bt.RECALL_MODEL)
    model.name_or_path = model.config.name_or_path = "no/such/place"
    with pytest.raises(ValueError, match="`model`: no tokenizer was found at 'no/such/place'"):
        bt.evaluate(model, ["passkey"], **QUICK)


def test_a_name_on_the_hub_is_downloaded(monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(bt.RECALL_MODEL)

    monkeypatch.setattr(subject, "snapshot_download", download)
    report = bt.evaluate("someone/recall", ["passkey"], **QUICK)
    assert report.scores["checkpoint"]["passkey"][256].mean > 0.5
    ((name, patterns),) = asked
    assert name == "someone/recall"
    assert "*.safetensors" in patterns


def test_turns_of_one_text_fit_into_a_cache_of_chosen_frequencies():
    settings = [
        parse_setting("full", rope="dynamic_yarn:factor=2,original_max_position_embeddings=100")
    ]
    report = bt.evaluate(bt.RECALL_MODEL, ["recall"], settings=settings, **QUICK)
    assert report.scores[settings[0].name]["recall"][256].answers == 48


def test_rope_may_take_a_model_beyond_its_length():
    far = [parse_setting("full", rope="linear:factor=2")]
    job = evaluation.Job(
        str(bt.RECALL_MODEL), ["passkey"], [8192], [0.5], far, 1, 0, "prompt", False
    )  # fmt: skip
    evaluation._check(job)
    yarn = [parse_setting("full", rope="yarn")]  # by 4, if nobody says how much
    evaluation._check(dataclasses.replace(job, settings=yarn, lengths=[8192]))
    with pytest.raises(ValueError, match="expected at most 4096 tokens, got 8192"):
        evaluation._check(dataclasses.replace(job, settings=[parse_setting("full")]))


@pytest.mark.parametrize(
    ("text", "attention"),
    [
        ("checkpoint", None),
        ("full", {"mode": "full"}),
        ("sliding:window=256,sinks=4", {"mode": "sliding", "window": 256, "sinks": 4}),
        ("swaa-trained:window=64,full_layers=odd",
         {"preset": "swaa-trained", "window": 64, "full_layers": "odd"}),
        ("swaa-trained:full_layers=[1, 4],window=64",
         {"preset": "swaa-trained", "window": 64, "full_layers": [1, 4]}),
        ('{"mode": "local", "block": 8}', {"mode": "local", "block": 8}),
    ],
)  # fmt: skip
def test_settings_are_read_as_the_command_line_has_them(text, attention):
    assert parse_setting(text).attention == attention


def test_settings_combine():
    names = [s.name for s in combine(["full", "checkpoint"], ["own", "static"], ["yarn:factor=2"])]
    assert names == [
        "full yarn:factor=2", "full static yarn:factor=2", "checkpoint yarn:factor=2",
        "checkpoint static yarn:factor=2",
    ]  # fmt: skip
    assert combine([])[0] == Setting("checkpoint")


@pytest.mark.parametrize("text", ["{", "sliding:window", "sliding:window,sinks=4", "full:a=[1,4"])
def test_a_broken_setting_is_refused(text):
    with pytest.raises(ValueError, match="`attention`: expected"):
        parse_setting(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("yran:factor=2", "`rope`: expected one of default, .*yarn.*, got 'yran'"),
        ("yarn:factor=two", "`rope`: 'factor': expected a positive number, got 'two'"),
    ],
)
def test_a_rope_that_no_model_has_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_setting("full", rope=text)


def test_an_unknown_cache_is_refused():
    with pytest.raises(
        ValueError, match=r"`cache`: expected one of own, dynamic, static, .*, got 'x'"
    ):
        parse_setting("full", "x")
