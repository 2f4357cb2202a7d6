"""`retract bench results`: the parts of a document that `retract bench convergence` measured, written again.

The run writes ``export.json`` into its folder; a copy of it stands beside the document, under the name of the part.
Text and tables are made from it by the code that makes the report: where that code changes, the document is stale,
and ``--check`` says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..markdown import generated, markdown, part_names, replace_generated
from .export import Exported, read_export
from .report import report_sections

__all__ = ["document_part", "results_command", "stale_parts"]

DOCUMENT, DATA = Path("docs/results.md"), Path("docs/data")


def document_part(found: Exported) -> str:
    """An export as Markdown: its command, where it ran, and the report's texts and tables."""
    facts = dict(found.facts)
    command = facts.pop("command", "retract bench convergence")
    where = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return f"\n```sh\n{command}\n```\n\n{where}\n\n{markdown(report_sections(found, effects=False))}\n"


def stale_parts(document: str, data: Path) -> dict[str, str]:
    """The generated parts of a document that are not what their exports give, by name, as they should be.

    Args:
        document: its text.
        data: the folder of exports; that of a part has its name.

    Raises:
        ValueError: a part has no export, or an export in the folder no part.
    """
    names = part_names(document)
    if unused := sorted({path.stem for path in data.glob("*.json")} - set(names)):
        raise ValueError(f"document must have a part for every file of {data}, it has none for {', '.join(unused)}")
    parts = {name: document_part(read_export(data / f"{name}.json")) for name in names}
    return {name: part for name, part in parts.items() if part != generated(document, name)}


def results_command(
    document: Annotated[Path, typer.Argument(help="A Markdown file with marked parts.")] = DOCUMENT,
    data: Annotated[
        Path, typer.Option(metavar="FOLDER", help="NAME.json for every part NAME: export.json of a run.")
    ] = DATA,
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail if a part is stale.")] = False,
) -> None:
    """Write the generated parts of a document from the exports of `retract bench convergence`.

    A part NAME stands between the lines `<!-- NAME: generated ... -->` and `<!-- end of NAME -->`.

    For example:

        cp runs/convergence/export.json docs/data/convergence-digits.json
        retract bench results docs/results.md
    """
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"document cannot be read: {error}") from error
    stale = stale_parts(text, data)
    if check and stale:
        raise ValueError(f"{document} is stale in {', '.join(stale)}: run `retract bench results {document}`")
    for name, part in stale.items():
        text = replace_generated(text, name, part)
    if stale:
        document.write_text(text, encoding="utf-8")
    typer.echo(f"Written again: {', '.join(stale)}" if stale else "Nothing is stale")
