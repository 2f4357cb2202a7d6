"""What the convergence report says of made-up results whose answers are known."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from retract.benchmarks.convergence.export import read_export
from retract.benchmarks.convergence.report import report_sections, write_convergence_report
from retract.benchmarks.convergence.report_equivariance import equivariance_sections
from retract.benchmarks.convergence.report_published import published_sections
from retract.benchmarks.convergence.report_rates import rate_sections
from retract.benchmarks.convergence.report_robustness import robustness_sections
from retract.benchmarks.convergence.report_training import training_sections
from retract.benchmarks.convergence.report_transfer import transfer_sections
from retract.benchmarks.markdown import markdown
from retract.benchmarks.report import Figure, Section, Table
from tests.benchmarks.convergence.stores import (
    METHODS,
    SEEDS,
    SPEED,
    all_records,
    cell,
    descent,
    diverged,
    equivariance,
    make_store,
    robustness,
    theorem,
    training,
    transfer,
    wobble,
)


def tables(section: Section) -> list[Table]:
    return [item for item in section.items if isinstance(item, Table)]


def by_first(table: Table) -> dict[str, dict[str, str]]:
    """Rows by their first cell, cells by the header."""
    return {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}


# ----------------------------------------------------------------------------------------------------------- rates


def test_fitted_exponents_are_those_of_the_curves(tmp_path: Path) -> None:
    records = [descent("GD", seed, exponent=-1.0 + 0.01 * wobble(seed)) for seed in SEEDS]
    records += [descent("PSIGD", seed, exponent=-1.5) for seed in SEEDS]
    records += [descent("GD momentum", seed, exponent=-0.5) for seed in SEEDS]
    records += [{**descent("Adam", 0, exponent=-1.0), "status": "diverged", "min_gradient_squared": None}]
    (section,) = rate_sections(make_store(tmp_path, records))
    rows = by_first(tables(section)[0])
    assert list(rows) == ["Adam", "GD", "GD momentum", "PSIGD"]
    assert rows["PSIGD"]["exponent"].startswith("-1.50 [")
    assert rows["PSIGD"]["beside the bound"] == "faster than T^-1"
    assert rows["GD"]["beside the bound"] == "no difference from T^-1 seen"
    assert rows["GD momentum"]["beside the bound"] == "slower than T^-1, so far"
    assert (rows["Adam"]["exponent"], rows["Adam"]["runs"]) == ("–", "0 of 1")


def test_stochastic_runs_of_every_length_are_fitted_together(tmp_path: Path) -> None:
    runs = [
        descent("PSISGD", seed, exponent=-0.5 + 0.01 * wobble(seed), steps=steps, protocol="stochastic", lr=0.1 / steps)
        for seed in SEEDS
        for steps in (128, 512, 2048)
    ]
    (section,) = rate_sections(make_store(tmp_path, runs))
    row = by_first(tables(section)[0])["PSISGD"]
    assert row["runs"] == "15 of 15" and row["exponent"].startswith("-0.50 [") and row["lr"] == "4.88e-05"
    assert row["beside the bound"] == "no difference from T^-0.5 seen"


@pytest.mark.parametrize(
    ("factor", "shown"),
    [
        (1.5, "the gain shows"),
        (30.0, "more than the theory says"),
        (0.1, "PSIGD is behind"),
        (1.0, "no difference seen"),
    ],
)
def test_the_gain_is_judged_by_its_interval_and_by_the_theory(tmp_path: Path, factor: float, shown: str) -> None:
    records = [theorem("GD", seed, factor * (1 + 0.1 * wobble(seed, "GD"))) for seed in SEEDS]
    records += [theorem("PSIGD", seed, 1.0) for seed in SEEDS]
    (section,) = rate_sections(make_store(tmp_path, records))
    assert shown in section.text
    constants, gain = tables(section)
    assert by_first(constants)["GD"]["later L"].startswith("1.2 [")
    assert by_first(constants)["PSIGD"]["of the bound"].startswith("1.0e-02")
    assert float(gain.rows[0][1]) == pytest.approx(factor, rel=0.1)


# -------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Section:
    highest = {"PSISGD": 3.0}  # of its grid
    records = [training(method, seed, lr=highest.get(method, 0.1)) for seed in SEEDS for method in METHODS]
    records.append(diverged(training("AdamW", 5)))
    records += [diverged(training("Muon", seed)) for seed in SEEDS]
    (section,) = training_sections(make_store(tmp_path_factory.mktemp("trained"), records))
    return section


def test_methods_have_their_medians_and_times_to_targets(trained: Section) -> None:
    table = tables(trained)[0]
    rows = by_first(table)
    assert list(rows) == ["SGD", "AdamW", "Muon", "PSISGD", "PSIAngular"]
    targets = [float(name.split()[2]) / 100 for name in table.header if name.startswith("epochs")]
    assert targets == pytest.approx([0.8 * 0.9433, 0.95 * 0.9433, 0.99 * 0.9433], abs=6e-4)
    for target in targets:
        name = f"epochs to {100 * target:.1f} %"
        for method in ("SGD", "PSIAngular"):
            top = float(rows[method]["best accuracy %"].split()[0]) / 100 / (1 - math.exp(-10 * SPEED[method]))
            exact = -math.log(1 - target / top) / SPEED[method]
            found = float(rows[method][name].split()[0])
            assert found == pytest.approx(exact, abs=0.25)
            seconds = float(rows[method][name.replace("epochs", "seconds")].split()[0])
            assert seconds == pytest.approx(found / 2, abs=0.02)
    assert rows["AdamW"][name] == "never"
    assert rows["AdamW"]["runs"] == "5 of 6" and rows["Muon"]["runs"] == "0 of 5"
    assert set(list(rows["Muon"].values())[5:]) == {"diverged"}
    assert rows["SGD"]["loss halfway"].startswith("0.1643 ")
    assert [rows[method]["lr"] for method in ("SGD", "PSISGD", "PSIAngular")] == ["0.1", "3*", "0.1"]


def test_who_is_ahead_is_said_with_intervals(trained: Section) -> None:
    beside_sgd, beside_angular = (table for table in tables(trained) if table.header[0].startswith("method, less"))
    rows = by_first(beside_sgd)
    assert rows["PSIAngular"]["loss halfway"].endswith(", ahead")
    assert rows["PSISGD"]["best accuracy %"].endswith(", no difference seen")
    assert rows["AdamW"]["best accuracy %"].endswith(", behind")
    assert set(list(rows["Muon"].values())[1:5]) == {"–"}
    assert by_first(beside_angular)["SGD"]["loss halfway"].endswith(", behind")
    assert "Best accuracy %: PSIAngular ahead of SGD by 1.6" in trained.text
    assert "Loss halfway: PSIAngular is ahead of the 3" not in trained.text
    assert "Loss halfway: PSIAngular is ahead of 3 of the 3 other methods, behind 0" in trained.text


def test_effect_sizes_have_a_row_for_each_test(trained: Section, tmp_path: Path) -> None:
    found = [table for table in tables(trained) if "Cohen's d" in table.header]
    assert len(found) == 2
    store = make_store(tmp_path, [training(method, seed) for seed in SEEDS for method in METHODS])
    (brief,) = training_sections(store, effects=False)
    assert not [table for table in tables(brief) if "Cohen's d" in table.header]


def test_methods_of_fixed_decay_are_compared_as_those_they_are(tmp_path: Path) -> None:
    sgd, angular = "SGD, decay 5e-4", "PSIAngular, decay 0"
    records = [{**training(name.partition(",")[0], s), "method": name} for s in SEEDS for name in (angular, sgd)]
    (section,) = training_sections(make_store(tmp_path, records))
    assert f"the median best accuracy of `{sgd}` (80 %" in " ".join(section.text.split())
    assert f"Best accuracy %: {angular} ahead of {sgd} by 1.6" in section.text
    headers = [table.header[0] for table in tables(section) if table.header[0].startswith("method, less")]
    assert headers == [f"method, less {sgd}"], "two methods are compared once"


def test_training_without_the_usual_methods_or_with_a_single_seed(tmp_path: Path) -> None:
    (section,) = training_sections(make_store(tmp_path, [training("AdamW", 0), training("PSISGD", 1)]))
    assert len(tables(section)) == 1, "nothing is paired"


def test_published_differences_stand_beside_ours(tmp_path: Path) -> None:
    task = {"data": "cifar10", "model": "resnet20"}
    shift = {"SGD, decay 0": 0.0, "PSISGD, decay 0": 0.02, "PSISGD (paper), decay 5e-4": -0.02, "SGD, decay 5e-4": 0.0}
    records = [
        {**training("SGD", s), **task, "method": m, "best_accuracy": 0.9 + d + 0.001 * wobble(s, m)}
        for s in SEEDS
        for m, d in shift.items()
    ]
    (section,) = published_sections(make_store(tmp_path, records))
    rows = {(row[0], row[1]): row for row in tables(section)[0].rows}
    assert rows["0", "PSISGD less SGD"][2] == "+1.27" and rows["0", "PSISGD less SGD"][-1] == "as published"
    assert "1 of 2 differences have the published sign; of these the test tells 1 from none." in section.text
    assert rows["5e-4", "PSISGD less SGD"][2] == "+0.35" and rows["5e-4", "PSISGD less SGD"][-1] == "opposite"
    assert len(rows) == 2


# --------------------------------------------------------------------------------------------- robustness and others


def test_regions_are_measured_over_all_cells(tmp_path: Path) -> None:
    scales, rates = (0.01, 0.1, 1.0, 10.0, 100.0), (0.1, 1.0, 10.0)
    records = [robustness(m, start, lr, 0) for m in ("SGD", "PSISGD") for start in scales for lr in rates]
    records += [
        robustness(m, start, 0.1, seed) for m in ("SGD", "PSISGD") for start in ("filters", 1.0) for seed in (1, 2)
    ]
    (section,) = robustness_sections(make_store(tmp_path, records))
    areas, named = tables(section)
    assert by_first(areas)["SGD"]["region, % of cells"] == "40.0"  # 3 of 5 scales, 2 of 3 rates
    assert by_first(areas)["PSISGD"]["region, % of cells"] == "66.7"
    parts = [
        (row["scales at the tuned rate, %"], row["rates from the usual start, %"]) for row in by_first(areas).values()
    ]
    assert parts == [("60", "67"), ("100", "67")]
    assert (by_first(areas)["SGD"]["cells"], by_first(areas)["SGD"]["runs"]) == ("15", "12 of 17")
    assert by_first(named)["SGD"]["filters"].startswith("50.00") and by_first(named)["PSISGD"]["filters"].startswith(
        "95.00"
    )
    (figure,) = (item.figure for item in section.items if isinstance(item, Figure))
    written = [text.get_text() for text in figure.axes[0].texts]
    assert written.count("95") == 6 and written.count("×") == 5 and written.count("50") == 4
    framed = [patch for patch in figure.axes[0].patches if not patch.get_fill()]
    assert len(framed) == 6


def test_areas_are_compared_where_all_seeds_have_all_cells(tmp_path: Path) -> None:
    records = []
    for seed in SEEDS:
        for method in ("SGD", "PSISGD"):
            for index, start in enumerate((0.01, 0.1, 1.0, 10.0)):
                good = method == "PSISGD" or index <= seed % 2
                records.append(cell("robustness", method, seed, start=start, accuracy=0.9 if good else 0.1))
    (section,) = robustness_sections(make_store(tmp_path, records))
    row = by_first(tables(section)[0])["PSISGD"]
    assert row["less SGD"].startswith("+65.0 [") and row["beside SGD"] == "ahead"


def test_equivariant_methods_are_told_from_others(tmp_path: Path) -> None:
    starts = ("powers of two", "filters")
    records = [equivariance(m, start, seed) for m in ("SGD", "PSISGD") for start in starts for seed in (0, 1)]
    records.append({**equivariance("AdamW", "filters", 0), "status": "diverged", "max_difference": None})
    (section,) = equivariance_sections(make_store(tmp_path, records))
    rows = [row[1:] for row in tables(section)[0].rows]
    assert rows == [
        ["no", "3.0e-01", "3.0e-01", "no", "4"],
        ["no", "diverged", "–", "–", "1"],
        ["yes", "1.0e-13", "0.0e+00", "yes", "4"],
    ]


def test_transferred_rates_are_judged_by_the_loss_that_they_cost(tmp_path: Path) -> None:
    records = [
        transfer(method, f"cnn, width {width}, depth 2", lr, seed, best)
        for method, bests in (("SGD", (0.1, 1.0)), ("PSISGD", (0.1, 0.1)))
        for width, best in zip((16, 32), bests, strict=True)
        for lr in (0.1, 1.0)
        for seed in range(3)
    ]
    lost = transfer("SGD", "cnn, width 8, depth 2", 0.1, 0, 0.1)
    records.append({**lost, "status": "diverged", "unseen_loss": None})
    (section,) = transfer_sections(make_store(tmp_path, records))
    rows = {(row[0], row[1].split(",")[1].strip()): row for row in tables(section)[0].rows}
    assert rows["SGD", "width 8"][2:] == ["0 of 1", "–", "–", "diverged", "–"]
    assert rows["SGD", "width 32"][3:5] == ["1", "+1.00"]
    assert float(rows["SGD", "width 32"][6].split()[0]) == pytest.approx(11, rel=0.02)
    assert rows["PSISGD", "width 32"][3:5] == ["0.1", "+0.00"] and rows["PSISGD", "width 32"][6].startswith("1 [")


# -------------------------------------------------------------------------------------------------------- the whole


def test_a_store_without_cells_or_with_tuning_alone_makes_a_report(tmp_path: Path) -> None:
    for records in ([], [{**training("SGD", 1000), "stage": "tuning"}]):
        store = make_store(tmp_path / str(len(records)), records)
        assert [section.title for section in report_sections(store)] == ["What was run"]
        assert write_convergence_report(store.folder, store, description="Text.").exists()


def test_an_export_makes_the_same_tables_as_its_store(tmp_path: Path) -> None:
    few = [
        r for r in all_records() if r["seed"] in (0, 1, 1000) and r["method"] in ("GD", "PSIGD", "SGD", "PSIAngular")
    ]
    store = make_store(tmp_path, few)
    write_convergence_report(tmp_path, store, description="Text.", facts={"seeds": 5})
    found = read_export(tmp_path / "export.json")
    assert found.facts["seeds"] == "5" and found.facts["tuning"] == "training: 3 runs of each method"
    times = {stage: sum(r["seconds"] for r in few if r["stage"] == stage) for stage in {r["stage"] for r in few}}
    total, tuning = sum(times.values()) / 3600, times["tuning"] / 3600
    assert found.facts["time"] == f"{total:.2f} hours on one thread, {tuning:.2f} of them tuning"
    again = markdown(report_sections(found))
    whole = markdown(report_sections(store))
    number = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
    assert re.sub(number, "", again) == re.sub(number, "", whole)
    ours, theirs = (np.array([float(x) for x in re.findall(number, text)]) for text in (again, whole))
    assert np.allclose(ours, theirs, rtol=0.02, atol=1e-3)
    assert all(
        f"### {title}" in again for title in ("Gradient norm", "Training", "Equivariance", "Robustness", "Transfer")
    )
    assert (tmp_path / "export.json").stat().st_size < 100_000
