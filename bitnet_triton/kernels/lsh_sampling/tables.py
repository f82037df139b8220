"""The tables that sampling looks keys up in: built for a prompt, extended token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from bitnet_triton.errors import CheckpointError
from bitnet_triton.kernels.common.checks import (
    check_device,
    check_dtype,
    check_shape,
    check_tensor,
)
from bitnet_triton.kernels.common.lengths import in_a_row
from bitnet_triton.kernels.common.linear import FLOATS
from bitnet_triton.kernels.lsh_sampling.launchers import (
    BUILD,
    HASH,
    SHARES,
    Sampling,
    codes_of_segment,
    reference_sample,
    triton_sample,
)
from bitnet_triton.kernels.lsh_sampling.planes import hash_planes
from bitnet_triton.kernels.lsh_sampling.reference import hash_reference, mean_direction
from bitnet_triton.runtime import Implementation, select

# what a row of a segment is numbered with has 16 bits
SEGMENT = 1 << 16
# rows that are compared code by code before they are sorted
TAIL = 2048
MOST_BITS = 15
# heads of a group that share a list: a counter of a byte counts two for each
MOST_OF_UNION = 127


@dataclass(eq=False)
class HashTables:
    """Keys by their codes: L tables of 2**K buckets for each key head (arXiv:2410.16179).

    Keys are centred by the mean of those that the tables were built from, which later ones keep:
    any centre that does not depend on the planes leaves probabilities exact. Rows stand sorted by
    code in segments of at most 65536, as 16 bits each; the latest ones wait unsorted in a tail.

    Attributes:
        bits: K, of a code.
        tables: L.
        seed: of the planes.
        keys: [B T Hk D], as they are; nothing is copied.
        leftpad: int32 [B], the first row that is no padding; None: the first one.
        planes: float32 [K L D].
        centre: float32 [B Hk D].
        norms: float32 [B Hk rows], how far each key is from the centre.
        ids: uint16 [B Hk L n], of the n sorted rows.
        offsets: int32 [S B Hk L 2**K + 1], where each code starts in each segment.
        bounds: int32 [S + 1], where segments start, and the tail behind them.
        tail: int16 [B Hk L room], codes of rows that are not sorted yet.
        length: how many rows there are, the padding and the tail included.
    """

    bits: int
    tables: int
    seed: int
    keys: Tensor
    leftpad: Tensor | None
    planes: Tensor
    centre: Tensor
    norms: Tensor
    ids: Tensor
    offsets: Tensor
    bounds: Tensor
    tail: Tensor
    length: int = 0

    @classmethod
    def build(
        cls,
        keys: Tensor,
        *,
        bits: int = 10,
        tables: int = 150,
        seed: int = 0,
        leftpad: Tensor | None = None,
    ) -> HashTables:
        """Hash and sort keys.

        Args:
            keys: [B T Hk D] float16, bfloat16 or float32, rotated, T at least 1.
            bits: of a code, 1 to 15. More of them: fewer keys are sampled.
            tables: at least 2. More of them: more keys are sampled.
            seed: of the planes; equal seeds give equal tables on every backend, but for keys that
                lie on a plane up to rounding.
            leftpad: int32 [B], the first row that is no padding. Default: the first one.

        Raises:
            TypeError: a tensor or a number has a wrong type.
            ValueError: shapes do not fit, or a number is out of range.
            BackendUnavailableError: the forced backend cannot run.
        """
        check_keys(keys, leftpad)
        for name, value, least, most in (("bits", bits, 1, MOST_BITS), ("tables", tables, 2, None)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"`{name}`: expected an integer, got {type(value).__name__}")
            if value < least or (most is not None and value > most):
                upto = "" if most is None else f" and at most {most}"
                raise ValueError(f"`{name}`: expected at least {least}{upto}, got {value}")
        keys, leftpad = keys.detach(), in_a_row(leftpad)
        (B, T, Hk, D), device = keys.shape, keys.device
        with torch.no_grad():
            made = cls(
                bits, tables, seed, keys[:, :0], leftpad,
                hash_planes(D, bits, tables, seed, device), mean_of_keys(keys, leftpad),
                torch.empty((B, Hk, T + TAIL), device=device),
                torch.empty((B, Hk, tables, 0), dtype=torch.uint16, device=device),
                torch.empty((0, B, Hk, tables, (1 << bits) + 1), dtype=torch.int32, device=device),
                torch.zeros(1, dtype=torch.int32, device=device),
                torch.empty((B, Hk, tables, TAIL), dtype=torch.int16, device=device),
            )  # fmt: skip
            made._sort_in(keys)
        return made

    def saved(self) -> dict[str, Tensor]:
        """Return what ``restore`` needs beside keys, padding and settings."""
        names = ("centre", "norms", "ids", "offsets", "bounds", "tail")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def restore(
        cls, keys: Tensor, saved: dict[str, Tensor], *,
        bits: int, tables: int, seed: int, leftpad: Tensor | None = None,
    ) -> HashTables:  # fmt: skip
        """Make tables again of what ``saved`` has told, with their planes as "planes".

        Raises:
            CheckpointError: they have other settings, or are not those of ``keys``.
        """
        (B, T, Hk, D), L, W = keys.shape, tables, (1 << bits) + 1
        planes = hash_planes(D, bits, tables, seed, keys.device)
        n, S = saved["ids"].shape[-1], saved["offsets"].shape[0]
        wanted = {
            "planes": (planes.shape, torch.float32), "centre": ((B, Hk, D), torch.float32),
            "norms": ((B, Hk, saved["norms"].shape[-1]), torch.float32),
            "ids": ((B, Hk, L, n), torch.uint16), "offsets": ((S, B, Hk, L, W), torch.int32),
            "bounds": ((S + 1,), torch.int32),
            "tail": ((B, Hk, L, saved["tail"].shape[-1]), torch.int16),
        }  # fmt: skip
        for name, (shape, dtype) in wanted.items():
            t = saved[name]
            if t.shape != shape or t.dtype != dtype:
                raise CheckpointError(
                    f"`{name}`: expected {dtype} {list(shape)}, got {t.dtype} {list(t.shape)}"
                )
        starts = saved["bounds"].tolist()
        lengths = [end - start for start, end in pairwise(starts)]
        covers = starts[0] == 0 and starts[-1] == n <= T <= n + saved["tail"].shape[-1]
        if not covers or min(lengths, default=1) < 1 or max(lengths, default=1) > SEGMENT:
            raise CheckpointError(f"`bounds`: expected segments of {T} rows, got {starts}")
        if not torch.equal(saved["planes"], planes):
            raise CheckpointError(f"`planes`: expected those of seed {seed}")
        if saved["norms"].shape[-1] < T:
            raise CheckpointError(f"`norms`: expected {T} rows")
        told = {name: t for name, t in saved.items() if name in wanted and name != "planes"}
        return cls(bits, tables, seed, keys, leftpad, planes, length=T, **told)

    def append(self, keys: Tensor) -> None:
        """Take in further keys [B T Hk D], without changing the centre.

        Raises:
            TypeError: they have another dtype.
            ValueError: shapes do not fit.
        """
        check_keys(keys, None)
        check_dtype("keys", keys, self.keys.dtype)
        B, _, Hk, D = self.keys.shape
        check_shape("keys", keys, "B T Hk D", B=B, Hk=Hk, D=D)
        check_device("keys", keys, self.keys.device)
        self.follow(torch.cat([self.keys, keys.detach()], 1))

    @torch.no_grad()
    def follow(self, keys: Tensor) -> None:
        """Take in what ``keys`` [B T Hk D] has behind the rows that are known."""
        known = self.keys.shape[1]
        if keys.shape[1] - known > TAIL:
            self._merge()
            self._sort_in(keys)
            return
        self.keys = keys
        while self.length < keys.shape[1]:
            self.make_room()
            sorted_rows, end = self.ids.shape[-1], keys.shape[1]
            end = min(end, sorted_rows + self.tail.shape[-1])
            at = slice(self.length - sorted_rows, end - sorted_rows)
            self._hash(keys[:, self.length : end], self.tail[..., at], self.length)
            self.length = end

    def make_room(self) -> None:
        """Sort the tail where it is full: one more row then has a place."""
        if self.length - self.ids.shape[-1] == self.tail.shape[-1]:
            self._merge()

    def reserve(self, rows: int) -> None:
        """Make room for one more row, and for what is told of ``rows`` in all."""
        self.make_room()
        self._make_norms(rows)

    def count(self, keys: Tensor) -> None:
        """Take ``keys`` [B T Hk D] for known, whose codes ``launch_token`` has made."""
        self.keys, self.length = keys, keys.shape[1]

    def launch_token(self, keys: Tensor, slots: Tensor) -> None:
        """Make the codes of rows ``slots`` int32 [B] of keys [B rows Hk D], by launches alone."""
        from bitnet_triton.kernels.lsh_sampling.hash import launch_hash_token

        launch_hash_token(
            keys, self.planes, self.centre, self.tail, self.norms, slots, self.ids.shape[-1]
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a recorded step reads and writes."""
        return self.centre, self.norms, self.ids, self.offsets, self.bounds, self.tail

    def crop(self, length: int) -> None:
        """Forget all rows from ``length`` on."""
        codes, starts = None, self.starts
        while starts[-1] > length:
            codes = codes_of_segment(self.ids[..., starts[-2] :], self.offsets[-1])
            self._drop_segment(starts)
            starts = self.starts
        self.length = min(self.length, length)
        self.keys = self.keys[:, : self.length]
        if codes is not None and length > starts[-1]:
            self._add_segment(codes[..., : length - starts[-1]].contiguous())

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Take other rows of the batch: ``change`` does it to the first dimension of a tensor."""
        self.keys, self.centre, self.norms, self.tail = map(
            change, (self.keys, self.centre, self.norms, self.tail)
        )
        # PyTorch indexes no uint16
        self.ids = change(self.ids.view(torch.int16)).view(torch.uint16)
        self.offsets = (
            change(self.offsets.transpose(0, 1).contiguous()).transpose(0, 1).contiguous()
        )
        self.leftpad = None if self.leftpad is None else change(self.leftpad)

    @property
    def starts(self) -> list[int]:
        """Where segments start, and the tail behind them."""
        return self.bounds.tolist()

    @property
    def nbytes(self) -> int:
        """Bytes of everything but keys and planes, which others hold as well."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @torch.no_grad()
    def sampled(self, q: Tensor, *, share: str = "own") -> Tensor:
        """Return which rows queries sample, bool [B H T]: those they meet in two tables or more.

        Args:
            q: [B 1 H D] or [B H D].
            share: as for ``lsh_sampling_attention``.
        """
        q = self._checked_query(q, share)
        run = select("lsh_sample", _SAMPLE, q.device)
        found = run(q, self.keys, self.call(share))
        return found.repeat_interleave(q.shape[2] // found.shape[1], 1)

    @torch.no_grad()
    def inclusion(self, q: Tensor, *, share: str = "own") -> Tensor:
        """Return how probably queries sample each row over all planes, float32 [B H T].

        That is of the sampled law: before first and latest rows, which are read in any case, are
        taken out. Padding is never sampled, and has 0.

        Args:
            q: [B 1 H D] or [B H D].
            share: as for ``lsh_sampling_attention``.
        """
        q = self._checked_query(q, share)
        keys = self.keys.float()
        *_, u = reference_sample(q.float(), keys, self.call(share), self.length)
        u = u.transpose(1, 2).flatten(1, 2)
        if self.leftpad is None:
            return u
        rows = torch.arange(self.length, device=u.device)
        return u.masked_fill((rows < self.leftpad[:, None])[:, None], 0.0)

    @torch.no_grad()
    def looked_up(self, q: Tensor, *, share: str = "own") -> Tensor:
        """Count what queries compare codes with, int64 [B lists]: their buckets, and the tail.

        A list is that of a query head with "own", else that of a group.

        Args:
            q: [B 1 H D] or [B H D].
            share: as for ``lsh_sampling_attention``.
        """
        q = self._checked_query(q, share).float()
        Hk, L = self.keys.shape[2], self.tables
        if share == "proposal":
            q = mean_direction(q[:, 0].unflatten(1, (Hk, -1)).transpose(1, 2))
        codes = hash_reference(q[:, 0], self.planes)  # [B heads L]
        codes = codes.unflatten(1, (Hk, -1)).transpose(2, 3)  # [B Hk L G]
        found = self.offsets.diff(dim=-1).sum(0).gather(-1, codes)  # of all segments
        if share == "union":  # each head looks into tables of its own
            G = codes.shape[-1]
            owner = torch.arange(L, device=q.device) // (L // G)
            found = found * (owner[:, None] == torch.arange(G, device=q.device))
            return found.sum((2, 3)) + self.length - self.ids.shape[-1]
        return found.sum(2).flatten(1) + self.length - self.ids.shape[-1]

    def call(
        self, share: str, *, sinks: int = 0, recent: int = 0, scale: float = 1.0,
        leftpad: Tensor | None = None, used: Tensor | None = None,
    ) -> Sampling:  # fmt: skip
        """Return what kernels are told of the tables; ``leftpad`` where it has another place."""
        return Sampling(
            self.planes, self.centre, self.norms, self.ids, self.offsets, self.bounds, self.tail,
            self.leftpad if leftpad is None else leftpad, used, self.length, sinks, recent, share,
            scale,
        )  # fmt: skip

    def _checked_query(self, q: Tensor, share: str) -> Tensor:
        check_tensor("q", q)
        q = q[:, None] if q.ndim == 3 else q
        check_query(q, self, share)
        return q.detach()

    def _hash(self, keys: Tensor, codes: Tensor, start: int) -> None:
        """Write codes [B Hk L T] of keys, which are the rows from ``start`` on."""
        end = start + keys.shape[1]
        if end > self.norms.shape[-1]:
            self._make_norms(end + max(TAIL, end // 4))
        keys = keys if keys.stride(-1) == 1 else keys.contiguous()
        run = select("lsh_hash", HASH, keys.device)
        run(keys, self.planes, self.centre, codes, self.norms[..., start:end])

    def _make_norms(self, rows: int) -> None:
        """Make room for the distances of ``rows`` keys."""
        known = self.norms
        if rows > known.shape[-1]:
            self.norms = torch.empty((*known.shape[:2], rows), device=known.device)
            self.norms[..., : known.shape[-1]] = known

    def _sort_in(self, keys: Tensor) -> None:
        """Take in the rows of ``keys`` that are not known, sorted; the tail is empty."""
        self.keys, (B, T, Hk, _) = keys, keys.shape
        while self.length < T:
            end = min(self.length + SEGMENT, T)
            shape = (B, Hk, self.tables, end - self.length)
            codes = torch.empty(shape, dtype=torch.int16, device=keys.device)
            self._hash(keys[:, self.length : end], codes, self.length)
            self._add_segment(codes)
            self.length = end

    def _merge(self) -> None:
        """Sort the tail, together with segments before it that are no longer than it is.

        Each row is sorted again as often as its segment doubles, and there are few segments.
        """
        starts = self.starts
        codes = self.tail[..., : self.length - starts[-1]]
        if not codes.shape[-1]:
            return
        while len(starts) > 1 and starts[-1] - starts[-2] <= min(
            codes.shape[-1], SEGMENT - codes.shape[-1]
        ):
            before = codes_of_segment(self.ids[..., starts[-2] :], self.offsets[-1])
            codes = torch.cat([before, codes], -1)
            self._drop_segment(starts)
            starts = self.starts
        self._add_segment(codes.contiguous())

    def _drop_segment(self, starts: Sequence[int]) -> None:
        self.ids = self.ids[..., : starts[-2]]
        self.offsets, self.bounds = self.offsets[:-1], self.bounds[:-1]

    def _add_segment(self, codes: Tensor) -> None:
        """Sort codes [B Hk L n] into a segment behind the others."""
        start = self.ids.shape[-1]
        run = select("lsh_build", BUILD, codes.device)
        ids, offsets = run(codes, self.bits, start, self.leftpad)
        if start:
            # PyTorch joins no uint16
            ids = torch.cat([t.view(torch.int16) for t in (self.ids, ids)], -1).view(torch.uint16)
        self.ids = ids
        self.offsets = torch.cat([self.offsets, offsets[None]])
        end = self.bounds.new_tensor([start + codes.shape[-1]])
        self.bounds = torch.cat([self.bounds, end])


def check_query(q: Tensor, tables: HashTables, share: str) -> None:
    """Raise what is wrong with q [B 1 H D]."""
    check_tensor("q", q)
    check_dtype("q", q, *FLOATS)
    B, _, Hk, D = tables.keys.shape
    check_shape("q", q, "B 1 H D", **{"B": B, "1": 1, "D": D})
    check_device("q", q, tables.keys.device)
    H = q.shape[2]
    if H == 0 or H % Hk:
        raise ValueError(f"`q`: expected a multiple of Hk={Hk} heads, got {H}")
    if share not in SHARES:
        raise ValueError(f"`share`: expected one of {', '.join(SHARES)}, got {share!r}")
    if share == "union" and H // Hk > MOST_OF_UNION:
        raise ValueError(
            f"`share`: expected 'union' of at most {MOST_OF_UNION} heads a group, got {H // Hk}"
        )
    if share == "union" and (tables.tables % (H // Hk) or tables.tables < 2 * (H // Hk)):
        raise ValueError(
            f"`share`: with 'union' the {H // Hk} heads of a group have tables of their own: "
            f"expected a multiple, at least {2 * (H // Hk)}, got {tables.tables}"
        )


def check_keys(keys: Tensor, leftpad: Tensor | None) -> None:
    """Raise what is wrong with keys [B T Hk D]."""
    check_tensor("keys", keys)
    check_dtype("keys", keys, *FLOATS)
    check_shape("keys", keys, "B T Hk D")
    if keys.numel() == 0:
        raise ValueError(f"`keys`: expected [B T Hk D], each at least 1, got {list(keys.shape)}")
    if leftpad is not None:
        check_tensor("leftpad", leftpad)
        check_dtype("leftpad", leftpad, torch.int32)
        check_shape("leftpad", leftpad, "B", B=keys.shape[0])
        check_device("leftpad", leftpad, keys.device)


def mean_of_keys(keys: Tensor, leftpad: Tensor | None) -> Tensor:
    """Return the mean of keys [B T Hk D] without the padding, float32 [B Hk D]."""
    if leftpad is None:
        return keys.mean(1, dtype=torch.float32)
    is_token = torch.arange(keys.shape[1], device=keys.device) >= leftpad[:, None]
    total = torch.einsum("bt,bthd->bhd", is_token.float(), keys.float())
    return total / is_token.sum(1).clamp_min(1)[:, None, None]


def _triton_sample(q: Tensor, keys: Tensor, call: Sampling) -> Tensor:
    rows, counts, _ = triton_sample(q if q.stride(-1) == 1 else q.contiguous(), keys.shape[2], call)
    B, lists = counts.shape[:2]
    found = torch.zeros((B, lists, call.length + 1), dtype=torch.bool, device=q.device)
    starts = call.bounds.tolist()
    for s, (start, end) in enumerate(zip(starts, [*starts[1:], call.length])):
        listed = (rows[..., start:end].view(torch.int16).long() & 0xFFFF) + start
        exists = torch.arange(end - start, device=q.device) < counts[..., s : s + 1]
        found.scatter_(-1, torch.where(exists, listed, call.length), True)
    return found[..., : call.length]


def _reference_sample(q: Tensor, keys: Tensor, call: Sampling) -> Tensor:
    _, sampled, _ = reference_sample(q.float(), keys.float(), call, call.length)
    return sampled.transpose(1, 2).flatten(1, 2)


_SAMPLE = {
    "triton": Implementation(_triton_sample),
    "reference": Implementation(_reference_sample),
}
