"""A sample that is as large as its error asks for: verified sampling (arXiv:2510.05688)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bitnet_triton.attention.checks import check_known, check_number
from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.mode import Mode, Reads, Step, StepLayer, StepTensors
from bitnet_triton.attention.sampled import Attend, SamplingMode
from bitnet_triton.cache import Memory, SignsLayer, UnitsLayer
from bitnet_triton.cache.key_values import LEFTPAD, USED
from bitnet_triton.kernels import (
    SignCodes,
    Units,
    pool_keys,
    top_blocks,
    verified_sampling_attention,
)
from bitnet_triton.kernels.lsh_sampling.signs import rotation, sign_pages
from bitnet_triton.kernels.lsh_sampling.tables import mean_of_keys
from bitnet_triton.kernels.lsh_sampling.verified import TAILS

_FINDS = ("bounds", "signs")
_LAYERS = 1 << 10  # seeds of the layers lie side by side


@dataclass(frozen=True)
class VerifiedSampling(SamplingMode):
    """Pages that matter, and of all other keys a random sample, whose size follows from an error.

    Nothing is trained and nothing is dropped. The sum of exponentials is off by more than
    ``epsilon`` of it with probability ``delta`` at most, as far as the central limit theorem holds
    (``verified_sampling_attention``). Each token and layer draws anew.

    Attributes:
        epsilon: error of the sum of exponentials, as a share of it.
        delta: how probably it may be larger.
        page: tokens of a page.
        selected: pages that the heads of a group read, those that are read in any case included.
        initial: first pages that are read in any case.
        local: latest ones, the one that is being filled included.
        base: keys that tell how far terms lie apart, and the fewest that are drawn.
        seed: of the draw; equal seeds give equal tokens.
        tails: "normal" or "sampled", what the ``base`` keys may have missed.
        find: how pages are found. "bounds": by the largest score that any of their keys could have;
            "signs": by the key whose packed signs are most like those of the queries. With the
            latter no step is recorded.
    """

    epsilon: float = 0.05
    delta: float = 0.05
    page: int = 32
    selected: int = 32
    initial: int = 1
    local: int = 3
    base: int = 256
    seed: int = 0
    tails: str = "normal"
    find: str = "bounds"

    def __post_init__(self) -> None:
        for name in ("epsilon", "delta"):
            share = getattr(self, name)
            if not isinstance(share, (int, float)) or isinstance(share, bool):
                got = type(share).__name__
                raise TypeError(f"`attention`: {name!r}: expected a number, got {got}")
            if not 0 < share < 1:
                raise ValueError(
                    f"`attention`: {name!r}: expected more than 0 and less than 1, got {share}"
                )
        for name, least in (
            ("page", 1), ("initial", 0), ("local", 1), ("base", 2), ("seed", 0),
            ("selected", self.initial + self.local),
        ):  # fmt: skip
            check_number(name, getattr(self, name), least)
        check_known("'tails'", self.tails, TAILS)
        check_known("'find'", self.find, _FINDS)
        if self.seed >= 1 << 20:
            raise ValueError(f"`attention`: 'seed': expected less than 2**20, got {self.seed}")

    @property
    def units(self) -> Units:
        """The bounds of pages."""
        return Units("bounds", self.page, self.page)

    def memory(self, other: Mode) -> Memory:
        """Return a memory with the bounds of pages, or with signs of keys.

        Raises:
            ValueError: the mode of the other phase needs another memory.
        """
        self.check_other(other)
        return SignsLayer(self) if self.find == "signs" else UnitsLayer([self.units])

    def attend(self, k: Tensor, v: Tensor, prompt: int, context: AttentionContext) -> Attend | None:
        """Return what draws by the pages of the memory, or by ones that are made for a call."""
        settings = self._settings(k, prompt, context)

        def attend(q: Tensor, used: Tensor) -> Tensor:
            return verified_sampling_attention(q, k, v, used=used, **settings)[0]

        return attend

    def count(
        self, q: Tensor, k: Tensor, v: Tensor, prompt: int, context: AttentionContext
    ) -> Reads:
        """Count the rows of pages and those that are drawn, and what chooses and measures them."""
        settings, tokens = self._settings(k, prompt, context), k.shape[1]
        *_, drawn = verified_sampling_attention(q, k, v, **settings)
        left = settings["leftpad"]
        chosen: dict[str, Any] = {
            "selected": self.selected, "initial": self.initial, "local": self.local,
            "leftpad": left,
        }  # fmt: skip
        if self.find == "signs":
            pages = sign_pages(q, settings["signs"], page=self.page, used=None, **chosen)[:, 0]
            compared = tokens
        else:
            pages = top_blocks(
                q, settings["bounds"], units=self.units, block=self.page, sets=k.shape[2],
                tokens=tokens, **chosen,
            )[:, 0]  # fmt: skip
            compared = tokens // self.page
        last = tokens if left is None else tokens - left[:, None, None]
        rows = ((last - pages * self.page).clamp(0, self.page) * (pages >= 0)).sum(-1, True)
        told = (last - rows).clamp(0, self.base)
        read = (rows + drawn).float().mean().item()
        return Reads(read, read + told.float().mean().item() + compared)

    def _settings(self, k: Tensor, prompt: int, context: AttentionContext) -> dict[str, Any]:
        """Return what ``verified_sampling_attention`` is told of keys [B Tk Hk D]."""
        memory, left = context.memory, context.tokens.leftpad
        left = None if left is None else left.int()
        found: dict[str, Any] = {}
        if self.find == "signs":
            found["signs"] = self._signs(k, prompt, left, memory)
        elif isinstance(memory, UnitsLayer) and self.units in memory.units:
            found["bounds"] = memory.sums(self.units)
        else:
            found["bounds"] = pool_keys(k, units=self.units, leftpad=left)
        return {
            "epsilon": self.epsilon, "delta": self.delta, "page": self.page,
            "selected": self.selected, "initial": self.initial, "local": self.local,
            "base": self.base, "seed": self._seed(context.layer), "scale": context.scale,
            "tails": self.tails, "leftpad": left, **found,
        }  # fmt: skip

    def _signs(self, k: Tensor, prompt: int, left: Tensor | None, memory: object) -> SignCodes:
        """Return the signs of all keys, around the mean of those of the prompt."""

        def centre_of(keys: Tensor) -> Tensor:
            return mean_of_keys(keys, left)

        if isinstance(memory, SignsLayer) and memory.owner == self:
            codes, centre = memory.signs(prompt, centre_of, SignCodes.pack)
        else:
            centre = centre_of(k[:, :prompt])
            codes = SignCodes.pack(k, centre)
        return SignCodes(codes, rotation(k.shape[-1], 0, k.device), centre)

    def step(self, memory: Memory, layer: StepLayer) -> Step | str:
        """Return one decode step as launches, or why there is none."""
        if self.find == "signs":
            return "choosing pages by signs of keys is no launch"
        return super().step(memory, layer)

    def sampled_step(self, memory: Memory, layer: StepLayer) -> Step | None:
        """Write the new token and the page that it completes, and read pages and a sample."""
        if not isinstance(memory, UnitsLayer) or not memory.is_decoding:
            return None

        def run(step: StepTensors) -> Tensor:
            from bitnet_triton.kernels.lsh_sampling.verified import Verified, triton_verified

            q = memory.write(step.heads, step.cos, step.sin, step.places)
            keys, values = (store.transpose(1, 2) for store in memory.stores)
            call = Verified(
                memory.unit_stores[self.units], step.places[LEFTPAD], step.places[USED], self.page,
                self.selected, self.initial, self.local, self.base, self._seed(layer.index),
                self.tails, self.epsilon, self.delta, layer.scale,
            )  # fmt: skip
            return triton_verified(q, keys, values, call)[0]

        return run

    def _seed(self, layer: int) -> int:
        return self.seed * _LAYERS + layer % _LAYERS
