import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.reward import Reference, gain, load_reference, rent
from esper.growth.actions import Verb
from esper.growth.lifecycle import Stage
from esper.runtime.errors import ConfigError

NAN, INF = float("nan"), float("inf")
REFERENCE = Reference(static=1.4, large=0.9)
MLP, GLU, LOW_RANK, NORM = range(4)
# Segment: 18 -> 4 -> 4 -> 4 -> 4 -> 7, seeds of width 4.
HOST = 18 * 4 + 4 + 3 * (4 * 4 + 4) + 4 * 7 + 7
HOST_FLOPS = 18 * 4 + 3 * 16 + 4 * 7
PARAMETERS = (4 * 16 + 3 * 4, 6 * 16 + 5 * 4, 4 * 4, 2 * 4)
FLOPS = (64, 96, 16, 16)


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
        (1.0, NAN, -1.0),
        (NAN, NAN, -1.0),
        (INF, INF, -1.0),
    ],
)
def test_gain_by_hand(loss, twin, expected):
    got = gain(torch.tensor([loss, 1.0]), torch.tensor([twin, 1.0]), REFERENCE)
    assert got.tolist() == pytest.approx([expected, 0.0], abs=1e-6)


@settings(deadline=None)
@given(st.floats(0, 50, width=32), st.floats(0, 50, width=32))
def test_gain_is_clipped_and_falls_with_the_loss(loss, twin):
    got = float(gain(torch.tensor([loss]), torch.tensor([twin]), REFERENCE))
    assert -1 <= got <= 1.5
    assert float(gain(torch.tensor([loss + 0.1]), torch.tensor([twin]), REFERENCE)) <= got


def test_rent_by_hand():
    # P0 = 200, Pmax = 200 + 600: log(400 / 200) / log(800 / 200) = 1 / 2
    assert rent(torch.tensor([0.0, 200.0, 600.0]), 200, 600).tolist() == pytest.approx([0.0, 0.5, 1.0])


@pytest.mark.parametrize("name", ["segment", "digits"])
def test_stored_references(name):
    reference = load_reference(name)
    assert 0 < reference.large < reference.static
    assert reference.gap == pytest.approx(reference.static - reference.large)


def test_missing_reference_says_what_to_run():
    with pytest.raises(ConfigError, match=r"env\.name=nope: no reference stored; run `python scripts/references"):
        load_reference("nope")


# ---- in the environment -------------------------------------------------------------------------------------------


def total(out):
    return torch.stack([reward for _, reward, _, _ in out]).double().sum(0)


def episodes(out):
    return out[-1][3]["episodes"]


def final_losses(env):
    losses = env.population.validation_loss
    return losses[: env.num_envs], losses[env.num_envs :]


@pytest.mark.parametrize("name", ["segment", "digits"])
@pytest.mark.parametrize("shaping", [0.0, 0.7])
def test_never_growing_earns_exactly_nothing(play, name, shaping):
    env = play.env(3, name=name, reward={"shaping": shaping})
    for _, reward, _, _ in play.script(env) + play.script(env):
        assert reward.tolist() == [0.0, 0.0, 0.0]


def price(env, kept, flops):
    """Rent and FLOPs price by hand, with prices unlike the defaults."""
    most = 4 * PARAMETERS[GLU]
    return 0.3 * math.log((HOST + kept) / HOST) / math.log((HOST + most) / HOST) + 0.7 * flops / (6 * HOST_FLOPS)


PRICES = {"reward": {"rent": 0.3, "flops": 0.7}, "autoreset": False, "epochs": 6}


def test_reward_of_kept_seeds_by_hand(play):
    env = play.env(3, **PRICES, lifecycle={"auto_blend": None})
    out = play.script(
        env, (Verb.GERMINATE, 1, GLU), (Verb.BLEND, 1, 0), (Verb.GERMINATE, 3, NORM), (Verb.BLEND, 3, 1),
        (Verb.FOSSILIZE, 1)
    )  # fmt: skip
    # GLU trains in epoch 1, ramps in epoch 2, holds, is fossilised before epoch 5; NORM trains in epoch 3 and ramps in
    # epochs 4 to 6, after which it holds and is kept as well.
    assert env.population.lifecycle.stage[0].tolist() == [
        Stage.DORMANT, Stage.FOSSILIZED, Stage.DORMANT, Stage.HOLDING
    ]  # fmt: skip
    loss, twin = final_losses(env)
    cost = price(env, PARAMETERS[GLU] + PARAMETERS[NORM], 6 * FLOPS[GLU] + 4 * FLOPS[NORM])
    expected = (twin - loss) / load_reference("segment").gap - cost
    assert (expected.abs() < 1).all()
    torch.testing.assert_close(out[-1][1], expected)
    assert all((reward == 0).all() for _, reward, _, _ in out[:-1])
    summary = episodes(out)
    torch.testing.assert_close(summary["return"], expected)
    torch.testing.assert_close(summary["gain"], (twin - loss) / load_reference("segment").gap)
    torch.testing.assert_close(summary["params_ratio"], torch.full((3,), (HOST + 116 + 8) / HOST))
    torch.testing.assert_close(summary["flops_ratio"], torch.full((3,), (6 * 96 + 4 * 16) / (6 * HOST_FLOPS)))


@pytest.mark.parametrize("blend", [False, True])
def test_unfinished_seeds_are_removed_and_pay_for_flops_only(play, blend):
    env = play.env(3, **PRICES, lifecycle={"auto_blend": None})
    moves = [(Verb.WAIT,)] * 2 + [(Verb.GERMINATE, 0, MLP)] + [(Verb.BLEND, 0, 3)] * blend  # a ramp of 8
    out = play.script(env, *moves)
    assert env.population.lifecycle.stage[0, 0] == Stage.EMBARGOED
    loss, twin = final_losses(env)
    expected = (twin - loss) / load_reference("segment").gap - price(env, 0, 4 * FLOPS[MLP])
    torch.testing.assert_close(out[-1][1], expected)
    assert torch.equal(loss, twin) != blend  # a seed in TRAINING has never touched its host
    # The loss that counts is that of the host alone.
    population = env.population
    h = population.data.validation_x.expand(3, -1, -1)
    at = 0
    for a, b in [(18, 4), (4, 4), (4, 4), (4, 4), (4, 7)]:
        weight = population.theta[:3, at : at + a * b].view(3, a, b)
        h = h @ weight + population.theta[:3, None, at + a * b : at + a * b + b]
        h = h.relu() if b == 4 else h
        at += a * b + b
    slow = -h.log_softmax(-1).gather(2, population.data.validation_y.expand(3, -1)[..., None]).mean((1, 2))
    torch.testing.assert_close(loss, slow)


def test_germinate_and_cull_over_and_over_earns_nothing(play):
    env = play.env(4, epochs=12, reward={"shaping": 0.5})
    rewards = []
    for step in range(12):
        slot, choice = (step // 2) % 4, step % 4
        move = (Verb.GERMINATE, slot, choice) if step % 2 == 0 else (Verb.CULL, slot)
        if step % 2 and step // 2 < 4:
            assert env.population.lifecycle.stage[0, slot] == Stage.BLENDING  # auto_blend, alpha still 0
        legal = env.action_mask()[0, env.layout.index(*move)]
        rewards.append(env.step(torch.full((4,), env.layout.index(*move) if legal else 0))[1])
    rewards = torch.stack(rewards)
    assert (rewards <= 0).all()
    assert (rewards.sum(0) < 0).all()
    assert (rewards[:-1] == 0).all()


def test_culled_flops_stay_charged(play):
    env = play.env(2, **PRICES)
    out = play.script(env, (Verb.GERMINATE, 2, GLU), (Verb.CULL, 2))
    torch.testing.assert_close(out[-1][1], torch.full((2,), -price(env, 0, FLOPS[GLU])))


@pytest.mark.parametrize("agent", range(3))
def test_shaping_telescopes(play, agent):
    tags = [(agent, k) for k in range(4)]
    plain = play.run(play.env(4, epochs=8), 16, tags)
    shaped = play.run(play.env(4, epochs=8, reward={"shaping": 0.9}), 16, tags)
    assert torch.stack([r for _, r, t, _ in shaped if not t.any()]).abs().max() > 1e-3
    for half in (slice(0, 8), slice(8, 16)):  # two episodes
        torch.testing.assert_close(total(shaped[half]), total(plain[half]), rtol=0, atol=1e-5)
        torch.testing.assert_close(episodes(shaped[half])["return"].double(), total(shaped[half]), rtol=0, atol=1e-6)


def test_shaping_by_hand(play):
    env = play.env(3, reward={"shaping": 0.9})
    last = torch.zeros(3)
    for _ in range(5):
        reward = play.run(env, 1, ["a", "b", "c"])[0][1]
        loss, twin = final_losses(env)
        potential = 0.9 * ((twin - loss) / load_reference("segment").gap).clamp(-1, 1.5)
        torch.testing.assert_close(reward, potential - last, rtol=0, atol=1e-6)
        last = potential


def test_a_diverged_host_earns_the_least(play):
    env = play.env(2, autoreset=False)
    env.population.theta[0] = NAN
    out = play.script(env)
    assert out[-1][1].tolist() == [-1.0, 0.0]
