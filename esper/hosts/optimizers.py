"""Optimisers of networks that grow: parameters come and go, and what was done to a layer is read from the state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def add(optimizer: Optimizer, parameters: Iterable[nn.Parameter], like: nn.Parameter) -> None:
    """Optimises `parameters` from now on, in the group of the parameter `like`, or else in the first, whose settings
    and schedule they share; schedulers take no new groups."""
    groups = optimizer.param_groups
    next((group for group in groups if any(p is like for p in group["params"])), groups[0])["params"].extend(parameters)


def remove(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Forgets `parameters` and their moments; the others keep theirs."""
    gone = set(map(id, parameters))
    for group in optimizer.param_groups:
        group["params"][:] = [p for p in group["params"] if id(p) not in gone]
    for parameter in [p for p in optimizer.state if id(p) in gone]:
        del optimizer.state[parameter]


def momentum(optimizer: Optimizer) -> float:
    """Of its first group: the decay of the mean gradient, 0 where there is none."""
    group = optimizer.param_groups[0]
    return float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0))


def has_moments(optimizer: Optimizer) -> bool:
    """Whether it keeps running means of gradients and of their squares, as those of Adam's family do."""
    return any("exp_avg_sq" in state for state in optimizer.state.values())


@torch.no_grad()
def squares(optimizer: Optimizer, parts: Sequence[Sequence[nn.Parameter]]) -> Tensor:
    """float32 [parts, 4] on the CPU, sums of squares over the parameters of each part: of their values, gradients, last
    updates and mean gradients.

    Gradients are those of the running means of Adam's family (Kingma and Ba, arXiv 1412.6980); of other optimisers, of
    the last step. What is not trained has none.
    """
    parameters = [p for part in parts for p in part]
    if not parameters:
        return torch.zeros(len(parts), 4)
    place = {id(p): number for number, p in enumerate(parameters)}
    found = torch.zeros(len(parameters), 4, dtype=torch.float64)
    found[:, 0] = _norms(parameters).square().double()
    for group in optimizer.param_groups:
        own = [p for p in group["params"] if id(p) in place]
        with_means = [p for p in own if "exp_avg_sq" in optimizer.state.get(p, {})]
        stepped = [p for p in own if "exp_avg_sq" not in optimizer.state.get(p, {}) and p.grad is not None]
        for rows, measured in ((with_means, _of_means), (stepped, _of_last_step)):
            if rows:
                found[[place[id(p)] for p in rows], 1:] = measured(optimizer, group, rows).double()
    ends = torch.tensor([len(part) for part in parts]).cumsum(0)
    sums = torch.cat([torch.zeros(1, 4, dtype=torch.float64), found.cumsum(0)])
    return sums[ends].sub(sums[ends - torch.tensor([len(part) for part in parts])]).float()


def _of_means(optimizer: Optimizer, group: dict[str, Any], parameters: list[nn.Parameter]) -> Tensor:
    beta1, beta2 = group["betas"]
    states = [optimizer.state[p] for p in parameters]
    means, seconds = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
    step = torch.tensor([float(s["step"]) for s in states], dtype=torch.float64)
    slow, fast = 1 - beta1**step, 1 - beta2**step
    # One after the other, so that each finds the memory of the one before in the cache.
    raw = [torch.linalg.vector_norm(m / v.sqrt().add_(group["eps"])) for m, v in zip(means, seconds, strict=True)]
    steps = torch.stack(raw).cpu().float() * float(group["lr"]) * fast.sqrt() / slow
    return torch.stack([_norms(seconds, 1) / fast, steps.square(), (_norms(means) / slow).square()], dim=1)


def _of_last_step(optimizer: Optimizer, group: dict[str, Any], parameters: list[nn.Parameter]) -> Tensor:
    gradients = [p.grad for p in parameters if p.grad is not None]
    buffers = [optimizer.state.get(p, {}).get("momentum_buffer") for p in parameters]
    gradient = _norms(gradients)
    step = _norms([g if b is None else b for g, b in zip(gradients, buffers, strict=True)])
    decay = 1 - group.get("momentum", 0.0) * (1 - group.get("dampening", 0.0))
    share = torch.tensor([1.0 if buffer is None else decay for buffer in buffers])
    return torch.stack([gradient, float(group["lr"]) * step, share * step], dim=1).square()


def _norms(tensors: Sequence[Tensor], order: float = 2) -> Tensor:
    """float32 on the CPU, of each tensor; in one call for all of them."""
    return torch.stack(list(torch._foreach_norm(list(tensors), order))).cpu().float()
