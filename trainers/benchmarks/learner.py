"""The suites `actor` and `update`: Tamiyo's decision and its training step against plain PyG in eager mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from esper.graph import GraphBatch
from esper.runtime.compiled import CompileGuard
from esper.runtime.precision import LossScaler
from esper.simic.config import PPOConfig
from esper.simic.rollout import Minibatch, Targets, Totals
from esper.simic.update import Coefficients, UpdateStep, ppo_loss
from esper.tamiyo.actor import Actor, Decision
from esper.tamiyo.distribution import MaskedCategorical
from esper.tamiyo.encoders.pyg import PyGEncoder, parameters
from esper.tamiyo.policy import Prediction, Tamiyo
from trainers.benchmarks import Report, suite
from trainers.benchmarks.encoder import observations
from trainers.benchmarks.rows import REFERENCE, Row, compare, content, table, turns
from trainers.config import BenchmarkConfig, load_policy


class PlainPolicy(nn.Module):
    """Tamiyo as one would write it with PyG: the same function, with PyG's own modules for the encoder."""

    def __init__(self, policy: Tamiyo):
        super().__init__()
        self.encoder = PyGEncoder(policy.encoder.shape).to(next(policy.parameters()).device)
        copies = {name: value.detach().clone() for name, value in parameters(policy.encoder).items()}
        self.encoder.load_state_dict(copies)
        self._heads = policy

    def forward(self, graph: GraphBatch) -> Prediction:
        x = self.encoder(graph)
        return *self._heads.heads(x, graph.node_mask), None

    @torch.no_grad()
    def act(self, graph: GraphBatch, generator: torch.Generator) -> Decision:
        """A sampled decision."""
        logits, values, _ = self(graph)
        distribution = MaskedCategorical(logits, graph.action_mask)
        actions = distribution.sample(generator)
        return Decision(actions, distribution.log_prob(actions), values)


@contextmanager
def _from_nothing() -> Iterator[None]:
    """Without what was compiled earlier, so that compilation takes as long as at the very first start."""
    torch._dynamo.reset()
    with torch._inductor.utils.fresh_cache():
        yield


@suite("actor")
def actor(config: BenchmarkConfig) -> Report:
    """Graphs in, actions out."""
    settings, device = config.benchmark, torch.device(config.runtime.device)
    rows: list[Row] = []
    warm: dict[str, float] = {}
    with turns(len(settings.policies), settings) as tick:
        for name in settings.policies:
            case = f"{name}, decision for {settings.hosts} hosts"
            policy = Tamiyo(load_policy(name)).to(device)
            graph = observations(config, settings.hosts)
            plain, generator = PlainPolicy(policy), torch.Generator(device).manual_seed(0)
            variants: dict[str, Callable[[], object]] = {
                REFERENCE: partial(plain.act, graph, generator),
                "eager": partial(Actor(policy), graph),
            }
            took: dict[str, float] = {}
            with _from_nothing():
                if settings.compile:
                    cold, took["compiled"] = _compiled(policy, graph, config)
                    del cold
                    torch._dynamo.reset()  # which ends what was compiled before
                    variants["compiled"], warm[case] = _compiled(policy, graph, config)
                rows += compare("actor", case, variants, settings, device, tick, took)
    return Report(content(rows) | {"compile_s_from_a_warm_cache": warm}, [table(rows, "Decisions")])


def _compiled(policy: Tamiyo, graph: GraphBatch, config: BenchmarkConfig) -> tuple[Callable[[], Decision], float]:
    """A decision by a compiled actor, and the seconds that its warm-up has taken."""
    guard = CompileGuard("actor", None, config.runtime.cuda_graphs)
    compiled = Actor(policy, guard=guard)
    compiled.warm_up(graph)
    assert guard.enabled, guard.why_not
    return partial(compiled, graph), guard.warm_ms / 1e3


def minibatch(graph: GraphBatch, policy: Tamiyo) -> Minibatch:
    """Transitions from those observations, as the policy acts in them, with random advantages and returns."""
    decision = Actor(policy)(graph)
    generator = torch.Generator().manual_seed(0)
    advantages, returns = torch.randn(2, len(graph), generator=generator).to(graph.device)
    nothing = advantages.new_zeros(len(graph), 0)
    actions, log_probs, values = (part.clone() for part in decision)
    targets = Targets(actions, log_probs, values, advantages, returns, nothing, nothing.bool())
    return Minibatch(graph, targets, Totals.of(targets))


def _plain_step(
    plain: PlainPolicy, optimizer: torch.optim.Optimizer, batch: Minibatch, ppo: PPOConfig
) -> Callable[[], Tensor]:
    """A training step as one would write it."""
    coefficients = Coefficients(torch.tensor(ppo.clip), torch.tensor(ppo.entropy_coef))
    coefficients = Coefficients(*(c.to(batch.graph.device) for c in coefficients))

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        logits, values, predictions = plain(batch.graph)
        distribution = MaskedCategorical(logits, batch.graph.action_mask)
        loss, metrics = ppo_loss(distribution, values, predictions, batch.targets, batch.totals, coefficients, ppo)
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), ppo.max_grad_norm)
        optimizer.step()
        return metrics

    return step


class _CompiledStepToo(UpdateStep):
    """With clipping and the optimiser's step compiled as well."""

    def __init__(self, policy: Tamiyo, ppo: PPOConfig, guard: CompileGuard, device: torch.device):
        optimizer = torch.optim.Adam(policy.parameters(), lr=torch.tensor(ppo.lr, device=device), eps=1e-5)
        super().__init__(policy, LossScaler("fp32", optimizer, device), ppo, guard)

        def step() -> Tensor:
            norm = nn.utils.clip_grad_norm_(policy.parameters(), ppo.max_grad_norm)
            optimizer.step()
            return norm

        self._step = torch.compile(step)

    def __call__(self, batch: Minibatch | None) -> Tensor:
        assert batch is not None
        compiled = self._form(batch)
        assert compiled is not None
        return torch.cat([self._differentiated(compiled, batch), self._step()[None]])


@suite("update")
def update(config: BenchmarkConfig) -> Report:
    """Forward, loss, backward, clip and optimiser step on a minibatch of the default size."""
    settings, device, ppo = config.benchmark, torch.device(config.runtime.device), PPOConfig()
    size = ppo.num_steps * settings.hosts // ppo.minibatches
    rows: list[Row] = []
    with turns(len(settings.policies), settings) as tick:

        def made(name: str) -> tuple[Tamiyo, LossScaler]:
            policy = Tamiyo(load_policy(name)).to(device)
            optimizer = torch.optim.Adam(
                policy.parameters(), lr=torch.tensor(ppo.lr, device=device), eps=1e-5, fused=True
            )
            return policy, LossScaler(config.runtime.precision, optimizer, device)

        for name in settings.policies:
            case = f"{name}, training step on {size} graphs"
            policy, scaler = made(name)
            batch = minibatch(observations(config, size), policy)
            plain = PlainPolicy(policy)
            adam = torch.optim.Adam(plain.parameters(), lr=ppo.lr, eps=1e-5)
            variants: dict[str, Callable[[], object]] = {
                REFERENCE: _plain_step(plain, adam, batch, ppo),
                "eager": partial(UpdateStep(policy, scaler, ppo, CompileGuard("update", "not asked for")), batch),
            }
            took: dict[str, float] = {}
            with _from_nothing():
                if settings.compile:
                    guard = CompileGuard("update step", None, config.runtime.cuda_graphs)
                    other, its_scaler = made(name)
                    compiled = UpdateStep(other, its_scaler, ppo, guard)
                    compiled.warm_up(batch)
                    took["compiled"] = guard.warm_ms / 1e3
                    variants["compiled"] = partial(compiled, batch)
                    own = CompileGuard("update step", None, config.runtime.cuda_graphs)
                    whole = _CompiledStepToo(made(name)[0], ppo, own, device)
                    own.warm_up(partial(whole, batch))
                    took["compiled, with clip and Adam"] = own.warm_ms / 1e3
                    variants["compiled, with clip and Adam"] = partial(whole, batch)
                rows += compare("update", case, variants, settings, device, tick, took)
    return Report(content(rows), [table(rows, "Training steps")])
