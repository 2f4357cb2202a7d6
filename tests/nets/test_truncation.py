"""Truncated models: the terms that are left, the errors that were asked for, and that fine-tuning trains them all."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from retract.manifolds.canonical import refit, select_terms
from retract.nets._truncation import truncate
from retract.nets.parametrizations.canonical import canonical_weight, canonical_weight_norm
from retract.nets.parametrizations.models import canonical_weights, manifold_groups
from retract.optim import RiemannianSGD

pytestmark = pytest.mark.filterwarnings("ignore:rank=.* are more terms:UserWarning")


class Net(nn.Module):
    """Convolutions of several kinds and linear layers; one is used twice, one stays dense."""

    def __init__(self, form="euclidean"):
        super().__init__()
        self.first = canonical_weight_norm(nn.Conv2d(1, 8, 3, padding=1, bias=False), 6, form=form)
        self.bn = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, stride=2), nn.ReLU())
        canonical_weight_norm(self.body[0], 40, form=form)
        self.up = canonical_weight_norm(nn.ConvTranspose2d(8, 4, 2, stride=2), 10, form=form)
        self.shared = canonical_weight_norm(nn.Linear(4, 4), 4, form=form)
        self.again = self.shared
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.bn(self.first(x)))
        x = self.up(self.body(x)).mean((2, 3))
        return self.head(self.again(torch.tanh(self.shared(x))))


NAMES = ["first", "body.0", "up", "shared"]
RANKS = [6, 40, 10, 4]
FORMS = ["euclidean", "oblique"]


def build(form="euclidean", spread=0.5):
    """In euclidean form with factors of any length, in both with weights of either sign."""
    torch.manual_seed(0)
    model = Net(form).double()
    with torch.no_grad():
        for _, _, (weights, *factors) in canonical_weights(model):
            weights.mul_(torch.exp(spread * torch.randn_like(weights)) * torch.randn_like(weights).sign())
            if form == "euclidean":
                for factor in factors:
                    factor.mul_(torch.exp(torch.randn(len(factor), 1, dtype=factor.dtype)))
    return model.eval()


def batch():
    return torch.randn(5, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def layer_weights(model):
    return {name: model.get_submodule(name).weight.detach() for name in NAMES}


def relative_errors(model, truncated):
    old, new = layer_weights(model), layer_weights(truncated)
    return [float((old[name] - new[name]).norm() / old[name].norm()) for name in NAMES]


# ---------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("form", FORMS)
def test_the_terms_kept_are_those_selected_with_refitted_weights(form):
    model = build(form)
    cut = truncate(model, ratio=0.5)
    assert [layer.name for layer in cut.layers] == NAMES
    assert [(layer.old_rank, layer.new_rank) for layer in cut.layers] == [(r, r // 2) for r in RANKS]
    for name in NAMES:
        parametrization, originals = canonical_weight(model.get_submodule(name))
        new_parametrization, new = canonical_weight(cut.model.get_submodule(name))
        weights, factors = parametrization.terms(*originals)
        kept = select_terms(weights, factors).order[: len(new[0])].sort().values
        torch.testing.assert_close(new_parametrization.terms(*new)[0], refit(weights, factors, kept))
        assert new_parametrization.form == form and new_parametrization.rank == len(kept)
        torch.testing.assert_close(new_parametrization.sigma, parametrization.sigma)
        for old_factor, new_factor in zip(originals[1:], new[1:], strict=True):
            assert torch.equal(new_factor, old_factor[kept])


@pytest.mark.parametrize("form", FORMS)
def test_reported_errors_are_measured_ones(form):
    model = build(form)
    for options in ({"ratio": 0.5}, {"error": 0.3}, {"ranks": 3}):
        cut = truncate(model, **options)
        measured = relative_errors(model, cut.model)
        assert [layer.error for layer in cut.layers] == pytest.approx(measured, abs=1e-7)
        assert cut.error == pytest.approx(math.sqrt(sum(e * e for e in measured) / len(measured)), abs=1e-7)


def test_parameters_are_counted_as_they_are():
    model = build()
    cut = truncate(model, ratio=0.5)
    for layer in cut.layers:
        for count, one in ((layer.parameters_before, model), (layer.parameters_after, cut.model)):
            _, originals = canonical_weight(one.get_submodule(layer.name))
            assert count == sum(original.numel() for original in originals)


def test_the_model_given_is_left_alone():
    model = build()
    before, state = model(batch()), copy.deepcopy(model.state_dict())
    cut = truncate(model, ratio=0.5)
    with torch.no_grad():
        for parameter in cut.model.parameters():
            parameter.add_(1)
    assert torch.equal(model(batch()), before)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in cut.model.parameters()}


def test_the_truncated_model_runs_and_has_the_layers_and_the_state_dict_of_a_smaller_one():
    cut = truncate(build(), ranks={"first": 3, "body": 9, "up": 5})
    smaller = Net().double()
    for name, rank in (("first", 3), ("body.0", 9), ("up", 5)):
        dense = {"first": nn.Conv2d(1, 8, 3, padding=1, bias=False), "body.0": nn.Conv2d(8, 8, 3, padding=1, stride=2)}
        layer = canonical_weight_norm(dense.get(name, nn.ConvTranspose2d(8, 4, 2, stride=2)).double(), rank)
        smaller.set_submodule(name, layer)
    smaller.load_state_dict(cut.model.state_dict())
    smaller.eval()
    torch.testing.assert_close(smaller(batch()), cut.model(batch()))
    assert cut.model.again is cut.model.shared


def test_all_terms_kept_change_nothing():
    model = build()
    for options in ({"ratio": 1.0}, {"ranks": 1000}, {"ranks": {}}):
        cut = truncate(model, **options)
        assert torch.equal(cut.model(batch()), model(batch()))
        assert all(kept.rows is None for kept in cut.new_parameters.values())
        assert cut.error == 0


def test_a_lone_layer_is_a_model_too():
    layer = canonical_weight_norm(nn.Linear(6, 5), 5)
    cut = truncate(layer, ranks=2)
    assert cut.layers[0].name == "" and cut.model.parametrizations.weight.original0.shape == (2,)
    assert "(model)" in cut.table


def test_a_ratio_is_not_rounded_below_what_it_says():
    layer = canonical_weight_norm(nn.Linear(100, 100), 100)
    assert truncate(layer, ratio=0.57).layers[0].new_rank == 57  # in floats 56.99...
    assert truncate(layer, ratio=0.579).layers[0].new_rank == 57


def test_frozen_factors_stay_frozen_and_the_mode_stays():
    model = build().train()
    _, originals = canonical_weight(model.first)
    originals[1].requires_grad_(False)
    cut = truncate(model, ratio=0.5).model
    _, new = canonical_weight(cut.first)
    assert [p.requires_grad for p in new] == [True, False, True, True]
    assert cut.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_what_it_is(dtype):
    model = build().to(dtype)
    cut = truncate(model, error=0.3)
    assert {p.dtype for p in cut.model.parameters()} == {dtype}
    assert cut.error <= 0.3
    assert relative_errors(model, cut.model) == pytest.approx([layer.error for layer in cut.layers], abs=0.02)


def test_published_counts_of_the_mnist_network():
    """25, 50 and 75 % of the terms cut, biases, sigmas and vectors of unit modes counted."""
    layers = {"conv1": (nn.Conv2d(1, 32, 3), 11), "conv2": (nn.Conv2d(32, 64, 3), 270)}
    layers |= {"fc1": (nn.Linear(9216, 128), 128), "fc2": (nn.Linear(128, 10), 10)}
    model = nn.ModuleDict({name: canonical_weight_norm(module, rank) for name, (module, rank) in layers.items()})
    biases = sum(module.bias.numel() for module in model.values())

    def published(one):
        return biases + sum(parametrization.published_parameters for _, parametrization, _ in canonical_weights(one))

    assert published(model) == 1_226_038
    assert [published(truncate(model, ratio=ratio).model) for ratio in (0.75, 0.5, 0.25)] == [919_457, 613_118, 306_537]


# ---------------------------------------------------------------------------------------------- how much is kept


@pytest.mark.parametrize("error", [0.05, 0.2, 0.5, 0.8])
def test_the_error_holds_and_another_term_less_would_exceed_it(error):
    model = build()
    cut = truncate(model, error=error)
    assert cut.error <= error * (1 + 1e-6)
    assert any(layer.new_rank < layer.old_rank for layer in cut.layers)
    for layer in cut.layers:
        if layer.new_rank > 1:
            ranks = {one.name: one.new_rank - (one is layer) for one in cut.layers}
            assert truncate(model, ranks=ranks).error > error * (1 - 1e-6)


def test_a_budget_over_the_model_needs_fewer_parameters_than_the_same_ratio_everywhere():
    model = build(spread=1.0)
    even = truncate(model, ratio=0.5)
    global_ = truncate(model, error=even.error)
    after = [sum(layer.parameters_after for layer in cut.layers) for cut in (global_, even)]
    assert after[0] < after[1]


def test_of_equal_errors_the_one_that_frees_more_parameters_is_chosen():
    model = nn.ModuleList([canonical_weight_norm(nn.Linear(width, 4), 4) for width in (4, 40)])
    with torch.no_grad():
        for _, _, originals in canonical_weights(model):
            originals[0].copy_(torch.tensor([4.0, 3.0, 2.0, 1.0]))
            for factor in originals[1:]:
                factor.copy_(torch.eye(*factor.shape))
    # The least term of a layer is 1 / 30 of its square: the budget is one and a half of them.
    cut = truncate(model, error=math.sqrt(1.5 / 30 / 2))
    assert [layer.new_rank for layer in cut.layers] == [4, 3]


def test_ranks_by_name_pattern_and_surrounding_module():
    model = build()
    assert [layer.new_rank for layer in truncate(model, ranks=5).layers] == [5, 5, 5, 4]
    chosen = truncate(model, ranks={"first": 2, "body": 7, "*": 3})
    assert [layer.new_rank for layer in chosen.layers] == [2, 7, 3, 3]


def test_the_table_has_a_row_for_each_layer_and_their_sum():
    cut = truncate(build(), ratio=0.5)
    lines = str(cut).splitlines()
    assert [line.split()[0] for line in lines[2:]] == [*NAMES, "together"]
    assert lines[3].split()[1:3] == ["40", "20"]
    assert lines[-1].split()[-1] == f"{sum(layer.parameters_after for layer in cut.layers):,}"


# ----------------------------------------------------------------------------------------- fine-tuning trains all of it

OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-3, amsgrad=True),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.9),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-3),
    "riemannian": lambda model: RiemannianSGD(manifold_groups(model), lr=0.05, momentum=0.9),
}


def train(model, optimizer, steps=1):
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch()), torch.tensor([0, 1, 2, 0, 1]))
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_of_the_truncated_model_is_trained_and_has_its_state(name):
    model = build("oblique" if name == "riemannian" else "euclidean")
    old = OPTIMIZERS[name](model)
    train(model, old, 3)
    cut = truncate(model, ratio=0.5)
    new = OPTIMIZERS[name](cut.model)
    cut.carry_state(old, new)
    in_groups = {id(p) for group in new.param_groups for p in group["params"]}
    old_parameters = dict(model.named_parameters())
    assert set(cut.new_parameters) == set(old_parameters)
    for key, (parameter, rows) in cut.new_parameters.items():
        assert id(parameter) in in_groups
        for entry, value in old.state[old_parameters[key]].items():
            carried = new.state[parameter][entry]
            is_whole = rows is None or value.ndim == 0 or entry == "col_var"  # Adafactor's, summed over the rows
            assert torch.equal(carried, value if is_whole else value[rows])
            assert carried.data_ptr() != value.data_ptr()
            assert is_whole or carried.shape[0] == parameter.shape[0]
    before = {key: p.detach().clone() for key, p in cut.model.named_parameters()}
    train(cut.model, new)
    unchanged = [key for key, p in cut.model.named_parameters() if torch.equal(p, before[key])]
    assert unchanged == []


def test_fine_tuning_goes_on_with_the_velocity_it_had():
    """With all terms kept the truncated model takes the very steps that the old one would have taken."""
    model = build()
    old = OPTIMIZERS["adam"](model)
    train(model, old, 3)
    cut = truncate(model, ratio=1.0)
    new = OPTIMIZERS["adam"](cut.model)
    cut.carry_state(old, new)
    train(model, old, 2)
    train(cut.model, new, 2)
    for one, other in zip(model.parameters(), cut.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_optimizer_of_the_old_model_does_not_pass_for_one_of_the_new():
    """The published code fine-tuned by an optimizer that had been made of the old parameters: only biases moved."""
    model = build()
    old = OPTIMIZERS["sgd"](model)
    train(model, old)
    cut = truncate(model, ratio=0.5)
    with pytest.raises(ValueError, match=r"new lacks first.parametrizations.* would not be trained"):
        cut.carry_state(old, old)
    biases_only = torch.optim.SGD([p for n, p in cut.model.named_parameters() if "original" not in n], lr=0.1)
    with pytest.raises(ValueError, match=r"new lacks first\.parametrizations\.weight\.original0"):
        cut.carry_state(old, biases_only)
    with pytest.raises(ValueError, match="new must be of old's class, SGD, got Adam"):
        cut.carry_state(old, OPTIMIZERS["adam"](cut.model))
    with pytest.raises(ValueError, match="old steps no parameter of the model"):
        cut.carry_state(OPTIMIZERS["sgd"](build()), OPTIMIZERS["sgd"](cut.model))


def test_parameters_that_the_old_optimizer_did_not_step_need_not_be_in_the_new():
    model = build()
    old = torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9)
    train(model, old)
    cut = truncate(model, ratio=0.5)
    new = torch.optim.SGD(cut.model.head.parameters(), lr=0.1, momentum=0.9)
    cut.carry_state(old, new)
    assert torch.equal(new.state[cut.model.head.bias]["momentum_buffer"], old.state[model.head.bias]["momentum_buffer"])


def test_state_that_has_no_rows_is_refused():
    model = build()
    old = torch.optim.LBFGS(model.parameters())
    old.step(lambda: model(batch()).sum())
    model(batch()).sum().backward()
    old.step(lambda: model(batch()).square().sum())
    cut = truncate(model, ratio=0.5)
    new = torch.optim.LBFGS(cut.model.parameters())
    with pytest.raises(ValueError, match="cannot be carried over"):
        cut.carry_state(old, new)
    assert not new.state


# ----------------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of error, ratio and ranks"),
        ({"error": 0.1, "ratio": 0.5}, "give one of error, ratio and ranks"),
        ({"error": -0.1}, r"error must be in \[0, 1\), got -0.1"),
        ({"error": 1.0}, r"error must be in \[0, 1\)"),
        ({"error": float("nan")}, r"error must be in \[0, 1\)"),
        ({"ratio": 0.0}, r"ratio must be in \(0, 1\]"),
        ({"ratio": 1.1}, r"ratio must be in \(0, 1\]"),
        ({"ratio": 0.2}, "would leave layer 'shared' without terms: it has 4"),
        ({"ranks": 0}, "ranks=0 would leave layer 'first' without terms"),
        ({"ranks": {"up": -1}}, "ranks=-1 would leave layer 'up' without terms"),
        ({"ranks": {"head": 2}}, "ranks: 'head' fits no canonical layer of the model, which has 'first', 'body.0'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        truncate(build(), **options)


def test_ranks_are_ints():
    with pytest.raises(TypeError, match=r"ranks must be ints, got 2.5 for 'up'"):
        truncate(build(), ranks={"up": 2.5})


def test_models_that_have_nothing_to_truncate_are_refused():
    with pytest.raises(ValueError, match="model has no canonical layer"):
        truncate(nn.Linear(3, 2), ratio=0.5)


def test_terms_that_are_not_finite_are_named():
    model = build()
    with torch.no_grad():
        canonical_weight(model.up)[1][1][2] = float("nan")
    with pytest.raises(ValueError, match=r"weight 'up\.weight' has terms that are NaN"):
        truncate(model, ratio=0.5)


def test_a_parametrization_on_top_of_the_terms_is_refused():
    model = build()
    parametrize.register_parametrization(model.up, "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"weight 'up\.weight' has another parametrization on top"):
        truncate(model, ratio=0.5)
