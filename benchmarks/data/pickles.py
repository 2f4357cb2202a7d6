"""Reading the pickles of CIFAR's python batches without running what they ask for."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["PlainArray", "load_plain"]


class PlainArray:
    """A stand-in that keeps what a pickle says of a NumPy array; NumPy itself sees only bytes and a shape."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.data = b""

    def __setstate__(self, state: tuple[int, tuple[int, ...], _DType, bool, bytes]) -> None:
        _, self.shape, dtype, fortran_order, self.data = state
        if fortran_order or dtype.name not in ("u1", "uint8", "|u1"):
            raise pickle.UnpicklingError("only row-major arrays of unsigned bytes are allowed")

    def numpy(self) -> NDArray[np.uint8]:
        """The array; ValueError when the bytes do not fill the shape."""
        return np.frombuffer(self.data, np.uint8).reshape(self.shape)


class _DType:
    def __init__(self, name: str | bytes, *_: object) -> None:
        self.name = name.decode("ascii") if isinstance(name, bytes) else name

    def __setstate__(self, state: object) -> None:
        """Byte order and the like, which single bytes have not."""


def _stand_ins() -> dict[tuple[str, str], Callable[..., object]]:
    """What a pickled array refers to, by (module, name). Made anew for each load: a pickle can change a
    function's attributes, and may spoil only its own.
    """

    class Array(PlainArray):
        pass

    class DType(_DType):
        pass

    def encode(text: str, encoding: str) -> bytes:
        # How Python 3 writes bytes in the protocols of Python 2.
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"encoding {encoding!r} is not allowed")
        return text.encode("latin1")

    def reconstruct(*_: object) -> PlainArray:
        return Array()

    core = ("numpy.core.multiarray", "numpy._core.multiarray")
    return {
        ("numpy", "ndarray"): Array,
        ("numpy", "dtype"): DType,
        ("_codecs", "encode"): encode,
        **{(module, "_reconstruct"): reconstruct for module in core},
    }


class _PlainUnpickler(pickle.Unpickler):
    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self._stand_ins = _stand_ins()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._stand_ins[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}; only plain values and NumPy arrays are allowed"
            ) from None


def load_plain(content: bytes) -> Any:
    """The dicts, lists, tuples, strings, bytes, numbers and :class:`PlainArray` of a pickle, and nothing
    else.

    No name that the pickle gives is ever imported, so that nothing in it can run. Strings of Python 2 come as
    bytes.

    Raises:
        pickle.UnpicklingError: it is no pickle, it is damaged, or it asks for anything else.
    """
    try:
        return _PlainUnpickler(content).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # damaged opcodes raise nearly every built-in exception
        raise pickle.UnpicklingError(f"it is damaged or truncated ({type(error).__name__}: {error})") from error
