import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from esper.growth.convolution import DENSE_TOKENS_PER_TAP, Convolution, convolution

GRIDS = st.one_of(st.tuples(st.integers(1, 12)), st.tuples(st.integers(1, 5), st.integers(1, 5)))


def torch_convolution(h, weight, grid, kernel, dilation, causal):
    """h [batch, tokens, inputs], weight [taps, inputs, outputs]."""
    x = h.transpose(1, 2)
    if len(grid) == 2:
        square = weight.view(kernel, kernel, *weight.shape[1:]).permute(3, 2, 0, 1)
        y = F.conv2d(x.unflatten(2, grid), square, padding=kernel // 2 * dilation, dilation=dilation)
        return y.flatten(2).transpose(1, 2)
    reach = (kernel - 1) * dilation
    x = F.pad(x, (reach, 0) if causal else (reach // 2, reach // 2))
    return F.conv1d(x, weight.permute(2, 1, 0), dilation=dilation).transpose(1, 2)


@settings(max_examples=60)
@given(GRIDS, st.sampled_from([1, 3, 5]), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(1, 3))
def test_both_forms_are_the_framework_s_convolution(grid, kernel, dilation, causal, dense, hosts):
    causal = causal and len(grid) == 1
    conv = Convolution(grid, kernel, dilation, causal)
    conv.dense = dense
    assert conv.taps == kernel ** len(grid)
    g = torch.Generator().manual_seed(len(grid) + kernel)
    batch, inputs, outputs = 2, 3, 4
    h = torch.randn(hosts, batch * conv.tokens, inputs, generator=g).requires_grad_()
    weight = torch.randn(hosts, conv.taps, inputs, outputs, generator=g).requires_grad_()
    got = conv(h, weight)
    expected = torch.cat(
        [
            torch_convolution(x.view(batch, -1, inputs), w, grid, kernel, dilation, causal).reshape(1, -1, outputs)
            for x, w in zip(h, weight, strict=True)
        ]
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    signal = torch.randn(got.shape, generator=g)
    for ours, theirs in zip(
        torch.autograd.grad(got, (h, weight), signal), torch.autograd.grad(expected, (h, weight), signal), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_kernel_by_hand():
    # Taps 1, 10, 100 over the tokens 1, 2, 3: each sees its left neighbour, itself and its right neighbour.
    h = torch.tensor([[1.0], [2.0], [3.0]])[None]
    weight = torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1, 1)
    assert convolution((3,))(h, weight).flatten().tolist() == [210, 321, 32]
    assert convolution((3,), causal=True)(h, weight).flatten().tolist() == [100, 210, 321]
    assert convolution((3,), dilation=2)(h, weight).flatten().tolist() == [310, 20, 31]
    assert convolution((3,), dilation=2, causal=True)(h, weight).flatten().tolist() == [100, 200, 310]


def test_the_form_depends_on_the_tokens_per_tap():
    assert DENSE_TOKENS_PER_TAP == 2
    assert [convolution((length,)).dense for length in (5, 6, 7)] == [True, True, False]
    assert [convolution(grid).dense for grid in ((3, 6), (4, 5))] == [True, False]


def test_convolutions_are_shared():
    assert convolution((3, 3)) is convolution((3, 3))
    assert convolution((3, 3)) is not convolution((3, 3), dilation=2)


@pytest.mark.parametrize(("grid", "causal"), [((5,), False), ((9,), True), ((2, 3), False), ((5, 4), False)])
def test_a_host_is_bitwise_the_same_alone(grid, causal):
    g = torch.Generator().manual_seed(1)
    conv = convolution(grid, causal=causal)
    h = torch.randn(5, 3 * conv.tokens, 3, generator=g)
    weight = torch.randn(5, conv.taps, 3, 3, generator=g)
    together = conv(h, weight)
    for k in range(5):
        assert torch.equal(conv(h[k : k + 1], weight[k : k + 1])[0], together[k])
