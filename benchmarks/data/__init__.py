"""Data sets as tensors: found in the user's files in any of their forms, or downloaded with a checksum."""

from .augment import pad_crop_flip
from .dataset import DataError, Dataset
from .load import DATASETS, load

__all__ = ["DATASETS", "DataError", "Dataset", "load", "pad_crop_flip"]
