"""`retract bench spectra`: that it times what it says, and says it; not how fast anything is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from typer.testing import CliRunner

from retract.benchmarks import spectra_methods as methods
from retract.benchmarks import spectra_speed as speed
from retract.benchmarks.cli import app
from retract.benchmarks.timing import Timing

TINY = replace(speed.QUICK, channels=(8,), ranks=(2, 4))


@pytest.mark.parametrize("name", methods.WEIGHTS)
def test_every_weight_has_the_shape_and_rank_and_a_gradient_for_each_parameter(name: str) -> None:
    torch.manual_seed(0)
    function, parameters = methods.WEIGHTS[name].make(8, 3)
    weight = function()
    assert weight.reshape(8, -1).shape == (8, 72)
    values = torch.linalg.svdvals(weight.detach().reshape(8, 72))
    assert values[2] > 1e-3
    assert ("full rank" in name) == bool(values[3] > 1e-5)
    if name.startswith(("SVDP", "STTP")):
        assert float(values[0]) == pytest.approx(1, abs=1e-5), "the spectrum's cap"
    gradients = torch.autograd.grad(weight, parameters, torch.randn_like(weight))
    assert all(bool((gradient != 0).any()) for gradient in gradients)


def test_weights_are_left_out_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    monkeypatch.setitem(
        methods.WEIGHTS,
        methods.BASELINE,
        methods.WEIGHTS[methods.BASELINE]._replace(affordable=lambda c, r: c * r < 16),
    )
    steps, missing = methods.weight_steps(8, 2)
    assert missing == {"geotorch fixed_rank, Cayley": "geotorch is not installed", methods.BASELINE: "left out"}
    assert {*steps, *missing} == {*methods.WEIGHTS}


def test_timed_layers_never_build_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = methods.convolutions(8, 2, batch=2, size=6)
    assert len(steps) == 3
    built = []
    monkeypatch.setattr(methods.svdp.__globals__["SVDP"], "forward", lambda *_: built.append("svdp"))
    monkeypatch.setattr(methods.svdp.__globals__["STTP"], "forward", lambda *_: built.append("sttp"))
    for step in steps.values():
        step()
    assert built == []


@pytest.mark.parametrize("name", methods.TRAININGS)
def test_a_training_step_moves_every_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[nn.Module] = []
    original = methods._discriminator
    monkeypatch.setattr(methods, "_discriminator", lambda width: models.append(original(width)) or models[0])
    training = methods.TRAININGS[name](8, 4, 4)
    layers = [layer.eval() for layer in models[0].modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(layers) == 11
    assert all(parametrize.is_parametrized(layer, "weight") for layer in layers)
    before = [layer.weight.detach().clone() for layer in layers]
    training.passes()
    training.step()
    assert all(bool((layer.weight != old).any()) for layer, old in zip(layers, before, strict=True))


def test_ratios_are_to_the_baseline_of_their_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(steps, seconds, *, rounds=10):  # of n steps the k-th takes 2 k seconds, or 6 k for three rounds
        unit = 6.0 if rounds == 3 else 2.0
        return {name: Timing(unit * k, unit * k - 1, unit * k + 1, rounds) for k, name in enumerate(steps, 1)}

    monkeypatch.setattr(speed, "interleave", times)
    monkeypatch.setattr(speed, "_once", lambda step: 0.0)
    monkeypatch.setitem(methods.WEIGHTS, "geotorch fixed_rank, Cayley", methods.Weight(int, lambda *sizes: False))
    rows = speed.measure(TINY, 0.0)
    weights = [row for row in rows if row.table == "weights" and row.rank == 2]
    assert [row.ratio for row in weights if not row.note] == list(range(1, len(methods.WEIGHTS) + 1))
    convolutions = [row for row in rows if row.table == "convolutions" and row.rank == 4]
    assert convolutions[0].method == "dense"
    assert [row.ratio for row in convolutions] == [1, 1 / 2, 1 / 3]
    trainings = [(row.part, row.milliseconds, row.ratio) for row in rows if row.table == "training"][2:4]
    assert trainings == [("passes", 12000, 0.75), ("step", 4000, 0.25)]
    first, _, last = speed.tables(rows, TINY)
    assert first.rows[0][1] == "2000.00 (1000.00–3000.00) 1.00×"
    assert first.rows[-2][1:] == ["left out", "left out"]
    assert last.rows[1][1:] == ["12000.00 (11000.00–13000.00)", "4000.00 (3000.00–5000.00)", "25.0 %"]


def test_slow_methods_take_turns_with_the_baseline_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = []

    def times(steps, seconds, *, rounds=10):
        groups.append((list(steps), rounds))
        return {name: Timing(1.0, 1.0, 1.0, rounds) for name in steps}

    monkeypatch.setattr(speed, "interleave", times)
    monkeypatch.setattr(speed, "weight_steps", lambda channels, rank: ({methods.BASELINE: int, "a": int, "b": str}, {}))
    monkeypatch.setattr(speed, "_once", lambda step: 1.0 if step is str else 0.0)
    rows = speed._weights(8, 4, TINY, 1.0)
    assert groups == [([methods.BASELINE, "a"], 10), ([methods.BASELINE, "b"], 3)]
    assert sorted(row.method for row in rows) == ["a", "b", methods.BASELINE]


def test_command_prints_tables_and_writes_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "QUICK", TINY)
    few = ("STTP, Stiefel, lipschitz: RiemannianSGD", "dense, torch spectral_norm: Adam")
    monkeypatch.setattr(speed, "TRAININGS", {name: methods.TRAININGS[name] for name in few})
    out = tmp_path / "spectra.json"
    result = CliRunner().invoke(app, ["bench", "spectra", "--quick", "--seconds", "0.1", "--out", str(out)])
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    assert "Weight 8 x 72" in output and "SNGAN-32" in output
    written = json.loads(out.read_text())
    assert {row["table"] for row in written["rows"]} == {"weights", "convolutions", "training"}
    assert {row["method"] for row in written["rows"] if row["table"] == "weights"} == {
        *methods.WEIGHTS,
        speed.DENSE_PASS,
    }
    assert {row["method"] for row in written["rows"] if row["table"] == "training"} == {*few}
    assert all(row["note"] or row["low"] <= row["milliseconds"] <= row["high"] for row in written["rows"])


@pytest.mark.parametrize(("option", "sizes"), [([], speed.FULL), (["--quick"], speed.QUICK)], ids=["full", "quick"])
def test_quick_is_a_choice(option: list[str], sizes: speed.Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(speed, "measure", lambda sizes, seconds: asked.append((sizes, seconds)) or [])
    assert CliRunner().invoke(app, ["bench", "spectra", "--seconds", "3", *option]).exit_code == 0
    assert asked == [(sizes, 3.0)]
