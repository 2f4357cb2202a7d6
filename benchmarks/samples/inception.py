"""FID, KID and Inception score by torch-fidelity, with the Inception file that a user supplies: no downloads."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..data import Dataset
from .metrics import to_bytes
from .statistics import split_of

__all__ = ["InceptionMetrics", "inception_metrics", "require_inception"]

KERNEL_SUBSET = 1000  # images, as published
LAST_LAYER = ("fc.weight", (1008, 2048))  # of the Inception network of 2015 that all published figures come from
ADDRESS = "https://github.com/toshas/torch-fidelity/releases: weights-inception-2015-12-05-6726825d.pth"


@dataclass(frozen=True)
class InceptionMetrics:
    """Figures as torch-fidelity gives them. FID depends on the number of samples: 50,000 are usual.

    Args:
        samples: how many there were.
        split: of the data.
        fid: Fréchet distance to all images of the split; less is better.
        kid: mean over 100 random subsets of the unbiased kernel distance; less is better.
        kid_std: standard deviation over the subsets (not the error of their mean).
        inception_score: mean over 10 parts of the samples; more is better.
        inception_score_std: standard deviation over the parts.
        weights_hash: SHA-256 of the Inception file.
        version: of torch-fidelity.
    """

    samples: int
    split: str
    fid: float
    kid: float
    kid_std: float
    inception_score: float
    inception_score_std: float
    weights_hash: str
    version: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class _Images(torch.utils.data.Dataset[Tensor]):
    """Images as torch-fidelity reads them: uint8, one at a time, of three channels."""

    def __init__(self, images: Tensor) -> None:
        self._images = images.cpu().expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return self._images[index]


def inception_metrics(
    samples: Tensor, data: Dataset, weights: str | Path, *, split: str = "train", batch_size: int = 64
) -> InceptionMetrics:
    """Compare samples with the images of a data set by an Inception network.

    The network enlarges every image to 299x299 and takes 6 billion multiplications for it: use a GPU. It runs on the
    samples' device. Torch's random numbers are not touched.

    Args:
        samples: images (N, C, H, W), N at least 10, C 1 or 3, as `evaluate_samples` takes them. Gray images are given
            three equal channels.
        data: the data set.
        weights: the file of torch-fidelity's Inception weights.
        split: "train" or "test": which images to compare with.
        batch_size: images at a time.

    Raises:
        ImportError: torch-fidelity is not installed.
        ValueError: no such file, or it holds something else; or samples are not as they should be.
    """
    require_inception(weights)
    fidelity = _fidelity()
    images, references = to_bytes(samples), split_of(data, split)[0]
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) < 10:
        raise ValueError(f"samples must have shape (N, 1 or 3, H, W), N at least 10, got {tuple(samples.shape)}")
    with torch.random.fork_rng(devices=()):  # a DataLoader draws a number
        figures = fidelity.calculate_metrics(
            input1=_Images(images),
            input2=_Images(references),
            isc=True,
            fid=True,
            kid=True,
            kid_subset_size=min(KERNEL_SUBSET, len(images), len(references)),
            feature_extractor="inception-v3-compat",
            feature_extractor_weights_path=str(weights),
            cuda=images.is_cuda,
            batch_size=batch_size,
            save_cpu_ram=True,  # no worker processes: the images are in memory
            cache=False,
            verbose=False,
        )
    return InceptionMetrics(
        samples=len(images),
        split=split,
        fid=float(figures[fidelity.KEY_METRIC_FID]),
        kid=float(figures[fidelity.KEY_METRIC_KID_MEAN]),
        kid_std=float(figures[fidelity.KEY_METRIC_KID_STD]),
        inception_score=float(figures[fidelity.KEY_METRIC_ISC_MEAN]),
        inception_score_std=float(figures[fidelity.KEY_METRIC_ISC_STD]),
        weights_hash=hashlib.sha256(Path(weights).read_bytes()).hexdigest(),
        version=fidelity.__version__,
    )


def require_inception(weights: str | Path) -> None:
    """Raise an error, before hours of training, when `inception_metrics` could not run with this file.

    The file is read as plain tensors: nothing in it can run.

    Raises:
        ImportError: torch-fidelity is not installed.
        ValueError: no such file, or it holds something else.
    """
    _fidelity()
    path = Path(weights)
    if not path.is_file():
        raise ValueError(f"there is no Inception file {path}. It can be had from {ADDRESS}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        shape = tuple(state[LAST_LAYER[0]].shape)
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not torch-fidelity's Inception file: {error}. See {ADDRESS}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors, or is damaged. See {ADDRESS}") from error
    if shape != LAST_LAYER[1]:
        raise ValueError(f"{path} is not torch-fidelity's Inception file: {LAST_LAYER[0]} is {shape}. See {ADDRESS}")


def _fidelity() -> ModuleType:
    try:
        import torch_fidelity
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
        message = f"Inception metrics need torch-fidelity, which cannot be imported ({error}): pip install"
        raise ImportError(f"{message} 'retract[inception]'") from error
    module: ModuleType = torch_fidelity
    return module
