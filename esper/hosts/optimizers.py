"""Optimisers of networks that grow: parameters come and go, and what was done to a layer is read from the state."""

from __future__ import annotations

from collections.abc import Iterable

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
def squares(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> Tensor:
    """[4], sums of squares over `parameters`: of their values, gradients, last updates and mean gradients.

    Gradients are those of the running means of Adam's family (Kingma and Ba, arXiv 1412.6980); of other optimisers, of
    the last step.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    total = torch.zeros(4)
    for p in parameters:
        group, state = groups.get(id(p)), optimizer.state.get(p, {})
        zero = torch.zeros(())
        gradient = mean = update = zero
        if group is not None and "exp_avg_sq" in state:
            beta1, beta2 = group["betas"]
            step = float(state["step"])
            slow, fast = 1 - beta1**step, 1 - beta2**step
            size = group["lr"] * fast**0.5 / slow
            update = (size * state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["eps"])).square().sum()
            mean, gradient = (state["exp_avg"] / slow).square().sum(), (state["exp_avg_sq"] / fast).sum()
        elif group is not None and p.grad is not None:
            gradient = p.grad.square().sum()
            buffer = state.get("momentum_buffer")
            step_ = p.grad if buffer is None else buffer
            update = (group["lr"] * step_).square().sum()
            decay = 0.0 if buffer is None else 1 - group["momentum"] * (1 - group.get("dampening", 0.0))
            mean = gradient if buffer is None else (step_ * decay).square().sum()
        total += torch.stack([p.square().sum(), gradient, update, mean]).cpu().float()
    return total
