"""Loads that nobody uses fetch memory: at once, or a line at a time inside a product."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

import bitnet_triton.triton_cpu as triton_cpu


@triton.jit
def fetching_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.load(x_ptr + i * (1 << 24), volatile=True)
    tl.store(y_ptr + i, tl.load(x_ptr + i) + 1)


def test_a_volatile_load_that_nobody_uses_fetches_and_reads_nothing():
    x, y = torch.randn(16), torch.empty(16)
    triton_cpu.launch(fetching_kernel, (1,))(x, y, BLOCK=16)  # no such memory is there
    assert torch.equal(y, x + 1)
    kernel = triton_cpu.warmup(triton.jit(fetching_kernel.fn), x, y, BLOCK=16)
    assert "__builtin_prefetch" in kernel.asm["cpp"]


@triton.jit
def products_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, k_ahead_ptr, v_ahead_ptr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, LINES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    n, d = tl.arange(0, N), tl.arange(0, D)
    q = tl.load(q_ptr + tl.arange(0, M)[:, None] * D + d[None, :])
    at = n[:, None] * D + d[None, :]
    acc = tl.zeros((M, D), tl.float32)
    # twice the same tile, as a loop reads one after another
    for _ in range(2):
        rows = tl.arange(0, AHEAD)[:, None] * D + (tl.arange(0, LINES) * (D // LINES))[None, :]
        tl.load(k_ahead_ptr + rows, volatile=True)
        tl.load(v_ahead_ptr + rows, volatile=True)
        k, v = tl.load(k_ptr + at), tl.load(v_ptr + at)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        acc += tl.dot(scores, v.to(tl.float32), input_precision="ieee")
    tl.store(out_ptr + tl.arange(0, M)[:, None] * D + d[None, :], acc)


@pytest.mark.parametrize("ahead", [16, 8], ids=["as_many_rows", "others"])
@pytest.mark.parametrize("M", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "D"), [(torch.float32, 64), (torch.bfloat16, 64), (torch.bfloat16, 128)], ids=str
)
def test_products_fetch_every_line_once(monkeypatch, dtype, D, M, ahead):
    """What is fetched is counted where it lies; a product that reads other rows fetches first."""
    count = "-D'__builtin_prefetch(p,...)=(++*(volatile int*)(p))'"
    monkeypatch.setenv("TRITON_CPU_FLAGS", count)
    q, *rows = (torch.randint(-2, 3, (n, D)).to(dtype) for n in (M, 80, 80))
    k, v = (t[:16] for t in rows)  # a product that fetches by itself goes on behind them
    lines = D * dtype.itemsize // 64
    k_ahead, v_ahead = torch.zeros(2, ahead, lines, 16, dtype=torch.int32).unbind()
    out = torch.empty(M, D)
    fresh = triton.jit(products_kernel.fn)
    triton_cpu.launch(fresh, (1,))(
        q, k, v, out, k_ahead.view(dtype), v_ahead.view(dtype),
        M=M, N=16, D=D, LINES=lines, AHEAD=ahead,
    )  # fmt: skip
    assert torch.equal(out, 2 * (q.float() @ k.float().T) @ v.float())
    for fetched in (k_ahead, v_ahead):
        assert (fetched[..., 0] == 2).all()
        assert not fetched[..., 1:].any()
