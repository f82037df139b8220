"""One detector notices whatever would make a fused layer or a recorded step another one."""

import gc
import weakref

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from bitnet_triton.models.fused.changes import Changes


def small_model():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nn.Linear(4, 4))
    model[1].register_buffer("scale", torch.ones(1))
    return model.eval()


class OtherSequential(nn.Sequential):
    pass


def move_class(model):
    model[0].__class__ = OtherSequential


class OtherLinear(nn.Linear):
    pass


def move_class_of_leaf(model):
    model[0][0].__class__ = OtherLinear


def drop_module(model):
    del model[0][1]


def write_scale(model):
    model[1].scale.mul_(2)


CHANGES = {
    "another module": lambda model: setattr(model[0], "0", nn.Linear(4, 4)),
    "a module less": drop_module,
    "another class": move_class,
    "another class of a leaf": move_class_of_leaf,
    "another parameter": lambda model: setattr(model[1], "weight", nn.Parameter(torch.ones(4, 4))),
    "other memory of a parameter": lambda model: setattr(model[1].weight, "data", torch.ones(4, 4)),
    "another buffer": lambda model: setattr(model[1], "scale", torch.ones(1)),
    "a buffer that was written to": write_scale,
    "a hook": lambda model: model[0][0].register_forward_hook(lambda *_: None),
    "a hook in front": lambda model: model[0][0].register_forward_pre_hook(lambda *_: None),
    "training": lambda model: model[0].train(),
    "a hook of accelerate": lambda model: add_hook_to_module(model[0], ModelHook()),
    "another dtype": lambda model: model.double(),
    "another forward": lambda model: setattr(model[0], "forward", lambda x: x),
    "another forward of a leaf": lambda model: setattr(model[0][0], "forward", lambda x: x),
    "another forward of a part": lambda model: setattr(model[1], "forward", lambda x: x),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change):
    model = small_model()
    with torch.no_grad():
        changes = Changes(model)
        assert not changes.found(thorough=True)
        CHANGES[change](model)
        assert changes.found(thorough=False)
        assert not Changes(model).found(thorough=True)


def test_a_hook_in_place_of_another_is_noticed():
    model = small_model()
    handle = model[0][0].register_forward_hook(lambda *_: None)
    changes = Changes(model)
    assert not changes.found(thorough=True)
    handle.remove()
    model[0][0].register_forward_hook(lambda *_: None)
    assert changes.found(thorough=False)


def test_what_a_forward_does_is_no_change():
    model = small_model()
    changes = Changes(model)
    with torch.inference_mode():
        model(torch.ones(1, 4))
        assert not changes.found(thorough=True)
    assert not changes.found(thorough=True)


def test_tensors_of_inference_mode_are_taken():
    model = small_model()
    with torch.inference_mode():
        model[1].scale = torch.ones(1)
        changes = Changes(model)
        assert not changes.found(thorough=True)
        model[1].scale = torch.ones(1)
        assert changes.found(thorough=False)


def test_a_model_that_keeps_its_detector_goes_with_its_last_reference():
    model = small_model()
    model.changes = Changes(model)
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
