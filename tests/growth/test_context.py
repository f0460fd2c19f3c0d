from dataclasses import fields

import pytest
import torch

from esper.growth.conditions import BEYOND, NEVER
from esper.growth.context import Context

PER_STAGE = {"condition", "severity", "strike", "strike_severity", "strike_epoch"}


def numbered(start, hosts=3, stages=2):
    """Contexts whose every entry tells the host."""
    c = Context.plain(torch.arange(start, start + hosts), 4, stages)
    for f in fields(Context):
        value = getattr(c, f.name)
        rows = torch.arange(start, start + hosts).view(-1, *[1] * (value.ndim - 1))
        value.copy_(rows.expand_as(value) % 2 if value.dtype == torch.bool else rows.expand_as(value))
    return c


def test_plain_contexts():
    key = torch.tensor([5, 6])
    c = Context.plain(key, 4, 3)
    assert len(c) == 2
    assert torch.equal(c.key, key)
    for f in fields(Context):
        assert getattr(c, f.name).shape == ((2, 3) if f.name in PER_STAGE else (2,))
    assert (c.width == 4).all()
    assert (c.depth == 3).all()
    for value in (c.condition, c.flipped, c.label_noise, c.priced):
        assert not value.any()
    assert (c.strike_epoch == NEVER).all()
    assert (c.shift_epoch == NEVER).all()
    assert (torch.stack([c.seeds, c.train_size, c.first_classes]) >= 1 << 30).all()
    types = {f.name: getattr(c, f.name).dtype for f in fields(Context)}
    assert {n for n, t in types.items() if t == torch.float32} == {
        "learning_rate", "label_noise", "severity", "strike_severity", "flipped"
    }  # fmt: skip
    assert {n for n, t in types.items() if t == torch.bool} == {"priced"}


def test_rows_put_and_cat():
    c = numbered(0)
    taken = c.rows(torch.tensor([2, 0, 2]))
    assert taken.key.tolist() == [2, 0, 2]
    assert taken.condition.tolist() == [[2, 2], [0, 0], [2, 2]]
    taken.key[0] = 99
    assert c.key.tolist() == [0, 1, 2]
    joined = Context.cat([numbered(0), numbered(7, hosts=1)])
    assert len(joined) == 4
    for f in fields(Context):
        assert getattr(joined, f.name).flatten()[-1] == (True if f.name == "priced" else 7)
    other = numbered(8, hosts=2)
    c.put(torch.tensor([2, 0]), other)
    assert c.key.tolist() == [9, 1, 8]
    for f in fields(Context):
        assert torch.equal(getattr(c, f.name)[0], getattr(other, f.name)[1])
        assert torch.equal(getattr(c, f.name)[2], getattr(other, f.name)[0])


@pytest.mark.parametrize(
    ("now", "strikes", "shift"),
    [
        (2, [NEVER, NEVER], BEYOND),
        (3, [3, NEVER], BEYOND),
        (5, [3, 5], BEYOND),
        (6, [3, 5], 6),
        (9, [3, 5], 6),
    ],
)
def test_without_future_keeps_what_has_come(now, strikes, shift):
    c = Context.plain(torch.arange(2), 4, 2)
    c.strike_epoch[1], c.strike[1], c.shift_epoch[1] = torch.tensor([3, 5]), 2, 6
    before = {f.name: getattr(c, f.name).clone() for f in fields(Context)}
    kept = c.without_future(torch.tensor([0, now]))
    assert kept.strike_epoch.tolist() == [[NEVER, NEVER], strikes]
    assert kept.shift_epoch.tolist() == [NEVER, shift]
    for f in fields(Context):
        assert torch.equal(getattr(c, f.name), before[f.name])
        if f.name not in ("strike_epoch", "shift_epoch"):
            assert torch.equal(getattr(kept, f.name), before[f.name])


def test_each_host_has_its_own_present():
    c = Context.plain(torch.arange(2), 4, 1)
    c.strike_epoch[:], c.shift_epoch[:] = 4, 4
    kept = c.without_future(torch.tensor([4, 3]))
    assert kept.strike_epoch.tolist() == [[4], [NEVER]]
    assert kept.shift_epoch.tolist() == [4, BEYOND]
