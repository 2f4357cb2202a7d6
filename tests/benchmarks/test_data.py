"""Every form of every data set, from small files written here; damaged, hostile, missing and downloaded ones."""

import functools
import gzip
import http.server
import io
import os
import pickle
import tarfile
import threading
from dataclasses import replace
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from retract.benchmarks.data import DataError, load
from retract.benchmarks.data import cifar, dataset, download, images, mnist, pickles

PER_BATCH = 20


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache, or reaches the network."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RETRACT_CACHE_DIR", str(cache))
    for name, files in download.OFFICIAL.items():
        nowhere = tuple(replace(file, addresses=("http://127.0.0.1:9/",)) for file in files)
        monkeypatch.setitem(download.OFFICIAL, name, nowhere)
    return cache


def generator(seed=0):
    return np.random.default_rng(seed)


# -------------------------------------------------------------------------------------- writers of small files


def idx_bytes(array):
    header = bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


def write_mnist(folder, *, zipped=True, dotted=False, train=30, test=20):
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part, n in (("train", train), ("t10k", test)):
        arrays[f"{part}-images-idx3-ubyte"] = generator(n).integers(0, 256, (n, 28, 28), np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = (np.arange(n) % 10).astype(np.uint8)
    for name, array in arrays.items():
        path = folder / ((name.replace("-idx", ".idx") if dotted else name) + (".gz" if zipped else ""))
        content = idx_bytes(array)
        path.write_bytes(gzip.compress(content) if zipped else content)
    return arrays


def cifar_batches(n=PER_BATCH):
    """{batch name: (pixels (n, 3072), labels (n,))}."""
    return {
        name: (generator(i).integers(0, 256, (n, 3072), np.uint8), (np.arange(n) + i) % 10)
        for i, name in enumerate(cifar.BATCHES)
    }


def binary_files():
    return {
        f"{name}.bin": np.hstack([labels[:, None].astype(np.uint8), pixels]).tobytes()
        for name, (pixels, labels) in cifar_batches().items()
    }


def python2_pickle(pixels, labels):
    """A batch as Python 2 wrote it, string opcodes and all: the form of the official files."""

    def string(content):  # BINSTRING
        return b"T" + len(content).to_bytes(4, "little") + content

    def integer(value):  # BININT
        return b"J" + value.to_bytes(4, "little", signed=True)

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n"
        + (b"cnumpy\nndarray\n" + b"(" + integer(0) + b"t" + string(b"b") + b"\x87R")  # (type, (0,), "b")
        + (b"(" + integer(1) + integer(pixels.shape[0]) + integer(pixels.shape[1]) + b"\x86")
        + (b"cnumpy\ndtype\n" + string(b"u1") + integer(0) + integer(1) + b"\x87R")
        + (b"(" + integer(3) + string(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb")
        + (b"\x89" + string(pixels.tobytes()) + b"tb")
    )
    label_list = b"]" + b"(" + b"".join(integer(int(label)) for label in labels) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(b"labels") + label_list + b"u."


def python_files(write=python2_pickle):
    return {name: write(pixels, labels) for name, (pixels, labels) in cifar_batches().items()}


def python3_pickle(pixels, labels, protocol=4):
    return pickle.dumps({b"data": pixels, b"labels": [int(label) for label in labels]}, protocol)


def image_files(size=8, suffix="png", mode="RGB", train=3, test=2, class_names=None):
    files = {}
    for part, n in (("train", train), ("test", test)):
        for label, class_name in enumerate(class_names or mnist.CLASSES):
            for i in range(n):
                shape = (size, size, 3) if mode == "RGB" else (size, size)
                pixels = generator(label * 100 + i).integers(0, 256, shape, np.uint8)
                encoded = io.BytesIO()
                Image.fromarray(pixels).save(encoded, "JPEG" if suffix == "jpg" else suffix.upper())
                files[f"{part}/{class_name}/{i:04}.{suffix}"] = encoded.getvalue()
    return files


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_tar(path, files, mode="w:gz"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_svhn(folder, n=20):
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part in ("train", "test"):
        pixels = generator(len(part)).integers(0, 256, (32, 32, 3, n), np.uint8)
        labels = (np.arange(n) % 10 + 1).astype(np.uint8)[:, None]
        arrays[part] = pixels, labels
        scipy.io.savemat(folder / f"{part}_32x32.mat", {"X": pixels, "y": labels}, do_compression=True)
    return arrays


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# ------------------------------------------------------------------------------------------------------- digits


def test_digits_are_the_documented_split():
    digits = load("digits")
    assert digits.train_images.shape == (1347, 1, 8, 8)
    assert digits.test_images.shape == (450, 1, 8, 8)
    assert digits.train_images.dtype == torch.uint8
    assert digits.train_labels.dtype == torch.int64
    assert digits.train_images.max() == 240
    assert (torch.bincount(digits.train_labels, minlength=10) > 120).all()
    assert digits.fingerprint == load("digits").fingerprint == "ab7e80fc"


# -------------------------------------------------------------------------------------------------------- MNIST


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
    with pytest.raises(DataError, match="holds 30 images, but .*train-labels.* holds 29 labels"):
        load("mnist", tmp_path)


def test_mnist_missing_part(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="missing: t10k-labels-idx1-ubyte"):
        load("mnist", tmp_path)


# ----------------------------------------------------------------------------------------------------- CIFAR-10


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


def test_the_official_pickle_is_one_that_python_reads_alike():
    """python2_pickle writes what Python itself takes for the same batch."""
    pixels, labels = cifar_batches()["test_batch"]
    batch = pickle.loads(python2_pickle(pixels, labels), encoding="bytes")
    assert np.array_equal(batch[b"data"], pixels)
    assert batch[b"labels"] == labels.tolist()


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_runs_nothing(tmp_path, protocol):
    mark = tmp_path / "mark"
    files = python_files()
    for call in (
        Hostile(os.system, f"touch {mark}"),
        Hostile(eval, f"open({str(mark)!r}, 'w')"),
        Hostile(getattr, str, "join"),
        Hostile(np.load, str(mark)),
    ):
        files["data_batch_3"] = pickle.dumps({b"data": call, b"labels": [0]}, protocol)
        write_files(tmp_path, files)
        with pytest.raises(DataError, match=r"data_batch_3 is no CIFAR-10 python batch: it asks for \w+"):
            load("cifar10", tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02}.",
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({b"data": b"abc", b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((2, 3072), np.float32), b"labels": [1, 2]}),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((2, 3071), np.uint8), b"labels": [1, 2]}),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": ["x"]}),
        pickle.dumps({b"data": np.zeros((1, 3072), object), b"labels": [1]}),
        python2_pickle(*cifar_batches()["test_batch"])[:-500],
        b"cnumpy\nndarray\n}b.",
        b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
    ],
)
def test_a_damaged_python_batch_names_the_file(tmp_path, content):
    write_files(tmp_path, {**python_files(), "data_batch_2": content})
    with pytest.raises(DataError, match="data_batch_2 is (no CIFAR-10 python batch|damaged)"):
        load("cifar10", tmp_path)


def test_a_pickle_cannot_change_how_the_next_is_read():
    """BUILD on a function sets its attributes; what it reaches is thrown away."""
    poison = b"cnumpy.core.multiarray\n_reconstruct\nN}X\x0c\x00\x00\x00__defaults__N\x86b."
    with pytest.raises(pickle.UnpicklingError):
        pickles.load_plain(poison[:-2] + b"\x86R.")
    pickles.load_plain(b"cnumpy.core.multiarray\n_reconstruct\nN}X\x08\x00\x00\x00__name__X\x01\x00\x00\x00xs\x86b.")
    pixels, labels = cifar_batches()["test_batch"]
    assert np.array_equal(pickles.load_plain(python2_pickle(pixels, labels))[b"data"].numpy(), pixels)


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


# --------------------------------------------------------------------------------------------------------- SVHN


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


# ---------------------------------------------------------------------------------------------- images by class


@pytest.mark.parametrize("name", ["digits", "mnist", "cifar10", "svhn"])
@pytest.mark.parametrize("form", ["folder", "tar", "tar.gz", "tar.xz", "nested"])
def test_images_by_class(tmp_path, name, form):
    mode = "L" if name in ("digits", "mnist") else "RGB"
    files = image_files(mode=mode)
    if form == "folder":
        place = write_files(tmp_path / "images", files)
    elif form == "nested":
        place = tmp_path
        write_tar(tmp_path / f"{name}-images.tar", {f"./top/{k}": v for k, v in files.items()}, "w")
    else:
        place = write_tar(tmp_path / f"x.{form}", files, f"w:{form.partition('.')[2]}")
    data = load(name, place)
    channels = len(mode)
    assert data.train_images.shape == (30, channels, 8, 8)
    assert data.test_images.shape == (20, channels, 8, 8)
    assert data.classes == tuple("0123456789")
    assert data.train_labels.tolist() == sorted(data.train_labels.tolist())
    pixels = np.asarray(Image.open(io.BytesIO(files["train/4/0001.png"]))).reshape(8, 8, channels)
    assert torch.equal(data.train_images[4 * 3 + 1], torch.from_numpy(pixels.copy()).permute(2, 0, 1))


def test_jpeg_and_gray_become_what_the_set_has(tmp_path):
    files = image_files(suffix="jpg", mode="L", class_names=cifar.CLASSES)
    data = load("cifar10", write_files(tmp_path, files))
    assert data.train_images.shape[1] == 3
    assert torch.equal(data.train_images[:, 0], data.train_images[:, 1])
    assert data.classes == cifar.CLASSES


def test_decoded_images_are_cached_outside_the_data_folder(tmp_path, own_cache, monkeypatch):
    write_files(tmp_path, image_files())
    before = snapshot(tmp_path)
    first = load("cifar10", tmp_path)
    assert snapshot(tmp_path) == before
    (cached,) = (own_cache / "decoded").iterdir()

    decodings = []
    decode = images._decode
    monkeypatch.setattr(images, "_decode", lambda *given: decodings.append(given) or decode(*given))
    assert load("cifar10", tmp_path).fingerprint == first.fingerprint
    assert not decodings

    cached.write_bytes(cached.read_bytes()[:1000])
    assert load("cifar10", tmp_path).fingerprint == first.fingerprint
    assert len(decodings) == 1

    (tmp_path / "train/0/0000.png").write_bytes(image_files()["train/7/0001.png"])
    assert load("cifar10", tmp_path).fingerprint != first.fingerprint
    assert len(decodings) == 2


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path, monkeypatch):
    write_files(tmp_path / "data", image_files())
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RETRACT_CACHE_DIR", str(tmp_path / "file"))
    assert len(load("cifar10", tmp_path / "data").train_labels) == 30


@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train/3/0002.png", b"\x89PNG\r\n\x1a\nnonsense", "3/0002.png.*is damaged or no image"),
        ("train/3/0002.png", image_files()["train/3/0002.png"][:90], "3/0002.png.*is damaged or no image"),
        ("train/3/0002.png", image_files(size=9)["train/3/0002.png"], "all images must have one size"),
        ("train/extra/0002.png", image_files()["train/3/0002.png"], "11 classes under train/ and 10"),
        ("test/extra/0002.png", image_files()["train/3/0002.png"], "10 classes under train/ and 11"),
    ],
)
def test_wrong_images_are_named(tmp_path, name, content, message, archived):
    files = {**image_files(), name: content}
    place = write_tar(tmp_path / "x.tar.gz", files) if archived else write_files(tmp_path, files)
    with pytest.raises(DataError, match=message):
        load("cifar10", place)


def special_member(kind):
    member = tarfile.TarInfo("train/3/evil.png")
    if kind == "climbs":
        member.name = "../train/3/evil.png"
    elif kind == "absolute":
        member.name = "/train/3/evil.png"
    else:
        member.type = {"symlink": tarfile.SYMTYPE, "hardlink": tarfile.LNKTYPE, "fifo": tarfile.FIFOTYPE}[kind]
        member.linkname = "/etc/passwd"
    return member


@pytest.mark.parametrize("kind", ["climbs", "absolute", "symlink", "hardlink", "fifo"])
def test_path_tricks_are_refused(tmp_path, kind):
    path = write_tar(tmp_path / "inner/x.tar", image_files(), "w")
    with tarfile.open(path, "a") as tar:
        tar.addfile(special_member(kind))
    before = snapshot(tmp_path)
    with pytest.raises(DataError, match=r"x\.tar holds '.*evil\.png', which is no plain file"):
        load("cifar10", path)
    assert snapshot(tmp_path) == before


def test_hidden_and_other_files_are_passed_over(tmp_path):
    files = {**image_files(), "train/3/._0002.png": b"resource fork", "train/3/notes.txt": b"", "README": b""}
    assert len(load("svhn", write_tar(tmp_path / "svhn.tar", files, "w")).train_labels) == 30


# ----------------------------------------------------------------------------------------- places and downloads


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("mnist", "http://127.0.0.1:9/train-images-idx3-ubyte.gz"),
        ("cifar10", "http://127.0.0.1:9/cifar-10-binary.tar.gz"),
        ("svhn", "http://127.0.0.1:9/train_32x32.mat"),
    ],
)
def test_without_files_and_network_the_error_says_what_to_put_where(tmp_path, name, first):
    with pytest.raises(DataError, match="cannot be reached") as error:
        load(name, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert first in str(error.value)
    with pytest.raises(DataError, match="a folder named by --data-dir"):
        load(name)


def test_official_addresses_and_checksums():
    from importlib import reload

    official = reload(download).OFFICIAL
    assert official["cifar10"][0].addresses == ("https://www.cs.toronto.edu/~kriz/",)
    assert {file.name: file.md5[:6] for files in official.values() for file in files} == {
        "train-images-idx3-ubyte.gz": "f68b3c",
        "train-labels-idx1-ubyte.gz": "d53e10",
        "t10k-images-idx3-ubyte.gz": "9fb629",
        "t10k-labels-idx1-ubyte.gz": "ec2911",
        "cifar-10-binary.tar.gz": "c32a1d",
        "train_32x32.mat": "e26ded",
        "test_32x32.mat": "eb5a98",
    }


@pytest.fixture
def server(tmp_path):
    """(folder, address) of a local web server that serves the folder."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


def serve(monkeypatch, name, folder, *addresses):
    files = tuple(
        download.RemoteFile(path.name, md5(path.read_bytes()).hexdigest(), addresses)
        for path in sorted(folder.iterdir())
    )
    monkeypatch.setitem(download.OFFICIAL, name, files)


def test_download(server, monkeypatch, own_cache, tmp_path):
    folder, address = server
    write_mnist(folder)
    serve(monkeypatch, "mnist", folder, "http://127.0.0.1:9/", address)  # the first address is down
    empty = tmp_path / "empty"
    empty.mkdir()
    data = load("mnist", empty)
    assert data.fingerprint == load("mnist", folder).fingerprint
    assert not list(empty.iterdir())
    assert len(list((own_cache / "mnist").iterdir())) == 4

    for path in folder.iterdir():
        path.unlink()
    assert load("mnist").fingerprint == data.fingerprint  # from the cache


def test_download_with_a_wrong_checksum_is_refused(server, monkeypatch, own_cache):
    folder, address = server
    write_tar(folder / "cifar-10-binary.tar.gz", binary_files())
    serve(monkeypatch, "cifar10", folder, address)
    (folder / "cifar-10-binary.tar.gz").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"cannot download cifar-10-binary.tar.gz: .* wrong checksum"):
        load("cifar10")
    assert not [path for path in (own_cache / "cifar10").rglob("*") if path.is_file()]


def test_a_damaged_download_is_fetched_again(server, monkeypatch, own_cache):
    folder, address = server
    write_svhn(folder)
    serve(monkeypatch, "svhn", folder, address)
    first = load("svhn")
    (own_cache / "svhn/train_32x32.mat").write_bytes(b"damaged")
    assert load("svhn").fingerprint == first.fingerprint


def test_places_that_cannot_be(tmp_path):
    with pytest.raises(DataError, match="there is no folder or archive"):
        load("mnist", tmp_path / "nowhere")
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"x\.zip is neither a folder nor a tar archive"):
        load("mnist", tmp_path / "x.zip")
    archive = write_tar(tmp_path / "x.tar", {"readme": b"hello"}, "w")
    with pytest.raises(DataError, match=r"x\.tar holds no files of mnist"):
        load("mnist", archive)
    with pytest.raises(ValueError, match="data must be one of digits, mnist, cifar10, svhn, got 'imagenet'"):
        load("imagenet")


# ---------------------------------------------------------------------------------------- what a data set offers


def test_statistics_are_those_of_the_training_pixels(tmp_path):
    write_svhn(tmp_path)
    data = load("svhn", tmp_path)
    pixels = data.train_images.double()
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert data.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), rel=1e-12)
    normalized = data.normalizer()(data.train_images)
    assert normalized.dtype == torch.float32
    assert normalized.mean((0, 2, 3)).abs().max() < 1e-5
    assert (normalized.std((0, 2, 3)) - 1).abs().max() < 1e-4


def test_a_constant_channel_can_be_normalized():
    assert dataset.channel_statistics(torch.full((2, 1, 3, 3), 7, dtype=torch.uint8)) == ((7.0,), (1.0,))


def test_subset_is_balanced_seeded_and_nested():
    data = load("digits")
    small, large = data.subset(103, seed=1), data.subset(500, seed=1)
    counts = torch.bincount(small.train_labels)
    assert counts.sum() == 103
    assert counts.max() - counts.min() <= 1
    assert torch.equal(small.train_images, data.subset(103, seed=1).train_images)
    assert not torch.equal(small.train_images, data.subset(103, seed=2).train_images)
    inside = {image.numpy().tobytes() for image in large.train_images}
    assert all(image.numpy().tobytes() in inside for image in small.train_images)
    assert (small.mean, small.std) == (data.mean, data.std)
    assert torch.equal(small.test_images, data.test_images)
    assert load("digits", subset=103, seed=1).fingerprint == small.fingerprint


def test_subset_of_everything_is_everything():
    data = load("digits")
    assert torch.equal(data.subset(1347).train_images, data.train_images)


@pytest.mark.parametrize("size", [9, 1348, -1])
def test_subset_out_of_range(size):
    with pytest.raises(ValueError, match="subset must be from 10"):
        load("digits", subset=size)


def test_resizing():
    data = load("digits")
    resized = load("digits", image_size=16)
    assert resized.train_images.shape == (1347, 1, 16, 16)
    assert resized.train_images.dtype == torch.uint8
    assert resized.mean[0] == pytest.approx(data.mean[0], abs=1)
    assert data.resized(8) is data
    with pytest.raises(ValueError, match="at least 1 pixel"):
        data.resized(0)


# --------------------------------------------------------------------------------------------------- real files


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
