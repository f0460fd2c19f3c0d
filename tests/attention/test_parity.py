"""Every backend against attention in float64.

Tolerances are a few units in the last place of the dtype at 1 (2^-23, 2^-10, 2^-7), since outputs are means of values
around 1 and scores are rounded to the dtype before or after the softmax: 20, 4 and 4 of them forward. Gradients
are sums over up to 512 keys or queries and are compared relative to the largest.
"""

from itertools import product

import pytest
import torch
from torch import Tensor

from esper.attention import AttentionSpec, attend, select

FORWARD = {torch.float32: 20 * 2**-23, torch.float16: 4 * 2**-10, torch.bfloat16: 4 * 2**-7}
BACKWARD = {torch.float32: 100 * 2**-23, torch.float16: 8 * 2**-10, torch.bfloat16: 8 * 2**-7}
MATRIX = list(product((1, 4, 8), (128, 256, 512), (64, 128), (False, True), FORWARD))


def drawn(batch: int, length: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(batch * length + size)
    return [torch.randn(batch, 2, length, size).to(dtype).requires_grad_() for _ in range(3)]


def exact(inputs: list[Tensor], causal: bool) -> Tensor:
    q, k, v = (x.double() for x in inputs)
    score = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    if causal:
        score = score.masked_fill(~torch.ones(score.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return score.softmax(-1) @ v


@pytest.mark.parametrize(("batch", "length", "size", "causal", "dtype"), MATRIX)
def test_parity(batch: int, length: int, size: int, causal: bool, dtype: torch.dtype) -> None:
    inputs = drawn(batch, length, size, dtype)
    with torch.no_grad():
        expected = exact(inputs, causal)
    for backend in ("reference", "sdpa"):
        with torch.no_grad():
            out = attend(*inputs, causal=causal, backend=backend)
        assert out.dtype == dtype
        assert (out - expected).abs().max() <= FORWARD[dtype], backend


@pytest.mark.parametrize(("batch", "length", "size", "causal", "dtype"), [m for m in MATRIX if m[0] == 1])
def test_parity_of_gradients(batch: int, length: int, size: int, causal: bool, dtype: torch.dtype) -> None:
    inputs = drawn(batch, length, size, dtype)
    weight = torch.randn_like(inputs[0])
    expected = torch.autograd.grad((exact(inputs, causal) * weight).sum(), inputs)
    for backend in ("reference", "sdpa"):
        found = torch.autograd.grad((attend(*inputs, causal=causal, backend=backend) * weight).sum(), inputs)
        for ours, right in zip(found, expected, strict=True):
            assert (ours - right).abs().max() <= BACKWARD[dtype] * right.abs().max(), backend


@pytest.mark.parametrize("causal", [False, True])
def test_flex_has_no_gradients_on_cpus(causal: bool) -> None:
    spec = AttentionSpec("dense", "cpu", torch.float32, causal=causal, needs_grad=True)
    assert "it has no gradients on CPUs" in select(spec).rejected["flex"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FORWARD, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_parity_of_flex(causal: bool, dtype: torch.dtype) -> None:
    """One size only, since every size is compiled."""
    inputs = drawn(4, 128, 64, dtype)
    with torch.no_grad():
        out = attend(*inputs, causal=causal, backend="flex")
        assert (out - exact(inputs, causal)).abs().max() <= FORWARD[dtype]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", FORWARD, ids=str)
@pytest.mark.parametrize("backend", ["reference", "sdpa", "flex"])
def test_parity_on_cuda(backend: str, dtype: torch.dtype) -> None:
    # Products of float32 may run in TF32, of 10 bits.
    loose = 2**13 if dtype == torch.float32 else 1
    for batch, length, size, causal, of in MATRIX:
        if of == dtype:
            inputs = drawn(batch, length, size, dtype)
            expected = exact(inputs, causal)
            weight = torch.randn_like(expected)
            gradients = torch.autograd.grad((expected * weight).sum(), inputs)
            there = [x.detach().cuda().requires_grad_() for x in inputs]
            out = attend(*there, causal=causal, backend=backend)
            found = torch.autograd.grad((out * weight.cuda()).sum(), there)
            assert (out.cpu() - expected).abs().max() <= loose * FORWARD[dtype]
            for ours, right in zip(found, gradients, strict=True):
                assert (ours.cpu() - right).abs().max() <= loose * BACKWARD[dtype] * right.abs().max()
