"""Images by class, in folders and archives: what they hold, what is refused, and the cache."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from retract.benchmarks.data import DataError, cifar, images, load
from tests.benchmarks.data_files import image_files, snapshot, write_files, write_tar

pytestmark = pytest.mark.usefixtures("own_cache")


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
