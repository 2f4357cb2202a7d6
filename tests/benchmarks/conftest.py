"""What tests of the benchmarks share."""

from dataclasses import replace

import pytest

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
