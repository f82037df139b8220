"""Whether a model is still what it was when its decode step was recorded.

To ask every layer by itself takes a millisecond of Python a step, some five per cent of it. Here
all layers are one list of slots, which is compared without Python in between.
"""

from __future__ import annotations

from operator import attrgetter, getitem, is_
from typing import Any

from torch import Tensor, nn

_version, _address = attrgetter("_version"), Tensor.data_ptr


class Watch:
    """Modules, tensors, hooks and modes of a model, as they are now.

    Between two steps all of this has left the caches of a CPU, so it looks at no more than what a
    recording would miss: weights that are written to in place are read by the kernels as they are.

    Args:
        model: may change; ``holds`` then says so. What lies below it is kept alive, it is not: it
            may keep this.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
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
        self._hooks = [
            watchers
            for module in modules
            for watchers in (module._forward_pre_hooks, module._forward_hooks)
        ]
        top = set(model.children())
        self._parents = [m for m in modules[1:] if m._modules or m in top]
        self._attributes = [module.__dict__ for module in self._parents]
        # what moves is given other memory
        self._parameters = list(model.parameters())
        # scales are copied where matrices are merged; those of inference mode count no versions
        self._scales = [
            held for held in model.buffers() if held.ndim < 2 and not held.is_inference()
        ]
        self._seen = self._look()

    def holds(self) -> bool:
        """Tell whether nothing has changed: no module, no tensor, no hook, no mode."""
        try:
            return (
                all(map(is_, map(getitem, self._owners, self._names), self._held))
                and self._look() == self._seen
            )
        except KeyError:  # a slot is gone
            return False

    def _look(self) -> tuple[list[Any], ...]:
        return (
            list(map(type, self._parents)),
            [attributes["training"] for attributes in self._attributes],
            ["forward" in attributes for attributes in self._attributes],  # accelerate's hooks too
            list(map(tuple, self._hooks)) if any(self._hooks) else [],  # a key is given only once
            list(map(_version, self._scales)),
            list(map(_address, self._parameters)),
        )
