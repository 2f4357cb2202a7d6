"""canonical=True: one norm for every scale group, and the eval outputs of before."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retract.nets import CANONICAL_NORM, cnn, register_scale_invariant, scale_invariant_groups


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Wired(nn.Module):
    """Concatenation, pooling, ReLU before BatchNorm, dead biases, groups, transposed, several consumers."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(3, 2, 3, padding=1, bias=False)
        self.bn_ab = nn.BatchNorm2d(6, eps=1e-3)
        self.bn_b = nn.BatchNorm2d(2)
        self.up = nn.ConvTranspose2d(6, 6, 2, stride=2, groups=2, bias=False)
        self.bn_up = nn.BatchNorm2d(6)
        self.instance = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
        self.mix = nn.Conv2d(6, 6, 1, groups=3, bias=False)
        self.group = nn.GroupNorm(3, 6, eps=1e-30)
        self.fc = nn.Linear(8, 5, bias=False)
        self.bn_fc = nn.BatchNorm1d(5)
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        ab = F.relu(self.bn_ab(torch.cat([a, b], 1)))
        side = F.max_pool2d(self.bn_b(F.relu(b)), 2).mean((2, 3))
        up = self.up(ab)
        y = F.relu(self.bn_up(F.max_pool2d(up, 2))) + self.instance(F.avg_pool2d(up, 2))
        y = self.group(self.mix(y)).mean((2, 3))
        return self.out(self.bn_fc(self.fc(torch.cat([y, side], 1))))


def trained_a_little(model: nn.Module, shape) -> nn.Module:
    """Running statistics that are nobody's batch statistics, and filters of all sizes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                scales = 10 ** (2 * torch.rand(parameter.shape[0], *[1] * (parameter.ndim - 1)) - 1)
                parameter.mul_(scales.to(parameter))
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
        model.train()
        for _ in range(3):
            model(torch.randn(8, *shape, dtype=next(model.parameters()).dtype))
    return model


CASES = {
    "wired": (Wired, (3, 6, 6)),
    "digitsnet": (cnn.digitsnet, (1, 8, 8)),
    "lenet5_bn": (cnn.lenet5_bn, (1, 28, 28)),
    "resnet20": (cnn.resnet20, (3, 16, 16)),
    "wrn10_2": (lambda: cnn.WideResNet(10, 2), (3, 16, 16)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("norm", [CANONICAL_NORM, 3])
def test_eval_outputs_stay_and_norms_are_one(case, norm):
    build, shape = CASES[case]
    model = trained_a_little(build().double(), shape)
    x = torch.randn(16, *shape, dtype=torch.float64)
    before = model.eval()(x)
    statistics = copy.deepcopy([b for b in model.buffers() if b.is_floating_point()])
    model.train()
    groups = scale_invariant_groups(model, torch.randn(4, *shape), canonical=True, norm=norm)
    for group in groups[:-1]:
        for _, weight in group["params"]:
            torch.testing.assert_close(
                group["manifold"].norms(weight), torch.full_like(group["manifold"].norms(weight), norm)
            )
    after = model.eval()(x)
    assert (after - before).abs().max() < 1e-11 * before.abs().max()
    moved = [b for b in model.buffers() if b.is_floating_point()]
    assert any(not torch.allclose(a, b) for a, b in zip(statistics, moved, strict=True))


def test_wired_network_has_every_kind():
    groups = scale_invariant_groups(Wired(), torch.randn(4, 3, 6, 6))
    found = {str(g["manifold"]): [n for n, _ in g["params"]] for g in groups[:-1]}
    assert found == {
        "PSI(dim=0)": ["a.weight", "b.weight", "fc.weight"],
        "PSI(dim=1, conv_groups=2)": ["up.weight"],
        "PSI(dim=0, groups=3)": ["mix.weight"],
    }


def test_train_outputs_stay_up_to_epsilon():
    model = trained_a_little(cnn.digitsnet().double(), (1, 8, 8))
    x = torch.randn(8, 1, 8, 8, dtype=torch.float64)
    before = model(x)
    register_scale_invariant(model, x, canonical=True)
    change = (model(x) - before).abs().max() / before.abs().max()
    assert 1e-12 < change < 1e-2


def test_rescaled_twins_meet_in_one_representative():
    model = cnn.digitsnet().double()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for group in twin.manifold_groups()[:-1]:
            for _, weight in group["params"]:
                weight.copy_(group["manifold"].act(weight, 10 ** (3 * torch.rand(weight.shape[0]) - 1.5)))
    x = torch.randn(4, 1, 8, 8)
    for net in (model, twin):
        register_scale_invariant(net, x, canonical=True)
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_running_stats()  # placeholders of a network that never ran
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_float32_and_bfloat16_models_keep_their_outputs_to_their_precision():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.2)):
        model = trained_a_little(cnn.digitsnet(), (1, 8, 8)).to(dtype)
        x = torch.randn(16, 1, 8, 8).to(dtype)
        before = model.eval()(x)
        register_scale_invariant(model.train(), x[:4], canonical=True)
        assert model.block1[0].weight.dtype == dtype
        assert (model.eval()(x) - before).abs().max() < tolerance * before.abs().max()


def test_a_pretrained_network_is_left_alone_by_default():
    model = trained_a_little(cnn.digitsnet(), (1, 8, 8))
    state = copy.deepcopy(model.state_dict())
    register_scale_invariant(model, torch.randn(4, 1, 8, 8))
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))


def test_a_filter_that_is_dead_on_the_example_but_not_on_other_inputs():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)
    ).double()
    with torch.no_grad():
        model[0].weight[2].abs_().neg_()
    x = torch.randn(16, 2, 6, 6, dtype=torch.float64)
    model(x)
    before = model.eval()(x)
    register_scale_invariant(model, x[:4].abs(), canonical=True)
    assert (model(x) - before).abs().max() < 1e-11 * before.abs().max()


def test_a_channel_that_shows_nothing_is_an_error():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, groups=2, bias=False), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 3))
    x = torch.randn(4, 2, 6, 6)
    x[:, 1] = 0
    with pytest.raises(ValueError, match=r"example_input leaves channels \[1\] of 1 constant"):
        register_scale_invariant(model, x, canonical=True)


class OwnStatistics(nn.Module):
    """A BatchNorm that torch does not know."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x):
        mean, variance = (x.mean(0), x.var(0)) if self.training else (self.mean, self.variance)
        return (x - mean) / (variance + 1e-30).sqrt()


def test_unknown_running_statistics_are_refused_and_nothing_moves():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), OwnStatistics(), nn.Tanh(), nn.Linear(4, 2))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="would change the eval outputs"):
        register_scale_invariant(model, torch.randn(7, 3), canonical=True)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert type(model[0].weight) is nn.Parameter


@pytest.mark.parametrize("norm", [0, -1.0, float("nan"), float("inf"), "16", True])
def test_bad_norm(norm):
    with pytest.raises(ValueError, match="norm must be a positive finite number"):
        register_scale_invariant(cnn.digitsnet(), torch.randn(4, 1, 8, 8), canonical=True, norm=norm)
