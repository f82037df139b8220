"""Documents in one row come out as if each were alone, by our collator and by transformers'."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithFlattening

import bitnet_triton as bt
from bitnet_triton.attention.registry import MODES
from bitnet_triton.training import PackingCollator, pack_rows

FULL = {"mode": "full"}
SETTINGS = {
    "sliding": {"window": 4, "sinks": 1},
    "longformer": {"window": 4, "dilation": 2},
    "streaming": {"window": 4},
    "local": {"block": 4},
    "strided": {"block": 4},
    "fixed": {"block": 4},
    "top_k": {"keys": 3},
    "threshold": {"share": 0.2},
    "pooled_blocks": {"block": 2, "selected": 2},
    "indexed_blocks": {"block": 2, "selected": 2},
    "quest": {"page": 2, "budget": 4},
    "routing": {"decay": 1.0},  # centroids that stay: a call in training moves them
    "native_sparse": {"block": 4, "stride": 2, "selection": 4, "selected": 3, "window": 4},
}
LENGTHS = (9, 1, 14, 5)


def attentions():
    """Every mode, alone and before generated tokens that see everything, and the other way."""
    for name in MODES:
        mode = {"mode": name, **SETTINGS.get(name, {})}
        yield name, mode
        if name not in ("full", "linear"):  # a state goes with no other mode
            yield f"{name} then full", {"prefill": mode, "decode": FULL}
    for name in ("sliding", "quest", "lsh_sampling"):
        mode = {"mode": name, **SETTINGS.get(name, {})}
        yield f"full then {name}", {"prefill": FULL, "decode": mode}


# What refuses packed documents, by what it says
REFUSED = {
    "streaming": "counts positions itself",
    "streaming then full": "counts positions itself",
    "lsh_sampling then full": "takes no packed sequences",
    "verified_sampling then full": "takes no packed sequences",
    "full then lsh_sampling": "takes no packed sequences",
}


# Queries serve as keys: a head of keys for each
SHARED = ("reformer", "routing")


def build(key_heads):
    torch.manual_seed(0)
    config = bt.BitNetConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=key_heads, max_position_embeddings=64,
    )  # fmt: skip
    return bt.BitNetForCausalLM(config)


@pytest.fixture(scope="module")
def model():
    return build(2)


@pytest.fixture(scope="module")
def model_of_equal_heads():
    return build(4)


def documents():
    for length in LENGTHS:
        ids = torch.randint(3, 64, (length,)).tolist()
        yield {"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]}


@pytest.mark.parametrize(("name", "attention"), [pytest.param(*a, id=a[0]) for a in attentions()])
def test_documents_do_not_see_each_other(name, attention, model, model_of_equal_heads):
    if name.startswith(SHARED):
        model = model_of_equal_heads
    bt.set_attention(model, attention).train()
    first, other = list(documents()), list(documents())
    for collate in (PackingCollator(), DataCollatorWithFlattening(return_flash_attn_kwargs=True)):
        packed = collate(first)
        expected = REFUSED.get(name)
        if expected is not None:
            with pytest.raises(ValueError, match=expected):
                model(**packed)
            continue
        logits = model(**packed).logits.detach().split(LENGTHS, 1)
        for place, kept in enumerate(first):
            # whatever the other documents say, this one comes out bit for bit the same
            changed = [kept if i == place else document for i, document in enumerate(other)]
            assert torch.equal(model(**collate(changed)).logits.split(LENGTHS, 1)[place],
                               logits[place]), (name, place)  # fmt: skip
        is_close = []
        for document, found in zip(first, logits):
            alone = {key: torch.tensor([value]) for key, value in document.items()}
            logits_alone = model(**alone).logits.detach()
            # near a tie of codes, or of blocks that are chosen, rounding may decide otherwise
            errors = (logits_alone - found).norm(dim=-1) / found.norm(dim=-1)
            is_close.append(errors.flatten() < 0.02)
        assert torch.cat(is_close).double().mean() > 0.5, name


def test_answers_are_what_labels_masks_or_lengths_say():
    ids = [5, 6, 7, 8]
    kinds = [
        {"labels": [-100, -100, 7, 8]},
        {"completion_mask": [0, 0, 1, 1]},
        {"prompt_len": 2},
        {"labels": torch.tensor([-100, -100, 7, 8]), "prompt_len": 1},
    ]
    for kind in kinds:
        features = [{"input_ids": ids, **kind}, {"input_ids": torch.tensor(ids), **kind}]
        batch = PackingCollator()(features)
        assert batch["labels"].tolist() == [2 * [-100, -100, 7, 8]]
        assert batch["position_ids"].tolist() == [2 * [0, 1, 2, 3]]
        assert batch["cu_seq_lens_q"].tolist() == [0, 4, 8]
        assert batch["cu_seq_lens_q"].dtype == torch.int32
        assert "prompt_len" not in batch
    # whole texts: their first token is nobody's to predict
    batch = PackingCollator()([{"input_ids": ids}] * 2)
    assert batch["labels"].tolist() == [2 * [-100, 6, 7, 8]]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"labels": [1]}, "`labels`: expected 4, one a token, got 1"),
        ({"completion_mask": [1] * 5}, "`completion_mask`: expected 4, one a token, got 5"),
        ({"prompt_len": 5}, "`prompt_len`: expected at most 4 tokens, got 5"),
    ],
)
def test_what_does_not_fit_is_named(document, message):
    with pytest.raises(ValueError, match=message):
        PackingCollator()([{"input_ids": [5, 6, 7, 8], **document}])


def test_rows_hold_whole_documents_in_their_order():
    texts = [{"input_ids": [size] * size} for size in (3, 4, 2, 5, 6)]
    rows = list(pack_rows(texts, 7))
    assert [[len(d["input_ids"]) for d in row] for row in rows] == [[3, 4], [2, 5], [6]]
    batch = PackingCollator()(rows[:2])
    assert batch["cu_seq_lens_k"].tolist() == [0, 3, 7, 9, 14]
    with pytest.raises(ValueError, match="`length`: expected at least 6, a whole document, got 5"):
        list(pack_rows(texts, 5))


def test_a_prompt_that_is_given_ends_where_it_says(model):
    """A second question behind a first answer counts as generated, or not, as the data say."""
    window = {"mode": "sliding", "window": 3}
    bt.set_attention(model, {"prefill": window, "decode": FULL}).train()
    document = {"input_ids": list(range(3, 23)), "labels": [-100] * 15 + list(range(18, 23))}
    by_label, given = (
        model(**PackingCollator(tell_prompts=tell)([{**document, "prompt_len": 9}] * 2)).logits
        for tell in (False, True)
    )
    for batch in (by_label, given):
        assert torch.equal(*batch.split(20, 1))
    assert torch.equal(by_label[:, :9], given[:, :9])
    assert not torch.allclose(by_label[:, 9:15], given[:, 9:15], atol=1e-3)


def test_rows_that_trl_has_packed_are_taken_apart():
    row = {"input_ids": [5, 6, 7, 8, 9, 10], "assistant_masks": [0, 1, 1, 0, 0, 1]}
    batch = PackingCollator()([{**row, "seq_lengths": [3, 3]}])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, -100, 10]]
    with pytest.raises(ValueError, match="`seq_lengths`: expected lengths that sum to 6"):
        PackingCollator()([{**row, "seq_lengths": [3, 2]}])


def test_padding_and_answers_that_nobody_tells_are_refused():
    with pytest.raises(ValueError, match="`attention_mask`"):
        PackingCollator()([{"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}])
    with pytest.raises(ValueError, match=r"`answers_only`.*remove_unused_columns"):
        PackingCollator(answers_only=True)([{"input_ids": [5, 6]}])
    PackingCollator(answers_only=True)([{"input_ids": [5, 6], "prompt_len": 1}])


def test_documents_without_tokens_are_left_out():
    full = [{"input_ids": [5, 6, 7], "prompt_len": 1}, {"input_ids": [8, 9], "prompt_len": 0}]
    empty = {"input_ids": [], "prompt_len": 0}
    collate = PackingCollator(tell_prompts=True)
    wanted = collate(full)
    found = collate([empty, full[0], empty, full[1], empty])
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name
    for nothing in ([], [empty]):
        with pytest.raises(ValueError, match="`features`: expected a document with tokens"):
            collate(nothing)


def test_prompts_of_rows_that_are_packed_already_are_not_passed_over():
    row = {"input_ids": [5, 6, 7], "seq_lengths": [1, 2], "prompt_len": 1}
    with pytest.raises(ValueError, match="`prompt_len`: expected labels or a mask"):
        PackingCollator()([row])
