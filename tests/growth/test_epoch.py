"""An epoch of training against plain torch."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esper.growth.conditions import Condition
from esper.growth.epoch import EpochRun
from esper.growth.lifecycle import Stage

KEYS = [11, 12, 13, 14, 15, 16, 17, 18]
TASKS = ["mlp", "grid", "sequence", "causal", "gathered"]
GRADIENT = 10.0  # Adam's first moment after one step is (1 - 0.9) * gradient


def close(a, b, rtol=1e-4, atol=2e-6):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# ---- hosts --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """An ungrown host in the modules of torch.nn."""

    def __init__(self, spec, flat):
        super().__init__()
        self.spec, self.tokens = spec, torch.Size(spec.grid).numel()
        w = spec.width
        self.stem, self.head = nn.Linear(spec.inputs, w), nn.Linear(w, spec.classes)
        make = {1: lambda: nn.Conv1d(w, w, 3, padding=1), 2: lambda: nn.Conv2d(w, w, 3, padding=1)}[len(spec.grid)]
        if spec.causal:
            make = lambda: nn.Sequential(nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(w, w, 3))  # noqa: E731
        if self.tokens == 1:
            make = lambda: nn.Linear(w, w)  # noqa: E731
        self.stages = nn.ModuleList([make() for _ in range(spec.stages)])
        at = 0
        with torch.no_grad():
            for p in self.parameters_in_order():
                value = flat[at : at + p.numel()]
                at += p.numel()
                if p.ndim == 1:
                    p.copy_(value)
                elif p.ndim == 2:
                    p.copy_(value.view(p.shape[1], p.shape[0]).T)
                else:  # [out, in, *taps] from [taps, in, out]
                    taps = p.shape[2:]
                    p.copy_(value.view(taps.numel(), p.shape[1], p.shape[0]).permute(2, 1, 0).reshape(p.shape))
        assert at == len(flat)

    def parameters_in_order(self):
        return [p for part in (self.stem, self.stages, self.head) for p in part.parameters()]

    def forward(self, x):
        h = self.stem(x).relu()
        for stage in self.stages:
            if self.tokens == 1:
                h = stage(h).relu()
            else:
                h = stage(h.transpose(1, 2).unflatten(2, self.spec.grid)).flatten(2).transpose(1, 2).relu()
        return self.head(h.flatten(0, 1) if self.spec.per_token else h.mean(1))

    def flat(self):
        values = []
        for p in self.parameters_in_order():
            p = p.detach()
            values.append(p if p.ndim == 1 else p.T if p.ndim == 2 else p.flatten(2).permute(2, 1, 0))
        return torch.cat([v.flatten() for v in values])


@pytest.mark.parametrize("task", TASKS)
def test_ungrown_hosts_are_modules_under_torch_optim_adam(toy, task):
    p = toy.population(KEYS[:3], task, width=5)
    nets = [Net(p.spec, p.theta[k]) for k in range(3)]
    optimisers = [
        torch.optim.Adam(net.parameters(), lr=float(p.context.learning_rate[k])) for k, net in enumerate(nets)
    ]
    for _ in range(3):
        order, losses = p._epoch_order(), torch.zeros(3)
        for k, (net, optimiser) in enumerate(zip(nets, optimisers, strict=True)):
            for batch in order[k]:
                loss = F.cross_entropy(net(p.data.train_x[p.subset[k][batch]]), p.labels[k][batch].flatten())
                optimiser.zero_grad()
                loss.backward()
                toy.SlowHost.advance(optimiser)
                losses[k] += loss.detach() / len(order[k])
        p.train_epoch()
        close(p.statistics.train_loss, losses, rtol=1e-4)
    for k, net in enumerate(nets):
        close(p.theta[k], net.flat(), atol=5e-5)
        with torch.no_grad():
            close(p.validation_loss[k], F.cross_entropy(net(p.data.validation_x), p.data.validation_y.flatten()))


@pytest.mark.parametrize("task", TASKS)
def test_hosts_that_differ_in_everything_are_those_of_a_loop_over_hosts(toy, task):
    """Width, depth, conditions, strikes, shifts and seeds of every blueprint in every stage."""
    p = toy.population(KEYS, task, mixed=True, width=6)
    slow = [toy.SlowHost(p, k) for k in range(8)]
    for _ in range(6):
        toy.act(p, KEYS)
        alphas = [one.alphas(ahead=1) for one in slow]
        for one in slow:
            one.epoch()
        p.train_epoch()
        for host, one in enumerate(slow):
            close(p.lifecycle.alpha[host], torch.tensor(alphas[host]))
            # Adam blows up the rounding of gradients near 0, but a wrong step would show in the third decimal.
            close(p.theta[host], one.flat(), atol=2e-4)
            for slot, seed in one.seeds.items():
                kind = int(p.lifecycle.blueprint[host, slot])
                close(p.seed_theta[kind][host, slot], one.flat_seed(seed), atol=2e-4)
            close(float(p.statistics.train_loss[host]), one.loss, rtol=1e-4, atol=1e-5)
            close(float(p.validation_loss[host]), one.validation_loss(alphas[host]), rtol=1e-4, atol=1e-5)


def moment(optimiser, name):
    return lambda w: optimiser.state[w][name]


@pytest.mark.parametrize("task", ["mlp", "grid"])
def test_moments_and_steps_are_those_of_adam(toy, task):
    p = toy.population([11], task, steps=3)
    toy.hold(p, 0, 1, "mlp")
    one = toy.SlowHost(p, 0)
    for epoch in range(2):
        if epoch:  # a seed whose count of steps is behind that of its host
            toy.plant(p, 0, 2, "glu")
        one.epoch()
        p.train_epoch()
    assert (p.steps.tolist(), p.seed_steps.tolist()) == ([6], [[0, 6, 3]])
    for name in ("exp_avg", "exp_avg_sq"):
        close(getattr(p, name)[0], one.flat(moment(one.optimiser, name)), atol=1e-7)
        for slot, kind in ((1, toy.kind("mlp")), (2, toy.kind("glu"))):
            expected = one.flat_seed(one.seeds[slot], moment(one.optimisers[slot], name))
            close(getattr(p, f"seed_{name}")[kind][0, slot], expected, atol=1e-7)


def test_epsilon_stands_outside_of_the_bias_correction(toy):
    spec = toy.spec(steps=2)
    spec.training.epsilon = 0.05
    p = type(toy.population([1]))(spec, 1)
    p.reset(torch.arange(1), toy.context([11]))
    theta, m, v = p.theta[0].double(), 0.0, 0.0
    rate, gradients = float(p.context.learning_rate), []
    run = EpochRun(p)
    adam = run._adam
    run._adam = lambda gradient: (gradients.append(gradient[: len(theta)].double()), adam(gradient))
    index = p.subset.gather(1, p._epoch_order().flatten(1)).view(1, 2, -1)
    for t in (1, 2):
        run.step(p.data.train_x[index[:, t - 1]], p.data.train_y[index[:, t - 1]])
        m, v = 0.9 * m + 0.1 * gradients[-1], 0.999 * v + 0.001 * gradients[-1] ** 2
        theta = theta - rate * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * m / (v.sqrt() + 0.05)
    run.finish()
    close(p.theta[0].double(), theta, rtol=1e-5, atol=1e-7)


# ---- seeds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["mlp", "grid", "causal", "gathered"])
def test_held_seeds_train_as_in_torch(toy, task):
    for name in toy.fitting(task):
        p = toy.population(KEYS[:2], task, steps=8)
        p.context.width[:] = torch.tensor([4, 3])
        p.reset(torch.arange(2), copy.deepcopy(p.context))
        for host in range(2):
            toy.hold(p, host, 1, name)
        slow = [toy.SlowHost(p, k) for k in range(2)]
        for one in slow:
            one.epoch()
        p.train_epoch()
        for k, one in enumerate(slow):
            close(p.theta[k], one.flat(), atol=5e-5)
            close(p.seed_theta[toy.kind(name)][k, 1], one.flat_seed(one.seeds[1]), atol=5e-5)
            close(float(p.validation_loss[k]), one.validation_loss([0, 1, 0]), atol=1e-5)


@pytest.mark.parametrize("task", ["mlp", "grid", "causal"])
def test_a_blended_seed_adds_alpha_times_delta_and_learns(toy, task):
    for name in toy.fitting(task):
        kind = toy.kind(name)
        p = toy.population(KEYS[:2], task, steps=1)
        toy.hold(p, 0, 1, name)
        # Back into BLENDING, with 1 of 5 epochs behind it: alpha is 2/5 in the coming epoch.
        for field, value in (("stage", Stage.BLENDING), ("ramp", 5), ("epochs", 1), ("alpha", 0.2)):
            getattr(p.lifecycle, field)[0, 1] = value
        batch = p._epoch_order()[0, 0]
        one = toy.SlowHost(p, 0)
        one.sync()
        logits, _ = one.forward(p.data.train_x[p.subset[0, batch]], [0, 0.4, 0], 0)
        F.cross_entropy(logits, p.labels[0, batch].flatten()).backward()
        p.train_epoch()
        # A bias that nothing reaches (attention's, of units beyond the first) has no gradient at all.
        close(p.seed_exp_avg[kind][0, 1] * GRADIENT, one.flat_seed(one.seeds[1], lambda w: w.grad))
        close(p.exp_avg[0] * GRADIENT, one.flat(lambda w: w.grad))
        assert p.seed_exp_avg[kind][0, 1].abs().max() > 0


def test_absent_seeds_cost_nothing_and_have_no_influence(toy):
    p, clean = toy.population(KEYS[:2]), toy.population(KEYS[:2])
    for state in (*p.seed_theta, *p.seed_exp_avg, *p.seed_exp_avg_sq):
        state.fill_(float("nan"))
    assert EpochRun(p).theta.numel() - p.theta.numel() in range(64)  # padded to whole vectors
    for each in (p, clean):
        toy.plant(each, 1, 0, "low_rank")
    # The vector that Adam runs over: two hosts and one seed of 4*2 + 2*4 parameters.
    assert EpochRun(p).theta.numel() - p.theta.numel() - 16 in range(64)
    for _ in range(3):
        p.train_epoch()
        clean.train_epoch()
    different = toy.differences(p.state_dict(), clean.state_dict())
    assert [name for name in different if not name.startswith(("/seed_theta", "/seed_exp_avg"))] == []
    assert torch.equal(p.seed_theta[2][1, 0], clean.seed_theta[2][1, 0])


def test_flops_are_charged_for_every_live_stage_and_stay_charged(toy):
    p = toy.population(KEYS[:4])
    # mlp, glu, low_rank, norm, bypass, widen at width 4
    cost = [4 * 8 + 8 * 4, 3 * 4 * 8, 4 * 2 + 2 * 4, 4 * 4, 4 * 4, 2 * 4 * 4]
    expected = [0.0] * 4
    for _ in range(12):
        toy.act(p, KEYS[:4], "flops")
        for host in range(4):
            for slot in range(3):
                stage = Stage(int(p.lifecycle.stage[host, slot]))
                if stage in (Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED):
                    expected[host] += cost[int(p.lifecycle.blueprint[host, slot])]
        p.train_epoch()
        assert p.extra_flops.tolist() == expected
    assert min(expected) > 0


# ---- the learning-rate spike --------------------------------------------------------------------------------------


def test_a_spike_lasts_one_epoch_and_reaches_the_seeds(toy):
    def walk(kind):
        context = toy.context([11])
        toy.strike(context, 0, 2, kind, epoch=2)
        p = toy.population([11], context=context, steps=1)
        toy.hold(p, 0, 0, "mlp")
        steps = []
        for _ in range(4):
            before = p.theta[0].clone(), p.seed_theta[0][0, 0].clone(), p.context.learning_rate.clone()
            run = EpochRun(p)
            p.train_epoch()
            assert torch.equal(p.context.learning_rate, before[2])
            t = p.steps.double()
            scale = float(before[2] * (1 - 0.999**t).sqrt() / (1 - 0.9**t))
            host = (before[0] - p.theta[0]) / (p.exp_avg[0] / (p.exp_avg_sq[0].sqrt() + 1e-8)) / scale
            seed = before[1] - p.seed_theta[0][0, 0]
            seed = seed / (p.seed_exp_avg[0][0, 0] / (p.seed_exp_avg_sq[0][0, 0].sqrt() + 1e-8)) / scale
            steps.append([float(host.nanmedian()), float(seed.nanmedian()), float(run.host_rate / before[2])])
        return torch.tensor(steps)

    calm = torch.ones(4, 3)
    close(walk(Condition.DYING), calm, rtol=1e-3, atol=0)
    spiked = calm.clone()
    spiked[2] = 4.0  # the epoch numbered 2 is the third
    close(walk(Condition.SATURATED), spiked, rtol=1e-3, atol=0)


def test_a_stage_that_is_saturated_from_the_start_has_no_spike(toy):
    p = toy.population([11], context=toy.condition(toy.context([11]), 0, 0, Condition.SATURATED))
    assert float(EpochRun(p).host_rate) == float(p.context.learning_rate)


# ---- on a device --------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("task", ["mlp", "grid", "causal"])
def test_an_epoch_never_waits_for_the_device(toy, task):
    spec = toy.spec(task, width=6)
    p = type(toy.population([1]))(spec, 8, "cuda")
    p.reset(torch.arange(8), toy.context(KEYS, 6, 3, mixed=True))
    for _ in range(3):
        toy.act(p, KEYS)
        p.train_epoch()
    toy.act(p, KEYS)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        p.train_epoch()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("task", ["mlp", "grid", "causal"])
def test_a_device_computes_what_the_cpu_does(toy, task):
    there, here = (type(toy.population([1]))(toy.spec(task, width=6), 8, device) for device in ("cuda", "cpu"))
    for p in (there, here):
        p.reset(torch.arange(8), toy.context(KEYS, 6, 3, mixed=True))
        toy.walk(p, KEYS, 3)
    close(there.validation_loss.cpu(), here.validation_loss, rtol=1e-2, atol=1e-2)
    for name in ("stage", "blueprint", "alpha", "ramp", "epochs"):
        assert torch.equal(getattr(there.lifecycle, name), getattr(here.lifecycle, name))
