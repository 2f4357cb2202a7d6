import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from retract.manifolds.spectrum import Bounded, Lipschitz
from retract.nets.parametrizations import shared_frames, spectral_weights, sttp, svdp
from retract.nets.spectral import conv_norm

WRAPS = (svdp, sttp)
FORMS = ("householder", "stiefel")
EXECUTIONS = ("factored", "weight")
wraps = pytest.mark.parametrize("wrap", WRAPS)
forms = pytest.mark.parametrize("form", FORMS)
executions = pytest.mark.parametrize("execution", EXECUTIONS)


def convolution(wrap=svdp, rank=3, spectrum="free", dtype=torch.float64, **options):
    torch.manual_seed(0)
    return wrap(nn.Conv2d(4, 6, 3, padding=1, dtype=dtype), rank, spectrum, **options)


def parts(layer):
    ((_, parametrization, originals),) = spectral_weights(layer)
    return parametrization, originals


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@wraps
@forms
def test_state_dicts_hold_the_degrees_of_freedom_and_nothing_else(wrap, form):
    layer = convolution(wrap, spectrum="bounded", form=form)
    parametrization, originals = parts(layer)
    state = layer.state_dict()
    names = [f"parametrizations.weight.original{i}" for i in range(len(originals))]
    assert list(state) == ["bias", *names]
    assert not list(layer.buffers())
    if form == "householder":
        assert sum(t.numel() for t in originals) == parametrization.degrees_of_freedom
    else:
        assert parametrization.manifold.check_point_on_manifold(originals)


@wraps
@forms
@executions
def test_copies_have_the_same_weight(wrap, form, execution):
    layer = convolution(wrap, spectrum="lipschitz", form=form, execution=execution)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    other = wrap(nn.Conv2d(4, 6, 3, padding=1, dtype=torch.float64), 3, "lipschitz", form=form)
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    other.load_state_dict(torch.load(saved, weights_only=True))
    twin = copy.deepcopy(layer)
    assert torch.equal(other.weight, layer.weight)
    assert torch.equal(twin.weight, layer.weight)
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(layer.eval()(x), twin.train()(x))
    with torch.no_grad():
        next(twin.parameters()).add_(1.0)
    assert torch.equal(other.weight, layer.weight)


@wraps
@forms
@executions
def test_the_weight_can_be_assigned_and_removed(wrap, form, execution):
    layer = convolution(wrap, form=form, execution=execution)
    other = convolution(wrap, form=form)
    other.weight = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    keys = [p.data_ptr() for p in layer.parameters()]
    with torch.no_grad():
        layer.weight = other.weight
    torch.testing.assert_close(layer.weight, other.weight, atol=1e-12, rtol=0)
    assert len(keys) == len(list(layer.parameters()))
    expected = layer(x)
    parametrize.remove_parametrizations(layer, "weight")
    assert isinstance(layer.weight, nn.Parameter)
    torch.testing.assert_close(layer(x), expected, atol=1e-13, rtol=0)


@wraps
@forms
@executions
def test_weights_are_current_after_a_step(wrap, form, execution):
    layer = convolution(wrap, form=form, execution=execution)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    before, weight = layer(x), layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before.square().sum().backward()
    optimizer.step()
    assert float((layer.weight - weight).abs().max().detach()) > 1e-4
    expected = nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("wrap", "optimizer", "spectrum", "low", "high"),
    [(svdp, torch.optim.SGD, Lipschitz(1.7), 0.0, 1.7), (sttp, torch.optim.Adam, Bounded(0.3, 0.4), 0.3, 0.4)],
)
def test_a_thousand_steps_leave_singular_values_in_their_set(wrap, optimizer, spectrum, low, high):
    layer = wrap(nn.Linear(8, 6, bias=False, dtype=torch.float64), 4, spectrum)
    parameters = list(layer.parameters())
    steps = optimizer(parameters, lr=0.05)
    for direction in torch.randn(1000, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)):
        for p, grad in zip(parameters, torch.autograd.grad(layer.weight, parameters, direction), strict=True):
            p.grad = grad
        steps.step()
    values = torch.linalg.svdvals(layer.weight.detach())[:4]
    assert low - 1e-13 <= float(values.min()) <= float(values.max()) <= high + 1e-13
    if spectrum.name == "lipschitz":
        assert float(values.max()) >= high - 1e-13


@wraps
@forms
@executions
def test_autocast_computes_frames_in_float32(wrap, form, execution):
    layer = convolution(wrap, spectrum="lipschitz", form=form, execution=execution, dtype=torch.float32)
    x = torch.randn(2, 4, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, weight = layer(x), layer.weight
        with shared_frames(layer):
            shared = layer.weight
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), atol=0.03, rtol=0.03)
    for one in (weight, shared):
        assert one.dtype == torch.float32
        assert torch.equal(one, layer.weight)


@wraps
@forms
@executions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(wrap, form, execution, dtype):
    layer = convolution(wrap, spectrum="lipschitz", form=form, execution=execution, dtype=dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    parametrization, originals = parts(layer)
    assert torch.equal(layer.weight, parametrization(*(t.float() for t in originals)).to(dtype))
    values = torch.linalg.svdvals(layer.weight.detach().double().flatten(1))
    assert abs(float(values[0]) - 1) <= 4 * torch.finfo(dtype).eps
    assert float(values[3:].max()) <= 4 * torch.finfo(dtype).eps
    assert layer(torch.randn(2, 4, 5, 5, dtype=dtype)).dtype == dtype
    layer.weight = torch.randn(6, 4, 3, 3, dtype=dtype)


OPERATOR = Lipschitz(of="operator")


@pytest.mark.parametrize(
    ("wrap", "form", "execution", "spectrum"),
    [
        (svdp, "householder", "weight", OPERATOR),
        (sttp, "householder", "factored", "bounded"),
        (sttp, "stiefel", "weight", OPERATOR),
        (svdp, "stiefel", "factored", "identity"),
    ],
)
def test_compiled_and_exported(wrap, form, execution, spectrum):
    layer = convolution(wrap, spectrum=spectrum, form=form, execution=execution)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    exported = torch.export.export(layer, (x,), strict=False).module()
    expected = layer(x)
    for module in (compiled, exported):
        torch.testing.assert_close(module(x), expected, atol=1e-13, rtol=0)
    used = [p for name, p in layer.named_parameters() if spectrum != "identity" or not name.endswith("original1")]
    gradients = (torch.autograd.grad(f(x).square().sum(), used) for f in (layer, compiled))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


@wraps
@forms
def test_function_transforms(wrap, form):
    layer = convolution(wrap, form=form, spectrum="bounded")
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(p):
        return torch.func.functional_call(layer, p, (x,)).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    expected = torch.autograd.grad(layer(x).square().sum(), list(parameters.values()))
    for a, b in zip(gradients.values(), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)
    stacked = {name: torch.stack([p, p]) for name, p in parameters.items()}
    torch.testing.assert_close(torch.vmap(loss)(stacked), loss(parameters).expand(2), atol=1e-10, rtol=0)


@wraps
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(5, 8, 3),
        lambda: nn.ConvTranspose2d(8, 5, 3),
        lambda: nn.Conv1d(6, 4, 5),
        lambda: nn.Conv3d(3, 4, 2),
        lambda: nn.Conv2d(5, 8, 1),
    ],
)
def test_the_declared_norm_holds_for_the_convolution(wrap, make):
    """At the start, and for random coordinates; the one of the matrix is off by up to the root of the taps."""
    c = 0.9
    layer = wrap(make(), 3, Lipschitz(c, of="operator"))
    _, originals = parts(layer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        norm = float(conv_norm(layer.weight.detach().double(), 12))
        assert 0.6 * c <= norm <= c * (1 + 1e-6)
        with torch.no_grad():
            for t in originals:
                t.copy_(torch.randn(t.shape, generator=generator))


def test_linear_layers_and_embeddings_are_their_matrix():
    for layer in (nn.Linear(6, 5), nn.Embedding(6, 5), nn.Conv2d(6, 5, 1)):
        svdp(layer, 3, Lipschitz(0.7, of="operator"))
        assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) == pytest.approx(0.7, rel=1e-5)
