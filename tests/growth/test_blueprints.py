import importlib
import math
import sys

import pytest
import torch

from esper.growth import blueprints
from esper.growth.blueprints import Site, registry
from esper.growth.blueprints.exponential import sigmoid, softmax
from esper.growth.parameters import ParameterTable
from esper.runtime import seeding

NAMES = ["attention", "bypass", "conv", "dilated_conv", "glu", "low_rank", "mlp", "norm", "widen"]
IMAGES = ["channel_attention", "window_attention"]  # tested in test_blueprints_images
MIXERS = ["attention", "conv", "dilated_conv"]
SEEDS, BATCH, WIDTH = 3, 4, 6
SITES = [Site(WIDTH), Site(WIDTH, (7,)), Site(WIDTH, (7,), True), Site(WIDTH, (2, 3)), Site(WIDTH, (20,), True)]
FITTING = [(name, site) for name in NAMES for site in SITES if blueprints.get(name).fits(site)]
WITH_SITES = pytest.mark.parametrize(
    ("name", "site"), FITTING, ids=lambda x: x if isinstance(x, str) else f"{x.grid}{'c' * x.causal}"
)


def drawn(name, site, dtype=torch.float32):
    """Random parameters for all seeds, none of them at a default."""
    g = torch.Generator().manual_seed(5)
    specs = blueprints.get(name).parameters(site)
    return {k: 0.2 + 0.6 * torch.randn(SEEDS, *spec.shape, generator=g).to(dtype) for k, spec in specs.items()}


def inputs(site, seed=6):
    return torch.randn(SEEDS, BATCH * site.tokens, site.width, generator=torch.Generator().manual_seed(seed))


def everything(site):
    return torch.ones(SEEDS, 1, site.width)


def run(name, p, x, site, units=None):
    return blueprints.get(name).delta(p, x, everything(site) if units is None else units, site)


def slow(toy, name, p, m, site, width):
    """Seed m of `width` units in plain torch."""
    seed = toy.Seed(name, width, site.grid, site.causal)
    cuts = [tuple(slice(n) for n in shape) for shape in seed.shapes(width)]
    return seed.fill([value[m][cut] for value, cut in zip(p.values(), cuts, strict=True)])


def close(a, b, rtol=1e-4, atol=2e-5):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# ---- arithmetic ---------------------------------------------------------------------------------------------------


@WITH_SITES
def test_delta_is_that_of_plain_torch(name, site, toy):
    p, x = drawn(name, site), inputs(site)
    got = run(name, p, x, site)
    assert got.shape == x.shape
    for m in range(SEEDS):
        with torch.no_grad():
            expected = slow(toy, name, p, m, site, WIDTH)(x[m].view(BATCH, -1, WIDTH))
        close(got[m], expected.view(-1, WIDTH))


@WITH_SITES
def test_padding_units_do_not_influence_real_ones(name, site, toy):
    """Seeds of 6, 4 and 1 units side by side, as `widths` says; their padding is 0."""
    widths = torch.tensor([6, 4, 1])
    table = ParameterTable(lambda w: list(blueprints.get(name).parameters(Site(w, site.grid, site.causal)).values()), 6)
    flat = torch.cat([value.flatten(1) for value in drawn(name, site).values()], dim=1) * table.owned[widths]
    p = dict(zip(blueprints.get(name).parameters(site), table.views(flat), strict=True))
    units = (torch.arange(6) < widths[:, None]).float()[:, None]
    x = inputs(site) * units
    got = run(name, p, x, site, units)
    for m, w in enumerate(widths.tolist()):
        with torch.no_grad():
            expected = slow(toy, name, p, m, site, w)(x[m, :, :w].reshape(BATCH, -1, w))
        close(got[m, :, :w], expected.view(-1, w))


@WITH_SITES
def test_seeds_do_not_mix(name, site):
    p, x = drawn(name, site), inputs(site)
    x2 = x.clone()
    x2[1] += 1 + torch.rand(x[1].shape)
    before = run(name, p, x, site)
    after = run(name, {k: torch.cat([v[:1], 2 * v[1:2] + 1, v[2:]]) for k, v in p.items()}, x2, site)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.allclose(after[1], before[1])


@WITH_SITES
def test_samples_do_not_mix(name, site):
    p, x = drawn(name, site), inputs(site)
    x2 = x.clone().view(SEEDS, BATCH, -1, WIDTH)
    x2[:, 2] = 9.0
    before, after = (run(name, p, v.view(x.shape), site).view(x2.shape) for v in (x, x2))
    close(after[:, [0, 1, 3]], before[:, [0, 1, 3]])


@WITH_SITES
def test_tokens_mix_only_where_they_should(name, site):
    """What token t says depends on itself; on others only in mixers, and on later ones only where nothing is causal."""
    p, x = drawn(name, site), inputs(site).view(SEEDS, BATCH, -1, WIDTH)
    before = run(name, p, x.view(SEEDS, -1, WIDTH), site).view(x.shape)
    reached = set()
    for changed in range(site.tokens):
        x2 = x.clone()
        x2[:, :, changed] += 1.0
        after = run(name, p, x2.view(SEEDS, -1, WIDTH), site).view(x.shape)
        moved = (after - before).abs().amax((0, 1, 3)) > 1e-4
        reached |= {(changed, token) for token in moved.nonzero().flatten().tolist()}
        if site.causal:
            assert torch.equal(after[:, :, :changed], before[:, :, :changed])
    own = {(token, token) for token in range(site.tokens)}
    if name not in MIXERS:
        assert reached == own
        return
    reach = {"conv": (1,), "dilated_conv": (2,), "attention": range(1, site.tokens)}[name]
    if len(site.grid) == 1:
        steps = {0, *reach, *(-r for r in reach)}
        if site.causal and name != "attention":
            steps = {0, reach[0], 2 * reach[0]}
        elif site.causal:
            steps = {0, *reach}
        assert reached == {(a, b) for a in range(site.tokens) for b in range(site.tokens) if b - a in steps}
    else:
        assert len(reached) > len(own)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_to_one_token_by_hand(causal):
    site = Site(1, (2,), causal)
    p = {"q": 2.0, "k": 3.0, "v": 5.0, "w": 7.0}
    p = {k: torch.full((1, 1, 1), v) for k, v in p.items()} | {"position": torch.tensor([[[0.1, 0.2, 0.3]]])}
    a, b = 0.5, -0.25
    got = blueprints.get("attention").delta(p, torch.tensor([[[a], [b]]]), torch.ones(1, 1, 1), site).flatten()
    # [query, key]: 0.2 to itself, 0.3 to the next, 0.1 to the one before
    scores = [[6 * a * a + 0.2, 6 * a * b + 0.3], [6 * b * a + 0.1, 6 * b * b + 0.2]]
    weights = [[math.exp(s) for s in row] for row in scores]
    if causal:
        weights[0][1] = 0.0
    expected = [35 * (row[0] * a + row[1] * b) / sum(row) for row in weights]
    assert got.tolist() == pytest.approx(expected, rel=1e-5)


def test_norm_survives_a_constant_input():
    site = Site(WIDTH)
    p = drawn("norm", site)
    x = torch.full((SEEDS, BATCH, WIDTH), 3.0)
    close(run("norm", p, x, site), p["bias"].expand_as(x) - 3.0)


# ---- exponentials -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 64), (7, 3, 11)], ids=str)
def test_exponentials_are_those_of_torch(shape):
    x = (8 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
    signal = torch.randn(shape)
    for ours, theirs in ((sigmoid(x), x.sigmoid()), (softmax(x), x.softmax(-1))):
        close(ours, theirs, rtol=1e-5, atol=1e-6)
        close(*(torch.autograd.grad(y, x, signal)[0] for y in (ours, theirs)), rtol=1e-4, atol=1e-6)


def test_softmax_of_masked_and_of_large_scores():
    x = torch.tensor([[1e4, 1e4, -torch.inf], [-1e4, -torch.inf, -torch.inf]]).requires_grad_()
    y = softmax(x)
    assert y.tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]
    assert torch.autograd.grad(y[:, 0].sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("function", [sigmoid, softmax])
def test_exponentials_do_not_depend_on_how_many_there_are(function):
    x = 3 * torch.randn(9, 7, 5, generator=torch.Generator().manual_seed(1))
    for count in range(1, 9):
        assert torch.equal(function(x[:count]), function(x)[:count])
        assert torch.equal(function(x[count:]), function(x)[count:])


# ---- sizes and starts ---------------------------------------------------------------------------------------------


# At width 5, with 7 tokens, and a hidden layer of 10 in mlp and glu:
#   mlp        5*10 + 10 + 10*5 + 5 parameters; 50 + 50 multiply-adds
#   glu        2*(5*10 + 10) + 10*5 + 5; 50 + 50 + 50
#   low_rank   5*2 + 2*5; 10 + 10
#   norm       gain and bias; 4 operations for each of 5 units
#   bypass     5*5 + 5; 25
#   widen      2*5*5 + 5; 25 + 25
#   conv       3*5*5 + 5 + 5*5; 75 + 25 for each token
#   attention  4*5*5 + 2*7 - 1; 4 projections of 7 tokens, and 7*7 products of 5 units twice
@pytest.mark.parametrize(
    ("name", "parameters", "flops"),
    [
        ("mlp", 115, 7 * 100),
        ("glu", 175, 7 * 150),
        ("low_rank", 20, 7 * 20),
        ("norm", 10, 7 * 20),
        ("bypass", 30, 7 * 25),
        ("widen", 55, 7 * 50),
        ("conv", 105, 7 * 100),
        ("dilated_conv", 105, 7 * 100),
        ("attention", 113, 7 * 100 + 2 * 245),
    ],
)
def test_counts_by_hand(name, parameters, flops):
    blueprint, site = blueprints.get(name), Site(5, (7,))
    assert blueprint.parameter_count(site) == parameters
    assert blueprint.flops(site) == flops
    if name not in MIXERS:
        assert blueprint.parameter_count(Site(5)) == parameters
        assert blueprint.flops(Site(5)) == flops / 7


@WITH_SITES
def test_count_is_the_sum_of_the_tensors(name, site, toy):
    count = blueprints.get(name).parameter_count(site)
    assert count == sum(v[0].numel() for v in drawn(name, site).values())
    assert count == sum(p.numel() for p in toy.Seed(name, WIDTH, site.grid, site.causal).parameters())


@WITH_SITES
def test_zero_init_makes_the_delta_exactly_zero_where_there_is_an_output(name, site):
    specs = blueprints.get(name).parameters(site)
    table = ParameterTable(lambda w: list(specs.values()), WIDTH, zero_output=True)
    flat = table.initial(seeding.fold(torch.arange(SEEDS), 1), torch.full((SEEDS,), WIDTH))
    p = dict(zip(specs, table.views(flat), strict=True))
    delta = run(name, p, inputs(site), site)
    assert any(spec.output for spec in specs.values()) == (name != "norm")
    assert bool((delta == 0).all()) == (name != "norm")
    assert name in ("bypass", "norm") or flat.any()  # only what it is linear in


@WITH_SITES
def test_uniform_starts_have_the_fan_of_what_they_sum_over(name, site):
    taps = 3 ** len(site.grid)
    fans = {
        "mlp": [WIDTH, WIDTH, 2 * WIDTH, 2 * WIDTH],
        "glu": [WIDTH] * 4 + [2 * WIDTH] * 2,
        "low_rank": [WIDTH, 2],
        "bypass": [WIDTH] * 2,
        "widen": [WIDTH] * 3,
        "conv": [taps * WIDTH, taps * WIDTH, WIDTH],
        "dilated_conv": [taps * WIDTH, taps * WIDTH, WIDTH],
        "attention": [WIDTH] * 4 + [None],
        "norm": [None, None],
    }[name]
    specs = blueprints.get(name).parameters(site)
    expected = [(fan, "uniform") for fan in fans if fan] + [(None, s.init) for s in specs.values() if s.fan_in is None]
    assert [(spec.fan_in, spec.init) for spec in specs.values()] == expected


def test_norm_starts_as_plain_normalisation():
    specs = blueprints.get("norm").parameters(Site(WIDTH))
    assert {k: s.init for k, s in specs.items()} == {"gain": "ones", "bias": "zeros"}


# ---- the registry -------------------------------------------------------------------------------------------------


def test_what_mixes_tokens_needs_some():
    for name in NAMES:
        blueprint = blueprints.get(name)
        assert blueprint.mixes_tokens == (name in MIXERS)
        assert blueprint.fits(Site(4)) == (name not in MIXERS)
        assert blueprint.fits(Site(4, (1, 1))) == (name not in MIXERS)
        assert blueprint.fits(Site(4, (2,)))
        assert blueprint.fits(Site(4, (1, 2)))


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("mlp", (False, False, True, False, False)),
        ("glu", (False, True, True, False, False)),
        ("low_rank", (False, False, True, False, False)),
        ("norm", (False, False, False, False, False)),
        ("bypass", (False, False, False, False, True)),
        ("widen", (False, False, False, True, True)),
        ("conv", (True, False, True, False, False)),
        ("dilated_conv", (True, False, True, False, False)),
        ("attention", (True, True, True, False, False)),
    ],
)
def test_flags(name, flags):
    b = blueprints.get(name)
    assert (b.mixes_tokens, b.gated, b.residual, b.widens, b.reads_source) == flags


def test_names():
    assert blueprints.available() == sorted([*NAMES, *IMAGES])
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
        assert blueprints.available() == sorted([*NAMES, *IMAGES, "widget"])
        assert blueprints.get("widget").name == "widget"
    finally:
        registry._REGISTRY.pop("widget", None)
        sys.modules.pop("esper.growth.blueprints.widget", None)
        if hasattr(package, "widget"):
            delattr(package, "widget")
