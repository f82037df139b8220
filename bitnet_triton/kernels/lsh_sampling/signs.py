"""Which pages matter by packed signs: one bit a channel after a fixed random rotation.

The share of bits that a centred key has in common with a query tells their angle (SimHash), from a
sixteenth of the memory of bfloat16 keys. Bounds of pages take less, but are loose where the keys of
a page have little in common; a single key that matters stands out by its own code.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet_triton.kernels.common.checks import check_device, check_dtype, check_shape, check_tensor
from bitnet_triton.kernels.lsh_sampling.launchers import HASH
from bitnet_triton.kernels.lsh_sampling.reference import hash_reference
from bitnet_triton.runtime import Implementation, register_op, select

_BITS = 16  # of a word
_FORCED = 1 << 30  # above any number of bits


@functools.lru_cache(maxsize=8)
def rotation(D: int, seed: int, device: torch.device) -> Tensor:
    """Return orthogonal planes [16 W D] in float32, W words of them; the same on every device."""
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(seed)
        words = -(-D // _BITS)
        turns = [
            torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))[0]
            for _ in range(-(-words * _BITS // D))
        ]
        planes = torch.cat(turns)[: words * _BITS].float()
        return planes.unflatten(0, (words, _BITS)).transpose(0, 1).contiguous().to(device)


@dataclass(eq=False)
class SignCodes:
    """Signs of rotated, centred keys, 16 channels a word.

    Attributes:
        codes: int16 [B Hk W T].
        planes: float32 [16 W D], of the rotation.
        centre: float32 [B Hk D], the mean of the keys, or of those that came first.
    """

    codes: Tensor
    planes: Tensor
    centre: Tensor

    @staticmethod
    def pack(keys: Tensor, centre: Tensor, *, seed: int = 0) -> Tensor:
        """Return the signs of keys [B T Hk D] around ``centre``, int16 [B Hk W T], with words W."""
        (B, T, Hk, D), device = keys.shape, keys.device
        planes = rotation(D, seed, device)
        keys = keys.detach()
        codes = torch.empty((B, Hk, planes.shape[1], T), dtype=torch.int16, device=device)
        norms = torch.empty((B, Hk, T), device=device)
        keys = keys if keys.stride(-1) == 1 else keys.contiguous()
        select("lsh_hash", HASH, device)(keys, planes, centre, codes, norms)
        return codes

    @classmethod
    def build(cls, keys: Tensor, *, seed: int = 0, leftpad: Tensor | None = None) -> SignCodes:
        """Pack the signs of keys.

        Args:
            keys: [B T Hk D] float16, bfloat16 or float32, rotated, T at least 1.
            seed: of the rotation.
            leftpad: int32 [B], the first row that is no padding. Default: the first one.

        Raises:
            TypeError: a tensor has a wrong dtype.
            ValueError: shapes do not fit.
            BackendUnavailableError: the forced backend cannot run.
        """
        from bitnet_triton.kernels.lsh_sampling.tables import check_keys, mean_of_keys

        check_keys(keys, leftpad)
        keys = keys.detach()
        with torch.no_grad():
            centre = mean_of_keys(keys, leftpad)
            codes = cls.pack(keys, centre, seed=seed)
        return cls(codes, rotation(keys.shape[-1], seed, keys.device), centre)

    def check(self, q: Tensor, k: Tensor) -> None:
        """Raise unless the codes are such as keys [B T Hk D] have."""
        check_tensor("signs.codes", self.codes)
        check_dtype("signs.codes", self.codes, torch.int16)
        B, T, Hk, D = k.shape
        check_shape("signs.codes", self.codes, "B Hk W T", B=B, Hk=Hk, W=-(-D // _BITS), T=T)
        check_device("signs.codes", self.codes, q.device)


def _triton_scores(q: Tensor, codes: Tensor, planes: Tensor) -> Tensor:
    from bitnet_triton.kernels.lsh_sampling.hash import launch_hash_queries
    from bitnet_triton.kernels.lsh_sampling.select import launch_sign_scores

    q = q if q.stride(-1) == 1 else q.contiguous()
    own = torch.empty((*q.shape[::2], planes.shape[1]), dtype=torch.int16, device=q.device)
    launch_hash_queries(q, planes, own, 1)
    return launch_sign_scores(own, codes)


def _reference_scores(q: Tensor, codes: Tensor, planes: Tensor) -> Tensor:
    (B, Hk, W, _), H = codes.shape, q.shape[2]
    own = hash_reference(q[:, 0].float(), planes).view(B, Hk, H // Hk, W, 1)
    differ = (codes.long() & 0xFFFF)[:, :, None] ^ own  # [B Hk G W T]
    bits = sum((differ >> bit) & 1 for bit in range(_BITS))
    assert isinstance(bits, Tensor)
    return (_BITS * W * (H // Hk) - bits.sum((2, 3))).int()


SIGN_SCORES = {
    "triton": Implementation(_triton_scores),
    "reference": Implementation(_reference_scores),
}


def _launch(q: Tensor, codes: Tensor, planes: Tensor) -> Tensor:
    return select("sign_scores", SIGN_SCORES, q.device)(q, codes, planes)


def _fake(q: Tensor, codes: Tensor, planes: Tensor) -> Tensor:
    B, Hk, _, T = codes.shape
    return q.new_empty((B, Hk, T), dtype=torch.int32)


sign_scores = register_op("sign_scores", _launch, _fake)


def sign_pages(
    q: Tensor, signs: SignCodes, *, page: int, selected: int, initial: int, local: int,
    leftpad: Tensor | None, used: Tensor | None,
) -> Tensor:  # fmt: skip
    """Choose the pages with the row that shares most bits with the queries of each group.

    Args:
        q: [B 1 H D].
        signs: of the keys.
        page: rows of a page.
        selected: pages of a group, ``initial`` first ones and ``local`` latest ones among them.
        initial: how many.
        local: how many.
        leftpad: int32 [B], where pages count from; None: 0.
        used: int32 [B], one past the last row; None: all.

    Returns:
        int32 [B 1 Hk selected], ascending, -1 for none.
    """
    scores = sign_scores(q, signs.codes, signs.planes)
    B, Hk, T = scores.shape
    pages, device = -(-T // page), q.device
    zero = torch.zeros(B, dtype=torch.int32, device=device)
    first = (zero if leftpad is None else leftpad)[:, None]
    end = (zero + T if used is None else used.clamp_max(T))[:, None]
    rows = first + torch.arange(pages * page, device=device)
    at = rows.clamp_max(T - 1).long()[:, None].expand(-1, Hk, -1)
    found = scores.gather(-1, at).masked_fill((rows >= end)[:, None], -1)
    best = found.unflatten(-1, (pages, page)).amax(-1)
    number = torch.arange(pages, device=device)
    last = (end - first + page - 1) // page
    always = (number < initial) | (number >= last - local)
    best = best.masked_fill((always & (number < last))[:, None], _FORCED)
    # of equal ones the first, however many there are
    top = (best.long() * pages - number).topk(min(selected, pages), dim=-1).indices
    chosen = torch.where(best.gather(-1, top) < 0, pages, top).sort(-1).values
    chosen = torch.nn.functional.pad(chosen, (0, selected - chosen.shape[-1]), value=pages)
    return torch.where(chosen < pages, chosen, -1).int()[:, None]


def check_signs(signs: object) -> None:
    """Raise unless it is what ``SignCodes.build`` makes."""
    if not isinstance(signs, SignCodes):
        raise TypeError(f"`signs`: expected SignCodes, got {type(signs).__name__}")
