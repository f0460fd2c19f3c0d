"""The surrogate environment: epochs drawn from a fitted model, the rest of an episode as in the real one."""

import dataclasses
import io
from importlib import resources

import gymnasium
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from envs import surrogate_model
from envs.config import load_config
from envs.contexts import KINDS
from envs.growth_env import GrowthEnv, population_spec
from envs.surrogate import SurrogatePopulation
from envs.surrogate_model import FILE, HOST, LAYER, OUTER, STAGE, STATE, Fitted, Model, decode, encode
from esper.graph.schema import SCHEMA
from esper.growth.actions import Verb
from esper.growth.conditions import Condition
from esper.growth.lifecycle import Stage
from esper.runtime.errors import ConfigError
from esper.tamiyo.baselines.greedy import Statistic, StatisticKnobs
from esper.tamiyo.baselines.simple import Random
from trainers.evaluation import play as played

ID = "envs:esper/Surrogate-v0"
TAGS = ["a", "b", "c", "d"]
EPOCHS = 24


def make(play, num_envs, seed=0, **overrides):
    return play.env(num_envs, seed, "surrogate", **{"epochs": EPOCHS, "training": {}, **overrides})


def rewards(out):
    return torch.stack([reward for _, reward, _, _ in out])


def leaves(state):
    if isinstance(state, torch.Tensor):
        return [state]
    return [leaf for part in (state.values() if isinstance(state, dict) else state) for leaf in leaves(part)]


# ---- instances ----------------------------------------------------------------------------------------------------


def test_the_same_seeds_give_the_same_run(play):
    first, again = (play.run(make(play, 4, 5), EPOCHS + 3, TAGS) for _ in range(2))
    assert torch.equal(rewards(first), rewards(again))
    assert rewards(first)[EPOCHS - 1].abs().min() > 0
    for (graph, *_), (other, *_) in zip(first, again, strict=True):
        assert play.same_graph(graph, other) == []


def test_a_used_environment_starts_over_from_its_seeds(play):
    env = make(play, 4, 5)
    first = play.run(env, EPOCHS + 3, TAGS)
    env.reset(torch.arange(4) + 5)
    assert torch.equal(rewards(play.run(env, EPOCHS + 3, TAGS)), rewards(first))


@pytest.mark.parametrize("hosts", [2, 4, 35])
@pytest.mark.parametrize("row", [0, -1])
def test_a_host_does_not_depend_on_its_neighbours(play, hosts, row):
    row %= hosts
    alone = play.run(make(play, 1, 5 + row), 2 * EPOCHS, [row])
    together = play.run(make(play, hosts, 5), 2 * EPOCHS, list(range(hosts)))
    assert torch.equal(rewards(alone)[:, 0], rewards(together)[:, row])
    for (graph, *_), (other, *_) in zip(alone, together, strict=True):
        assert play.same_graph(graph, other, (0, row)) == []
    (mine, *_), (all_of_them, *_) = alone[-1][3].values(), together[-1][3].values()
    assert play.same_graph(mine, all_of_them, (0, row)) == []
    for name, value in alone[-1][3]["episodes"].items():
        assert name == "env" or torch.equal(value[0], together[-1][3]["episodes"][name][row]), name


@pytest.mark.parametrize("hosts", [1, 3, 16, 61])
def test_the_model_rounds_alike_for_any_number_of_hosts(play, hosts):
    env = make(play, 64)
    play.run(env, 9, list(range(64)))
    population = env.population
    inputs, exists, host = population.inputs(torch.zeros(64, population.slots))
    model, memory = population.model, population.memory

    @torch.no_grad()
    def predicted(rows):
        code = model.code(inputs[rows], exists[rows])
        mean, hidden = model.step(code, host[rows], memory[rows])
        stages, middle = model.stages(inputs[rows], code, hidden)
        return mean, stages, model.host_scales(hidden), model.stage_scales(middle)

    for whole, part in zip(predicted(slice(0, 64)), predicted(slice(3, 3 + hosts)), strict=True):
        assert torch.equal(whole[3 : 3 + hosts], part)


def test_resetting_some_hosts_leaves_the_others(play):
    env = make(play, 4)
    play.run(env, 5, TAGS)
    population = env.population
    before = population.state_dict()
    population.reset(torch.tensor([1, 3]), population.context.rows(torch.tensor([1, 3])))
    after = population.state_dict()
    for was, now in zip(leaves(before), leaves(after), strict=True):
        assert torch.equal(was[[0, 2]], now[[0, 2]])
    assert population.epoch.tolist() == [5, 0, 5, 0]
    assert (population.validation_loss != before["validation_loss"])[[1, 3]].all()


def test_never_growing_is_the_twin(play):
    env = make(play, 128)
    out = play.script(env)
    priced = out[-1][3]["episodes"]["kind"] == KINDS.index("growth")
    total = rewards(out).sum(0)
    assert not total[~priced].any()
    assert total.abs().max() < 1e-5  # a mean over epochs that is summed in two ways
    assert priced.any()


def test_a_host_is_its_twin_until_it_grows(play):
    env = make(play, 32)
    for epoch in range(1, 9):
        env.step(torch.full((32,), env.layout.index(Verb.GERMINATE, 1, 0) if epoch == 6 else 0))
        same = env.population.validation_loss == env._twin[:, epoch]
        assert same.all() if epoch < 6 else not same.any()


def test_its_twins_are_not_those_of_the_real_environment(play, no_twins):
    real = play.env(4, 5, "digits", epochs=EPOCHS, training={})
    surrogate = make(play, 4, 5)
    assert torch.equal(real.population.context.key, surrogate.population.context.key)
    assert (real._twin != surrogate._twin).all(0)[: EPOCHS + 1].all()


def test_noise_differs_between_hosts_and_epochs(play):
    env = make(play, 64)
    drawn = [env.population._innovations()]
    env.step(torch.zeros(64, dtype=torch.int64))
    drawn.append(env.population._innovations())
    both = torch.cat(drawn)
    assert len(both.unique(dim=0)) > 120  # of 4,096 rows
    assert both.mean().abs() < 0.05
    assert (both.std() - 1).abs() < 0.05


# ---- lifecycles and legality --------------------------------------------------------------------------------------


def test_lifecycles_masks_and_costs_are_those_of_the_real_environment(play):
    overrides = {"epochs": 10}
    surrogate, real = make(play, 4, 5, **overrides), play.env(4, 5, "digits", **overrides, training={})
    for _ in range(10):
        mask = surrogate.action_mask()
        assert torch.equal(mask, real.action_mask())
        actions = play.choose(surrogate, TAGS)
        graph, _, ended, _, info = surrogate.step(actions)
        other, _, also, _, real_info = real.step(actions)
        assert torch.equal(ended, also)
        for name, value in vars(surrogate.population.lifecycle).items():
            assert torch.equal(value, getattr(real.population.lifecycle, name)), name
        for name, value in vars(surrogate.population.context).items():
            assert torch.equal(value, getattr(real.population.context, name)), name
        assert torch.equal(surrogate.population.extra_flops, real.population.extra_flops)
        fixed = {
            "global": ["epoch_fraction", "log_train_size", "log_parameter_growth", "extra_flops_ratio", "seeds_left"],
            "slot": [name for name in SCHEMA.nodes["slot"] if name.startswith(("is_", "alpha", "epochs", "embargo"))],
        }
        for node, names in SCHEMA.nodes.items():
            for name in [*fixed.get(node, []), *(name for name in names if name.endswith("_known"))]:
                column = SCHEMA.feature(node, name)
                assert torch.equal(graph.x[node][..., column], other.x[node][..., column]), (node, name)
        for relation, edges in graph.edges.items():
            assert torch.equal(edges.attr, other.edges[relation].attr), relation
    assert ended.all()
    for name in ("kind", "germinated", "fossilized", "culled", "waited", "params_ratio", "flops_ratio", "length"):
        assert torch.equal(info["episodes"][name], real_info["episodes"][name]), name


def test_an_illegal_action_is_refused(play):
    env = make(play, 2)
    with pytest.raises(ValueError, match="not legal for host 1"):
        env.step(torch.tensor([0, env.layout.index(Verb.CULL, 0)]))


def test_observations_are_finite_and_vary(play):
    env = make(play, 64)
    for graph, *_ in play.run(env, EPOCHS - 1, list(range(64))):
        for node, value in graph.x.items():
            assert value.isfinite().all(), node
    varying = {"slot": ["log_growth_gradient"], "layer": ["weight_rms", "log_gradient_rms", "gradient_signal_to_noise"]}
    varying |= {"activation": ["zero_derivative_fraction", "std", "effective_rank", "log_backward_rms"]}
    for node, names in varying.items():
        for name in names:
            values = graph.x[node][..., SCHEMA.feature(node, name)]
            assert values.std() > 0.02, (node, name)


# ---- what seeds do ------------------------------------------------------------------------------------------------


def test_removing_an_unfinished_seed_costs_its_contribution(play):
    env = make(play, 32)
    germinate = env.layout.index(Verb.GERMINATE, 0, 0)
    for action in (germinate, 0, 0):
        env.step(torch.full((32,), action))
    population = env.population
    assert (population.lifecycle.stage[:, 0] == Stage.BLENDING).all()
    loss, contribution = population.validation_loss.clone(), population.statistics.contribution[:, 0].clone()
    where = torch.arange(32) % 2 == 0
    population.remove_unfinished(where)
    assert torch.allclose(population.validation_loss - loss, torch.where(where, contribution, 0.0), atol=1e-5)
    assert torch.equal(population.statistics.history[where, 0], population.validation_loss[where])
    assert torch.equal(population.lifecycle.stage[:, 0] == Stage.EMBARGOED, where)


def test_culling_moves_the_loss_by_the_contribution_before_the_epoch(play):
    env = make(play, 32)
    germinate, cull = env.layout.index(Verb.GERMINATE, 0, 0), env.layout.index(Verb.CULL, 0)
    for action in (germinate, 0, 0, 0, 0):
        env.step(torch.full((32,), action))
    population = env.population
    loss, contribution = population.validation_loss.clone(), population.statistics.contribution[:, 0].clone()
    env.layout.execute(population, torch.full((32,), cull))
    removed = population.begin_epoch()
    assert torch.equal(removed[:, 0], contribution)
    assert not removed[:, 1:].any()
    assert torch.allclose(population.memory[:, 0].exp(), (loss + contribution).clamp(min=0.02), rtol=1e-4)


@pytest.mark.parametrize("condition", [Condition.CHOKE, Condition.DYING])
def test_a_defect_shows_and_a_bypass_repairs_it(play, condition):
    config = load_config("surrogate", contexts="repair")
    population = SurrogatePopulation(population_spec(config), 512)
    env = GrowthEnv(config, 512)
    env.reset(torch.arange(512))
    context = env.population.context.rows(torch.arange(512))
    context.train_size[:], context.label_noise[:], context.learning_rate[:] = 600, 0.0, 5e-3
    context.condition[:] = context.strike[:] = Condition.HEALTHY
    context.condition[:, 1] = context.strike[:, 1] = condition
    losses = []
    for grows in (False, True):
        population.reset(torch.arange(512), context)
        for epoch in range(EPOCHS):
            if epoch == 2 and grows:
                where = torch.zeros(512, population.slots, dtype=torch.bool)
                where[:, 1] = True
                population.germinate(where, where * config.blueprints.index("bypass"))
            population.train_epoch()
            if epoch == 2 and not grows:
                zero = population.statistics.activations[:, :4, 1]
                assert (zero.argmax(1) == 1).float().mean() > 0.8
        losses.append(population.validation_loss.clone())
    assert losses[1].mean() < losses[0].mean() - 0.1


def test_the_rule_that_reads_the_defects_beats_random_growth():
    config = load_config("surrogate")
    blueprint = config.blueprints.index("bypass")
    returns = [
        played(controller, config, 512, 3, "cpu", lambda done: None)["return"]
        for controller in (Statistic(StatisticKnobs(), blueprint, 3), Random(0))
    ]
    difference = returns[0] - returns[1]
    assert difference.mean() > 2 * difference.std() / 512**0.5
    assert difference.mean() > 0.05


# ---- Gymnasium ----------------------------------------------------------------------------------------------------


def test_a_vector_of_episodes():
    env = gymnasium.make_vec(ID, num_envs=5, contexts="repair")
    observation, info = env.reset(seed=3)
    dice = np.random.default_rng(0)
    for _ in range(EPOCHS):
        assert env.observation_space.contains(observation)
        actions = np.array([dice.choice(np.flatnonzero(mask)) for mask in info["action_mask"]])
        observation, reward, terminated, _, info = env.step(actions)
    assert terminated.all()
    assert np.isfinite(reward).all()
    assert reward.std() > 0
    assert info["_final_obs"].all()


# ---- state --------------------------------------------------------------------------------------------------------


def test_a_restored_environment_goes_on_as_the_saved_one(play):
    env = make(play, 4, 5)
    play.run(env, 7, TAGS)
    file = io.BytesIO()
    torch.save(env.state_dict(), file)
    expected = play.run(env, EPOCHS, TAGS)
    file.seek(0)
    other = make(play, 4, 99)
    other.load_state_dict(torch.load(file, weights_only=True))
    found = play.run(other, EPOCHS, TAGS)
    assert torch.equal(rewards(expected), rewards(found))
    for (graph, *_), (also, *_) in zip(expected, found, strict=True):
        assert play.same_graph(graph, also) == []


def test_a_saved_state_is_left_alone_by_later_steps(play):
    env = make(play, 4)
    play.run(env, 3, TAGS)
    state = env.state_dict()
    before = [leaf.clone() for leaf in leaves(state)]
    play.run(env, EPOCHS, TAGS)
    assert all(torch.equal(a, b) for a, b in zip(before, leaves(state), strict=True))


# ---- the fitted model ---------------------------------------------------------------------------------------------


def test_the_shipped_model_is_small_finite_and_of_the_right_shapes():
    fitted = Fitted.load()
    assert FILE.stat().st_size < 1_000_000
    stage, host = surrogate_model.input_sizes(len(fitted.blueprints))
    model = fitted.model
    (_, h), (g, outputs), (_, q) = model.stage_in.shape, model.host_out.shape, model.stage_middle.shape
    assert model.stage_in.shape[0] == stage
    assert model.host_in.shape == (2 * h + host + STATE, g)
    assert outputs == 2 + len(HOST) + OUTER
    assert model.stage_out.shape == model.stage_scale.shape == (q + stage, len(STAGE))
    for field in dataclasses.fields(Model):
        value = getattr(model, field.name)
        assert value.dtype == torch.float32
        assert value.isfinite().all(), field.name
        assert field.name in ("accuracy", "shared") or field.name.endswith("bias") or value.abs().max() < 10
    for share in (model.host_memory, model.stage_memory, model.shared):
        assert ((share >= 0) & (share < 1)).all()
    assert (model.accuracy[:, 1] < 0).all()  # the accuracy falls with the loss


def test_the_shipped_model_is_of_digits_as_configured():
    digits, surrogate = (
        OmegaConf.to_container(OmegaConf.load(str(resources.files("esper.conf") / "env" / f"{name}.yaml")))
        for name in ("digits", "surrogate")
    )
    digits.pop("engine")  # there is nothing to train
    assert surrogate == {**digits, "name": "surrogate", "dynamics": "surrogate", "num_envs": surrogate["num_envs"]}
    Fitted.load().check(population_spec(load_config("digits")))
    assert Fitted.load().blueprints == tuple(digits["blueprints"])


def test_a_model_survives_saving(tmp_path):
    fitted = Fitted.load()
    fitted.save(tmp_path / "copy.npz")
    other = Fitted.load(tmp_path / "copy.npz")
    assert {**vars(other), "model": None} == {**vars(fitted), "model": None}
    for field in dataclasses.fields(Model):
        assert torch.equal(getattr(fitted.model, field.name), getattr(other.model, field.name))


def test_decoding_inverts_encoding():
    for names in (STAGE, LAYER, HOST[2:]):
        value = torch.rand(50, len(names)) * 0.9 + 0.05
        for sign in (1, -1):
            given = value * torch.tensor([sign if name in ("mean", "contribution") else 1 for name in names])
            encoded = torch.stack([encode(name, given[:, i]) for i, name in enumerate(names)], dim=1)
            assert torch.allclose(decode(names, encoded), given, atol=1e-5)


def test_decoded_statistics_stay_in_their_ranges():
    for extreme in (-1e6, 1e6):
        value = dict(zip(STAGE, decode(STAGE, torch.full((len(STAGE),), extreme)).tolist(), strict=True))
        assert all(np.isfinite(v) for v in value.values())
        for name in ("dead_fraction", "zero_derivative_fraction", "effective_rank"):
            assert value[name] == (extreme > 0)
        assert all(v >= 0 for name, v in value.items() if name not in ("mean", "contribution"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"task": "segment"}, r"env\.task: .*digits only"),
        ({"task": "digits_conv"}, r"env\.task: .*digits only"),
        ({"blueprints": ["bypass", "glu"]}, r"env\.blueprints: .*not glu"),
        ({"training": {"steps_per_epoch": 5}}, r"env\.training: .*10 steps"),
        ({"host": {"width": [12, 64], "stages": [4, 6]}}, r"env\.host: .*16 units and 6 stages"),
    ],
)
def test_what_it_was_not_fitted_to_is_refused(overrides, message):
    config = load_config("surrogate", **overrides)
    with pytest.raises(ConfigError, match=message):
        SurrogatePopulation(population_spec(config), 1)


def test_blueprints_keep_their_meaning_in_another_catalogue(play):
    few = make(play, 8, blueprints=["norm", "bypass"])
    full = make(play, 8)
    for env, kind in ((few, 0), (full, full.config.blueprints.index("norm"))):
        for step in range(6):
            env.step(torch.full((8,), env.layout.index(Verb.GERMINATE, 1, kind) if step == 1 else 0))
    assert torch.equal(few.population.validation_loss, full.population.validation_loss)
