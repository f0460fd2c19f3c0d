"""MaskedCategorical against torch.distributions on the legal subset, and what must never happen to illegal actions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical

from esper.tamiyo.distribution import MaskedCategorical


def random_case(seed: int, rows: int = 16, actions: int = 7, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits and a mask with at least one legal action in each row."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, actions, generator=generator) < 0.5
    mask[torch.arange(rows), torch.randint(actions, (rows,), generator=generator)] = True
    return scale * torch.randn(rows, actions, generator=generator), mask


def legal_subset(logits: Tensor, mask: Tensor) -> list[Categorical]:
    """One distribution per row over its legal actions alone, in double precision."""
    return [Categorical(logits=row[legal].double()) for row, legal in zip(logits, mask, strict=True)]


# ---- values ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.0, 0.1, 3.0, 50.0]))
def test_log_prob_and_entropy_are_those_of_the_legal_subset(seed: int, scale: float) -> None:
    logits, mask = random_case(seed, scale=scale)
    distribution = MaskedCategorical(logits, mask)
    entropy = distribution.entropy()
    for row, expected in enumerate(legal_subset(logits, mask)):
        legal = mask[row].nonzero().squeeze(1)
        got = torch.stack([distribution.log_prob(action.expand(len(mask)))[row] for action in legal])
        torch.testing.assert_close(got.double(), expected.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entropy[row].double(), expected.entropy(), atol=1e-5, rtol=1e-5)


def test_by_hand() -> None:
    # Odds 1 : 9 : 3. Without the middle one 1 : 3, so probabilities 1/4 and 3/4 and an entropy of
    # 1/4 ln 4 + 3/4 ln(4/3) = 0.3466 + 0.2158 = 0.5623.
    distribution = MaskedCategorical(torch.tensor([[1.0, 9.0, 3.0]]).log(), torch.tensor([[True, True, True]]))
    assert distribution.probs.tolist()[0] == pytest.approx([1 / 13, 9 / 13, 3 / 13])
    distribution = MaskedCategorical(torch.tensor([[1.0, 9.0, 3.0]]).log(), torch.tensor([[True, False, True]]))
    assert distribution.probs.tolist()[0] == pytest.approx([0.25, 0.0, 0.75])
    assert float(distribution.entropy()) == pytest.approx(0.5623, abs=1e-4)


def test_an_illegal_action_has_probability_exactly_0() -> None:
    logits, mask = random_case(0, scale=30.0)
    distribution = MaskedCategorical(logits, mask)
    assert (distribution.probs[~mask] == 0).all()
    for action in range(mask.shape[1]):
        log_prob = distribution.log_prob(torch.full((len(mask),), action))
        assert (log_prob[~mask[:, action]] == -torch.inf).all()
        assert log_prob[mask[:, action]].isfinite().all()


def test_a_single_legal_action_is_certain() -> None:
    distribution = MaskedCategorical(torch.tensor([[5.0, -7.0, 2.0]]), torch.tensor([[False, True, False]]))
    assert distribution.probs.tolist() == [[0, 1, 0]]
    assert float(distribution.entropy()) == 0
    assert distribution.log_prob(torch.tensor([1])).tolist() == [0]
    assert distribution.sample().tolist() == distribution.mode().tolist() == [1]


def test_the_mode_is_the_best_legal_action() -> None:
    logits = torch.tensor([[1.0, 9.0, 3.0], [1.0, 9.0, 3.0], [-5.0, 9.0, 3.0]])
    mask = torch.tensor([[True, False, True], [True, True, True], [True, False, False]])
    assert MaskedCategorical(logits, mask).mode().tolist() == [2, 1, 0]


# ---- sampling --------------------------------------------------------------------------------------------------------


def test_a_million_draws_are_legal() -> None:
    # Half of the rows put nearly all unmasked probability on illegal actions.
    logits, mask = random_case(1, rows=1000, actions=9)
    logits[:500] = logits[:500].masked_fill(~mask[:500], 80.0)
    distribution = MaskedCategorical(logits.repeat(250, 1), mask.repeat(250, 1))
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        actions = distribution.sample(generator)
        assert distribution.mask.gather(1, actions[:, None]).all()


def test_frequencies_are_the_probabilities() -> None:
    logits, mask = random_case(2, rows=1, actions=6, scale=1.0)
    distribution = MaskedCategorical(logits.repeat(100_000, 1), mask.repeat(100_000, 1))
    actions = distribution.sample(torch.Generator().manual_seed(0))
    frequency = torch.bincount(actions, minlength=6) / len(actions)
    # The standard deviation of a frequency is at most 0.5 / sqrt(100,000) = 0.0016.
    torch.testing.assert_close(frequency, distribution.probs[0], atol=0.008, rtol=0)


def test_sampling_follows_the_generator_and_nothing_else() -> None:
    distribution = MaskedCategorical(*random_case(3, rows=200))
    state = torch.get_rng_state()
    one, two, other = (distribution.sample(torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


# ---- gradients -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.1, 3.0, 100.0]))
def test_illegal_logits_get_exactly_no_gradient(seed: int, scale: float) -> None:
    logits, mask = random_case(seed, scale=scale)
    logits.requires_grad_()
    distribution = MaskedCategorical(logits, mask)
    actions = distribution.sample(torch.Generator().manual_seed(seed))
    (distribution.log_prob(actions) + 0.3 * distribution.entropy()).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[~mask] == 0).all()


def test_gradients_are_those_of_the_legal_subset() -> None:
    logits, mask = random_case(4)
    logits.requires_grad_()
    distribution = MaskedCategorical(logits, mask)
    actions = distribution.mode()
    (distribution.log_prob(actions) + 0.3 * distribution.entropy()).sum().backward()
    got = logits.grad
    reference = logits.detach().clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for row, subset in enumerate(legal_subset(reference, mask)):
        position = int(mask[row, : actions[row]].sum())  # of the action among the legal ones
        total = total + subset.log_prob(torch.tensor(position)) + 0.3 * subset.entropy()
    total.backward()
    torch.testing.assert_close(got, reference.grad, atol=1e-5, rtol=1e-5)
    assert got is not None
    assert got[mask.sum(1) > 1].any()


@pytest.mark.parametrize(
    ("dtype", "large"), [(torch.float16, 6e4), (torch.bfloat16, 1e30), (torch.float32, 1e30)], ids=str
)
def test_large_logits_of_any_dtype_give_no_nan(dtype: torch.dtype, large: float) -> None:
    logits, mask = random_case(5, scale=1.0)
    logits = (large * logits.sign()).to(dtype).requires_grad_()
    distribution = MaskedCategorical(logits, mask)
    assert distribution.log_probs.dtype == torch.float32
    assert not distribution.log_probs.isnan().any()
    torch.testing.assert_close(distribution.probs.sum(1), torch.ones(len(mask)))
    entropy = distribution.entropy()
    assert (entropy >= 0).all()
    (distribution.log_prob(distribution.mode()) + entropy).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[~mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_logits_are_used_as_fp32(dtype: torch.dtype) -> None:
    logits, mask = random_case(6)
    half = logits.to(dtype)
    one, other = MaskedCategorical(half, mask), MaskedCategorical(half.float(), mask)
    assert torch.equal(one.log_probs, other.log_probs)
    assert torch.equal(one.entropy(), other.entropy())
