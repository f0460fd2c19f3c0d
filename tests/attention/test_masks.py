"""Masks and biases mean what they say, whatever computes them, and masks are shared."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper.attention import attend
from esper.attention.inputs import Inputs
from esper.attention.masks import Arena, additive, causal, padding

CPU = torch.device("cpu")
BACKENDS = ["reference", "sdpa"]


def looped(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Tensor) -> Tensor:
    """Attention query by query; allowed and bias are [B, heads, queries, keys]."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        b, h, query = place
        keys = allowed[b, h, query].nonzero().squeeze(1)
        if len(keys):
            score = (k[b, h, keys] @ q[b, h, query]) / q.shape[3] ** 0.5 + bias[b, h, query, keys]
            out[b, h, query] = score.softmax(0) @ v[b, h, keys]
    return out


SHAPES = {
    "whole": (4, 3, 5, 7),
    "by batch": (4, 1, 1, 7),
    "by head": (3, 5, 7),
    "one": (5, 7),
    "windows": (2, 5, 7),
    "keys": (7,),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("masked", ["boolean", "additive"])
@pytest.mark.parametrize("name", ["whole", "by batch", "one", "windows", "keys"])
def test_masks_and_biases_against_a_loop(name: str, masked: str, biased: bool, is_causal: bool, backend: str) -> None:
    torch.manual_seed(len(name))
    q, k, v = torch.randn(4, 3, 5, 6), torch.randn(4, 3, 7, 6), torch.randn(4, 3, 7, 2)
    mask = torch.rand(SHAPES[name]) < 0.6
    if mask.dim() > 1:
        mask[..., 0, :] = False  # queries that have no key
    # Windows of an image stand side by side: row i of the batch is window i % 2.
    whole = mask[:, None].repeat(2, 1, 1, 1) if name == "windows" else mask
    allowed = whole.expand(4, 3, 5, 7)
    if is_causal:
        allowed = allowed & (torch.arange(7) <= torch.arange(5)[:, None])
    bias = torch.randn(3, 5, 7) if biased else None
    given_mask = additive(mask, torch.float32) if masked == "additive" else mask
    out = attend(q, k, v, mask=given_mask, bias=bias, causal=is_causal, backend=backend)
    expected = looped(q, k, v, allowed, torch.zeros(4, 3, 5, 7) if bias is None else bias.expand(4, 3, 5, 7))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_queries_without_a_key_give_0_and_no_gradient(dtype: torch.dtype, backend: str) -> None:
    q, k, v = (torch.randn(2, 1, 4, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[0, :, 1] = False
    mask[1] = False
    out = attend(q, k, v, mask=mask, backend=backend)
    out.float().square().sum().backward()
    assert not out[0, :, 1].any()
    assert not out[1].any()
    assert out[0, :, 0].all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
    assert q.grad is not None
    assert not q.grad[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_is_not_hidden(backend: str) -> None:
    q = torch.randn(1, 1, 3, 4)
    broken = q.clone()
    broken[0, 0, 1, 0] = torch.nan
    out = attend(q, q, broken, backend=backend, mask=torch.ones(3, 3, dtype=torch.bool))
    assert out[..., 0].isnan().all()


@given(queries=st.integers(1, 9), keys=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_causal_masks(queries: int, keys: int) -> None:
    allowed = torch.tensor([[key <= query for key in range(keys)] for query in range(queries)])
    assert torch.equal(causal(queries, keys), allowed)
    shared = Arena().causal(queries, keys, torch.float16, CPU)
    assert shared.dtype == torch.float16
    assert torch.equal(shared, torch.zeros(queries, keys).half().masked_fill(~allowed, -torch.inf))


def test_padding_masks() -> None:
    assert padding(2, 4).tolist() == [[True, True, False, False]]
    assert padding(3, 4, torch.float32).tolist() == [[0, 0, 0, -torch.inf]]


def test_growing_sequences_share_their_masks() -> None:
    arena = Arena()
    masks = [arena.causal(length, length, torch.float32, CPU) for length in range(5, 9)]
    assert len(arena) == 1
    assert len({mask.untyped_storage().data_ptr() for mask in masks}) == 1
    arena.causal(9, 9, torch.float32, CPU)
    arena.causal(9, 9, torch.bool, CPU)
    assert len(arena) == 3


def test_the_arena_is_bounded() -> None:
    arena = Arena(limit=2)
    first = arena.causal(1, 1, torch.float32, CPU)
    for length in (2, 4):
        arena.causal(length, length, torch.float32, CPU)
    assert len(arena) == 2
    assert arena.causal(1, 1, torch.float32, CPU) is not first


def test_a_mask_made_in_inference_is_good_for_training() -> None:
    arena, x = Arena(), torch.ones(4, 4, requires_grad=True)
    with torch.inference_mode():
        arena.causal(4, 4, torch.float32, CPU)
    mask = arena.causal(4, 4, torch.float32, CPU)
    (x * mask).nan_to_num(neginf=0.0).sum().backward()  # saves the mask for the backward pass
    assert x.grad is not None


def fits(**changes: Tensor) -> None:
    tensors = {"q": torch.zeros(4, 2, 3, 6), "k": torch.zeros(4, 2, 5, 6), "v": torch.zeros(4, 2, 5, 1)} | changes
    mask, bias = tensors.pop("mask", None), tensors.pop("bias", None)
    Inputs.of(**tensors, mask=mask, bias=bias, causal=False, scale=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(4, 2, 5, 7)}, r"q \(4, 2, 3, 6\), k \(4, 2, 5, 7\) and v \(4, 2, 5, 1\) do not fit"),
        ({"v": torch.zeros(4, 2, 4, 1)}, "do not fit"),
        ({"v": torch.zeros(4, 2, 5, 1).half()}, "q is torch.float32, k torch.float32, v torch.float16"),
        ({"mask": torch.zeros(3, 3, 5)}, r"mask \(3, 1, 3, 5\) does not fit 4 x 2 x 3 x 5"),
        ({"mask": torch.zeros(3, 4)}, "mask .* does not fit"),
        ({"bias": torch.zeros(3, 3, 5)}, "bias .* does not fit"),
        ({"bias": torch.zeros(2, 1, 5)}, "bias .* does not fit"),
        ({"bias": torch.zeros(3, 5, dtype=torch.bool)}, "pass what is boolean as mask"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Tensor], message: str) -> None:
    fits()
    with pytest.raises(ValueError, match=message):
        fits(**changes)
