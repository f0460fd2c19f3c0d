"""Policies over graphs, and Tamiyo's: encoder, action logits and value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from esper.graph import GraphBatch, Layout
from esper.graph.schema import SCHEMA, GraphSchema
from esper.growth.actions import RAMPS
from esper.runtime.errors import ConfigError
from esper.tamiyo.distribution import MaskedCategorical
from esper.tamiyo.encoder import Encoder, masked_mean, orthogonal_
from esper.tamiyo.encoders import BACKENDS
from esper.tamiyo.encoders.parameters import CONVOLUTIONS, GAT, SAGE, Shape
from esper.tamiyo.pooled import PooledEncoder

POLICY_GAIN = 0.01  # near-uniform over the legal actions before training
VALUE_GAIN = 1.0
GRAPH, POOLED = "graph", "pooled"  # encoders


@dataclass
class PolicyConfig:
    """What Tamiyo is made of.

    Attributes:
        name: of the policy.
        hidden: widths of the layers.
        heads: attention heads of the GAT layers.
        backend: of the graph encoder: one of `encoders.BACKENDS`, or auto. `encoder: pooled` has none.
        encoder: graph, or pooled, which sees no relation (see PooledEncoder) and has as many parameters as the graph
            encoder of the other keys.
        convolutions: sage or gat, for each layer.
        edge_attributes: false hides the attributes of edges, which are then 0; only GAT layers read them.
    """

    name: str = "tamiyo_small"
    hidden: list[int] = field(default_factory=lambda: [64, 64, 64, 64])
    heads: int = 4
    backend: str = "auto"
    encoder: str = GRAPH
    convolutions: list[str] = field(default_factory=lambda: [*CONVOLUTIONS])
    edge_attributes: bool = True

    def validate(self) -> None:
        """Checks the values.

        Raises:
            ConfigError: names the key, the value and the remedy.
        """
        kinds = f"policy.convolutions=[{', '.join(map(str, self.convolutions))}]"
        if not self.convolutions or not {*self.convolutions} <= {SAGE, GAT}:
            raise ConfigError(f"{kinds}: name a kind of layer for each width, {SAGE} or {GAT}")
        if len(self.hidden) != len(self.convolutions) or min(self.hidden) < 1:
            raise ConfigError(f"policy.hidden={self.hidden}: give one width above 0 for each layer of {kinds}")
        if self.encoder not in (GRAPH, POOLED):
            raise ConfigError(f"policy.encoder={self.encoder}: no such encoder; choose {GRAPH} or {POOLED}")
        if self.backend not in ("auto", *BACKENDS):
            known = ", ".join(("auto", *BACKENDS))
            raise ConfigError(f"policy.backend={self.backend}: no such backend; choose one of {known}")
        attending = [width for width, kind in zip(self.hidden, self.convolutions, strict=True) if kind == GAT]
        if self.heads < 1 or any(width % self.heads for width in attending):
            raise ConfigError(
                f"policy.heads={self.heads}: must divide the widths of the GAT layers, {attending} of "
                f"policy.hidden={self.hidden}"
            )


Prediction = tuple[Tensor, Tensor, Tensor | None]
"""Unmasked action logits [B, A], values [B] and auxiliary predictions [B, n] or None."""


class GraphPolicy(nn.Module):
    """An actor and critic over graphs: an encoder, and heads that a subclass adds.

    Attributes:
        autocast: the type that matrix products may run in; None for float32. The actor and the update both run the
            policy, so that they agree.
    """

    def __init__(self, config: PolicyConfig, schema: GraphSchema, read: tuple[str, ...]):
        super().__init__()
        config.validate()
        self.config = config
        self.encoder = _encoder(config, schema, read)
        self.autocast: torch.dtype | None = None

    def heads(self, x: dict[str, Tensor], node_mask: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Action logits [B, A] and values [B] from the embeddings [B, n, D] and masks [B, n] of each node type."""
        raise NotImplementedError

    def auxiliary(self, x: dict[str, Tensor]) -> Tensor | None:
        """[B, n], a prediction of what `shown` reads of the next observation; None without one."""
        return None

    def shown(self, graph: GraphBatch) -> tuple[Tensor, Tensor] | None:
        """What `auxiliary` is to predict of an observation, [B, n], and which of it is known, bool [B, n]."""
        return None

    def forward(self, graph: GraphBatch) -> tuple[Tensor, Tensor]:
        """Unmasked action logits [B, A] and values [B]; both fp32."""
        return self.predict(graph)[:2]

    def predict(self, graph: GraphBatch) -> Prediction:
        """All outputs, fp32."""
        with self._autocast(graph.device.type):
            x = self.encoder(graph)
            return _as_float(*self.heads(x, graph.node_mask), self.auxiliary(x))

    def evaluate(self, graph: GraphBatch) -> tuple[MaskedCategorical, Tensor]:
        """The distribution over each graph's legal actions, and the values [B]."""
        logits, value = self(graph)
        return MaskedCategorical(logits, graph.action_mask), value

    def of_tensors(self, layout: Layout) -> Callable[[Tensor, Tensor, Tensor, Tensor], Prediction] | None:
        """`predict` for graphs of one layout as a function of packed x, attr, mask and node_mask, which torch.compile
        takes whole; None where the encoder's backend has no such form."""
        encode = self.encoder.of_tensors(layout)
        if encode is None:
            return None
        device, places = next(self.parameters()).device.type, layout.nodes

        def function(x: Tensor, attr: Tensor, mask: Tensor, node_mask: Tensor) -> Prediction:
            with self._autocast(device):
                masks = {node: node_mask[:, place] for node, place in places.items()}
                embeddings = encode(x, attr, mask, node_mask)
                return _as_float(*self.heads(embeddings, masks), self.auxiliary(embeddings))

        return function

    def _autocast(self, device: str) -> torch.autocast:
        return torch.autocast(device, self.autocast or torch.bfloat16, enabled=self.autocast is not None)


def _encoder(config: PolicyConfig, schema: GraphSchema, read: tuple[str, ...]) -> Any:  # one of two modules
    if config.encoder == POOLED:
        return PooledEncoder(Shape(schema, tuple(config.hidden), config.heads, read, tuple(config.convolutions)))
    return Encoder(
        schema, config.hidden, config.heads, read, config.backend, config.convolutions, config.edge_attributes
    )


def _as_float(logits: Tensor, value: Tensor, auxiliary: Tensor | None) -> Prediction:
    return logits.float(), value.float(), None if auxiliary is None else auxiliary.float()


class Tamiyo(GraphPolicy):
    """Actor and critic over growth graphs of any number of layers, slots and blueprints.

    Args:
        config: its size.
        schema: of the graphs it reads.
    """

    def __init__(self, config: PolicyConfig, schema: GraphSchema = SCHEMA):
        super().__init__(config, schema, ("global", "slot", "blueprint"))
        width = config.hidden[-1]
        self.from_global = orthogonal_(nn.Linear(width, width))
        self.from_slot = orthogonal_(nn.Linear(width, width))
        self.from_blueprint = orthogonal_(nn.Linear(width, width))
        self.wait = orthogonal_(nn.Linear(width, 1), POLICY_GAIN)
        self.germinate = orthogonal_(nn.Linear(width, 1), POLICY_GAIN)
        # per slot: one logit for every ramp, FOSSILIZE and CULL
        self.tend = orthogonal_(nn.Linear(width, len(RAMPS) + 2), POLICY_GAIN)
        self.value = nn.Sequential(
            orthogonal_(nn.Linear(2 * width, width)), nn.GELU(), orthogonal_(nn.Linear(width, 1), VALUE_GAIN)
        )
        self.contribution = orthogonal_(nn.Linear(width, 1), VALUE_GAIN)
        names = ("contribution", "contribution_known")
        self._shown = [schema.feature("slot", name) for name in names]

    def heads(self, x: dict[str, Tensor], node_mask: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Unmasked action logits [B, A], numbered as in `esper.growth.actions`, and values [B]."""
        whole = x["global"][:, 0]
        g = self.from_global(whole)[:, None]
        slot = self.from_slot(x["slot"]) + g  # [B, S, D]
        pair = slot[:, :, None] + self.from_blueprint(x["blueprint"])[:, None]  # [B, S, K, D]
        tend = self.tend(nn.functional.gelu(slot))  # [B, S, ramps + 2]
        ramps = len(RAMPS)
        logits = torch.cat(
            [
                self.wait(nn.functional.gelu(g))[:, 0],
                self.germinate(nn.functional.gelu(pair)).flatten(1),
                tend[..., :ramps].flatten(1),
                tend[..., ramps],
                tend[..., ramps + 1],
            ],
            dim=1,
        )
        pooled = torch.cat([whole, masked_mean(x["slot"], node_mask["slot"])], dim=1)
        return logits, self.value(pooled).squeeze(-1)

    @torch.no_grad()
    def act_on_gains(self, sharpness: float, caution: float) -> None:
        """Turns logits that predict what actions gain over WAIT into those of a policy that chooses by them.

        Args:
            sharpness: what logits are multiplied with.
            caution: what is added to WAIT's, since the many that gain nothing would else outweigh it.
        """
        for head in (self.wait, self.germinate, self.tend):
            head.weight.mul_(sharpness)
            head.bias.mul_(sharpness)
        self.wait.bias.add_(caution)

    def auxiliary(self, x: dict[str, Tensor]) -> Tensor:
        """[B, S], each slot's contribution at the next observation."""
        return self.contribution(x["slot"]).squeeze(-1)

    def shown(self, graph: GraphBatch) -> tuple[Tensor, Tensor]:
        """[B, S], each slot's contribution, and whether it is known."""
        value, known = (graph.x["slot"][:, :, column] for column in self._shown)
        return value, known > 0
