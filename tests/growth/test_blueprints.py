import importlib
import sys

import pytest
import torch

from esper.growth import blueprints
from esper.growth.blueprints import registry
from esper.growth.parameters import initial, views
from esper.runtime import seeding

NAMES = ["glu", "low_rank", "mlp", "norm"]
SEEDS, BATCH, WIDTH = 3, 5, 6


def drawn(name, width=WIDTH, seeds=SEEDS):
    """Random parameters for `seeds` seeds, none of them at a default, in float64."""
    g = torch.Generator().manual_seed(5)
    specs = blueprints.get(name).parameters(width)
    return {k: 0.3 + torch.randn(seeds, *spec.shape, generator=g, dtype=torch.float64) for k, spec in specs.items()}


def inputs(width=WIDTH):
    return torch.randn(SEEDS, BATCH, width, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_delta_is_that_of_the_torch_modules(name, toy):
    p, h = drawn(name), inputs()
    got = blueprints.get(name).delta(p, h)
    for m in range(SEEDS):
        module = toy.Seed(name, WIDTH).double()
        with torch.no_grad():
            for target, value in zip(module.parameters(), p.values(), strict=True):
                target.copy_(value[m].T.reshape(target.shape))
            torch.testing.assert_close(got[m], module(h[m]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_seeds_do_not_mix(name):
    p, h = drawn(name), inputs()
    before = blueprints.get(name).delta(p, h)
    h2 = h.clone()
    h2[1] += 1 + torch.rand(BATCH, WIDTH)
    after = blueprints.get(name).delta({k: torch.cat([v[:1], 2 * v[1:2] + 1, v[2:]]) for k, v in p.items()}, h2)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.allclose(after[1], before[1])


@pytest.mark.parametrize("name", NAMES)
def test_samples_do_not_mix(name):
    p, h = drawn(name), inputs()
    h2 = h.clone()
    h2[:, 2] = 9.0
    before, after = blueprints.get(name).delta(p, h), blueprints.get(name).delta(p, h2)
    torch.testing.assert_close(after[:, [0, 1, 3, 4]], before[:, [0, 1, 3, 4]])


# At width 5 with a hidden layer of 10:
#   mlp       5*10 + 10 + 10*5 + 5 = 115 parameters; 50 + 50 multiply-adds
#   glu       2*(5*10 + 10) + 10*5 + 5 = 175; 50 + 50 + 50
#   low_rank  5*2 + 2*5 = 20; 10 + 10
#   norm      gain and bias, 10; 4 operations for each of 5 units
@pytest.mark.parametrize(
    ("name", "parameters", "flops"), [("mlp", 115, 100), ("glu", 175, 150), ("low_rank", 20, 20), ("norm", 10, 20)]
)
def test_counts_by_hand(name, parameters, flops):
    blueprint = blueprints.get(name)
    assert blueprint.parameter_count(5) == parameters
    assert blueprint.flops(5) == flops


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [1, 4, 7])
def test_count_is_the_sum_of_the_tensors(name, width, toy):
    count = blueprints.get(name).parameter_count(width)
    assert count == sum(v[0].numel() for v in drawn(name, width).values())
    assert count == sum(p.numel() for p in toy.Seed(name, width).parameters())


def test_norm_survives_a_constant_input():
    p = drawn("norm")
    h = torch.full((SEEDS, BATCH, WIDTH), 3.0, dtype=torch.float64)
    torch.testing.assert_close(blueprints.get("norm").delta(p, h), p["bias"].expand_as(h) - 3.0)


@pytest.mark.parametrize("name", ["glu", "low_rank", "mlp"])
def test_uniform_start_fills_the_bounds_of_nn_linear(name):
    specs = blueprints.get(name).parameters(WIDTH)
    flat = initial(list(specs.values()), seeding.fold(torch.arange(200), 1))
    hidden = {"w3": 12, "b3": 12} if name == "glu" else {"w2": 12, "b2": 12} if name == "mlp" else {"v": 2}
    for key, value in zip(specs, views(list(specs.values()), flat), strict=True):
        bound = hidden.get(key, WIDTH) ** -0.5  # nn.Linear: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), bias too
        assert value.abs().max() <= bound
        assert value.min() < -0.97 * bound
        assert value.max() > 0.97 * bound
        # a mean over n draws from U(-b, b) has a standard deviation of b / sqrt(3 n)
        assert abs(value.mean()) < 5 * bound / (3 * value.numel()) ** 0.5


def test_norm_starts_as_plain_normalisation():
    specs = list(blueprints.get("norm").parameters(WIDTH).values())
    gain, bias = views(specs, initial(specs, torch.arange(3)))
    assert (gain == 1).all()
    assert (bias == 0).all()


def test_views_take_the_flat_vector_in_order():
    specs = [registry.ParameterSpec((2, 3)), registry.ParameterSpec((1, 4))]
    a, b = views(specs, torch.arange(20).view(2, 10))
    assert a.tolist() == [[[0, 1, 2], [3, 4, 5]], [[10, 11, 12], [13, 14, 15]]]
    assert b.tolist() == [[[6, 7, 8, 9]], [[16, 17, 18, 19]]]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("mlp", (False, False, True, False)),
        ("glu", (False, True, True, False)),
        ("low_rank", (False, False, True, False)),
        ("norm", (False, False, False, False)),
    ],
)
def test_flags(name, flags):
    b = blueprints.get(name)
    assert (b.mixes_tokens, b.gated, b.residual, b.widens) == flags


def test_names():
    assert blueprints.available() == NAMES
    assert [blueprints.get(name).name for name in NAMES] == NAMES


def test_unknown_name_lists_the_available():
    with pytest.raises(KeyError) as caught:
        blueprints.get("mpl")
    for name in ("mpl", *NAMES):
        assert name in str(caught.value)


def test_registering_twice_is_refused():
    before = blueprints.get("mlp")
    with pytest.raises(ValueError, match="'mlp' is registered twice"):
        blueprints.register("mlp")(type("Other", (type(before),), {}))
    assert blueprints.get("mlp") is before
    assert type(before).__name__ == "MLP"


def test_a_new_file_in_the_package_is_found(tmp_path, monkeypatch):
    (tmp_path / "widget.py").write_text(
        "from esper.growth.blueprints.low_rank import LowRank\n"
        "from esper.growth.blueprints import register\n"
        "register('widget')(type('Widget', (LowRank,), {}))\n"
    )
    package = importlib.import_module("esper.growth.blueprints")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    try:
        assert blueprints.available() == sorted([*NAMES, "widget"])
        assert blueprints.get("widget").name == "widget"
    finally:
        registry._REGISTRY.pop("widget", None)
        sys.modules.pop("esper.growth.blueprints.widget", None)
        if hasattr(package, "widget"):
            delattr(package, "widget")
