"""``retract train``: one training run, in a folder from which it can be resumed."""

from __future__ import annotations

import shlex
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from .runs import Run
    from .training import Trainer

__all__ = ["summary", "train_command"]

MAY_CHANGE = ("data_dir",)  # the same data may have moved; their fingerprint tells whether they are the same
# Panels of the help.
DATA = {"rich_help_panel": "Data"}
METHOD = {"rich_help_panel": "Network and optimizer"}
LAYERS = {"rich_help_panel": "Factored layers"}
LOOP = {"rich_help_panel": "Training"}
RUN = {"rich_help_panel": "Run"}


def train_command(
    context: typer.Context,
    data: Annotated[str, typer.Option(help="digits, mnist, cifar10 or svhn.", metavar="NAME", **DATA)] = "digits",
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder or tar archive: official files, or images as train/CLASS/*.jpg, test/CLASS/*.jpg. "
            "Never written to. Default: download, with checksum.",
            metavar="PATH",
            **DATA,
        ),
    ] = None,
    subset: Annotated[
        int | None,
        typer.Option(min=1, help="Train on N images, classes balanced. Default: on all.", metavar="N", **DATA),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Resize images to N x N. Default: as they are.", metavar="N", **DATA),
    ] = None,
    augment: Annotated[
        bool | None,
        typer.Option(
            "--augment/--no-augment",
            help="Shift images by up to an eighth of their height, and mirror those of cifar10. Default: for cifar10.",
            **DATA,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="digitsnet, lenet5_bn, mnist_convnet, cifar_alexnet, vgg11_bn, vgg16_bn, resnet8/20/32/44/56 "
            "(CIFAR), resnet18/34/50, wrn16_4, wrn28_10. Default: digitsnet (digits), lenet5_bn (mnist), "
            "resnet20.",
            metavar="NAME",
            **METHOD,
        ),
    ] = None,
    canonical: Annotated[
        bool | None,
        typer.Option(
            "--canonical/--no-canonical",
            help="Bring every scale-invariant filter to one norm first; outputs stay. "
            "Default: for psi* and riemannian-sgd, unless layers are factored.",
            **METHOD,
        ),
    ] = None,
    factorize: Annotated[
        str | None,
        typer.Option(
            help="svdp: every weight becomes U diag(s) V^T; sttp: and its frames U, V tensor trains; canonical: "
            "a sum of rank-one terms of unit vectors; lowrank: U V; or tensor layers, in the format cp, tucker2, "
            "tucker, tensor_train, tt_matrix, tensor_ring, block_term or hierarchical_tucker. Default: dense.",
            metavar="NAME",
            **LAYERS,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Rank of the factored layers; of a smaller one, what it has.", metavar="R", **LAYERS),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Instead of a rank: the fraction of its parameters that each layer keeps (lowrank: all together).",
            metavar="X",
            **LAYERS,
        ),
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(
            help="Instead of a rank: decompose the initial weights to this relative error; not for matrices.",
            metavar="X",
            **LAYERS,
        ),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Of lowrank, instead: the share kept of squared singular values.", metavar="X", **LAYERS),
    ] = None,
    spectrum: Annotated[
        str | None,
        typer.Option(
            help="Singular values of svdp and sttp: identity (all 1), free, lipschitz (the largest 1), bounded "
            "(0.1 to 1). Default: free.",
            metavar="NAME",
            **LAYERS,
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            help="Of svdp and sttp: householder, coordinates for any Euclidean optimizer, or stiefel, orthonormal "
            "frames for riemannian-sgd. Of canonical: euclidean, or oblique, unit vectors for riemannian-sgd. "
            "Default: householder, euclidean.",
            metavar="NAME",
            **LAYERS,
        ),
    ] = None,
    skip: Annotated[
        str | None,
        typer.Option(help="Layers that stay dense, such as 'conv1,fc' or 'layer1.*'.", metavar="PATTERNS", **LAYERS),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="sgd, nesterov, adamw, adam, muon, sgdp, adamp, geoopt-sphere, geoopt-sphere-adam, unit-norm, sgd-g, "
            "psisgd, psigd, psiangular, psiadam, riemannian-sgd or riemannian-gd. Default: psisgd; with --factorize "
            "sgd, in stiefel and oblique form riemannian-sgd.",
            metavar="NAME",
            **METHOD,
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Highest learning rate. On scale-invariant weights of psi* and geoopt-sphere an angle: "
            "radians per unit of gradient at unit norm; psiangular: radians per step. "
            "Default: 0.1; adam, adamw, adamp 0.001; geoopt-sphere-adam 0.01; muon 0.02; sgd-g 0.2; psigd, "
            "riemannian-gd 1; psiangular 0.015.",
            metavar="X",
            **METHOD,
        ),
    ] = None,
    euclidean_lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate of the weights that are not scale-invariant or factored. Worth tuning apart. "
            "Default: as --lr; psiangular, psiadam 0.3.",
            metavar="X",
            **METHOD,
        ),
    ] = None,
    momentum: Annotated[
        float, typer.Option(help="Momentum; the first beta of Adam's family.", metavar="X", **METHOD)
    ] = 0.9,
    weight_decay: Annotated[
        float,
        typer.Option(
            help="Of all weights; for psi*, geoopt-sphere and riemannian-sgd, of those on no manifold.",
            metavar="X",
            **METHOD,
        ),
    ] = 0.0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.", metavar="N", **LOOP)] = 15,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.", metavar="N", **LOOP)] = 128,
    schedule: Annotated[
        str,
        typer.Option(
            help="constant, cosine (to zero), or step (times 0.2 at 30, 60 and 80 % of the run).",
            metavar="NAME",
            **LOOP,
        ),
    ] = "cosine",
    warmup: Annotated[
        float,
        typer.Option(min=0, help="Epochs of linear warm-up; 0.5 is half an epoch.", metavar="X", **LOOP),
    ] = 0.0,
    label_smoothing: Annotated[
        float, typer.Option(help="Label smoothing of the training loss.", metavar="X", **LOOP)
    ] = 0.0,
    seed: Annotated[
        int,
        typer.Option(help="Of initial weights, order of images, augmentation and subset.", metavar="N", **LOOP),
    ] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...", metavar="NAME", **LOOP)] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. Default: torch's own.", metavar="N", **LOOP)
    ] = None,
    amp: Annotated[bool, typer.Option("--amp", help="Forward pass in bfloat16 where that is safe.", **LOOP)] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Run folder. Default: runs/DATA-MODEL-OPTIMIZER-SEED, with factored layers as in "
            "runs/digits-digitsnet-svdp8-sgd-0.",
            metavar="FOLDER",
            **RUN,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in that folder.", **RUN)] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with the run in this folder from its last checkpoint, with its own options.",
            metavar="FOLDER",
            **RUN,
        ),
    ] = None,
) -> None:
    """Train one network and write a run folder: config.json, metrics.jsonl, checkpoint.pt.

    Ctrl-C finishes the step and writes a checkpoint. --resume goes on as if nothing had happened, to the bit.

    For example:

    retract train

    retract train --data cifar10 --data-dir ~/data --optimizer psiangular --euclidean-lr 0.3

    retract train --resume runs/cifar10-resnet20-psiangular-0

    retract train --factorize sttp --rank 8 --spectrum lipschitz --form stiefel --skip fc

    retract train --factorize tucker2 --budget 0.1 --skip block1.0,fc

    retract train --factorize lowrank --budget 0.3 --skip fc
    """
    from .experiment import Config, build_trainer, default_folder, plain, read_config, resolve
    from .runs import Run

    options = plain({field.name: context.params[field.name] for field in fields(Config)})
    if resume is None:
        config = resolve(options)
        folder = out or default_folder(config)
        Run.require_free(folder, overwrite=overwrite)
        trainer = build_trainer(config)
        run = Run.create(folder, asdict(config), overwrite=overwrite)
    else:
        if out is not None or overwrite:
            raise ValueError("--resume goes on in its own folder: leave out --out and --overwrite")
        run = Run.open(resume)
        given = {name: value for name, value in options.items() if _is_given(context, name)}
        moved = {name: given.pop(name) for name in MAY_CHANGE if name in given}
        run.require_same(given)
        trainer = build_trainer(read_config(run, moved))
        if (state := run.load_checkpoint()) is not None:
            trainer.load_state_dict(state)
    _fit(trainer, run)


def _is_given(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def _fit(trainer: Trainer, run: Run) -> None:
    """Train with a progress bar, then print the summary; after an interruption, how to go on."""
    from rich.console import Console

    from .factorization import Factorization, cost
    from .progress import TrainingProgress
    from .runs import Interrupted

    console = Console()
    try:
        with TrainingProgress(trainer, console) as progress:
            trainer.fit(run, on_step=progress.step, on_epoch=progress.epoch)
    except Interrupted as interruption:
        console.print(f"Stopped after step {trainer.step} of epoch {trainer.epoch + 1}. To go on:")
        console.print(f"  retract train --resume {shlex.quote(str(run.folder))}", soft_wrap=True, highlight=False)
        raise typer.Exit(128 + interruption.signum) from None
    console.print(summary(run))
    if (layers := Factorization.of(run.config)) is not None:
        console.print(f"{layers}: {cost(trainer.model)}", soft_wrap=True, highlight=False)
    console.print(f"Run folder: {run.folder.resolve()}", soft_wrap=True, highlight=False)


def summary(run: Run) -> Table:
    """The last and the best epoch of a run."""
    from rich.table import Table

    metrics = run.metrics()
    best = max(metrics, key=lambda record: record["test_accuracy"])
    title = f"{run.config['model']} on {run.config['data']}, {run.config['optimizer']}, lr {run.config['lr']:g}"
    table = Table(title=title, title_justify="left")
    for column in ("", "epoch", "train loss", "test loss", "test accuracy"):
        table.add_column(column, justify="right" if column else "left")
    for label, record in (("last", metrics[-1]), ("best", best)):
        losses = (f"{record[key]:.4f}" for key in ("train_loss", "test_loss"))
        table.add_row(label, str(record["epoch"]), *losses, f"{100 * record['test_accuracy']:.2f} %")
    return table
