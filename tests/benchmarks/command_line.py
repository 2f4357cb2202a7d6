"""The `retract` command in a test's own process."""

import re

from typer.testing import CliRunner

from retract.benchmarks.cli import app

__all__ = ["invoke"]


def invoke(*arguments):
    """(exit status, output as one line without the frames that rich draws)."""
    result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, [str(part) for part in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())
