import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.growth.parameters import ParameterSpec, ParameterTable
from esper.runtime import seeding


def specs(width):
    """Each way a parameter can depend on the width, and each way it can start."""
    return [
        ParameterSpec((3, width), fan_in=3),
        ParameterSpec((1, width), "zeros"),
        ParameterSpec((2, width, 2 * width), "he", fan_in=2 * width),
        ParameterSpec((1, width), "ones"),
        ParameterSpec((width, 4), output=True),
    ]


def test_sizes():
    table = ParameterTable(specs, 5)
    assert table.sizes == [15, 5, 100, 5, 20]
    assert table.size == 145
    assert [spec.size for spec in specs(2)] == [6, 2, 16, 2, 8]


@given(st.integers(1, 5))
def test_a_narrower_network_owns_the_leading_entries(width):
    table = ParameterTable(specs, 5)
    at = 0
    for full, own in zip(specs(5), specs(width), strict=True):
        block = table.owned[width, at : at + full.size].view(full.shape)
        for index in torch.cartesian_prod(*[torch.arange(n) for n in full.shape]).tolist():
            inside = all(i < extent for i, extent in zip(index, own.shape, strict=True))
            assert float(block[tuple(index)]) == inside
        at += full.size
    assert float(table.count[width]) == sum(spec.size for spec in specs(width))


def test_width_0_owns_nothing():
    table = ParameterTable(specs, 3)
    assert not table.owned[0].any()
    assert not table.initial(torch.tensor([1]), torch.tensor([0])).any()
    assert table.owned.shape == (4, table.size)


@pytest.mark.parametrize("width", [2, 5])
def test_initial_values(width):
    table = ParameterTable(specs, 5)
    flat = table.initial(seeding.fold(torch.arange(300), 1), torch.full((300,), width))
    assert (flat[:, table.owned[width] == 0] == 0).all()
    own = [
        v[tuple(slice(n) for n in (300, *spec.shape))] for v, spec in zip(table.views(flat), specs(width), strict=True)
    ]
    assert (own[1] == 0).all()
    assert (own[3] == 1).all()
    # uniform as torch.nn.Linear, 1/sqrt(fan_in); he, sqrt(6/fan_in); the last dimension where no fan is given
    for value, bound in ((own[0], 3**-0.5), (own[2], (6 / (2 * width)) ** 0.5), (own[4], 0.5)):
        assert value.abs().max() <= bound
        assert value.min() < -0.97 * bound
        assert value.max() > 0.97 * bound
        # a mean over n draws from U(-b, b) has a standard deviation of b / sqrt(3 n)
        assert abs(value.mean()) < 5 * bound / (3 * value.numel()) ** 0.5
        assert value.std() == pytest.approx(bound / 3**0.5, rel=0.03)


def test_each_key_and_entry_has_a_draw_of_its_own_that_others_do_not_change():
    table = ParameterTable(specs, 5)
    keys, widths = torch.tensor([5, 6, 7]), torch.tensor([5, 3, 5])
    together = table.initial(keys, widths)
    for k in range(3):
        assert torch.equal(table.initial(keys[k : k + 1], widths[k : k + 1])[0], together[k])
    assert len(table.views(together)[2][0].unique()) == 100
    assert not torch.equal(together[0], together[2])


def test_zero_output_starts_outputs_at_zero_only():
    keys, width = torch.tensor([5]), torch.tensor([4])
    usual = ParameterTable(specs, 5)
    zero = ParameterTable(specs, 5, zero_output=True)
    a, b = usual.views(usual.initial(keys, width)), zero.views(zero.initial(keys, width))
    assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
    assert not b[4].any()
    assert a[4].any()


def test_views_take_the_flat_vector_in_order():
    table = ParameterTable(lambda w: [ParameterSpec((2, w)), ParameterSpec((1, 4))], 3)
    flat = torch.arange(20).view(2, 10)
    a, b = table.views(flat)
    assert a.tolist() == [[[0, 1, 2], [3, 4, 5]], [[10, 11, 12], [13, 14, 15]]]
    assert b.tolist() == [[[6, 7, 8, 9]], [[16, 17, 18, 19]]]
    assert a.data_ptr() == flat.data_ptr()
