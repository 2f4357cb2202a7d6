"""What tests of the benchmarks share."""

from dataclasses import replace

import pytest
import torch

from retract.benchmarks.data import download


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """The test's own cache folder; and nothing reaches the network."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RETRACT_CACHE_DIR", str(cache))
    for name, files in download.OFFICIAL.items():
        nowhere = tuple(replace(file, addresses=("http://127.0.0.1:9/",)) for file in files)
        monkeypatch.setitem(download.OFFICIAL, name, nowhere)
    return cache


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    """The working directory and the cache are the test's own, and so is the number of threads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETRACT_CACHE_DIR", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)
