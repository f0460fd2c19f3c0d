"""The native engine against the stacked one, and what happens where it cannot run."""

import ctypes
import gc
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import weakref
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from esper.growth.blueprints import Blueprint, ParameterSpec, registry
from esper.growth.blueprints.operations import Attend, Convolve, Gate, Linear, Normalise, Relu
from esper.growth.lifecycle import Stage
from esper.growth.native import engine
from esper.growth.population import Population, _warn_once
from esper.growth.state import PopulationState
from esper.growth.statistics import Statistics
from esper.runtime import native as build
from esper.runtime.errors import ConfigError

from .conftest import Stacked, Toy

KEYS = [11, 12, 13, 14, 15, 16]
TASKS = ["mlp", "grid", "sequence", "causal", "gathered"]


class Native(Toy):
    engine = "native"  # not auto, which would compare the stacked engine with itself where there is no compiler


pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++")),
    reason="needs a C++ compiler",
)


def error(got, expected, least=1e-5):
    """The largest difference as a share of the largest value, which is taken to be `least` or more."""
    assert torch.equal(got.isnan(), expected.isnan())
    got, expected = got.nan_to_num(), expected.nan_to_num()
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=least))


# ---- walks --------------------------------------------------------------------------------------------------------


# Batches and splits leave parts of tiles of 32 samples; of 150, contributions see 128, and "grid" is measured on 85.
@pytest.mark.parametrize(("batch", "validation"), [(40, 150), (8, 40), (7, 20)])
@pytest.mark.parametrize("task", TASKS)
def test_every_epoch_of_a_random_walk_is_that_of_the_stacked_engine(task, batch, validation):
    data = Toy.data(task, validation=validation)
    native, stacked = (
        toy.population(KEYS, task, data=data, mixed=True, width=7, steps=3, batch=batch) for toy in (Native, Stacked)
    )
    told = set()
    for _ in range(8):
        Native.act(native, KEYS, task)
        # From the same state, so that what is compared is one epoch's rounding.
        stacked.load_state_dict(native.state_dict())
        native.train_epoch()
        stacked.train_epoch()
        ours, theirs = (Toy.leaves(p.state_dict()) for p in (native, stacked))
        for name, value in ours.items():
            if not value.is_floating_point():
                assert torch.equal(value, theirs[name]), name
            elif name.startswith("/statistics") or name == "/validation_loss":
                torch.testing.assert_close(value, theirs[name], rtol=5e-5, atol=5e-6, equal_nan=True, msg=name)
            else:
                # Parameters and moments; Adam blows up the rounding of gradients near 0.
                limit = 1e-4 if "theta" in name else 2e-5
                assert max(map(error, value, theirs[name])) < limit, name
            told |= {name} if value.any() else set()
        rows = torch.tensor([4, 0, 5])
        for split in ("validation", "test"):
            assert torch.equal(native.accuracy(rows, split), stacked.accuracy(rows, split))
    floating = {
        f"/statistics/{f.name}" for f in fields(Statistics) if ours[f"/statistics/{f.name}"].is_floating_point()
    }
    assert floating <= told


def test_ablated_rows_see_the_first_samples_only(toy):
    p = toy.population(KEYS[:2], data=toy.data(validation=150))
    losses, asked, activations = p._validate(torch.tensor([0, 1, 0]), torch.zeros(3, 3), ablated=1, measured=True)
    assert torch.equal(losses[2, :128], losses[0, :128])
    assert losses[:2].all()
    assert not losses[2, 128:].any()
    assert asked.all()
    assert activations.shape[:2] == (2, 3)


def walked(keys, task="causal", epochs=6):
    p = Native.population(keys, task, mixed=True, width=6, batch=40, data=Toy.data(task, validation=150))
    Native.walk(p, keys, epochs)
    return p.state_dict()


@pytest.fixture(scope="module")
def on_one_thread():
    assert torch.get_num_threads() == 1
    return walked(KEYS)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_do_not_change_a_bit(on_one_thread, monkeypatch, threads):
    used, pool = set(), build._pool
    monkeypatch.setattr(build, "_pool", lambda count: used.add(count) or pool(count))
    torch.set_num_threads(threads)
    try:
        state = walked(KEYS)
    finally:
        torch.set_num_threads(1)
    assert Toy.differences(state, on_one_thread) == []
    assert min(threads, len(KEYS)) in used


@pytest.mark.parametrize("keys", [[13], [16, 14, 11], [*KEYS[::-1], 31, 32, 33]], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_host_is_bitwise_the_same_in_any_population(on_one_thread, keys, threads):
    torch.set_num_threads(threads)
    try:
        state = walked(keys)
    finally:
        torch.set_num_threads(1)
    for row, key in enumerate(keys):
        if key in KEYS:
            assert Toy.differences(state, on_one_thread, (row, KEYS.index(key))) == []


# ---- divergence ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 2, 4])  # stem, stage, head
@pytest.mark.parametrize("task", ["mlp", "grid", "causal"])
def test_a_host_that_diverges_stays_so_and_alone(toy, task, layer):
    clean, diverged = (toy.population(KEYS[:3], task) for _ in range(2))
    diverged.theta[1, diverged.layer == layer] = float("nan")
    for p in (clean, diverged):
        for host in range(3):
            toy.hold(p, host, 1, "glu")
        for _ in range(2):
            p.train_epoch()
            assert p.validation_loss.isnan().tolist() == [False, p is diverged, False]
            assert p.statistics.train_loss.isnan().tolist() == [False, p is diverged, False]
    assert diverged.theta[1, diverged.layer == layer].isnan().all()
    for host in (0, 2):
        assert toy.differences(diverged.state_dict(), clean.state_dict(), (host, host)) == []


@pytest.mark.parametrize("task", ["mlp", "grid", "causal"])
def test_no_operation_hides_that_a_seed_has_diverged(toy, task):
    for name in toy.fitting(task):
        kind, p = toy.kind(name), toy.population(KEYS[:1], task, steps=1)
        toy.hold(p, 0, 1, name)
        start = p.seed_theta[kind].clone()
        for number, view in enumerate(p.seed_tables[kind].views(p.seed_theta[kind].flatten(0, 1))):
            p.seed_theta[kind].copy_(start)
            view.fill_(float("nan"))
            p._evaluate(torch.arange(1))
            assert p.validation_loss.isnan().all(), (name, number)
            fork = p.fork(torch.arange(1), measured=True)
            fork.train_epoch()
            assert fork.statistics.train_loss.isnan().all(), (name, number)


# ---- programs -----------------------------------------------------------------------------------------------------


def made(name, program, shapes, reads_source=False):
    """Registers a blueprint of `program`, with a shape of kinds of units for each parameter."""

    class Made(Blueprint):
        mixes_tokens = any(isinstance(operation, Convolve | Attend) for operation in program)

        def parameters(self, site):
            known = {
                "width": site.width,
                "double": 2 * site.width,
                "taps": 3 ** len(site.grid),
                "distances": 2 * site.tokens - 1,
            }
            return {k: ParameterSpec(tuple(known.get(kind, kind) for kind in shape)) for k, shape in shapes.items()}

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
    """A random valid program in which everything has a part in the result, and the shapes of its parameters; those are
    in "width" and "double", the units of a host and twice as many, "taps" and "distances"."""
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

    choices = ["linear", "linear", "relu", "gate", "normalise", *["convolve", "attend"] * mixes]
    for _ in range(dice.randint(1, 9)):
        choice = dice.choice(choices)
        match choice:
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
    shapes = {key: shape for key, shape in shapes.items() if key in named}
    return (program, shapes) if shapes else random_program(dice, mixes)


@pytest.fixture
def blueprints(monkeypatch):
    """What a test registers is forgotten after it."""
    registry.available()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


WIDTHS = (9, 7, 6, 3)  # of hosts; blocks of 4 units and of less, and 18 in a hidden layer


def grown(toy, task, names, seed, stages=(Stage.TRAINING, Stage.BLENDING, Stage.HOLDING)):
    """Four hosts with scattered seeds of `names` in every slot, each in one of `stages`."""
    data, dice = toy.data(task, train=80, validation=40), random.Random(seed)
    spec = replace(toy.spec(task, data, width=WIDTHS[0], steps=1, batch=40), catalogue=names)
    p, context = Population(spec, len(WIDTHS)), toy.context(KEYS[: len(WIDTHS)], WIDTHS[0])
    context.width[:] = torch.tensor(WIDTHS)
    p.reset(torch.arange(len(WIDTHS)), context)
    for host in range(p.hosts):
        for slot in range(p.slots):
            kind = dice.randrange(len(names))
            toy.plant(p, host, slot, kind)
            toy.scatter(p, host, slot, kind)
            stage = p.lifecycle.stage[host, slot] = dice.choice(stages)
            ramp, epochs, alpha = {Stage.BLENDING: (5, 1, 0.2), Stage.HOLDING: (1, 0, 1.0)}.get(int(stage), (1, 0, 0.0))
            for field, value in (("ramp", ramp), ("epochs", epochs), ("alpha", alpha)):
                getattr(p.lifecycle, field)[host, slot] = value
    return p


def assert_agree(task, names, seed=0):
    """Logits, and gradients of hosts and seeds, which after one step of Adam are its first moments."""
    native, stacked = (grown(toy, task, names, seed) for toy in (Native, Stacked))
    rows, x, y = torch.arange(native.hosts), native.data.validation_x, native.data.validation_y
    logits = native.native.evaluate(native, rows, native.lifecycle.alpha, x, y, logits=True)[1]
    with torch.no_grad():
        expected = stacked._logits(rows, stacked.lifecycle.alpha, x)[0]
    native.train_epoch()
    stacked.train_epoch()
    reached = 0
    for host in range(native.hosts):
        # Deep programs amplify rounding, and compilers round differently; a wrong term is off by far more.
        assert error(logits[host], expected[host]) < 1e-4
        assert error(native.exp_avg[host], stacked.exp_avg[host]) < 1e-3
        for slot in range(native.slots):
            kind = int(native.lifecycle.blueprint[host, slot])
            ours, theirs = (p.seed_exp_avg[kind][host, slot] for p in (native, stacked))
            assert error(ours, theirs) < 1e-3, native.catalogue[kind].program
            reached += bool(theirs.any())
    assert reached > 8  # of 12 seeds: some may be dead behind a Relu


def draw(task, seed):
    """Four programs, as the arguments of `made`."""
    dice = random.Random(f"{task} {seed}")
    return [(*random_program(dice, task != "mlp"), dice.random() < 0.5) for _ in range(4)]


def test_random_programs_have_all_there_is():
    drawn = [program for task in TASKS for seed in SEEDS for program in draw(task, seed)]
    programs = [program for program, _, _ in drawn]
    kinds = {Linear, Convolve, Relu, Gate, Normalise, Attend}
    for reads_what in (lambda operation: 0 in sources(operation), lambda operation: 0 not in sources(operation)):
        assert {type(operation) for program in programs for operation in program if reads_what(operation)} == kinds
    reads = [[register for operation in program for register in sources(operation)] for program in programs]
    assert max(read.count(register) for read in reads for register in range(1, 5)) > 2
    assert {len(program) for program in programs} >= {1, 2, 3, 4, 5, 6, 7}
    assert {reads_source for _, _, reads_source in drawn} == {True, False}


SEEDS = range(8)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("task", TASKS)
def test_random_programs_are_those_of_the_stacked_engine(blueprints, task, seed):
    names = []
    for number, (program, shapes, reads_source) in enumerate(draw(task, seed)):
        made(f"made{number}", program, shapes, reads_source)
        names.append(f"made{number}")
    assert_agree(task, tuple(names), seed)


SQUARE, BIAS = ("width", "width"), (1, "width")
EVERY_KIND = [
    Linear(0, "in", "a"),
    Relu(1),
    Gate(1, 2),
    Normalise(3, "gain", "b"),
    Linear(4, "out"),
]  # fmt: skip
PROGRAMS = {
    "every kind": (EVERY_KIND, {"in": SQUARE, "a": BIAS, "gain": BIAS, "b": BIAS, "out": SQUARE}),
    "a register twice": ([Linear(0, "w"), Gate(1, 1), Gate(0, 2), Linear(3, "v")], {"w": SQUARE, "v": SQUARE}),
    "wide and narrow": (
        [Linear(0, "in", "a"), Linear(1, "mid"), Relu(2), Linear(3, "out", "b")],
        {"in": ("width", "double"), "a": (1, "double"), "mid": ("double", 3), "out": (3, "width"), "b": BIAS},
    ),
    "the longest": ([Linear(0, "w"), *(Gate(i, 0) for i in range(1, 15))], {"w": SQUARE}),
    "every kind on tokens": (
        [
            Convolve(0, "k", "a", 2),
            Relu(1),
            Attend(0, 2, 0, "p"),
            Gate(3, 1),
            Normalise(4, "gain", "b"),
            Linear(5, "w"),
        ],
        {"k": ("taps", *SQUARE), "a": BIAS, "p": (1, "distances"), "gain": BIAS, "b": BIAS, "w": SQUARE},
    ),
    "attention to itself": ([Attend(0, 0, 0, "p")], {"p": (1, "distances")}),
}


def fitting(name, task):
    return task != "mlp" or not any(isinstance(operation, Convolve | Attend) for operation in PROGRAMS[name][0])


@pytest.mark.parametrize("reads_source", [False, True])
@pytest.mark.parametrize(
    ("name", "task"), [(n, t) for n in PROGRAMS for t in ("mlp", "grid", "causal") if fitting(n, t)]
)
def test_programs_that_no_blueprint_has(blueprints, name, task, reads_source):
    made("made", *PROGRAMS[name], reads_source)
    assert_agree(task, ("made",))


@pytest.mark.parametrize(
    ("task", "program", "shapes"),
    [
        (
            "mlp",
            [Normalise(0, "g", "b"), Linear(1, "w"), Normalise(2, "h", "c")],
            {"g": BIAS, "b": BIAS, "w": SQUARE, "h": BIAS, "c": BIAS},
        ),
        (
            "causal",
            [Attend(0, 0, 0, "p"), Linear(1, "w"), Attend(2, 2, 2, "q")],
            {"p": (1, "distances"), "w": SQUARE, "q": (1, "distances")},
        ),
    ],
    ids=["normalise", "attend"],
)
def test_a_program_may_do_the_same_twice(blueprints, task, program, shapes):
    made("made", program, shapes)
    assert_agree(task, ("made",))


@pytest.mark.parametrize("task", ["mlp", "grid", "causal"])
def test_nothing_of_a_seed_in_training_reaches_its_host(blueprints, task):
    """Whatever its first operations are, also if it has diverged."""
    programs = {
        "relu": ([Relu(0), Linear(1, "w")], {"w": SQUARE}),
        "gate": ([Gate(0, 0), Linear(1, "w")], {"w": SQUARE}),
        **{n: PROGRAMS[n] for n in PROGRAMS if fitting(n, task)},
    }
    for number, (program, shapes) in enumerate(programs.values()):
        made(f"made{number}", program, shapes, number % 2 == 1)
    names = tuple(f"made{number}" for number in range(len(programs)))
    p, diverged, bare = (grown(Native, task, names, 5, (Stage.TRAINING,)) for _ in range(3))
    for theta in diverged.seed_theta:
        theta.fill_(float("nan"))
    bare.lifecycle.reset(torch.arange(bare.hosts))
    for each in (p, diverged, bare):
        each.train_epoch()
    for other in (diverged, bare):
        for name in ("theta", "exp_avg", "exp_avg_sq", "validation_loss"):
            assert torch.equal(getattr(p, name), getattr(other, name))
    planted = torch.stack([moment.any(2) for moment in p.seed_exp_avg])
    assert planted.any(0).float().mean() > 0.8  # they learn


# ---- where it cannot run ------------------------------------------------------------------------------------------


@pytest.fixture
def warnings(caplog):
    """Of the population; what it has said in other tests is forgotten."""
    _warn_once.cache_clear()
    caplog.set_level(logging.WARNING, "esper.growth.population")
    yield lambda: [record.getMessage() for record in caplog.records if record.name == "esper.growth.population"]
    _warn_once.cache_clear()


class Scale(Blueprint):
    """A blueprint that is no program."""

    def parameters(self, site):
        return {"gain": ParameterSpec((1, site.width), init="ones")}

    def delta(self, p, x, units, site):
        return p["gain"] * x - x

    def flops(self, site):
        return site.width


def holder(toy, name):
    """A host that holds a seed of `name`, after an epoch."""
    spec = replace(toy.spec(), catalogue=("mlp", name))
    p = Population(spec, 2)
    p.reset(torch.arange(2), toy.context(KEYS[:2]))
    toy.hold(p, 0, 1, 1)
    p.train_epoch()
    return p


def test_a_blueprint_without_a_program_leaves_hosts_to_the_stacked_engine(blueprints, warnings):
    registry.register("scale")(Scale)
    reason = "blueprint 'scale' has no program of 1 to 15 operations"
    with pytest.raises(ConfigError, match=rf"^env\.engine=native: {reason}; use auto or stacked$"):
        holder(Native, "scale")
    stacked = holder(Stacked, "scale")
    assert warnings() == []
    auto = holder(Toy, "scale")
    fork = auto.fork(torch.tensor([0, 0]))
    holder(Toy, "scale")
    assert auto.native is fork.native is stacked.native is None
    assert Toy.differences(auto.state_dict(), stacked.state_dict()) == []
    assert (auto.seed_theta[1][0, 1] != 1).all()
    (said,) = warnings()
    assert said.endswith(reason)
    assert "stacked engine" in said


def test_a_program_has_up_to_15_operations(blueprints, warnings):
    for length in (15, 16):
        made(f"made{length}", [Linear(0, "w"), *(Relu(i) for i in range(1, length))], {"w": SQUARE})
    assert holder(Native, "made15").native
    assert holder(Toy, "made15").native
    assert warnings() == []
    with pytest.raises(ConfigError, match="'made16' has no program of 1 to 15 operations"):
        holder(Native, "made16")
    assert holder(Toy, "made16").native is None
    assert len(warnings()) == 1


def test_another_device_is_left_to_the_stacked_engine_without_a_word(monkeypatch, warnings):
    start = PopulationState.__init__

    def elsewhere(self, *arguments):
        start(self, *arguments)
        self.device = torch.device("cuda")  # as it says; its tensors are here

    monkeypatch.setattr(PopulationState, "__init__", elsewhere)
    assert Population(Toy.spec(), 1).native is None
    assert warnings() == []
    with pytest.raises(ConfigError, match=r"^env\.engine=native: it runs on CPUs only, not on cuda; use auto or"):
        Population(Native.spec(), 1)


def test_the_kernel_is_given_nothing_that_it_would_read_wrongly():
    x = torch.arange(12.0).view(3, 4)
    assert engine._address(None) is None
    assert engine._address(x) == x.data_ptr()
    assert engine._address(x[1:]) == x.data_ptr() + 16
    assert engine._address(x.long(), torch.int64)
    for value, dtype in (
        (x.T, torch.float32),
        (x[:, 1:], torch.float32),
        (x.expand(2, 3, 4), torch.float32),
        (x.double(), torch.float32),
        (x.int(), torch.int64),
        (x, torch.int64),
        (x.long(), torch.bool),
        (x.to("meta"), torch.float32),
    ):
        with pytest.raises(ValueError, match=f"a contiguous {dtype} on the CPU, not {value.dtype} of strides"):
            engine._address(value, dtype)


# ---- compiling ----------------------------------------------------------------------------------------------------

FOLDER = engine.KERNEL_FOLDER


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """An empty folder where libraries are kept; what is loaded in it is forgotten after the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    build.library.cache_clear()
    yield tmp_path / "cache" / "esper"
    build.library.cache_clear()


@pytest.fixture(scope="module")
def compiled():
    """The library of the present sources."""
    found = build.library(FOLDER)
    assert isinstance(found, ctypes.CDLL), found
    return found._name


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Makes CXX a shell script that finds its output in $out."""

    def make(script, name="compiler"):
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\nwhile [ $# -gt 1 ]; do [ "$1" = -o ] && out=$2; shift; done\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))

    return make


@pytest.fixture
def copier(compiled, compiler, tmp_path):
    """A compiler that copies the library; returns where it was told to write it, each time."""
    compiler(f'echo "$out" >> {tmp_path}/log; cp {compiled} "$out"')
    return lambda: (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []


def test_the_sources_are_compiled_from_scratch(kept):
    found = build.library(FOLDER)
    assert isinstance(found, ctypes.CDLL), found
    assert found.esper_train
    assert found.esper_evaluate
    assert [str(path) for path in kept.iterdir()] == [found._name]
    assert Toy.population(KEYS[:1]).native


def test_a_library_is_compiled_once(kept, copier):
    names = []
    for _ in range(3):
        build.library.cache_clear()
        names.append(build.library(FOLDER)._name)
        assert len(copier()) == 1
    assert [Path(name) for name in names] == [*kept.iterdir()] * 3


def test_a_library_is_that_of_its_sources_flags_compiler_and_processor(kept, copier, compiler, tmp_path, monkeypatch):
    shutil.copytree(FOLDER, here := tmp_path / "growth" / "native")
    shutil.copytree(build.SHARED, shared := tmp_path / "shared")
    first = build._compiled(FOLDER)
    monkeypatch.setattr(build, "SHARED", shared)
    assert build._compiled(here) == first  # wherever they lie
    assert len(copier()) == 1
    found = [first]
    assert {path.name for path in build._sources(here)} == {"kernel.cpp", "host.h", "seed.h", "tile.h"}
    for path in build._sources(here):
        with path.open("a") as file:
            file.write("// changed\n")
        found.append(build._compiled(here))
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-g"))
    found.append(build._compiled(here))
    monkeypatch.setattr(build, "_processor", lambda: "another")
    found.append(build._compiled(here))
    assert len(copier()) == len(set(found)) == 7
    shutil.copy(os.environ["CXX"], tmp_path / "other")
    monkeypatch.setenv("CXX", str(tmp_path / "other"))
    found.append(build._compiled(here))
    assert len(set(found)) == 8
    assert sorted(kept.iterdir()) == sorted(found)


def test_without_a_compiler_hosts_are_left_to_the_stacked_engine(kept, warnings, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    reason = r"there is no C\+\+ compiler"
    with pytest.raises(ConfigError, match=rf"^env\.engine=native: {reason} .*; use auto or stacked$"):
        Native.population(KEYS[:1])
    p = Toy.population(KEYS[:2])
    p.train_epoch()
    assert p.native is None
    assert p.theta.isfinite().all()
    (said,) = warnings()
    assert "there is no C++ compiler" in said


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'kernel.cpp:7: what is this' >&2; exit 1", "fails: .*kernel.cpp:7: what is this"),
        ("exit 3", "fails: 3"),
        ('echo "no library" > "$out"', "growth-.*so: "),
    ],
    ids=["message", "silent", "not a library"],
)
def test_a_compiler_that_fails_says_why(kept, compiler, warnings, script, reason):
    compiler(script)
    with pytest.raises(ConfigError, match=reason):
        Native.population(KEYS[:1])
    assert Toy.population(KEYS[:1]).native is None
    assert len(warnings()) == 1
    assert [path for path in kept.iterdir() if not path.name.startswith("growth-")] == []


def test_libraries_are_kept_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build._folder() == tmp_path / ".cache" / "esper"
    assert build._folder().is_dir()


@pytest.mark.parametrize("how", ["a file in its place", "no permission"])
def test_a_cache_that_cannot_be_written_is_replaced(kept, copier, tmp_path, monkeypatch, how):
    if how == "no permission":  # which root has always
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != kept and access(path, mode))
    else:
        (tmp_path / "cache").write_text("")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    found = build.library(FOLDER)
    assert isinstance(found, ctypes.CDLL), found
    assert Path(found._name).parent.parent == tmp_path / "temporary"
    assert not kept.exists() or not any(kept.iterdir())


def test_two_processes_may_compile_at_once(kept, copier, compiler, compiled, tmp_path):
    log = tmp_path / "log"
    # Neither is done before both have begun.
    wait = f"until [ $(wc -l < {log}) -ge 2 ]; do sleep 0.01; done"
    compiler(f'echo "$out" >> {log}; {wait}; cp {compiled} "$out"; ls -i "$out" >> {tmp_path}/files')
    code = (
        "import ctypes, importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('build', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.library(module.Path(sys.argv[2]))._name)\n"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, build.__file__, str(FOLDER)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=60)[0].strip() for process in started]
    (library,) = kept.iterdir()
    assert said == [str(library)] * 2
    # Each writes a file of its own, one of which becomes the library, which thus is never seen half written.
    assert len({*copier(), str(library)}) == 3
    assert {Path(name).parent for name in copier()} == {kept}
    assert str(library.stat().st_ino) in (tmp_path / "files").read_text().split()
    assert library.read_bytes() == Path(compiled).read_bytes()


def test_a_population_ends_without_the_garbage_collector(toy):
    p = toy.population([1, 2])
    p.train_epoch()
    last = weakref.ref(p)
    gc.disable()
    try:
        del p
        assert last() is None
    finally:
        gc.enable()
