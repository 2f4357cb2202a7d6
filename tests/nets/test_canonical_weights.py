"""Canonical weights: what they are sums of, their gauge and its dimension, what may be assigned, stored and refused."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.utils import parametrize

from retract.manifolds import Oblique
from retract.manifolds.canonical import cp_tensor, select_terms
from retract.nets.parametrizations import (
    Canonical,
    canonical_weight_norm,
    manifold_groups,
    put_terms,
    sttp,
)
from tests.nets.canonical_cases import LAYERS, made, parts, terms

every_layer = pytest.mark.parametrize("layer", list(LAYERS))
every_form = pytest.mark.parametrize("form", ["euclidean", "oblique"])
quiet = pytest.mark.filterwarnings("ignore:rank=.*told apart")


def by_outer_products(module):
    """The definition, term by term."""
    canonical, (scale, *stored) = parts(module)
    stored = iter([rows.detach() for rows in stored])
    factors = [next(stored) if size > 1 else torch.ones(canonical.rank, 1) for size in canonical.shape]
    total = torch.zeros(canonical.shape, dtype=scale.dtype)
    letters = "abcde"[: len(factors)]
    for r in range(canonical.rank):
        units = [rows[r].to(scale.dtype) / rows[r].norm() for rows in factors]
        total += canonical.sigma * scale[r].detach() * torch.einsum(",".join(letters) + "->" + letters, *units)
    return total.transpose(0, 1) if canonical.layout.transposed else total


# ----------------------------------------------------------------------------------------------------------- the weight


@quiet
@every_form
@pytest.mark.parametrize("rank", [1, 5, 40])
@every_layer
def test_the_weight_is_the_sum_of_outer_products(layer, rank, form):
    for dtype, allowed in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        module = made(layer, rank, form=form, dtype=dtype)
        weight = module.weight
        assert weight.is_contiguous() and weight.dtype == dtype
        torch.testing.assert_close(weight.detach(), by_outer_products(module), rtol=0, atol=allowed * math.sqrt(rank))


@quiet
@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    rank=st.integers(1, 9),
    form=st.sampled_from(["euclidean", "oblique"]),
    transposed=st.booleans(),
)
def test_any_shape(shape, rank, form, transposed):
    canonical = Canonical(shape, rank, form=form, transposed=transposed).double()
    weights = torch.randn(rank, dtype=torch.float64)
    factors = [torch.randn(rank, size, dtype=torch.float64) for size in canonical.shape]
    originals = canonical.originals(weights, factors, torch.float64)
    assert sum(o.numel() for o in originals) == canonical.parameters_stored
    expected = cp_tensor(weights, factors)
    expected = expected.transpose(0, 1) if transposed else expected
    torch.testing.assert_close(canonical(*originals), expected, rtol=0, atol=1e-10)
    terms, units = canonical.terms(*originals)
    torch.testing.assert_close(cp_tensor(terms, units), cp_tensor(weights, factors), rtol=0, atol=1e-10)
    scaled = canonical.scaled_factors(*originals)
    torch.testing.assert_close(cp_tensor(terms.new_ones(rank), scaled), cp_tensor(weights, factors), rtol=0, atol=1e-10)
    assert all((rows.norm(dim=1) - 1).abs().max() < 1e-12 for rows in units)


def test_a_negative_weight_is_a_negative_term():
    module = made("conv2d", 4, signs=False)
    canonical, (scale, *_) = parts(module)
    weights, factors = canonical.terms(*parts(module)[1])
    term = cp_tensor(weights[1:2].detach(), [rows[1:2].detach() for rows in factors])
    with torch.no_grad():
        scale[1] = 2
        plus = module.weight
        scale[1] = -2
        minus = module.weight
    assert (plus - minus).abs().max() > 0.1
    torch.testing.assert_close(plus - minus, 4 * term, rtol=1e-12, atol=1e-12)
    assert select_terms(*terms(module), 1).order.tolist() == [1]
    put_terms(module, minus.new_tensor([-2.0]), [rows[1:2] for rows in factors])
    assert parts(module)[1][0].item() == pytest.approx(-2 / canonical.sigma.item())
    torch.testing.assert_close(module.weight.detach(), -2 * term / weights[1].detach(), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ the gauge


@quiet
@every_layer
def test_lengths_even_signs_and_the_order_of_terms_change_nothing(layer):
    rank = 6
    module = made(layer, rank, dtype=torch.float32)
    before = module.weight.detach().clone()
    _, (scale, *factors) = parts(module)
    size = before.abs().max()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for rows in factors:
            lengths = 10 ** torch.empty(rank, 1).uniform_(-3, 3, generator=generator)
            rows.mul_(lengths)
        assert (module.weight - before).abs().max() < 1e-5 * size
        if len(factors) > 1:
            factors[0][2].neg_(), factors[-1][2].neg_()
        scale[4], (factors[0] if factors else scale)[4] = -scale[4], -(factors[0] if factors else scale)[4]
        if not factors:
            scale[4].neg_()
        assert (module.weight - before).abs().max() < 1e-5 * size
        order = torch.randperm(rank, generator=generator)
        for tensor in (scale, *factors):
            tensor.copy_(tensor[order].clone())
        assert (module.weight - before).abs().max() < 1e-5 * size


@pytest.mark.parametrize("layer", ["linear", "conv2d", "transposed2d"])
def test_gradients_of_vectors_are_tangent_and_steps_lengthen_them(layer):
    module = made(layer, 3, dtype=torch.float32)
    (module.weight * torch.randn_like(module.weight)).sum().backward()
    lr = 0.1
    for rows in parts(module)[1][1:]:
        with torch.no_grad():
            radial = (rows * rows.grad).sum(1)
            lengths = rows.norm(dim=1) * rows.grad.norm(dim=1)
            assert (radial.abs() <= 1e-5 * lengths).all() and lengths.min() > 0
            before, square = rows.square().sum(1), lr**2 * rows.grad.square().sum(1)
            after = (rows - lr * rows.grad).square().sum(1)
        assert ((after - before - square).abs() < 1e-5 * after).all()


@pytest.mark.filterwarnings("ignore:rank=.*told apart")
@pytest.mark.parametrize(("shape", "rank", "dimension"), [((4, 3, 3, 3), 5, 50), ((6, 5, 3, 3), 10, 140)])
def test_degrees_of_freedom_are_the_rank_of_the_jacobian(shape, rank, dimension):
    """With sigma as a variable, as published, the null space is 4R + 1; here sigma is fixed, and it is 4R."""
    torch.manual_seed(0)
    canonical = Canonical(shape, rank).double()
    originals = canonical.originals(
        torch.randn(rank, dtype=torch.float64),
        [torch.randn(rank, d, dtype=torch.float64) for d in shape],
        torch.float64,
    )
    assert canonical.degrees_of_freedom == dimension

    def flat(sigma, *tensors):
        return functional_call(canonical, {"sigma": sigma}, tensors).flatten()

    inputs = (torch.ones((), dtype=torch.float64), *originals)
    jacobians = jacrev(flat, argnums=tuple(range(len(inputs))))(*inputs)
    for start, null in ((0, 4 * rank + 1), (1, 4 * rank)):
        matrix = torch.cat([j.reshape(math.prod(shape), -1) for j in jacobians[start:]], dim=1)
        values = torch.linalg.svdvals(matrix)
        found = int((values > 1e-9 * values[0]).sum())
        assert (found, matrix.shape[1] - found) == (dimension, null)


def test_no_parameter_is_dead():
    module = made("unit modes", 2)
    module.weight.square().sum().backward()
    assert [tuple(p.shape) for p in parts(module)[1]] == [(2,), (2, 6), (2, 3)]
    assert all(p.grad.abs().amax(-1).min() > 0 for p in parts(module)[1])
    canonical = parts(module)[0]
    assert canonical.parameters_stored == 2 * (1 + 6 + 3)
    assert canonical.published_parameters == 2 * (6 + 1 + 1 + 3 + 1) + 1


# ---------------------------------------------------------------------------------------------------------- as a module


@quiet
@every_form
@every_layer
def test_copies_and_state_dicts(layer, form):
    module = made(layer, 3, form=form)
    twin = copy.deepcopy(module)
    torch.testing.assert_close(twin.weight, module.weight, rtol=0, atol=0)
    with torch.no_grad():
        parts(twin)[1][0].mul_(2)
    torch.testing.assert_close(twin.weight, 2 * module.weight)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = made(layer, 3, seed=1, form=form, init="uniform", mode="fan_out")
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other.weight, module.weight, rtol=0, atol=0)


@every_layer
@quiet
def test_removal_leaves_the_weight(layer):
    module = made(layer, 3)
    expected = module.weight.detach().clone()
    x = torch.randn(2, module.weight.shape[0 if layer.startswith("trans") else 1], *(5,) * (expected.ndim - 2)).double()
    output = module(x)
    parametrize.remove_parametrizations(module, "weight")
    assert isinstance(module.weight, nn.Parameter)
    torch.testing.assert_close(module.weight.detach(), expected, rtol=0, atol=0)
    torch.testing.assert_close(module(x), output)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", ["linear", "conv2d", "transposed2d"])
def test_half_precision(layer, dtype):
    module = made(layer, 3, dtype=torch.float32)
    precise = module.weight.detach().clone()
    module.to(dtype)
    assert module.weight.dtype == dtype
    assert (module.weight - precise).abs().max() < 8 * torch.finfo(dtype).eps * precise.abs().max()
    module.weight.sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in parts(module)[1])
    half = canonical_weight_norm(LAYERS[layer](dtype=dtype), 3, init="power")
    assert half.weight.dtype == dtype


@every_form
def test_the_weight_is_not_rounded_under_autocast(form):
    module = made("conv2d", 3, form=form, dtype=torch.float32)
    expected = module.weight.detach()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module.weight.detach(), expected, rtol=0, atol=0)
        assert module(torch.randn(2, 4, 5, 5)).dtype == torch.bfloat16


def test_torch_func():
    module = made("conv2d", 3)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(5, 4, 6, 6, dtype=torch.float64)

    def loss(values, image):
        return functional_call(module, values, (image,)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    module(x).square().sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(each[name].sum(0), p.grad)
    stacked = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
    both = vmap(loss, in_dims=(0, None))(stacked, x)
    assert both[0] == pytest.approx(loss(parameters, x).item())


@every_form
def test_first_and_second_derivatives(form):
    module = made("conv2d", 2, form=form)
    canonical, originals = parts(module)
    inputs = [p.detach().requires_grad_() for p in originals]
    assert torch.autograd.gradcheck(canonical, inputs)
    assert torch.autograd.gradgradcheck(canonical, inputs)


def test_frozen_weights_stay_frozen():
    module = nn.Linear(4, 3).requires_grad_(False)
    canonical_weight_norm(module, 2)
    assert not any(p.requires_grad for p in module.parameters())
    canonical, originals = parts(module)
    put_terms(module, *canonical.terms(*originals))
    assert not any(p.requires_grad for p in module.parameters())


def test_groups_of_a_model():
    model = nn.Sequential(
        canonical_weight_norm(nn.Conv2d(1, 4, 3), 3, form="oblique"),
        canonical_weight_norm(nn.Conv2d(4, 4, 3), 3),
        sttp(nn.Linear(4, 4), 2, form="stiefel"),
        canonical_weight_norm(nn.Linear(4, 3), 3, form="oblique"),
    )
    groups = manifold_groups(model, euclidean_lr=0.5)
    assert [type(g.get("manifold")).__name__ for g in groups] == ["STTP", "Oblique", "NoneType"]
    assert [len(g["params"]) for g in groups] == [5, 5, 4 + 2 + 5]
    assert groups[-1]["lr"] == 0.5
    assert groups[1]["manifold"].arguments == Oblique(0).arguments
    assert all(p.ndim == 2 for _, p in groups[1]["params"])
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
