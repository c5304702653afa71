# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Images: the digits of scikit-learn, MNIST and Fashion-MNIST from files the user has."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from pyro_cpa.datasets.dataset import Dataset, split_rows
from pyro_cpa.datasets.files import read_idx, read_npz
from pyro_cpa.errors import InvalidData

__all__ = [
    "load_digits",
    "load_fashion_mnist",
    "load_mnist",
]

ENVIRONMENT_VARIABLE = "PYRO_CPA_DATA"


def load_digits(num_test: int = 297, *, seed: int = 0) -> Dataset:
    """The 1797 digits of 8 x 8 pixels that come with scikit-learn, pixels in [0, 1].

    Args:
        num_test: Rows kept for testing.
        seed: Of the shuffle before the split.

    Raises:
        InvalidData: If scikit-learn is not installed, or ``num_test`` leaves nothing to train on.

    Example:
        >>> digits = load_digits()
        >>> digits.x_train.shape, digits.x_test.shape, digits.image_shape
        (torch.Size([1500, 64]), torch.Size([297, 64]), (8, 8))
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise InvalidData(
            "scikit-learn, which brings the digits, is missing: pip install scikit-learn."
        ) from error
    images, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16).to(torch.get_default_dtype()), torch.tensor(labels).long()
    train, test = split_rows(len(x), num_test, seed)
    return Dataset(x[train], x[test], y[train], y[test], image_shape=(8, 8))


def load_mnist(path: str | Path | None = None) -> Dataset:
    """MNIST from the user's files: 60000 and 10000 images of 28 x 28 pixels in [0, 1].

    Args:
        path: An ``.npz`` file with ``x_train``, ``x_test`` and, if it has labels, ``y_train`` and ``y_test``;
            or a folder with the four idx files (plain or ``.gz``), or with such a file or folder named as
            torchvision or Keras do. If None, the folder of the environment variable ``PYRO_CPA_DATA``,
            ``/usr/share/datasets`` and ``~/.keras/datasets`` are searched.

    Raises:
        InvalidData: If nothing is found (the message says where it was sought and where to get it), or a
            file is truncated or foreign.
    """
    places = ("mnist.npz", "mnist", "MNIST/raw")
    cure = (
        "Get mnist.npz from https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz, or let "
        "torchvision.datasets.MNIST(folder, download=True) write the idx files"
    )
    return _load_images("MNIST", places, path, cure)


def load_fashion_mnist(path: str | Path | None = None) -> Dataset:
    """Fashion-MNIST from the user's files, in the shape of MNIST; arguments as for :func:`load_mnist`.

    Raises:
        InvalidData: As for :func:`load_mnist`.
    """
    places = ("fashion-mnist.npz", "fashion_mnist.npz", "fashion-mnist", "FashionMNIST/raw")
    cure = (
        "On Debian and Ubuntu: apt-get install dataset-fashion-mnist. Elsewhere get the four idx files from "
        "https://github.com/zalandoresearch/fashion-mnist"
    )
    return _load_images("Fashion-MNIST", places, path, cure)


def _load_images(name: str, places: tuple[str, ...], path: str | Path | None, cure: str) -> Dataset:
    if path is not None:
        roots = [Path(path).expanduser()]
    else:
        own = os.environ.get(ENVIRONMENT_VARIABLE)
        roots = [Path(own).expanduser()] if own else []
        roots += [Path("/usr/share/datasets"), Path("~/.keras/datasets").expanduser()]
    candidates = [root / place for root in roots for place in places]
    if path is not None:
        candidates = [roots[0], *candidates]
    for candidate in candidates:
        if candidate.is_file():
            return _images(read_npz(candidate), candidate)
        files = _idx_files(candidate)
        if files is not None:
            return _images({key: read_idx(file).numpy() for key, file in files.items()}, candidate)
    sought = ", ".join(map(str, candidates))
    raise InvalidData(
        f"{name} was not found; sought: {sought}. {cure}, and give its place as path= or its "
        f"folder in the environment variable {ENVIRONMENT_VARIABLE}."
    )


def _idx_files(folder: Path) -> dict[str, Path] | None:
    """The four files of an MNIST-like set by what they hold, or None if one is missing."""
    stems = {
        "x_train": "train-images",
        "y_train": "train-labels",
        "x_test": "t10k-images",
        "y_test": "t10k-labels",
    }
    found = {}
    for key, stem in stems.items():
        kind = "idx3-ubyte" if key.startswith("x") else "idx1-ubyte"
        names = [f"{stem}{joint}{kind}{end}" for joint in "-." for end in ("", ".gz")]
        file = next((folder / name for name in names if (folder / name).is_file()), None)
        if file is None:
            return None
        found[key] = file
    return found


def _images(arrays: dict[str, np.ndarray], source: Path) -> Dataset:
    """Images as rows of intensities; 8-bit ones are divided by 255."""
    if not {"x_train", "x_test"} <= arrays.keys():
        raise InvalidData(f"{source} holds {sorted(arrays)}; expected arrays x_train and x_test.")
    blocks = {}
    for key in ("x_train", "x_test"):
        x = torch.tensor(arrays[key])
        x = (x / 255.0 if x.dtype == torch.uint8 else x).flatten(1).to(torch.get_default_dtype())
        if not bool(((x >= 0) & (x <= 1)).all()):
            raise InvalidData(f"{key} of {source} has entries outside [0, 1]; expected such or 8-bit ones.")
        blocks[key] = x
    for key in ("y_train", "y_test"):
        if key in arrays:
            blocks[key] = torch.tensor(arrays[key].astype(np.int64))
    side = round(blocks["x_train"].shape[1] ** 0.5)
    square = side**2 == blocks["x_train"].shape[1]
    return Dataset(**blocks, image_shape=(side, side) if square else None)
