import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.flop_counter import FlopCounterMode

from retract.nets.layers import FactoredConv2d, FactoredEmbedding, FactoredLinear, factored
from retract.nets.parametrizations import sttp, svdp

WRAPS = (svdp, sttp)
FORMS = ("householder", "stiefel")
wraps = pytest.mark.parametrize("wrap", WRAPS)
forms = pytest.mark.parametrize("form", FORMS)

LAYERS = [
    (lambda: nn.Linear(12, 8), (5, 12)),
    (lambda: nn.Linear(12, 8, bias=False), (2, 3, 12)),
    (lambda: nn.Linear(5, 9), (5,)),
    (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1, dilation=2), (2, 6, 11)),
    (lambda: nn.Conv2d(6, 8, 3, padding="same", dilation=2), (2, 6, 7, 7)),
    (lambda: nn.Conv2d(6, 8, 3, padding="valid", bias=False), (6, 7, 7)),
    (lambda: nn.Conv2d(6, 8, (3, 2), padding=(1, 2), padding_mode="reflect"), (2, 6, 7, 7)),
    (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="replicate", stride=(2, 1)), (2, 6, 7, 7)),
    (lambda: nn.Conv2d(6, 8, 3, padding="same", padding_mode="circular"), (2, 6, 7, 7)),
    (lambda: nn.Conv2d(6, 8, 1), (2, 6, 4, 4)),
    (lambda: nn.Conv2d(11, 7, (1, 5), padding=(0, 2)), (2, 11, 4, 4)),
    (lambda: nn.Conv3d(4, 6, 2, stride=2, padding=1), (2, 4, 5, 5, 5)),
    (lambda: nn.ConvTranspose1d(6, 8, 3, stride=2, dilation=2, bias=False), (2, 6, 5)),
    (lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1), (2, 6, 5, 5)),
    (lambda: nn.ConvTranspose2d(6, 8, (3, 2), stride=(1, 3), padding=(1, 0), output_padding=(0, 2)), (6, 5, 5)),
    (lambda: nn.ConvTranspose3d(4, 6, 2, stride=2), (2, 4, 3, 3, 3)),
]
EMBEDDINGS = [{}, {"padding_idx": 2}, {"padding_idx": -1}]


def pair(make, wrap, form, rank=3):
    """The same layer, factored and with its weight."""
    torch.manual_seed(0)
    layer = make().double()
    other = copy.deepcopy(layer)
    wrap(layer, rank, form=form, execution="factored")
    wrap(other, rank, form=form, execution="weight")
    for a, b in zip(layer.state_dict().items(), other.state_dict().items(), strict=True):
        assert a[0] == b[0]
        assert torch.equal(a[1], b[1])
    return layer, other


def assert_same_function(layer, other, *inputs, **options):
    outputs = [module(*inputs, **options) for module in (layer, other)]
    torch.testing.assert_close(*outputs, atol=1e-12, rtol=0)
    wanted = [x for x in inputs if x.is_floating_point()]
    direction = torch.randn_like(outputs[0])
    gradients = (
        torch.autograd.grad(y, [*wanted, *module.parameters()], direction)
        for y, module in zip(outputs, (layer, other), strict=True)
    )
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@wraps
@forms
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_factored_is_the_same_function(make, shape, wrap, form):
    layer, other = pair(make, wrap, form)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert_same_function(layer, other, x)


@wraps
def test_transposed_convolutions_take_an_output_size(wrap):
    layer, other = pair(lambda: nn.ConvTranspose2d(6, 8, 3, stride=3), wrap, "householder")
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    for size in ([12, 13], [2, 8, 14, 12]):
        assert_same_function(layer, other, x, output_size=size)
    with pytest.raises(ValueError, match="valid sizes range"):
        layer(x, output_size=[20, 20])


@wraps
@forms
@pytest.mark.parametrize("options", EMBEDDINGS)
def test_embeddings(options, wrap, form):
    for rows, columns in ((11, 6), (5, 9)):
        layer, other = pair(lambda r=rows, c=columns: nn.Embedding(r, c, **options), wrap, form)
        assert isinstance(layer, FactoredEmbedding)
        for index in (torch.tensor([[0, 2, 2], [4, rows - 1, 1]]), torch.tensor(2), torch.zeros(0, dtype=torch.long)):
            assert_same_function(layer, other, index)


@wraps
@pytest.mark.parametrize("options", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}])
def test_what_acts_on_rows_of_an_embedding_keeps_the_weight(options, wrap):
    layer = wrap(nn.Embedding(7, 5, **options), 2)
    assert not isinstance(layer, FactoredEmbedding)
    rows = layer(torch.tensor([1, 1, 3]))
    rows.sum().backward()
    if "max_norm" in options:
        assert (torch.linalg.vector_norm(rows.detach(), dim=1) <= 0.5 + 1e-6).all()


@wraps
def test_float32_agrees_relatively(wrap):
    torch.manual_seed(0)
    layer = wrap(nn.Conv2d(32, 48, 3, padding=1), 16, execution="factored")
    x = torch.randn(2, 32, 9, 9)
    dense = nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
    assert torch.linalg.vector_norm(layer(x) - dense) <= 1e-5 * torch.linalg.vector_norm(dense)


@wraps
def test_the_weight_is_never_built(wrap, monkeypatch):
    layer = wrap(nn.Conv2d(6, 8, 3), 3, execution="factored")
    kind = type(layer.parametrizations.weight[0])
    monkeypatch.setattr(kind, "forward", None)
    layer(torch.randn(1, 6, 5, 5))
    with pytest.raises(TypeError):
        _ = layer.weight


@wraps
def test_only_torchs_own_classes_change(wrap):
    class Own(nn.Conv2d):
        def forward(self, input):
            return 2 * super().forward(input)

    layer = wrap(Own(16, 16, 3), 2)
    assert not isinstance(layer, FactoredConv2d)
    torch.testing.assert_close(
        layer(torch.ones(1, 16, 3, 3)),
        2 * nn.functional.conv2d(torch.ones(1, 16, 3, 3), layer.weight, layer.bias),
    )
    assert isinstance(wrap(nn.Conv2d(16, 16, 3), 2), FactoredConv2d)
    assert not isinstance(wrap(nn.Conv2d(16, 16, 3), 2, execution="weight"), FactoredConv2d)


def test_factored_classes_run_dense_without_factors_and_below_other_parametrizations():
    x = torch.randn(2, 6)
    layer = svdp(nn.Linear(6, 6), 2, execution="factored")
    assert isinstance(layer, FactoredLinear)
    spectral_norm(layer)
    torch.testing.assert_close(layer.eval()(x), nn.functional.linear(x, layer.weight, layer.bias))
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is FactoredLinear
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    index, image = torch.tensor([1]), torch.ones(1, 2, 3, 3)
    for dense, x in ((nn.Embedding(4, 3), index), (nn.Conv2d(2, 3, 2), image), (nn.ConvTranspose2d(2, 3, 2), image)):
        expected = dense(x)
        dense.__class__ = factored.FACTORED[type(dense)]
        assert torch.equal(dense(x), expected)


COUNTED = [
    (nn.Linear(12, 8), (1, 12), 1),
    (nn.Conv1d(6, 8, 3, padding=1), (1, 6, 5), 5),
    (nn.Conv2d(6, 8, 3, padding=1), (1, 6, 5, 5), 25),
    (nn.Conv2d(6, 8, 3, padding=1, stride=2), (1, 6, 6, 6), 9),
    (nn.Conv3d(4, 6, 2), (1, 4, 3, 3, 3), 8),
    (nn.ConvTranspose2d(6, 8, 2, stride=2), (1, 6, 3, 3), 9),
]


@pytest.mark.parametrize(("layer", "shape", "positions"), COUNTED)
def test_products_are_those_that_torch_counts(layer, shape, positions):
    """In the layers' own operations: factors are made beforehand, and the dense layer has a plain weight."""
    low_rank = svdp(copy.deepcopy(layer), 3, form="stiefel", execution="factored")
    x = torch.randn(shape)
    for counted, module in zip(factored.products(layer, 3), (layer, low_rank), strict=True):
        with FlopCounterMode(display=False) as counter:
            module(x)
        assert counter.get_total_flops() == 2 * counted * positions


def test_auto_takes_what_multiplies_less():
    """r (m + n) against m n."""
    for rank, saves in ((4, True), (5, False)):  # 8 * 12 / 20 = 4.8
        layer = nn.Linear(12, 8)
        assert factored.saves_products(layer, rank) == saves
        assert isinstance(svdp(layer, rank), FactoredLinear) == saves
    # a transposed convolution has more outputs than inputs: 16 * 16 * 4 = 1024 against rank * (64 + 16 * 4)
    layer = nn.ConvTranspose2d(16, 16, 2, stride=2)
    assert factored.saves_products(layer, 7)
    assert not factored.saves_products(layer, 8)
    assert isinstance(svdp(nn.Embedding(5, 4), 4), FactoredEmbedding)
