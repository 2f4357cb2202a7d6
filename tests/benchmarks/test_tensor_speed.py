"""`retract bench tensor`: that it times what it says, and says it; not how fast anything is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import typer
from typer.testing import CliRunner

from retract.benchmarks import tensor_methods as timed
from retract.benchmarks import tensor_speed as speed
from retract.benchmarks.timing import Timing
from retract.nets.layers.tensor import TensorConv2d

TINY = replace(speed.QUICK, formats=("cp", "tucker2", "tensor_train"))


def command() -> typer.Typer:
    app = typer.Typer()
    app.command()(speed.tensor_command)
    return app


def test_every_method_is_a_convolution_with_a_gradient_for_each_parameter() -> None:
    torch.manual_seed(0)
    found = list(timed.methods(TINY))
    assert {method.group for method in found} == {"dense", "tensor network", "tensorly-torch", "canonical"}
    assert len({(method.group, method.name, method.channels_last) for method in found}) == len(found)
    for method in found:
        gradients = timed.training_pass(method, TINY)()
        assert len(gradients) == 1 + len(list(method.layer.parameters()))
        assert all(bool((gradient != 0).any() and gradient.isfinite().all()) for gradient in gradients), method.name
        assert gradients[0].is_contiguous() != method.channels_last, "autograd takes the layout of the input"


def test_tensor_networks_keep_the_budget_and_run_as_they_are_named() -> None:
    for method in timed.methods(replace(TINY, channels=16, budget=0.3)):
        if method.group == "tensor network":
            assert isinstance(method.layer, TensorConv2d)
            assert method.layer.factored == method.name.endswith("factored")
            assert 0.2 < method.parameters / (9 * 16**2) <= 0.3
        if method.group == "tensorly-torch":
            assert 0.15 < method.parameters / (9 * 16**2) < 0.45


def test_naive_canonical_convolution_is_its_sum_of_terms() -> None:
    torch.manual_seed(0)
    layer = timed.NaiveCanonical(4, 3).double()
    units = [rows / rows.norm(dim=1, keepdim=True) for rows in layer.factors]
    weight = torch.einsum("r,ro,ri,rh,rw->oihw", layer.scale, *units)
    input = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(input), F.conv2d(input, weight, layer.bias, padding=1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("channels", "rank"), [(128, 561), (8, 26)])
def test_full_rank_has_the_parameters_of_the_dense_layer(channels: int, rank: int) -> None:
    assert timed.break_even_rank(channels) == rank
    assert rank * (2 * channels + 7) >= 9 * channels**2 > (rank - 1) * (2 * channels + 7)


def test_without_tensorly_torch_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed, "find_spec", lambda name: None)
    groups = {method.group for method in timed.methods(TINY)}
    assert groups == {"dense", "tensor network", "canonical"}


def test_ratios_are_to_the_dense_layer_with_a_contiguous_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(steps, seconds, *, rounds):  # the k-th takes 2 k seconds
        return {name: Timing(2.0 * k, 2.0 * k - 1, 2.0 * k + 1, rounds) for k, name in enumerate(steps, 1)}

    monkeypatch.setattr(speed, "interleave", times)
    rows = speed.measure(TINY, 0.0)
    assert [row.ratio for row in rows] == list(range(1, len(rows) + 1))
    assert (rows[0].method, rows[0].memory_format, rows[0].parameters) == ("dense", "contiguous", 1)
    assert (rows[1].method, rows[1].memory_format) == ("dense", "channels_last")
    first, ours, *_ = speed.tables(rows, TINY)
    assert first.rows[1][3:5] == ["4000.0 (3000.0–5000.0)", "2.00"]
    assert ours.rows[0][0] == "cp, factored"
    assert ours.rows[0][5].startswith("r=")


def test_command_prints_tables_and_writes_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "QUICK", TINY)
    out = tmp_path / "tensor.json"
    result = CliRunner().invoke(command(), ["--quick", "--seconds", "0.1", "--out", str(out)])
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    assert "3x3 convolution of 8 channels" in output and "Canonical weight normalization" in output
    written = json.loads(out.read_text())
    assert {row["group"] for row in written["rows"]} == {"dense", "tensor network", "tensorly-torch", "canonical"}
    assert all(0 < row["low"] <= row["milliseconds"] <= row["high"] for row in written["rows"])


@pytest.mark.parametrize(("option", "sizes"), [([], speed.FULL), (["--quick"], speed.QUICK)], ids=["full", "quick"])
def test_quick_is_a_choice(option: list[str], sizes: timed.Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(speed, "measure", lambda sizes, seconds: asked.append((sizes, seconds)) or [])
    assert CliRunner().invoke(command(), ["--seconds", "3", *option]).exit_code == 0
    assert asked == [(sizes, 3.0)]
