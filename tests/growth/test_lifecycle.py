from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.growth.lifecycle import Event, Lifecycle, LifecycleSpec, Stage, is_kept, is_live, legal

# DESIGN section 4, read by hand.
TABLE = {
    ("DORMANT", "GERMINATE"): "TRAINING",
    ("TRAINING", "BLEND"): "BLENDING",
    ("TRAINING", "CULL"): "EMBARGOED",
    ("BLENDING", "RAMPED"): "HOLDING",
    ("BLENDING", "CULL"): "EMBARGOED",
    ("HOLDING", "FOSSILIZE"): "FOSSILIZED",
    ("HOLDING", "CULL"): "EMBARGOED",
    ("EMBARGOED", "RELEASED"): "DORMANT",
}
PAIRS = [(s, e) for s in Stage for e in Event]
ALPHA = {"BLENDING": 0.4, "HOLDING": 1.0, "FOSSILIZED": 1.0}
LIVE = ("TRAINING", "BLENDING", "HOLDING", "FOSSILIZED")
MANUAL = LifecycleSpec(embargo_epochs=3, auto_blend=None, auto_ramp=3)


def of(*stages):
    """One host whose slots are in `stages`, with values that a default would hide."""
    return Lifecycle(
        stage=torch.tensor([[Stage[s] for s in stages]]),
        blueprint=torch.tensor([[2 if s in LIVE else -1 for s in stages]]),
        alpha=torch.tensor([[ALPHA.get(s, 0.0) for s in stages]]),
        ramp=torch.full((1, len(stages)), 5),
        epochs=torch.full((1, len(stages)), 2),
    )


def snapshot(life):
    return {k: v.clone() for k, v in vars(life).items()}


def same(life, before):
    return all(torch.equal(v, before[k]) for k, v in vars(life).items())


def slot(index, slots):
    return (torch.arange(slots) == index)[None]


def live_for(life, spec, epochs):
    """Stage names of slot 0 after each epoch."""
    names = []
    for _ in range(epochs):
        life.begin_epoch()
        life.end_epoch(spec)
        names.append(Stage(int(life.stage[0, 0])).name)
    return names


@pytest.mark.parametrize(("stage", "event"), PAIRS, ids=lambda x: x.name)
def test_every_pair_against_the_table(stage, event):
    life, target = of(stage.name), TABLE.get((stage.name, event.name))
    assert bool(legal(life.stage, event)) == (target is not None)
    if target is None:
        before = snapshot(life)
        with pytest.raises(ValueError, match=f"{event.name} is not legal in stage {stage.name}"):
            life.fire(event, slot(0, 1))
        assert same(life, before)
    else:
        life.fire(event, slot(0, 1))
        assert Stage(int(life.stage)).name == target
        assert int(life.epochs) == 0


@pytest.mark.parametrize("event", Event, ids=lambda x: x.name)
def test_legal_over_a_grid_of_stages(event):
    stages = torch.tensor([[0, 1, 2], [3, 4, 5]])
    expected = [(stage.name, event.name) in TABLE for stage in Stage]
    assert legal(stages, event).tolist() == [expected[:3], expected[3:]]


def test_one_refused_slot_stops_the_others():
    life = of("HOLDING", "TRAINING", "BLENDING")
    before = snapshot(life)
    with pytest.raises(ValueError, match=r"FOSSILIZE is not legal in stage TRAINING \(host 0, slot 1\)"):
        life.fire(Event.FOSSILIZE, torch.tensor([[True, True, False]]))
    assert same(life, before)


@pytest.mark.parametrize("act", [lambda x, w: x.germinate(w, w.long()), lambda x, w: x.blend(w, 8)])
def test_refused_germinate_and_blend_change_nothing(act):
    life = of("HOLDING", "EMBARGOED")
    before = snapshot(life)
    with pytest.raises(ValueError, match="is not legal"):
        act(life, torch.tensor([[True, False]]))
    assert same(life, before)


def test_fire_touches_only_the_slots_asked_for():
    life = of("HOLDING", "HOLDING", "BLENDING")
    before = snapshot(life)
    life.fire(Event.CULL, slot(1, 3))
    for name, value in vars(life).items():
        assert torch.equal(value[0, [0, 2]], before[name][0, [0, 2]])


def test_germinate_sets_the_blueprint_of_its_slots_only():
    life = of("DORMANT", "DORMANT", "HOLDING")
    life.germinate(torch.tensor([[False, True, False]]), torch.tensor([[3, 0, 1]]))
    assert life.blueprint.tolist() == [[-1, 0, 2]]
    assert life.stage.tolist() == [[Stage.DORMANT, Stage.TRAINING, Stage.HOLDING]]


@pytest.mark.parametrize("ramp", [1, 3, 5, 8])
def test_alpha_climbs_its_ramp_and_holds_at_one(ramp):
    life = of("TRAINING")
    life.blend(slot(0, 1), ramp)
    for done in range(1, ramp + 1):
        assert Stage(int(life.stage)) == Stage.BLENDING
        life.begin_epoch()
        expected = torch.tensor(float(Fraction(done, ramp)))  # float32 rounding of the exact fraction
        assert float(life.alpha) == float(expected)
        life.end_epoch(MANUAL)
    assert float(life.alpha) == 1.0
    assert live_for(life, MANUAL, 10) == ["HOLDING"] * 10
    assert float(life.alpha) == 1.0


def test_each_slot_has_a_ramp_of_its_own():
    life = of("TRAINING", "TRAINING", "BLENDING")
    life.blend(torch.tensor([[True, True, False]]), torch.tensor([[1, 8, 3]]))
    assert life.ramp.tolist() == [[1, 8, 5]]
    life.begin_epoch()
    # slot 2 has done 2 of 5 epochs and is in its third
    assert life.alpha.tolist()[0] == pytest.approx([1.0, 1 / 8, 3 / 5])


def test_alpha_stays_put_outside_blending():
    life = of("DORMANT", "TRAINING", "HOLDING", "FOSSILIZED", "EMBARGOED")
    life.begin_epoch()
    assert life.alpha.tolist() == [[0.0, 0.0, 1.0, 1.0, 0.0]]


@pytest.mark.parametrize("wait", [1, 2, 4])
def test_auto_blend_after_exactly_so_many_epochs(wait):
    spec = LifecycleSpec(embargo_epochs=3, auto_blend=wait, auto_ramp=2)
    life = of("DORMANT")
    life.germinate(slot(0, 1), torch.tensor([[1]]))
    expected = ["TRAINING"] * (wait - 1) + ["BLENDING"] * 2 + ["HOLDING"] * 3
    assert live_for(life, spec, len(expected)) == expected
    assert int(life.ramp) == 2


def test_without_auto_blend_training_goes_on():
    life = of("DORMANT")
    life.germinate(slot(0, 1), torch.tensor([[1]]))
    assert live_for(life, MANUAL, 12) == ["TRAINING"] * 12


@pytest.mark.parametrize("rest", [1, 2, 3, 5])
def test_embargo_lasts_exactly_so_long(rest):
    life = of("HOLDING")
    life.fire(Event.CULL, slot(0, 1))
    names = live_for(life, LifecycleSpec(embargo_epochs=rest, auto_blend=1), rest + 2)
    assert names == ["EMBARGOED"] * (rest - 1) + ["DORMANT"] * 3


@pytest.mark.parametrize("stage", ["TRAINING", "BLENDING", "HOLDING"])
def test_cull_clears_alpha_and_blueprint(stage):
    life = of(stage)
    life.fire(Event.CULL, slot(0, 1))
    assert (float(life.alpha), int(life.blueprint)) == (0.0, -1)


def test_reset_empties_only_its_hosts():
    life = Lifecycle(*(torch.cat([v, v, v]) for v in vars(of("BLENDING", "HOLDING")).values()))
    before = snapshot(life)
    life.reset(torch.tensor([2, 0]))
    fresh = Lifecycle.dormant(1, 2)
    for name, value in vars(life).items():
        assert torch.equal(value[1], before[name][1])
        assert torch.equal(value[0], getattr(fresh, name)[0])
        assert torch.equal(value[2], getattr(fresh, name)[0])


def test_dormant_is_empty():
    life = Lifecycle.dormant(2, 3)
    assert (life.stage == Stage.DORMANT).all()
    assert (life.blueprint == -1).all()
    assert (life.alpha == 0).all()


def test_who_lives_and_who_is_kept():
    stages = torch.arange(len(Stage))
    assert [s.name for s in Stage if is_live(stages)[s]] == list(LIVE)
    assert [s.name for s in Stage if is_kept(stages)[s]] == ["HOLDING", "FOSSILIZED"]


class Slot:
    """One slot as a state machine in plain Python."""

    def __init__(self):
        self.stage, self.kind, self.done, self.ramp, self.alpha = "DORMANT", None, 0, 1, 0.0

    def event(self, name, value):
        self.stage, self.done = TABLE[self.stage, name], 0
        if name == "GERMINATE":
            self.kind = value
        if name == "BLEND":
            self.ramp = value
        if name == "CULL":
            self.kind, self.alpha = None, 0.0

    def epoch(self, spec):
        if self.stage == "BLENDING":
            self.alpha = (self.done + 1) / self.ramp
        self.done += 1
        if self.stage == "BLENDING" and self.done >= self.ramp:
            self.event("RAMPED", None)
        elif self.stage == "EMBARGOED" and self.done >= spec.embargo_epochs:
            self.event("RELEASED", None)
        elif self.stage == "TRAINING" and spec.auto_blend is not None and self.done >= spec.auto_blend:
            self.event("BLEND", spec.auto_ramp)


BY_HAND = ("GERMINATE", "BLEND", "FOSSILIZE", "CULL")
STEPS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 3), st.sampled_from([1, 3, 5, 8])),
    min_size=10,
    max_size=60,
)


@settings(deadline=None)
@given(STEPS, st.integers(1, 4), st.sampled_from([None, 1, 2]), st.integers(1, 3))
def test_random_walks_keep_to_the_model(steps, embargo, auto_blend, every):
    spec = LifecycleSpec(embargo_epochs=embargo, auto_blend=auto_blend, auto_ramp=2)
    life, model = Lifecycle.dormant(2, 3), [[Slot() for _ in range(3)] for _ in range(2)]
    for count, (host, at, pick, value) in enumerate(steps):
        choices = [name for name in BY_HAND if (model[host][at].stage, name) in TABLE]
        where = torch.zeros(2, 3, dtype=torch.bool)
        where[host, at] = True
        if choices:
            name = choices[pick % len(choices)]
            model[host][at].event(name, value)
            if name == "GERMINATE":
                life.germinate(where, torch.full((2, 3), value))
            elif name == "BLEND":
                life.blend(where, value)
            else:
                life.fire(Event[name], where)
        if count % every == 0:
            life.begin_epoch()
            life.end_epoch(spec)
            for slots in model:
                for one in slots:
                    one.epoch(spec)
        for h, slots in enumerate(model):
            for s, one in enumerate(slots):
                assert Stage(int(life.stage[h, s])).name == one.stage
                assert int(life.epochs[h, s]) == one.done
                assert int(life.blueprint[h, s]) == (-1 if one.kind is None else one.kind)
                assert float(life.alpha[h, s]) == float(torch.tensor(one.alpha))
                assert (one.kind is not None) == (one.stage in LIVE)
                assert one.alpha == 0 or one.stage in ALPHA
                assert one.alpha == 1 or one.stage not in ("HOLDING", "FOSSILIZED")
