"""Tensor networks for the tests of initialization: the formats in use, and others that only the rule covers."""

import math

import torch
import torch.nn.functional as F

from retract.nets.layers.tensor import TensorConv2d
from retract.nets.layers.tensor_network import TensorNetwork


def _network(cores, sizes, inputs, outputs, kernel="hw"):
    dims = {label: size for label, size in sizes.items() if label in cores}
    return TensorNetwork(cores.split(), dims, inputs=inputs, outputs=outputs, kernel=kernel)


def formats(inputs=64, outputs=64, kernel=3):
    """Convolutions between channels that four divides, of 9 to 18 % of the dense parameters for 64 channels."""
    one = {"i": inputs, "o": outputs, "h": kernel, "w": kernel}
    split = {**one, "i": 4, "j": 4, "k": inputs // 16, "x": 4, "y": 4, "z": outputs // 16}
    ring, rank8 = dict.fromkeys("rabcdef", 10), dict.fromkeys("abcde", 8)
    return {
        "cp": _network("or ir hr wr", {**one, "r": 48}, "i", "o"),
        "tucker2": _network("op pqhw iq", {**one, "p": 16, "q": 16}, "i", "o"),
        "tucker": _network("op iq hs wt pqst", {**one, "p": 16, "q": 16, "s": kernel, "t": kernel}, "i", "o"),
        "tensor_train": _network("ia ahb bwc co", {**one, "a": 24, "b": 24, "c": 24}, "i", "o"),
        "tt_matrix": _network("hwa ixab jybc kzc", {**split, "a": 12, "b": 12, "c": 12}, "ijk", "xyz"),
        "tensor_ring": _network("ria ajb bkc chwd dxe eyf fzr", {**split, **ring}, "ijk", "xyz"),
        "block_term": _network("obp ibq bpqhw", {**one, "b": 4, "p": 8, "q": 8}, "i", "o"),
        "hierarchical_tucker": _network(
            "ip oq hs wt pqu stv uv", {**one, "p": 16, "q": 16, "s": 3, "t": 3, "u": 8, "v": 8}, "i", "o"
        ),
        # A hyperedge of three cores, a dangling bond (y), and cores of two external indices.
        "odd": _network("iab hacx wbcd oade exy", {**one, **rank8, "x": 4, "y": 4}, "i", "o"),
    }


FORMATS = formats()

#: What the rule must cover as well: one core, cores that are vectors, ranks of one, indices that cores share.
OTHERS = {
    "dense": _network("oihw", {"o": 8, "i": 6, "h": 3, "w": 2}, "i", "o"),
    "weighted": _network("r or ir hr wr", {"r": 7, "o": 8, "i": 6, "h": 3, "w": 3}, "i", "o"),
    "vectors": _network("o i h w", {"o": 8, "i": 6, "h": 3, "w": 3}, "i", "o"),
    "rank one": _network("or ir hr wr", {"r": 1, "o": 8, "i": 6, "h": 1, "w": 1}, "i", "o"),
    "large rank": _network("or ir hr wr", {"r": 50, "o": 8, "i": 6, "h": 3, "w": 3}, "i", "o"),
    "shared output": _network("or irhw o", {"r": 5, "o": 8, "i": 6, "h": 3, "w": 3}, "i", "o"),
    "dangling": _network("orx ihwry", {"r": 5, "o": 8, "i": 6, "h": 3, "w": 3, "x": 4, "y": 3}, "i", "o"),
    "linear": _network("or ir", {"r": 5, "o": 8, "i": 6}, "i", "o", ""),
    "one dimension": _network("or irh", {"r": 5, "o": 8, "i": 6, "h": 5}, "i", "o", "h"),
}


class Cores(torch.nn.Module):
    """The least that can be initialized: a network and its cores."""

    def __init__(self, network, dtype=torch.float32, **geometry):
        super().__init__()
        self.network = network
        self.cores = torch.nn.ParameterList(torch.empty(shape, dtype=dtype) for shape in network.core_shapes)
        vars(self).update(geometry)

    @property
    def weight(self):
        return self.network.weight(self.cores)


def circular(network, **options):
    """A convolution of kernel 3 without borders."""
    return TensorConv2d(network, padding=1, padding_mode="circular", bias=False, execution="weight", **options)


def ratios(layers, size=8, batch=4, activation=F.relu):
    """Forward and backward ratios of second moments from layer to layer; the first layer's input is no activation."""
    signal = torch.randn(batch, layers[0].in_channels, size, size, requires_grad=True)
    responses = [signal]
    for layer in layers:
        responses.append(layer(responses[-1] if len(responses) == 1 else activation(responses[-1])))
    gradients = torch.autograd.grad(responses[-1], responses, torch.randn_like(responses[-1]))
    forward, backward = ([float(t.detach().double().square().mean()) for t in kind] for kind in (responses, gradients))
    pairs = range(1 if len(layers) > 1 else 0, len(layers))
    return [forward[i + 1] / forward[i] for i in pairs], [backward[i] / backward[i + 1] for i in pairs]


def arithmetic(values):
    return sum(values) / len(values)


def geometric(values):
    return math.exp(arithmetic([math.log(value) for value in values]))


def spread(values):
    """Standard deviation over mean."""
    values = torch.as_tensor(values)
    return float(values.std() / values.mean())
