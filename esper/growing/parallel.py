"""Networks that are trained by several processes: their seeds' gradients are averaged, and one process decides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel


class Replicas:
    """The processes that train copies of one network with DistributedDataParallel, which knows the parameters that
    there were when it was made: those of seeds are seen to here.

    Args:
        group: of the processes; None where there is one alone.
    """

    def __init__(self, group: Any):
        self.group = group
        self._watched: dict[int, nn.Parameter] = {}
        self._queued = False

    @classmethod
    def of(cls, model: nn.Module) -> Replicas:
        """Those of a model."""
        wrapped = next((m for m in wrappings(model) if isinstance(m, DistributedDataParallel)), None)
        return cls(None if wrapped is None else wrapped.process_group)

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """Averages the gradients of these, and of no others, over the processes at the end of every backward pass."""
        if self.group is not None:
            before, self._watched = self._watched, {id(p): p for p in parameters}
            for key, parameter in self._watched.items():
                if key not in before:
                    parameter.register_post_accumulate_grad_hook(self._arrived)

    def agreed(self, value: Any) -> Any:
        """What the first process has for `value`."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=dist.get_global_rank(self.group, 0), group=self.group)
        return box[0]

    def _arrived(self, parameter: Tensor) -> None:
        if not self._queued:
            self._queued = True
            Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        self._queued = False
        gradients = [p.grad for p in self._watched.values() if p.grad is not None]
        if gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat, group=self.group)
            flat /= dist.get_world_size(self.group)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))


def wrappings(model: nn.Module) -> list[nn.Module]:
    """The model and, one inside the other, what torch.compile and DistributedDataParallel have wrapped; the network
    itself is the last."""
    found = [model]
    while True:
        last = found[-1]
        if isinstance(last, DistributedDataParallel):
            found.append(last.module)
        elif isinstance(inner := last.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            found.append(inner)
        else:
            return found
