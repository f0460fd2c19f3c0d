"""The masked categorical distribution over a graph's legal actions, in fp32 whatever the policy ran in."""

from __future__ import annotations

import torch
from torch import Tensor


class MaskedCategorical:
    """A categorical over the legal entries; illegal ones have probability exactly 0 and get no gradient.

    Args:
        logits: [B, A] of any floating dtype.
        mask: bool [B, A]; at least one legal action in each row.
    """

    def __init__(self, logits: Tensor, mask: Tensor):
        self.mask = mask
        # -inf in fp32: a large negative constant would overflow in fp16 and still leak probability in fp32.
        self.log_probs = logits.float().masked_fill(~mask, -torch.inf).log_softmax(-1)

    @property
    def probs(self) -> Tensor:
        return self.log_probs.exp()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """int64 [B]."""
        return torch.multinomial(self.probs, 1, generator=generator).squeeze(1)

    def mode(self) -> Tensor:
        """The most probable action, int64 [B]."""
        return self.log_probs.argmax(-1)

    def log_prob(self, actions: Tensor) -> Tensor:
        """[B]; -inf for an illegal action."""
        return self.log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """[B], in nats."""
        return -(self.probs * self.log_probs.masked_fill(~self.mask, 0.0)).sum(-1)
