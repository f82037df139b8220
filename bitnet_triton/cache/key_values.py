"""Memories of keys and values that lie in two tensors: how a recorded decode step uses them."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from bitnet_triton.cache.memory import Call, Memory
from bitnet_triton.kernels import Mask
from bitnet_triton.kernels.flash_attention.operands import SinkQuery
from bitnet_triton.kernels.rotary.op import ROTARY_AND_STORE
from bitnet_triton.runtime import select

# The rows of ``places``
SLOT, POSITION, LEFTPAD, USED = range(4)


class KeyValueMemory(Memory):
    """Keys and values [B Hk capacity D], of which the first ``held`` slots are in use.

    ``places`` are int32 [4 B], of each row: the slot of the new token, its position, the first slot
    that is no padding, and how many slots are in use with the new token.
    """

    @property
    def held(self) -> int:
        """How many slots of the stores are in use."""
        raise NotImplementedError

    @property
    def stores(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B Hk capacity D], as ``reserve`` has left them."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all tokens: transformers 5.17 would keep as many zeros, which attention reads."""
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()

    def is_ready(self, B: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Tell whether it holds tokens of B rows, in that dtype, on that device."""
        if not self.held:
            return False
        keys = self.keys
        assert keys is not None
        return keys.shape[0] == B and keys.dtype == dtype and keys.device == device

    def address(self) -> tuple[Tensor, ...]:
        """Return the stores."""
        return self.stores

    def places_key(self) -> Hashable:
        """Return how many tokens are held: that decides about places."""
        return self.held

    def places(self, call: Call) -> Tensor:
        """Return slot, position, padding and length of each row, int32 [4 B]."""
        keys, held = self.keys, self.held
        assert keys is not None
        places = torch.empty((4, keys.shape[0]), dtype=torch.int32)
        places[SLOT], places[USED] = held, held + 1
        places[POSITION] = call.position
        places[LEFTPAD] = 0
        if call.leftpad is not None:
            places[LEFTPAD] = (call.leftpad - (call.columns - held)).clamp_min(0)
        return places

    def write(self, heads: Tensor, cos: Tensor, sin: Tensor, places: Tensor) -> Tensor:
        """Rotate queries and keys, store keys and values; return the queries [B 1 H D]."""
        keys, values = (store.transpose(1, 2) for store in self.stores)  # the layout of ops
        run = select("rotary_and_store", ROTARY_AND_STORE, keys.device)
        return run(heads, cos, sin, keys, values, places[SLOT], places[POSITION])

    def decode(
        self,
        q: Tensor,
        places: Tensor,
        *,
        mask: Mask,
        scale: float,
        sink_query: SinkQuery | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend to what ``mask`` shows of the stores."""
        # Triton is imported on first use
        from bitnet_triton.kernels.flash_attention.decode import launch_decode
        from bitnet_triton.kernels.flash_attention.decode_pattern import launch_decode_pattern

        keys, values = (store.transpose(1, 2) for store in self.stores)
        left, used = places[LEFTPAD], places[USED]
        if sink_query is None and _plain_objection(mask) is None:
            return launch_decode(
                q, keys, values, mask=mask, scale=scale, leftpad_k=left, seqused_k=used
            )
        return launch_decode_pattern(
            q, keys, values, mask=mask, scale=scale, leftpad_k=left, seqused_k=used,
            sink_query=sink_query, positions=None if sink_query is None else places[POSITION],
        )  # fmt: skip

    def decode_objection(self, mask: Mask, sink_query: bool = False) -> str | None:
        """Say what no mask of a decode step says; None when there is nothing."""
        from bitnet_triton.kernels.flash_attention.decode_pattern import decode_pattern_objection

        if not sink_query and _plain_objection(mask) is None:
            return None
        return decode_pattern_objection(_ONE, _ONE, mask)


_ONE = torch.empty(1, 1, 1, 1, device="meta")  # a query, and a key


def _plain_objection(mask: Mask) -> str | None:
    """Say why the kernel for windows and first tokens does not do; None where it does."""
    from bitnet_triton.kernels.flash_attention.decode import decode_objection

    return decode_objection(_ONE, _ONE, mask)


def may_write(store: Tensor) -> bool:
    """Tell whether memory may be written to: of what inference mode has made, nobody else may."""
    return torch.is_inference_mode_enabled() or not store.is_inference()
