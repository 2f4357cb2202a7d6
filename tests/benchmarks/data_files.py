"""Writers of small data sets in every form that people have them in."""

import gzip
import io
import pickle
import tarfile

import numpy as np
import scipy.io
from PIL import Image

from retract.benchmarks.data import cifar, mnist

PER_BATCH = 20


def generator(seed=0):
    return np.random.default_rng(seed)


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
