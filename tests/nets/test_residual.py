import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from retract.nets.init.residual import scale_residual_branches_
from retract.nets.layers.tensor import TensorConv2d, TensorLinear
from retract.nets.layers.tensor_network import TensorNetwork
from retract.nets.parametrizations import canonical_weight_norm, sttp, svdp
from tests.nets.tensor_cases import FORMATS, circular, geometric

LINEAR_NETWORK = TensorNetwork(["or", "ir"], {"o": 5, "i": 6, "r": 3}, inputs="i", outputs="o")


def linear(wrap=lambda layer: layer, **options):
    return wrap(nn.Linear(6, 5, **options))


LAYERS = {
    "linear": linear,
    "no bias": lambda: linear(bias=False),
    "convolution": lambda: nn.Conv2d(6, 5, 3),
    "transposed": lambda: nn.ConvTranspose2d(6, 5, 3),
    "cores": lambda: TensorConv2d(FORMATS["tensor_ring"]),
    "linear cores": lambda: TensorLinear(LINEAR_NETWORK),
    "canonical": lambda: linear(lambda layer: canonical_weight_norm(layer, 3)),
    "canonical, oblique": lambda: canonical_weight_norm(nn.Conv2d(6, 5, 3), 4, form="oblique"),
    "weight norm": lambda: linear(parametrizations.weight_norm),
    "free spectrum": lambda: linear(lambda layer: svdp(layer, 3)),
    "free spectrum, stiefel": lambda: linear(lambda layer: svdp(layer, 3, form="stiefel")),
    "tensor train": lambda: sttp(nn.Conv2d(6, 5, 3), 3),
}


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_state(module, before):
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("make", LAYERS.values(), ids=list(LAYERS))
def test_the_output_of_every_branch_is_scaled(make):
    torch.manual_seed(0)
    layers = [make().double() for _ in range(4)]
    for layer in layers:
        if layer.bias is not None:
            nn.init.normal_(layer.bias)
    before = [(layer.weight.detach().clone(), layer.bias, layer.bias is None or layer.bias.clone()) for layer in layers]
    parameters = [list(layer.parameters()) for layer in layers]
    assert scale_residual_branches_(layers) == layers
    for layer, (weight, bias, values), owned in zip(layers, before, parameters, strict=True):
        torch.testing.assert_close(layer.weight.detach(), weight / 2, rtol=1e-9, atol=1e-12)
        assert layer.bias is bias
        assert bias is None or torch.equal(bias, values / 2)
        assert all(a is b for a, b in zip(layer.parameters(), owned, strict=True))


def test_cores_stay_balanced():
    layer = TensorConv2d(FORMATS["tensor_ring"])
    scale_residual_branches_([layer], scale=0.1)
    norms = torch.stack([core.detach().norm() for core in layer.cores])
    assert norms.max() / norms.min() == pytest.approx(1, abs=1e-5)


def test_the_lambdas_of_a_canonical_weight_stay_at_one():
    layer = canonical_weight_norm(nn.Conv2d(6, 5, 3), 4)
    before = layer.parametrizations.weight.original0.clone()
    scale_residual_branches_([layer], scale=0.1)
    assert torch.equal(layer.parametrizations.weight.original0, before)


def test_only_the_last_layer_of_a_branch():
    branches = [nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh()) for _ in range(9)]
    before = [state(branch) for branch in branches]
    layers = scale_residual_branches_(iter(branches))
    assert layers == [branch[2] for branch in branches]
    for branch, values in zip(branches, before, strict=True):
        assert torch.equal(branch[0].weight, values["0.weight"])
        torch.testing.assert_close(branch[2].weight, values["2.weight"] / 3)


class Residual(nn.Module):
    """Blocks x + branch(relu(x)), each branch of two canonical convolutions."""

    def __init__(self, blocks):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.ReLU(), circular(FORMATS["cp"]), nn.ReLU(), circular(FORMATS["cp"])) for _ in range(blocks)
        )

    def forward(self, signal):
        for branch in self.branches:
            signal = signal + branch(signal)
        return signal


def growth(network):
    """Of the second moment, forward and backward."""
    signal = torch.randn(2, 64, 6, 6, requires_grad=True)
    output = network(signal)
    cotangent = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, signal, cotangent)
    return [
        float(a.detach().square().mean() / b.detach().square().mean())
        for a, b in ((output, signal), (gradient, cotangent))
    ]


@pytest.mark.parametrize("blocks", [16, 32])
def test_growth_through_all_blocks(blocks):
    """Thousands without the scale; (1 + 1/L)^L with it, whatever the depth. Means of three networks."""
    torch.manual_seed(1)
    free, scaled = [], []
    for _ in range(3):
        network = Residual(blocks)
        free.append(growth(network))
        scale_residual_branches_(network.branches)
        scaled.append(growth(network))
    for direction in (0, 1):
        assert geometric([values[direction] for values in free]) > 1e3
        assert 2.0 < geometric([values[direction] for values in scaled]) < 3.4


def test_a_branch_that_ends_in_cores_keeps_all_gradients():
    torch.manual_seed(2)
    network = Residual(4)
    scale_residual_branches_(network.branches)
    network(torch.randn(1, 64, 4, 4)).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())


@pytest.mark.parametrize(
    "last",
    [
        lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
        lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
        lambda: svdp(nn.Linear(4, 4), 2, spectrum="identity"),
        lambda: parametrize.register_parametrization(nn.Linear(4, 4), "weight", nn.Softplus()).requires_grad_(),
    ],
    ids=["spectral norm", "orthogonal", "identity spectrum", "no inverse"],
)
def test_a_weight_that_cannot_be_scaled_leaves_all_branches_as_they_were(last):
    branches = nn.ModuleList([nn.Linear(4, 4), TensorConv2d(FORMATS["cp"]), last()])
    before = state(branches)
    with pytest.raises(ValueError, match=r"weight of Parametrized.* cannot be scaled"):
        scale_residual_branches_(branches)
    assert_state(branches, before)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_weight_that_a_hook_computes_is_refused():
    layer = nn.utils.weight_norm(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="weight of Linear is no parameter"):
        scale_residual_branches_([layer])


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.InstanceNorm2d(4)])
def test_a_normalisation_at_the_end_of_a_branch_is_refused(norm):
    branch = nn.Sequential(nn.Conv2d(4, 4, 3), norm, nn.ReLU())
    with pytest.raises(ValueError, match=f"ends in {type(norm).__name__}, which undoes a scale before it"):
        scale_residual_branches_([branch])
    assert scale_residual_branches_([nn.Sequential(norm, nn.Conv2d(4, 4, 3))])


def test_arguments_that_are_not_allowed():
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="branches must hold at least one module, got none"):
        scale_residual_branches_([])
    with pytest.raises(TypeError, match="branches must be modules, got str"):
        scale_residual_branches_(["branch"])
    with pytest.raises(ValueError, match="branch Sequential has no linear layer"):
        scale_residual_branches_([nn.Sequential(nn.ReLU())])
    with pytest.raises(ValueError, match="the same last layer in two of them"):
        scale_residual_branches_([layer, nn.Sequential(nn.ReLU(), layer)])
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="scale must be positive and finite"):
            scale_residual_branches_([layer], scale=scale)
