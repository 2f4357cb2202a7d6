"""MNIST, CIFAR-10 and SVHN from their official files, the digits, and real files where there are some."""

import functools
import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch

from retract.benchmarks.data import DataError, cifar, load
from tests.benchmarks.data_files import (
    binary_files,
    cifar_batches,
    idx_bytes,
    python2_pickle,
    python3_pickle,
    python_files,
    snapshot,
    write_files,
    write_mnist,
    write_svhn,
    write_tar,
)

pytestmark = pytest.mark.usefixtures("own_cache")


# ----------------------------------------------------------------------------------------------------- digits


def test_digits_are_the_documented_split():
    digits = load("digits")
    assert digits.train_images.shape == (1347, 1, 8, 8)
    assert digits.test_images.shape == (450, 1, 8, 8)
    assert digits.train_images.dtype == torch.uint8
    assert digits.train_labels.dtype == torch.int64
    assert digits.train_images.max() == 240
    assert (torch.bincount(digits.train_labels, minlength=10) > 120).all()
    assert digits.fingerprint == load("digits").fingerprint == "ab7e80fc"


# ------------------------------------------------------------------------------------------------------ MNIST


@pytest.mark.parametrize("place", ["", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("zipped", [True, False])
def test_mnist(tmp_path, place, zipped):
    arrays = write_mnist(tmp_path / place, zipped=zipped, dotted=not zipped)
    before = snapshot(tmp_path)
    data = load("mnist", tmp_path)
    assert snapshot(tmp_path) == before
    assert torch.equal(data.train_images[:, 0], torch.from_numpy(arrays["train-images-idx3-ubyte"]))
    assert torch.equal(data.test_images[:, 0], torch.from_numpy(arrays["t10k-images-idx3-ubyte"]))
    assert data.train_labels.tolist() == [i % 10 for i in range(30)]
    assert data.classes == tuple("0123456789")
    assert not data.flip


def test_mnist_in_a_tar(tmp_path):
    write_mnist(tmp_path / "loose")
    files = {f"x/{path.name}": path.read_bytes() for path in (tmp_path / "loose").iterdir()}
    archive = write_tar(tmp_path / "mnist.tar", files, "w")
    assert load("mnist", archive).fingerprint == load("mnist", tmp_path / "loose").fingerprint


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-7], "damaged or truncated"),
        (lambda content: content[: len(content) // 2], "damaged or truncated"),
        (lambda content: b"\x00\x00\x09\x03" + content[4:], "begins with 00000903 instead of 00000803"),
        (lambda content: b"", "begins with nothing"),
        (lambda content: content[:6], "damaged or truncated"),
    ],
)
def test_damaged_idx_names_the_file(tmp_path, damage, message, zipped):
    write_mnist(tmp_path, zipped=zipped)
    path = tmp_path / ("train-images-idx3-ubyte" + (".gz" if zipped else ""))
    content = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
    path.write_bytes(gzip.compress(damage(content)) if zipped else damage(content))
    with pytest.raises(DataError, match=message) as error:
        load("mnist", tmp_path)
    assert str(path) in str(error.value)


def flip_a_byte(content):
    return content[:200] + bytes([content[200] ^ 0xFF]) + content[201:]


@pytest.mark.parametrize("damage", [lambda content: content[:-9], flip_a_byte], ids=["truncated", "flipped"])
def test_damaged_gzip_names_the_file(tmp_path, damage):
    write_mnist(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="damaged or truncated") as error:
        load("mnist", tmp_path)
    assert str(path) in str(error.value)


def test_mnist_label_out_of_range(tmp_path):
    write_mnist(tmp_path, zipped=False)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.full(20, 11, np.uint8)))
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte holds the label 11"):
        load("mnist", tmp_path)


def test_mnist_counts_must_agree(tmp_path):
    write_mnist(tmp_path, zipped=False)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(29, np.uint8)))
    with pytest.raises(DataError, match=r"holds 30 images, but .*train-labels.* holds 29 labels"):
        load("mnist", tmp_path)


def test_mnist_missing_part(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="missing: t10k-labels-idx1-ubyte"):
        load("mnist", tmp_path)


# --------------------------------------------------------------------------------------------------- CIFAR-10


def expected_cifar():
    batches = list(cifar_batches().values())
    train = np.concatenate([pixels for pixels, _ in batches[:-1]]).reshape(-1, 3, 32, 32)
    return torch.from_numpy(train), torch.from_numpy(batches[-1][0].reshape(-1, 3, 32, 32)), batches


@pytest.mark.parametrize("form", ["folder", "inner folder", "official archive", "archive", "archive in folder"])
@pytest.mark.parametrize("batches", ["binary", "python2", "python3", "python3 protocol 2"])
def test_cifar(tmp_path, form, batches):
    inner, official = ("cifar-10-batches-bin", "cifar-10-binary.tar.gz")
    if batches == "binary":
        files = binary_files()
    else:
        inner, official = ("cifar-10-batches-py", "cifar-10-python.tar.gz")
        protocol = 2 if batches.endswith("2") else 4
        writer = python2_pickle if batches == "python2" else functools.partial(python3_pickle, protocol=protocol)
        files = python_files(writer)
    members = {f"{inner}/batches.meta": b"?", f"{inner}/readme.html": b"!"}
    members |= {f"{inner}/{name}": content for name, content in files.items()}
    if form == "folder":
        place = write_files(tmp_path, files)
    elif form == "inner folder":
        write_files(tmp_path, members)
        place = tmp_path
    elif form == "official archive":
        write_tar(tmp_path / official, members)
        place = tmp_path
    elif form == "archive":
        place = write_tar(tmp_path / "any-name.tar.xz", members, "w:xz")
    else:
        write_tar(tmp_path / "CIFAR10.tar", members, "w")
        place = tmp_path
    data = load("cifar10", place)
    train, test, originals = expected_cifar()
    assert torch.equal(data.train_images, train)
    assert torch.equal(data.test_images, test)
    assert torch.equal(data.test_labels, torch.from_numpy(originals[-1][1]))
    assert data.classes[:2] == ("airplane", "automobile")
    assert data.flip


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\x01" * 3072, "3072 bytes are not records of 3073"), (b"\x0a" * 3073, "label 10"), (b"", "0 bytes")],
)
def test_a_damaged_binary_batch_names_the_file(tmp_path, content, message):
    write_files(tmp_path, {**binary_files(), "data_batch_4.bin": content})
    with pytest.raises(DataError, match=rf"data_batch_4\.bin is damaged.*{message}"):
        load("cifar10", tmp_path)


def test_cifar_missing_batches(tmp_path):
    files = binary_files()
    del files["data_batch_5.bin"], files["test_batch.bin"]
    with pytest.raises(DataError, match=r"missing: data_batch_5\.bin, test_batch\.bin"):
        load("cifar10", write_files(tmp_path, files))


def test_a_truncated_archive_names_it(tmp_path):
    path = write_tar(tmp_path / "cifar-10-binary.tar.gz", binary_files())
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz is damaged or truncated"):
        load("cifar10", tmp_path)
    path.write_bytes(b"\x1f\x8bnonsense")
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz is damaged or truncated"):
        load("cifar10", tmp_path)


def test_cifar100_is_not_taken_for_cifar10(tmp_path):
    write_files(tmp_path / "cifar100", binary_files())
    with pytest.raises(DataError, match="cannot download"):
        load("cifar10", tmp_path)


# ------------------------------------------------------------------------------------------------------- SVHN


def test_svhn(tmp_path):
    arrays = write_svhn(tmp_path)
    data = load("svhn", tmp_path)
    pixels, labels = arrays["train"]
    assert torch.equal(data.train_images[7], torch.from_numpy(pixels[..., 7].transpose(2, 0, 1).copy()))
    assert data.train_labels.tolist() == (labels[:, 0] % 10).tolist()
    assert data.train_labels[9] == 0  # label 10 is the digit 0
    assert data.train_images.is_contiguous()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"X": np.zeros((32, 32, 3, 4), np.uint8)}, "lacks the variable y"),
        ({"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.full((4, 1), 11)}, "1 to 10"),
        ({"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.zeros((4, 1))}, "1 to 10"),
        ({"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.ones((3, 1))}, "4 images and 3 labels"),
        ({"X": np.zeros((28, 28, 3, 4), np.uint8), "y": np.ones((4, 1))}, "should be uint8 of shape"),
        ({"X": np.zeros((32, 32, 3, 4)), "y": np.ones((4, 1))}, "should be uint8 of shape"),
    ],
)
def test_wrong_mat_names_the_file(tmp_path, variables, message):
    write_svhn(tmp_path)
    scipy.io.savemat(tmp_path / "test_32x32.mat", variables)
    with pytest.raises(DataError, match=rf"test_32x32\.mat.*{message}"):
        load("svhn", tmp_path)


@pytest.mark.parametrize("keep", [0, 50, 3000, -40])
def test_truncated_mat_names_the_file(tmp_path, keep):
    write_svhn(tmp_path)
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"train_32x32\.mat"):
        load("svhn", tmp_path)


# ------------------------------------------------------------------------------------------------- real files


@pytest.fixture
def data_dir():
    if "RETRACT_DATA_DIR" not in os.environ:
        pytest.skip("RETRACT_DATA_DIR names no folder with real data sets")
    return Path(os.environ["RETRACT_DATA_DIR"])


@pytest.mark.data
def test_real_mnist(data_dir):
    data = load("mnist", data_dir)
    assert data.train_images.shape == (60000, 1, 28, 28)
    assert data.test_images.shape == (10000, 1, 28, 28)
    assert torch.bincount(data.train_labels).tolist()[:3] == [5923, 6742, 5958]
    assert data.mean[0] / 255 == pytest.approx(0.1307, abs=1e-4)
    assert data.std[0] / 255 == pytest.approx(0.3081, abs=1e-4)


@pytest.mark.data
def test_real_cifar10(data_dir):
    data = load("cifar10", data_dir)
    assert data.train_images.shape == (50000, 3, 32, 32)
    assert data.test_images.shape == (10000, 3, 32, 32)
    assert torch.bincount(data.train_labels).tolist() == [5000] * 10
    assert data.classes == cifar.CLASSES
    assert [mean / 255 for mean in data.mean] == pytest.approx([0.4914, 0.4822, 0.4465], abs=2e-3)
