"""Layers of controlled spectrum keep it in training: frames stay orthonormal, the largest value stays at its cap.

A layer learns a teacher that it cannot become, since its singular values lie above the cap, or all below it, and its
rank is full: the gradient does not die away, and the constraint is at work in every step.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from retract.nets.parametrizations import manifold_groups, spectral_weights, sttp, svdp
from retract.optim import RiemannianSGD

CAP = 1.0
ALLOWED = 1e-5
SHORT, LONG = 200, 10_000

LAYERS = {
    "linear": (lambda: nn.Linear(36, 24, bias=False), (36,)),
    "conv": (lambda: nn.Conv2d(6, 16, 3, bias=False), (6, 5, 5)),
}
KINDS = {"svdp": svdp, "sttp": sttp}
# The form of the layer, and an optimizer for it.
METHODS = {
    "householder, SGD": ("householder", lambda layer: torch.optim.SGD(layer.parameters(), lr=0.3, momentum=0.9)),
    "householder, Adam": ("householder", lambda layer: torch.optim.Adam(layer.parameters(), lr=0.01)),
    "stiefel, RiemannianSGD": ("stiefel", lambda layer: RiemannianSGD(manifold_groups(layer), lr=0.3, momentum=0.9)),
}


class Lesson:
    """A student with a layer of controlled spectrum, its teacher, and an optimizer."""

    def __init__(self, layer, kind, method, *, teacher_norm=3 * CAP, autocast=False):
        torch.manual_seed(0)
        build, self.input_shape = LAYERS[layer]
        self.teacher, self.student = build(), build()
        with torch.no_grad():
            self.teacher.weight.mul_(teacher_norm / torch.linalg.matrix_norm(matrix(self.teacher), 2))
        form, make_optimizer = METHODS[method]
        KINDS[kind](self.student, rank=8, spectrum="lipschitz", form=form, init="spread")
        self.optimizer = make_optimizer(self.student)
        self.autocast = autocast
        self.generator = torch.Generator().manual_seed(1)

    def step(self):
        inputs = torch.randn(16, *self.input_shape, generator=self.generator)
        with torch.no_grad():
            target = self.teacher(inputs)
        self.optimizer.zero_grad()
        with self.precision():
            output = self.student(inputs)
        loss = F.mse_loss(output.float(), target)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def precision(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=self.autocast)

    @torch.no_grad()
    def frame_error(self):
        """Largest entry of |U^T U - I| and |V^T V - I|, of the frames as the forward pass makes them."""
        ((_, parametrization, originals),) = spectral_weights(self.student)
        with self.precision():
            u, _, v = parametrization.factors(*originals)
        return max((f.double().mT @ f.double() - torch.eye(f.shape[1])).abs().max().item() for f in (u, v))

    @torch.no_grad()
    def core_error(self):
        """The same of the cores that the Stiefel form keeps."""
        cores = [p.double() for p in self.student.parameters() if p.ndim == 2]
        return max((c.mT @ c - torch.eye(c.shape[1])).abs().max().item() for c in cores)

    @torch.no_grad()
    def singular_values(self):
        with self.precision():
            weight = matrix(self.student)
        return torch.linalg.svdvals(weight.double())


def matrix(layer):
    return layer.weight.detach().flatten(1)


def train(lesson, steps, look_every):
    """Train, and look at the spectrum every so often. Returns the losses."""
    losses = []
    for step in range(1, steps + 1):
        losses.append(lesson.step())
        if step % look_every == 0:
            assert abs(lesson.singular_values()[0].item() - CAP) <= ALLOWED, step
            assert lesson.frame_error() <= ALLOWED, step
    if lesson.student.parametrizations.weight[0].form == "stiefel":
        assert lesson.core_error() <= ALLOWED
    return losses


every_layer = pytest.mark.parametrize("layer", list(LAYERS))
every_kind = pytest.mark.parametrize("kind", list(KINDS))
every_method = pytest.mark.parametrize("method", list(METHODS))


@every_method
@every_kind
@every_layer
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16 autocast"])
def test_short(layer, kind, method, autocast):
    lesson = Lesson(layer, kind, method, autocast=autocast)
    before = matrix(lesson.student)
    losses = train(lesson, SHORT, look_every=20)
    assert sum(losses[-20:]) < 0.95 * sum(losses[:20])
    assert (matrix(lesson.student) - before).norm() > 0.5
    assert lesson.student.weight.dtype == torch.float32


@every_method
@every_kind
def test_the_largest_value_does_not_fall_below_its_cap(kind, method):
    lesson = Lesson("linear", kind, method, teacher_norm=0.3 * CAP)
    train(lesson, SHORT, look_every=20)
    assert lesson.singular_values()[1] < 0.5 * CAP  # the others follow the teacher


@pytest.mark.slow
@every_method
@every_kind
@pytest.mark.parametrize(("layer", "autocast"), [("linear", False), ("conv", True)], ids=["float32", "bf16 autocast"])
def test_ten_thousand_steps(layer, kind, method, autocast):
    lesson = Lesson(layer, kind, method, autocast=autocast)
    losses = train(lesson, LONG, look_every=100)
    assert sum(losses[-100:]) < sum(losses[:100])
