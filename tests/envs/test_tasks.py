import hashlib

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from envs import tasks

SIZES = {"segment": (18, 7, 1100, 400, 810), "digits": (64, 10, 900, 400, 497)}
NAMES = list(SIZES)
# sha256 of the labels of train, validation and test, as one int64 array: 16 hexadecimal digits
FIXED = {"segment": "d47fefbda3b6956f", "digits": "98a47dab8ba680c7"}


def splits(name):
    data = tasks.load(name)
    return [(data.train_x, data.train_y), (data.validation_x, data.validation_y), (data.test_x, data.test_y)]


def raw(name):
    if name == "digits":
        bunch = load_digits()
        return bunch.data, bunch.target
    return tasks._segment()


def ranks(x):
    """Each value's rank among the distinct values of its column; standardising does not change it."""
    return np.stack([np.unique(column, return_inverse=True)[1] for column in x.T], axis=1)


def test_names():
    assert tasks.available() == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_types(name):
    features, classes, *sizes = SIZES[name]
    for (x, y), size in zip(splits(name), sizes, strict=True):
        assert x.shape == (size, features)
        assert y.shape == (size,)
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert x.isfinite().all()
        assert set(y.tolist()) == set(range(classes))


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_fixed(name):
    labels = torch.cat([y for _, y in splits(name)]).numpy().astype("<i8")
    assert hashlib.sha256(labels.tobytes()).hexdigest()[:16] == FIXED[name]


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_out_the_data_set(name):
    # Every sample of the source is in one split, once: compared by ranks, which no scaling changes.
    x, y = raw(name)
    ours = torch.cat([x for x, _ in splits(name)]).numpy()
    unclipped = (np.abs(ours) < 9.99).all(0)
    assert unclipped.sum() > 10
    left = np.column_stack([ranks(x[:, unclipped].astype(np.float32)), y])
    right = np.column_stack([ranks(ours[:, unclipped]), torch.cat([y for _, y in splits(name)]).numpy()])
    assert sorted(map(tuple, left)) == sorted(map(tuple, right))


@pytest.mark.parametrize("name", NAMES)
def test_classes_are_spread_over_the_splits(name):
    _, classes, *_ = SIZES[name]
    for _, y in splits(name):
        counts = torch.bincount(y, minlength=classes).double()
        expected = len(y) / classes  # both data sets are balanced, to a few samples
        assert ((counts - expected) ** 2 / expected).sum() < 30


@pytest.mark.parametrize("name", NAMES)
def test_standardised_by_the_training_split(name):
    (train, _), (validation, _), (test, _) = splits(name)
    whole = torch.cat([train, validation, test])
    assert whole.abs().max() <= 10
    constant = (train == train[0]).all(0)
    assert (train[:, constant] == 0).all()
    clipped = (train.abs() >= 10).any(0)
    plain = train[:, ~constant & ~clipped].double()
    assert plain.mean(0).abs().max() < 1e-5
    assert (plain.std(0, correction=0) - 1).abs().max() < 1e-5
    assert plain.shape[1] > 10
    for other in (validation, test):
        assert other[:, ~constant & ~clipped].mean(0).abs().max() > 0.01


def test_loading_twice_gives_the_same_tensors():
    assert tasks.load("digits") is tasks.load("digits")
    fresh = tasks.load.__wrapped__("digits")
    assert torch.equal(fresh.train_x, tasks.load("digits").train_x)


def test_unknown_task_lists_the_available():
    with pytest.raises(KeyError) as caught:
        tasks.load("mnist")
    for name in ("mnist", *NAMES):
        assert name in str(caught.value)


def test_a_changed_file_is_refused(monkeypatch):
    monkeypatch.setattr(tasks, "_SEGMENT_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"segment\.csv\.zip is not the expected data set .*reinstall river"):
        tasks.load.__wrapped__("segment")
