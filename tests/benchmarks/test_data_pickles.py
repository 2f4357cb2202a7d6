"""CIFAR's python batches: what Python itself would read, and nothing that a pickle asks to run."""

import os
import pickle

import numpy as np
import pytest

from retract.benchmarks.data import DataError, load, pickles
from tests.benchmarks.data_files import cifar_batches, python2_pickle, python_files, write_files

pytestmark = pytest.mark.usefixtures("own_cache")


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
    with pytest.raises(DataError, match=r"data_batch_2 is (no CIFAR-10 python batch|damaged)"):
        load("cifar10", tmp_path)


def test_a_pickle_cannot_change_how_the_next_is_read():
    """BUILD on a function sets its attributes; what it reaches is thrown away."""
    poison = b"cnumpy.core.multiarray\n_reconstruct\nN}X\x0c\x00\x00\x00__defaults__N\x86b."
    with pytest.raises(pickle.UnpicklingError):
        pickles.load_plain(poison[:-2] + b"\x86R.")
    pickles.load_plain(b"cnumpy.core.multiarray\n_reconstruct\nN}X\x08\x00\x00\x00__name__X\x01\x00\x00\x00xs\x86b.")
    pixels, labels = cifar_batches()["test_batch"]
    assert np.array_equal(pickles.load_plain(python2_pickle(pixels, labels))[b"data"].numpy(), pixels)
