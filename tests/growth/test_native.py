"""The native engine against the stacked one, and what happens where it cannot run."""

import ctypes
import logging
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from esper.growth.blueprints import Blueprint, ParameterSpec, registry
from esper.growth.blueprints.operations import Attend, Convolve, Gate, Linear, Normalise, Relu
from esper.growth.lifecycle import Stage
from esper.growth.native import build, engine
from esper.growth.population import Population, _warn_once
from esper.growth.state import PopulationSpec
from esper.runtime.errors import ConfigError

from .conftest import Stacked, Toy

KEYS = [11, 12, 13, 14, 15, 16, 17, 18]
TASKS = ["mlp", "grid", "sequence", "causal", "gathered"]
GRADIENT = 10.0  # Adam's first moment after one step is (1 - 0.9) * gradient


class Native(Toy):
    engine = "native"


# ---- programs -----------------------------------------------------------------------------------------------------


def sized(kind, width):
    """Units of a register: those of the host, twice as many, or some number for hosts of all widths."""
    return {"width": width, "double": 2 * width}.get(kind, kind)


def made(name, program, shapes, reads_source=False):
    """Registers a blueprint of `program`, with a shape of kinds of units for each parameter."""

    class Made(Blueprint):
        mixes_tokens = any(isinstance(operation, Convolve | Attend) for operation in program)

        def parameters(self, site):
            taps = {1: 1, 2: 3, 3: 9}[1 + len(site.grid) if site.tokens > 1 else 1]
            known = {"taps": taps, "distances": 2 * site.tokens - 1}
            return {
                key: ParameterSpec(tuple(known.get(kind, None) or sized(kind, site.width) for kind in shape))
                for key, shape in shapes.items()
            }

        def flops(self, site):
            return 1

    Made.program, Made.reads_source = tuple(program), reads_source
    registry.register(name)(Made)


def renumbered(operation, places):
    fields = {k: places[v] for k, v in vars(operation).items() if isinstance(v, int) and k != "dilation"}
    return replace(operation, **fields)


def sources(operation):
    return [v for k, v in vars(operation).items() if isinstance(v, int) and k != "dilation"]


def random_program(dice, mixes):
    """A random valid program in which everything has a part in the result, and the shapes of its parameters."""
    units, program, shapes = ["width"], [], {}

    def parameter(*shape):
        shapes[f"p{len(shapes)}"] = shape
        return f"p{len(shapes) - 1}"

    def add(operation, kind):
        program.append(operation)
        units.append(kind)

    def register(kind=None):
        """Most often a late one."""
        fitting = [i for i, known in enumerate(units) if kind in (None, known)]
        return dice.choice(fitting[-2:] if dice.random() < 0.6 else fitting)

    for _ in range(dice.randint(1, 9)):
        match dice.choice(("linear", "linear", "relu", "gate", "normalise", *("convolve", "attend") * mixes)):
            case "linear":
                source, to = register(), dice.choice(("width", "double", 3))
                bias = parameter(1, to) if dice.random() < 0.7 else None
                add(Linear(source, parameter(units[source], to), bias), to)
            case "convolve":
                source, to = register(), dice.choice(("width", "double", 3))
                weight, bias = parameter("taps", units[source], to), parameter(1, to)
                add(Convolve(source, weight, bias, dice.choice((1, 2))), to)
            case "relu":
                source = register()
                add(Relu(source), units[source])
            case "gate":
                value = register()
                add(Gate(value, register(units[value])), units[value])
            case "normalise":
                add(Normalise(register("width"), parameter(1, "width"), parameter(1, "width")), "width")
            case "attend":
                chosen = (register("width") for _ in range(3))
                add(Attend(*chosen, parameter(1, "distances")), "width")
    if units[-1] != "width":
        add(Linear(len(program), parameter(units[-1], "width")), "width")
    # What has no part in the result is taken out.
    needed = {len(program)}
    for number in range(len(program), 0, -1):
        if number in needed:
            needed |= set(sources(program[number - 1]))
    kept = [number for number in range(1, len(program) + 1) if number in needed]
    places = {0: 0} | {number: place for place, number in enumerate(kept, 1)}
    program = [renumbered(program[number - 1], places) for number in kept]
    named = {v for operation in program for v in vars(operation).values() if isinstance(v, str)}
    return program, {key: shape for key, shape in shapes.items() if key in named}
