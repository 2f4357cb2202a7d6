import math
import warnings

import numpy as np
import pytest
import tensorly
import tensorly.decomposition
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from retract.manifolds.spectrum import Bounded, Free, Identity, Lipschitz
from retract.nets.parametrizations import STTP, SVDP, _fitting, spectral_weights, sttp, svdp
from retract.nets.parametrizations._charts import CoreChart
from retract.nets.spectral import conv_norm_bound

KINDS = (SVDP, STTP)
SPECTRA = (Identity(), Free(), Lipschitz(), Lipschitz(2.5), Bounded(0.2, 0.7), Lipschitz(0.5, of="operator"))
FORMS = ("householder", "stiefel")
# square frames on one side and on both, sizes of one, primes, rank one, full rank, kernels
CASES = [
    ((8, 4, 3, 3), 3),
    ((8, 4, 3, 3), 8),
    ((36, 8), 8),
    ((6, 6), 6),
    ((7, 7), 7),
    ((7, 11), 5),
    ((13, 5, 2), 1),
    ((1, 6), 1),
    ((6, 1), 1),
    ((3, 1, 3), 3),
    ((4, 3, 2, 2, 2), 4),
]


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relative_error(a, b):
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def attainable(kind, shape, rank, spectrum, seed):
    """A weight of the set from a random point of the manifold, which knows nothing of coordinates."""
    parametrization = kind(shape, rank, spectrum, form="stiefel")
    generator = torch.Generator().manual_seed(seed)
    sizes = () if kind is STTP else parametrization.matrix_shape
    return parametrization(*parametrization.manifold.random(*sizes, dtype=torch.float64, generator=generator))


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    case=st.sampled_from(CASES),
    spectrum=st.sampled_from(SPECTRA),
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 2**31),
)
def test_weights_of_the_set_are_fitted_exactly(kind, case, spectrum, form, seed):
    shape, rank = case
    weight = attainable(kind, shape, rank, spectrum, seed)
    parametrization = kind(shape, rank, spectrum, form=form)
    rows, columns = parametrization.matrix_shape
    oriented = form == "stiefel" or spectrum.name in ("free", "lipschitz") or not rows == columns == rank
    if not oriented and torch.linalg.det(weight.reshape(rows, columns)) < 0:
        weight = torch.cat((weight[:1].neg(), weight[1:]))
    originals = parametrization.right_inverse(weight)
    assert relative_error(parametrization(*originals), weight) <= 1e-12
    again = parametrization.right_inverse(parametrization(*originals))
    assert relative_error(parametrization(*again), weight) <= 1e-12


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(
    ("modes", "ranks"),
    [
        (((3, 1, 4), (2, 1, 5, 1)), (2, 2, 4, 4, 2, 2)),  # modes of one
        (((3, 2, 2), (5, 4)), (2, 4, 3, 3)),  # a saturated core behind one that is not
        (((3, 2, 2), (3, 2, 2)), (2, 4, 8, 4, 2)),  # and next to the singular values
    ],
)
def test_tensor_trains_with_saturated_cores_inside(modes, ranks, spectrum):
    shape = math.prod(modes[0]), math.prod(modes[1])
    for seed in range(4):
        train = STTP(shape, ranks, spectrum, modes=modes, form="stiefel")
        point = train.manifold.random(dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        if spectrum.name in ("identity", "bounded") and ranks[2] == 8:
            continue  # the last cores are square: half of the weights is attainable
        parametrization = STTP(shape, ranks, spectrum, modes=modes)
        assert relative_error(parametrization(*parametrization.right_inverse(train(*point))), train(*point)) <= 1e-12


@pytest.mark.parametrize("seed", range(6))
def test_a_square_frame_beside_one_at_the_edge_of_its_chart(seed):
    """The last column of a square frame has one possible sign, whichever the other frame would like."""
    rotation = torch.linalg.qr(draw(4, 4, seed=seed))[0] * torch.linspace(0.9, 0.5, 4, dtype=torch.float64)
    wide = torch.cat((rotation, torch.zeros(4, 3, dtype=torch.float64)), dim=1)
    for weight in (wide, wide.mT.contiguous()):
        parametrization = SVDP(tuple(weight.shape), 4, Bounded(0.4, 1.0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            originals = parametrization.right_inverse(weight)
        torch.testing.assert_close(parametrization(*originals), weight, atol=1e-12, rtol=0)


def test_a_frame_without_coordinates_has_the_sign_it_has():
    """Also if by a rounding the other frame's column is nearer to the edge of its chart."""
    eye = torch.eye(3, dtype=torch.float64)
    wide = torch.cat((-eye, torch.zeros(2, 3, dtype=torch.float64)))
    signs = _fitting._joint_signs((1 - 1e-15) * eye, wide, CoreChart(3, 3, reduced=True))
    assert torch.equal(signs, -torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "rank"), [((8, 4, 3, 3), 3), ((12, 7), 5), ((6, 6), 2)])
def test_other_weights_are_fitted_best(shape, rank, form):
    weight = draw(*shape)
    parametrization = SVDP(shape, rank, form=form)
    matrix = weight.reshape(parametrization.matrix_shape)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    best = torch.linalg.vector_norm(s[rank:])
    error = torch.linalg.vector_norm(parametrization(*parametrization.right_inverse(weight)) - weight)
    torch.testing.assert_close(error, best, rtol=1e-10, atol=0)
    for spectrum in (Identity(), Lipschitz(2.0), Bounded(1.0, 1.5)):  # the nearest: same vectors, nearest values
        parametrization = SVDP(shape, rank, spectrum, form=form)
        expected = (u[:, :rank] * spectrum.project(s[:rank])) @ vt[:rank]
        fitted = parametrization(*parametrization.right_inverse(weight)).reshape(matrix.shape)
        torch.testing.assert_close(fitted, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [2, 4, 6])
def test_tensor_trains_are_nearly_fitted_best(rank, form):
    """Against tensorly's left-to-right TT-SVD, and against the bounds of TT-SVD."""
    weight = draw(12, 4, 3)
    parametrization = STTP((12, 4, 3), rank, form=form)
    out, fan_in = parametrization.modes
    modes = (*out, *reversed(fan_in))
    order = (*range(len(out)), *reversed(range(len(out), len(modes))))
    tensor = weight.reshape(*out, *fan_in).permute(order)
    error = float(torch.linalg.vector_norm(parametrization(*parametrization.right_inverse(weight)) - weight))
    tails = []
    for k, bond in enumerate(parametrization.ranks, start=1):
        values = torch.linalg.svdvals(tensor.reshape(math.prod(modes[:k]), -1))
        tails.append(float(torch.linalg.vector_norm(values[bond:])))
    assert max(tails) - 1e-12 <= error <= np.linalg.norm(tails) + 1e-12
    with tensorly.backend_context("numpy"):  # other libraries, when they are imported, choose another one for all
        theirs = tensorly.decomposition.tensor_train(tensor.numpy(), rank=[1, *parametrization.ranks, 1])
        their_error = np.linalg.norm(tensorly.tt_to_tensor(theirs) - tensor.numpy())
    assert error <= math.sqrt(len(modes) - 1) * their_error + 1e-12


SIGNED_TARGETS = {
    "identity": torch.eye(6),
    "minus identity": -torch.eye(6),
    "one minus": torch.diag(torch.tensor([1.0, 1, 1, 1, -1, -1])),
    "permutation": torch.eye(6)[[2, 0, 1, 4, 5, 3]],
    "signed permutation": torch.diag(torch.tensor([1.0, -1, 1, -1, 1, 1])) @ torch.eye(6)[[3, 0, 4, 1, 5, 2]],
    "wide identity": torch.eye(4, 6),
    "minus tall identity": -torch.eye(6, 4),
    "first column": torch.eye(6, 1),
    "minus first column": -torch.eye(6, 1),
}


@pytest.mark.parametrize("spectrum", [Identity(), Free(), Lipschitz(), Bounded(0.5, 1.5)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SIGNED_TARGETS)
def test_weights_at_the_edge_of_the_charts(name, kind, spectrum):
    """Columns +-e_i: exact, with short reflectors where signs can be absorbed, else with a warning."""
    weight = SIGNED_TARGETS[name].double()
    rows, columns = weight.shape
    parametrization = kind((rows, columns), min(rows, columns), spectrum)
    if name == "signed permutation" and spectrum.name in ("identity", "bounded"):
        assert torch.linalg.det(weight) > 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        originals = parametrization.right_inverse(weight)
    torch.testing.assert_close(parametrization(*originals), weight, atol=1e-12, rtol=0)
    longest = max((float(flat.abs().max()) for flat in parametrization.coordinates(originals)), default=0.0)
    assert math.isfinite(longest)
    assert [str(w.message)[:33] for w in caught] == ["the weight lies at the edge of the"[:33]] * (longest > 1e6)
    if spectrum.name == "free":
        for chart, flat in zip(parametrization.charts, parametrization.coordinates(originals), strict=True):
            reflectors = flat[: (chart.rows - chart.columns) * chart.columns].view(-1, chart.columns)
            assert (reflectors.square().sum(0) <= 1 + 1e-9).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spectrum", [Identity(), Bounded(0.5, 1.5)])
def test_square_weights_of_negative_determinant_are_fitted_by_the_nearest_of_positive(kind, spectrum):
    weight = draw(5, 5)
    if torch.linalg.det(weight) > 0:
        weight[0] *= -1
    u, s, vt = torch.linalg.svd(weight)
    values = spectrum.project(s)
    values[-1] = -spectrum.project(torch.zeros(1, dtype=torch.float64))[0]
    parametrization = kind((5, 5), 5, spectrum)
    fitted = parametrization(*parametrization.right_inverse(weight))
    torch.testing.assert_close(fitted, (u * values) @ vt, atol=1e-12, rtol=0)
    assert torch.linalg.det(fitted) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_reflectors_stay_short(kind, seed):
    """Free signs bound |h|² by 2; one sign for both frames of a column leaves it moderate for generic weights."""
    for spectrum, bound in ((Free(), 2 + 1e-9), (Bounded(), 1e4), (Lipschitz(), 1e4)):
        parametrization = kind((24, 10), 8, spectrum)
        originals = parametrization.right_inverse(draw(24, 10, seed=seed))
        for chart, flat in zip(parametrization.charts, parametrization.coordinates(originals), strict=True):
            bottom = flat[: (chart.rows - chart.columns) * chart.columns].view(-1, chart.columns)
            assert float(bottom.square().sum(0).max()) <= bound - 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_declared_operator_norm_is_met(kind, form):
    parametrization = kind((6, 4, 3, 3), 3, Lipschitz(0.8, of="operator"), form=form)
    weight = parametrization(*parametrization.right_inverse(draw(6, 4, 3, 3)))
    bound = conv_norm_bound(weight)
    # of the weight itself the bound is not the same number as of its factor: it is a bound, not the norm
    assert float(bound) == pytest.approx(0.8, rel=0.1)
    scaled = parametrization(*parametrization.right_inverse(7 * weight))
    torch.testing.assert_close(scaled, weight, atol=1e-13, rtol=0)
    zero = parametrization(*parametrization.right_inverse(torch.zeros(6, 4, 3, 3, dtype=torch.float64)))
    assert bool(torch.isfinite(zero).all())


LAYERS = [nn.Linear(12, 7), nn.Linear(6, 6), nn.Conv2d(4, 8, 3), nn.ConvTranspose1d(6, 4, 3), nn.Embedding(9, 5)]


def large(layer):
    """Weights with many values above the caps, which clamping would make coincide."""
    with torch.no_grad():
        layer.weight.copy_(3 * draw(*layer.weight.shape))


@pytest.mark.parametrize("init", ["fit", "spread"])
@pytest.mark.parametrize("spectrum", [Free(), Lipschitz(), Bounded()])
@pytest.mark.parametrize("wrap", [svdp, sttp])
@pytest.mark.parametrize("prepare", [lambda layer: layer.reset_parameters(), large])
def test_fresh_layers_have_all_their_degrees_of_freedom(prepare, wrap, spectrum, init):
    torch.manual_seed(0)
    for prototype in LAYERS:
        layer = type(prototype)(*_arguments(prototype)).double()
        prepare(layer)
        wrap(layer, 3, spectrum, init=init)
        ((_, parametrization, originals),) = spectral_weights(layer)
        every = tuple(range(len(originals)))
        detached = [t.detach() for t in originals]
        jacobians = torch.func.jacrev(lambda *t, p=parametrization: p(*t).flatten(), argnums=every)(*detached)
        values = torch.linalg.svdvals(torch.cat([j.flatten(1) for j in jacobians], dim=1))
        assert int((values > 1e-6 * values[0]).sum()) == parametrization.degrees_of_freedom
        values = parametrization.singular_values(*originals).sort(descending=True).values
        if init == "spread":
            torch.testing.assert_close(values, spectrum.spread(3, dtype=torch.float64))


def _arguments(layer):
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    return layer.in_channels, layer.out_channels, layer.kernel_size


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrap", [svdp, sttp])
def test_a_layer_starts_from_the_nearest_weight(wrap, form):
    """Exactly so, unless values had to move to the border of their set."""
    layer = nn.Linear(10, 8).double()
    weight = layer.weight.detach().clone()
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    c = float(s[0]) * 1.1
    wrap(layer, 8, Lipschitz(c), form=form, modes=((8,), (10,))) if wrap is sttp else wrap(
        layer, 8, Lipschitz(c), form=form
    )
    s[0] = c
    torch.testing.assert_close(layer.weight, (u * s) @ vt, atol=1e-12, rtol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_nothing_fits(kind, bad):
    for spectrum in (Free(), Lipschitz(of="operator")):
        weight = draw(4, 3, 2)
        weight[1, 2, 1] = bad
        with pytest.raises(ValueError, match="weight has NaN or infinite entries"):
            kind((4, 3, 2), 2, spectrum).right_inverse(weight)
    parametrization = kind((4, 6), 2)
    with pytest.raises(ValueError, match=r"weight must have shape \(4, 6\), got \(6, 4\)"):
        parametrization.right_inverse(draw(6, 4))
