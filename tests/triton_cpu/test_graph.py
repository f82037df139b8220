"""Launches that are recorded once and run again."""

import pytest
import torch
import triton
import triton.language as tl

from bitnet_triton import triton_cpu


@triton.jit
def scale_kernel(x_ptr, out_ptr, factor, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at) * factor)


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at) + tl.load(y_ptr + at))


@triton.jit
def positive_kernel(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.device_assert(x > 0, "not positive")
    tl.store(out_ptr + tl.arange(0, N), x)


@triton.autotune(configs=[triton.Config({"N": 8}), triton.Config({"N": 16})], key=[])
@triton.jit
def tuned_kernel(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at) + 1)


def steps(x, y):
    """Return y + 3 x, by two launches and a tensor of their own."""
    scaled = torch.empty_like(x)
    triton_cpu.launch(scale_kernel, (1,))(x, scaled, 3.0, N=16)
    out = torch.empty(16)
    triton_cpu.launch(add_kernel, (2,))(scaled.view(4, 4).view(-1), y, out, N=8)
    return out


def test_a_replay_reads_what_tensors_hold_by_then():
    x, y = torch.randn(16), torch.randn(16)
    with triton_cpu.capture() as graph:
        out = steps(x, y)
    torch.testing.assert_close(out, y + 3 * x)
    assert len(graph) == 2
    for _ in range(3):
        x.normal_()
        y.normal_()
        graph.replay()
        torch.testing.assert_close(out, y + 3 * x)


def test_memory_of_the_capture_outlives_it():
    x, y = torch.randn(16), torch.randn(16)
    with triton_cpu.capture() as graph:
        out = steps(x, y)
    expected = y + 3 * x
    del x, y
    garbage = [torch.full((16,), float("nan")) for _ in range(100)]  # what was freed is reused
    graph.replay()
    torch.testing.assert_close(out, expected)
    assert len(garbage) == 100


def test_launches_outside_are_not_recorded():
    x, y = torch.randn(16), torch.randn(16)
    with triton_cpu.capture() as graph:
        pass
    steps(x, y)
    assert len(graph) == 0
    graph.replay()


def test_what_pytorch_computes_is_refused():
    x, y = torch.randn(16), torch.randn(16)
    refused = r"`aten.mul.Tensor` runs while launches are recorded"
    with pytest.raises(RuntimeError, match=refused), triton_cpu.capture():
        steps(x * 2, y)
    with pytest.raises(RuntimeError, match=r"`aten.zero_.default`"), triton_cpu.capture():
        x.zero_()
    with pytest.raises(RuntimeError, match=r"`aten.zeros.default`"), triton_cpu.capture():
        torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"dense"), triton_cpu.capture():
        x[0].item()
    torch.testing.assert_close(steps(x, y), y + 3 * x)  # nothing is refused any more


def test_what_computes_no_tensor_is_allowed():
    with triton_cpu.capture() as graph:
        dtype = torch.promote_types(torch.bfloat16, torch.float32)
        torch.empty(3, dtype=dtype).view(3, 1).new_empty(2)
    assert len(graph) == 0


def test_a_capture_inside_of_a_capture_is_refused():
    with triton_cpu.capture(), pytest.raises(RuntimeError, match="a capture inside of a capture"):
        triton_cpu.capture().__enter__()


def test_an_assertion_that_fails_names_its_kernel_and_ends_the_replay():
    x, y = torch.ones(16), torch.empty(16)
    with triton_cpu.capture() as graph:
        triton_cpu.launch(positive_kernel, (1,))(x, y, N=16, debug=True)
        out = steps(y, x)
    before = out.clone()
    x[3] = -1
    with pytest.raises(AssertionError, match=r"kernel positive_kernel: .*not positive"):
        graph.replay()
    assert torch.equal(out, before)
    x[3] = 2
    graph.replay()
    torch.testing.assert_close(out, 4 * x)


def test_launches_that_a_tuner_times_are_left_out():
    x, out = torch.zeros(16), torch.empty(16)
    with triton_cpu.capture() as graph:
        triton_cpu.launch(tuned_kernel, lambda meta: (16 // meta["N"],))(x, out)
    assert len(graph) == 1
    x.fill_(4)
    graph.replay()
    assert (out == 5).all()


def test_installed_driver_is_recorded_too():
    x, out = torch.randn(16), torch.empty(16)
    triton_cpu.install()
    try:
        with triton_cpu.capture() as graph:
            scale_kernel[(1,)](x, out, 2.0, N=16)
    finally:
        triton_cpu.uninstall()
    x.normal_()
    graph.replay()
    torch.testing.assert_close(out, 2 * x)


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 is set"):
        triton_cpu.capture().__enter__()
