"""The conditions of the measurement: exact arithmetic, nothing touched, clear errors."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from retract.nets import find_scale_invariant
from tests.nets.arrangements import Net, head, images, kinds, materialised


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# -------------------------------------------------------------------------------- arithmetic


class HandWrittenNorm(nn.Module):
    """Standardises over the batch with an epsilon of its own."""

    def __init__(self):
        super().__init__()
        self.eps = 1e-3

    def forward(self, x):
        return (x - x.mean(0)) * torch.rsqrt(x.var(0) + self.eps)


def test_epsilons_of_custom_and_functional_norms_are_reached():
    x = torch.randn(7, 4)
    assert kinds(materialised(head(nn.Linear(4, 6), HandWrittenNorm()), x), x)["0.weight"] == "filter"
    functional = Net(
        lambda m, x: m["out"](F.batch_norm(m["lin"](x), None, None, training=True, eps=0.1)),
        lin=nn.Linear(4, 6),
        out=nn.Linear(6, 3),
    )
    assert kinds(functional, x)["layers.lin.weight"] == "filter"


def test_half_precision_casts_inside_a_network_do_not_hide_invariance():
    """As in language models that normalise in float32 whatever the model's type."""
    norm = nn.RMSNorm(6)
    model = Net(
        lambda m, x: m["out"](m["norm"](m["lin"](x).float()).to(torch.bfloat16)),
        norm=norm,
        lin=nn.Linear(4, 6, bias=False),
        out=nn.Linear(6, 3),
    ).bfloat16()
    assert kinds(model, torch.randn(7, 4).bfloat16())["layers.lin.weight"] == "whole"


def test_plain_tensors_and_new_tensors_inside_a_network_become_float64():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.bn = nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)
            self.matrix = torch.randn(6, 3)

        def forward(self, x):
            return (self.bn(self.lin(x)) @ self.matrix) @ torch.eye(3, dtype=torch.float32)

    assert kinds(Mixed(), torch.randn(7, 4))["lin.weight"] == "filter"


# ------------------------------------------------------------------------------------------------ untouched


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def test_model_and_random_state_are_left_as_they_were():
    x = images()
    model = materialised(head(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.BatchNorm2d(4)), x)
    model[1].eval()
    model(x).sum().backward()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    random.seed(123)
    np.random.seed(123)  # noqa: NPY002
    state = copy.deepcopy(model.state_dict())
    grads = [p.grad.clone() for p in model.parameters()]
    flags = [m.training for m in model.modules()]
    epsilons = model[2].eps
    pointers = [p.data_ptr() for p in model.parameters()]
    before = random_states()
    find_scale_invariant(model, x)
    assert random_states() == before
    assert torch.get_default_dtype() == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))
    assert flags == [m.training for m in model.modules()]
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert (model[2].eps, len(model[0]._forward_hooks)) == (epsilons, 1)
    assert x.dtype == torch.float32


def test_an_error_inside_the_network_leaves_the_random_states_too():
    model, x = nn.Linear(3, 3), torch.randn(2, 4)
    before = random_states()
    with pytest.raises(ValueError, match="forward pass failed"):
        find_scale_invariant(model, x)
    assert random_states() == before
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_callers_contexts_do_not_matter(context):
    model = materialised(head(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), images())
    with context():
        assert kinds(model, images())["0.weight"] == "filter"


def test_compiled_models_run_uncompiled():
    model = torch.compile(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), backend="eager")
    x = torch.randn(7, 4)
    model(x)
    assert kinds(model, x)["_orig_mod.0.weight"] == "filter"


def test_random_draws_inside_the_network_repeat():
    def forward(m, x):
        noise = 1 + random.random() + np.random.rand()  # noqa: NPY002
        return m["out"](F.dropout(torch.tanh(noise * m["bn"](m["conv"](x))), 0.3).flatten(1))

    model = Net(
        forward,
        conv=nn.Conv2d(3, 4, 3, bias=False),
        bn=nn.BatchNorm2d(4),
        out=nn.Linear(64, 3),
    )
    assert kinds(model, images())["layers.conv.weight"] == "filter"


def test_outputs_in_containers_checkpointed_layers_and_several_inputs():
    model = Net(
        lambda m, x, more: {
            "a": (m["bn"](checkpoint(m["conv"], x, use_reentrant=False)), 3),
            "b": [more["y"]],
        },
        conv=nn.Conv2d(3, 4, 3, bias=False),
        bn=nn.BatchNorm2d(4),
    )
    assert kinds(model, images(), {"y": torch.randn(2)})["layers.conv.weight"] == "filter"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_and_its_random_state():
    x = images().cuda()
    model = materialised(head(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).cuda(), x)
    before = torch.cuda.get_rng_state()
    assert kinds(model, x)["0.weight"] == "filter"
    assert torch.equal(before, torch.cuda.get_rng_state())


# ------------------------------------------------------------------------------------------------ bad input


def test_errors_name_what_is_wrong():
    x = images()
    model = materialised(head(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), x)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        find_scale_invariant(3, x)
    with pytest.raises(ValueError, match="example_input is constant"):
        find_scale_invariant(model, torch.zeros(2, 3, 6, 6))
    with pytest.raises(ValueError, match="forward pass failed on example_input"):
        find_scale_invariant(model, torch.randn(2, 5, 6, 6))
    with pytest.raises(ValueError, match="not initialised"):
        find_scale_invariant(nn.LazyLinear(3), torch.randn(2, 3))
    with pytest.raises(ValueError, match="meta device"):
        find_scale_invariant(nn.Linear(3, 3, device="meta"), torch.randn(2, 3))
    with pytest.raises(ValueError, match="no floating-point tensor"):
        find_scale_invariant(Net(lambda m, x: "text"), x)
    with pytest.raises(ValueError, match="no output depends on a parameter"):
        find_scale_invariant(Net(lambda m, x: x, lin=nn.Linear(2, 2)), x)
    with pytest.raises(ValueError, match="not finite"):
        find_scale_invariant(model, x / 0)


def test_an_operation_without_float64_is_a_clear_error():
    def forward(m, x):
        y = m["lin"](x)
        if y.dtype == torch.float64:
            raise RuntimeError("expected scalar type Float but found Double")
        return y

    with pytest.raises(ValueError, match=r"float64.*expected scalar type Float"):
        find_scale_invariant(Net(forward, lin=nn.Linear(3, 3)), torch.randn(2, 3))
