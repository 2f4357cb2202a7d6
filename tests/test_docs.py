"""What the pages say holds: links lead somewhere, python blocks run, commands and make targets exist."""

import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from retract.benchmarks.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: .+? -->\s*$")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """(line number, text) of the fenced blocks in one of ``languages`` that no comment above exempts."""
    text = page.read_text(encoding="utf-8")
    for fence in FENCE.finditer(text):
        if fence[1] in languages and not NOT_RUN.search(text[: fence.start()]):
            yield text.count("\n", 0, fence.start(2)) + 1, fence[2]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(page: Path, program: str) -> list[list[str]]:
    """Calls of ``program`` in shell blocks, without its name; comments end one, backslashes continue it."""
    shell = "".join(text for _, text in blocks(page, "sh", "bash", "console")).replace("\\\n", " ")
    lines = (line.removeprefix("$ ") for line in shell.splitlines())
    return [shlex.split(line, comments=True)[1:] for line in lines if line.split()[:1] == [program]]


def anchors(page: Path) -> set[str]:
    """The fragments that a page's headings answer to, by GitHub's rule."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{name(page)} links to {target}, which is not there"
        if fragment and linked.suffix == ".md":
            assert fragment in anchors(linked), f"{name(page)} links to {target}: no such heading"


@pytest.mark.parametrize("page", [page for page in PAGES if list(blocks(page, "python"))], ids=name)
def test_python_blocks_run_as_printed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line, text in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + text, name(page), "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page, "retract")], ids=name)
def test_commands_parse(page: Path) -> None:
    for arguments in commands(page, "retract"):
        with suppress(typer.Exit):  # --help and --version end the parsing
            parse(get_command(app), arguments)


def parse(command: Any, arguments: list[str]) -> None:
    """Parse as the command line does, subcommand by subcommand, run nothing; raise on what does not fit."""
    context = command.make_context("retract", list(arguments))
    while hasattr(context.command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, subcommand, rest = context.command.resolve_command(context, rest)
        context = subcommand.make_context(name, rest, parent=context)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page, "make")], ids=name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for arguments in commands(page, "make"):
        assert {argument for argument in arguments if "=" not in argument} <= targets


def test_readme_shows_commands_and_code() -> None:
    readme = ROOT / "README.md"
    assert commands(readme, "make")[:2] == [["demo"], ["test"]]
    (_, swap), *_ = blocks(readme, "python")
    assert len(swap.splitlines()) <= 8
