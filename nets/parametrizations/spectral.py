"""Weights U diag(s) Vᵀ of given rank, whose singular values lie in a given set, as parametrizations.

`SVDP` keeps the frames U and V as they are, `STTP` as tensor trains (Obukhov et al., AISTATS 2021, sections 3.1 and
3.3); `svdp` and `sttp` put them on a layer. Both have two forms that span the same weights:

- ``"householder"``: coordinates, as many as the set has dimensions, which any optimizer may change freely;
- ``"stiefel"``: the factors themselves, a point of a manifold, for the optimizers of `retract.optim`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from retract.manifolds import tensor_train
from retract.manifolds.spectral import SVDSpectral
from retract.manifolds.spectrum import SpectrumLike, as_spectrum
from retract.manifolds.tensor_train import check_ranks

from ._base import Form, SpectralParametrization
from ._layout import MatrixLayout
from ._registration import Execution, Init, layout_of, register

__all__ = ["STTP", "SVDP", "sttp", "svdp"]

Layer = TypeVar("Layer", bound=nn.Module)


class SVDP(SpectralParametrization):
    r"""Weight :math:`U \operatorname{diag}(s) V^\top` of fixed rank with its singular values in a set.

    The weight (out, in, \*kernel) is its matrix (out, in \* kernel); :math:`U` (out, r) and :math:`V` (fan_in, r)
    have orthonormal columns. Use `svdp` to put it on a layer.

    Args:
        shape: shape of the weight.
        rank: 1 <= r <= min(out, fan_in).
        spectrum: allowed singular values: ``"identity"``, ``"free"``, ``"lipschitz"``, ``"bounded"`` or a `Spectrum`.
        form: ``"householder"`` (coordinates of U, of s, of V) or ``"stiefel"`` (U, s, V themselves).
        transposed: the weight is (in, out, \*kernel).

    Source: Obukhov et al., AISTATS 2021, section 3.1 (SVDP).
    """

    def __init__(
        self,
        shape: Sequence[int],
        rank: int,
        spectrum: SpectrumLike = "free",
        *,
        form: Form = "householder",
        transposed: bool = False,
    ) -> None:
        layout = MatrixLayout(tuple(shape), transposed)
        rows, columns = layout.matrix_shape
        _check_rank(rank, layout)
        allowed = as_spectrum(spectrum)
        super().__init__(layout, ((rows,), (columns,)), (rank,), allowed, SVDSpectral(rank, allowed), form)


class STTP(SpectralParametrization):
    r"""The same, with :math:`U` and :math:`V` as tensor trains of orthonormal cores.

    Rows and columns of the matrix are multi-indices; a core has one index of size n_k between bonds of sizes
    R_{k-1} and R_k, and r is the bond between U and V. Use `sttp` to put it on a layer.

    Args:
        shape: shape of the weight.
        rank: the largest size of a bond, at most min(out, fan_in); or the sizes of all, from the first mode of out
            to r, and on to the first mode of fan_in.
        spectrum: allowed singular values: ``"identity"``, ``"free"``, ``"lipschitz"``, ``"bounded"`` or a `Spectrum`.
        modes: sizes of the indices of out and of fan_in = in \* kernel, row-major. Default: the prime factors of
            out, of in and of each kernel size; a large prime is one large core.
        form: ``"householder"`` (coordinates of cores of U, of s, of cores of V; saturated cores, as high as wide,
            have none) or ``"stiefel"`` (cores of U, s, cores of V).
        transposed: the weight is (in, out, \*kernel).

    Source: Obukhov et al., AISTATS 2021, section 3.3 (STTP).
    """

    def __init__(
        self,
        shape: Sequence[int],
        rank: int | Sequence[int],
        spectrum: SpectrumLike = "free",
        *,
        modes: tuple[Sequence[int], Sequence[int]] | None = None,
        form: Form = "householder",
        transposed: bool = False,
    ) -> None:
        layout = MatrixLayout(tuple(shape), transposed)
        checked = layout.prime_modes() if modes is None else layout.check_modes(modes)
        if isinstance(rank, int):
            _check_rank(rank, layout)
        ranks = check_ranks(*checked, rank)
        allowed = as_spectrum(spectrum)
        super().__init__(layout, checked, ranks, allowed, tensor_train.STTP(checked, ranks, allowed), form)

    def extra_repr(self) -> str:
        """Matrix, modes, ranks and spectrum."""
        return f"{super().extra_repr()}, modes={self.modes}, ranks={self.ranks}"


def svdp(
    module: Layer,
    rank: int,
    spectrum: SpectrumLike = "free",
    *,
    form: Form = "householder",
    execution: Execution = "auto",
    name: str = "weight",
    init: Init = "fit",
) -> Layer:
    """Give a layer a weight of fixed rank with its singular values in a set (`SVDP`), in place.

    Layers are `torch.nn.Linear`, `Embedding`, `Conv1d` to `Conv3d` and `ConvTranspose1d` to `ConvTranspose3d`.
    Their parameters become new ones, ``module.parametrizations.weight.original0`` and so on: make optimizers after
    this. Reading ``module.weight`` computes the weight; assigning to it fits the factors.

    Args:
        module: the layer.
        rank: 1 <= rank <= min(out, fan_in).
        spectrum: allowed singular values: ``"identity"``, ``"free"``, ``"lipschitz"``, ``"bounded"`` or a `Spectrum`.
        form: ``"householder"``: coordinates, for any optimizer; or ``"stiefel"``: factors, for the optimizers of
            `retract.optim` with the groups of `manifold_groups`.
        execution: ``"weight"`` builds the weight for every call; ``"factored"`` never does: a convolution becomes
            one to ``rank`` channels and a 1 x 1, the other layers two products. Both give the same results and have
            the same state dict. ``"auto"`` takes the one with fewer multiplications.
        name: the parameter.
        init: ``"fit"`` starts from the nearest weight to the layer's own; singular values that this moves to the
            border of their set, where they would coincide, are drawn a tenth of the way towards
            ``spectrum.spread``. ``"spread"`` keeps the frames of that weight only, with these singular values.

    Returns:
        The layer.

    Raises:
        ValueError, TypeError: an unsupported layer (groups > 1, sparse gradients, a weight that is parametrized or
            not there yet), a rank, spectrum or option that is not allowed, a weight with NaN or infinite
            entries. The layer is unchanged then.
    """
    layout = layout_of(module, name)
    parametrization = SVDP(layout.weight_shape, rank, spectrum, form=form, transposed=layout.transposed)
    return register(module, name, parametrization, execution=execution, init=init)


def sttp(
    module: Layer,
    rank: int | Sequence[int],
    spectrum: SpectrumLike = "free",
    *,
    modes: tuple[Sequence[int], Sequence[int]] | None = None,
    form: Form = "householder",
    execution: Execution = "auto",
    name: str = "weight",
    init: Init = "fit",
) -> Layer:
    """Give a layer a weight whose singular frames are tensor trains (`STTP`), in place; otherwise as `svdp`.

    Args:
        module: the layer.
        rank: the largest rank of all bonds, at most min(out, fan_in); or all ranks, from the first mode of out
            inward and from there out to the first mode of fan_in.
        spectrum: as in `svdp`.
        modes: sizes that multiply to out, and sizes that multiply to fan_in = in * kernel. Default: the prime
            factors of out, of in and of each kernel size; a prime stays whole, and its core is a large one.
        form: as in `svdp`.
        execution: as in `svdp`.
        name: the parameter.
        init: as in `svdp`.

    Returns:
        The layer.

    Raises:
        ValueError, TypeError: as in `svdp`; modes that do not multiply to the sizes, ranks that no tensor has.
    """
    layout = layout_of(module, name)
    parametrization = STTP(layout.weight_shape, rank, spectrum, modes=modes, form=form, transposed=layout.transposed)
    return register(module, name, parametrization, execution=execution, init=init)


def _check_rank(rank: int, layout: MatrixLayout) -> None:
    """Refuse a rank that no weight of this shape has."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be an int, got {rank!r}")
    most = min(layout.matrix_shape)
    if not 1 <= rank <= most:
        raise ValueError(
            f"rank must be from 1 to {most} for a weight of shape {layout.weight_shape}, "
            f"whose matrix is {layout.matrix_shape}, got {rank}"
        )
