"""Sections of a report as Markdown, in a part of a document that is generated, between two marks."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from functools import partial

from .report import Section, Table

__all__ = ["generated", "markdown", "part_names", "replace_generated"]

WIDTH = 120  # of a line of text


def markdown(sections: Sequence[Section], level: int = 3) -> str:
    """The sections' titles, texts and tables. Figures have no place in it.

    Args:
        sections: in order.
        level: of their headings.
    """
    blocks = []
    for section in sections:
        blocks += [f"{'#' * level} {section.title}", _filled(section.text)]
        for item in section.items:
            if isinstance(item, Table):
                blocks += [_rows(item), _filled(item.caption)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _filled(text: str) -> str:
    """Paragraphs, their lines broken anew."""
    paragraphs = re.split(r"\n\s*\n", text.strip())
    fill = partial(textwrap.fill, width=WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n\n".join(fill(" ".join(paragraph.split())) for paragraph in paragraphs)


def _rows(table: Table) -> str:
    rules = ["--:" if numeric else "---" for numeric in table.numeric]
    lines = [table.header, rules, *table.rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def part_names(document: str) -> list[str]:
    """The names of the generated parts of a document, in order."""
    return re.findall(r"^<!-- ([\w.-]+): generated[^\n]*-->$", document, re.MULTILINE)


def generated(document: str, name: str) -> str:
    """What stands between the marks of ``name`` in a document.

    Raises:
        ValueError: it has not just one such part.
    """
    return _part(document, name)["body"]


def replace_generated(document: str, name: str, body: str) -> str:
    """The document with ``body`` between the marks of ``name``: ``<!-- name: generated ... -->`` and
    ``<!-- end of name -->``, each on a line of its own.

    Raises:
        ValueError: it has not just one such part.
    """
    part = _part(document, name)
    return document[: part.start("body")] + body + document[part.end("body") :]


def _part(document: str, name: str) -> re.Match[str]:
    mark = re.escape(name)
    pattern = rf"^<!-- {mark}: generated[^\n]*-->\n(?P<body>.*?)^<!-- end of {mark} -->$"
    found = list(re.finditer(pattern, document, re.DOTALL | re.MULTILINE))
    if len(found) != 1:
        raise ValueError(
            f"document must have one part between '<!-- {name}: generated ... -->' and '<!-- end of {name} -->', "
            f"it has {len(found)}"
        )
    return found[0]
