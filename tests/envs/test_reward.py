"""The reward: its parts by hand, in episodes, and that nothing but a better host earns any."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from envs.contexts import KINDS
from envs.growth_env import GrowthEnv
from envs.reward import Reference, gain, load_reference, rent
from esper.growth.actions import Verb
from esper.growth.lifecycle import Stage
from esper.runtime.errors import ConfigError

NAN, INF = float("nan"), float("inf")
REFERENCE = Reference(static=1.4, large=0.9)
SEEDS = ["bypass", "low_rank", "widen", "mlp", "norm"]
BYPASS, LOW_RANK, WIDEN, MLP, NORM = range(5)
# Segment, 3 stages of width 4: 18 -> 4 -> 4 -> 4 -> 4 -> 7, and seeds of width 4.
HOST = 18 * 4 + 4 + 3 * (4 * 4 + 4) + 4 * 7 + 7
HOST_FLOPS = 18 * 4 + 3 * 16 + 4 * 7
PARAMETERS = (4 * 4 + 4, 2 * 2 * 4, 4 * 4 + 4 + 4 * 4, 4 * 8 + 8 + 8 * 4 + 4, 2 * 4)
FLOPS = (16, 16, 32, 64, 16)


@pytest.mark.parametrize(
    ("loss", "twin", "expected"),
    [
        (1.0, 1.3, 0.6),  # 0.3 / (1.4 - 0.9)
        (1.3, 1.2, -0.2),
        (1.1, 1.1, 0.0),
        (0.1, 1.0, 1.5),  # 1.8
        (2.0, 1.0, -1.0),  # -2
        (NAN, 1.0, -1.0),
        (INF, 1.0, -1.0),
        (1.0, NAN, 1.5),
        (1.0, INF, 1.5),
        (NAN, NAN, -1.0),
        (INF, INF, -1.0),
    ],
)
def test_gain_by_hand(loss, twin, expected):
    got = gain(torch.tensor([loss, 1.0]), torch.tensor([twin, 1.0]), REFERENCE)
    assert got.tolist() == pytest.approx([expected, 0.0], abs=1e-6)


@given(st.floats(0, 50, width=32), st.floats(0, 50, width=32))
def test_gain_is_clipped_and_falls_with_the_loss(loss, twin):
    got = float(gain(torch.tensor([loss]), torch.tensor([twin]), REFERENCE))
    assert -1 <= got <= 1.5
    assert float(gain(torch.tensor([loss + 0.1]), torch.tensor([twin]), REFERENCE)) <= got


def test_rent_by_hand():
    # P0 = 200, Pmax = 200 + 600: log(400 / 200) / log(800 / 200) = 1 / 2
    host, most = torch.tensor(200.0), torch.tensor(600.0)
    assert rent(torch.tensor([0.0, 200.0, 600.0]), host, most).tolist() == pytest.approx([0.0, 0.5, 1.0])


def test_missing_reference_says_what_to_run():
    with pytest.raises(ConfigError, match=r"env\.task=nope: no reference stored; run `python scripts/references"):
        load_reference("nope")


# ---- in the environment -------------------------------------------------------------------------------------------

GAP = 0.5  # of `play`'s environments


def gained(env):
    """Improvement of the final loss over the twin's, by hand."""
    return ((env._twin[:, env.config.epochs] - env.population.validation_loss) / GAP).clamp(-1, 1.5)


def test_the_stored_reference_of_the_task_is_the_measure(play):
    assert play.REFERENCE.gap == pytest.approx(GAP)
    for name in ("segment", "digits"):
        assert GrowthEnv(play.config(name), 1).reference == load_reference(name)
        assert load_reference(name).gap > 0


def total(out):
    return torch.stack([reward for _, reward, _, _ in out]).double().sum(0)


def episodes(out):
    return out[-1][3]["episodes"]


def price(kept, flops, epochs, slots=3, rent=0.3, flops_weight=0.7):
    """Rent and FLOPs price by hand, with prices unlike the defaults."""
    most = slots * PARAMETERS[MLP]
    return rent * math.log((HOST + kept) / HOST) / math.log((HOST + most) / HOST) + flops_weight * flops / (
        epochs * HOST_FLOPS
    )


PRICES = {
    "reward": {"rent": 0.3, "flops": 0.7},
    "host": {"width": [4, 4], "stages": [3, 3]},
    "blueprints": SEEDS,
    "autoreset": False,
}


@pytest.mark.parametrize("shaping", [0.0, 0.7])
@pytest.mark.parametrize("kind", [*KINDS, "mixture"])
def test_never_growing_earns_exactly_nothing(play, kind, shaping):
    env = play.env(8, contexts=kind, reward={"shaping": shaping})
    for _, reward, _, info in play.script(env) + play.script(env):
        assert reward.tolist() == [0.0] * 8
        if info:
            assert info["episodes"]["gain"].tolist() == info["episodes"]["return"].tolist() == [0.0] * 8


@pytest.mark.parametrize("name", ["digits", "digits_conv"])
def test_never_growing_earns_exactly_nothing_on_other_hosts(play, name):
    env = play.env(3, name=name, contexts="sequential", epochs=3)
    assert all(reward.tolist() == [0.0] * 3 for _, reward, _, _ in play.script(env))


def test_reward_of_kept_seeds_by_hand(play):
    env = play.env(3, contexts="plain", **PRICES, lifecycle={"auto_blend": None})
    out = play.script(
        env, (Verb.GERMINATE, 1, WIDEN), (Verb.BLEND, 1, 0), (Verb.GERMINATE, 2, NORM), (Verb.BLEND, 2, 1),
        (Verb.FOSSILIZE, 1)
    )  # fmt: skip
    # WIDEN trains in epoch 1, ramps in epoch 2, holds, is fossilised before epoch 5; NORM trains in epoch 3 and ramps
    # in epochs 4 to 6, after which it holds and is kept as well.
    assert env.population.lifecycle.stage[0].tolist() == [Stage.DORMANT, Stage.FOSSILIZED, Stage.HOLDING]
    kept, flops = PARAMETERS[WIDEN] + PARAMETERS[NORM], 6 * FLOPS[WIDEN] + 4 * FLOPS[NORM]
    expected = gained(env) - price(kept, flops, 6)
    assert (gained(env).abs() > 0.01).any()
    torch.testing.assert_close(out[-1][1], expected)
    assert all((reward == 0).all() for _, reward, _, _ in out[:-1])
    summary = episodes(out)
    torch.testing.assert_close(summary["return"], expected)
    torch.testing.assert_close(summary["gain"], gained(env))
    torch.testing.assert_close(summary["params_ratio"], torch.full((3,), (HOST + kept) / HOST))
    torch.testing.assert_close(summary["flops_ratio"], torch.full((3,), flops / (6 * HOST_FLOPS)))


def test_narrow_and_shallow_hosts_pay_by_their_own_size(play):
    env = play.env(8, contexts="plain", **{**PRICES, "host": {"width": [4, 6], "stages": [2, 3]}})
    out = play.script(env, (Verb.GERMINATE, 0, MLP))
    width, depth = env.population.context.width.double(), env.population.context.depth.double()
    assert len(set(zip(width.tolist(), depth.tolist(), strict=True))) > 3
    parameters = 18 * width + width + depth * (width**2 + width) + 7 * width + 7
    flops = 18 * width + depth * width**2 + 7 * width
    mlp, mlp_flops = 4 * width**2 + 3 * width, 4 * width**2
    kept = torch.log1p(mlp / parameters) / torch.log1p(depth * mlp / parameters)
    expected = gained(env) - 0.3 * kept - 0.7 * mlp_flops / flops
    torch.testing.assert_close(out[-1][1].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seeds", [1, 2])
def test_rent_is_relative_to_the_seeds_that_are_allowed(play, seeds):
    config = play.config(contexts="sequential", **{k: v for k, v in PRICES.items() if k != "autoreset"})
    config.contexts.sequential.seeds = seeds
    env = GrowthEnv(config, 3, autoreset=False)
    env.reference = REFERENCE
    env.reset(torch.arange(3))
    out = play.script(env, (Verb.GERMINATE, 0, BYPASS))
    expected = gained(env) - price(PARAMETERS[BYPASS], 6 * FLOPS[BYPASS], 6, slots=seeds)
    torch.testing.assert_close(out[-1][1], expected)


@pytest.mark.parametrize("blend", [False, True])
def test_unfinished_seeds_are_removed_and_pay_for_flops_only(play, blend):
    env = play.env(3, contexts="plain", **PRICES, lifecycle={"auto_blend": None})
    moves = [(Verb.WAIT,)] * 2 + [(Verb.GERMINATE, 0, MLP)] + [(Verb.BLEND, 0, 3)] * blend  # a ramp of 8
    out = play.script(env, *moves)
    assert env.population.lifecycle.stage[0, 0] == Stage.EMBARGOED
    population, twin = env.population, env._twin[:, 6]
    loss = population.validation_loss
    expected = gained(env) - price(0, 4 * FLOPS[MLP], 6)
    torch.testing.assert_close(out[-1][1], expected)
    assert torch.equal(loss, twin) != blend  # a seed in TRAINING has never touched its host
    # The loss that counts is that of the host alone.
    h = population.data.validation_x[:, 0].expand(3, -1, -1)
    at = 0
    for a, b in [(18, 4), (4, 4), (4, 4), (4, 4), (4, 7)]:
        weight = population.theta[:, at : at + a * b].view(3, a, b)
        h = h @ weight + population.theta[:, None, at + a * b : at + a * b + b]
        h = h.relu() if b == 4 else h
        at += a * b + b
    slow = -h.log_softmax(-1).gather(2, population.data.validation_y.expand(3, -1)[..., None]).mean((1, 2))
    torch.testing.assert_close(loss, slow)


def test_a_diverged_host_earns_the_least(play):
    env = play.env(2, contexts="plain", autoreset=False)
    env.population.theta[0] = NAN
    out = play.script(env)
    assert [reward.tolist() for _, reward, _, _ in out] == [[-1.0, 0.0]] + [[0.0, 0.0]] * 5


# ---- hosts that are scored by their compute -----------------------------------------------------------------------


def curves(env, losses, twin):
    """The environment with given validation losses after each epoch: `losses` of its hosts, `twin` of their twins."""
    population, train_epoch = env.population, env.population.train_epoch

    def train(evaluate):
        train_epoch(evaluate)
        population.validation_loss[:] = losses[int(population.epoch[0]) - 1]

    population.train_epoch = train
    env._twin[:, 0], env._twin[:, 1 : len(twin) + 1] = 9.9, torch.tensor(twin)
    env._best[:] = 9.9  # at the start
    return env


@pytest.fixture
def compute(play):
    """`compute(**settings)`: hosts of width 4 with 3 stages in contexts that price compute."""
    given = {k: v for k, v in PRICES.items() if k not in ("autoreset", "reward")}

    def make(hosts=2, seeds=2, epochs=4, shaping=0.0):
        reward = {"rent": 0.3, "flops": 0.7, "shaping": shaping}
        config = play.config(contexts="growth", **given, epochs=epochs, reward=reward, lifecycle={"auto_blend": 1})
        config.contexts.growth.width, config.contexts.growth.seeds = [4, 4], seeds
        env = GrowthEnv(config, hosts, autoreset=False)
        env.reference = REFERENCE
        env.reset(torch.arange(hosts))
        return env

    return make


LOSSES, TWIN = [2.0, 1.5, 1.2, 1.0], [2.2, 1.8, 1.6, 1.5]  # the twin's mean is 1.775


def actions(env, *moves):
    """One move for each host."""
    return torch.tensor([env.layout.index(*move) for move in moves])


def test_the_area_of_priced_hosts_by_hand(compute):
    env = curves(compute(), LOSSES, TWIN)
    env.step(actions(env, (Verb.GERMINATE, 0, MLP), (Verb.WAIT,)))
    for _ in range(3):
        _, reward, _, _, info = env.step(torch.zeros(2, dtype=torch.int64))
    # An epoch with an MLP costs 1 + 64 / 148 = 1.4324 of the 4: two whole ones, then 4 - 2.8649 = 1.1351, then none.
    area = (1.43243243 * 2.0 + 1.43243243 * 1.5 + 1.13513514 * 1.2) / 4
    expected = [(1.775 - area) / GAP, (1.775 - 1.425) / GAP]
    assert info["episodes"]["gain"].tolist() == pytest.approx(expected, rel=1e-5)
    # What is kept pays rent, relative to the two seeds that are allowed; compute has been priced already.
    kept = price(PARAMETERS[MLP], 0, 4, slots=2)
    assert kept > 0.1
    assert reward.tolist() == pytest.approx([expected[0] - kept, expected[1]], rel=1e-5)
    assert info["episodes"]["flops_ratio"].tolist() == pytest.approx([64 / 148, 0], rel=1e-5)


def test_what_comes_after_the_compute_is_used_up_does_not_count(compute):
    results = []
    for last in (1.0, 0.1):
        env = curves(compute(), [*LOSSES[:3], last], TWIN)
        env.step(actions(env, (Verb.GERMINATE, 0, MLP), (Verb.WAIT,)))
        for _ in range(3):
            reward = env.step(torch.zeros(2, dtype=torch.int64))[1]
        results.append(reward)
    assert results[0][0] == results[1][0]
    assert results[1][1] > results[0][1]


def test_a_late_seed_uses_less_compute(compute):
    env = curves(compute(), LOSSES, TWIN)
    for epoch in range(4):
        move = (Verb.GERMINATE, 0, MLP) if epoch == 2 else (Verb.WAIT,)
        _, _, _, _, info = env.step(actions(env, move, (Verb.WAIT,)))
    # Two epochs at 1, one at 1.4324, and 0.5676 are left for the last. The seed is still blending and is not kept.
    area = (2.0 + 1.5 + 1.43243243 * 1.2 + 0.56756757 * 1.0) / 4
    assert float(info["episodes"]["gain"][0]) == pytest.approx((1.775 - area) / GAP, rel=1e-5)
    assert float(info["episodes"]["return"][0]) == pytest.approx((1.775 - area) / GAP, rel=1e-5)


def test_shaping_of_priced_hosts_by_hand(compute):
    env = curves(compute(shaping=0.5), LOSSES, TWIN)
    rewards = [env.step(actions(env, (Verb.GERMINATE, 0, MLP), (Verb.WAIT,)))[1]]
    rewards += [env.step(torch.zeros(2, dtype=torch.int64))[1] for _ in range(3)]
    # Means so far: of the grown host over compute, 2, 1.75 and 1.5939; of the twin 2.2, 2 and 5.6 / 3.
    area = (1.43243243 * 3.5 + 1.13513514 * 1.2) / 4
    potentials = [0.5 * (a - b) / GAP for a, b in ((2.2, 2.0), (2.0, 1.75), (5.6 / 3, area))]
    got = [float(reward[0]) for reward in rewards]
    assert got[:3] == pytest.approx([potentials[0], potentials[1] - potentials[0], potentials[2] - potentials[1]], 1e-4)
    final = (1.775 - area) / GAP - price(PARAMETERS[MLP], 0, 4, slots=2)
    assert got[3] == pytest.approx(final - potentials[2], rel=1e-4)


# ---- growing for nothing ------------------------------------------------------------------------------------------


def cycle(env, blueprint=MLP):
    """Germinates and culls as often as the rules allow; the rewards [epochs, N]."""
    verbs, _, choices = env.layout.table()
    rewards = []
    for _ in range(env.config.epochs):
        mask = env.action_mask()
        cull, germinate = mask & (verbs == Verb.CULL), mask & (verbs == Verb.GERMINATE) & (choices == blueprint)
        planted = torch.where(germinate.any(1), germinate.int().argmax(1), 0)
        rewards.append(env.step(torch.where(cull.any(1), cull.int().argmax(1), planted))[1])
    return torch.stack(rewards)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "growth"])
def test_germinating_and_culling_over_and_over_earns_nothing(play, kind):
    env = play.env(6, contexts=kind, epochs=12, autoreset=False, lifecycle={"auto_blend": 1})
    rewards, population = cycle(env), env.population
    assert (env._counts[:, Verb.CULL] >= 2).all()
    assert torch.equal(population.validation_loss, env._twin[:, 12])
    assert (rewards[:-1] == 0).all()
    charged = env.config.reward.flops * population.extra_flops / (12 * population.host_flops())
    assert (charged > 0).all()
    torch.testing.assert_close(rewards[-1], -charged)


@pytest.mark.parametrize("kind", [*KINDS, "mixture"])
def test_returns_are_gains_less_what_growing_costs(play, kind):
    env = play.env(12, contexts=kind, epochs=10, lifecycle={"auto_blend": 1}, reward={"rent": 0.3, "flops": 0.7})
    summary = episodes(play.run(env, 10, list(range(12))))
    paid = summary["gain"] - summary["return"]
    assert (paid >= -1e-6).all()
    # Compute is charged by the price, or is in the gain already.
    unpriced = summary["kind"] != KINDS.index("growth")
    assert (paid[unpriced] >= 0.7 * summary["flops_ratio"][unpriced] - 1e-6).all()
    assert (summary["germinated"] > 0).any()
    assert (summary["flops_ratio"] > 0).equal(summary["germinated"] > 0)


def test_burning_compute_earns_nothing_where_the_loss_rises(compute):
    env = curves(compute(epochs=6), [1.0, 1.5, 2.0, 3.0, 4.0, 5.0], [1.0, 1.5, 2.0, 3.0, 4.0, 5.0])
    assert (cycle(env).sum(0) <= 0).all()


def test_burning_compute_costs_where_the_loss_falls(compute):
    falling = [3.0, 2.0, 1.5, 1.2, 1.0, 0.9]
    env = curves(compute(epochs=6), falling, falling)
    assert (cycle(env).sum(0) < -0.01).all()


def test_culled_flops_stay_charged(play):
    env = play.env(2, contexts="plain", **PRICES)
    out = play.script(env, (Verb.GERMINATE, 2, WIDEN), (Verb.CULL, 2))
    torch.testing.assert_close(out[-1][1], torch.full((2,), -price(0, FLOPS[WIDEN], 6)))


# ---- shaping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixture", "growth"])
def test_shaping_telescopes(play, kind):
    plain = play.run(play.env(8, contexts=kind, epochs=8), 16, list(range(8)))
    shaped = play.run(play.env(8, contexts=kind, epochs=8, reward={"shaping": 0.9}), 16, list(range(8)))
    assert torch.stack([r for _, r, t, _ in shaped if not t.any()]).abs().max() > 1e-3
    for half in (slice(0, 8), slice(8, 16)):  # two episodes
        torch.testing.assert_close(total(shaped[half]), total(plain[half]), rtol=0, atol=1e-5)
        torch.testing.assert_close(episodes(shaped[half])["return"].double(), total(shaped[half]), rtol=0, atol=1e-6)


def test_shaping_by_hand(play):
    env = play.env(3, contexts="plain", reward={"shaping": 0.9})
    last = torch.zeros(3)
    for epoch in range(1, 6):
        env._twin[:, epoch] = 1.5 + 0.1 * epoch
        reward = play.run(env, 1, ["a", "b", "c"])[0][1]
        potential = 0.9 * ((1.5 + 0.1 * epoch - env.population.validation_loss) / GAP).clamp(-1, 1.5)
        torch.testing.assert_close(reward, potential - last, rtol=0, atol=1e-6)
        last = potential


# ---- by accuracy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixture", "growth"])
def test_return_by_accuracy_against_accuracies_as_they_go_along(play, kind):
    """What is paid and reported, against accuracies that are asked for after each epoch, of the hosts and of others
    that nothing is done to."""
    config = play.config(contexts=kind, reward={"measure": "accuracy", "rent": 0.2, "flops": 0.0})
    everyone, found = torch.arange(6), {}
    for name in ("host", "twin"):
        env = GrowthEnv(config, 6, autoreset=False)
        env.reset(everyone)
        hosts, curves, spent = env.population, [], [torch.zeros(6)]
        for epoch in range(6):
            # What is germinated at the start has been blended by the end, so that nothing is removed then.
            grow = name == "host" and epoch == 0
            action = env.layout.index(Verb.GERMINATE, 1, MLP) if grow else env.layout.index(Verb.WAIT)
            _, paid, _, _, info = env.step(torch.full((6,), action))
            curves.append(torch.stack([hosts.accuracy(everyone, split) for split in ("validation", "test")]))
            spent.append((hosts.epoch + hosts.extra_flops / hosts.host_flops()) / 6)
        curve, share = torch.stack(curves), torch.stack(spent).clamp(max=1).diff(dim=0)
        area, late = (share[:, None] * curve).sum(0), torch.stack([curve[-3:, 0].mean(0), curve[-1, 1]])
        found[name] = torch.where(hosts.context.priced, area, late)
        if name == "host":
            got, episodes = paid, info["episodes"]
    growth, better = episodes["params_ratio"] - 1, found["host"] - found["twin"]
    torch.testing.assert_close(got, better[0] - 0.2 * growth, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(episodes["points"], 100 * better[1] - 10 * growth, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(episodes["gain"], better[0], atol=1e-6, rtol=1e-5)
    assert growth.min() > 0
    assert better.abs().max() > 0.01


def test_the_measure_is_checked(play):
    with pytest.raises(ConfigError, match=r"env.reward.measure=f1: choose one of accuracy, loss"):
        play.config(reward={"measure": "f1"})


# ---- foresight ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["accuracy", "loss"])
@pytest.mark.parametrize("kind", ["mixture", "growth"])
def test_foresight_pays_the_same_return_earlier(play, measure, kind):
    """Each reward is what the action gains if nothing is done after it; their sums are those without foresight."""
    paid = {}
    for foresight in (False, True):
        reward = {"measure": measure, "foresight": foresight}
        env = play.env(8, contexts=kind, autoreset=False, reward=reward)
        if not foresight:
            # What an action gains, by environments that go through the same steps.
            other, gains, now = play.env(8, contexts=kind, autoreset=False, reward=reward), [], None
        steps = []
        for _ in range(6):
            actions = play.choose(env, list("abcdefgh"))
            if not foresight:
                waited = other.fork(torch.arange(8), future=True).played_out(torch.zeros_like(actions))
                acted = other.fork(torch.arange(8), future=True).played_out(actions)
                gains.append(acted - waited)
                now = waited if now is None else now
                other.step(actions)
            steps.append(env.step(actions)[1])
        paid[foresight] = torch.stack(steps)
    torch.testing.assert_close(paid[True], torch.stack(gains), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(paid[True].sum(0), paid[False].sum(0), atol=1e-5, rtol=1e-4)
    assert now.abs().max() < 1e-6  # a host that is left alone is its twin
    assert (paid[True][:-1] != 0).sum() > 10


def test_foresight_goes_on_from_a_saved_state(play):
    reward = {"measure": "accuracy", "foresight": True}
    env = play.env(4, autoreset=False, reward=reward)
    play.run(env, 3, list("abcd"))
    again = play.env(4, autoreset=False, reward=reward)
    again.load_state_dict(env.state_dict())
    rewards = [torch.stack([step[1] for step in play.run(each, 3, list("abcd"))]) for each in (env, again)]
    assert torch.equal(*rewards)
    assert rewards[0].abs().max() > 0


def test_foresight_takes_no_other_shaping(play):
    with pytest.raises(ConfigError, match=r"reward.shaping=0.5: must be 0 with env.reward.foresight"):
        play.config(reward={"foresight": True, "shaping": 0.5})


@pytest.mark.parametrize("measure", ["accuracy", "loss"])
def test_without_the_twin_only_the_host_itself_counts(play, measure):
    given = {"measure": measure, "rent": 0.0, "flops": 0.0}
    returns, episodes = [], []
    for twin in (True, False):
        env = play.env(4, contexts="repair", autoreset=False, reward={**given, "twin": twin})
        play.run(env, 5, list("abcd"))
        _, paid, _, _, info = env.step(torch.zeros(4, dtype=torch.int64))
        returns.append(paid)
        episodes.append(info["episodes"])
    reference = env.twin_accuracies()[0]
    if measure == "loss":
        loss = env.population.validation_loss
        assert returns[1].tolist() == gain(loss, torch.full((4,), REFERENCE.static), REFERENCE).tolist()
    else:
        torch.testing.assert_close(returns[1], returns[0] + reference)
    assert torch.equal(episodes[0]["points"], episodes[1]["points"])  # reports compare with it all the same
    assert not torch.equal(returns[0], returns[1])
