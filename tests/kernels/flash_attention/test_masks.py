"""Forward and backward under every mask, against the float64 reference."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitnet_triton.kernels import Mask
from bitnet_triton.kernels.flash_attention.launchers import ATTENTION_FWD

pytestmark = [
    pytest.mark.backends("triton", "reference"),
    pytest.mark.usefixtures("forced_backend"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


SHAPES = {
    # delta and dP are the same sum of products here, in another order: what is left of their
    # difference is rounding, where the reference has an exact zero
    "one token": {"Tq": 1, "Tk": 1, "worst": 6e-6},
    "just over a tile": {"Tq": 129, "Tk": 129},
    "more keys": {"Tq": 20, "Tk": 150},
    "more queries": {"Tq": 150, "Tk": 37},
    "five heads a key": {"H": 5, "Hk": 1, "Tq": 40, "Tk": 131},
    "odd sizes": {"D": 80, "Dv": 24, "H": 2, "Hk": 2},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_match_the_reference(shape, compare, backend):
    compare(Mask(), **SHAPES[shape])


@pytest.mark.parametrize("shape", ["more keys", "more queries"])
def test_shapes_match_the_reference_without_causality(shape, compare, backend):
    compare(Mask(causal=False), **SHAPES[shape])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_match_the_reference(dtype, compare, backend):
    compare(Mask(window=70), dtype=dtype, D=64, Dv=64)


def test_the_largest_heads_match_the_reference(compare, backend):
    compare(Mask(window=70), dtype=torch.bfloat16, D=256, Dv=256, B=1, H=2, Hk=1)


MASKS = {
    "window to both sides": Mask(causal=False, window=20, window_right=9),
    "sinks": Mask(window=30, sinks=5),
    "dilation": Mask(window=9, dilation=3),
    "dilation by head": Mask(window=9, dilation=(1, 3, 2, 4), sinks=2),
    "global tokens": Mask(causal=False, window=9, window_right=4, global_tokens=(0, 77, 140)),
    "dense rows": Mask(window=9, sinks=3, dense_from=100),
    "local": Mask(pattern="local", block=37),
    "strided": Mask(pattern="strided", block=12),
    "strided, both sides": Mask(causal=False, pattern="strided", block=12, window=40),
    "fixed": Mask(pattern="fixed", block=37, summary=3, sinks=2),
    "fixed, both sides": Mask(
        causal=False, pattern="fixed", block=12, summary=2, dilation=2, global_tokens=(3,)
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_match_the_reference(name, compare, backend):
    compare(MASKS[name])


def test_masks_that_differ_by_row_match_the_reference(compare, device, backend):
    tokens = torch.rand(2, 150, device=device) > 0.9
    compare(Mask(window=9, global_tokens=tokens, dense_from=int32(60, 140).to(device)))


LENGTHS = {
    "padding": {"leftpad_k": int32(0, 120), "seqused_k": int32(110, 150)},
    "padded queries": {"seqused_q": int32(0, 90), "seqused_k": int32(7, 150), "Tk": 160},
    "no keys": {"leftpad_k": int32(30, 150), "seqused_k": int32(30, 150), "Tq": 40},
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_padding_matches_the_reference(lengths, causal, compare, device, backend):
    given_ = {k: v.to(device) if torch.is_tensor(v) else v for k, v in LENGTHS[lengths].items()}
    compare(Mask(causal=causal, window=40, sinks=2), **given_)


@pytest.mark.parametrize("mask", [Mask(window=40, sinks=2), Mask(causal=False)], ids=str)
def test_a_softcap_matches_the_reference(mask, compare, backend):
    compare(mask, softcap=1.5)


MASK_SETTINGS = st.fixed_dictionaries(
    {"causal": st.booleans()},
    optional={
        "window": st.integers(1, 40),
        "window_right": st.integers(0, 40),
        "sinks": st.integers(0, 60),
        "dilation": st.one_of(st.integers(1, 5), st.tuples(*[st.integers(1, 5)] * 4)),
        "global_tokens": st.lists(st.integers(0, 100), max_size=4).map(tuple),
        "dense_from": st.integers(0, 100),
        "pattern": st.sampled_from(["local", "strided", "fixed"]),
        "block": st.integers(1, 40),
        "summary": st.integers(1, 4),
    },
)


def build_mask(settings_):
    """Drop what does not go together."""
    if settings_["causal"]:
        settings_.pop("window_right", None)
    if "pattern" not in settings_ or "block" not in settings_:
        for name in ("pattern", "block"):
            settings_.pop(name, None)
    if settings_.get("pattern") != "fixed":
        settings_.pop("summary", None)
    elif "summary" in settings_:
        settings_["summary"] = min(settings_["summary"], settings_["block"])
    return Mask(**settings_)


LENGTH_SETTINGS = st.fixed_dictionaries(
    {"Tq": st.integers(16, 90), "Tk": st.integers(16, 90)},
    optional={"leftpad_k": st.integers(0, 90), "seqused_k": st.integers(0, 90),
              "seqused_q": st.integers(0, 90)},
)  # fmt: skip


def check_any_mask(compare, device, mask_settings, lengths):
    Tq, Tk = lengths.pop("Tq"), lengths.pop("Tk")
    bounds = {"leftpad_k": Tk, "seqused_k": Tk, "seqused_q": Tq}
    tensors = {
        name: int32(min(value, bounds[name]), bounds[name] // 2).to(device)
        for name, value in lengths.items()
    }
    compare(build_mask(mask_settings), Tq=Tq, Tk=Tk, **tensors)


# every kind of mask is a kernel of its own to compile: a few here, many where time is not short
EXAMPLES = int(os.environ.get("BITNET_TRITON_EXAMPLES", "6"))


@settings(
    max_examples=EXAMPLES, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(mask_settings=MASK_SETTINGS, lengths=LENGTH_SETTINGS)
@pytest.mark.backends("triton")
def test_any_mask_matches_the_reference(mask_settings, lengths, compare, device, backend):
    check_any_mask(compare, device, dict(mask_settings), dict(lengths))


def test_every_backend_is_tested_here():
    assert set(ATTENTION_FWD) == {"triton", "reference"}
