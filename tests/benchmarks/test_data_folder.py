"""Any folder of images as a data set."""

import numpy as np
import pytest
import torch
from PIL import Image

from retract.benchmarks.data import DataError
from retract.benchmarks.data.folder import read_folder


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def test_classes_sizes_and_parts(tmp_path):
    for i in range(11):
        save(tmp_path / f"cats/{i:02}.png", np.full((8, 8, 3), i))
    for i in range(3):
        save(tmp_path / f"dogs/old/{i}.png", np.full((8, 8, 3), 100 + i))
    save(tmp_path / "cats/.hidden.png", np.full((8, 8, 3), 255))
    (tmp_path / "cats/notes.txt").write_text("no image")
    data = read_folder(tmp_path, 8)
    assert data.classes == ("cats", "dogs/old")
    assert data.image_shape == (3, 8, 8)
    assert data.train_images[:, 0, 0, 0].tolist() == [*range(1, 10), 101, 102]
    assert data.train_labels.tolist() == [0] * 9 + [1] * 2
    assert data.test_images[:, 0, 0, 0].tolist() == [0, 10, 100]
    assert data.test_labels.tolist() == [0, 0, 1]


def test_the_middle_square_is_what_counts(tmp_path):
    pixels = np.zeros((16, 48))
    pixels[:, 16:32] = np.arange(16)[:, None] * 10
    for i in range(2):
        save(tmp_path / f"{i}.png", pixels)
    data = read_folder(tmp_path, 16, channels=1)
    assert torch.equal(data.train_images[0, 0], torch.from_numpy(pixels[:, 16:32].astype(np.uint8)))
    assert data.classes == (".",)


def test_resizing_and_colours(tmp_path):
    for i in range(2):
        save(tmp_path / f"{i}.png", np.full((30, 20, 3), (200, 100, 50)))
    data = read_folder(tmp_path, 4)
    assert data.train_images[0].flatten(1).unique(dim=1).flatten().tolist() == [200, 100, 50]
    assert read_folder(tmp_path, 4, channels=1).image_shape == (1, 4, 4)


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        read_folder(tmp_path / "nowhere", 8)
    with pytest.raises(DataError, match="holds 0 images in 0 classes"):
        read_folder(tmp_path, 8)
    save(tmp_path / "one.png", np.zeros((4, 4)))
    with pytest.raises(DataError, match="holds 1 images in 1 classes; a class should hold two or more"):
        read_folder(tmp_path, 8)
    (tmp_path / "two.png").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"two\.png is damaged or no image"):
        read_folder(tmp_path, 8)
