"""`retract bench speed`: that it times what it says, and says it; not how fast anything is."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from retract.benchmarks import speed
from retract.benchmarks.cli import app
from retract.benchmarks.timing import interleave


def test_methods_take_turns_and_the_median_is_of_the_timed_calls() -> None:
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.004)

    times = interleave({"fast": lambda: calls.append("fast"), "slow": slow}, 0.01, rounds=4)
    assert calls[:4] == ["fast", "fast", "slow", "slow"]
    assert times["slow"].samples == times["fast"].samples >= 4
    assert times["slow"].low <= times["slow"].median <= times["slow"].high
    assert times["slow"].median >= 0.004 > times["fast"].median


def test_every_method_steps_every_parameter() -> None:
    for name, make in speed.METHODS.items():
        model = speed._model("resnet20", "cpu")
        before = [p.detach().clone() for p in model.parameters()]
        make(model).step()
        if name != "geoopt RiemannianSGD, Sphere":  # it takes other tensors' places: filters as rows
            moved = [bool((p != q).any()) for p, q in zip(model.parameters(), before, strict=True)]
            assert all(moved), name


def test_state_is_one_buffer_a_weight() -> None:
    rows = speed.measure(["resnet20"], seconds=0.01, methods=["PSISGD (default)", "torch AdamW foreach"])
    held = {row.method: row.buffers for row in rows}
    assert held[speed.BASELINE] == pytest.approx(1, abs=0.01)
    assert held["PSISGD (default)"] == pytest.approx(1, abs=0.01)
    assert held["torch AdamW foreach"] == pytest.approx(2, abs=0.01)


def test_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    arguments = ["bench", "speed", "--models", "resnet20", "--seconds", "0.1", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "memory floor" in result.output
    written = json.loads(out.read_text())
    assert {row["method"] for row in written["rows"]} == {*speed.METHODS, speed.FLOOR}
    wrong = CliRunner().invoke(app, ["bench", "speed", "--models", "resnet21"])
    assert wrong.exit_code == 2
    assert "resnet21" in wrong.output
