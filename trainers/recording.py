"""What a controller saw and did while it was judged, as pictures need it: read from observations and actions alone, so
that every growth environment can be recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.graph import GraphBatch
from esper.graph.schema import SCHEMA, STAGES
from esper.growth.actions import ActionLayout, Verb
from esper.growth.chart import Trace
from esper.growth.lifecycle import Stage

_KEPT = 4  # of how many epochs the first one's graphs are kept
_MOST = 256  # graphs that are kept


@dataclass
class Recording:
    """N episodes of at most E epochs, of hosts with up to S slots; everything is on the CPU.

    Attributes:
        stage: int64 [E + 1, N, S], Stage before each epoch and after the last.
        alpha: float32 [E + 1, N, S].
        loss: float32 [E + 1, N], validation loss.
        exists: bool [N, S], slots that a host has.
        actions: int64 [E, N]; those after an episode's end mean nothing.
        graphs: some of the observations.
    """

    stage: Tensor
    alpha: Tensor
    loss: Tensor
    exists: Tensor
    actions: Tensor
    graphs: list[GraphBatch]

    def germinations(self, blueprints: int, length: Sequence[int]) -> Tensor:
        """int64 [N, S, blueprints], how often each was chosen.

        Args:
            length: [N], epochs until an episode's end.
        """
        epochs, hosts = self.actions.shape
        slots = self.stage.shape[2]
        verb, slot, kind = (column[self.actions] for column in ActionLayout(slots, blueprints).table())
        going = torch.arange(epochs)[:, None] < torch.as_tensor(length)
        counts = torch.zeros(hosts, slots, blueprints, dtype=torch.int64)
        epoch, host = ((verb == Verb.GERMINATE) & going).nonzero(as_tuple=True)
        place = host, slot[epoch, host], kind[epoch, host]
        return counts.index_put(place, torch.ones_like(host), accumulate=True)

    def trace(self, host: int, blueprints: Sequence[str], length: int, twin: Recording | None = None) -> Trace:
        """One episode, of `length` epochs, of the slots that its host has.

        Args:
            blueprints: names, in the order of the actions.
            twin: of the same instance, never grown; its only episode.
        """
        there, moments = self.exists[host].nonzero().flatten(), length + 1
        stage = self.stage[:moments, host, there].tolist()
        table = ActionLayout(self.stage.shape[2], len(blueprints)).table()
        kinds: list[list[str | None]] = [[None] * len(there)]
        for epoch in range(length):
            verb, slot, kind = (int(column[self.actions[epoch, host]]) for column in table)
            planted = {slot: blueprints[kind]} if verb == Verb.GERMINATE else {}
            before = dict(zip(there.tolist(), kinds[-1], strict=True)) | planted
            empty = Stage.DORMANT, Stage.EMBARGOED
            kinds.append([None if s in empty else before[k] for k, s in zip(before, stage[epoch + 1], strict=True)])
        return Trace(
            stage,
            self.alpha[:moments, host, there].tolist(),
            kinds,
            self.loss[:moments, host].tolist(),
            None if twin is None else twin.loss[:moments, 0].tolist(),
        )


class Recorder:
    """Watches `trainers.evaluation.play`: called with the observation of B hosts and the actions [B] before each epoch,
    and with None for actions after the last one, batch of hosts after batch.

    Args:
        keep: whether some of the observations are kept as they are.
    """

    def __init__(self, keep: bool = False):
        self._keep, self._kept = keep, 0
        self._graphs: list[GraphBatch] = []
        self._moments: list[dict[str, Tensor]] = []  # of the batch that is under way
        self._actions: list[Tensor] = []
        self._batches: list[tuple[dict[str, Tensor], Tensor]] = []

    def __call__(self, graph: GraphBatch, actions: Tensor | None) -> None:
        slot, whole = graph.x["slot"], graph.x["global"]
        first = SCHEMA.feature("slot", f"is_{STAGES[0]}")
        moment = {
            "stage": slot[..., first : first + len(STAGES)].argmax(-1),
            "alpha": slot[..., SCHEMA.feature("slot", "alpha")],
            "loss": whole[:, 0, SCHEMA.feature("global", "log_validation_loss")].exp(),
            "exists": graph.node_mask["slot"],
        }
        self._moments.append({name: value.detach().cpu().clone() for name, value in moment.items()})
        if actions is not None:
            if self._keep and len(self._actions) % _KEPT == 0 and self._kept < _MOST:
                self._graphs.append(graph)
                self._kept += len(graph)
            self._actions.append(actions.cpu().clone())
            return
        together = {name: torch.stack([moment[name] for moment in self._moments]) for name in self._moments[0]}
        self._batches.append((together, torch.stack(self._actions)))
        self._moments, self._actions = [], []

    def recording(self) -> Recording:
        """Of all batches that are over, whose episodes are as long."""
        found = {name: torch.cat([moments[name] for moments, _ in self._batches], 1) for name in self._batches[0][0]}
        actions = torch.cat([chosen for _, chosen in self._batches], 1)
        exists = found.pop("exists")[0]
        return Recording(**found, exists=exists, actions=actions, graphs=self._graphs)
