"""transformers' own tests of models, run on ours: ``docs/testing.md`` says how.

Every class here is transformers' ModelTesterMixin and TrainingTesterMixin on one variant of
``variants.py``. What does not apply or fails is named in ``reasons.py``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import unittest
from fnmatch import fnmatchcase
from pathlib import Path
from unittest import mock

import pytest
import torch

HERE = Path(__file__).parent


def _load(name):
    spec = importlib.util.spec_from_file_location(f"peer_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


upstream = _load("upstream")
reasons = _load("reasons")
if upstream.objection() is not None:
    pytest.skip(upstream.objection(), allow_module_level=True)
variants = _load("variants")

modeling = upstream.load("test_modeling_common")
training = upstream.load("test_training_mixin")
configuration = upstream.load("test_configuration_common")

pytestmark = pytest.mark.peer


class ModelTester:
    """What the mixins ask for: a tiny config, and inputs for it."""

    __test__ = False
    batch_size = 5
    seq_length = 7

    def __init__(self, variant):
        self.variant = variant
        self.base_model_class, self.causal_lm_class = variant.models
        self.is_training = variant.trains
        for name, value in variants.SIZES.items():
            setattr(self, name, value)

    def get_config(self):
        return self.variant.config()

    def prepare_config_and_inputs_for_common(self):
        ids = modeling.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        # rows of 1, 2, 3, ... tokens, padded on the right
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}


class Cases(modeling.ModelTesterMixin, training.TrainingTesterMixin):
    """transformers' mixins, and its test of configs, on ``variant``."""

    variant = None
    model_tester = None
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = ModelTester(self.variant)
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        if self.variant.attention is not None:
            stack.enter_context(_attention_in_place_of_sdpa(self.variant.attention))
            for model in self.variant.models:
                # of PyTorch's attention Gemma 2 says that it cannot bound scores; ours can
                stack.enter_context(mock.patch.object(model, "_supports_sdpa", True))

    def test_config(self):
        # what is not given is not written, and an attention mode is written as a plan
        config = self.variant.config()
        given = [name for name, value in self.variant.arguments().items() if value is not None]
        arguments = {name: config.to_dict()[name] for name in given}
        tester = configuration.ConfigTester(self, config_class=self.variant.kind, **arguments)
        tester.run_common_tests()


def _attention_in_place_of_sdpa(name):
    """Let every model that asks for PyTorch's attention, or for none, have ``name``."""
    original = modeling.PreTrainedModel.get_correct_attn_implementation

    def get(self, requested_attention, is_init_check=False):
        if requested_attention in (None, "sdpa"):
            requested_attention = name
        return original(self, requested_attention, is_init_check)

    return mock.patch.object(modeling.PreTrainedModel, original.__name__, get)


def _build(name, variant):
    bases = (Cases, modeling.GenerationTesterMixin, unittest.TestCase)
    body = {"variant": variant, "all_model_classes": variant.models, "__module__": __name__}
    cls = type(f"Test{name}", bases, body)
    left_out = list(reasons.OTHER_MODELS)
    if not upstream.has("GenerationTesterMixin"):  # then nothing would be inherited
        left_out.append("test_generation_tester_mixin_inheritance")
    for test in dir(cls):
        if test.startswith("test_") and any(fnmatchcase(test, pattern) for pattern in left_out):
            setattr(cls, test, None)
    return cls


CLASSES = {name: _build(name, variant) for name, variant in variants.VARIANTS.items()}
globals().update({cls.__name__: cls for cls in CLASSES.values()})
CASES = [
    f"{name}::{test}"
    for name, cls in CLASSES.items()
    for test in dir(cls)
    if test.startswith("test_") and callable(getattr(cls, test))
]


@pytest.mark.parametrize("table", ["FAILS", "SKIPS", "ELSEWHERE", "FAST"])
def test_every_entry_of_a_table_names_a_case(table):
    unused = [
        pattern
        for pattern in getattr(reasons, table)
        if not any(fnmatchcase(case, pattern) for case in CASES)
    ]
    assert unused == []


@pytest.mark.parametrize("mixin", reasons.MIXINS)
def test_a_mixin_is_run(mixin):
    bases = {base.__name__ for base in CLASSES["Dense"].__mro__}
    if mixin not in bases or not upstream.has(mixin):
        pytest.skip(reasons.MIXINS[mixin])
