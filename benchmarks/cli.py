"""The command ``retract``. A command's module is imported when it is used, so that help and mistakes are
answered at once.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any, NamedTuple

try:
    import typer
    from rich.console import Console
    from typer.core import TyperCommand, TyperGroup
except ModuleNotFoundError as error:
    raise SystemExit(f"The command line needs {error.name}: pip install 'retract[bench]'") from None

__all__ = ["BENCHMARKS", "COMMANDS", "Command", "app"]


class Command(NamedTuple):
    """A command's name, the module and function that are its body, and its line in the help above it."""

    name: str
    module: str
    function: str
    summary: str


COMMANDS = (
    Command("demo", ".demo", "demo_command", "SGD and PSISGD, each from two initializations of one network."),
    Command("train", ".train", "train_command", "Train a network, or resume a run."),
    Command("gan", ".gan.command", "gan_command", "Train a GAN under a constraint on spectra, or resume a run."),
    Command("inspect", ".inspect", "inspect_command", "Which weights of a network are scale-invariant, and how."),
)
BENCHMARKS = (
    Command("speed", ".speed", "speed_command", "Time one optimizer step, against torch, geoopt and adamp."),
    Command("stiefel", ".stiefel_speed", "stiefel_command", "Time one step on a Stiefel matrix, against geoopt."),
    Command("angular", ".angular", "angular_command", "Compare PSIAngular's choices with their alternatives."),
    Command("spectra", ".spectra_speed", "spectra_command", "Time weights of chosen spectrum, and their layers."),
    Command("completion", ".completion", "completion_command", "Fit matrices of low rank, well and badly conditioned."),
    Command("layers", ".layers", "layers_command", "Train networks of spectral layers in both forms, and dense ones."),
    Command(
        "init", ".init", "init_command", "Variances of deep tensorial networks as initialised, and their training."
    ),
    Command(
        "tensor", ".tensor_speed", "tensor_command", "Time tensorial and canonical layers, against tensorly-torch."
    ),
    Command("canonical", ".canonical", "canonical_command", "Train canonical networks, cut their terms, fine-tune."),
    Command("lowrank", ".lowrank", "lowrank_command", "Compare starts of low-rank layers, alone and in training."),
    Command("gan", ".gan.benchmark", "gan_benchmark_command", "Train GANs under constraints on the discriminator."),
    Command(
        "convergence",
        ".convergence.command",
        "convergence_command",
        "Which optimizer gets there first; rates, robustness.",
    ),
    Command("results", ".convergence.docs", "results_command", "Write the generated parts of a document again."),
    Command("digits", ".digits", "digits_command", "Tune and compare all optimizers on 8x8 digits."),
)


class LazyCommand(TyperCommand):
    """Stands for a command whose module is not imported yet."""

    def __init__(self, command: Command) -> None:
        super().__init__(command.name, help=command.summary)
        self.command = command

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of the command itself, which is then run in this one's place."""
        module = import_module(self.command.module, __package__)
        single = typer.Typer(add_completion=False, rich_markup_mode="rich", context_settings=SETTINGS)
        single.command(self.command.name)(getattr(module, self.command.function))
        return typer.main.get_command(single).make_context(info_name, args, parent=parent, **extra)


class Root(TyperGroup):
    """``retract``: what a user can put right is one red line and exit status 2, not a traceback."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for command in COMMANDS:
            self.add_command(LazyCommand(command))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take ``--debug`` wherever it stands."""
        if "--debug" in args:
            args = ["--debug", *(argument for argument in args if argument != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (ValueError, ModuleNotFoundError) as error:
            if ctx.params.get("debug"):
                raise
            message = str(error)
            if isinstance(error, ModuleNotFoundError):
                message += ": pip install 'retract[bench]'"
            console = Console(stderr=True)
            console.print(f"Error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None


class Bench(TyperGroup):
    """``retract bench``."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for command in BENCHMARKS:
            self.add_command(LazyCommand(command))


SETTINGS = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    cls=Root,
    pretty_exceptions_show_locals=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings=SETTINGS,
)
bench = typer.Typer(cls=Bench, no_args_is_help=True, rich_markup_mode="rich", context_settings=SETTINGS)
app.add_typer(bench, name="bench")


@bench.callback()
def _bench() -> None:
    """Measure the claims of the documentation on this machine."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"retract {version('retract')}")
        raise typer.Exit


@app.callback()
def _retract(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train networks with their weights on the manifolds they live on.

    Every command has its own --help.
    """


if __name__ == "__main__":
    app()
