"""What is wrong with a tensor train that should be a point of `STTP`, or a tangent vector there."""

from __future__ import annotations

from typing import Any

import torch

from .spectral import SVDSpectral
from .tensor_chain import Train
from .triplets import frame_error

__all__ = ["why_no_point", "why_not_tangent"]


def why_no_point(center: SVDSpectral, x: Train, *, atol: float, rtol: float) -> str | None:
    """The first part that is off its manifold, and how far; None if none is."""
    for name, cores in zip("UV", x.sides, strict=True):
        for k, core in enumerate(cores[:-1], start=1):
            error = frame_error(core)
            if not error <= atol:
                return f"core {name}_{k}: UᵀU - I reaches {error:.3g}, allowed {atol:.3g}"
    return _of_center(x, center.check_point_on_manifold(x.center, explain=True, atol=atol, rtol=rtol))


def why_not_tangent(center: SVDSpectral, x: Train, u: Train, *, atol: float, rtol: float) -> str | None:
    """The first part that is not in normal form, and how far; None if all are."""
    for name, cores, velocities in zip("UV", x.sides, u.sides, strict=True):
        for k, (core, velocity) in enumerate(zip(cores[:-1], velocities[:-1], strict=True), start=1):
            turn = float((core.mT @ velocity).detach().abs().amax())
            allowed = atol + rtol * float(torch.linalg.vector_norm(velocity.detach()))
            if not turn <= allowed:
                return f"core {name}_{k}: UᵀdU reaches {turn:.3g}, allowed {allowed:.3g}"
    return _of_center(x, center.check_vector_on_tangent(x.center, u.center, explain=True, atol=atol, rtol=rtol))


def _of_center(x: Train, verdict: Any) -> str | None:
    ok, reason = verdict
    return None if ok else f"(U_{len(x.left)}, s, V_{len(x.right)}): {reason}"
