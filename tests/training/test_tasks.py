"""The tasks: exact lengths, facts where they were asked for, and no answer that can be guessed."""

import random
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from transformers import AutoTokenizer

import bitnet_triton as bt
from bitnet_triton.training.answers import batches, make_prompts
from bitnet_triton.training.tasks import TASKS, Draw, Question, TextTokens, build, check_tasks
from bitnet_triton.training.tasks.haystack import docstrings
from bitnet_triton.training.tasks.words import MARKERS, NAMES, NUMBERS, Names, partner


@pytest.fixture(scope="module", params=["RECALL_MODEL", "TINY_MODEL"])
def tokens(request):
    return TextTokens(AutoTokenizer.from_pretrained(getattr(bt, request.param)))


def draws(task, count, room=400):
    for seed in range(count):
        rng = random.Random(seed)
        yield task.draw(rng, Names(rng), room)


def leaks(task, count=400):
    """Say how an answer could be known without what stands far back; None: it cannot.

    Tries all that needs no fact: reading it off the question, the commonest answer, and the answer
    that went with the same question in other texts.
    """
    drawn = list(draws(task, count))
    for draw in drawn:
        for question in draw.questions:
            if set(question.words) & set(question.answer):
                return "the question says the answer"
            if not question.about:
                continue
            rest = [fact for i, fact in enumerate(draw.facts) if i not in question.about]
            pairs = {pair for fact in rest for pair in pairwise(fact)}
            if (question.words[-1], question.answer[0]) in pairs:
                return "another fact says the answer"
    return guessed(task, drawn)


def guessed(task, drawn):
    """Say which guess, learned from half of the draws, does better than chance on the others."""
    half = len(drawn) // 2
    known, seen = {}, Counter()
    for draw in drawn[:half]:
        for question in draw.questions:
            known[question.words] = question.answer
            seen[question.answer] += 1
    common = seen.most_common(1)[0][0]
    first = [draw.questions[0] for draw in drawn[half:]]
    guesses = {
        "the same question": [known.get(question.words, common) for question in first],
        "the commonest answer": [common] * len(first),
    }
    for kind, said in guesses.items():
        mean = sum(task.score(q.answer, one) for q, one in zip(first, said)) / len(first)
        if mean > task.chance + 5 * (task.chance / len(first)) ** 0.5 + 2 / len(first):
            return f"{kind} is right in {mean:.2f} of all texts"
    return None


@pytest.mark.parametrize("name", TASKS)
def test_no_answer_is_known_without_its_facts(name):
    assert leaks(TASKS[name]) is None


@dataclass(frozen=True)
class Leaky:
    """Broken on purpose, in one way or another."""

    how: str
    hard = False
    chance = 0.01

    def draw(self, rng, names, room):
        (name,), number = names.take(1), rng.choice(NUMBERS)
        facts = [("\n[note]", name, number)]
        asked = ("\n[ask]", name)
        if self.how == "question":
            asked = ("\n[ask]", number, name)
        elif self.how == "fact":
            facts.append(("\n[ask]", name, number))
        elif self.how == "habit":
            number = rng.choice(NUMBERS[:4])
        elif self.how == "name":
            number = NUMBERS[NAMES.index(name) % 100]
        return Draw(tuple(facts), (Question(asked, (number,), (0,)),))

    def score(self, answer, said):
        return float(list(answer) == list(said))


@pytest.mark.parametrize("how", ["question", "fact", "habit", "name"])
def test_a_task_that_leaks_is_found_out(how):
    assert leaks(Leaky("no")) is None
    assert leaks(Leaky(how), 4000) is not None


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [256, 1000])
def test_prompts_have_their_length_and_hold_their_facts(tokens, name, length):
    if name == "copy" and tokens.per_word > 1.5:
        length *= 2
    for prompt in make_prompts(name, TASKS[name], tokens, length, 4, [0.5], seed=3):
        assert len(prompt) == length
        assert prompt.context[: len(tokens.start)] == tokens.start
        text = tokens.tokenizer.decode(prompt.context)
        for turn in prompt.turns:
            assert tokens.words(turn.answer) == list(turn.words)
            assert all(word in text for word in turn.words)
            assert TASKS[name].score(turn.words, tokens.words(turn.answer)) == 1


@pytest.mark.parametrize("name", ["passkey", "needle", "needles", "tracking", "copy"])
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.9, 1.0])
def test_the_fact_stands_at_its_depth(tokens, name, depth):
    for prompt in make_prompts(name, TASKS[name], tokens, 2048, 5, [depth], seed=0):
        # facts have lengths, the depth is that of the text around them
        assert prompt.turns[0].depth == pytest.approx(depth, abs=0.17)
        place = round(prompt.turns[0].depth * len(prompt.context))
        text = tokens.tokenizer.decode(prompt.context[place : place + 40])
        assert text.lstrip().startswith("[")
        assert prompt.turns[0].words[0] in text


def test_equal_seeds_give_equal_prompts_and_others_do_not(tokens):
    first, again, other = (
        [p.context for p in make_prompts("needles", TASKS["needles"], tokens, 512, 3, [0.5], seed)]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_more_samples_begin_with_the_same_prompts(tokens):
    few, many = (
        [p.context for p in make_prompts("recall", TASKS["recall"], tokens, 512, n, [], 0)]
        for n in (2, 5)
    )
    assert many[:2] == few


def test_batches_need_no_padding_and_lose_no_prompt(tokens):
    prompts = list(make_prompts("recall", TASKS["recall"], tokens, 512, 9, [], 0))
    groups = list(batches(prompts, 4))
    assert sorted(index for group in groups for index in group) == list(range(9))
    for group in groups:
        assert len(group) <= 4
        assert len({len(prompts[index].context) for index in group}) == 1


def test_the_words_are_no_words_of_the_text():
    text = "".join(docstrings(held_out=False)) + "".join(docstrings(held_out=True))
    assert not [name for name in NAMES if name in text]
    assert not [marker for marker in MARKERS if marker in text]
    assert len(set(NAMES)) == len(NAMES) == 320
    assert all(partner(partner(name)) == name != partner(name) for name in NAMES)


def test_held_out_text_is_never_trained_on():
    trained, held_out = (set(docstrings(held_out=part)) for part in (False, True))
    assert not {text for text in trained & held_out if len(text) > 500}
    assert 0 < len(held_out) < 0.25 * len(trained)


def test_names_of_one_text_never_collide():
    names = Names(random.Random(0))
    alone, others = names.take_alone(30), names.take(1000)
    assert len(others) == 320 - 60
    assert not set(others) & ({*alone} | {partner(name) for name in alone})


def test_the_common_words_are_the_most_common():
    for name in ("common_words", "frequent_words"):
        for draw in draws(TASKS[name], 20, room=1000):
            counts = Counter(word for fact in draw.facts for word in fact[1:])
            asked = {counts[word] for word in draw.questions[0].answer}
            others = {n for word, n in counts.items() if word not in draw.questions[0].answer}
            assert min(asked) > max(others)


def test_a_chain_is_followed_in_order():
    for draw in draws(TASKS["tracking"], 20):
        (question,) = draw.questions
        links = [draw.facts[index][1:] for index in question.about]
        assert links[0][0] == question.words[-1]
        assert [link[1] for link in links] == list(question.answer)
        assert all(a[1] == b[0] for a, b in pairwise(links))


def test_scores():
    exact, places, sets = (TASKS[n].score for n in ("needles", "copy", "common_words"))
    assert exact([" 12"], [" 12", " 99"]) == 1
    assert exact([" 12"], []) == exact([" 12"], [" 21"]) == 0
    assert places([" a", " b", " c", " d"], [" a", " c", " c"]) == 0.5
    assert sets([" a", " b", " c"], [" c", " a", " a", " b"]) == pytest.approx(2 / 3)


def test_too_short_a_text_is_refused(tokens):
    rng = random.Random(0)
    draw = replace(TASKS["recall"], words_per_pair=1).draw(rng, Names(rng), 100)
    with pytest.raises(
        ValueError, match=r"`length`: expected room for \d+ tokens of facts, got 64"
    ):
        build([draw], tokens, 64, rng)


def test_an_unknown_task_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match="unknown task 'needels'; did you mean 'needle"):
        check_tasks(["passkey", "needels"])
