"""Named formats: their cores, the ranks they take, and the ranks that a budget gives them."""

import itertools
import math

import pytest
import tltorch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retract.nets.layers._tensor_modes import balanced_modes
from retract.nets.layers.tensor_formats import FORMATS, tensor_network

SHAPES = [(24, 16), (24, 16, 5), (24, 16, 3, 3), (12, 8, 3, 3, 3), (7, 11, 3, 3), (1, 1, 1, 1), (16, 1, 3, 3), (5, 1)]

# The brief's table for two dimensions, and the same in other numbers of dimensions.
CORES = {
    ("cp", 2): "or,ir,hr,wr",
    ("cp", 0): "or,ir",
    ("tucker2", 2): "op,pqhw,iq",
    ("tucker2", 0): "op,pq,iq",
    ("tucker", 2): "op,iq,hs,wt,pqst",
    ("tucker", 3): "op,iq,hs,wt,de,pqste",
    ("tensor_train", 2): "ia,ahb,bwc,co",
    ("tensor_train", 0): "ia,ao",
    ("tt_matrix", 2): "hwa,aixb,bjyc,ckz",
    ("tt_matrix", 0): "ixa,ajyb,bkz",
    ("tensor_ring", 2): "ria,ajb,bkc,chwe,exf,fyg,gzr",
    ("tensor_ring", 0): "ria,ajb,bkc,cxe,eyf,fzr",
    ("block_term", 2): "obp,ibq,bpqhw",
    ("block_term", 0): "obp,ibq,bpq",
    ("hierarchical_tucker", 2): "ip,oq,hs,wt,pqu,stv,uv",
    ("hierarchical_tucker", 0): "ip,oq,pq",
    ("hierarchical_tucker", 1): "ip,oq,hs,pqu,us",
    ("hierarchical_tucker", 3): "ip,oq,hs,wt,de,pqu,stv,vef,uf",
}


@pytest.mark.parametrize(("format", "kernel"), CORES)
def test_cores(format, kernel):
    network = tensor_network(format, (64, 64) + (3,) * kernel, rank=4)
    assert ",".join(network.cores) == CORES[format, kernel]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_have_the_shape(format, shape):
    network = tensor_network(format, shape, rank=2)
    assert network.weight_shape == shape
    assert network.weight([torch.ones(core) for core in network.core_shapes]).shape == shape
    external = network.outputs + network.inputs + network.kernel
    assert all("".join(network.cores).count(label) == 1 for label in external)


def test_bond_products_of_the_brief():
    ranks = {"cp": 48, "tucker2": 16, "tensor_train": 24, "tt_matrix": 12, "tensor_ring": 10, "block_term": (4, 8, 8)}
    products = {"cp": 48, "tucker2": 16**2, "tensor_train": 24**3, "tt_matrix": 9 * 12**2, "tensor_ring": 10**7}
    networks = {format: tensor_network(format, (64, 64, 3, 3), rank=rank) for format, rank in ranks.items()}
    assert {format: network.bond_product for format, network in networks.items()} == products | {"block_term": 256}


# ---------------------------------------------------------------------------------------------------------- given ranks


@pytest.mark.parametrize("format", FORMATS)
def test_a_tuple_of_ranks_is_taken_in_the_order_of_the_bonds(format):
    bonds = tensor_network(format, (24, 16, 3, 3), rank=1).bonds
    ranks = tuple(range(2, 2 + len(bonds)))
    network = tensor_network(format, (24, 16, 3, 3), rank=ranks)
    assert tuple(network.dims[bond] for bond in network.bonds) == ranks


def test_an_int_is_cut_to_what_is_of_use():
    def ranks(format, shape, rank=1000, **options):
        network = tensor_network(format, shape, rank=rank, **options)
        return tuple(network.dims[bond] for bond in network.bonds)

    assert ranks("cp", (12, 10, 3, 3)) == (90,)
    assert ranks("tucker2", (64, 3, 3, 3)) == (27, 3)
    assert ranks("tucker", (64, 3, 3, 3)) == (27, 3, 3, 3)
    assert ranks("tucker", (64, 64, 3, 3), rank=16) == (16, 16, 3, 3)
    assert ranks("tensor_train", (64, 3, 3, 3)) == (3, 9, 27)
    assert ranks("tt_matrix", (8, 8, 3, 3)) == (9, 16, 4)
    assert ranks("hierarchical_tucker", (64, 64, 3, 3), rank=16) == (16, 16, 3, 3, 9, 9)
    assert ranks("block_term", (8, 6, 3, 3)) == (1, 8, 6)  # one block is the whole weight
    assert ranks("block_term", (8, 6, 3, 3), rank=4) == (4, 4, 4)
    assert ranks("tensor_ring", (6, 10)) == (6, 6, 6, 6)
    assert ranks("tensor_train", (5, 1, 1, 1)) == (1, 1, 1)


@pytest.mark.parametrize("format", FORMATS)
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_weights_of_the_largest_useful_ranks_fill_the_space(format, data):
    # The Jacobian of the weight has full rank: nothing that a larger rank could add is missing.
    shape = data.draw(
        st.tuples(st.integers(1, 5), st.integers(1, 4), *[st.integers(1, 2)] * data.draw(st.integers(0, 2)))
    )
    network = tensor_network(format, shape, rank=100)
    generator = torch.Generator().manual_seed(0)
    cores = [torch.randn(core, generator=generator, dtype=torch.float64) for core in network.core_shapes]
    jacobians = torch.autograd.functional.jacobian(lambda *cores: network.weight(cores).flatten(), tuple(cores))
    jacobian = torch.cat([one.flatten(1) for one in jacobians], 1)
    assert torch.linalg.matrix_rank(jacobian, rtol=1e-9) == math.prod(shape)


# --------------------------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "shape", [(128, 128, 3, 3), (64, 32, 3, 3), (256, 64, 1, 1), (512, 256), (64, 64, 5), (32, 32, 3, 3, 3)]
)
@pytest.mark.parametrize("budget", [0.05, 0.1, 0.3, 1.0])
def test_a_budget_is_kept_and_used(format, shape, budget):
    dense = math.prod(shape)
    network = tensor_network(format, shape, budget=budget)
    assert network.parameters <= budget * dense
    # What remains is less than one more of the dearest rank takes, or a few per cent.
    dearest = max(
        sum(math.prod(network.dims[x] for x in core if x != bond) for core in network.cores if bond in core)
        for bond in network.bonds
    )
    # Ranks of which none is of use without the other: two of a matrix, and of a train all along a kernel of one.
    tied = 3 if format == "tensor_train" else 1 if format in ("cp", "tensor_ring", "tt_matrix") else 2
    assert network.parameters > min(0.95 * budget * dense, budget * dense - tied * dearest - 1)
    assert network == tensor_network(format, shape, budget=int(budget * dense))


@pytest.mark.parametrize("format", FORMATS)
def test_no_single_rank_can_be_raised_within_the_budget(format):
    budget = 1000
    network = tensor_network(format, (24, 16, 3, 3), budget=budget)
    ranks = [network.dims[bond] for bond in network.bonds]
    most = tensor_network(format, (24, 16, 3, 3), rank=10_000)
    for position, bond in enumerate(network.bonds):
        raised = [rank + (position == other) for other, rank in enumerate(ranks)]
        larger = tensor_network(format, (24, 16, 3, 3), rank=raised)
        alone = {"tucker": "st", "hierarchical_tucker": "stuv"}.get(format, "")  # full, or of use only together
        assert larger.parameters > budget or raised[position] > most.dims[bond] or bond in alone


def spatial_ranks(network):
    """Ranks of the bonds beside the kernel's cores."""
    beside = {x for core in network.cores if set(core) & set(network.kernel) for x in core}
    return [network.dims[bond] for bond in network.bonds if bond in beside]


@pytest.mark.parametrize("budget", [0.02, 0.05, 0.1, 0.2])
def test_kernel_modes_are_never_starved(budget):
    shape = (128, 128, 3, 3)
    for format in ("tucker", "hierarchical_tucker"):
        network = tensor_network(format, shape, budget=budget)
        assert network.dims["s"] == network.dims["t"] == 3
    train = spatial_ranks(tensor_network("tensor_train", shape, budget=budget))
    assert max(train) - min(train) <= 1
    ring = spatial_ranks(tensor_network("tensor_ring", shape, budget=budget))
    assert max(ring) - min(ring) <= 1
    (kernel,) = spatial_ranks(tensor_network("tt_matrix", shape, budget=budget))
    assert kernel >= min(9, max(tensor_network("tt_matrix", shape, budget=budget).dims[b] for b in "bc")) - 1


@pytest.mark.parametrize("format", ["tucker", "hierarchical_tucker"])
def test_kernel_modes_are_full_before_channels_have_as_much(format):
    network = tensor_network(format, (64, 64, 7, 7), budget=0.005)
    assert network.dims["p"] < 7 and network.dims["s"] == network.dims["t"] == 7


def test_tltorch_starves_them():
    # The ranks that tensorly-torch chooses for a tenth of the parameters: one or two for a kernel of three.
    shape, budget = (128, 128, 3, 3), 0.1
    tucker = tltorch.FactorizedTensor.new(shape, rank=budget, factorization="tucker").rank
    train = tltorch.FactorizedTensor.new((128, 3, 3, 128), rank=budget, factorization="tt").rank
    assert tuple(tucker) == (47, 47, 1, 1) and tuple(train) == (1, 54, 2, 54, 1)
    ours = tensor_network("tucker", shape, budget=budget)
    assert [ours.dims[bond] for bond in "pqst"] == [29, 28, 3, 3]
    ours = tensor_network("tensor_train", shape, budget=budget)
    assert [ours.dims[bond] for bond in "abc"] == [33, 32, 32]
    # Parameters are as many, and the canonical form, which starves nothing, has the same rank.
    assert tensor_network("cp", shape, budget=budget).dims["r"] == 56
    assert tltorch.FactorizedTensor.new(shape, rank=budget, factorization="cp").rank == 56


def test_the_ranks_of_tltorch_lose_the_kernel():
    # A weight whose channels have rank 20 and whose kernel is any: ours hold it, theirs cannot.
    from retract.nets.init.decomposition import decompose

    generator = torch.Generator().manual_seed(0)
    core = torch.randn(20, 20, 3, 3, generator=generator, dtype=torch.float64)
    left, right = torch.randn(2, 128, 20, generator=generator, dtype=torch.float64)
    weight = torch.einsum("op,iq,pqhw->oihw", left, right, core)
    assert decompose(weight, "tucker", budget=0.1).error < 1e-10
    assert decompose(weight, "tucker", rank=(20, 20, 1, 1)).error > 0.5


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(64, 48, 3, 3), (30, 20), (12, 8, 3)])
def test_the_least_budget_is_named_and_enough(format, shape):
    with pytest.raises(ValueError, match=r"budget must be at least \d+ parameters") as caught:
        tensor_network(format, shape, budget=1)
    least = int(str(caught.value).split()[5])
    assert tensor_network(format, shape, budget=least).parameters == least
    with pytest.raises(ValueError, match=f"at least {least} parameters"):
        tensor_network(format, shape, budget=least - 1)


# ---------------------------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize(("size", "count"), [*itertools.product([1, 7, 12, 36, 97, 128, 360], [1, 2, 3, 4])])
def test_balanced_modes(size, count):
    modes = balanced_modes(size, count)
    assert math.prod(modes) == size and len(modes) == count and list(modes) == sorted(modes)
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    if count <= 3:
        sums = [sum(m) for m in itertools.product(divisors, repeat=count) if math.prod(m) == size]
        assert sum(modes) == min(sums)


def test_default_modes():
    assert balanced_modes(128, 3) == (4, 4, 8)
    network = tensor_network("tensor_ring", (64, 3, 7, 7), rank=2)
    assert (network.outputs, network.inputs) == ("xyz", "i")
    network = tensor_network("tt_matrix", (128, 3, 3, 3), rank=2)
    assert [network.dims[x] for x in "xyzijk"] == [4, 4, 8, 3, 1, 1]  # padded to as many
    network = tensor_network("tt_matrix", (7, 11, 3, 3), rank=2)
    assert network.cores == ("hwa", "aix")
    assert tensor_network("tt_matrix", (7, 11), rank=2).cores == ("ix",)


def test_given_modes():
    network = tensor_network("tensor_ring", (24, 16, 3, 3), rank=2, out_modes=(6, 4), in_modes=(2, 2, 2, 2))
    assert [network.dims[x] for x in network.outputs + network.inputs] == [6, 4, 2, 2, 2, 2]
    network = tensor_network("tt_matrix", (24, 16, 3, 3), rank=2, in_modes=(8, 2))
    assert [network.dims[x] for x in network.outputs + network.inputs] == [4, 6, 8, 2]
    network = tensor_network("tensor_ring", (2**12, 2**12, 3, 3, 3), rank=2, out_modes=[2] * 12, in_modes=[2] * 12)
    assert len(set("".join(network.cores))) == 52  # the letters suffice for the most modes


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"format": "tucker3"}, ValueError, "format must be one of cp, tucker2.*'tucker3'"),
        ({}, ValueError, "one of rank and budget"),
        ({"rank": 2, "budget": 0.1}, ValueError, "one of rank and budget"),
        ({"rank": 0}, ValueError, "rank must be at least 1"),
        ({"rank": (2, 0)}, ValueError, "rank must be at least 1"),
        ({"rank": (2, 2, 2)}, ValueError, "2 for the bonds p, q, got"),
        ({"rank": 2.5}, TypeError, "rank must be integers"),
        ({"rank": True}, TypeError, "rank must be integers"),
        ({"budget": 0.0}, ValueError, r"fraction.*\(0, 1\], got 0.0"),
        ({"budget": 1.5}, ValueError, r"fraction.*\(0, 1\], got 1.5"),
        ({"budget": float("nan")}, ValueError, "got nan"),
        ({"budget": 0}, ValueError, "budget must be at least 1"),
        ({"budget": "10%"}, TypeError, "budget must be a number"),
        ({"shape": (8,), "rank": 1}, ValueError, "shape must be"),
        ({"shape": (8, 8, 3, 3, 3, 3), "rank": 1}, ValueError, "shape must be"),
        ({"shape": (8, 0, 3), "rank": 1}, ValueError, "shape must be at least 1"),
        ({"shape": (8, 8.0), "rank": 1}, TypeError, "shape must be integers"),
        ({"rank": 1, "in_modes": (4, 4)}, ValueError, "in_modes must be None for format 'tucker2'"),
        ({"format": "tensor_ring", "rank": 1, "in_modes": (4, 5)}, ValueError, "in_modes.*factors of 16, got .4, 5."),
        ({"format": "tensor_ring", "rank": 1, "out_modes": ()}, ValueError, "out_modes.*factors of 24"),
        ({"format": "tt_matrix", "rank": 1, "out_modes": (24,), "in_modes": (4, 4)}, ValueError, "must be as many"),
    ],
)
def test_bad_arguments(arguments, error, match):
    arguments = {"format": "tucker2", "shape": (24, 16, 3, 3)} | arguments
    with pytest.raises(error, match=match):
        tensor_network(**arguments)
