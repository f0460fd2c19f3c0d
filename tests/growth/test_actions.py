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


def in_stages(toy, rows, **kwargs):
    """A population whose slots are in the stages `rows` [hosts, slots]."""
    p = toy.population([1] * len(rows), stages=len(rows[0]), **kwargs)
    p.lifecycle.stage[:] = torch.tensor(rows)
    return p


def test_mask_against_the_table_in_every_pair_of_stages(toy):
    pairs = list(itertools.product(Stage, Stage))
    p = in_stages(toy, pairs, task="causal")
    layout = toy.layout(p)
    mask = layout.mask(p)
    assert mask.shape == (36, 1 + 2 * (9 + 4 + 1 + 1))
    for pair, row in zip(pairs, mask.tolist(), strict=True):
        for verb, slot, choice in zip(*(column.tolist() for column in layout.table()), strict=True):
            expected = verb == Verb.WAIT or Verb(verb) in ALLOWED[pair[slot]]
            assert row[layout.index(Verb(verb), slot, choice)] == expected


@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from(Stage), min_size=3, max_size=3), st.integers(0, 3), st.integers(0, 2))
def test_wait_is_always_legal(toy, stages, depth, seeds):
    p = in_stages(toy, [stages])
    p.context.depth[:], p.context.seeds[:] = depth, seeds
    assert bool(toy.layout(p).mask(p)[0, WAIT])


def germinable(toy, p):
    """The names that may be germinated in each slot of the first host."""
    layout = toy.layout(p)
    legal = layout.mask(p)[0]
    return [
        [name for kind, name in enumerate(toy.CATALOGUE) if legal[layout.index(Verb.GERMINATE, slot, kind)]]
        for slot in range(p.slots)
    ]


@pytest.mark.parametrize(("task", "fitting"), [("mlp", 6), ("grid", 9), ("sequence", 9), ("causal", 9)])
def test_only_what_fits_is_germinated(toy, task, fitting):
    p = toy.population([1], task)
    expected = list(toy.CATALOGUE)[:fitting]
    assert germinable(toy, p) == [expected] * 3
    for kind in range(fitting, 9):
        with pytest.raises(ValueError, match="not legal for host 0"):
            toy.layout(p).execute(p, torch.tensor([toy.layout(p).index(Verb.GERMINATE, 1, kind)]))


@pytest.mark.parametrize("depth", [1, 2])
def test_nothing_happens_beyond_a_host_s_depth(toy, depth):
    p = toy.population([1])
    p.context.depth[:] = depth
    p.reset(torch.arange(1), p.context.rows(torch.arange(1)))
    fitting = toy.fitting("mlp")
    assert germinable(toy, p) == [fitting] * depth + [[]] * (3 - depth)
    layout = toy.layout(p)
    with pytest.raises(ValueError, match="not legal for host 0"):
        layout.execute(p, torch.tensor([layout.index(Verb.GERMINATE, depth, 0)]))
    assert not layout.mask(p)[0][layout.table()[1] == depth].any()


def test_a_budget_is_spent_by_germination_and_never_given_back(toy):
    p = toy.population([1, 2])
    p.context.seeds[:] = torch.tensor([2, 9])
    layout, fitting = toy.layout(p), toy.fitting("mlp")

    def do(verb, slot=0, choice=0):
        layout.execute(p, torch.tensor([layout.index(verb, slot, choice), WAIT]))
        p.train_epoch()

    do(Verb.GERMINATE, 0, 2)
    assert germinable(toy, p) == [[], fitting, fitting]
    do(Verb.CULL, 0)
    do(Verb.WAIT)
    assert p.lifecycle.stage[0].tolist() == [Stage.DORMANT] * 3
    assert p.germinated.tolist() == [1, 0]
    assert germinable(toy, p) == [fitting] * 3
    do(Verb.GERMINATE, 1, 0)
    assert p.germinated.tolist() == [2, 0]
    assert germinable(toy, p) == [[]] * 3
    before = p.state_dict()
    for slot in (0, 2):
        with pytest.raises(ValueError, match="not legal for host 0"):
            do(Verb.GERMINATE, slot, 0)
    assert toy.differences(before, p.state_dict()) == []
    do(Verb.BLEND, 1, 0)  # what lives goes on
    do(Verb.CULL, 1)
    do(Verb.WAIT)
    assert germinable(toy, p) == [[]] * 3
    assert layout.mask(p)[1].sum() == 1 + 3 * 6  # the neighbour still has seeds
    p.reset(torch.tensor([0]), p.context.rows(torch.tensor([0])))
    assert p.germinated.tolist() == [0, 0]
    assert germinable(toy, p) == [fitting] * 3


def test_a_host_without_seeds_can_only_wait(toy):
    p = toy.population([1])
    p.context.seeds[:] = 0
    assert toy.layout(p).mask(p).sum() == 1


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
    layout.execute(p, torch.tensor([WAIT, layout.index(Verb.BLEND, 1, choice), WAIT, WAIT]))
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


def test_every_illegal_action_raises_and_changes_nothing(toy):
    p, layout = staged(toy)
    before = p.state_dict()
    legal = layout.index(Verb.GERMINATE, 0, 0)
    illegal = (~layout.mask(p)[2]).nonzero().flatten().tolist()
    # of 1 + 3 * (9 + 4 + 1 + 1) actions, legal are WAIT, 6 GERMINATE(0), 4 BLEND(1), CULL(1), FOSSILIZE(2), CULL(2)
    assert len(illegal) == 46 - 14
    for action in illegal:
        with pytest.raises(ValueError, match=f"action {action} is not legal for host 2"):
            layout.execute(p, torch.tensor([legal, WAIT, action, legal]))
        assert toy.differences(before, p.state_dict()) == []


@pytest.mark.parametrize("wrong", [-1, 46])
def test_a_number_out_of_range_raises_and_changes_nothing(toy, wrong):
    p, layout = staged(toy)
    before = p.state_dict()
    with pytest.raises(ValueError, match=r"must be in \[0, 46\)"):
        layout.execute(p, torch.tensor([1, wrong, 0, 0]))
    assert toy.differences(before, p.state_dict()) == []
