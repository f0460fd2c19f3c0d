"""Optimisers of networks that grow: parameters come and go, and what was done to a layer is read from the state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_ENTRIES, _LINE = 2048, 16  # whose squares stand for those of a large parameter: within a few percent


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
    the last step. What is not trained has none. Sums over large parameters are estimated from some of their entries.
    """
    parameters = [p for part in parts for p in part]
    if not parameters:
        return torch.zeros(len(parts), 4)
    place = {id(p): number for number, p in enumerate(parameters)}
    found = torch.zeros(len(parameters), 4, dtype=torch.float64)
    found[:, 0] = _sums([p.detach() for p in parameters])
    for group in optimizer.param_groups:
        own = [(p, optimizer.state.get(p, {})) for p in group["params"] if id(p) in place]
        with_means = [(p, state) for p, state in own if "exp_avg_sq" in state]
        stepped = [(p, state) for p, state in own if "exp_avg_sq" not in state and p.grad is not None]
        for rows, measured in ((with_means, _of_means), (stepped, _of_last_step)):
            if rows:
                found[[place[id(p)] for p, _ in rows], 1:] = measured(group, rows)
    counts = torch.tensor([len(part) for part in parts])
    return torch.segment_reduce(found, "sum", lengths=counts, axis=0).float()


def _of_means(group: dict[str, Any], rows: list[tuple[nn.Parameter, dict[str, Any]]]) -> Tensor:
    beta1, beta2 = group["betas"]
    states = [state for _, state in rows]
    step = torch.tensor([float(s["step"]) for s in states], dtype=torch.float64)
    slow, fast = 1 - beta1**step, 1 - beta2**step
    sizes, mean = _joined([s["exp_avg"] for s in states])
    second = _joined([s["exp_avg_sq"] for s in states])[1]
    update = (mean / second.sqrt().add_(group["eps"])).square_()
    gradients, updates, means = (_reduced(sizes, x) for x in (second, update, mean.square()))
    return torch.stack([gradients / fast, updates * float(group["lr"]) ** 2 * fast / slow**2, means / slow**2], dim=1)


def _of_last_step(group: dict[str, Any], rows: list[tuple[nn.Parameter, dict[str, Any]]]) -> Tensor:
    gradients = [p.grad for p, _ in rows if p.grad is not None]
    buffers = [state.get("momentum_buffer") for _, state in rows]
    gradient = _sums(gradients)
    step = _sums([g if b is None else b for g, b in zip(gradients, buffers, strict=True)])
    decay = 1 - group.get("momentum", 0.0) * (1 - group.get("dampening", 0.0))
    share = torch.tensor([1.0 if buffer is None else decay for buffer in buffers], dtype=torch.float64)
    return torch.stack([gradient, float(group["lr"]) ** 2 * step, share**2 * step], dim=1)


def _sums(tensors: Sequence[Tensor]) -> Tensor:
    """float64 on the CPU, of the squares of each."""
    sizes, joined = _joined(tensors)
    return _reduced(sizes, joined.square())


def _joined(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """How many entries each has, and `_few` of all of them in a row, since many small operations take longer."""
    few = [_few(x) for x in tensors]
    return torch.tensor([[x.numel(), y.numel()] for x, y in zip(tensors, few, strict=True)]).T, torch.cat(few).float()


def _reduced(sizes: Tensor, values: Tensor) -> Tensor:
    """float64 on the CPU, sums over what `_joined` has joined."""
    whole, few = sizes
    return torch.segment_reduce(values, "sum", lengths=few.to(values.device)).cpu().double() * (whole / few)


def _few(x: Tensor) -> Tensor:
    """[n], some _ENTRIES of x if it has many more: runs of a cache line each, an odd number of them apart, so that all
    rows and columns are met."""
    x, count = x.reshape(-1), x.numel()
    if count < 2 * _ENTRIES:
        return x
    return x[: count - count % _LINE].view(-1, _LINE)[:: count // _ENTRIES | 1].flatten()
