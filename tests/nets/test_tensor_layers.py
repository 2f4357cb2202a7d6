"""Tensorial layers are the dense layers of their weight, however they run."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retract.nets.layers.tensor import TensorConv1d, TensorConv2d, TensorConv3d, TensorLinear, tensor_layer
from retract.nets.layers.tensor_formats import FORMATS, tensor_network
from retract.nets.layers.tensor_network import TensorNetwork

CONVOLUTIONS: dict[int, type[nn.Module]] = {1: TensorConv1d, 2: TensorConv2d, 3: TensorConv3d}
DENSE: dict[int, type[nn.Module]] = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CP = tensor_network("cp", (24, 16, 3, 3), rank=8)

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1, "bias": False},
    "dilated": {"dilation": 2, "padding": "same"},
    "valid": {"padding": "valid", "groups": 2},
    "circular": {"padding": 1, "padding_mode": "circular", "stride": 2},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": "same", "padding_mode": "replicate", "dilation": 2},
}


def with_weight(layer: nn.Module, dense: nn.Module) -> None:
    """Give a dense layer the weight and the bias of a tensorial one."""
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
        if dense.bias is not None:
            layer.bias.copy_(torch.randn_like(dense.bias))
            dense.bias.copy_(layer.bias)


@pytest.mark.parametrize("execution", ["factored", "weight"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_equal_to_the_dense_layer(spatial: int, geometry: str, execution: str) -> None:
    torch.manual_seed(0)
    options = GEOMETRIES[geometry]
    groups = options.get("groups", 1)
    network = tensor_network("tucker2", (6, 4, 3, 2, 3)[: 2 + spatial], rank=2)
    layer = CONVOLUTIONS[spatial](network, execution=execution, dtype=torch.float64, **options)
    kernel = network.kernel_size
    dense = DENSE[spatial](4 * groups, 6, kernel, dtype=torch.float64, **options)
    assert layer.factored == (execution == "factored")
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(layer, name) == getattr(dense, name), name
    assert layer.weight.shape == dense.weight.shape
    with_weight(layer, dense)
    input = torch.randn(2, 4 * groups, *(7, 8, 5)[:spatial], dtype=torch.float64, requires_grad=True)
    output, expected = layer(input), dense(input)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(input[0]), dense(input[0]), rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(expected)
    gradient, wanted = (torch.autograd.grad(one, input, cotangent)[0] for one in (output, expected))
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)
    output, expected = layer(input), dense(input)
    (weight_gradient,) = torch.autograd.grad(expected, dense.weight, cotangent)
    through_cores = torch.autograd.grad(output, list(layer.cores), cotangent)
    for one, other in zip(
        through_cores, torch.autograd.grad(layer.weight, list(layer.cores), weight_gradient), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("execution", ["factored", "weight"])
@pytest.mark.parametrize("format", FORMATS)
def test_linear_equals_dense(format: str, execution: str) -> None:
    torch.manual_seed(0)
    layer = TensorLinear(tensor_network(format, (12, 8), rank=2), execution=execution, dtype=torch.float64)
    dense = nn.Linear(8, 12, dtype=torch.float64)
    assert (layer.in_features, layer.out_features) == (8, 12)
    with_weight(layer, dense)
    for lead in ((), (3,), (2, 1, 3)):
        input = torch.randn(*lead, 8, dtype=torch.float64)
        torch.testing.assert_close(layer(input), dense(input), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("execution", ["factored", "weight"])
@pytest.mark.parametrize("format", FORMATS)
def test_memory_format_is_that_of_the_input(format: str, execution: str) -> None:
    layer = TensorConv2d(tensor_network(format, (24, 16, 3, 3), rank=4), padding=1, execution=execution)
    assert layer.weight.is_contiguous()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        input = torch.randn(2, 16, 6, 6).contiguous(memory_format=memory_format).requires_grad_()
        output = layer(input)
        assert output.is_contiguous(memory_format=memory_format)
        assert output.shape == (2, 24, 6, 6)


def test_execution_may_change() -> None:
    layer = TensorConv2d(CP, padding=1)
    assert layer.execution == "auto"
    assert layer.factored == layer.contraction.cheaper
    input = torch.randn(2, 16, 6, 6)
    outputs = []
    for execution in ("factored", "weight"):
        layer.execution = execution
        assert layer.factored == (execution == "factored")
        outputs.append(layer(input))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="execution must be one of 'auto', 'factored', 'weight', got 'fast'"):
        layer.execution = "fast"
    assert layer.execution == "weight"


def test_auto_takes_what_costs_less() -> None:
    small = TensorConv2d(tensor_network("cp", (128, 128, 3, 3), budget=0.1))
    large = TensorConv2d(tensor_network("cp", (128, 128, 3, 3), budget=1.0))
    assert small.factored
    assert not large.factored


def test_groups_that_do_not_part_the_outputs_need_the_weight() -> None:
    torch.manual_seed(0)
    dims = {"o": 4, "p": 3, "i": 2, "h": 3, "w": 3, "r": 3, "a": 2}
    network = TensorNetwork(["ora", "pra", "ir", "hrw"], dims, inputs="i", outputs="op", kernel="hw")
    layer = TensorConv2d(network, groups=3, dtype=torch.float64)
    assert layer.contraction is None and not layer.factored
    dense = nn.Conv2d(6, 12, 3, groups=3, dtype=torch.float64)
    with_weight(layer, dense)
    input = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(input), dense(input), rtol=1e-12, atol=1e-12)
    message = "execution must be 'weight' or 'auto' here, got 'factored': 3 groups do not part"
    with pytest.raises(ValueError, match=message):
        layer.execution = "factored"
    with pytest.raises(ValueError, match=message):
        TensorConv2d(network, groups=3, execution="factored")


def test_fresh_layers_keep_the_second_moment() -> None:
    torch.manual_seed(0)
    layer = TensorConv2d(CP, padding=1, padding_mode="circular")
    assert not layer.bias.any()
    input = torch.randn(16, 16, 8, 8)
    assert 1.0 < float(layer(input).detach().square().mean()) < 4.0, "gain of a ReLU: 2"
    before = [core.clone() for core in layer.cores]
    layer.reset_parameters()
    assert all(bool((core != old).any()) for core, old in zip(layer.cores, before, strict=True))


def test_gradients_reach_every_core_and_train() -> None:
    torch.manual_seed(0)
    layer = TensorConv2d(CP, execution="factored")
    layer(torch.randn(2, 16, 6, 6)).square().mean().backward()
    assert all(bool(parameter.grad.any()) for parameter in layer.parameters())
    assert sum(parameter.numel() for parameter in layer.parameters()) == CP.parameters + 24


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("execution", ["factored", "weight"])
def test_half_precision(dtype: torch.dtype, execution: str) -> None:
    torch.manual_seed(0)
    layer = TensorConv2d(CP, padding=1, execution=execution)
    input = torch.randn(2, 16, 6, 6)
    expected = layer(input)
    output = layer.to(dtype)(input.to(dtype))
    assert output.dtype == dtype
    assert float((output.float() - expected).detach().norm() / expected.detach().norm()) < 0.03


def test_nan_is_passed_on() -> None:
    layer = TensorConv2d(CP, padding=1, execution="factored")
    input = torch.randn(1, 16, 8, 8)
    input[0, 3, 0, 0] = torch.nan
    output = layer(input)
    assert bool(output[0, :, :2, :2].isnan().all())
    assert not bool(output[0, :, 2:, 2:].isnan().any())


def test_state_copies_and_moves() -> None:
    torch.manual_seed(0)
    layer, other = TensorConv2d(CP, stride=2), TensorConv2d(CP, stride=2)
    input = torch.randn(2, 16, 6, 6)
    other.load_state_dict(layer.state_dict())
    assert set(layer.state_dict()) == {"bias", *(f"cores.{index}" for index in range(4))}
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for same in (other, copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(same(input), layer(input))
    meta = TensorConv2d(CP, device="meta")
    assert meta(input.to("meta")).shape == (2, 24, 4, 4)
    assert TensorConv2d(CP, dtype=torch.float64).double().cores[0].dtype == torch.float64


def test_compiles_without_a_break() -> None:
    layer = TensorConv2d(CP, padding=1, execution="factored")
    input = torch.randn(2, 16, 6, 6)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input), layer(input))


def test_repr() -> None:
    assert repr(TensorConv2d(CP, stride=2, padding=1, bias=False)).startswith(
        "TensorConv2d(\n  16, 24, or,ir,hr,wr -> o i hw (r=8), kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), "
        "bias=False, execution='auto'\n"
    )
    assert "8, 12, or,ir -> o i (r=2), bias=True" in repr(TensorLinear(tensor_network("cp", (12, 8), rank=2)))


# ------------------------------------------------------------------------------------------------ from dense layers


@pytest.mark.parametrize("with_cores", [True, False])
@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(8, 12, dtype=torch.float64),
        nn.Linear(8, 12, bias=False),
        nn.Conv1d(8, 12, 3, stride=2, padding=1),
        nn.Conv2d(16, 12, (3, 2), padding="same", dilation=(1, 2), groups=2, padding_mode="reflect"),
        nn.Conv3d(8, 12, 3, padding=(0, 1, 2), bias=False).eval(),
    ],
    ids=str,
)
def test_tensor_layer_takes_geometry_and_bias(module: Any, with_cores: bool) -> None:
    torch.manual_seed(0)
    network = tensor_network("cp", module.weight.shape, rank=4)
    cores: list[Tensor] | None = [torch.randn(shape) for shape in network.core_shapes] if with_cores else None
    layer = tensor_layer(module, network, cores, execution="factored")
    dense = copy.deepcopy(module)
    assert layer.training == module.training and layer.factored
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
    channels = getattr(module, "in_channels", None)
    input = torch.randn(2, 8) if channels is None else torch.randn(2, channels, *(5,) * (module.weight.ndim - 2))
    input = input.to(module.weight.dtype)
    torch.testing.assert_close(layer(input), dense(input), rtol=1e-4, atol=1e-4)
    if cores is not None:
        assert all(torch.equal(own, core.to(own.dtype)) for own, core in zip(layer.cores, cores, strict=True))
    if module.bias is not None:
        assert torch.equal(layer.bias, module.bias)
        assert layer.bias is not module.bias


def test_tensor_layer_refuses() -> None:
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Linear, Conv1d, .* got ConvTranspose2d"):
        tensor_layer(nn.ConvTranspose2d(16, 24, 3), CP)
    with pytest.raises(TypeError, match="got ReLU"):
        tensor_layer(nn.ReLU(), CP)
    with pytest.raises(
        ValueError, match=r"network must have the weight's shape \(24, 16, 5, 5\), got \(24, 16, 3, 3\)"
    ):
        tensor_layer(nn.Conv2d(16, 24, 5), CP)
    with pytest.raises(ValueError, match="must have shapes"):
        tensor_layer(nn.Conv2d(16, 24, 3), CP, [torch.zeros(8, 8)] * 4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TensorConv2d("or,ir"), TypeError, "network must be a TensorNetwork, got 'or,ir'"),
        (lambda: TensorConv1d(CP), ValueError, "network of a TensorConv1d must have 1 kernel indices, got 'hw'"),
        (lambda: TensorLinear(CP), ValueError, "network of a TensorLinear must have 0 kernel indices"),
        (lambda: TensorConv2d(CP, stride=0), ValueError, "stride must be a positive integer"),
        (lambda: TensorConv2d(CP, dilation=(1, 2, 3)), ValueError, "dilation must be a positive integer, or 2 of them"),
        (lambda: TensorConv2d(CP, groups=0), ValueError, "groups must be a positive integer"),
        (lambda: TensorConv2d(CP, groups=5), ValueError, "groups must divide the 24 output channels, got 5"),
        (lambda: TensorConv2d(CP, padding="full"), ValueError, "padding must be 'same', 'valid', .* got 'full'"),
        (lambda: TensorConv2d(CP, padding="same", stride=2), ValueError, "padding must not be 'same' for a strided"),
        (lambda: TensorConv2d(CP, padding_mode="mirror"), ValueError, "padding_mode must be one of .* got 'mirror'"),
        (lambda: TensorConv2d(CP, execution="dense"), ValueError, "execution must be one of .* got 'dense'"),
        (lambda: TensorConv2d(CP)(torch.zeros(2, 8, 6, 6)), Exception, "channels"),
    ],
)
def test_wrong_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
