import math

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from retract.manifolds.spectrum import Lipschitz
from retract.nets.parametrizations import STTP, SVDP, spectral_weights, sttp, svdp

wraps = pytest.mark.parametrize("wrap", [svdp, sttp])


class Own(nn.Conv2d):
    pass


def nan_layer():
    layer = nn.Linear(4, 4)
    layer.weight.data[0, 0] = math.nan
    return layer


BAD = [
    (lambda: nn.Conv2d(4, 4, 3, groups=2), {}, ValueError, "groups=2.*allowed is groups=1"),
    (lambda: nn.LSTM(3, 3), {}, TypeError, "must be one of torch.nn's Linear, .*got LSTM"),
    (lambda: weight_norm(nn.Linear(4, 4)), {}, ValueError, "parametrized already"),
    (lambda: svdp(nn.Linear(4, 4), 2), {}, ValueError, "parametrized already"),
    (lambda: nn.LazyLinear(4), {}, ValueError, "has no shape yet"),
    (lambda: nn.Linear(4, 4, device="meta"), {}, ValueError, "meta device"),
    (lambda: nn.Linear(4, 4, dtype=torch.complex64), {}, TypeError, "got dtype torch.complex64"),
    (lambda: nn.Embedding(4, 4, sparse=True), {}, ValueError, "sparse=True"),
    (lambda: nn.Linear(4, 4), {"name": "kernel"}, TypeError, "no parameter 'kernel', it has weight, bias"),
    (lambda: nn.Linear(4, 4), {"name": "bias"}, ValueError, r"two or more dimensions, got shape \(4,\)"),
    (lambda: nn.Linear(4, 5), {"rank": 5}, ValueError, r"rank must be from 1 to 4 .*\(5, 4\), got 5"),
    (lambda: nn.Linear(4, 5), {"rank": 0}, ValueError, "rank must be from 1 to 4"),
    (lambda: nn.Linear(4, 5), {"spectrum": "flat"}, ValueError, "spectrum must be one of identity, free"),
    (lambda: nn.Linear(4, 5), {"form": "cayley"}, ValueError, "form must be 'householder' or 'stiefel', got 'cayley'"),
    (lambda: nn.Linear(4, 5), {"execution": "fast"}, ValueError, "execution must be .* got 'fast'"),
    (lambda: nn.Linear(4, 5), {"init": "ones"}, ValueError, "init must be 'fit' or 'spread', got 'ones'"),
    (lambda: Own(4, 5, 3), {"execution": "factored"}, ValueError, "Own is not a class of torch.nn itself"),
    (lambda: nn.Embedding(4, 5, max_norm=1), {"execution": "factored"}, ValueError, "max_norm"),
    (lambda: nn.Linear(1, 1), {"rank": 1, "spectrum": "identity"}, ValueError, "no degree of freedom"),
    (nan_layer, {}, ValueError, "NaN or infinite"),
    (
        lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        {"spectrum": Lipschitz(of="operator")},
        ValueError,
        "padding_mode='reflect'",
    ),
    (
        lambda: nn.Conv2d(4, 4, 2, padding=1, padding_mode="circular"),
        {"spectrum": Lipschitz(of="operator")},
        ValueError,
        r"adds no more than the kernel takes away, module has kernel_size=\(2, 2\).* padding=\(1, 1\)",
    ),
]


@wraps
@pytest.mark.parametrize(("make", "options", "error", "message"), BAD)
def test_bad_input_leaves_the_layer_as_it_was(make, options, error, message, wrap):
    layer = make()
    kind, state = type(layer), dict(layer.named_parameters())
    options = {"rank": 2, **options}
    with pytest.raises(error, match=message):
        wrap(layer, **options)
    assert type(layer) is kind
    after = dict(layer.named_parameters())
    assert after.keys() == state.keys()
    assert all(after[name] is p for name, p in state.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": (2, 2, 2)}, "ranks must be 4 numbers"),
        ({"rank": (3, 2, 2, 2)}, r"R_1 = 3 exceeds R_0 n_1"),
        ({"rank": (2, 4, 1, 2)}, r"R_2 = 4 exceeds n_3 R_3"),
        ({"modes": ((2, 2), (2, 2))}, r"modes of fan_in must be positive and multiply to 12, got \(2, 2\)"),
        ({"modes": ((2, 3), (2, 6))}, r"modes of out must be positive and multiply to 4, got \(2, 3\)"),
        ({"modes": ((4,), (12,), (1,))}, "modes must be a pair"),
    ],
)
def test_tensor_trains_that_do_not_exist(options, message):
    layer = nn.Linear(12, 4)
    with pytest.raises(ValueError, match=message):
        sttp(layer, **{"rank": 2, **options})
    assert type(layer) is nn.Linear


def test_kinds_and_their_words():
    for wrap, kind in ((svdp, SVDP), (sttp, STTP)):
        ((name, parametrization, _),) = spectral_weights(wrap(nn.Conv2d(4, 6, 3), 3))
        assert name == "weight"
        assert type(parametrization) is kind
    shown = repr(sttp(nn.Conv2d(4, 6, 3), 3, Lipschitz(2.0)))
    for words in ("rank=3", "Lipschitz(c=2.0", "modes=((2, 3), (2, 2, 3, 3))", "ranks=(2, 3, 3, 3, 2)", "householder"):
        assert words in shown
    with pytest.raises(TypeError, match="rank must be an int, got True"):
        SVDP((3, 3), True)


def test_frozen_weights_stay_frozen():
    layer = nn.Linear(4, 4).requires_grad_(False)
    svdp(layer, 2)
    assert not any(p.requires_grad for p in layer.parameters())


def test_another_parameter_of_a_layer():
    layer = nn.Linear(4, 5)
    layer.kernel = nn.Parameter(torch.randn(3, 2, 2))
    svdp(layer, 2, name="kernel")
    assert layer.kernel.shape == (3, 2, 2)
    assert isinstance(layer.weight, nn.Parameter)
