"""Tiles that were measured: whose they are, what becomes of a damaged file, who reads them."""

import dataclasses
import json
import logging
import os

import pytest
import torch

from bitnet_triton.runtime import autotune, measured
from bitnet_triton.runtime.measured import Choice, make_choice, read_choices, write_choices

CPU = torch.device("cpu")
KERNEL = "ternary_linear_fwd"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured.measured_tiles.cache_clear()
    yield measured.cache_file()
    measured.measured_tiles.cache_clear()


def shipped(size=1):
    return autotune.size_classes(KERNEL, CPU)[size]


def other(size=1):
    return {**shipped(size), "BLOCK_R": shipped(size)["BLOCK_R"] * 2}


def choice(**changes):
    return dataclasses.replace(make_choice(KERNEL, 1, CPU, other()), **changes)


def used(size=1):
    measured.measured_tiles.cache_clear()
    return autotune.tiles(KERNEL, size, CPU)


def test_file_lies_in_the_cache_directory_of_the_user(tmp_path, monkeypatch):
    assert measured.cache_file() == tmp_path / "bitnet_triton" / "tiles.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(measured.cache_file()) == "/somewhere/.cache/bitnet_triton/tiles.json"


def test_nothing_is_tuned_unasked(cache):
    assert used() == shipped()
    assert not cache.exists()


def test_measured_tiles_of_this_machine_replace_those_of_their_class_only(cache):
    write_choices(cache, [choice()])
    assert used(1) == other(1)
    assert used(2) == shipped(2)
    assert autotune.tiles(KERNEL, 1, torch.device("meta")) == autotune.GPU[KERNEL][1024]


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "another"},
        {"triton": "0.1"},
        {"source": "0" * 16},
        {"size": 3},
        {"tiles": {"BLOCK_M": 1}},
        {"kernel": "gone"},
    ],
    ids=str,
)
def test_choices_for_something_else_are_passed_over(cache, changes):
    write_choices(cache, [choice(**changes)])
    assert used() == shipped()
    assert len(read_choices(cache)) == 1


def test_source_of_a_kernel_changes_with_its_files(tmp_path, monkeypatch):
    folder = tmp_path / "kernels" / "op"
    folder.mkdir(parents=True)
    (tmp_path / "kernels" / "common").mkdir()
    (folder / "forward.py").write_text("def _op_fwd_kernel(x): pass")
    monkeypatch.setattr(measured, "_KERNELS", tmp_path / "kernels")
    hashes = []
    for name in ("op/forward.py", "op/tiles.py", "common/tiles.py"):
        measured.source_of.cache_clear()
        hashes.append(measured.source_of("op_fwd"))
        path = tmp_path / "kernels" / name
        path.write_text((path.read_text() if path.exists() else "") + "\n# changed")
    measured.source_of.cache_clear()
    hashes.append(measured.source_of("op_fwd"))
    assert len(set(hashes)) == 4
    assert measured.source_of("op_fwd_float32") == hashes[-1]
    assert measured.source_of("another") is None
    measured.source_of.cache_clear()


def test_every_kernel_of_the_tables_has_a_source():
    for kernel in {*autotune.GPU, *autotune.CPU}:
        if kernel != "dense_linear_fwd":
            assert measured.source_of(kernel), kernel


def written(**changes):
    """Return a file of one choice, which differs from a sound one by ``changes``."""
    sound = {"device": "a", "triton": "b", "kernel": "c", "source": "d", "size": 1}
    return json.dumps({"format": 1, "choices": [{**sound, "tiles": {"BLOCK_M": 4}, **changes}]})


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", '{"format": 7, "choices": []}', '{"format": 1}'),
        *('{"format": 1, "choices": [{"device": "x"}]}', '{"format": 1, "choices": 3}'),
        *(written(tiles={"BLOCK_M": value}) for value in (3, "4", 0, 2**21)),
        *(written(tiles={}), written(size="1"), written(kernel=None), written(more=1)),
    ],
)
def test_damaged_file_is_ignored_with_one_warning(cache, text, caplog):
    cache.parent.mkdir()
    cache.write_text(text)
    measured.measured_tiles.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert autotune.tiles(KERNEL, 1, CPU) == shipped()
    (record,) = caplog.records
    assert "tiles.json is ignored" in record.getMessage()


def test_damaged_file_is_replaced_by_the_next_tuning(cache):
    cache.parent.mkdir()
    cache.write_text("{")
    write_choices(cache, [choice()])
    assert used() == other()


def test_new_choices_replace_those_for_the_same_and_keep_the_rest(cache):
    away = choice(device="another")
    write_choices(cache, [away, choice(source="old")])
    write_choices(cache, [choice()])
    assert read_choices(cache) == [away, choice()]


def test_write_that_fails_leaves_the_old_file_and_no_other(cache, monkeypatch):
    write_choices(cache, [choice()])
    before = cache.read_bytes()
    monkeypatch.setattr(measured.json, "dump", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_choices(cache, [choice(device="another")])
    assert cache.read_bytes() == before
    assert os.listdir(cache.parent) == [cache.name]


def test_sound_file_that_the_damaged_ones_differ_from_is_read(cache):
    cache.parent.mkdir()
    cache.write_text(written())
    assert read_choices(cache) == [Choice("a", "b", "c", "d", 1, {"BLOCK_M": 4})]


def test_unknown_kernel_has_no_choice():
    with pytest.raises(ValueError, match="no source of 'nothing'"):
        make_choice("nothing", 1, CPU, {"BLOCK": 1})
    assert isinstance(choice(), Choice)


def test_size_beyond_the_table_is_named():
    with pytest.raises(ValueError, match=r"rms_norm_fwd has tiles up to 16384, got 16385"):
        autotune.tiles("rms_norm_fwd", 16385, CPU)


def test_float32_has_tiles_of_its_own_where_the_table_says_so():
    gpu = torch.device("meta")
    own = autotune.GPU["ternary_linear_bwd_float32"]
    assert autotune.tiles("ternary_linear_bwd", 9, gpu, torch.float32) in own.values()
    assert autotune.tiles("ternary_linear_bwd", 9, gpu, torch.bfloat16) not in own.values()
    assert autotune.tiles(KERNEL, 1, CPU, torch.float32) == shipped()
