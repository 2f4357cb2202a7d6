"""Where data sets are looked for, and downloads from a server that runs here."""

import functools
import http.server
import threading
from hashlib import md5
from importlib import reload

import pytest

from retract.benchmarks.data import DataError, download, load
from tests.benchmarks.data_files import binary_files, write_mnist, write_svhn, write_tar

pytestmark = pytest.mark.usefixtures("own_cache")


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
