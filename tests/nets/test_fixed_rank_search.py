"""Global search for the row space: against brute force, its certificate, the bounds it rests on, what it refuses."""

import math
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retract.nets.init._variable_projection import variable_projection
from retract.nets.init.fixed_rank_search import fixed_rank_search

FLOAT = torch.float64
module = import_module("retract.nets.init.fixed_rank_search")  # the package has the function under this name


def normal(*size, seed=0):
    return torch.randn(*size, dtype=FLOAT, generator=torch.Generator().manual_seed(seed))


def energies(weight, bases, slope=0.0):
    """F from its definition at every basis of a stack: one minus the relative error."""
    norms = weight.norm(dim=1)
    angle = torch.acos(((weight @ bases).norm(dim=-1) / norms).clamp(max=1))
    rectified = (angle.sin() + (math.pi - angle) * angle.cos()) / math.pi
    kernel = ((1 - slope) ** 2 * rectified + 2 * slope * angle.cos()) / (1 + slope**2)
    return (norms * kernel).square().sum(-1) / norms.square().sum()


def brute_force(weight, rank, slope=0.0, draws=20_000, starts=6, seed=0):
    """The least relative error of many random row spaces and of local search from the best of them."""
    bases = torch.linalg.qr(normal(draws, weight.shape[1], rank, seed=seed))[0]
    values = energies(weight, bases, slope)
    chosen = [bases[i] for i in values.topk(starts).indices] + [*bases[:starts]]
    local = [variable_projection(weight, rank, slope=slope, start=start, iterations=60) for start in chosen]
    return 1 - max(float(values.max()), float(energies(weight, torch.stack(local), slope).max()))


# ------------------------------------------------------------------------------------------ against brute force


@pytest.mark.parametrize(
    ("shape", "rank", "accuracy", "slope"),
    [
        ((5, 2), 1, 0.005, 0.0),
        ((4, 3), 1, 0.005, 0.0),
        ((7, 4), 1, 0.01, 0.0),
        ((7, 4), 1, 0.02, -0.5),
        ((3, 6), 1, 0.01, 0.0),
        ((6, 3), 2, 0.01, 0.0),
        ((8, 4), 2, 0.05, 0.0),
        ((8, 4), 2, 0.05, 0.2),
        ((8, 5), 2, 0.15, 0.0),
        ((8, 4), 3, 0.01, 0.0),
        ((10, 4), 3, 0.01, 0.1),
    ],
)
@pytest.mark.parametrize("seed", range(2))
def test_finds_the_optimum_and_proves_it_to_the_accuracy(shape, rank, accuracy, slope, seed):
    weight = normal(*shape, seed=seed)
    found = fixed_rank_search(weight, rank, accuracy, slope=slope)
    best = brute_force(weight, rank, slope)
    assert 0 < found.gap <= accuracy
    assert found.error <= 1 - float(energies(weight, variable_projection(weight, rank, slope=slope), slope)) + 1e-12
    assert found.error <= best + 1e-9
    assert found.error - found.gap <= best
    assert found.error == pytest.approx(1 - float(energies(weight, found.basis, slope)), abs=1e-12)
    torch.testing.assert_close(found.basis.mT @ found.basis, torch.eye(rank, dtype=FLOAT), atol=1e-12, rtol=0)


def test_proves_that_local_search_may_end_elsewhere():
    weight = normal(4, 3, seed=8)
    local = 1 - float(energies(weight, variable_projection(weight, 1, iterations=200)))
    found = fixed_rank_search(weight, 1, 5e-4)
    assert found.error < local - 7e-4
    assert found.error == pytest.approx(brute_force(weight, 1), abs=1e-6)


def test_in_the_plane_it_is_the_best_angle():
    weight = normal(9, 2, seed=3)
    angles = torch.linspace(0, math.pi, 40001, dtype=FLOAT)
    best = 1 - float(energies(weight, torch.stack((angles.cos(), angles.sin()), -1).unsqueeze(-1)).max())
    found = fixed_rank_search(weight, 1, 1e-4)
    assert found.error == pytest.approx(best, abs=1e-8)
    assert found.gap <= 1e-4


def test_the_cost_does_not_grow_with_the_size_of_the_layer():
    """The same few directions in a space of 2,000, with a little noise that the accuracy allows for."""
    weight = normal(12, 4)
    frame = torch.linalg.qr(normal(2000, 4, seed=1))[0]
    wide = weight @ frame.mT + 1e-4 * normal(12, 2000, seed=2)
    small, large = (fixed_rank_search(w, 2, 0.1) for w in (weight, wide))
    assert large.dimension == small.dimension == 4
    assert large.cells == pytest.approx(small.cells, rel=0.2)
    assert large.error == pytest.approx(small.error, abs=1e-3)
    assert large.gap <= 0.1


def test_what_was_projected_away_counts_in_the_gap():
    """With one leading direction and rank 1 there is one row space to try: the proof leaves the rest open."""
    left, _, right = torch.linalg.svd(normal(8, 6), full_matrices=False)
    values = torch.tensor([1.0, 0.1, 0.05, 0, 0, 0], dtype=FLOAT)
    weight = left * values @ right
    found = fixed_rank_search(weight, 1, 0.9)
    assert (found.dimension, found.cells) == (1, 1)
    tail = 2 * 0.1 / float(values.norm())
    center = float(energies(weight, right[:1].mT))
    assert found.gap == pytest.approx(center + tail - (1 - found.error), abs=1e-12)


def test_few_cells_where_a_coarse_answer_will_do():
    weight = normal(8, 4)
    cells = [fixed_rank_search(weight, 1, accuracy).cells for accuracy in (0.3, 0.1, 0.03, 0.01)]
    assert cells == sorted(cells)
    assert 4 <= cells[0] < 100 < 500 < cells[-1]


# ---------------------------------------------------------------------------------- the bounds that it rests on


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.sampled_from([(2, 1), (4, 1), (4, 2), (5, 2), (4, 3), (6, 3)]),
    slope=st.sampled_from([0.0, 0.2, -1.0]),
    level=st.integers(0, 5),
    seed=st.integers(0, 2**20),
)
def test_no_row_space_of_a_cell_is_above_its_bound(sizes, slope, level, seed):
    (k, r), generator = sizes, torch.Generator().manual_seed(seed)
    rows = normal(6, k + 2, seed=seed) / 5
    search = module._Search(rows, r, k, slope)
    order = torch.randperm(k, generator=generator)
    half_widths = 2.0**-level * (0.2 + torch.rand(k - r, r, generator=generator, dtype=FLOAT))
    center = 2 * torch.rand(k - r, r, generator=generator, dtype=FLOAT) - 1
    energy, bound = search._visit(order[None], center[None], half_widths)
    inside = center + half_widths * (2 * torch.rand(400, k - r, r, generator=generator, dtype=FLOAT) - 1)
    inside[:200] = center + half_widths * (inside[:200] - center).sign()  # corners
    graphs = torch.cat((torch.eye(r, dtype=FLOAT).expand(401, r, r), torch.cat((center[None], inside))), 1)
    bases = torch.zeros(401, k + 2, r, dtype=FLOAT).index_copy(1, order, torch.linalg.qr(graphs)[0])
    values = energies(rows, bases, slope) * rows.square().sum()
    assert float(values[0]) == pytest.approx(float(energy), abs=1e-12)
    assert float(values.max()) <= float(bound) + 1e-12


@settings(max_examples=60, deadline=None)
@given(sizes=st.sampled_from([(2, 1), (4, 1), (4, 2), (5, 2), (4, 3)]), seed=st.integers(0, 2**20))
def test_rows_within_reach_of_a_cell_have_the_bound_one(sizes, seed):
    """A row in the row space of a corner, far from that of the center: only what is just wide enough reaches it."""
    (k, r), generator = sizes, torch.Generator().manual_seed(seed)
    center = 2 * torch.rand(k - r, r, generator=generator, dtype=FLOAT) - 1
    half_widths = (
        0.3 * torch.rand(k - r, r, generator=generator, dtype=FLOAT) ** 3
    )  # some edges much longer than others
    corner = center + half_widths * torch.randn(k - r, r, generator=generator, dtype=FLOAT).sign()
    shortest = torch.linalg.eigh(center.mT @ center)[1][:, :1]
    for z in (shortest, normal(r, 1, seed=seed)):
        row = torch.cat((z, corner @ z)).mT
        search = module._Search(row / row.norm(), r, k, 0.0)
        energy, bound = search._visit(torch.arange(k)[None], center[None], half_widths)
        assert float(energy) <= float(bound) == pytest.approx(1, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(1, 3),
    power=st.floats(0, 3),
    slope=st.sampled_from([0.0, 0.2, -1.0]),
    accuracy=st.sampled_from([0.5, 0.1, 0.01]),
    seed=st.integers(0, 2**20),
)
def test_leading_directions_hold_the_best_row_space_to_half_the_accuracy(rank, power, slope, accuracy, seed):
    left, _, right = torch.linalg.svd(normal(9, 7, seed=seed), full_matrices=False)
    values = torch.arange(1.0, 8, dtype=FLOAT) ** -power
    values = values / values.norm()
    dimension, change = module._leading_dimension(values, rank, accuracy)
    assert rank <= dimension <= 7
    assert change <= accuracy / 2
    assert change == pytest.approx(2 * float(values[dimension : dimension + rank].norm()), abs=1e-12)
    if dimension > rank:
        assert 2 * float(values[dimension - 1 : dimension - 1 + rank].norm()) > accuracy / 2
    weight = left * values @ right
    reduced = left[:, :dimension] * values[:dimension] @ right[:dimension]
    bases = torch.linalg.qr(normal(500, 7, rank, seed=seed + 1))[0]
    norms = weight.norm(dim=1)
    cosines = ((reduced @ bases).norm(dim=-1) / norms).clamp(max=1)
    projected = (norms * module.kernel(cosines, slope)).square().sum(-1)
    assert float((energies(weight, bases, slope) - projected).abs().max()) <= change + 1e-12


@settings(max_examples=20, deadline=None)
@given(sizes=st.sampled_from([(3, 1), (4, 2), (5, 2), (6, 3)]), seed=st.integers(0, 2**20))
def test_every_subspace_is_in_a_cell_of_the_first_level(sizes, seed):
    """Over the coordinates of its largest minor it is the graph of a matrix with entries in [-1, 1]."""
    k, r = sizes
    basis = torch.linalg.qr(normal(k, r, seed=seed))[0]
    pivots = max(torch.combinations(torch.arange(k), r), key=lambda rows: float(torch.linalg.det(basis[rows]).abs()))
    graph = basis @ torch.linalg.inv(basis[pivots])
    assert float(graph.abs().max()) <= 1 + 1e-12


@pytest.mark.parametrize(("shape", "rank"), [((5, 3), 1), ((7, 4), 2), ((7, 4), 3)])
def test_the_proof_covers_every_subspace(shape, rank, monkeypatch):
    """Each lies in a visited cell whose bound is at most the least error that is proved."""
    cells = []
    visit = module._Search._visit

    def record(search, orders, centers, half_widths):
        energies, bounds = visit(search, orders, centers, half_widths)
        cells.append((orders, centers, half_widths, bounds))
        return energies, bounds

    monkeypatch.setattr(module._Search, "_visit", record)
    weight, k = normal(*shape), shape[1]
    found = fixed_rank_search(weight, rank, 0.03)
    assert sum(len(orders) for orders, *_ in cells) == found.cells
    highest = 1 - (found.error - found.gap)
    right = torch.linalg.svd(weight, full_matrices=False).Vh
    for basis in torch.linalg.qr(normal(40, k, rank, seed=1))[0]:
        choices = torch.combinations(torch.arange(k), rank)
        pivots = max(choices, key=lambda rows: float(torch.linalg.det(basis[rows]).abs()))
        rest = torch.tensor(sorted(set(range(k)) - set(pivots.tolist())))
        graph, order = basis[rest] @ torch.linalg.inv(basis[pivots]), torch.cat((pivots, rest))
        least = math.inf
        for orders, centers, half_widths, bounds in cells:
            inside = (orders == order).all(1) & ((centers - graph).abs() <= half_widths + 1e-12).all((1, 2))
            least = min([least, *bounds[inside].tolist()])
        assert float(energies(weight, right.mT @ basis)) <= least + 1e-12 <= highest + 1e-11


# ------------------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_full_rank_is_exact_at_once(shape):
    weight = normal(*shape)
    found = fixed_rank_search(weight, min(shape), 0.01)
    assert found.cells == 1
    assert found.error == pytest.approx(0, abs=1e-14)
    torch.testing.assert_close(weight @ found.basis @ found.basis.mT, weight)


def test_fewer_directions_than_the_rank():
    weight = normal(6, 1) @ normal(1, 5, seed=1)
    found = fixed_rank_search(weight, 3, 0.01)
    assert found.error == pytest.approx(0, abs=1e-14)
    assert found.basis.shape == (5, 3)


def test_rows_and_weights_of_zero():
    weight = normal(6, 3)
    padded = torch.cat((weight, torch.zeros(2, 3, dtype=FLOAT)))
    assert fixed_rank_search(padded, 1, 0.05).error == pytest.approx(fixed_rank_search(weight, 1, 0.05).error)
    with pytest.raises(ValueError, match="weight is zero: no error is relative to it"):
        fixed_rank_search(torch.zeros(4, 3), 1, 0.05)


def test_float32_is_computed_in_float64():
    weight = normal(6, 3).float()
    found, expected = fixed_rank_search(weight, 1, 0.05), fixed_rank_search(weight.double(), 1, 0.05)
    assert found.basis.dtype == FLOAT
    assert found[1:] == expected[1:]


def test_searches_without_end_are_refused():
    with pytest.raises(ValueError, match=r"max_cells=2000 .* dimension 1 in 14 dimensions have 13 parameters"):
        fixed_rank_search(normal(16, 16), 1, 0.1, max_cells=2000)
    with pytest.raises(ValueError, match="takes more than max_cells=1000000 cells"):
        fixed_rank_search(normal(64, 64), 16, 0.1)
    with pytest.raises(ValueError, match="max_cells=10 "):
        fixed_rank_search(normal(6, 3), 1, 0.001, max_cells=10)


def test_bad_arguments():
    weight = normal(4, 3)
    for accuracy in (0, 1, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"accuracy must be in \(0, 1\), got"):
            fixed_rank_search(weight, 1, accuracy)
    with pytest.raises(ValueError, match="rank must be an integer from 1 to 3, got 4"):
        fixed_rank_search(weight, 4, 0.1)
    with pytest.raises(ValueError, match="slope must be finite"):
        fixed_rank_search(weight, 1, 0.1, slope=math.inf)
    with pytest.raises(ValueError, match=r"weight must be a matrix, got shape \(2, 3, 4\)"):
        fixed_rank_search(normal(2, 3, 4), 1, 0.1)
    weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        fixed_rank_search(weight, 1, 0.1)
