# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Loaders against files written here, published numbers, and files that are not what they should be."""

import gzip
import math
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_cpa import datasets
from pyro_cpa.errors import InvalidData

FASHION = "/usr/share/datasets/fashion-mnist"


def idx_bytes(array):
    return (
        struct.pack(">BBBB", 0, 0, 8, array.ndim)
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


def image_arrays():
    random = np.random.RandomState(0)
    return {
        "x_train": random.randint(0, 256, (7, 4, 4)).astype(np.uint8),
        "y_train": random.randint(0, 10, 7).astype(np.uint8),
        "x_test": random.randint(0, 256, (3, 4, 4)).astype(np.uint8),
        "y_test": random.randint(0, 10, 3).astype(np.uint8),
    }


def write_idx(folder, end=".gz"):
    folder.mkdir(parents=True, exist_ok=True)
    names = {"x_train": "train-images-idx3", "y_train": "train-labels-idx1"}
    names |= {"x_test": "t10k-images-idx3", "y_test": "t10k-labels-idx1"}
    for key, array in image_arrays().items():
        content = idx_bytes(array)
        (folder / f"{names[key]}-ubyte{end}").write_bytes(gzip.compress(content) if end else content)


def assert_is_the_set(data):
    arrays = image_arrays()
    assert torch.equal(data.x_train * 255, torch.tensor(arrays["x_train"]).reshape(7, 16).double())
    assert data.x_test.shape == (3, 16) and data.image_shape == (4, 4)
    assert data.y_train.tolist() == arrays["y_train"].tolist() and data.y_train.dtype == torch.int64
    assert data.x_train.dtype == torch.get_default_dtype()


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_files_in_the_given_folder(tmp_path, end):
    write_idx(tmp_path / "mine", end)
    assert_is_the_set(datasets.load_mnist(tmp_path / "mine"))
    assert_is_the_set(datasets.load_fashion_mnist(str(tmp_path / "mine")))


@pytest.mark.parametrize("place", ["mnist", "MNIST/raw"])
def test_idx_files_below_the_given_folder_or_that_of_the_environment(tmp_path, monkeypatch, place):
    write_idx(tmp_path / place)
    assert_is_the_set(datasets.load_mnist(tmp_path))
    monkeypatch.setenv("PYRO_CPA_DATA", str(tmp_path))
    assert_is_the_set(datasets.load_mnist())


@pytest.mark.parametrize("name", ["mnist.npz", "other.npz"])
def test_npz_file(tmp_path, name):
    np.savez(tmp_path / name, **image_arrays())
    assert_is_the_set(datasets.load_mnist(tmp_path / name))
    if name == "mnist.npz":
        assert_is_the_set(datasets.load_mnist(tmp_path))


def test_missing_files_say_where_to_get_them(tmp_path, monkeypatch):
    with pytest.raises(InvalidData, match="apt-get install dataset-fashion-mnist"):
        datasets.load_fashion_mnist(tmp_path)
    monkeypatch.setenv("PYRO_CPA_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InvalidData, match="MNIST was not found; sought: .*mnist.npz.*PYRO_CPA_DATA") as error:
        datasets.load_mnist()
    assert str(tmp_path) in str(error.value) and "https://" in str(error.value)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"")  # one of four is not enough
    with pytest.raises(InvalidData, match="was not found"):
        datasets.load_mnist(tmp_path)


@pytest.mark.parametrize("kind, code", [(">i2", 11), (">i4", 12), (">f4", 13), (">f8", 14), ("i1", 9)])
def test_idx_of_other_types(tmp_path, kind, code):
    array = np.array([[1, -2, 3], [4, 5, 100]]).astype(kind)
    content = struct.pack(">BBBBII", 0, 0, code, 2, 2, 3) + array.tobytes()
    (tmp_path / "a").write_bytes(content)
    assert datasets.read_idx(tmp_path / "a").tolist() == array.tolist()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a", b"PK\x03\x04 something", "does not begin as an idx file"),
        ("a", b"", "does not begin as an idx file"),
        ("a", struct.pack(">BBBBI", 0, 0, 8, 1, 10) + b"123", "header says .10,.*truncated"),
        ("a.gz", b"not gzip", "cannot be read"),
        ("a.gz", gzip.compress(bytes(2000))[:-9], "cannot be read"),
    ],
    ids=["foreign", "empty", "truncated", "not gzip", "truncated gzip"],
)
def test_foreign_or_truncated_idx(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidData, match=message):
        datasets.read_idx(tmp_path / name)


def test_foreign_npz(tmp_path):
    (tmp_path / "mnist.npz").write_bytes(b"rubbish")
    with pytest.raises(InvalidData, match="no readable .npz"):
        datasets.load_mnist(tmp_path)
    np.savez(tmp_path / "mnist.npz", images=np.zeros(3))
    with pytest.raises(InvalidData, match="holds .'images'.; expected arrays x_train and x_test"):
        datasets.load_mnist(tmp_path)
    np.savez(tmp_path / "mnist.npz", x_train=np.full((2, 4), 7.0), x_test=np.zeros((2, 4)))
    with pytest.raises(InvalidData, match="outside .0, 1."):
        datasets.load_mnist(tmp_path)


def test_npz_that_would_run_code_is_refused(tmp_path):
    np.savez(tmp_path / "mnist.npz", x_train=np.array([{}], dtype=object), x_test=np.zeros((2, 4)))
    with pytest.raises(InvalidData, match="no readable .npz"):
        datasets.load_mnist(tmp_path)


def test_digits():
    digits = datasets.load_digits()
    assert digits.x_train.min() == 0 and digits.x_train.max() == 1
    assert digits.y_train.bincount().min() > 100 and digits.y_test.unique().tolist() == list(range(10))
    again, other = datasets.load_digits(), datasets.load_digits(seed=1)
    assert torch.equal(digits.x_test, again.x_test) and not torch.equal(digits.x_test, other.x_test)
    with pytest.raises(InvalidData, match="leave some to train on"):
        datasets.load_digits(1797)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(InvalidData, match="pip install scikit-learn"):
        datasets.load_digits()


def test_binary_tables(tmp_path):
    rows = np.random.RandomState(1).randint(0, 2, (10, 3))
    np.savetxt(tmp_path / "a.csv", rows, fmt="%d", delimiter=",")
    np.savetxt(tmp_path / "named.csv", rows, fmt="%d", delimiter=",", header="a,b,c", comments="")
    np.savetxt(tmp_path / "a.txt", rows, fmt="%d")
    np.savez(tmp_path / "a.npz", rows=rows)
    sets = [datasets.load_binary(tmp_path / name) for name in ("a.csv", "named.csv", "a.txt", "a.npz")]
    for data in sets:
        assert data.x_train.shape == (8, 3) and data.x_test.shape == (2, 3)
        assert torch.equal(data.x_train, sets[0].x_train) and torch.equal(data.x_test, sets[0].x_test)
    everything = torch.cat([sets[0].x_train, sets[0].x_test])
    assert sorted(everything.tolist()) == sorted(rows.tolist())
    np.savez(tmp_path / "split.npz", train=rows[:5], valid=rows[5:7], test=rows[7:])
    data = datasets.load_binary(tmp_path / "split.npz")
    assert data.x_train.tolist() == rows[:5].tolist() and data.x_valid.tolist() == rows[5:7].tolist()
    assert data.map(lambda x: 1 - x).x_valid.tolist() == (1 - rows[5:7]).tolist()


def test_bad_binary_tables(tmp_path):
    (tmp_path / "two.csv").write_text("0,1\n1,2\n")
    with pytest.raises(InvalidData, match="2.0 in row 1, column 1"):
        datasets.load_binary(tmp_path / "two.csv")
    (tmp_path / "words.csv").write_text("a,b\nc,d\n")
    with pytest.raises(InvalidData, match="no table of numbers"):
        datasets.load_binary(tmp_path / "words.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(InvalidData, match="no table of numbers"):
        datasets.load_binary(tmp_path / "empty.csv")
    with pytest.raises(InvalidData, match="is no file"):
        datasets.load_binary(tmp_path / "none.csv")
    np.savez(tmp_path / "many.npz", a=np.zeros((2, 2)), b=np.zeros((2, 2)))
    with pytest.raises(InvalidData, match="expected train and test, or one array alone"):
        datasets.load_binary(tmp_path / "many.npz")


def test_binarisation_is_fixed_by_its_seed_and_leaves_the_global_state():
    x = torch.full((200, 50), 0.3)
    state = torch.get_rng_state()
    fixed = datasets.binarize(x, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(datasets.binarize(x, seed=1), fixed)
    assert not torch.equal(datasets.binarize(x, seed=1, epoch=1), fixed)
    assert not torch.equal(datasets.binarize(x, seed=2), fixed)
    assert set(fixed.unique().tolist()) == {0.0, 1.0}
    assert abs(fixed.mean() - 0.3) < 5 * math.sqrt(0.21 / 10_000)
    ends = datasets.binarize(torch.tensor([0.0, 1.0]).repeat(1000, 1))
    assert not ends[:, 0].any() and ends[:, 1].all()
    assert datasets.binarize(torch.tensor([0.2, 0.5, 0.7]), threshold=0.5).tolist() == [0, 0, 1]
    with pytest.raises(InvalidData, match="outside .0, 1."):
        datasets.binarize(torch.tensor([255.0]))


def test_dequantised_pixels_keep_their_bin():
    x = torch.arange(256) / 255
    y = datasets.dequantize(x)
    assert torch.equal((256 * y).floor(), torch.arange(256.0)) and y.max() < 1
    assert torch.equal(y, datasets.dequantize(x)) and not torch.equal(y, datasets.dequantize(x, seed=1))


def test_row_sequences():
    x = torch.arange(12.0).reshape(2, 6)
    assert datasets.row_sequences(x, (2, 3))[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(InvalidData, match=r"expected \(N, 784\)"):
        datasets.row_sequences(x)


def test_minibatches_are_one_shuffled_pass():
    x, y = torch.arange(10.0)[:, None], torch.arange(10)
    batches = list(datasets.minibatches(x, None, y, batch_size=4))
    assert [len(batch[0]) for batch in batches] == [4, 4, 2] and batches[0][1] is None
    order = torch.cat([batch[2] for batch in batches])
    assert sorted(order.tolist()) == list(range(10)) and order.tolist() != list(range(10))
    assert torch.equal(torch.cat([batch[0] for batch in batches])[:, 0].long(), order)
    other = torch.cat([batch[2] for batch in datasets.minibatches(x, None, y, batch_size=4, epoch=1)])
    assert other.tolist() != order.tolist()


def test_factor_analysis_toy_has_the_published_evidence():
    toy = datasets.factor_analysis_toy()
    covariance = toy.loadings @ toy.loadings.T + toy.scale.square().diag()
    p = MultivariateNormal(torch.zeros(3), covariance)
    assert p.log_prob(toy.x_train).mean().item() == pytest.approx(-3.934837, abs=1e-6)
    assert p.log_prob(toy.x_test).mean().item() == pytest.approx(-3.970452, abs=1e-6)
    saturated = MultivariateNormal(torch.zeros(3), toy.x_train.T @ toy.x_train / 1000)
    assert saturated.log_prob(toy.x_train).mean().item() == pytest.approx(-3.932798, abs=1e-6)


def test_mnist_at_hand(shared_data):
    data = datasets.load_mnist(shared_data("mnist.npz"))
    assert data.x_train.shape == (60000, 784) and data.image_shape == (28, 28)
    assert data.x_train.mean().item() == pytest.approx(0.13066, abs=1e-5)


def test_binary_benchmark_at_hand(shared_data):
    data = datasets.load_binary(shared_data("dna.npz"))
    assert (len(data.x_train), len(data.x_valid), len(data.x_test)) == (1400, 600, 1186)


@pytest.mark.slow
def test_fashion_mnist_of_debian():
    if not Path(FASHION).exists():
        pytest.skip(f"{FASHION} is absent (apt-get install dataset-fashion-mnist)")
    data = datasets.load_fashion_mnist()
    assert data.x_train.shape == (60000, 784) and data.x_test.shape == (10000, 784)
    assert data.y_train.bincount().tolist() == [6000] * 10
    assert data.x_train.mean().item() == pytest.approx(0.2860, abs=1e-4)  # published
