"""Hands a population's tensors to the kernel: the structures are those of `host.h`, field by field."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from esper.growth.blueprints.operations import Attend, Convolve, Gate, Linear, Normalise, Operation, Relu
from esper.growth.blueprints.registry import Blueprint, Site
from esper.growth.convolution import Convolution, convolution
from esper.growth.epoch import Trained, learning_rates
from esper.growth.host import KERNEL
from esper.growth.lifecycle import Stage, is_live
from esper.growth.statistics import ACTIVATION_STATISTICS, SAMPLES
from esper.runtime.native import call, fields, library, parts

if TYPE_CHECKING:
    from esper.growth.state import PopulationState

_REGISTERS = 16
KERNEL_FOLDER = Path(__file__).parent


class _Table(ctypes.Structure):
    _fields_ = fields(integers="taps", pointers="from_ to")


class _Operation(ctypes.Structure):
    _fields_ = fields(integers="code input0 input1 input2 weight bias row tap table")


class _Blueprint(ctypes.Structure):
    _fields_ = fields(integers="size operations reads_source", pointers="operation units count theta average square")


class _Population(ctypes.Structure):
    _fields_ = fields(
        integers="inputs classes width stages tokens per_token causal size",
        pointers="place tables blueprints theta average square widths depths steps seed_steps rate low high leak shift "
        "units gain",
    )


class _Rows(ctypes.Structure):
    _fields_ = fields(pointers="host kind alpha isolated")


class _Training(ctypes.Structure):
    _fields_ = fields(
        pointers="x index labels",
        integers="steps batch",
        doubles="beta1 beta2 epsilon",
        pointers_="loss squares seed_rms backward_rms growth",
    )


class _Evaluation(ctypes.Structure):
    _fields_ = fields(pointers="x labels", integers="samples measured full fewer", pointers_="loss logits activations")


@cache
def _array(kind: type[ctypes.Structure], count: int) -> Any:
    """A type, made once: such types are cycles of their own."""
    return kind * count


def unavailable(population: PopulationState) -> str | None:
    """Why the kernel cannot run `population`, or None if it can."""
    if population.device.type != "cpu":
        return f"it runs on CPUs only, not on {population.device.type}"
    for blueprint, fits in zip(population.catalogue, population.fits.tolist(), strict=True):
        if not fits:
            continue
        if not 0 < len(blueprint.program) < _REGISTERS:
            return f"blueprint {blueprint.name!r} has no program of 1 to {_REGISTERS - 1} operations"
        if misfit := _misfit(blueprint, population.spec.site):
            return f"blueprint {blueprint.name!r}: {misfit}"
    found = library(KERNEL_FOLDER)
    return found if isinstance(found, str) else None


def _widths(blueprint: Blueprint, site: Site) -> list[int]:
    """Units of every register of its program."""
    parameters, widths = blueprint.parameters(site), [site.width]
    for operation in blueprint.program:
        if isinstance(operation, Linear | Convolve):
            widths.append(parameters[operation.weight].shape[-1])
        else:
            widths.append(widths[_inputs(operation)[0]])
    return widths


def _misfit(blueprint: Blueprint, site: Site) -> str | None:
    """Where the widths of its program do not fit together; the kernel would read beyond a register."""
    parameters, widths = blueprint.parameters(site), _widths(blueprint, site)
    for number, operation in enumerate(blueprint.program, 1):
        found = [widths[i] for i in _inputs(operation)]
        if isinstance(operation, Linear | Convolve):
            wanted = [parameters[operation.weight].shape[-2]]
        elif isinstance(operation, Normalise | Attend):
            wanted = [site.width] * len(found)
        else:
            wanted = found[:1] * len(found)
        if found != wanted:
            return f"operation {number} of its program reads {found} units, not {wanted}"
    return None if widths[-1] == site.width else f"its program ends with {widths[-1]} units, not {site.width}"


def _address(value: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
    """Of the first element.

    Raises:
        ValueError: the kernel would read it wrongly.
    """
    if value is None:
        return None
    if value.dtype != dtype or not value.is_contiguous() or value.device.type != "cpu":
        raise ValueError(f"a contiguous {dtype} on the CPU, not {value.dtype} of strides {value.stride()}")
    return value.data_ptr()


class _Neighbours:
    """The token at each tap of each token, or -1; and for each token and tap the token that has it there."""

    def __init__(self, tokens: int, kernel: Convolution | None):
        neighbour = torch.arange(tokens)[:, None] if kernel is None else kernel.neighbour
        self.taps = neighbour.shape[1]
        self.there = torch.where(neighbour < tokens, neighbour, -1).int().contiguous()
        self.back = torch.full_like(self.there, -1)
        token, tap = (self.there >= 0).nonzero(as_tuple=True)
        self.back[self.there[token, tap].long(), tap] = token.int()

    def structure(self) -> _Table:
        return _Table(self.taps, _address(self.there, torch.int32), _address(self.back, torch.int32))


def _inputs(operation: Operation) -> tuple[int, ...]:
    match operation:
        case Gate(value, gate):
            return value, gate
        case Attend(query, key, value, _):
            return query, key, value
        case _:
            return (operation.source,)


class NativeEngine:
    """The kernel for populations of one kind, which it does not hold: in a cycle with its engine, a population that is
    no longer needed would wait for the garbage collector, which comes too seldom for things so large and few.

    Args:
        p: one of them.
    """

    def __init__(self, p: PopulationState):
        found = library(KERNEL_FOLDER)
        assert not isinstance(found, str), found
        self._train, self._evaluate = found.esper_train, found.esper_evaluate
        host = p.spec
        stage = convolution(host.grid, KERNEL, causal=host.causal) if host.taps > 1 else None
        self._neighbours = [_Neighbours(host.site.tokens, None), _Neighbours(host.site.tokens, stage)]
        self._place = torch.tensor([0, *p.table.sizes]).cumsum(0)
        self._kept: list[Any] = []  # what the structures point to
        self._programs = [self._program(p, b, kind) for kind, b in enumerate(p.catalogue)]
        self._tables = _array(_Table, len(self._neighbours))(*(n.structure() for n in self._neighbours))

    def _program(self, p: PopulationState, blueprint: Blueprint, kind: int) -> _Blueprint:
        table, site = p.seed_tables[kind], p.spec.site
        names = p.seed_names[kind]
        places = dict(zip(names, torch.tensor([0, *table.sizes]).cumsum(0).tolist(), strict=False))
        fits = blueprint.fits(site)
        # Of each register, for each width.
        units = [
            _widths(blueprint, p.spec.site_of(max(width, 1))) if fits else [1] for width in range(p.spec.width + 1)
        ]
        operations = []
        for operation in blueprint.program if fits else ():
            inputs = _inputs(operation)
            fields = {"weight": -1, "bias": -1, "row": 0, "tap": 0, "table": 0}
            match operation:
                case Linear(_, weight, bias):
                    code = 0
                    fields.update(weight=places[weight], bias=-1 if bias is None else places[bias])
                case Convolve(_, weight, bias, _):
                    code = 0
                    fields.update(weight=places[weight], bias=places[bias], table=len(self._neighbours))
                    self._neighbours.append(_Neighbours(site.tokens, operation.convolution(site)))
                case Relu():
                    code = 1
                case Gate():
                    code = 2
                case Normalise(_, gain, bias):
                    code = 3
                    fields.update(weight=places[gain], bias=places[bias])
                case Attend(_, _, _, position):
                    code = 4
                    fields.update(weight=places[position])
            if isinstance(operation, Linear | Convolve):
                *_, rows, columns = table.specs[names.index(operation.weight)].shape
                fields.update(row=columns, tap=rows * columns)
            operations.append(_Operation(code, *inputs, *[0] * (3 - len(inputs)), *fields.values()))
        listed = _array(_Operation, len(operations))(*operations)
        per_register = torch.tensor(units).T.contiguous()
        self._kept += [listed, per_register]
        return _Blueprint(
            table.size,
            len(operations),
            blueprint.reads_source,
            ctypes.addressof(listed),
            _address(per_register, torch.int64),
            _address(table.count),
        )

    def _structure(self, p: PopulationState) -> tuple[_Population, list[Any]]:
        """A population as it stands, and what must live as long."""
        for kind, program in enumerate(self._programs):
            program.theta, program.average, program.square = (
                _address(state[kind]) for state in (p.seed_theta, p.seed_exp_avg, p.seed_exp_avg_sq)
            )
        programs = _array(_Blueprint, len(self._programs))(*self._programs)
        at, rates = p.activations(), learning_rates(p)
        gain = p.gain()
        gain = None if gain is None else gain.squeeze(2).contiguous()
        floats = [rates, at.low, at.high, at.leak, at.shift, at.units]
        floats = [value.contiguous() for value in floats]
        host = p.spec
        structure = _Population(
            host.inputs,
            host.classes,
            host.width,
            host.stages,
            host.site.tokens,
            host.per_token,
            host.causal,
            p.table.size,
            _address(self._place, torch.int64),
            ctypes.addressof(self._tables),
            ctypes.addressof(programs),
            *(_address(value) for value in (p.theta, p.exp_avg, p.exp_avg_sq)),
            *(_address(value, torch.int64) for value in (p.context.width, p.context.depth, p.steps, p.seed_steps)),
            *(_address(value) for value in (*floats, gain)),
        )
        return structure, [programs, floats, gain]

    def train(self, p: PopulationState, index: Tensor, labels: Tensor) -> Trained:
        """One epoch of all hosts of a population on the minibatches `index` [N, steps, batch] of the training split,
        with `labels` [N, steps, batch] or [N, steps, batch, tokens]; parameters, moments and step counters are brought
        up to date."""
        t = p.training
        stage, hosts, slots = p.lifecycle.stage, p.hosts, p.slots
        kinds = p.lifecycle.blueprint.masked_fill(~is_live(stage), -1)
        alone = stage == Stage.TRAINING
        everyone, alpha = torch.arange(hosts), p.lifecycle.alpha.contiguous()
        result = Trained(
            torch.empty(hosts),
            torch.empty(hosts, 4, p.spec.layers),
            *(torch.empty(hosts, slots) for _ in range(3)),
        )
        rows = _Rows(
            _address(everyone, torch.int64),
            _address(kinds, torch.int64),
            _address(alpha),
            _address(alone, torch.bool),
        )
        work = _Training(
            _address(p.data.train_x),
            _address(index := index.contiguous(), torch.int64),
            _address(labels := labels.contiguous(), torch.int64),
            t.steps_per_epoch,
            t.batch_size,
            t.beta1,
            t.beta2,
            t.epsilon,
            *(_address(value) for value in result),
        )
        structure, kept = self._structure(p)
        call(self._train, [((structure, rows, work), part) for part in parts(hosts)])
        del kept
        p.steps += t.steps_per_epoch
        p.seed_steps += t.steps_per_epoch * (kinds >= 0)
        return result

    def evaluate(
        self,
        p: PopulationState,
        hosts: Tensor,
        alpha: Tensor,
        x: Tensor,
        y: Tensor,
        measured: int = 0,
        ablated: int = 0,
        logits: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of the hosts `hosts` [M] of a population, repeats allowed, with `alpha` [M, slots], on x [n, tokens, inputs]
        with labels y [n] or [n, tokens].

        The last `ablated` rows see the first SAMPLES only and are not measured.

        Returns:
            the loss of each label [M, labels], 0 where it was not asked for; logits [M, labels, classes] if wanted; the
            activations' statistics [M - ablated, slots, ACTIVATION_STATISTICS] on the first `measured` samples, if
            there are any.
        """
        kinds = p.lifecycle.blueprint[hosts].masked_fill(alpha == 0, -1)
        y = y.flatten().contiguous()
        loss = torch.zeros(len(hosts), len(y))
        scores = torch.empty(len(hosts), len(y), p.spec.classes) if logits else None
        measured, full = min(measured, len(x)), len(hosts) - ablated
        activations = torch.empty(full, p.slots, len(ACTIVATION_STATISTICS)) if measured else None
        rows = _Rows(
            _address(hosts := hosts.contiguous(), torch.int64),
            _address(kinds, torch.int64),
            _address(alpha := alpha.contiguous()),
            None,
        )
        work = _Evaluation(
            _address(x := x.contiguous()),
            _address(y, torch.int64),
            len(x),
            measured,
            full,
            min(SAMPLES, len(x)),
            _address(loss),
            _address(scores),
            _address(activations),
        )
        structure, kept = self._structure(p)
        call(self._evaluate, [((structure, rows, work), part) for part in parts(len(hosts))])
        del kept
        return loss, scores, activations
