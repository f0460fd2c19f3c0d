"""Environments as they are configured: what the packaged files hold, and how bad values are refused."""

import dataclasses

import pytest
import torch

from envs import tasks
from envs.adapter_config import GymConfig, HeteroConfig
from envs.config import host_spec, load_any, load_config, saved_config
from envs.contexts import KINDS
from envs.growth_env import GrowthEnv
from envs.making import CONFIGS, saved_env_config
from envs.reward import load_reference
from esper.growth import blueprints
from esper.runtime.errors import ConfigError


@pytest.mark.parametrize("name", tasks.available())
def test_packaged_environments_are_valid_with_every_kind_of_context(name):
    data = tasks.load(name)
    for contexts in (*KINDS, "mixture"):
        config = load_config(name, contexts)
        assert (config.name, config.task) == (name, name)
        assert config.instances == f"{name}/{contexts}"
    spec = host_spec(config)
    assert (spec.inputs, spec.classes, spec.grid) == (data.train_x.shape[2], data.classes, data.grid)
    assert (spec.causal, spec.per_token) == (data.causal, data.train_y.dim() > 1)
    assert all(blueprints.get(blueprint).fits(spec.site) for blueprint in config.blueprints)
    assert load_reference(config.task).gap > 0


def test_the_mixture_is_the_default():
    assert load_config("digits") == load_config("digits", "mixture")
    assert load_config("digits").instances == "digits/mixture"
    assert all(weight > 0 for weight in load_config("digits").contexts.mixture.weights().values())


def test_a_kind_of_context_has_all_the_weight():
    for kind in KINDS:
        weights = load_config("segment", kind).contexts.mixture.weights()
        assert {name for name, weight in weights.items() if weight} == {kind}
    # Ranges are the environment's own, whatever the kind.
    assert load_config("segment", "plain").contexts.regimes == load_config("segment").contexts.regimes


def test_overrides_replace_what_they_name():
    config = load_config("segment", epochs=7, host={"stages": [2, 2]}, reward={"rent": 0.5})
    plain = load_config("segment")
    assert (config.epochs, config.host.stages, config.reward.rent) == (7, [2, 2], 0.5)
    assert (config.host.width, config.reward.flops) == (plain.host.width, plain.reward.flops)
    config.epochs, config.host, config.reward = plain.epochs, plain.host, plain.reward
    assert config == plain


def test_a_saved_configuration_is_restored():
    config = load_config("segment", "sequential", epochs=7)
    assert saved_config(dataclasses.asdict(config)) == config


def test_configurations_of_every_kind_are_restored():
    from_plain = {
        config.kind: saved_env_config(dataclasses.asdict(config))
        for config in (
            load_config("segment"),
            load_any(CONFIGS, "super_resolution", epochs=3),
            GymConfig(id="A-v0", kwargs={"a": 1}),
            HeteroConfig(target="a:b"),
        )
    }
    assert from_plain["super_resolution"] == load_any(CONFIGS, "super_resolution", epochs=3)
    assert from_plain["growth"] == load_config("segment")
    assert from_plain["gym"] == GymConfig(id="A-v0", kwargs={"a": 1})
    assert from_plain["hetero"] == HeteroConfig(target="a:b")
    with pytest.raises(ConfigError, match=r"env\.kind=mars: no such kind of environment; choose one of growth, super_"):
        saved_env_config({"kind": "mars"})


def test_only_growth_environments_are_loaded_by_name():
    with pytest.raises(ConfigError, match="env=gym: is of the kind gym; choose one of the kind growth"):
        load_config("gym")


def test_hosts_have_room_for_every_width_that_is_drawn():
    sizes = {"width": [3, 5], "stages": [2, 4]}
    assert host_spec(load_config("segment", "plain", host=sizes)).width == 5
    growing = host_spec(load_config("segment", "growth", host=sizes))
    assert (growing.width, growing.stages) == (6, 4)  # growth draws widths of its own
    assert host_spec(load_config("segment", "growth", host={"width": [8, 9]})).width == 9


def test_the_engine_is_that_of_the_configuration(play):
    stacked, auto = play.env(4, engine="stacked"), play.env(4)
    before = stacked.population.validation_loss.clone()
    rewards = [[reward for _, reward, _, _ in play.run(env, 2, range(4))] for env in (stacked, auto)]
    assert stacked.population.native is None
    assert (stacked.population.setup.engine, auto.population.setup.engine) == ("stacked", "auto")
    torch.testing.assert_close(*rewards, rtol=1e-4, atol=1e-5)
    losses = stacked.population.validation_loss
    torch.testing.assert_close(losses, auto.population.validation_loss, rtol=1e-4, atol=1e-5)
    assert (losses != before).all()


# ---- what is refused ----------------------------------------------------------------------------------------------

TASKS = "charlm, digits, digits_conv, mnist5k, segment, signal"


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("nope", {}, r"env=nope: no such option; choose one of charlm, digits, digits_conv, gym, hetero, mnist5k"),
        ("segment", {"contexts": "nope"}, r"env/contexts=nope: no such option; choose one of growth, mixture, plain,"),
        ("segment", {"task": "mnist"}, rf"env\.task=mnist: no such task; choose one of {TASKS}"),
        ("segment", {"blueprints": ["brick"]}, r"env\.blueprints=brick: .*choose from .*bypass, .*mlp"),
        ("segment", {"blueprints": []}, r"env\.blueprints=\[\]: name at least one"),
        ("segment", {"blueprints": ["mlp", "mlp"]}, r"env\.blueprints=.*none twice"),
        ("segment", {"blueprints": ["conv", "attention"]}, r"env\.blueprints=.*none of them fits a host of 1 token"),
        ("segment", {"num_envs": 0}, r"env\.num_envs=0: must be above 0"),
        ("segment", {"epochs": 0}, r"env\.epochs=0: must be above 0"),
        ("segment", {"host": {"width": [0, 4]}}, r"env\.host\.width=\[0, 4\]: give \[low, high\] with 1"),
        ("segment", {"host": {"stages": [3, 2]}}, r"env\.host\.stages=\[3, 2\]: give \[low, high\]"),
        ("segment", {"host": {"stages": [3]}}, r"env\.host\.stages=\[3\]: give \[low, high\]"),
        ("segment", {"host": {"width": 4}}, r"env segment: host\.width: .*conf/env/segment\.yaml"),
        ("segment", {"training": {"batch_size": 0}}, r"env\.training\.batch_size=0"),
        ("segment", {"training": {"steps_per_epoch": -1}}, r"env\.training\.steps_per_epoch=-1"),
        ("segment", {"lifecycle": {"auto_ramp": 0}}, r"env\.lifecycle\.auto_ramp=0"),
        ("segment", {"engine": "fast"}, r"env\.engine=fast: no such engine; choose one of auto, native, stacked"),
        ("segment", {"epochs": "many"}, r"env segment: epochs: .*many"),
        ("segment", {"epoch": 5}, r"env segment: epoch: .*the keys are those of conf/env/segment\.yaml"),
        ("segment", {"host": {"depth": 3}}, r"env segment: host\.depth: "),
    ],
)
def test_bad_configuration_names_the_key_and_the_remedy(name, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(name, **overrides)


def test_contexts_are_checked_against_the_pool_of_the_task():
    config = load_config("segment")
    config.contexts.regimes[0].train_size = [300, 1101]
    with pytest.raises(ConfigError, match=r"env\.contexts\.regimes\.0\.train_size=\[300, 1101\].*1100"):
        config.validate()


def test_the_prefix_is_the_callers():
    with pytest.raises(ConfigError, match=r"^here\.epochs=0: "):
        dataclasses.replace(load_config("segment"), epochs=0).validate("here")


def test_an_environment_without_a_reference_says_so():
    with pytest.raises(ConfigError, match=r"env\.task=other: no reference stored; run `python scripts/references\.py"):
        load_reference("other")


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="not in"):
        GrowthEnv(load_config("segment"), 1, "test")
