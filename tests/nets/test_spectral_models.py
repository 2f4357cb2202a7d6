import pytest
import torch
from torch import nn

from retract.nets.parametrizations import _charts, manifold_groups, shared_frames, spectral_weights, sttp, svdp
from retract.optim import RiemannianSGD

WRAPS = (svdp, sttp)
FORMS = ("householder", "stiefel")
SPECTRA = ("identity", "free", "lipschitz", "bounded")
wraps = pytest.mark.parametrize("wrap", WRAPS)


def network(wrap=svdp, spectrum="lipschitz", **options):
    torch.manual_seed(0)
    return nn.Sequential(
        wrap(nn.Conv2d(2, 6, 3, padding=1), 4, spectrum, **options),
        nn.ReLU(),
        nn.BatchNorm2d(6),
        wrap(nn.Conv2d(6, 6, 3, stride=2), 4, spectrum, **options),
        nn.Flatten(),
        wrap(nn.Linear(24, 5), 3, spectrum, **options),
    )


@wraps
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_riemannian_sgd_trains_the_stiefel_form(wrap, spectrum):
    torch.manual_seed(1)
    teacher = wrap(nn.Linear(12, 8, dtype=torch.float64), 3, spectrum)
    student = nn.Sequential(wrap(nn.Linear(12, 8, dtype=torch.float64), 3, spectrum, form="stiefel"))
    groups = manifold_groups(student, euclidean_lr=0.01)
    ((_, parametrization, originals),) = spectral_weights(student)
    assert [name for name, _ in groups[0]["params"]] == [
        f"0.parametrizations.weight.original{i}" for i in range(len(originals))
    ]
    assert all(a is b for (_, a), b in zip(groups[0]["params"], originals, strict=True))
    assert groups[0]["manifold"] is parametrization.manifold
    assert groups[1] == {"params": [("0.bias", student[0].bias)], "lr": 0.01}
    optimizer = RiemannianSGD(groups, lr=0.1, momentum=0.8)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (student[0].weight - teacher.weight.detach()).square().sum()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    assert parametrization.manifold.check_point_on_manifold(tuple(originals), atol=1e-12)


def test_groups_of_a_model():
    model = nn.Sequential(network(svdp, form="stiefel"), network(sttp), nn.Linear(5, 5), network(sttp, form="stiefel"))
    groups = manifold_groups(model)
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    kinds = [type(group.get("manifold")).__name__ for group in groups]
    assert kinds == ["SVDSpectral"] * 3 + ["STTP"] * 3 + ["NoneType"]
    RiemannianSGD(groups, lr=0.1)
    assert manifold_groups(nn.Linear(2, 2), euclidean_lr=0.5)[0]["lr"] == 0.5
    names = [name for name, *_ in spectral_weights(model)]
    assert names[:3] == ["0.0.weight", "0.3.weight", "0.5.weight"]
    assert [name for name, *_ in spectral_weights(model[0][0])] == ["weight"]


@pytest.mark.parametrize("options", [{"wrap": w, "form": f} for w in WRAPS for f in FORMS])
def test_shared_frames_change_nothing_but_the_number_of_calls(options, monkeypatch):
    model = network(**options).double()
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    calls = []
    householder_frame = _charts.householder_frame
    monkeypatch.setattr(_charts, "householder_frame", lambda *a, **k: calls.append(a) or householder_frame(*a, **k))
    model.zero_grad()
    with shared_frames(model):
        shared = len(calls)
        loss = model(x).square().sum() + 0 * model(x).sum()
        assert len(calls) == shared
    loss.backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, atol=1e-10, rtol=1e-10)
    calls.clear()
    model(x)
    assert len(calls) > shared if options["form"] == "householder" else not calls
    with pytest.raises(RuntimeError, match="stop"), shared_frames(model):
        raise RuntimeError("stop")
    assert all(p.shared is None for _, p, _ in spectral_weights(model))
