"""The blueprints for images, whose grid changes from call to call."""

import math

import pytest
import torch

from esper.growth import blueprints
from esper.growth.blueprints import Site
from esper.growth.parameters import ParameterTable
from esper.runtime import seeding

NAMES = ["channel_attention", "window_attention"]
BATCH = 2
WIDTHS = (5, 2)  # of the seeds of a stack
GRIDS = [(8, 8), (3, 2), (8, 11), (17, 5), (16, 8), (1, 9)]
SITES = pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g[0]}x{g[1]}")
BOTH = pytest.mark.parametrize("name", NAMES)


def table(name, grid, zero_output=False):
    return ParameterTable(
        lambda w: list(blueprints.get(name).parameters(Site(w, grid)).values()), max(WIDTHS), zero_output
    )


def stack(name, grid, widths=WIDTHS, seed=0, dtype=torch.float32):
    """Parameters, input and units of seeds of `widths` units side by side; what they don't own is 0."""
    g = torch.Generator().manual_seed(seed)
    widths, layout = torch.tensor(widths), table(name, grid)
    flat = torch.randn(len(widths), layout.size, generator=g, dtype=dtype) * 0.5 * layout.owned[widths].to(dtype)
    site = Site(max(WIDTHS), grid)
    p = dict(zip(blueprints.get(name).parameters(site), layout.views(flat), strict=True))
    units = (torch.arange(max(WIDTHS)) < widths[:, None]).to(dtype)[:, None]
    return p, torch.randn(len(widths), BATCH * site.tokens, max(WIDTHS), generator=g, dtype=dtype) * units, units, site


def delta(name, p, x, units, site):
    return blueprints.get(name).delta(p, x, units, site)


def one(p, x, m):
    """Seed m alone."""
    return {key: value[m : m + 1] for key, value in p.items()}, x[m : m + 1]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


# ---- slowly: one sample of one seed at a time, of its own width -----------------------------------------------------


def own(p, m, width):
    """The parameters of seed m in their own sizes."""
    hidden = max(width // 4, 1)
    shapes = {
        "w1": (width, hidden), "b1": (1, hidden), "w2": (hidden, width), "b2": (1, width), "position": (1, 225)
    }  # fmt: skip
    return {key: value[m][tuple(slice(n) for n in shapes.get(key, (width, width)))] for key, value in p.items()}


def slow_channel_attention(p, x, grid):
    """x [tokens, width]."""
    mean = sum(x) / len(x)
    gate = torch.sigmoid(torch.relu(mean @ p["w1"] + p["b1"][0]) @ p["w2"] + p["b2"][0])
    return torch.stack([(token * gate) @ p["w"] for token in x])


def slow_window_attention(p, x, grid):
    """x [tokens, width]; query by query, with the tokens of the same window only."""
    height, width = grid
    places = [(row, column) for row in range(height) for column in range(width)]
    out = []
    for here, (row, column) in enumerate(places):
        near = [i for i, (r, c) in enumerate(places) if (r // 8, c // 8) == (row // 8, column // 8)]
        steps = [(r - row, c - column) for r, c in (places[i] for i in near)]
        bias = p["position"][0, [15 * (down + 7) + right + 7 for down, right in steps]]
        shares = ((x[near] @ p["k"]) @ (x[here] @ p["q"]) / math.sqrt(x.shape[1]) + bias).exp()
        out.append((shares / shares.sum()) @ (x[near] @ p["v"]) @ p["w"])
    return torch.stack(out)


SLOW = {"channel_attention": slow_channel_attention, "window_attention": slow_window_attention}


@BOTH
@SITES
def test_delta_is_that_of_a_loop(name, grid):
    """With two seeds of different widths; the padding of the narrower one has no influence."""
    p, x, units, site = stack(name, grid)
    got = delta(name, p, x, units, site)
    assert got.shape == x.shape
    assert not got[1, :, WIDTHS[1] :].any()
    for m, width in enumerate(WIDTHS):
        for sample in range(BATCH):
            rows = slice(sample * site.tokens, (sample + 1) * site.tokens)
            close(got[m, rows, :width], SLOW[name](own(p, m, width), x[m, rows, :width], grid))


@BOTH
def test_a_narrow_seed_is_that_of_a_narrow_site(name):
    """Which has no padding at all."""
    grid, width = (9, 10), WIDTHS[1]
    p, x, units, site = stack(name, grid)
    alone = delta(
        name,
        {k: v[None] for k, v in own(p, 1, width).items()},
        x[1:, :, :width],
        torch.ones(1, 1, width),
        Site(width, grid),
    )
    close(delta(name, p, x, units, site)[1:, :, :width], alone)


@BOTH
@SITES
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_seed_alone_gives_what_it_gives_in_a_stack(name, grid, backend):
    from esper.attention import using

    p, x, units, site = stack(name, grid, (5, 2, 3))
    with using(backend):
        together = delta(name, p, x, units, site)
        for m in range(3):
            assert torch.equal(delta(name, *one(p, x, m), units[m : m + 1], site)[0], together[m])
        order = [2, 0, 1]
        mixed = delta(name, {k: v[order] for k, v in p.items()}, x[order], units[order], site)
    assert torch.equal(mixed, together[order])


@BOTH
def test_a_sample_alone_gives_what_it_gives_in_a_batch(name):
    p, x, units, site = stack(name, (9, 10))
    together = delta(name, p, x, units, site)
    for rows in (slice(90), slice(90, 180)):
        close(delta(name, p, x[:, rows], units, site), together[:, rows])


@BOTH
def test_one_seed_works_on_every_grid(name):
    """Parameters of a small grid are those of a large one; so are counts of them."""
    shapes = {grid: [s.shape for s in blueprints.get(name).parameters(Site(6, grid)).values()] for grid in GRIDS}
    assert len(set(map(tuple, shapes.values()))) == 1
    p, _, units, _ = stack(name, (8, 8))
    for grid in GRIDS:
        site = Site(max(WIDTHS), grid)
        x = torch.randn(len(WIDTHS), 3 * site.tokens, max(WIDTHS)) * units
        assert delta(name, p, x, units, site).isfinite().all()


# ---- who sees whom ------------------------------------------------------------------------------------------------


def test_channel_attention_does_not_know_where_tokens_lie():
    p, x, units, site = stack("channel_attention", (9, 10))
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1))

    def shuffled(y):
        return y.view(len(y), BATCH, 90, -1)[:, :, order].reshape(y.shape)

    got = delta("channel_attention", p, shuffled(x), units, site)
    close(got, shuffled(delta("channel_attention", p, x, units, site)))


def test_tokens_see_their_window_only():
    grid = (11, 9)
    p, x, units, site = stack("window_attention", grid)
    x2 = x.clone().view(len(x), BATCH, *grid, -1)
    x2[:, :, 9, 3] += 1.0  # in the window of rows 8 to 10 and columns 0 to 7
    before, after = (delta("window_attention", p, y.view(x.shape), units, site).view(x2.shape) for y in (x, x2))
    moved = (before != after).any(-1)[0, 0]
    assert moved[8:, :8].all()
    assert not moved[:8].any()
    assert not moved[:, 8:].any()


def test_padding_tokens_take_no_share():
    """All values are 1, so that any share of padding, whose value is 0, would show."""
    site = Site(1, (3, 10))
    p = {name: torch.ones(1, 1, 1) for name in ("q", "k", "v", "w")} | {"position": torch.randn(1, 1, 225)}
    got = delta("window_attention", p, torch.ones(1, 30, 1), torch.ones(1, 1, 1), site)
    close(got, torch.ones(1, 30, 1))


def test_window_attention_follows_its_position_bias():
    """A large bias for the token right above or left of a query picks that token."""
    grid = (8, 8)
    x = torch.arange(64.0).view(1, 64, 1)
    p = {name: torch.ones(1, 1, 1) for name in ("v", "w")} | {name: torch.zeros(1, 1, 1) for name in ("q", "k")}
    for down, right in ((-1, 0), (0, -1), (0, 0), (2, 3)):
        position = torch.zeros(1, 1, 225)
        position[0, 0, 15 * (down + 7) + right + 7] = 100.0
        got = delta("window_attention", p | {"position": position}, x, torch.ones(1, 1, 1), Site(1, grid)).view(grid)
        image = x.view(grid)
        expected = image[max(down, 0) : 8 + min(down, 0), max(right, 0) : 8 + min(right, 0)]
        close(got[max(-down, 0) : 8 - max(down, 0), max(-right, 0) : 8 - max(right, 0)], expected)


# ---- gradients and numbers ------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("grid", [(8, 8), (3, 9)], ids=str)
def test_gradients_are_finite_and_those_of_the_loop(name, grid):
    p, x, units, site = stack(name, grid)
    p = {key: value.requires_grad_() for key, value in p.items()}
    x.requires_grad_()
    signal = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)) * units
    leaves = [*p.values(), x]
    got = torch.autograd.grad(delta(name, p, x, units, site), leaves, signal)
    total = torch.zeros(())
    for m, width in enumerate(WIDTHS):
        for sample in range(BATCH):
            rows = slice(sample * site.tokens, (sample + 1) * site.tokens)
            slow = SLOW[name](own(p, m, width), x[m, rows, :width], grid)
            total = total + (slow * signal[m, rows, :width]).sum()
    for key, a, b in zip([*p, "x"], got, torch.autograd.grad(total, leaves), strict=True):
        assert a.isfinite().all()
        assert a.any(), key
        # Of the input the engine uses what belongs to the host's units.
        torch.testing.assert_close(a * units if key == "x" else a, b, rtol=1e-3, atol=1e-4, msg=key)


@BOTH
def test_gradients_of_large_scores_are_finite(name):
    p, x, units, site = stack(name, (9, 10))
    p = {key: (100 * value).requires_grad_() for key, value in p.items()}
    got = torch.autograd.grad(delta(name, p, x, units, site).sum(), list(p.values()))
    assert all(g.isfinite().all() for g in got)


@BOTH
def test_padding_keeps_gradient_zero(name):
    """So that an optimiser leaves what a narrow seed does not own at 0."""
    p, x, units, site = stack(name, (9, 10))
    p = {key: value.requires_grad_() for key, value in p.items()}
    grads = torch.autograd.grad((delta(name, p, x, units, site) * units).square().sum(), list(p.values()))
    owned = dict(zip(p, table(name, site.grid).views(table(name, site.grid).owned[[WIDTHS[1]]]), strict=True))
    for (key, kept), grad in zip(owned.items(), grads, strict=True):
        assert not (grad[1] * (1 - kept[0])).any(), key


@BOTH
def test_half_precision(name):
    p, x, units, site = stack(name, (9, 10))
    with torch.autocast("cpu", torch.bfloat16):
        got = delta(name, p, x, units, site)
    expected = delta(name, p, x, units, site)
    assert (got - expected).square().mean() < 1e-3 * expected.square().mean()


@BOTH
def test_double_precision(name):
    p, x, units, site = stack(name, (9, 10), dtype=torch.float64)
    got = delta(name, p, x, units, site)
    assert got.dtype == torch.float64
    close(got.float(), delta(name, {k: v.float() for k, v in p.items()}, x.float(), units.float(), site))


# ---- starts, sizes and places ---------------------------------------------------------------------------------------


@BOTH
def test_starts_at_zero_where_output_weights_do(name):
    _, x, units, site = stack(name, (9, 10))
    layout = table(name, site.grid, zero_output=True)
    flat = layout.initial(seeding.fold(torch.arange(2), 1), torch.tensor(WIDTHS))
    p = dict(zip(blueprints.get(name).parameters(site), layout.views(flat), strict=True))
    assert [key for key, value in p.items() if not value.any()] == {"channel_attention": ["w"]}.get(
        name, ["w", "position"]
    )
    assert not delta(name, p, x, units, site).any()


@BOTH
def test_every_size_grows_with_the_width(name):
    """As ParameterTable asks; at every width there is a hidden unit."""
    before = None
    for width in range(1, 40):
        shapes = [spec.shape for spec in blueprints.get(name).parameters(Site(width, (8, 8))).values()]
        assert min(min(shape) for shape in shapes) >= 1
        if before:
            assert all(a <= b for old, new in zip(before, shapes, strict=True) for a, b in zip(old, new, strict=True))
        before = shapes


# At width 8 on 9x10 tokens, with a hidden layer of 2 in channel_attention:
#   channel_attention  8*2 + 2 + 2*8 + 8 + 8*8 parameters; for each token 8 sums, 8 products and 64 of the projection,
#                      and 2*16 once
#   window_attention   4*8*8 + 15*15; 4 projections of 90 tokens, and in 2*2 windows 64*64 products of 8 units twice
@pytest.mark.parametrize(
    ("name", "parameters", "flops"),
    [("channel_attention", 106, 90 * 80 + 32), ("window_attention", 481, 90 * 256 + 4 * 4096 * 16)],
)
def test_counts_by_hand(name, parameters, flops):
    blueprint, site = blueprints.get(name), Site(8, (9, 10))
    assert blueprint.parameter_count(site) == parameters
    assert blueprint.flops(site) == flops


@BOTH
@pytest.mark.parametrize("site", [Site(4), Site(4, (7,), True), Site(4, (2, 2, 2))], ids=lambda s: str(s.grid))
def test_sizes_are_known_where_it_does_not_fit(name, site):
    """Populations ask for them wherever the blueprint is in the catalogue."""
    assert blueprints.get(name).flops(site) > 0
    assert blueprints.get(name).parameter_count(site) == blueprints.get(name).parameter_count(Site(4, (8, 8)))


def test_where_they_fit():
    channel, window = (blueprints.get(name) for name in NAMES)
    for site, whether in (
        (Site(4, (8, 8)), (True, True)),
        (Site(4, (1, 2)), (True, True)),
        (Site(4, (7,)), (True, False)),
        (Site(4, (2, 2, 2)), (True, False)),
        (Site(4), (False, False)),
        (Site(4, (1, 1)), (False, False)),
        (Site(4, (7,), True), (False, False)),
        (Site(4, (8, 8), True), (False, False)),
    ):
        assert (channel.fits(site), window.fits(site)) == whether, site


@BOTH
def test_flags(name):
    b = blueprints.get(name)
    assert b.name == name
    assert name in blueprints.available()
    assert not b.program  # the stacked engine trains them
    assert (b.mixes_tokens, b.gated, b.residual, b.widens, b.reads_source) == (True, True, True, False, False)
