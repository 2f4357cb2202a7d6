"""Inception metrics: refusals without the extra or the file, and figures that are torch-fidelity's."""

import builtins
import json
from dataclasses import replace

import pytest
import torch

from retract.benchmarks.data import load
from retract.benchmarks.samples import inception as module
from retract.benchmarks.samples.distances import frechet_distance_of
from retract.benchmarks.samples.inception import inception_metrics, require_inception


@pytest.fixture(scope="module")
def data():
    """A data set so small that an Inception network can look at it."""
    digits = load("digits")
    return replace(digits, test_images=digits.test_images[:12], test_labels=digits.test_labels[:12])


class Fidelity:
    """Stands in for torch-fidelity, and keeps what it was asked."""

    KEY_METRIC_FID, KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD = "fid", "kid", "kid_std"
    KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD = "isc", "isc_std"
    __version__ = "0"

    def calculate_metrics(self, **options):
        self.options = options
        torch.rand(1)
        return {"fid": 1.0, "kid": 2.0, "kid_std": 3.0, "isc": 4.0, "isc_std": 5.0}


@pytest.fixture
def fidelity(monkeypatch):
    stand_in = Fidelity()
    monkeypatch.setattr(module, "_fidelity", lambda: stand_in)
    return stand_in


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "inception.pth"
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, path)
    return path


def test_without_the_extra(data, weights, monkeypatch):
    imported = builtins.__import__

    def missing(name, *rest):
        if name == "torch_fidelity":
            raise ImportError("no torch_fidelity")
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"no torch_fidelity.*pip install 'retract\[inception\]'"):
        inception_metrics(data.test_images, data, weights)


def test_without_the_file(fidelity, tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(ValueError, match=r"there is no Inception file .*weights-inception-2015"):
            require_inception(path)


class Harmful:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"not a file of torch", "is not torch-fidelity's|or is damaged"),
        ({"fc.weight": torch.zeros(1000, 2048)}, r"fc.weight is \(1000, 2048\)"),
        ({"other": torch.zeros(1)}, "is not torch-fidelity's Inception file"),
        (torch.zeros(3), "is not torch-fidelity's Inception file"),
        ({"fc.weight": 3}, "is not torch-fidelity's Inception file"),
        (Harmful(), "more than tensors"),
    ],
)
def test_another_file(fidelity, tmp_path, capsys, contents, message):
    path = tmp_path / "file.pth"
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        torch.save(contents, path)
    with pytest.raises(ValueError, match=message):
        require_inception(path)
    assert not capsys.readouterr().out


def test_what_torch_fidelity_is_asked(data, weights, fidelity):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = inception_metrics(data.train_images[:30].float() / 127.5 - 1, data, weights, split="test")
    assert torch.equal(torch.get_rng_state(), before)
    samples, references = fidelity.options["input1"], fidelity.options["input2"]
    assert (len(samples), len(references)) == (30, 12)
    assert samples[3].shape == (3, 8, 8) and samples[3].dtype == torch.uint8
    for channel in range(3):
        assert torch.equal(samples[3][channel], data.train_images[3, 0])
        assert torch.equal(references[5][channel], data.test_images[5, 0])
    assert fidelity.options["kid_subset_size"] == 12
    assert fidelity.options["feature_extractor_weights_path"] == str(weights)
    assert not fidelity.options["cuda"]
    assert (found.fid, found.kid, found.kid_std) == (1, 2, 3)
    assert (found.inception_score, found.inception_score_std) == (4, 5)
    assert (found.samples, found.split, found.version) == (30, "test", "0")
    assert found.weights_hash == module.hashlib.sha256(weights.read_bytes()).hexdigest()
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False)) == found.as_dict()


@pytest.mark.parametrize("shape", [(9, 1, 8, 8), (30, 2, 8, 8), (30, 64)])
def test_wrong_samples(data, weights, fidelity, shape):
    with pytest.raises(ValueError, match="samples must have shape"):
        inception_metrics(torch.zeros(shape), data, weights)


@pytest.mark.slow
def test_figures_are_those_of_the_network(data, tmp_path):
    """A random network; its features are taken by themselves and compared by our own distances."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torch-fidelity cannot be imported: {error}")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # the one way to build it without a file
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("random", ["2048"])
    torch.save(network.state_dict(), tmp_path / "inception.pth")

    samples = torch.randint(256, (14, 1, 8, 8), dtype=torch.uint8)
    found = inception_metrics(samples, data, tmp_path / "inception.pth", split="test")
    with torch.no_grad():
        features = [network(images.expand(-1, 3, -1, -1))[0] for images in (samples, data.test_images)]
    assert found.fid == pytest.approx(frechet_distance_of(*features), rel=1e-3)
    assert found.inception_score >= 1
