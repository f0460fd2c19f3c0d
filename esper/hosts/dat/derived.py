"""Modules with buffers that follow from sizes and are shared, as those of a Dual Aggregation Transformer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Derived(nn.Module):
    """A module with buffers that sizes alone decide: they are in state dicts, are shared between modules, and are not
    read from state dicts.

    Attributes:
        derived: their names.
    """

    derived: tuple[str, ...] = ()

    def derive(self) -> None:
        """Sets the buffers to what the pools have for the present dtype and device."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.derive()  # each module has a copy of its own after a move
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = {prefix + name: getattr(self, name) for name in self.derived}
        kept = {key: value for key, value in own.items() if key in state_dict and self._fits(value, state_dict[key])}
        super()._load_from_state_dict({**state_dict, **kept}, prefix, *args)

    @staticmethod
    def _fits(own: Tensor, given: Tensor) -> bool:
        """Whether the tensor of a state dict may stand for one's own."""
        return own.shape == given.shape
