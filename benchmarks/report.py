"""Reports: sections of prose, tables and matplotlib figures, written as one self-contained HTML file."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure as MatplotlibFigure
    from rich.table import Table as RichTable

__all__ = ["GRID", "INK", "SERIES", "Figure", "Section", "Table", "figure_style", "write_report"]

# Figures are drawn in these placeholder colours, which become references to the page's CSS variables in the
# SVG: one figure then suits a light and a dark page.
INK = "#010203"
GRID = "#040506"
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05")
_CSS = {INK: "currentColor", GRID: "var(--grid)"} | {c: f"var(--series-{i})" for i, c in enumerate(SERIES, 1)}


@dataclass(frozen=True)
class Figure:
    """A matplotlib figure and the sentence below it."""

    figure: MatplotlibFigure
    caption: str


@dataclass(frozen=True)
class Table:
    """Rows of cells below a header; columns of numbers ("–", "diverged" or "never" where there is none) are set flush
    right, and sorted as numbers where the page is read.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"rows must have {len(self.header)} cells like the header, got {len(row)}: {row!r}")

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether every cell starts as a number does, or says that there is none."""
        number = re.compile(r"[-+−<>≤≥ ]*\d|(–|diverged|never)$")
        columns = range(len(self.header))
        return [bool(self.rows) and all(number.match(row[i]) for row in self.rows) for i in columns]

    def rich(self) -> RichTable:
        """The same table for a terminal."""
        from rich.table import Table as RichTable

        table = RichTable(caption=self.caption.replace("`", "") or None, caption_justify="left")
        for name, numeric in zip(self.header, self.numeric, strict=True):
            table.add_column(name, justify="right" if numeric else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs (parted by blank lines; `backticks` set code), then figures and tables."""

    title: str
    text: str = ""
    items: Sequence[Figure | Table] = ()


@contextmanager
def figure_style() -> Iterator[None]:
    """Draw figures in the report's style: transparent, placeholder colours, text kept as text."""
    import matplotlib

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "retract",  # same data, same file
        "font.size": 10,
        "axes.edgecolor": GRID,
        "axes.labelcolor": INK,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "text.color": INK,
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        yield


def write_report(
    path: Path, *, title: str, summary: str, sections: Sequence[Section], facts: Mapping[str, str]
) -> Path:
    """Write the report to ``path`` (its folder is made) and return ``path``.

    Args:
        path: the HTML file.
        title: heading of the page.
        summary: the finding, in a sentence or two, before the first section.
        sections: the body, in order.
        facts: what a reader needs to repeat it, name to value (as from :func:`.provenance.provenance`).
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"paragraphs": _paragraphs, "svg": _svg}
    environment.tests |= {"figure": lambda item: isinstance(item, Figure)}
    template = environment.get_template("report.html.j2")
    html = template.render(title=title, summary=summary, sections=sections, facts=facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    return path


def _paragraphs(text: str) -> list[Markup]:
    """Paragraphs of ``text``, escaped, with `code` between backticks."""
    from markupsafe import Markup, escape

    blocks = [block for block in re.split(r"\n\s*\n", text.strip()) if block]
    return [Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(block)))) for block in blocks]


def _svg(figure: MatplotlibFigure, prefix: str) -> Markup:
    """The figure as an SVG element: colours by CSS, ids made unique in the page by ``prefix``."""
    from markupsafe import Markup

    with io.StringIO() as buffer, figure_style():
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
        svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{prefix}-", svg)
    for colour, css in _CSS.items():
        svg = svg.replace(colour, css)
    return Markup(svg)
