"""Products of matrices: every dtype, small and odd shapes, batches, accumulators."""

import pytest
import torch
import triton
import triton.language as tl

NO_BFLOAT16 = pytest.mark.no_interpreter("it multiplies the bits of bfloat16")
BFLOAT16 = pytest.param(torch.bfloat16, marks=NO_BFLOAT16)


@triton.jit
def place(M: tl.constexpr, N: tl.constexpr):
    return tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]


@triton.jit
def product_kernel(
    a_ptr, b_ptr, c_ptr, d_ptr, e_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    OUT: tl.constexpr,
):  # fmt: skip
    a, b = tl.load(a_ptr + place(M, K)), tl.load(b_ptr + place(K, N))
    c = tl.dot(a, b, input_precision="ieee", out_dtype=OUT)
    tl.store(d_ptr + place(M, N), c)
    bt = tl.load(b_ptr + tl.arange(0, N)[:, None] + tl.arange(0, K)[None, :] * N)  # [N, K]
    c = tl.dot(a, tl.trans(bt), tl.load(c_ptr + place(M, N)), input_precision="ieee", out_dtype=OUT)
    tl.store(e_ptr + place(M, N), c)


def operand(shape, dtype):
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, dtype=dtype)
    return torch.randn(shape).to(dtype)


def limit(a, b, dtype, c=0):
    """Return what c plus K products, added in any order in float32 (float64), may be off by."""
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    size = a.double().abs() @ b.double().abs() + abs(c)
    return size * eps * (2 + a.shape[-1] ** 0.5)  # roundings of either sign


SHAPES = [(16, 16, 16), (32, 64, 16), (1, 16, 32), (16, 1, 32), (1, 1, 64), (16, 32, 1), (2, 4, 8)]
SHAPES += [(64, 64, 64), (8, 128, 2), (1, 1, 1), (4, 2, 128)]


@pytest.mark.ops("dot")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, BFLOAT16, torch.int8, torch.float64], ids=str
)
def test_products_of_every_shape_and_dtype(run, check, shape, dtype):
    M, N, K = shape
    a, b = operand((M, K), dtype), operand((K, N), dtype)
    out, OUT = {
        torch.int8: (torch.int32, tl.int32),
        torch.float64: (torch.float64, tl.float64),
    }.get(dtype, (torch.float32, tl.float32))
    c = operand((M, N), torch.float32).mul(100).to(out)
    d, e = torch.empty(M, N, dtype=out), torch.empty(M, N, dtype=out)
    run(product_kernel, (1,))(a, b, c, d, e, M=M, N=N, K=K, OUT=OUT)
    exact = a.double() @ b.double()
    atol = 0.0 if dtype == torch.int8 else limit(a, b, dtype, c.double())
    check(d, exact, atol=atol)
    check(e, exact + c.double(), atol=atol)


@triton.jit
def extremes_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    a, b = tl.load(a_ptr + place(M, K)), tl.load(b_ptr + place(K, N))
    tl.store(c_ptr + place(M, N), tl.dot(a, b, out_dtype=tl.int32))
    codes = (b & 3).to(tl.int8)  # never negative
    tl.store(c_ptr + M * N + place(M, N), tl.dot(a, codes, out_dtype=tl.int32))
    tl.store(c_ptr + 2 * M * N + place(M, N), tl.dot((a & 127).to(tl.int8), b, out_dtype=tl.int32))
    tl.store(c_ptr + 3 * M * N + place(M, N), tl.dot(a, codes - 1, out_dtype=tl.int32))


@pytest.mark.ops("dot")
@pytest.mark.parametrize("shape", [(16, 16, 64), (1, 64, 128), (5, 3, 1)], ids=str)
def test_products_of_extreme_bytes_do_not_saturate(run, check, shape):
    M, N, K = (triton.next_power_of_2(n) for n in shape)
    a = torch.tensor([-128, 127, -1], dtype=torch.int8)[torch.randint(0, 3, (M, K))]
    b = torch.tensor([-128, 127, 3], dtype=torch.int8)[torch.randint(0, 3, (K, N))]
    a[0], b[:, 0] = -128, -128
    c = torch.empty(4, M, N, dtype=torch.int32)
    run(extremes_kernel, (1,))(a, b, c, M=M, N=N, K=K)
    A, B = a.long(), b.long()
    check(c, torch.stack([A @ B, A @ (B & 3), (A & 127) @ B, A @ ((B & 3) - 1)]))


@triton.jit
def half_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    a, b = tl.load(a_ptr + place(N, N)), tl.load(b_ptr + place(N, N))
    c = tl.dot(a, b, out_dtype=tl.float16)
    tl.store(c_ptr + place(N, N), c)
    tl.store(c_ptr + N * N + place(N, N), tl.dot(a, b, acc=c, out_dtype=tl.float16))


@pytest.mark.ops("dot")
def test_a_product_may_be_accumulated_in_float16(run, check):
    a, b, c = torch.randn(16, 16).half(), torch.randn(16, 16).half(), torch.empty(2, 16, 16).half()
    run(half_kernel, (1,))(a, b, c, N=16)
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    # each of 16 additions may be rounded to float16
    check(c, torch.stack([exact, 2 * exact]), atol=torch.stack([size, 2 * size]) * 16 * 2**-11)


@triton.jit
def precision_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    a, b = tl.load(a_ptr + place(N, N)), tl.load(b_ptr + place(N, N))
    tl.store(c_ptr + place(N, N), tl.dot(a, b))
    tl.store(c_ptr + N * N + place(N, N), tl.dot(a, b, input_precision="tf32"))
    tl.store(c_ptr + 2 * N * N + place(N, N), tl.dot(a, b, input_precision="tf32x3"))
    tl.store(c_ptr + 3 * N * N + place(N, N), tl.dot(a, b, allow_tf32=False))
    tl.store(c_ptr + 4 * N * N + place(N, N), tl.dot(a, b, allow_tf32=True))


@pytest.mark.ops("dot")
def test_every_input_precision_is_full_precision(run, check):
    a, b, c = torch.randn(16, 16), torch.randn(16, 16), torch.empty(5, 16, 16)
    run(precision_kernel, (1,))(a, b, c, N=16)
    check(c, (a.double() @ b.double()).expand(5, 16, 16), atol=limit(a, b, torch.float32))


@triton.jit
def batch_kernel(
    a_ptr, b_ptr, c_ptr, B: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    batch = tl.arange(0, B)[:, None, None]
    a = tl.load(a_ptr + batch * M * K + place(M, K)[None, :, :])
    b = tl.load(b_ptr + batch * K * N + place(K, N)[None, :, :])
    c = tl.dot(a, b, input_precision="ieee")
    c = tl.dot(a * 2, b, c, input_precision="ieee")
    tl.store(c_ptr + batch * M * N + place(M, N)[None, :, :], c)


@pytest.mark.ops("dot")
@pytest.mark.parametrize("shape", [(4, 16, 16, 16), (2, 1, 8, 32), (1, 16, 16, 16)], ids=str)
def test_batches_of_products(run, check, shape):
    B, M, N, K = shape
    a, b, c = torch.randn(B, M, K), torch.randn(B, K, N), torch.empty(B, M, N)
    run(batch_kernel, (1,))(a, b, c, B=B, M=M, N=N, K=K)
    check(c, 3 * (a.double() @ b.double()), atol=3 * limit(a, b, torch.float32))


@triton.jit
def tiled_kernel(
    a_ptr, b_ptr, bias_ptr, c_ptr, M, N, K, a_stride_m, a_stride_k, b_stride_k, b_stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    across, down = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    pid_m, pid_n = tl.swizzle2d(program // across, program % across, down, across, GROUP)
    m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)) % M
    n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + m[:, None] * a_stride_m + k[None, :] * a_stride_k
    b_ptrs = b_ptr + k[:, None] * b_stride_k + n[None, :] * b_stride_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs, mask=k[None, :] < K - start, other=0.0)
        b = tl.load(b_ptrs, mask=k[:, None] < K - start, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_ptrs += BLOCK_K * a_stride_k
        b_ptrs += BLOCK_K * b_stride_k
    acc += tl.load(bias_ptr + n)[None, :]
    c = tl.where(acc > 0, acc, 0.01 * acc).to(c_ptr.dtype.element_ty)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(c_ptr + m[:, None] * N + n[None, :], c, mask=(m[:, None] < M) & (n[None, :] < N))


@pytest.mark.ops("dot", "swizzle2d", "cdiv")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16], ids=str)
def test_a_matrix_product_in_tiles(run, check, dtype, transposed):
    M, N, K = 70, 45, 100
    a, b = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype).T
    b = b if transposed else b.contiguous()
    bias, c = torch.randn(N), torch.empty(M, N)
    run(tiled_kernel, (3 * 2,))(
        a, b, bias, c, M, N, K, *a.stride(), *b.stride(),
        BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, GROUP=2,
    )  # fmt: skip
    right = torch.nn.functional.leaky_relu(a.double() @ b.double() + bias)
    check(c, right, atol=limit(a, b, dtype) + 1e-6)


@triton.jit
def attention_kernel(q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, T, scale, CAUSAL: tl.constexpr,
                     BLOCK: tl.constexpr, D: tl.constexpr):  # fmt: skip
    start = tl.program_id(0) * BLOCK
    base = tl.program_id(1) * T * D
    m, d = start + tl.arange(0, BLOCK), tl.arange(0, D)
    here = base + m[:, None] * D + d[None, :]
    q = tl.load(q_ptr + here, mask=m[:, None] < T, other=0.0)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, D), tl.float32)
    end = tl.minimum(start + BLOCK, T) if CAUSAL else T
    for first in range(0, end, BLOCK):
        n = first + tl.arange(0, BLOCK)
        there = base + n[:, None] * D + d[None, :]
        k = tl.load(k_ptr + there, mask=n[:, None] < T, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = n[None, :] < T
        if CAUSAL:
            seen = seen & (m[:, None] >= n[None, :])
        scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(best, tl.max(scores, 1))
        p = tl.exp(scores - new[:, None])
        shrink = tl.exp(best - new)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_ptr + there, mask=n[:, None] < T, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        best = new
    tl.store(o_ptr + here, acc / total[:, None], mask=m[:, None] < T)
    tl.store(lse_ptr + tl.program_id(1) * T + m, best + tl.log(total), mask=m < T)


@pytest.mark.ops("dot", "max", "sum", "exp")
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
def test_attention_in_tiles(run, check, dtype, causal):
    H, T, D = 2, 75, 32
    q, k, v = (torch.randn(H, T, D).to(dtype) for _ in range(3))
    o, lse = torch.empty(H, T, D), torch.empty(H, T)
    run(attention_kernel, (3, H))(q, k, v, o, lse, T, D**-0.5, CAUSAL=causal, BLOCK=32, D=D)
    scores = q.double() @ k.double().mT * D**-0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(T, T).tril().bool(), float("-inf"))
    # the probabilities are rounded to the dtype of v
    step = 1e-6 if dtype == torch.float32 else 2**-8
    check(o, scores.softmax(-1) @ v.double(), atol=3 * step)
    check(lse, scores.logsumexp(-1), atol=2e-6)


@triton.jit
def eight_bits_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    a, b = tl.load(a_ptr + place(N, N)), tl.load(b_ptr + place(N, N))
    tl.store(c_ptr + place(N, N), tl.dot(a, b))


@pytest.mark.ops("dot")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_products_of_floats_of_8_bits(run, check, dtype):
    # the interpreter gets subnormals wrong
    a, b = (torch.randn(16, 16).mul(32).trunc().div(32).to(dtype) for _ in range(2))
    c = torch.empty(16, 16)
    run(eight_bits_kernel, (1,))(a, b, c, N=16)
    check(c, a.double() @ b.double(), atol=limit(a, b, torch.float32))


FOUR_BITS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FOUR_BITS = torch.cat([FOUR_BITS, -FOUR_BITS])


@triton.jit
def scaled_kernel(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr,
    A_BYTES: tl.constexpr, B_BYTES: tl.constexpr, GROUPS: tl.constexpr,
    A_FORMAT: tl.constexpr, B_FORMAT: tl.constexpr,
):  # fmt: skip
    a, b = tl.load(a_ptr + place(M, A_BYTES)), tl.load(b_ptr + place(B_BYTES, N))
    a_scale = tl.load(a_scale_ptr + place(M, GROUPS))
    b_scale = tl.load(b_scale_ptr + place(N, GROUPS))
    c = tl.dot_scaled(a, a_scale, A_FORMAT, b, b_scale, B_FORMAT)
    tl.store(c_ptr + place(M, N), c)
    c = tl.dot_scaled(a, a_scale, A_FORMAT, b, None, B_FORMAT, acc=c)
    tl.store(c_ptr + M * N + place(M, N), c)


def microscaled(rows, columns, kind):
    """Return [rows, columns] as bytes, and as the numbers they stand for."""
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    if kind == "e2m1":
        values = torch.stack([FOUR_BITS[(codes & 15).long()], FOUR_BITS[(codes >> 4).long()]], -1)
        return codes, values.flatten(1)
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[kind]
    values = torch.randn(rows, columns).to(dtype)
    return values.view(torch.uint8), values.float()


@pytest.mark.ops("dot_scaled")
@pytest.mark.no_interpreter("it has no dot_scaled")
@pytest.mark.parametrize("kinds", [("e4m3", "e4m3"), ("e5m2", "e4m3"), ("e2m1", "e2m1")], ids=str)
def test_products_of_microscaled_blocks(run, check, kinds):
    M, N, K = 16, 32, 64
    sizes = [K // 2 if kind == "e2m1" else K for kind in kinds]
    a, A = microscaled(M, sizes[0], kinds[0])
    b, B = microscaled(N, sizes[1], kinds[1])  # packed along K
    a_scale, b_scale = (torch.randint(124, 131, (n, K // 32), dtype=torch.uint8) for n in (M, N))
    c = torch.empty(2, M, N)
    run(scaled_kernel, (1,))(
        a, a_scale, b.T.contiguous(), b_scale, c, M=M, N=N, A_BYTES=sizes[0], B_BYTES=sizes[1],
        GROUPS=K // 32, A_FORMAT=kinds[0], B_FORMAT=kinds[1],
    )  # fmt: skip
    A = A.double() * 2.0 ** (a_scale.double() - 127).repeat_interleave(32, 1)
    scaled = B.double() * 2.0 ** (b_scale.double() - 127).repeat_interleave(32, 1)
    first = A @ scaled.T
    atol = limit(A, scaled.T.abs() + B.double().T.abs(), torch.float32) * 2
    check(c, torch.stack([first, first + A @ B.double().T]), atol=atol)


@triton.jit
def half_scaled_kernel(
    a_ptr, b_ptr, b_scale_ptr, p_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    A_FORMAT: tl.constexpr,
):  # fmt: skip
    a, b = tl.load(a_ptr + place(M, K)), tl.load(b_ptr + place(K, N))
    b_scale = tl.load(b_scale_ptr + place(N, K // 32))
    c = tl.dot_scaled(a, None, A_FORMAT, b, b_scale, "e4m3")
    tl.store(c_ptr + place(M, N), c)
    packed = tl.load(p_ptr + place(K, N // 2))  # two columns in a byte
    c = tl.dot_scaled(a, None, A_FORMAT, packed, b_scale, "e2m1", rhs_k_pack=False)
    tl.store(c_ptr + M * N + place(M, N), c)


@pytest.mark.ops("dot_scaled")
@pytest.mark.no_interpreter("it has no dot_scaled")
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_products_of_a_half_and_a_microscaled_block(run, check, kind):
    M, N, K = 16, 32, 64
    a = torch.randn(M, K).to({"fp16": torch.float16, "bf16": torch.bfloat16}[kind])
    (b, B), (p, P) = microscaled(K, N, "e4m3"), microscaled(K, N // 2, "e2m1")
    b_scale = torch.randint(124, 131, (N, K // 32), dtype=torch.uint8)
    c = torch.empty(2, M, N)
    run(half_scaled_kernel, (1,))(a, b, b_scale, p, c, M=M, N=N, K=K, A_FORMAT=kind)
    scale = 2.0 ** (b_scale.double() - 127).repeat_interleave(32, 1).T
    right = [a.double() @ (x.double() * scale) for x in (B, P)]
    atol = torch.stack([limit(a, x.double() * scale, torch.float32) for x in (B, P)])
    check(c, torch.stack(right), atol=atol)
