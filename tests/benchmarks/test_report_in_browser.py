"""A report as a reader has it: opened from a file in headless Chromium."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure as MatplotlibFigure

from retract.benchmarks.convergence.report import write_convergence_report
from retract.benchmarks.report import SERIES, Figure, Section, Table, figure_style, write_report
from tests.benchmarks.browser import chromium, open_page
from tests.benchmarks.convergence.stores import make_store

ROWS = [
    ["SGD", "9.5 ± 0.1", "1e-2", "–", "1/2"],
    ["PSISGD", "−10", "3", "1,200", "1"],
    ["AdamW", "10.25", "0.5", "diverged", "1/16"],
    ["Muon", "+9.75", "5e-05", "< 900", "2"],
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as page:
        yield page


@pytest.fixture
def report(tmp_path: Path) -> Path:
    with figure_style():
        figure = MatplotlibFigure(figsize=(4, 2))
        figure.subplots().plot([0, 1], [1, 3], color=SERIES[0])
    table = Table(["method", "spread", "rate", "steps", "part"], ROWS, "caption")
    single = Table(["alone"], [["1"]])
    sections = [
        Section("One", "Text.", [Figure(figure, "a"), table]),
        Section("Two", items=[Figure(figure, "b"), single]),
    ]
    return write_report(tmp_path / "report.html", title="T", summary="S.", sections=sections, facts={"command": "c"})


def column(browser: Any, index: int) -> list[str]:
    return [
        row.find_elements("tag name", "td")[index].text for row in browser.find_elements("css selector", "tbody tr")
    ][: len(ROWS)]


def heads(browser: Any) -> list[Any]:
    return list(browser.find_elements("css selector", "th"))[: len(ROWS[0])]


def orders(browser: Any) -> list[str | None]:
    return [head.get_attribute("aria-sort") for head in heads(browser)]


def test_page_opens_offline_and_shows_its_figures(browser: Any, report: Path) -> None:
    assert open_page(browser, report) == [report.resolve().as_uri()]
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    figures = browser.find_elements("css selector", "figure svg")
    assert len(figures) == 2
    assert all(figure.size["width"] > 100 and figure.size["height"] > 50 for figure in figures)


@pytest.mark.parametrize(
    ("index", "ascending", "descending"),
    [
        (0, ["AdamW", "Muon", "PSISGD", "SGD"], ["SGD", "PSISGD", "Muon", "AdamW"]),
        (1, ["PSISGD", "SGD", "Muon", "AdamW"], ["AdamW", "Muon", "SGD", "PSISGD"]),
        (2, ["Muon", "SGD", "AdamW", "PSISGD"], ["PSISGD", "AdamW", "SGD", "Muon"]),
        (3, ["Muon", "PSISGD", "SGD", "AdamW"], ["PSISGD", "Muon", "SGD", "AdamW"]),  # without a number: last
        (4, ["AdamW", "SGD", "PSISGD", "Muon"], ["Muon", "PSISGD", "SGD", "AdamW"]),
    ],
)
def test_clicks_sort_up_then_down_then_as_written(
    browser: Any, report: Path, index: int, ascending: list[str], descending: list[str]
) -> None:
    open_page(browser, report)
    for state, expected in (("ascending", ascending), ("descending", descending), (None, [row[0] for row in ROWS])):
        heads(browser)[index].find_element("tag name", "button").click()
        assert column(browser, 0) == expected
        assert orders(browser) == [state if other == index else None for other in range(5)]


def test_keys_sort_and_one_column_at_a_time_is_marked(browser: Any, report: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    open_page(browser, report)
    first = browser.switch_to.active_element
    first.send_keys(Keys.TAB)
    assert browser.switch_to.active_element.text == "method"
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert column(browser, 0) == ["AdamW", "Muon", "PSISGD", "SGD"]
    browser.switch_to.active_element.send_keys(Keys.TAB)
    browser.switch_to.active_element.send_keys(Keys.SPACE)
    assert orders(browser) == [None, "ascending", None, None, None]
    assert column(browser, 0) == ["PSISGD", "SGD", "Muon", "AdamW"]


def test_a_single_row_has_nothing_to_sort(browser: Any, report: Path) -> None:
    open_page(browser, report)
    assert len(browser.find_elements("css selector", "th button")) == len(ROWS[0])


@pytest.mark.slow
def test_convergence_report_of_all_protocols_shows_whole(browser: Any, tmp_path: Path) -> None:
    report = write_convergence_report(tmp_path, make_store(tmp_path), description="Text.")
    assert open_page(browser, report) == [report.resolve().as_uri()]
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    figures = browser.find_elements("css selector", "figure svg")
    print(f"{len(figures)} figures")
    assert len(figures) == 8  # rates 2, training 3, equivariance, robustness, transfer
    assert all(figure.size["width"] > 100 and figure.size["height"] > 100 for figure in figures)
    for table in browser.find_elements("css selector", "table"):
        heads = table.find_elements("css selector", "th")
        for head in heads if len(table.find_elements("css selector", "tbody tr")) > 1 else ():
            browser.execute_script("arguments[0].querySelector('button').click()", head)
            assert head.get_attribute("aria-sort") == "ascending"
