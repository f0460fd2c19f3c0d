import pytest
import torch

KEYS = [11, 12, 13, 14, 15, 16, 17, 18]


@pytest.fixture(scope="module")
def halfway(toy):
    p = toy.population(KEYS[:4])
    toy.walk(p, KEYS[:4], 6)
    return p.state_dict()


def test_a_restored_population_goes_on_bitwise(toy, halfway):
    whole = toy.population(KEYS[:4])
    toy.walk(whole, KEYS[:4], 12)
    restored = toy.population([1, 2, 3, 4])
    toy.walk(restored, [1, 2, 3, 4], 3)
    restored.load_state_dict(halfway)
    toy.walk(restored, KEYS[:4], 6)
    assert toy.differences(whole.state_dict(), restored.state_dict()) == []


def test_state_holds_all_tensors_of_the_population(toy, halfway):
    p = toy.population(KEYS[:4])
    fixed = {"seed_flops", "seed_sizes", "layer_of"}
    changing = {k for k, v in vars(p).items() if isinstance(v, torch.Tensor) and k not in fixed}
    assert changing <= set(halfway)
    for part in ("lifecycle", "context", "statistics"):
        assert set(halfway[part]) == set(vars(getattr(p, part)))


def test_states_are_copies(toy, halfway):
    before = {k: v.clone() for k, v in toy.leaves(halfway).items()}
    p = toy.population(KEYS[:4])
    p.load_state_dict(halfway)
    toy.walk(p, KEYS[:4], 2)
    p.reset(torch.arange(4), toy.context([5, 6, 7, 8]))
    assert all(torch.equal(before[k], v) for k, v in toy.leaves(halfway).items())


def test_a_state_without_one_of_its_keys_is_refused(toy, halfway):
    p = toy.population(KEYS[:4])
    for name in halfway:
        with pytest.raises(KeyError, match=name):
            p.load_state_dict({k: v for k, v in halfway.items() if k != name})


def test_a_state_without_one_of_its_inner_keys_is_refused(toy, halfway):
    p, accepted = toy.population(KEYS[:4]), []
    for part in ("lifecycle", "context", "statistics"):
        for name in halfway[part]:
            inner = {k: v for k, v in halfway[part].items() if k != name}
            try:
                p.load_state_dict({**halfway, part: inner})
            except KeyError:
                continue
            accepted.append(f"{part}.{name}")
    assert accepted == []
