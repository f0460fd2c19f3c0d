"""`esper.grow`: a controller in an ordinary training loop."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from esper.growing.baking import Plan, bake, entry
from esper.growing.control import Choice, Chooser, Given, resolved
from esper.growing.parallel import Replicas, wrappings
from esper.growing.places import AUTO, Slots, found, named
from esper.growing.report import Decision, Report, decision_of, words
from esper.growth import blueprints as registry
from esper.growth.actions import WAIT, ActionLayout
from esper.growth.lifecycle import NO_BLUEPRINT, LifecycleSpec, is_kept, is_live
from esper.growth.observation import Observer
from esper.hosts.anatomy import Anatomy, Call, Calls, Slot, in_eval, traced
from esper.hosts.budget import Budget
from esper.hosts.module import ModuleHost
from esper.runtime.errors import ConfigError, EsperError

LIFECYCLE = LifecycleSpec(auto_blend=1)
"""That of the environments that Tamiyo is trained on."""

BLUEPRINTS = ("bypass", "low_rank", "widen", "mlp", "norm")
"""What Tamiyo is trained with, and `conv` where there are images."""

_SHOWN, _SHOWN_FROM = 3, 0.005  # candidates in a report, and the probability from which they are there
_TRIVIAL = math.log(10)  # loss of a guess among ten classes, which most of Tamiyo's hosts have


class Growth:
    """A network that grows while somebody trains it; see `grow`.

    Attributes:
        host: what is observed and acted on, once the first step has been taken.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Slots,
        policy: Given,
        budget: Budget,
        epochs: int,
        blueprints: Sequence[str] | str,
        trivial_loss: float | None,
        lifecycle: LifecycleSpec,
        seed: int,
    ):
        if epochs < 2:
            raise ConfigError(f"epochs={epochs}: must be at least 2, one to look and one to grow")
        if trivial_loss is not None and not trivial_loss > 0:
            raise ConfigError(f"trivial_loss={trivial_loss}: must be above 0, or None for cross-entropies")
        self.model, self.network = model, wrappings(model)[-1]
        self.budget, self.epochs, self.seed, self.lifecycle = budget, epochs, seed, lifecycle
        self._unit = 1.0 if trivial_loss is None else trivial_loss / _TRIVIAL
        self._named = named(self.network, slots)
        self._catalogue = _catalogue(blueprints)
        self._policy = resolved(policy)
        self._controller = str(policy) if isinstance(policy, str | PathLike) else type(policy).__name__.lower()
        self._replicas = Replicas.of(model)
        self.host: ModuleHost | None = None
        self._report: Report | None = None
        self._plan: Plan = []
        self._sample: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._samples = 0
        self._watching: Any = self.network.register_forward_pre_hook(
            torch.compiler.disable(self._watch), with_kwargs=True
        )
        _forget_compiled()

    # ---- the loop ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self,
        validation_loss: float | Tensor | Callable[[], float | Tensor],
        optimizer: Optimizer,
        train_loss: float | None = None,
        scaler: GradScaler | None = None,
    ) -> Decision:
        """To be called after each epoch: shows the controller how the network does, and carries out what it decides.

        Args:
            validation_loss: of the network as it is now; or a function that measures it, with which the contribution
                of each seed is measured, too, by one more call for each that has been blended in.
            optimizer: that of the network; always the same.
            train_loss: mean loss of the epoch, if it is known.
            scaler: that scales the loss, if one does.

        Returns:
            What was decided.

        Raises:
            ConfigError: no forward pass was seen, no slot was found, or the optimiser is not the network's.
            EsperError: growing has finished.
        """
        if self._watching is None and self.host is None:
            raise EsperError("growing has finished; call esper.grow again to go on")
        measured = validation_loss if callable(validation_loss) else None
        given = None if callable(validation_loss) else float(validation_loss) / self._unit

        def losses(count: int | None) -> Tensor:
            """Of all samples as if they were few, since those of others cannot be told apart."""
            assert measured is not None
            return torch.tensor([float(measured()) / self._unit], device=host.device)

        host = self.host or self._begin(optimizer)
        host.losses = losses if measured else None
        if self._sample is not None:
            if not measured:
                in_eval(self.network, *self._sample)  # for the statistics of activations, which hooks see from now on
            self._sample = None
            host.measure(given)
        else:
            if optimizer is not host.optimizer:
                raise ConfigError("optimizer: another one than in the steps before; seeds are trained by that one")
            host.context.learning_rate[:] = float(optimizer.param_groups[0]["lr"])
            self._unscale(host, scaler)
            host.end_epoch(math.nan if train_loss is None else train_loss / self._unit, given)
        return self._decide(host, float(host.validation_loss) * self._unit)

    def finish(self) -> nn.Module:
        """Makes the seeds that are blended in part of the network for good, takes the others out, and leaves an
        ordinary module behind, without hooks. The optimiser goes on with the parameters of the seeds that were kept.

        Returns:
            The model that `grow` was given.
        """
        if self._watching is not None:
            self._watching.remove()
            self._watching = None
        if self.host is None:
            return self.model
        host, report = self.host, self.report()
        lived = self._inhabitants(host)
        host.losses = None
        host.remove_unfinished()
        kept = is_kept(host.lifecycle.stage)[0].tolist()
        host.release()
        for slot, graft in enumerate(host.grafts):
            if graft.seed is not None and kept[slot]:
                bake(self.network, graft.place.slot.name, graft.seed)
        report.kept = [text for text, stays in zip(lived, kept, strict=True) if text and stays]
        report.removed = [text for text, stays in zip(lived, kept, strict=True) if text and not stays]
        self._plan = [entry(g.seed) for g, stays in zip(host.grafts, kept, strict=True) if g.seed is not None and stays]
        self.host = None
        _forget_compiled()
        return self.model

    def report(self) -> Report:
        """What has been done so far and why.

        Raises:
            EsperError: no step has been taken.
        """
        if self._report is None:
            raise EsperError("there is nothing to report yet; call step after each epoch")
        return self._report

    def plan(self) -> Plan:
        """What has grown where, for `esper.regrow`.

        Raises:
            EsperError: growing has not finished.
        """
        if self.host is not None or self._watching is not None:
            raise EsperError("the network still grows; call finish first")
        return self._plan

    # ---- saving -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that growing depends on, in plain containers and tensors. Those of the model and the optimiser are
        saved beside it; the model's does not have the seeds, the optimiser's has their moments."""
        if self.host is None:
            return {"samples": self._samples}
        return {
            "samples": self._samples,
            "calls": {name: asdict(call) for name, call in self.host.anatomy.calls.items()},
            "slots": [asdict(place.slot) for place in self.host.anatomy.places],
            "blueprints": [blueprint.name for blueprint in self.host.catalogue],
            "host": self.host.state_dict(),
            "chooser": self._chooser.state_dict(),
            "report": self.report().to_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], optimizer: Optimizer) -> None:
        """Restores what `state_dict` returned, for a fresh Growth of a fresh model.

        Args:
            state: what was saved.
            optimizer: of the model, which gets the seeds' parameters. Load its own state afterwards.
        """
        self._samples = state["samples"]
        if "host" not in state:
            return
        self._catalogue = state["blueprints"]
        calls = {name: Call(**call) for name, call in state["calls"].items()}
        host = self._attach(calls, [Slot(**slot) for slot in state["slots"]], optimizer)
        host.load_state_dict(state["host"])
        self._chooser.load_state_dict(state["chooser"])
        saved = dict(state["report"])
        decisions = [decision_of(row) for row in saved.pop("decisions")]
        self._report = Report(**saved, decisions=decisions)
        self._watch_seeds(host)

    # ---- beginning --------------------------------------------------------------------------------------------------

    def _watch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps the newest inputs in training, and counts samples."""
        if module.training or self._sample is None:
            self._sample = args, kwargs
        if module.training:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            self._samples += len(tensors[0]) if tensors else 0

    def _begin(self, optimizer: Optimizer) -> ModuleHost:
        if self._sample is None:
            raise ConfigError("step: the model has not been called since esper.grow; train it for an epoch first")
        calls = traced(self.network, *self._sample)
        return self._attach(calls, found(self.network, self._named, calls), optimizer)

    def _attach(self, calls: Calls, slots: list[Slot], optimizer: Optimizer) -> ModuleHost:
        own = set(map(id, self.network.parameters()))
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise ConfigError("optimizer: has none of the model's parameters; give the one that trains it")
        anatomy = Anatomy(self.network, slots, calls)
        catalogue = self._catalogue
        if catalogue is None:
            images = any(len(place.site.grid) == 2 for place in anatomy.places)
            catalogue = [*BLUEPRINTS, *(["conv"] if images else [])]
        self._chooser = Chooser(self._policy, catalogue, self.seed)
        host = ModuleHost(
            self.network,
            anatomy,
            catalogue,
            optimizer,
            None,
            self.lifecycle,
            self.budget,
            max(self._samples, 1),
            self.seed,
        )
        self.host = host
        self._observer = Observer(host, self.epochs - 1)
        self._layout = ActionLayout(host.slots, len(catalogue))
        parameters = sum(p.numel() for p in self.network.parameters())
        self._report = Report(self._controller, [slot.name for slot in slots], parameters)
        if self._watching is not None:
            self._watching.remove()
            self._watching = None
        _forget_compiled()
        return host

    # ---- decisions --------------------------------------------------------------------------------------------------

    def _unscale(self, host: ModuleHost, scaler: GradScaler | None) -> None:
        if scaler is not None and scaler.is_enabled():
            for graft in host.grafts:
                if graft.learnt is not None:
                    graft.learnt = graft.learnt[0], graft.learnt[1].float() / scaler.get_scale()

    def _decide(self, host: ModuleHost, loss: float) -> Decision:
        step, note = int(host.epoch) + 1, ""
        lifecycle = host.lifecycle
        names = [None if k == NO_BLUEPRINT else host.catalogue[k].name for k in lifecycle.blueprint[0].tolist()]
        seen = {
            "stages": tuple(lifecycle.stage[0].tolist()),
            "alphas": tuple(lifecycle.alpha[0].tolist()),
            "blueprints": tuple(names),
        }
        choice = Choice(WAIT, None, None)
        if step >= self.epochs:
            note = "the last epoch" if step == self.epochs else f"after the {self.epochs} epochs it was told of"
        elif not math.isfinite(loss):
            note = "the validation loss is not finite"
        else:
            choice = self._replicas.agreed(self._chooser(self._observer()))
        kinds = [blueprint.name for blueprint in host.catalogue]
        text = words(self._layout, self.report().slots, kinds, choice.action)
        self._layout.execute(host, torch.tensor([choice.action]))
        host.begin_epoch()
        self._watch_seeds(host)
        decision = Decision(
            step=step,
            action=text,
            validation_loss=loss,
            candidates=self._candidates(host, choice) if not note else (),
            value=choice.value,
            parameters=self.report().host_parameters + int(host.seed_parameters(is_live(lifecycle.stage))),
            note=note,
            **seen,
        )
        self.report().decisions.append(decision)
        return decision

    def _candidates(self, host: ModuleHost, choice: Choice) -> tuple[tuple[str, float], ...]:
        if choice.probabilities is None:
            return ()
        top = choice.probabilities.topk(min(_SHOWN, len(choice.probabilities)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        slots, kinds = self.report().slots, [blueprint.name for blueprint in host.catalogue]
        return tuple(
            (words(self._layout, slots, kinds, action), chance) for action, chance in pairs if chance >= _SHOWN_FROM
        )

    def _watch_seeds(self, host: ModuleHost) -> None:
        seeds = [graft.seed for graft in host.grafts if graft.seed is not None]
        self._replicas.watch(p for seed in seeds for p in seed.parameters())

    def _inhabitants(self, host: ModuleHost) -> list[str]:
        """[S], "blueprint in slot" where a seed lives, else nothing."""
        kinds, names = host.lifecycle.blueprint[0].tolist(), self.report().slots
        return [
            "" if kind == NO_BLUEPRINT else f"{host.catalogue[kind].name} in {name}"
            for kind, name in zip(kinds, names, strict=True)
        ]


def grow(
    model: nn.Module,
    slots: Slots = AUTO,
    policy: Given = "tamiyo_small",
    budget: Budget | None = None,
    *,
    epochs: int = 24,
    blueprints: Sequence[str] | str = AUTO,
    trivial_loss: float | None = None,
    lifecycle: LifecycleSpec | None = None,
    seed: int = 0,
) -> Growth:
    """Lets a controller grow a network of your own while you train it.

        growth = esper.grow(model, budget=esper.Budget(parameters=1.5), epochs=epochs)
        for epoch in range(epochs):
            train_one_epoch(model, optimizer, loader)
            growth.step(validation_loss=lambda: validate(model), optimizer=optimizer)
        growth.finish()

    Args:
        model: any module whose tensors have samples along the first dimension; also compiled, or wrapped in
            DistributedDataParallel. It is left as it is until the first step.
        slots: where seeds may live: "auto", names of submodules behind each of which one may, or a function of the
            model that gives them. See `esper.growing.places`.
        policy: who decides: a shipped policy, a run directory or checkpoint, or a baseline, by name; or a policy.
        budget: what seeds may cost; by default half as many parameters again, and four germinations.
        epochs: how often `step` will be called, the last time when training is over. Controllers have been trained for
            about 24 decisions.
        blueprints: names of the blocks that may be grafted in; "auto" is what Tamiyo is trained with, and convolutions
            where there are images.
        trivial_loss: loss of a model that knows nothing, such as the variance of the targets for a squared error. By
            default losses are taken for cross-entropies in nats.
        lifecycle: rules of the lifecycle; by default those that Tamiyo is trained with.
        seed: of the seeds' initial values.

    Raises:
        ConfigError: an argument does not fit; names it.
    """
    return Growth(
        model,
        slots,
        policy,
        budget or Budget(),
        epochs,
        blueprints,
        trivial_loss,
        lifecycle or LIFECYCLE,
        seed,
    )


def _catalogue(given: Sequence[str] | str) -> list[str] | None:
    """None for AUTO."""
    if given == AUTO:
        return None
    names = [given] if isinstance(given, str) else list(given)
    known = registry.available()
    if not names or any(name not in known for name in names):
        raise ConfigError(f"blueprints={given}: choose {AUTO}, or some of {', '.join(known)}")
    return names


def _forget_compiled() -> None:
    """Compiled code does not see hooks and submodules that came after it."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
