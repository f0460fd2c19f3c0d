import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.growth.actions import RAMPS, WAIT, ActionLayout, Verb
from esper.growth.lifecycle import Stage

KEYS = [71, 72, 73, 74]
# What DESIGN section 4 lets the controller do in each stage.
ALLOWED = {
    Stage.DORMANT: {Verb.GERMINATE},
    Stage.TRAINING: {Verb.BLEND, Verb.CULL},
    Stage.BLENDING: {Verb.CULL},
    Stage.HOLDING: {Verb.FOSSILIZE, Verb.CULL},
    Stage.FOSSILIZED: set(),
    Stage.EMBARGOED: set(),
}
LAYOUTS = st.builds(ActionLayout, st.integers(1, 5), st.integers(1, 6))


def test_ramps_of_the_design():
    assert RAMPS == (1, 3, 5, 8)


# Two slots, three blueprints: WAIT 0; GERMINATE 1-3 and 4-6; BLEND 7-10 and 11-14; FOSSILIZE 15, 16; CULL 17, 18.
@pytest.mark.parametrize(
    ("number", "verb", "slot", "choice"),
    [
        (0, Verb.WAIT, 0, 0),
        (1, Verb.GERMINATE, 0, 0),
        (3, Verb.GERMINATE, 0, 2),
        (5, Verb.GERMINATE, 1, 1),
        (7, Verb.BLEND, 0, 0),
        (14, Verb.BLEND, 1, 3),
        (15, Verb.FOSSILIZE, 0, 0),
        (16, Verb.FOSSILIZE, 1, 0),
        (17, Verb.CULL, 0, 0),
        (18, Verb.CULL, 1, 0),
    ],
)
def test_numbers_by_hand(number, verb, slot, choice):
    layout = ActionLayout(2, 3)
    assert layout.size == 19
    assert layout.index(verb, slot, choice) == number
    assert tuple(int(column[number]) for column in layout.table()) == (verb, slot, choice)


@settings(deadline=None)
@given(LAYOUTS)
def test_numbering_round_trip(layout):
    rows = list(zip(*(column.tolist() for column in layout.table()), strict=True))
    assert len(rows) == len(set(rows)) == layout.size == 1 + layout.slots * (layout.blueprints + 4 + 1 + 1)
    assert [layout.index(Verb(verb), slot, choice) for verb, slot, choice in rows] == list(range(layout.size))
    assert rows[WAIT] == (Verb.WAIT, 0, 0)


@pytest.mark.parametrize(
    ("verb", "slot", "choice"), [(Verb.GERMINATE, 2, 0), (Verb.GERMINATE, 0, 3), (Verb.CULL, 0, 1), (Verb.WAIT, 1, 0)]
)
def test_no_such_action(verb, slot, choice):
    with pytest.raises(ValueError, match=f"no action {verb.name}.slot {slot}, choice {choice}."):
        ActionLayout(2, 3).index(verb, slot, choice)


def test_mask_against_the_table_in_every_pair_of_stages():
    layout = ActionLayout(2, 3)
    pairs = list(itertools.product(Stage, Stage))
    mask = layout.mask(torch.tensor(pairs))
    assert mask.shape == (36, 19)
    for pair, row in zip(pairs, mask.tolist(), strict=True):
        for verb, slot, choice in zip(*(column.tolist() for column in layout.table()), strict=True):
            expected = verb == Verb.WAIT or Verb(verb) in ALLOWED[pair[slot]]
            assert row[layout.index(Verb(verb), slot, choice)] == expected


@settings(deadline=None)
@given(LAYOUTS, st.data())
def test_wait_is_always_legal(layout, data):
    stages = data.draw(st.lists(st.sampled_from(Stage), min_size=layout.slots, max_size=layout.slots))
    mask = layout.mask(torch.tensor([stages]))
    assert mask.shape == (1, layout.size)
    assert bool(mask[0, WAIT])


def staged(toy):
    """Four hosts that have DORMANT, TRAINING and HOLDING slots, in that order."""
    p = toy.population(KEYS)
    for host in range(4):
        toy.plant(p, host, 2, host)
        p.lifecycle.blend(toy.at(p, host, 2), 1)
    p.train_epoch()
    for host in range(4):
        toy.plant(p, host, 1, 3 - host)
    p.train_epoch()
    assert p.lifecycle.stage.tolist() == [[Stage.DORMANT, Stage.TRAINING, Stage.HOLDING]] * 4
    return p, toy.layout(p)


def test_execute_every_verb(toy):
    p, layout = staged(toy)
    before = p.state_dict()
    actions = [
        layout.index(Verb.GERMINATE, 0, 2),
        layout.index(Verb.BLEND, 1, 3),
        layout.index(Verb.FOSSILIZE, 2),
        layout.index(Verb.CULL, 2),
    ]
    verbs = layout.execute(p, torch.tensor(actions))
    assert verbs.tolist() == [Verb.GERMINATE, Verb.BLEND, Verb.FOSSILIZE, Verb.CULL]
    life = p.lifecycle
    d, t, h = Stage.DORMANT, Stage.TRAINING, Stage.HOLDING
    assert life.stage.tolist() == [[t, t, h], [d, Stage.BLENDING, h], [d, t, Stage.FOSSILIZED], [d, t, Stage.EMBARGOED]]
    assert life.blueprint.tolist() == [[2, 3, 0], [-1, 2, 1], [-1, 1, 2], [-1, 0, -1]]
    assert life.alpha.tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert int(life.ramp[1, 1]) == 8
    ramps = life.ramp.clone()
    ramps[1, 1] = before["lifecycle"]["ramp"][1, 1]
    assert torch.equal(ramps, before["lifecycle"]["ramp"])
    seeds = p.seed_theta[2]
    assert (seeds[0, 0] != 0).any()
    assert torch.equal(seeds[1:], before["seed_theta"][2][1:])
    assert torch.equal(p.theta, before["theta"])


@pytest.mark.parametrize("choice", range(4))
def test_blend_asks_for_its_ramp(toy, choice):
    p, layout = staged(toy)
    layout.execute(p, torch.tensor([WAIT, layout.index(Verb.BLEND, 1, choice)]))
    assert int(p.lifecycle.ramp[1, 1]) == (1, 3, 5, 8)[choice]
    for _ in range((1, 3, 5, 8)[choice]):
        assert p.lifecycle.stage[1, 1] == Stage.BLENDING
        p.train_epoch()
    assert p.lifecycle.stage[1, 1] == Stage.HOLDING


def test_waiting_changes_nothing(toy):
    p, layout = staged(toy)
    before = p.state_dict()
    assert layout.execute(p, torch.zeros(4, dtype=torch.int64)).tolist() == [Verb.WAIT] * 4
    assert toy.differences(before, p.state_dict()) == []


def test_only_the_first_hosts_act(toy):
    p, layout = staged(toy)
    before = p.state_dict()
    layout.execute(p, torch.full((2,), layout.index(Verb.CULL, 1)))
    assert (p.lifecycle.stage[:2, 1] == Stage.EMBARGOED).all()
    for host in (2, 3):
        assert toy.differences(before, p.state_dict(), (host, host)) == []


def test_every_illegal_action_raises_and_changes_nothing(toy):
    p, layout = staged(toy)
    before = p.state_dict()
    legal = layout.index(Verb.GERMINATE, 0, 0)
    illegal = (~layout.mask(p.lifecycle.stage)[2]).nonzero().flatten().tolist()
    # of 1 + 3 * (4 + 4 + 1 + 1) actions, legal are WAIT, 4 GERMINATE(0), 4 BLEND(1), CULL(1), FOSSILIZE(2), CULL(2)
    assert len(illegal) == 31 - 12
    for action in illegal:
        with pytest.raises(ValueError, match=f"action {action} is not legal for host 2"):
            layout.execute(p, torch.tensor([legal, WAIT, action, legal]))
        assert toy.differences(before, p.state_dict()) == []


@pytest.mark.parametrize("wrong", [-1, 31])
def test_a_number_out_of_range_raises_and_changes_nothing(toy, wrong):
    p, layout = staged(toy)
    before = p.state_dict()
    with pytest.raises(ValueError, match=r"must be in \[0, 31\)"):
        layout.execute(p, torch.tensor([1, wrong, 0, 0]))
    assert toy.differences(before, p.state_dict()) == []
