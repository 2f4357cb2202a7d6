"""Reports are one file: everything inside, nothing loaded, text escaped."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure as MatplotlibFigure

from retract.benchmarks.provenance import provenance
from retract.benchmarks.report import INK, SERIES, Figure, Section, Table, figure_style, write_report


class Page(HTMLParser):
    """Tags in order, ids, and every attribute that makes a browser load something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in {"meta", "br", "hr", "img", "link"}:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in {"src", "href", "xlink:href", "data", "srcset"} and not (value or "").startswith("#"):
                self.loads.append(f"{tag} {name}={value}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def line_figure() -> MatplotlibFigure:
    with figure_style():
        figure = MatplotlibFigure()
        figure.subplots().plot([0, 1, 2], [1, 3, 2], color=SERIES[1], label="a line")
    return figure


def write(path: Path, **changes: object) -> str:
    arguments = {
        "title": "Title",
        "summary": "One. Two.",
        "sections": [
            Section(
                "First",
                "About `lr < 1`.\n\nMore.",
                [Figure(line_figure(), "caption"), Figure(line_figure(), "same")],
            ),
            Section("Second", items=[Table(["name", "loss"], [["a", "0.5"], ["b", "–"]], "cap")]),
        ],
        "facts": {"command": "retract demo"},
    }
    return write_report(path, **(arguments | changes)).read_text(encoding="utf-8")  # type: ignore[arg-type]


def test_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    html = write(tmp_path / "new" / "folder" / "report.html")
    page = Page(html)
    assert page.open == []
    assert page.loads == []
    assert not re.search(r"@import|url\((?!#)|fetch|import\(|XMLHttpRequest", html)
    assert page.tags.count("svg") == 2
    assert page.tags.count("table") == 1
    assert len(page.ids) == len(set(page.ids)), "two figures share an id, so one could show the other's parts"


def test_figures_take_the_colours_of_the_page(tmp_path: Path) -> None:
    html = write(tmp_path / "report.html")
    assert "stroke: var(--series-2)" in html
    assert "currentColor" in html
    assert INK not in html
    assert SERIES[1] not in html


def test_text_is_escaped_and_code_is_set(tmp_path: Path) -> None:
    html = write(tmp_path / "report.html", title="<b>&", summary="a < b", facts={"seed": "<0>"})
    assert "<b>" not in html
    assert "<h1>&lt;b&gt;&amp;</h1>" in html
    assert "<p>a &lt; b</p>" in html
    assert "<p>About <code>lr &lt; 1</code>.</p>" in html
    assert "<dd>&lt;0&gt;</dd>" in html


def test_same_content_same_file(tmp_path: Path) -> None:
    assert write(tmp_path / "a.html") == write(tmp_path / "b.html")


def test_columns_of_numbers_are_told_from_words(tmp_path: Path) -> None:
    rows = [["2x", "1e-3", "-0.5", "99.1 ± 0.2", "3 or so", "never"], ["slow", "–", "7", "98", "none", "diverged"]]
    table = Table(["words", "figures", "signed", "spread", "mixed", "missing"], rows)
    assert table.numeric == [False, True, True, True, False, True]
    assert Table(["empty"], []).numeric == [False]
    html = write(tmp_path / "report.html", sections=[Section("s", items=[table])])
    assert html.count('<td class="number">') == 8


def test_ragged_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="2 cells like the header, got 1"):
        Table(["a", "b"], [["1"]])


def test_table_prints_the_same_cells() -> None:
    from rich.console import Console

    console = Console(width=80, file=None, record=True, quiet=False)
    with console.capture() as capture:
        console.print(Table(["name", "loss"], [["sgd", "0.5"]], "a caption").rich())
    assert all(text in capture.get() for text in ("name", "loss", "sgd", "0.5", "a caption"))


def test_provenance_says_where_figures_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/some/where/retract", "demo", "--out", "two words"])
    facts = provenance(seed=3)
    assert facts["command"] == "retract demo --out 'two words'"
    assert facts["seed"] == "3"
    assert "torch" in facts["versions"]
    assert facts["machine"]
