"""Number formats: fp32, or bf16 and fp16 where matrix products may run in them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper.runtime.errors import ConfigError

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def check(name: str) -> None:
    """Checks the value of `runtime.precision`.

    Raises:
        ConfigError: it is none of AUTOCAST.
    """
    if name not in AUTOCAST:
        raise ConfigError(f"runtime.precision={name}: choose one of {', '.join(AUTOCAST)}")


def set_up(device: str, threads: int = 1) -> None:
    """Sets how this process calculates; once, when it starts, before torch starts threads, which take it over.

    On CPUs numbers below the smallest normal one become 0: the gradients and moments of a policy that has become sure
    of itself are full of them, and each costs many times what others do. Products of float32 on a CUDA device run
    in TF32.

    Args:
        threads: of torch and of the native kernels.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True


class LossScaler:
    """Backward pass, clipping and optimiser step, with the loss scaled where gradients are half precision.

    The order is scale, backward, unscale, clip, step, update (Micikevicius et al., arXiv 1710.03740). A step whose
    loss or gradient is not finite is left out, on the device, so that nothing waits for it.

    Args:
        name: one of AUTOCAST.
        optimizer: one that can be told to skip a step on the device (`fused=True`).
        device: of its parameters.
    """

    def __init__(self, name: str, optimizer: torch.optim.Optimizer, device: torch.device):
        check(name)
        self.optimizer = optimizer
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    @property
    def parameters(self) -> list[Tensor]:
        """Of the optimiser."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def scale(self) -> float:
        """What the loss is multiplied with; waits for the device."""
        return self.scaler.get_scale()

    def backward(self, loss: Tensor) -> None:
        """Adds the scaled gradients of `loss`."""
        self.scaler.scale(loss).backward()

    def step(self, loss: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
        """Takes the step if `loss` and the gradients that `backward` has left are finite.

        Returns:
            norm: of the gradients before they were clipped to `max_norm`.
            skipped: float32, 1 if the step was left out.
        """
        parameters = self.parameters
        if self.scaler.is_enabled():  # it looks at gradients only: a bad loss is to leave its mark there
            next(p.grad for p in parameters if p.grad is not None).add_(0 * loss.detach())
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        skipped = (~(norm.isfinite() & loss.detach().isfinite())).float()
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.found_inf = skipped  # type: ignore[attr-defined]  # read by the fused step
            self.optimizer.step()
        return norm.detach(), skipped
