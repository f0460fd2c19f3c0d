"""Exponentials whose value for one element does not depend on how many others stand beside it.

Elementwise kernels compute the last elements, those that do not fill a SIMD vector, with another exponential, so that
the last host of a batch would round differently from the others. Padding to whole vectors avoids that.
"""

import torch
from torch import Tensor
from torch.nn import functional

_LANES = 64


def _padded(x: Tensor) -> Tensor:
    return functional.pad(x.flatten(), (0, -x.numel() % _LANES))


def sigmoid(x: Tensor) -> Tensor:
    """As torch.sigmoid."""
    return _padded(x).sigmoid()[: x.numel()].view_as(x)


def softmax(x: Tensor) -> Tensor:
    """As torch.softmax over the last dimension; -inf entries get 0, and each row needs a finite one."""
    top = x.detach().amax(-1, keepdim=True)
    weight = torch.exp(_padded(x - top))[: x.numel()].view_as(x)
    return weight / weight.sum(-1, keepdim=True)
