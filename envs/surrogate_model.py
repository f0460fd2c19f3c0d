"""What an epoch does to a host, as a small network fitted to logged episodes; `scripts/fit_surrogate.py` fits it.

It maps what is known of a host and its stages (hidden context, seeds, present losses) to the means and scales of the
losses after the epoch and of the statistics that the host's observation is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from esper.growth.blueprints.exponential import sigmoid
from esper.growth.conditions import DEFECTS, NEVER, Condition
from esper.growth.context import Context
from esper.growth.state import PopulationSpec
from esper.growth.statistics import ACTIVATION_STATISTICS
from esper.runtime.errors import ConfigError

FILE = Path(__file__).with_name("surrogate.npz")

HOST = ("validation_loss", "train_loss", "update_rms")
LAYER = ("weight_rms", "gradient_rms", "update_ratio", "signal_to_noise")
STAGE = (*LAYER, *ACTIVATION_STATISTICS, "backward_rms", "growth_gradient", "seed_gradient_rms", "contribution")
"""What is predicted of a host, of each of its layers, and of each of its stages (the layers between stem and head)."""

OUTER = 2 * len(LAYER)  # of the stem and of the head, in this order
STATE = 4  # numbers that one epoch hands on to the next, see `Model.step`

_SHARE = ("dead_fraction", "zero_derivative_fraction", "effective_rank")
_UNIT = {"mean": 1.0, "contribution": 0.05}  # of what has either sign: below it linear, above logarithmic
_FLOOR = 1e-6
_LOWEST, _HIGHEST = math.log(0.02), math.log(40.0)  # of log losses
_HORIZON = 24  # epochs: the unit of time


def encode(name: str, value: Tensor) -> Tensor:
    """A statistic on the scale on which it is predicted."""
    if name in _SHARE or name == "signal_to_noise":
        return value
    if name in _UNIT:
        return (value / _UNIT[name]).asinh()
    return (value + _FLOOR).log()


@cache
def _ranges(names: tuple[str, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each statistic the lowest and highest encoded value, its unit (or 0), and whether it is a logarithm."""
    rows = []
    for name in names:
        if name in _SHARE:
            rows.append((0.0, 1.0, 0.0, 0.0))
        elif name == "signal_to_noise":
            rows.append((0.0, 4.0, 0.0, 0.0))
        elif name in _UNIT:
            rows.append((-7.0, 7.0, _UNIT[name], 0.0))
        else:
            rows.append((-13.8, 10.0, 0.0, 1.0))  # just above the logarithm of _FLOOR
    low, high, unit, logarithm = torch.tensor(rows, device=device).unbind(1)
    return low, high, unit, logarithm > 0


def decode(names: tuple[str, ...], value: Tensor) -> Tensor:
    """The inverse of `encode` for all statistics `names` at once, within their ranges: [..., len(names)]."""
    low, high, unit, logarithm = _ranges(names, value.device)
    value = value.maximum(low).minimum(high)
    power = value.exp()
    signed = (power - power.reciprocal()) * (unit / 2)
    return torch.where(logarithm, power - _FLOOR, torch.where(unit > 0, signed, value))


# ---- inputs -------------------------------------------------------------------------------------------------------


def stage_inputs(
    context: Context,
    condition: Tensor,
    severity: Tensor,
    epoch: Tensor,
    kind: Tensor,
    alpha: Tensor,
    age: Tensor,
    removed: Tensor,
    blueprints: int,
) -> Tensor:
    """[N, S, stage inputs] of N hosts at the evaluation after `epoch` [N] epochs.

    Args:
        context: of the hosts.
        condition, severity: of the stages now, [N, S].
        epoch: [N].
        kind: int64 [N, S], the blueprints of the seeds, -1 where none lives.
        alpha: of the slots, [N, S].
        age: [N, S], epochs that the seeds have been trained.
        removed: [N, S], contributions of the seeds that were culled before the last epoch, else 0.
        blueprints: K.
    """
    conditions = (condition[..., None] == torch.arange(len(Condition))).float()
    seeds = (kind[..., None] == torch.arange(blueprints)).float()
    since = epoch[:, None] - context.strike_epoch
    depth, place = context.depth[:, None], torch.arange(condition.shape[1])
    columns = [
        since >= 0,
        since.clamp(0, _HORIZON) / _HORIZON,
        since == 0,
        since == 1,
        age / _HORIZON,
        age == 1,
        encode("contribution", removed) / 4,
        place / depth,
        place == depth - 1,
    ]
    return torch.cat(
        [
            conditions,
            conditions[..., DEFECTS[0] : DEFECTS[-1] + 1] * severity[..., None],
            seeds,
            seeds * alpha[..., None],
            torch.stack([column.float() for column in columns], dim=-1),
        ],
        dim=-1,
    )


def host_inputs(context: Context, epoch: Tensor, classes: int) -> Tensor:
    """[N, host inputs] of N hosts at the evaluation after `epoch` [N] epochs; the first column says whether there was
    one."""
    since = epoch - context.shift_epoch
    shifts = context.shift_epoch < NEVER
    before, after = shifts & (since < 0), (shifts & (since >= 0)).float()
    unmet = 1 - context.first_classes.clamp(max=classes) / classes
    columns = [
        epoch > 0,
        epoch / _HORIZON,
        (-epoch / 3).exp(),
        context.learning_rate.log10() + 2.5,
        context.train_size.float().log10() - 2.5,
        context.label_noise * 2,
        context.width / 16,
        context.depth / 6,
        before * unmet,
        after * unmet,
        after * context.flipped,
        (since == 0) * unmet,
        (since == 0) * context.flipped,
        after * since.clamp(0, _HORIZON) / _HORIZON,
        after * (-since.clamp(min=0) / 3).exp(),
    ]
    return torch.stack([column.float() for column in columns], dim=1)


def input_sizes(blueprints: int) -> tuple[int, int]:
    """How many inputs a stage and a host have, with that many blueprints."""
    return len(Condition) + len(DEFECTS) + 2 * blueprints + 9, 15


# ---- the network --------------------------------------------------------------------------------------------------


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[N, rows, out] of x [N, rows, in].

    One small product per host: one large product would round differently for other numbers of hosts.
    """
    if torch.is_grad_enabled():  # it is being fitted
        return x @ weight + bias
    return torch.baddbmm(bias, x, weight.expand(len(x), -1, -1))


@dataclass
class Model:
    """The network's weights [in, out], and what else is fitted.

    The stages are encoded one by one and pooled. The losses follow from what is pooled, the host's inputs and its
    present losses; a stage's statistics from its own code and inputs, the codes before and behind it, and the host.
    H, G and Q are the sizes of the hidden layers.
    """

    stage_in: Tensor  # [stage inputs, H]
    stage_in_bias: Tensor
    host_in: Tensor  # [2 H + host inputs + STATE, G]
    host_in_bias: Tensor
    host_middle: Tensor  # [G, G]
    host_middle_bias: Tensor
    host_out: Tensor  # [G, 2 + len(HOST) + OUTER]
    host_out_bias: Tensor
    stage_middle: Tensor  # [3 H, Q]
    stage_middle_bias: Tensor
    stage_host: Tensor  # [G, Q]
    stage_host_bias: Tensor
    stage_out: Tensor  # [Q + stage inputs, len(STAGE)]
    stage_out_bias: Tensor
    host_scale: Tensor  # [G, len(HOST) + OUTER]
    host_scale_bias: Tensor
    stage_scale: Tensor  # [Q + stage inputs, len(STAGE)]
    stage_scale_bias: Tensor
    host_memory: Tensor  # [len(HOST) + OUTER], correlation of the noise with that of the epoch before
    stage_memory: Tensor  # [len(STAGE)]
    shared: Tensor  # [], correlation of what is new in a grown host's noise with what is new in its twin's
    accuracy: Tensor  # [2, 5], see `accuracy_inputs`; of the validation and of the test split

    def map(self, function: Callable[[Tensor], Tensor]) -> Model:
        """With `function` applied to every tensor."""
        return Model(**{field.name: function(getattr(self, field.name)) for field in fields(self)})

    def code(self, stages: Tensor, exists: Tensor) -> Tensor:
        """[N, S, H] of stage inputs [N, S, in]; 0 where there is no such stage (exists: bool [N, S])."""
        return _affine(stages, self.stage_in, self.stage_in_bias).relu() * exists[..., None]

    def step(self, code: Tensor, host: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Means of the host's statistics [N, len(HOST) + OUTER] after an epoch, and the hidden layer [N, G].

        Args:
            code: of the stages, [N, S, H].
            host: inputs [N, in].
            state: [N, STATE], before the epoch: the log validation loss, its last change, the log training loss, and
                whether there is one; all 0 at the first evaluation.
        """
        x = torch.cat([code.sum(1) / 4, code.amax(1), host, state], dim=1)[:, None]
        hidden = _affine(x, self.host_in, self.host_in_bias).relu()
        hidden = _affine(hidden, self.host_middle, self.host_middle_bias).relu()
        out = _affine(hidden, self.host_out, self.host_out_bias).squeeze(1)
        # Both losses approach an asymptote at some rate; where there is no loss yet, they are there at once.
        present = state[:, ::2]
        known = torch.stack([host[:, 0], state[:, 3]], dim=1) > 0
        rate = torch.where(known, sigmoid(out[:, :2]), 1.0)
        losses = (present + rate * (out[:, 2:4] - present)).clamp(_LOWEST, _HIGHEST)
        return torch.cat([losses, out[:, 4:]], dim=1), hidden.squeeze(1)

    def stages(self, stages: Tensor, code: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Means of the stages' statistics [N, S, len(STAGE)], and what they are linear in, [N, S, Q + in].

        Args:
            stages: inputs [N, S, in].
            code: of the stages.
            hidden: layer of `step`.
        """
        upto = code.cumsum(1)
        x = torch.cat([code, upto / 4, (upto[:, -1:] - upto) / 4], dim=2)
        host = _affine(hidden[:, None], self.stage_host, self.stage_host_bias)
        middle = (_affine(x, self.stage_middle, self.stage_middle_bias) + host).relu()
        middle = torch.cat([middle, stages], dim=2)
        return _affine(middle, self.stage_out, self.stage_out_bias), middle

    def host_scales(self, hidden: Tensor) -> Tensor:
        """[N, len(HOST) + OUTER], standard deviations of the noise, from the hidden layer of `step`."""
        return _affine(hidden[:, None], self.host_scale, self.host_scale_bias).squeeze(1).clamp(-6, 2).exp()

    def stage_scales(self, middle: Tensor) -> Tensor:
        """[N, S, len(STAGE)], the same of the stages, from what `stages` returns."""
        return _affine(middle, self.stage_scale, self.stage_scale_bias).clamp(-6, 2).exp()


def accuracy_inputs(context: Context, loss: Tensor, train_loss: Tensor) -> Tensor:
    """[m, 5], of which the logit of an accuracy is a linear function, falling with the log validation loss [m].

    For the same validation loss, a host that fits its training data better (log training loss [m]) is more often right.
    """
    size = context.train_size.float().log10() - 2.5
    return torch.stack([torch.ones_like(loss), loss, train_loss, context.label_noise, size], dim=1)


@dataclass(frozen=True)
class Fitted:
    """A model, and what it was fitted to."""

    model: Model
    blueprints: tuple[str, ...]
    inputs: int
    classes: int
    width: int
    stages: int
    steps_per_epoch: int
    batch_size: int

    def check(self, spec: PopulationSpec) -> None:
        """Refuses a population that it does not describe.

        Raises:
            ConfigError: names what differs.
        """
        host, training = spec.host, spec.training
        unknown = [name for name in spec.catalogue if name not in self.blueprints]
        if unknown:
            raise ConfigError(f"env.blueprints: the surrogate knows {', '.join(self.blueprints)}, not {unknown[0]}")
        if (host.inputs, host.classes, host.site.tokens) != (self.inputs, self.classes, 1):
            raise ConfigError("env.task: the surrogate stands in for digits only")
        if host.width > self.width or host.stages > self.stages:
            raise ConfigError(
                f"env.host: the surrogate knows hosts of up to {self.width} units and {self.stages} stages"
            )
        given = (training.steps_per_epoch, training.batch_size)
        if given != (self.steps_per_epoch, self.batch_size):
            raise ConfigError(
                f"env.training: the surrogate knows {self.steps_per_epoch} steps per epoch on {self.batch_size} samples"
            )

    def save(self, file: Path = FILE) -> None:
        """Writes it."""
        rest = {key: value for key, value in vars(self).items() if key != "model"}
        weights = {name: tensor.numpy() for name, tensor in vars(self.model).items()}
        np.savez_compressed(file, **rest, **weights)

    @staticmethod
    def load(file: Path = FILE) -> Fitted:
        """Reads what `save` wrote."""
        with np.load(file) as stored:
            model = Model(**{f.name: torch.from_numpy(stored[f.name]) for f in fields(Model)})
            sizes = {f.name: int(stored[f.name]) for f in fields(Fitted) if f.type == "int"}
            return Fitted(model, tuple(str(name) for name in stored["blueprints"]), **sizes)


@cache
def stored() -> Fitted:
    """The model that is shipped."""
    return Fitted.load()
