"""What is exported is what the store has, to six digits; and it is small."""

import json
from pathlib import Path

import numpy as np
import pytest

from retract.benchmarks.convergence.export import export, read_export
from retract.benchmarks.convergence.store import Store

SHARED = {"data": "digits", "model": "perceptron", "weight_decay": 0.0}


def record(method: str, seed: int, **more: object) -> dict[str, object]:
    return {"protocol": "descent", "stage": "final", "method": method, "seed": seed, **SHARED, **more}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store.open_or_create(tmp_path / "run", {"data": "digits"})
    curve = [[step, 1 / step, 0.1 * step] for step in range(1, 301)]
    for method in ("GD", "PSIGD"):
        for seed in range(3):
            more = {"accuracy": 0.123456789 + seed, "start": "usual", "curves": {"gradient": curve, "loss": curve}}
            found.log(record(method, seed, lr=1 / 3, seconds=1.5, **more))
    found.log(record("GD", 3, lr=1 / 3, status="diverged", accuracy=None, start=1e-3))
    found.log({**record("GD", 1000, lr=0.1), "stage": "tuning"})
    return found


def test_records_and_curves_read_back(store: Store, tmp_path: Path) -> None:
    path = export(
        store,
        tmp_path / "new" / "out.json",
        facts={"command": "c ≤"},
        curves=lambda record: {"gradient": store.curve(record, "gradient")},
    )
    found = read_export(path)
    assert found.facts == {"command": "c ≤"}
    assert len(found.metrics()) == len(store.metrics()) == 8
    for ours, theirs in zip(
        sorted(found.metrics(), key=lambda r: (r["stage"], r["method"], r["seed"])),
        sorted(store.metrics(), key=lambda r: (r["stage"], r["method"], r["seed"])),
        strict=True,
    ):
        for name in theirs.keys() - {"id"}:
            expected = theirs[name]
            assert ours[name] == (pytest.approx(expected, rel=1e-5) if isinstance(expected, float) else expected), name
        curve, whole = found.curve(ours, "gradient"), store.curve(theirs, "gradient")
        assert bool(curve) == bool(whole)
        if whole:
            assert np.allclose(np.array(curve, dtype=float), np.array(whole, dtype=float), rtol=1e-5, atol=0)
        assert found.curve(ours, "loss") == []


def test_stages_and_fields_can_be_left_out(store: Store, tmp_path: Path) -> None:
    options = {
        "facts": {},
        "curves": lambda record: {},
        "without": lambda record: ("seconds",),
        "leave_out": ("tuning",),
    }
    found = read_export(export(store, tmp_path / "out.json", **options))  # type: ignore[arg-type]
    assert {r["stage"] for r in found.metrics()} == {"final"}
    assert all("seconds" not in r for r in found.metrics())


def test_what_cells_share_is_written_once_and_a_line_is_a_cell(store: Store, tmp_path: Path) -> None:
    text = export(store, tmp_path / "out.json", facts={}, curves=lambda record: {}).read_text()
    assert text.count("perceptron") == 3  # GD, PSIGD, and GD's tuning
    rows = json.loads(text)["groups"][0]
    assert set(rows["columns"]) == {"seed", "accuracy", "start", "status", "seconds"}
    assert '\n[0,"usual","finished",1.5,0.123457],\n' in text or rows["rows"][0][0] == 0
    assert '"lr":0.333333' in text


def test_exporting_an_export_changes_nothing(store: Store, tmp_path: Path) -> None:
    first = export(store, tmp_path / "a.json", facts={}, curves=lambda record: {"loss": store.curve(record, "loss")})
    found = read_export(first)
    again = export(found, tmp_path / "b.json", facts={}, curves=lambda record: {"loss": found.curve(record, "loss")})
    assert first.read_text() == again.read_text()


@pytest.mark.parametrize("text", ["", "{}", '{"facts": {}, "groups": [{}]}', "[1]"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other.json is no export of `retract bench convergence`"):
        read_export(path)
    with pytest.raises(ValueError, match="is no export"):
        read_export(tmp_path / "missing.json")
