"""What all baseline controllers have in common: they act legally, and their knobs come from where they should."""

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from envs.growth_env import GrowthEnv
from esper.growth.actions import RAMPS, ActionLayout, Verb
from esper.growth.blueprints import available
from esper.runtime.errors import ConfigError
from esper.tamiyo import baselines
from esper.tamiyo.baselines import REGISTRY, BaselinesConfig, Controller
from esper.tamiyo.baselines.linear import features

Envs = Callable[..., GrowthEnv]
BLUEPRINTS = ["bypass", "low_rank", "widen", "mlp", "norm"]  # of segment
HERE = "segment/plain"
MANUAL = {"auto_blend": None}  # blending has to be asked for


def config(**knobs: Any) -> BaselinesConfig:
    """`config(plateau={"slope": 0.1}, ramp=5)`."""
    made = BaselinesConfig()
    for name, value in knobs.items():
        if isinstance(value, dict):
            for key, each in value.items():
                assert hasattr(getattr(made, name), key), key
                setattr(getattr(made, name), key, each)
        else:
            setattr(made, name, value)
    return made


def make(name: str, seed: int = 0, **knobs: Any) -> Controller:
    return baselines.make(name, config(**knobs), HERE, BLUEPRINTS, seed)


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict], None]:
    """`stored({environment: ...})`: what counts as tuned."""
    return lambda content: monkeypatch.setattr(baselines, "_stored", lambda: content)


@pytest.fixture(scope="module")
def width(make_env: Envs) -> int:
    """Of the linear scorer's features."""
    return features(make_env(1).reset(torch.arange(1))).shape[2]


def weights(width: int, seed: int = 0) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(width, generator=generator).tolist() for name in BLUEPRINTS}


def play(env: GrowthEnv, controller: Controller, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """One episode of every host: the actions [epochs, N], all found legal, and the accounts."""
    graph = env.reset(torch.arange(env.num_envs) + seed)
    controller.begin(env.num_envs)
    taken = []
    for _ in range(env.config.epochs):
        actions = controller.act(graph)
        assert graph.action_mask.gather(1, actions[:, None]).all()
        taken.append(actions)
        graph, _, _, _, info = env.step(actions)
    return torch.stack(taken), info["episodes"]


# ---- legality --------------------------------------------------------------------------------------------------------

_ALWAYS = {"first": 0, "every": 1}
# Knobs with which a controller acts as often as it can.
EAGER: dict[str, dict[str, Any]] = {
    "periodic": _ALWAYS,
    "best_fixed": {"epoch": 0},
    "plateau": {"slope": -100.0, "patience": 0},
    **{name: {**_ALWAYS, "threshold": -1e9} for name in ("statistic", "gradient_norm", "gradmax", "linear")},
    "probe": {**_ALWAYS, "threshold": -1e9, "probation": 1, "keep": 1e9},
}


# Random draws for all hosts from one generator, and goes on drawing over the episodes.
DETERMINISTIC = [name for name in baselines.NAMES if name != "random"]


def eager(name: str) -> dict[str, Any]:
    return {name: EAGER[name]} if name in EAGER else {}


@pytest.fixture(scope="module")
def wide(make_env: Envs) -> GrowthEnv:
    env = make_env(16)
    env.reset(torch.arange(16))
    return env


@pytest.mark.parametrize("often", [False, True], ids=["default", "eager"])
@pytest.mark.parametrize("name", baselines.NAMES)
@hypothesis.settings(max_examples=15, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(seed=st.integers(0, 10**6), ramp=st.sampled_from(RAMPS))
def test_actions_are_legal_whatever_the_host(
    wide: GrowthEnv, scrambled: Any, stored: Any, width: int, name: str, often: bool, seed: int, ramp: int
) -> None:
    stored({HERE: {"weights": weights(width, seed)}})
    controller = make(name, seed, ramp=ramp, **(eager(name) if often else {}))
    controller.begin(16)
    acted = False
    for step in range(3):
        graph = scrambled(wide, seed + step)
        before = {key: value.clone() for key, value in graph.to_dict().items()}
        actions = controller.act(graph)
        assert actions.dtype == torch.int64
        assert actions.shape == (16,)
        assert graph.action_mask.gather(1, actions[:, None]).all()
        assert all(torch.equal(value, before[key]) for key, value in graph.to_dict().items())
        acted |= bool(actions.any())
    if name == "never":
        assert not acted
    elif often and name != "best_fixed":
        assert acted


@pytest.mark.parametrize("lifecycle", [{"auto_blend": 1}, MANUAL], ids=["auto_blend", "manual"])
@pytest.mark.parametrize("name", baselines.NAMES)
def test_a_whole_episode_is_legal(make_env: Envs, stored: Any, width: int, name: str, lifecycle: dict) -> None:
    stored({HERE: {"weights": weights(width)}})
    env = make_env(4, epochs=10, lifecycle=lifecycle, host={"width": [4, 6], "stages": [2, 4]}, contexts="mixture")
    _, episodes = play(env, make(name, **eager(name)))
    assert episodes["length"].tolist() == [10] * 4
    assert (episodes["germinated"] > 0).any() == (name != "never")


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_decision_does_not_depend_on_the_other_hosts(
    wide: GrowthEnv, scrambled: Any, stored: Any, width: int, name: str
) -> None:
    stored({HERE: {"weights": weights(width)}})
    graphs = [scrambled(wide, seed) for seed in range(3)]
    together, alone = (make(name, **eager(name)) for _ in range(2))
    together.begin(16)
    alone.begin(1)
    for graph in graphs:
        assert torch.equal(together.act(graph)[5:6], alone.act(graph[5]))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_new_episode_starts_afresh(wide: GrowthEnv, scrambled: Any, stored: Any, width: int, name: str) -> None:
    stored({HERE: {"weights": weights(width)}})
    graphs = [scrambled(wide, seed) for seed in range(5)]
    controller = make(name)
    runs = []
    for hosts in (16, 16):
        controller.begin(hosts)
        runs.append(torch.stack([controller.act(graph) for graph in graphs]))
    assert torch.equal(*runs)
    controller.begin(2)  # and of another size
    assert torch.equal(torch.stack([controller.act(graph[:2]) for graph in graphs]), runs[0][:, :2])


# The probe keeps its clock on the CPU, where nothing comes to from "meta".
@pytest.mark.parametrize("name", [name for name in DETERMINISTIC if name != "probe"])
def test_actions_are_chosen_on_the_device_of_the_graph(make_env: Envs, stored: Any, width: int, name: str) -> None:
    stored({HERE: {"weights": weights(width)}})
    # "meta" stands for any device but the CPU: mixing the two is an error there as well.
    graph = make_env(2).reset(torch.arange(2)).to("meta")
    controller = make(name, **eager(name))
    controller.begin(2)
    assert controller.act(graph).device.type == "meta"


# ---- knobs -----------------------------------------------------------------------------------------------------------


def test_knobs_are_defaults_then_what_was_tuned_then_what_is_given(stored: Any) -> None:
    stored(
        {
            HERE: {"knobs": {"plateau": {"slope": -0.5, "patience": 7}, "statistic": {"threshold": 0.4}}},
            "digits/plain": {"knobs": {"plateau": {"slope": 9.0}}},
        }
    )
    default = REGISTRY["plateau"][1]()
    knobs = make("plateau", plateau={"slope": 0.25}).knobs
    assert (knobs.slope, knobs.patience, knobs.blueprint) == (0.25, 7, default.blueprint)
    assert make("plateau").knobs.slope == -0.5
    assert make("statistic").knobs.threshold == 0.4
    # 0 and "" are given, too.
    assert make("plateau", plateau={"slope": 0.0, "patience": 0}).knobs.slope == 0.0
    untuned = baselines.make("plateau", BaselinesConfig(), "signal/plain", BLUEPRINTS, 0)
    assert untuned.knobs == default


def test_a_blueprint_is_found_by_name_in_the_environments_order(stored: Any) -> None:
    stored({HERE: {"knobs": {"periodic": {"blueprint": "norm"}}}})
    assert make("periodic")._blueprint == 4
    assert make("periodic", periodic={"blueprint": "widen"})._blueprint == 2
    assert baselines.make("periodic", BaselinesConfig(), HERE, ["norm", "mlp"], 0)._blueprint == 0
    # One that was tuned elsewhere and is not here is replaced by the first.
    assert baselines.make("periodic", BaselinesConfig(), HERE, ["mlp", "bypass"], 0)._blueprint == 0


def test_an_unknown_name_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(KeyError) as error:
        make("best")
    assert all(name in str(error.value) for name in ("best", *baselines.NAMES))


def test_every_baseline_can_be_made(stored: Any, width: int) -> None:
    stored({HERE: {"weights": weights(width)}})
    assert set(baselines.NAMES) == {
        "never", "random", "all_at_start", "periodic", "best_fixed", "plateau", "statistic", "gradient_norm",
        "gradmax", "probe", "linear",
    }  # fmt: skip
    for name in baselines.NAMES:
        assert isinstance(make(name), REGISTRY[name][0])


def test_the_linear_scorer_is_there_where_it_has_been_fitted(stored: Any, width: int) -> None:
    stored({HERE: {"knobs": {}}, "digits/plain": {"weights": weights(width)}})
    assert baselines.usable("digits/plain") == baselines.NAMES
    for environment in (HERE, "signal/plain"):
        assert set(baselines.usable(environment)) == set(baselines.NAMES) - {"linear"}
    with pytest.raises(ConfigError, match=r"baselines=linear: .*segment/plain.*python scripts/headroom\.py segment/pl"):
        make("linear")


def test_what_is_stored_fits_the_code(width: int) -> None:
    baselines.forget()
    for environment, content in baselines._stored().items():
        assert set(content) <= {"knobs", "weights"}, environment
        for name, knobs in content.get("knobs", {}).items():
            made = REGISTRY[name][1](**knobs)
            assert getattr(made, "blueprint", "mlp") in available(), (environment, name)
        for blueprint, row in content.get("weights", {}).items():
            assert blueprint in available(), environment
            assert len(row) == width, environment


def test_forget_reads_what_is_stored_afresh() -> None:
    first = baselines._stored()
    assert baselines._stored() is first
    baselines.forget()
    assert baselines._stored() is not first
    assert baselines._stored() == first


@pytest.mark.parametrize("ramp", RAMPS)
def test_the_ramp_reaches_the_action(make_env: Envs, ramp: int) -> None:
    env = make_env(2, lifecycle=MANUAL)
    env.reset(torch.arange(2))
    layout = ActionLayout(4, 5)
    graph = env.step(torch.full((2,), layout.index(Verb.GERMINATE, 1, 3)))[0]
    controller = make("periodic", ramp=ramp, periodic={"first": 99})
    controller.begin(2)
    assert controller.act(graph).tolist() == [layout.index(Verb.BLEND, 1, RAMPS.index(ramp))] * 2


# ---- configuration ---------------------------------------------------------------------------------------------------


def overridden(*arguments: str) -> BaselinesConfig:
    merged = OmegaConf.merge(OmegaConf.structured(BaselinesConfig), OmegaConf.from_dotlist(list(arguments)))
    made = OmegaConf.to_object(merged)
    assert isinstance(made, BaselinesConfig)
    return made


def test_overrides_of_every_knob() -> None:
    assert all(overridden().given(name) == {} for name in baselines.NAMES)
    for name, (_, schema) in REGISTRY.items():
        if schema is None:
            assert not hasattr(BaselinesConfig(), name)
            continue
        for key, default in vars(schema()).items():
            value = "norm" if isinstance(default, str) else type(default)(7)
            assert overridden(f"{name}.{key}={value}").given(name) == {key: value}
            assert overridden(f"{name}.{key}=null").given(name) == {}
    many = overridden("plateau.slope=-0.01", "ramp=5", "probe.keep=0.5", "probe.first=0")
    assert (many.given("plateau"), many.ramp) == ({"slope": -0.01}, 5)
    assert many.given("probe") == {"keep": 0.5, "first": 0}


@pytest.mark.parametrize(
    "argument",
    ["plateau.slope=steep", "plateau.patience=1.5", "probe.probation=soon", "ramp=long", "plateau.slop=1", "plan.x=1"],
)
def test_wrong_types_and_unknown_knobs_are_refused(argument: str) -> None:
    with pytest.raises(OmegaConfBaseException):
        overridden(argument)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"ramp": 4}, r"here\.ramp=4: choose one of"),
        (
            {"all_at_start": {"blueprint": "brick"}},
            r"here\.all_at_start\.blueprint=brick: the environment has by",
        ),
        ({"probe": {"probation": -1}}, r"here\.probe\.probation=-1: must not be negative"),
        ({"periodic": {"every": 0}}, r"here\.periodic\.every=0: must be above 0"),
        ({"gradmax": {"first": -2}}, r"here\.gradmax\.first=-2: must not be negative"),
        ({"best_fixed": {"slot": -1}}, r"here\.best_fixed\.slot=-1: must not be negative"),
        ({"best_fixed": {"epoch": -1}}, r"here\.best_fixed\.epoch=-1: must not be negative"),
        ({"plateau": {"patience": -1}}, r"here\.plateau\.patience=-1: must not be negative"),
    ],
    ids=str,
)
def test_bad_values_are_refused_by_name(knobs: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**knobs).validate(BLUEPRINTS, "here")


def test_good_values_pass() -> None:
    config(ramp=8, plateau={"patience": 0, "slope": -3.0}, best_fixed={"slot": 0}).validate(BLUEPRINTS, "here")


# ---- the environment under them --------------------------------------------------------------------------------------


def test_an_episode_can_be_played_under_no_grad(make_env: Envs) -> None:
    env = make_env(2, epochs=2)
    expected = play(env, make("never"))[1]
    with torch.no_grad():
        episodes = play(env, make("never"))[1]
    assert torch.equal(episodes["test_accuracy"], expected["test_accuracy"])
