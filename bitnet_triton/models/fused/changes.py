"""Has somebody changed it? The one answer for fused layers and for recorded steps.

A fused layer and a recorded step stand for modules that a user may change at any time. What they
read of them once, they read again when this says so:

- **before every step**: another module, parameter or buffer in a slot, another class, a hook, a
  forward on an instance (accelerate's too), training, whether adapters of peft are disabled,
  parameters that have moved, and writes to what is copied (scales, angles), if not through
  ``.data``. That is one list compared without Python in between;
- **before every prompt**, and before the first step of a text, all of that and every attribute of
  every module (``variance_epsilon``, ``scaling``, ``layer_idx``), and the memory of every tensor
  (``.data = new``).

Weights that are written to in place are read where they lie and need no notice. What nobody can
see is a change inside an object that an attribute holds; after one, ``bitnet_triton.fuse(model)``
reads everything again.
"""

from __future__ import annotations

from itertools import repeat
from operator import attrgetter, contains, getitem, is_
from typing import Any

from torch import Tensor, nn

_version, _address = attrgetter("_version"), Tensor.data_ptr


class Changes:
    """Modules, tensors, hooks and attributes below a module, as they are now.

    Between two steps all of this has left the caches of a CPU, so a step looks at no more than it
    has to. What lies below the module is kept alive; the module is not: it may keep this.

    Args:
        root: a decoder layer, or a decoder. Of itself its slots are watched, not its attributes.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        # PyTorch changes these dictionaries, it does not replace them
        slots = [
            (owner, name)
            for module in modules
            for owner in (module._modules, module._parameters, module._buffers)
            for name in owner
        ]
        self._owners = [owner for owner, _ in slots]
        self._names = [name for _, name in slots]
        self._held = list(map(getitem, self._owners, self._names))
        self._sizes = [len(owner) for owner in self._owners]
        self._hooks = [
            watchers
            for module in modules
            for watchers in (module._forward_pre_hooks, module._forward_hooks)
        ]
        top = set(root.children())
        # of the others nobody asks whether they are trained
        parents = [m for m in modules[1:] if m._modules or m in top]
        self._parent_attributes = [module.__dict__ for module in parents]
        self._adapter_attributes = [
            module.__dict__ for module in modules if "_disable_adapters" in module.__dict__
        ]
        self._below = modules[1:]
        self._below_attributes = [module.__dict__ for module in self._below]
        self._attributes = [dict(module.__dict__) for module in self._below]
        # what moves is given other memory
        self._parameters = list(root.parameters())
        self._buffers = list(root.buffers())
        # these are copied where they are read; those of inference mode count no versions
        self._copied = [t for t in self._buffers if t.ndim < 2 and not t.is_inference()]
        self._seen = self._look()
        self._places = self._look_at_memory()

    def found(self, *, thorough: bool) -> bool:
        """Tell whether anything has changed.

        Args:
            thorough: look at attributes and at the memory of buffers as well, as before a prompt.
        """
        try:
            if not all(map(is_, map(getitem, self._owners, self._names), self._held)):
                return True
        except KeyError:  # a slot is gone
            return True
        if self._look() != self._seen:
            return True
        return thorough and self._found_in_attributes()

    def _look(self) -> tuple[list[Any], ...]:
        return (
            list(map(type, self._below)),
            [each["training"] for each in self._parent_attributes],
            [each["_disable_adapters"] for each in self._adapter_attributes],
            list(map(contains, self._below_attributes, repeat("forward"))),  # accelerate's too
            list(map(tuple, self._hooks)) if any(self._hooks) else [],  # a key is given only once
            list(map(_version, self._copied)),
            list(map(_address, self._parameters)),
        )

    def _look_at_memory(self) -> list[tuple[int, Any]]:
        return [(t.data_ptr(), t.dtype) for t in (*self._parameters, *self._buffers)]

    def _found_in_attributes(self) -> bool:
        if [len(owner) for owner in self._owners] != self._sizes:
            return True  # a slot is new
        if self._look_at_memory() != self._places:
            return True
        try:
            return any(m.__dict__ != seen for m, seen in zip(self._below, self._attributes))
        except (RuntimeError, ValueError):  # two tensors, or arrays, that are not the same object
            return True
