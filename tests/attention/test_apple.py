"""Apple devices: what can be tested without one, and the parity matrix for those who have one.

The selection and the masks are tested with the facts of such a device; a model of the recipe of MPSGraph's attention
(matrix product, scale and mask in float32, softmax, matrix product) is compared with torch's attention on a CPU.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from esper.attention import AttentionSpec, Facts, attend, select
from esper.attention.backends import sdpa
from esper.attention.inputs import Inputs
from esper.attention.spec import facts

from .test_parity import FORWARD, MATRIX, drawn, exact

SPEC = AttentionSpec("dense", "mps", torch.float16, heads=2, queries=8, keys=8, head_dim=64)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["dense", "windowed", "channel"])
def test_torchs_attention_is_taken(kind: str, grad: bool) -> None:
    selection = select(replace(SPEC, kind=kind, needs_grad=grad, mask="boolean", bias=True), known=facts("mps"))
    assert selection.backend == "sdpa"
    assert selection.rejected["flex"] == ("it must be compiled: torch.compile makes no FlexAttention kernels for mps",)


def test_graph_is_an_alias_for_it() -> None:
    assert select(SPEC, "graph", Facts("mps", "no")).backend == "sdpa"


def recipe(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
    """What MPSGraph computes, from a mask that is contiguous, of full size and in the dtype of the queries."""
    assert added.is_contiguous()
    assert added.dtype == q.dtype
    assert added.shape == (*q.shape[:3], k.shape[2])
    score = (q @ k.transpose(-2, -1)).float() * q.shape[-1] ** -0.5 + added.float()
    return score.softmax(-1).to(q.dtype) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_the_mask_is_what_its_kernels_want(causal: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 2, n, 8).to(dtype) for n in (6, 9, 9))
    mask, bias = torch.rand(6, 9) < 0.7, torch.randn(2, 6, 9)
    mask[:, 0] = True
    inputs = Inputs.of(q, k, v, mask, bias, causal, None)
    added = inputs.added(dtype)
    assert added is not None
    out = recipe(q, k, v, sdpa.whole(added, inputs, "mps"))
    expected = scaled_dot_product_attention(q, k, v, attn_mask=added)
    torch.testing.assert_close(out, expected, rtol=0, atol=FORWARD[dtype])


@pytest.mark.parametrize(("device", "grad", "math"), [("mps", True, True), ("mps", False, False), ("cpu", True, False)])
def test_gradients_take_the_mathematical_path(device: str, grad: bool, math: bool) -> None:
    flash = torch.backends.cuda.flash_sdp_enabled()  # the switch that sdpa_kernel sets, on every device
    with sdpa.path(device, grad):
        assert torch.backends.cuda.flash_sdp_enabled() == (flash and not math)
        assert torch.backends.cuda.math_sdp_enabled()


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs an Apple GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_parity_on_the_device(needs_grad: bool, dtype: torch.dtype) -> None:
    for batch, length, size, causal, of in MATRIX:
        if of == dtype:
            inputs = drawn(batch, length, size, dtype)
            there = [x.detach().to("mps").requires_grad_(needs_grad) for x in inputs]
            out = attend(*there, causal=causal)
            assert (out.detach().cpu() - exact(inputs, causal).detach()).abs().max() <= FORWARD[dtype]
            if needs_grad:
                out.sum().backward()
                assert all(x.grad is not None and x.grad.isfinite().all() for x in there)
