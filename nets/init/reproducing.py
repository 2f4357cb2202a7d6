"""The backward pass of a strided, padded tensorial convolution as a convolution of its own.

The Reproducing Transformation of Pan et al., "A unified weight initialization paradigm for tensorial convolutional
neural networks", ICML 2022. A convolution contracts its input with the cores and with one dummy tensor for each
spatial dimension (Hayashi et al., NeurIPS 2019). The gradient with respect to the input is the same contraction with
input and output exchanged, and that is again a convolution: of stride 1, over the cotangent with zeros inserted, with
the kernel's indices reversed. So one calculus of variances serves both directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from retract.nets.layers.tensor_network import TensorNetwork

from ._axes import Axis, Padding, convolution_axes

__all__ = ["ReproducedConvolution", "dummy_tensor", "reproducing_transformation"]

_CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)


def dummy_tensor(size: int, kernel: int, *, stride: int = 1, padding: int = 0, dilation: int = 1) -> Tensor:
    """P (size, outputs, kernel), zeros and ones in float64: P[j, j', q] = 1 where j = stride j' + dilation q - padding.

    A convolution in one dimension is Y[j'] = sum over j and q of X[j] P[j, j', q] W[q].

    Raises:
        ValueError: a kernel, with its dilation, longer than the padded input, or an argument out of range.
    """
    (axis,) = convolution_axes((kernel,), stride=stride, padding=padding, dilation=dilation)
    return (torch.arange(size)[:, None, None] == axis.seen(size)).double()


@dataclass(frozen=True)
class ReproducedConvolution:
    """Maps a cotangent of a convolution's output to the gradient of its input, as a convolution of stride 1.

    Its weight, (in, out/groups, *kernel), is itself a tensor network.
    """

    #: The network with input and output exchanged.
    network: TensorNetwork
    #: The same cores, reversed along the indices of the kernel.
    cores: tuple[Tensor, ...]
    #: The dimensions of the convolution whose backward pass it is.
    axes: tuple[Axis, ...]
    groups: int

    def signal(self, cotangent: Tensor, input_size: Sequence[int]) -> Tensor:
        """What it convolves, with no padding more: the cotangent, stride - 1 zeros between entries, zeros around.

        Args:
            cotangent: (batch, out, *output size).
            input_size: spatial size of the input of the convolution; strides make several give one output size.
        """
        if len(input_size) != len(self.axes):
            raise ValueError(f"input_size must have {len(self.axes)} numbers, got {tuple(input_size)}")
        outputs = tuple(axis.outputs(size) for axis, size in zip(self.axes, input_size, strict=True))
        channels = self.network.in_features * self.groups
        if cotangent.shape[1:] != (channels, *outputs):
            raise ValueError(
                f"cotangent must have shape (batch, {channels}, *{outputs}) for inputs of size {tuple(input_size)}, "
                f"got {tuple(cotangent.shape)}"
            )
        expanded = ((n - 1) * axis.stride + 1 for axis, n in zip(self.axes, outputs, strict=True))
        signal = cotangent.new_zeros(*cotangent.shape[:2], *expanded)
        strided = tuple(slice(None, None, axis.stride) for axis in self.axes)
        signal[:, :, *strided] = cotangent
        borders: list[int] = []
        for axis, size in zip(reversed(self.axes), reversed(input_size), strict=True):
            before, after = axis.padding
            # The last inputs, which no output reaches if the stride does not divide the steps, have a gradient: zero.
            borders += [axis.reach - before, axis.reach - after + axis.steps(size) % axis.stride]
        return F.pad(signal, borders)

    def __call__(self, cotangent: Tensor, input_size: Sequence[int]) -> Tensor:
        """(batch, out, *output size) -> the gradient (batch, in, *input_size)."""
        signal, weight = self.signal(cotangent, input_size), self.network.weight(self.cores)
        if not self.axes:
            return signal @ weight.mT
        result: Tensor = _CONVOLVE[len(self.axes) - 1](
            signal, weight, dilation=[axis.dilation for axis in self.axes], groups=self.groups
        )
        return result


def reproducing_transformation(
    network: TensorNetwork,
    cores: Sequence[Tensor],
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> ReproducedConvolution:
    """The backward pass, with respect to the input, of the convolution with a tensor network as its weight.

    On each spatial axis of N inputs, with stride s, dilation e, kernel k and padding p: put s - 1 zeros between the
    entries of the cotangent; pad it by e(k-1) - p on both sides, and by (N + 2p - e(k-1) - 1) mod s more at the end;
    reverse the kernel's index; exchange the input's and the output's indices. A dense weight is the network of one
    core: ``TensorNetwork(["oihw"], dims, inputs="i", outputs="o", kernel="hw")``.

    Args:
        network: of the weight (out, in/groups, *kernel), with up to three spatial dimensions.
        cores: its tensors.
        stride: of the convolution.
        padding: zeros around its input.
        dilation: of the convolution.
        groups: of the convolution. The sizes of the network's first outputs must multiply to it: they then stay in
            front, where the gradient's channels have them.

    Raises:
        ValueError: cores that do not fit, arguments out of range, or groups that are not the first outputs.
    """
    network.check_cores(cores)
    if len(network.kernel) > len(_CONVOLVE):
        raise ValueError(f"network must have at most three kernel indices, got {network}")
    leading = next((n for n in range(len(network.outputs) + 1) if network.size(network.outputs[:n]) == groups), None)
    if leading is None:
        raise ValueError(
            f"groups must be the product of the sizes of the first outputs of {network}, got {groups}: "
            "split an output index in two, the groups first"
        )
    exchanged = TensorNetwork(
        network.cores,
        network.dims,
        inputs=network.outputs[leading:],
        outputs=network.outputs[:leading] + network.inputs,
        kernel=network.kernel,
    )
    reversed_cores = tuple(
        core.flip([labels.index(label) for label in labels if label in network.kernel])
        for labels, core in zip(network.cores, cores, strict=True)
    )
    axes = convolution_axes(network.kernel_size, stride=stride, padding=padding, dilation=dilation)
    return ReproducedConvolution(exchanged, reversed_cores, axes, groups)
