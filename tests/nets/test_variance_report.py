"""The variance report: its ratios against closed forms and autograd, and what it leaves untouched."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from retract.nets.init.variance_report import WINDOW, Means, VarianceReport, variance_report
from retract.nets.layers.tensor import TensorLinear
from retract.nets.layers.tensor_formats import tensor_network
from retract.nets.parametrizations import svdp


def scaled_identities(*scales: float, size: int = 5) -> nn.Sequential:
    """Linear layers that multiply by one number each."""
    model = nn.Sequential(*(nn.Linear(size, size, bias=False, dtype=torch.float64) for _ in scales))
    with torch.no_grad():
        for layer, scale in zip(model, scales, strict=True):
            layer.weight.copy_(scale * torch.eye(size))
    return model


def convolutions(depth: int, channels: int, gain: float, *, inplace: bool = False) -> nn.Sequential:
    """A plain ReLU network; its weights have variance gain^2 / fan_in."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        convolution = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="circular", bias=False)
        nn.init.normal_(convolution.weight, std=gain / math.sqrt(9 * channels))
        layers += [convolution, nn.ReLU(inplace=inplace)]
    return nn.Sequential(*layers)


def test_scalings_come_out_exactly_both_ways() -> None:
    x = torch.randn(7, 5, dtype=torch.float64)
    report = variance_report(scaled_identities(2, 0.5, 3, 1), x)
    assert [layer.forward for layer in report.layers] == pytest.approx([4, 0.25, 9, 1])
    assert [layer.backward for layer in report.layers] == pytest.approx([4, 0.25, 9, 1])
    assert report.layers[0].moment == pytest.approx(4 * float(x.square().mean()))
    assert report.layers[-1].gradient_moment == pytest.approx(
        float(torch.randn(7, 5, generator=seeded()).square().mean())
    )
    assert report.forward == pytest.approx(((0.25 + 9 + 1) / 3, 2.25 ** (1 / 3)))
    assert report.backward == pytest.approx(report.forward)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("inplace", [False, True])
def test_moments_are_of_pre_activations_and_of_their_gradients(inplace: bool) -> None:
    """Against hand-written passes; an activation in place must not be seen."""
    torch.manual_seed(0)
    model = convolutions(3, 4, 2.0, inplace=inplace).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    report = variance_report(model, x)
    values = [x.clone().requires_grad_()]
    for convolution in model[::2]:
        values.append(convolution(values[-1] if len(values) == 1 else values[-1].relu()))
    output = values[-1].relu()
    gradients = torch.autograd.grad(output, values, torch.randn(output.shape, generator=seeded()).double())
    moments, squares = ([float(t.detach().square().mean()) for t in tensors] for tensors in (values, gradients))
    for i, layer in enumerate(report.layers, 1):
        assert layer.moment == pytest.approx(moments[i], rel=1e-12)
        assert layer.gradient_moment == pytest.approx(squares[i], rel=1e-12)
        assert layer.forward == pytest.approx(moments[i] / moments[i - 1], rel=1e-12)
        assert layer.backward == pytest.approx(squares[i - 1] / squares[i], rel=1e-12)


def test_the_rule_of_he_keeps_ratios_at_one_and_others_scale_them() -> None:
    """Over several networks: features of one that is not wide become alike with depth, and ratios stray together."""
    torch.manual_seed(0)
    for gain, expected in ((math.sqrt(2), 1.0), (1.0, 0.5)):
        reports = [variance_report(convolutions(8, 32, gain), torch.randn(4, 32, 8, 8)) for _ in range(6)]
        for direction in ("forward", "backward"):
            means = [getattr(report, direction) for report in reports]
            assert all(mean.geometric <= mean.arithmetic for mean in means)
            average = sum(mean.arithmetic for mean in means) / len(means)
            assert WINDOW[0] * expected < average < WINDOW[1] * expected


def test_widths_do_not_enter_but_for_the_fan() -> None:
    """Moments are means over elements: a layer from 10 to 1000 features with Var(W) = 1/10 keeps E[x^2]."""
    torch.manual_seed(0)
    layer = nn.Linear(10, 1000, bias=False)
    nn.init.normal_(layer.weight, std=10**-0.5)
    only = variance_report(layer, torch.randn(500, 10)).layers[0]
    assert only.forward == pytest.approx(1, rel=0.1)
    assert only.backward == pytest.approx(100, rel=0.1)
    assert only.name == "(model)"


def test_every_kind_of_layer_has_a_row_and_every_call() -> None:
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv1d(2, 4, 3)
            self.transposed = nn.ConvTranspose1d(4, 4, 3)
            self.normal = weight_norm(nn.Linear(6, 4))
            self.twice = nn.Linear(4, 4)
            self.tensorial = TensorLinear(tensor_network("cp", (3, 4), rank=2))
            self.norm = nn.LayerNorm(3)
            self.unused = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.normal(self.transposed(self.convolution(x)))
            return self.norm(self.tensorial(self.twice(self.twice(x))))

    model = Model()
    svdp(model.convolution, 2)
    report = variance_report(model, torch.randn(5, 2, 6))
    names = ["convolution", "transposed", "normal", "twice", "twice (2)", "tensorial"]
    assert [layer.name for layer in report.layers] == names
    assert all(0 < figure < math.inf for layer in report.layers for figure in (layer.forward, layer.backward))
    assert report.layers[-1].kind == "TensorLinear"


def test_model_and_random_state_are_left_as_they_were() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten(), nn.Linear(48, 2))
    model[0].weight.grad = torch.ones_like(model[0].weight)
    x = torch.randn(2, 2, 6, 6)
    before, given = copy.deepcopy(model.state_dict()), x.clone()
    state = torch.get_rng_state()
    variance_report(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[4].weight.grad is None
    assert model.training
    assert torch.equal(x, given)
    assert not x.requires_grad
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off_and_parameters_frozen(context: type[torch.no_grad]) -> None:
    model = scaled_identities(2, 3).requires_grad_(False)
    with context():
        report = variance_report(model, torch.randn(4, 5, dtype=torch.float64))
    assert [layer.backward for layer in report.layers] == pytest.approx([4, 9])


def test_second_moments_beyond_single_precision_are_finite() -> None:
    model = scaled_identities(1e10, 1e10, 1e-20, 1e-10, size=3).float()
    report = variance_report(model, torch.randn(4, 3))
    assert [layer.forward for layer in report.layers] == pytest.approx([1e20, 1e20, 1e-40, 1e-20], rel=1e-3)


def test_dead_and_unread_layers() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = scaled_identities(1, 0, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.c(x)
            return self.b(self.a(x))

    c, a, b = variance_report(Model(), torch.ones(2, 5, dtype=torch.float64)).layers
    assert (c.forward, b.forward) == (4, 0)
    assert math.isnan(c.gradient_moment)
    assert math.isnan(a.backward)  # the layer called before has no gradient
    assert b.backward == 0


def test_outputs_of_any_structure_and_integer_inputs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(7, 4), nn.Linear(4, 2)

        def forward(self, tokens: torch.Tensor, *, scale: float = 1.0) -> dict[str, object]:
            return {"tokens": tokens, "logits": [self.out(self.table(tokens)) * scale]}

    only = variance_report(Model(), torch.arange(6)).layers[0]
    assert math.isnan(only.forward)
    assert math.isnan(only.backward)
    assert only.gradient_moment > 0


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layers, self.reentrant = scaled_identities(2, 3, 4), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.layers[1:], self.layers[0](x), use_reentrant=self.reentrant)


def test_recomputed_blocks_are_counted_once() -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    assert [layer.forward for layer in variance_report(Checkpointed(False), x).layers] == pytest.approx([4, 9, 16])
    with pytest.raises(ValueError, match="backward pass failed: When use_reentrant=True"):
        variance_report(Checkpointed(True), x)


def test_half_precision_runs() -> None:
    report = variance_report(scaled_identities(2, 300).bfloat16(), torch.ones(3, 5, dtype=torch.bfloat16))
    assert report.layers[1].forward == pytest.approx(9e4, rel=0.02)


def test_string_is_a_table_of_all_figures() -> None:
    lines = str(variance_report(scaled_identities(2, 10), torch.ones(3, 5, dtype=torch.float64))).splitlines()
    assert lines[0].split() == ["layer", "module", "E[y²]", "forward", "E[g²]", "backward"]
    assert lines[2].split()[:4] == ["0", "Linear", "4", "4"]
    assert lines[3].split()[:4] == ["1", "Linear", "400", "100"]
    assert lines[5].split() == ["arithmetic", "mean", "100", "100"]
    assert lines[6].split() == ["geometric", "mean", "100", "100"]


def test_one_layer_has_no_means() -> None:
    report = variance_report(nn.Linear(3, 3), torch.randn(2, 3))
    assert all(math.isnan(mean) for means in (report.forward, report.backward) for mean in means)


def test_plot_to_axes_and_to_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    figure = pytest.importorskip("matplotlib.figure").Figure()
    report = variance_report(scaled_identities(2, 10, 1), torch.ones(3, 5, dtype=torch.float64))
    axes = figure.subplots()
    assert report.plot(axes) is axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["forward"].get_ydata()) == pytest.approx([4, 100, 1])
    assert list(lines["backward"].get_ydata()) == pytest.approx([4, 100, 1])
    assert axes.get_yscale() == "log"
    report.plot(tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("model", "inputs", "error", "message"),
    [
        (nn.Linear, (torch.ones(2, 3),), TypeError, "model must be a torch.nn.Module, got type"),
        (nn.Linear(4, 2), (torch.ones(2, 3),), ValueError, "forward pass failed on the inputs"),
        (nn.Linear(3, 2), (), ValueError, "forward pass failed on the inputs"),
        (nn.ReLU(), (torch.ones(2, 3),), ValueError, "calls no linear layer"),
        (nn.LazyLinear(2), (torch.ones(2, 3),), ValueError, "without a shape yet"),
    ],
)
def test_errors(model: nn.Module, inputs: tuple[torch.Tensor, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        variance_report(model, *inputs)


def test_no_floating_point_output_is_an_error() -> None:
    class Model(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).argmax(1)

    with pytest.raises(ValueError, match="no floating-point tensor"):
        variance_report(Model(3, 2), torch.ones(2, 3))


def test_means_of_a_report_without_layers_and_their_order() -> None:
    assert Means._fields == ("arithmetic", "geometric")
    assert VarianceReport(()).forward == pytest.approx((math.nan, math.nan), nan_ok=True)
