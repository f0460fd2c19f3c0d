import random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.runtime import seeding

WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def mix(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def splitmix(state, count):
    return [mix((state + (i + 1) * GOLDEN) & WORD) for i in range(count)]


def signed(word):
    return word - (1 << 64) if word >> 63 else word


def keys(count, start=0):
    return torch.arange(start, start + count)


def test_reference_has_the_published_values():
    # The stream of seed 1234567, as published with the C code of SplitMix64.
    assert splitmix(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@settings(deadline=None)
@given(INT64)
def test_bits_are_splitmix64_from_the_mixed_key(key):
    expected = [signed(word) for word in splitmix(mix(key & WORD), 5)]
    assert seeding.bits(torch.tensor(key), 5).tolist() == expected


@settings(deadline=None)
@given(INT64, INT64)
def test_fold_of_int_and_tensor_match_the_reference(key, item):
    expected = signed(mix(mix((key + GOLDEN) & WORD) ^ ((item * GOLDEN) & WORD)))
    assert int(seeding.fold(torch.tensor(key), item)) == expected
    assert int(seeding.fold(torch.tensor(key), torch.tensor(item))) == expected


def test_fold_takes_its_data_in_turn():
    key = keys(3)
    assert torch.equal(seeding.fold(key, 4, 5), seeding.fold(seeding.fold(key, 4), 5))
    assert (seeding.fold(key, 4, 5) != seeding.fold(key, 5, 4)).all()
    assert (seeding.fold(key, 0) != key).all()


def test_fold_broadcasts():
    grid = seeding.fold(keys(40)[:, None], keys(30))
    assert grid.shape == (40, 30)
    assert int(grid[7, 11]) == int(seeding.fold(torch.tensor(7), 11))
    assert len(grid.unique()) == 40 * 30


def test_rows_do_not_depend_on_the_batch():
    key = seeding.fold(keys(8), 3)
    size = torch.tensor([5, 1, 9, 0, 7, 13, 2, 4])
    for row in range(8):
        alone = slice(row, row + 1)
        assert torch.equal(seeding.bits(key, 13)[alone], seeding.bits(key[alone], 13))
        assert torch.equal(seeding.uniform(key, 13)[alone], seeding.uniform(key[alone], 13))
        assert torch.equal(seeding.permutation(key, size, 13)[alone], seeding.permutation(key[alone], size[alone], 13))


def test_a_longer_draw_starts_with_the_shorter_one():
    assert torch.equal(seeding.bits(keys(4), 50)[:, :9], seeding.bits(keys(4), 9))


def test_draws_leave_the_global_generators_alone():
    before = torch.get_rng_state()
    seeding.uniform(keys(4), 9)
    seeding.permutation(keys(4), torch.full((4,), 3), 9)
    assert torch.equal(before, torch.get_rng_state())


def test_no_duplicates_over_keys_and_counters():
    assert len(seeding.bits(keys(2000), 50).unique()) == 2000 * 50
    assert len(seeding.fold(keys(100_000)).unique()) == 100_000


def test_uniform_has_24_bits_in_the_unit_interval():
    draws = seeding.uniform(keys(500), 400).double().flatten()
    assert draws.min() >= 0
    assert draws.max() < 1
    scaled = draws * 2**24
    assert torch.equal(scaled, scaled.round())
    assert (scaled % 2 == 1).double().mean() > 0.49  # the last of the 24 bits is in use


def test_uniform_is_uniform():
    draws = seeding.uniform(keys(500), 400).double().flatten()
    n = len(draws)
    # 5 standard errors: sd of the mean is sqrt(1/12/n), that of the mean square about its 1/3 is sqrt(4/45/n).
    assert abs(draws.mean() - 1 / 2) < 5 * (1 / 12 / n) ** 0.5
    assert abs(draws.square().mean() - 1 / 3) < 5 * (4 / 45 / n) ** 0.5
    counts = torch.bincount((draws * 20).long(), minlength=20).double()
    assert ((counts - n / 20) ** 2 / (n / 20)).sum() < 50  # chi-square with 19 degrees: p = 1e-4


def test_neighbours_in_key_and_counter_are_uncorrelated():
    draws = seeding.uniform(keys(300), 300).double() - 0.5
    bound = 5 / 300
    for shifted in (draws.roll(1, 0), draws.roll(1, 1), draws.roll((1, 1), (0, 1)), draws.T):
        same = shifted == draws
        assert abs((draws * shifted * 12).masked_fill(same, 0).mean()) < bound


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=5), INT64)
def test_permutation_rows(sizes, key):
    order = seeding.permutation(seeding.fold(torch.tensor(key), keys(len(sizes))), torch.tensor(sizes), 12)
    for row, size in zip(order.tolist(), sizes, strict=True):
        assert sorted(row[:size]) == list(range(size))
        assert row[size:] == list(range(size, 12))


def test_every_permutation_is_as_likely():
    order = seeding.permutation(keys(6000), torch.full((6000,), 3), 5)[:, :3]
    counts = (order @ torch.tensor([9, 3, 1])).unique(return_counts=True)[1].double()
    assert len(counts) == 6
    assert ((counts - 1000) ** 2 / 1000).sum() < 26  # chi-square with 5 degrees: p = 1e-4


def test_seed_everything_fixes_the_three_generators():
    def draw(seed):
        seeding.seed_everything(seed)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = draw(7)
    assert draw(7) == first
    assert all(a != b for a, b in zip(draw(8), first, strict=True))


def test_seed_everything_takes_large_seeds():
    seeding.seed_everything(2**40 + 1)  # NumPy alone would refuse
