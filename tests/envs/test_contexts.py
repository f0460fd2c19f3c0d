"""How contexts are drawn: from the key alone, as often as configured, and never what a kind rules out."""

import math
from dataclasses import fields, replace

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from envs import contexts
from envs.contexts import KINDS, ContextsConfig, MixtureConfig, Regime
from esper.growth.conditions import DECOYS, DEFECTS, NEVER, STRIKES, Condition
from esper.growth.context import Context
from esper.runtime import seeding
from esper.runtime.errors import ConfigError

WIDTH, STAGES, EPOCHS, CLASSES = [4, 9], [2, 5], 24, 10
MIXED = MixtureConfig(plain=1, repair=1, sequential=1, shift=1, growth=1)
MANY = 20_000


def config(kind=None, **changes):
    mixture = MixtureConfig(**{kind: 1.0}) if kind else MIXED
    return replace(ContextsConfig(mixture=mixture), **changes)


def draw(settings, keys, stages=STAGES):
    return contexts.draw(settings, WIDTH, stages, EPOCHS, CLASSES, torch.as_tensor(keys))


def many(kind=None, count=MANY, stages=STAGES, **changes):
    return draw(config(kind, **changes), seeding.fold(torch.arange(count), 9), stages)


def columns(context):
    return {f.name: getattr(context, f.name) for f in fields(Context)}


def stages_of(context):
    """bool [N, S]: the stages that a host has."""
    return torch.arange(context.condition.shape[1]) < context.depth[:, None]


def among(value, conditions):
    return torch.isin(value, torch.tensor([int(c) for c in conditions]))


def assert_frequency(hits, probability):
    """hits, bool: within five standard deviations of a binomial."""
    count, found = hits.numel(), float(hits.double().mean())
    assert count > 1000
    assert abs(found - probability) <= 5 * math.sqrt(probability * (1 - probability) / count), (found, probability)


def assert_uniform(u, bins=10):
    """u in [0, 1]: chi-square, which 9 degrees exceed with a probability of 1e-5 at 40."""
    counts = torch.bincount((u.double() * bins).long().clamp(0, bins - 1), minlength=bins).double()
    expected = len(u) / bins
    assert ((counts - expected).square() / expected).sum() < 40


# ---- pure functions of the key ------------------------------------------------------------------------------------

KEYS = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8)


@hypothesis.settings(max_examples=30)
@hypothesis.given(KEYS, st.data())
def test_an_instance_depends_on_its_key_alone(keys, data):
    together, kinds = draw(config(), keys)
    order = data.draw(st.permutations(range(len(keys))))
    shuffled, kinds_shuffled = draw(config(), [keys[i] for i in order])
    for name, value in columns(together).items():
        assert torch.equal(getattr(shuffled, name), value[order]), name
    assert torch.equal(kinds_shuffled, kinds[order])
    alone, kind = draw(config(), keys[-1:])
    for name, value in columns(together).items():
        assert torch.equal(getattr(alone, name), value[-1:]), name
    assert torch.equal(kind, kinds[-1:])


def test_other_keys_are_other_instances():
    context, _ = many(count=500)
    for name in ("learning_rate", "severity", "strike_severity"):
        assert getattr(context, name).unique(dim=0).shape[0] == 500, name


def test_no_instances():
    context, kind = draw(config(), torch.zeros(0, dtype=torch.int64))
    assert len(context) == len(kind) == 0


def test_drawing_does_not_touch_the_global_generators():
    before = torch.get_rng_state()
    many(count=10)
    assert torch.equal(torch.get_rng_state(), before)


def test_room_for_deeper_hosts_does_not_change_a_host():
    mixed, kinds = many(count=2000)
    for depth in (2, 3, 4):
        same = mixed.depth == depth
        alone, kind = many(count=2000, stages=[depth, depth])
        assert torch.equal(kind, kinds)
        for name, value in columns(mixed).items():
            value = value[:, :depth] if value.dim() > 1 else value
            assert torch.equal(getattr(alone, name)[same], value[same]), name


CHANGES = {
    "learning_rate": (lambda c: replace(c, learning_rate=[1e-4, 1e-3]), {"learning_rate"}),
    "train_size": (lambda c: replace(c, regimes=[Regime(1.0, [50, 60], [0.0, 0.0])]), {"train_size"}),
    "label_noise": (lambda c: replace(c, regimes=[Regime(1.0, [400, 700], [0.1, 0.3])]), {"label_noise"}),
    "repair": (lambda c: replace(c, repair=replace(c.repair, defects={"choke": 1.0})), {"condition", "strike"}),
    "decoys": (lambda c: replace(c, repair=replace(c.repair, decoys=0.9)), {"condition", "strike"}),
    "defects": (
        lambda c: replace(c, sequential=replace(c.sequential, defects={"dying": 1.0})),
        {"condition", "strike"},
    ),
    "window": (lambda c: replace(c, sequential=replace(c.sequential, window=[0.1, 0.2])), {"strike_epoch"}),
    "sequential_seeds": (lambda c: replace(c, sequential=replace(c.sequential, seeds=1)), {"seeds"}),
    "classes": (lambda c: replace(c, shift=replace(c.shift, classes=[0.9, 0.9])), {"first_classes"}),
    "flipped": (lambda c: replace(c, shift=replace(c.shift, flipped=[0.9, 0.9])), {"flipped"}),
    "incremental": (
        lambda c: replace(c, shift=replace(c.shift, incremental=0.9)),
        {"first_classes", "flipped"},
    ),
    "shift_window": (lambda c: replace(c, shift=replace(c.shift, window=[0.8, 0.9])), {"shift_epoch"}),
    "growth": (lambda c: replace(c, growth=replace(c.growth, width=[2, 2], seeds=9)), {"width", "seeds"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_moves_no_other_draw(name):
    change, may_move = CHANGES[name]
    before, kinds = many(count=1000)
    after, same_kinds = draw(change(config()), seeding.fold(torch.arange(1000), 9))
    assert torch.equal(kinds, same_kinds)
    moved = {key for key, value in columns(before).items() if not torch.equal(value, getattr(after, key))}
    assert moved == may_move


@pytest.mark.parametrize("kind", KINDS)
def test_what_all_kinds_have_does_not_depend_on_the_kind(kind):
    mixed, _ = many(count=500)
    pure, kinds = many(kind, count=500)
    assert (kinds == KINDS.index(kind)).all()
    shared = ["key", "learning_rate", "train_size", "label_noise", "depth", "severity"]
    for name in shared:
        assert torch.equal(getattr(pure, name), getattr(mixed, name)), name


def test_a_mixture_is_made_of_its_pure_kinds():
    mixed, kinds = many(count=1000)
    for number, kind in enumerate(KINDS):
        pure, _ = many(kind, count=1000)
        of_kind = kinds == number
        assert of_kind.any()
        for name, value in columns(mixed).items():
            assert torch.equal(getattr(pure, name)[of_kind], value[of_kind]), (kind, name)


# ---- what all kinds have ------------------------------------------------------------------------------------------


def test_sizes_and_rates_fill_their_ranges_evenly():
    context, _ = many("plain")
    for value, (low, high) in ((context.width, WIDTH), (context.depth, STAGES)):
        for size in range(low, high + 1):
            assert_frequency(value == size, 1 / (high - low + 1))
    low, high = ContextsConfig().learning_rate
    rate = context.learning_rate.double()
    assert low * (1 - 1e-6) <= rate.min() <= rate.max() <= high * (1 + 1e-6)
    assert_uniform((rate / low).log() / math.log(high / low))


def test_regimes_of_data():
    regimes = [Regime(3.0, [400, 700], [0.0, 0.0]), Regime(1.0, [60, 140], [0.25, 0.45])]
    context, _ = many("plain", regimes=regimes)
    small = context.train_size <= 140
    assert_frequency(small, 0.25)
    assert (context.label_noise[~small] == 0).all()
    for mask, (low, high) in ((small, (60, 140)), (~small, (400, 700))):
        size = context.train_size[mask].double()
        assert low <= size.min() <= size.max() <= high
        assert_uniform(((size + 0.5) / low).log() / math.log((high + 0.5) / low), bins=5)
    noise = context.label_noise[small].double()
    assert 0.25 <= noise.min() <= noise.max() <= 0.45
    assert_uniform((noise - 0.25) / 0.2)


def test_a_range_of_one_value_is_that_value():
    context, _ = many("plain", count=50, learning_rate=[5e-3, 5e-3], regimes=[Regime(1.0, [700, 700], [0.1, 0.1])])
    torch.testing.assert_close(context.learning_rate, torch.full((50,), 5e-3))
    assert set(context.train_size.tolist()) == {700}
    torch.testing.assert_close(context.label_noise, torch.full((50,), 0.1))


def test_draws_do_not_go_together():
    context, kind = many()
    drawn = [context.learning_rate, context.train_size, context.depth, kind, context.severity[:, 0]]
    correlation = torch.corrcoef(torch.stack([value.double() for value in drawn]))
    assert (correlation - torch.eye(len(drawn))).abs().max() < 5 / MANY**0.5


@pytest.mark.parametrize("kind", KINDS)
def test_severities_are_shares(kind):
    context, _ = many(kind, count=2000)
    for severity in (context.severity, context.strike_severity):
        assert ((severity >= 0) & (severity < 1)).all()
    assert_uniform(context.severity[:, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_stages_that_a_host_has_not_are_healthy(kind):
    context, _ = many(kind, count=2000)
    missing = ~stages_of(context)
    assert missing.any()
    for value in (context.condition, context.strike):
        assert (value[missing] == Condition.HEALTHY).all()
    assert (context.strike_epoch[missing] == NEVER).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_strike_leaves_a_stage_as_it_is(kind):
    context, _ = many(kind, count=2000)
    calm = context.strike_epoch == NEVER
    assert torch.equal(context.strike[calm], context.condition[calm])
    assert torch.equal(context.strike_severity[calm], context.severity[calm])


# ---- kinds --------------------------------------------------------------------------------------------------------


def test_kinds_are_as_frequent_as_their_weights():
    weights = {"plain": 1, "repair": 3, "sequential": 4, "shift": 2, "growth": 0}
    _, kind = many(mixture=MixtureConfig(**weights))
    for number, name in enumerate(KINDS):
        assert_frequency(kind == number, weights[name] / 10)


@pytest.mark.parametrize("kind", KINDS)
def test_only_some_kinds_are_priced_limited_or_shifted(kind):
    context, _ = many(kind, count=2000)
    assert (context.priced == (kind == "growth")).all()
    limits = {"sequential": 2, "shift": 3, "growth": 4}
    assert (context.seeds == limits[kind]).all() if kind in limits else (context.seeds >= 1 << 30).all()
    if kind != "shift":
        assert (context.shift_epoch == NEVER).all()
        assert (context.first_classes == CLASSES).all()
        assert (context.flipped == 0).all()
    if kind != "sequential":
        assert (context.strike_epoch == NEVER).all()
    if kind in ("plain", "growth"):
        assert (context.condition == Condition.HEALTHY).all()
    if kind == "shift":
        assert not among(context.condition, DEFECTS).any()
    if kind != "growth":
        assert ((context.width >= WIDTH[0]) & (context.width <= WIDTH[1])).all()


def test_repair_has_at_most_one_defect_of_the_configured_frequency():
    context, _ = many("repair")
    settings = ContextsConfig().repair
    defective = among(context.condition, DEFECTS)
    assert (defective.sum(1) <= 1).all()
    total = sum(settings.defects.values())
    for name, weight in settings.defects.items():
        of_kind = (context.condition == Condition[name.upper()]).any(1) if name != "none" else ~defective.any(1)
        assert_frequency(of_kind, weight / total)
    # Each stage that a host has is the defective one equally often.
    for depth in range(STAGES[0], STAGES[1] + 1):
        place = defective[(context.depth == depth) & defective.any(1)].int().argmax(1)
        for stage in range(depth):
            assert_frequency(place == stage, 1 / depth)


@pytest.mark.parametrize("kind", ["repair", "sequential", "shift"])
def test_decoys_are_as_frequent_as_configured(kind):
    context, _ = many(kind)
    exists = stages_of(context)
    defective = among(context.condition, DEFECTS) | (context.strike_epoch < NEVER)
    if kind == "repair":
        # A host whose defect is "none" has a stage that would have been it and gets no decoy either.
        exists, defective = (part[defective.any(1)] for part in (exists, defective))
        condition = context.condition[among(context.condition, DEFECTS).any(1)]
    else:
        condition = context.condition
    decoy = among(condition, DECOYS)
    assert not (decoy & defective).any()
    others = exists & ~defective
    assert_frequency(decoy[others], 0.45)
    for each in DECOYS:
        assert_frequency(condition[decoy] == each, 1 / len(DECOYS))


def test_sequential_has_as_many_defects_as_configured():
    context, _ = many("sequential", stages=[3, 5])
    settings = ContextsConfig().sequential
    later = context.strike_epoch < NEVER
    defective = among(context.condition, DEFECTS) | later
    for number, probability in enumerate(settings.count):
        assert_frequency(defective.sum(1) == number, probability)
    assert (defective.sum(1) <= 3).all()
    assert_frequency(~later[defective], settings.at_start)
    kinds = torch.where(later, context.strike, context.condition)[defective]
    for name, weight in settings.defects.items():
        assert_frequency(kinds == Condition[name.upper()], weight / sum(settings.defects.values()))


def test_a_shallow_host_has_no_more_defects_than_stages():
    context, _ = many("sequential", count=2000, stages=[1, 2])
    defective = among(context.condition, DEFECTS) | (context.strike_epoch < NEVER)
    assert torch.equal(defective.sum(1).clamp(max=2), defective.sum(1))
    assert (defective.sum(1) <= context.depth).all()


@pytest.mark.parametrize("window", [[0.33, 0.67], [0.0, 1.0], [0.5, 0.5]])
def test_strikes_fall_into_the_window_on_healthy_stages(window):
    settings = config("sequential")
    settings.sequential.window = window
    context, _ = draw(settings, seeding.fold(torch.arange(MANY), 9))
    later = context.strike_epoch < NEVER
    assert later.any()
    assert (context.condition[later] == Condition.HEALTHY).all()
    assert among(context.strike[later], STRIKES).all()
    epochs = context.strike_epoch[later]
    first, last = round(window[0] * EPOCHS), round(window[1] * EPOCHS)
    assert (int(epochs.min()), int(epochs.max())) == (first, last)
    for epoch in range(first + 1, last):
        assert_frequency(epochs == epoch, 1 / (EPOCHS * (window[1] - window[0])))
    assert_uniform(context.strike_severity[later])


def test_shifts():
    context, _ = many("shift")
    settings = ContextsConfig().shift
    incremental = context.flipped == 0
    assert_frequency(incremental, settings.incremental)
    assert (context.first_classes[~incremental] == CLASSES).all()
    met = context.first_classes[incremental]
    assert (int(met.min()), int(met.max())) == (4, 7)  # 0.4 to 0.7 of 10
    assert_frequency(met == 5, 1 / 3)
    assert_frequency(met == 6, 1 / 3)
    assert_uniform((context.flipped[~incremental] - 0.2) / 0.3)
    epochs = context.shift_epoch
    assert (int(epochs.min()), int(epochs.max())) == (round(0.33 * EPOCHS), 12)
    assert_frequency(epochs == 10, 1 / (EPOCHS * 0.17))


def test_a_shift_starts_with_at_least_one_class():
    settings = config("shift")
    settings.shift.classes = [0.0, 0.0]
    context, _ = draw(settings, torch.arange(50))
    assert (context.first_classes >= 1).all()


def test_growth_hosts_have_their_own_width():
    context, _ = many("growth")
    for width in (4, 5, 6):
        assert_frequency(context.width == width, 1 / 3)


# ---- bad settings -------------------------------------------------------------------------------------------------

POOL = 900

BAD = [
    ("mixture.plain", -1.0, r"mixture\.plain=-1\.0: must not be negative"),
    ("mixture", MixtureConfig(), r"mixture=.*at least one weight must be above 0"),
    ("learning_rate", [0.0, 1e-3], r"learning_rate=\[0\.0, 0\.001\]: give \[low, high\] with 1e-08"),
    ("learning_rate", [1e-2, 1e-3], r"learning_rate=\[0\.01, 0\.001\]: give \[low, high\]"),
    ("learning_rate", [1e-2], r"learning_rate=\[0\.01\]: give \[low, high\]"),
    ("learning_rate", [math.nan, 1e-2], r"learning_rate=\[nan, 0\.01\]"),
    ("regimes", [], r"regimes.*at least one"),
    ("regimes", [Regime(0.0)], r"regimes=.*at least one weight must be above 0"),
    ("regimes", [Regime(-1.0)], r"regimes\.0=-1\.0: must not be negative"),
    ("regimes", [Regime(), Regime(1, [10, POOL + 1])], r"regimes\.1\.train_size=\[10, 901\]: .* high <= 900"),
    ("regimes", [Regime(1, [0, 10])], r"regimes\.0\.train_size=\[0, 10\]"),
    ("regimes", [Regime(1, [5, 10], [0.2, 1.2])], r"regimes\.0\.label_noise=\[0\.2, 1\.2\]"),
    ("repair.defects", {"rust": 1.0}, r"repair\.defects\.rust: no such kind; choose from none, choke"),
    ("repair.defects", {"choke": math.nan}, r"repair\.defects\.choke=nan: must not be negative"),
    ("repair.defects", {"choke": 0.0}, r"repair\.defects=.*above 0"),
    ("sequential.defects", {"large_init": 1.0}, r"sequential\.defects\.large_init: no such kind; choose from choke"),
    ("sequential.count", [-0.5, 1.0], r"sequential\.count\.0=-0\.5: must not be negative"),
    ("sequential.count", [], r"sequential\.count=.*above 0"),
    ("sequential.window", [0.5, 1.5], r"sequential\.window=\[0\.5, 1\.5\]"),
    ("shift.window", [-0.1, 0.5], r"shift\.window=\[-0\.1, 0\.5\]"),
    ("shift.classes", [0.7, 0.4], r"shift\.classes=\[0\.7, 0\.4\]"),
    ("shift.flipped", [0.2, 2.0], r"shift\.flipped=\[0\.2, 2\.0\]"),
    ("growth.width", [0, 4], r"growth\.width=\[0, 4\]: give \[low, high\] with 1"),
]

UNCHECKED = [
    ("repair.decoys", 1.5),
    ("repair.decoys", -0.5),
    ("sequential.decoys", 1.5),
    ("shift.decoys", -0.1),
    ("sequential.at_start", 2.0),
    ("shift.incremental", -3.0),
    ("sequential.seeds", 0),
    ("shift.seeds", -1),
    ("growth.seeds", 0),
]


def broken(path, value):
    settings = ContextsConfig(mixture=MixtureConfig(plain=1.0))
    part, _, name = path.rpartition(".")
    setattr(getattr(settings, part) if part else settings, name, value)
    return settings


def test_good_settings_pass():
    ContextsConfig(mixture=MixtureConfig(plain=1.0)).validate("here", POOL)


@pytest.mark.parametrize(("path", "value", "message"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_a_bad_value_is_refused_by_key_value_and_remedy(path, value, message):
    with pytest.raises(ConfigError, match=rf"here\.{message}"):
        broken(path, value).validate("here", POOL)


@pytest.mark.parametrize(("path", "value"), UNCHECKED)
def test_a_share_or_a_number_of_seeds_out_of_range_is_refused(path, value):
    with pytest.raises(ConfigError, match=rf"here\.{path}={value}: "):
        broken(path, value).validate("here", POOL)
