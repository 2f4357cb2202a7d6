"""The ranks of a model's layers of kind "lowrank": by hand, by the energy that they keep, or by a budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ._layers import naming
from ._low_rank_conversion import filter_scales, scaled
from ._low_rank_cost import multiplications_of, parameters, unfolding_of
from ._observation import Observation, observe
from ._rank_budget import Spectrum, energy_shares, rank_for_energy, ranks_within_budget
from ._sizes import StaysDense, allowed_by, check_energy
from ._unfolding import UnfoldingKind

__all__ = ["plan_low_rank"]

_SIZES = ("rank", "energy", "budget")
#: What a budget counts, and what one of it is called.
_UNITS = {"parameters": "element", "multiplications": "multiplication"}


def plan_low_rank(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    own: Mapping[str, Mapping[str, Any]],
    *,
    budget: Any = None,
    cost: str | None = None,
    example_input: Any = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Decide the rank of every layer.

    Args:
        model: that the layers are of.
        layers: to be converted, by name.
        own: options of each: one of ``rank``, ``energy`` and ``budget``, and others.
        budget: as the user has given it; a number is one budget for all layers.
        cost: what a budget counts.
        example_input: of the model.

    Returns:
        Options of each layer for `to_low_rank`, and why others stay dense.
    """
    _check_cost(cost, budget, example_input)
    seen = {} if example_input is None else observe(model, layers, example_input)
    plans: dict[str, _Plan] = {}
    for name, module in layers.items():
        with naming(name):
            plans[name] = _Plan(module, own[name].get("unfolding", "output"), seen.get(name), cost or "parameters")
    one_for_all = budget is not None and not isinstance(budget, Mapping) and not callable(budget)
    shared = _shared_ranks(plans, budget) if one_for_all else {}
    options: dict[str, dict[str, Any]] = {}
    notes: dict[str, str] = {}
    for name, plan in plans.items():
        rest = {option: value for option, value in own[name].items() if option not in _SIZES}
        (size,) = own[name].keys() & set(_SIZES)
        try:
            with naming(name):
                rank = plan.checked(shared[name]) if one_for_all else plan.rank(size, own[name][size])
            options[name] = {**rest, "rank": rank, "following": plan.following}
        except StaysDense as reason:
            notes[name] = f"lowrank with {size}={own[name][size]}: {reason}"
    return options, notes


class _Plan:
    """A layer to be converted: its matrix and its costs."""

    def __init__(
        self, module: nn.Module, unfolding: UnfoldingKind, observation: Observation | None, counted: str
    ) -> None:
        self.weight: Tensor = module.get_parameter("weight")
        self.unfolding = unfolding_of(module, unfolding)
        self.following = None if observation is None else observation.following
        self.unit, self.cost = _UNITS[counted], parameters(self.unfolding)
        if counted == "multiplications":
            assert observation is not None
            self.cost = multiplications_of(self.unfolding, observation.calls)

    def shares(self) -> Tensor:
        """Of the energy of the weight, as a batch normalization after it scales its filters if one is known."""
        return energy_shares(self.unfolding.matrix(scaled(self.weight, filter_scales(self.weight, self.following))))

    def rank(self, size: str, value: Any) -> int:
        """The rank that an option of the layer's own asks for.

        Raises:
            StaysDense: it costs as much as the dense layer, and was not asked for by hand.
        """
        most = min(self.unfolding.matrix_shape)
        if size == "rank":
            rank = min(value, most) if isinstance(value, int) and not isinstance(value, bool) else value
            self.unfolding.check_rank(rank)
            return int(rank)
        if size == "energy":
            check_energy(value)
            rank = rank_for_energy(self.shares(), value)
            if rank <= self.cost.most:
                return rank
            costs = f"{rank * self.cost.per_rank:,} {self.unit}s, dense it has {self.cost.dense:,}"
            raise StaysDense(f"at rank {rank} it would have {costs}")
        allowed = allowed_by(value, self.cost.dense, self.unit)
        return self.checked(min(allowed // self.cost.per_rank, self.cost.most, most), allowed)

    def checked(self, rank: int | None, allowed: int | None = None) -> int:
        """A rank that a budget has led to, unless that is none."""
        term = f"a single term has {self.cost.per_rank:,} {self.unit}s"
        if self.cost.most < 1:
            raise StaysDense(f"{term}, dense it has {self.cost.dense:,}")
        if rank is None:
            raise StaysDense("the threshold that meets the budget is at a rank that would save nothing")
        if rank < 1:
            raise StaysDense(f"{term}, its budget is {allowed:,}")
        return rank


def _shared_ranks(plans: Mapping[str, _Plan], budget: float) -> dict[str, int | None]:
    """Those within one budget."""
    if not plans:
        return {}
    spectra: dict[str, Spectrum] = {}
    for name, plan in plans.items():
        with naming(name):
            spectra[name] = Spectrum(plan.shares().tolist(), plan.cost)
    unit = next(iter(plans.values())).unit
    allowed = allowed_by(budget, sum(plan.cost.dense for plan in plans.values()), unit)
    return ranks_within_budget(spectra, allowed, unit)


def _check_cost(cost: str | None, budget: Any, example_input: Any) -> None:
    if cost is None:
        return
    if cost not in _UNITS:
        raise ValueError(f"cost must be one of {', '.join(map(repr, _UNITS))}, got {cost!r}")
    if budget is None:
        raise ValueError(f"cost={cost!r} is what a budget counts, and there is no budget")
    if cost == "multiplications" and example_input is None:
        raise ValueError("cost='multiplications' needs an example_input, of which layers have their sizes")
