"""Lines on disk, intervals, and sums."""

import json
import math

import pytest

from bitnet_triton.training.options import remember
from bitnet_triton.training.plots import labels, ranges
from bitnet_triton.training.results import Store, summarise, wilson

RUN = {"tasks": ["passkey"], "lengths": [64], "settings": [{"name": "full"}], "seed": 0}


def answers(*scores, depth=0.5):
    found = [{"prompt": i, "depth": depth, "score": s, "said": ""} for i, s in enumerate(scores)]
    return {"kind": "answers", "setting": "full", "task": "passkey", "length": 64, "seconds": 1,
            "answers": found}  # fmt: skip


def test_lines_survive(tmp_path):
    Store(tmp_path, RUN).add(answers(1, 0))
    store = Store(tmp_path, RUN)
    assert store.has(kind="answers", task="passkey")
    assert not store.has(kind="answers", task="copy")
    assert summarise(store).scores["full"]["passkey"][64].mean == 0.5


def test_a_line_that_was_cut_off_is_forgotten_and_written_again(tmp_path):
    store = Store(tmp_path, RUN)
    store.add(answers(1))
    with (tmp_path / "lines.jsonl").open("a") as file:
        file.write(json.dumps(answers(0))[:40])
    again = Store(tmp_path, RUN)
    assert again.lines == store.lines
    again.add(answers(0))
    assert len(Store(tmp_path, RUN).lines) == 2


def test_the_folder_of_another_run_is_refused(tmp_path):
    Store(tmp_path, RUN)
    with pytest.raises(ValueError, match="holds a run with other seed"):
        Store(tmp_path, {**RUN, "seed": 1})


@pytest.mark.parametrize(
    ("mean", "count", "low", "high"),
    [(0.0, 200, 0.0, 0.0188), (1.0, 200, 0.9812, 1.0), (0.5, 100, 0.4038, 0.5962)],
)
def test_intervals_are_wilsons(mean, count, low, high):
    assert wilson(mean, count) == pytest.approx((low, high), abs=1e-4)


def test_scores_are_told_apart_by_depth(tmp_path):
    store = Store(None, RUN)
    store.add(answers(1, 1, depth=0.05))
    store.add(answers(0, 1, depth=1.0))
    score = summarise(store).scores["full"]["passkey"][64]
    assert score.by_depth == [1, None, None, None, 0.5]
    assert score.mean == 0.75
    assert score.answers == 4


def test_bits_are_added_before_they_are_divided():
    store = Store(None, RUN)
    pieces = [{"piece": 0, "bits": 10, "tokens": 5, "bytes": 10},
              {"piece": 1, "bits": 40, "tokens": 5, "bytes": 15}]  # fmt: skip
    store.add({"kind": "text", "setting": "full", "length": 64, "pieces": pieces})
    text = summarise(store).text["full"][64]
    assert text["bits_per_byte"] == 2
    assert text["perplexity"] == 2**5
    assert text["bits_per_byte_by_position"] == [1, 40 / 15]


def test_labels_that_would_lie_upon_each_other_are_one():
    points = [(256, 0.02, "1"), (257, 0.0, "2"), (4096, 1.0, "3"), (4096, 0.5, "4"), (41, 1, "5")]
    assert labels(points, math.log2) == {
        (256, 0.02): ["1", "2"], (4096, 1.0): ["3"], (4096, 0.5): ["4"], (41, 1): ["5"],
    }  # fmt: skip


def test_numbers_that_follow_one_another_are_a_range():
    assert ranges([1, 2, 4, 5, 6, 9]) == "1 2 4–6 9"


def test_how_a_folder_is_spelled_is_no_part_of_a_run(tmp_path):
    remember(tmp_path / "run", {"output": "run", "seed": 0})
    remember(tmp_path / "run", {"output": "./run", "seed": 0})
    with pytest.raises(ValueError, match="holds a run with other seed"):
        remember(tmp_path / "run", {"output": "run", "seed": 1})
