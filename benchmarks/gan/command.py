"""``retract gan``: one generative adversarial network, in a folder from which its training can be resumed."""

from __future__ import annotations

import shlex
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..data import Dataset
    from ..runs import Run
    from .experiment import GANConfig
    from .training import GANTrainer

__all__ = ["gan_command"]

MAY_CHANGE = ("data_dir",)  # the same images may have moved; their fingerprint tells whether they are the same
# Panels of the help.
DATA = {"rich_help_panel": "Data"}
NETWORKS = {"rich_help_panel": "Networks and constraints"}
LOOP = {"rich_help_panel": "Training"}
RECORDS = {"rich_help_panel": "Records"}
RUN = {"rich_help_panel": "Run"}


def gan_command(
    context: typer.Context,
    data: Annotated[
        str, typer.Option(help="digits, mnist, cifar10, svhn, or folder: any images.", metavar="NAME", **DATA)
    ] = "digits",
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder or tar archive as for `retract train`; with --data folder any folder of images, which are "
            "cropped to squares, its subfolders as classes. Never written to. Default: download, with checksum.",
            metavar="PATH",
            **DATA,
        ),
    ] = None,
    subset: Annotated[
        int | None,
        typer.Option(min=1, help="Learn N images, classes balanced. Default: all.", metavar="N", **DATA),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            help="digits (8x8), dcgan28, dcgan32, sngan32 or sngan48; images are resized to its size. "
            "Default: digits (digits), dcgan28 (mnist), dcgan32.",
            metavar="NAME",
            **NETWORKS,
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(min=1, help="Of the discriminator. Default: as published.", metavar="N", **NETWORKS),
    ] = None,
    generator_width: Annotated[
        int | None,
        typer.Option(min=1, help="Of the generator. Default: as published.", metavar="N", **NETWORKS),
    ] = None,
    constraint: Annotated[
        str,
        typer.Option(
            help="On every weight of the discriminator: none; sn, spectral normalization; sr, spectral regularization; "
            "svdp-c, sttp-c: low rank, all singular values 1; svdp-l, sttp-l: the largest 1; svdp-r, sttp-r: and a "
            "penalty on their decay; lipschitz-operator: the convolution's own norm 1.",
            metavar="NAME",
            **NETWORKS,
        ),
    ] = "svdp-l",
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of factored weights; of a smaller one, what it has. Default: 64.",
            metavar="R",
            **NETWORKS,
        ),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            help="Of factored weights: householder, coordinates for Adam, or stiefel, frames for RiemannianSGD.",
            metavar="NAME",
            **NETWORKS,
        ),
    ] = "householder",
    generator_constraint: Annotated[
        str, typer.Option(help="On every weight of the generator, in householder form.", metavar="NAME", **NETWORKS)
    ] = "none",
    generator_rank: Annotated[
        int | None, typer.Option(min=1, help="As --rank, of the generator.", metavar="R", **NETWORKS)
    ] = None,
    loss: Annotated[str, typer.Option(help="hinge or non-saturating.", metavar="NAME", **LOOP)] = "hinge",
    r1: Annotated[
        float,
        typer.Option(min=0, help="The gamma of the penalty gamma / 2 |grad D|^2 on real images.", metavar="X", **LOOP),
    ] = 0.0,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the generator.", metavar="N", **LOOP)] = 2000,
    discriminator_steps: Annotated[
        int, typer.Option(min=1, help="Of the discriminator for each of the generator.", metavar="N", **LOOP)
    ] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.", metavar="N", **LOOP)] = 64,
    lr: Annotated[float, typer.Option(help="Of Adam, betas 0 and 0.9.", metavar="X", **LOOP)] = 2e-4,
    manifold_lr: Annotated[
        float, typer.Option(help="Of RiemannianSGD, for weights in stiefel form.", metavar="X", **LOOP)
    ] = 0.1,
    schedule: Annotated[
        str, typer.Option(help="Of the learning rates: linear, to zero, or constant.", metavar="NAME", **LOOP)
    ] = "linear",
    ema: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Decay of the generator's moving average, which makes the samples; 0 for none. "
            "Default: 0.999, in short runs less, for an average over a tenth of the run.",
            metavar="X",
            **LOOP,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of initial weights, order of images and latent vectors.", metavar="N", **LOOP)
    ] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...", metavar="NAME", **LOOP)] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. Default: torch's own.", metavar="N", **LOOP)
    ] = None,
    amp: Annotated[bool, typer.Option("--amp", help="Networks in bfloat16 where that is safe.", **LOOP)] = False,
    log_every: Annotated[
        int,
        typer.Option(
            min=1, help="Steps between records of losses and spectra, and checkpoints.", metavar="N", **RECORDS
        ),
    ] = 100,
    samples_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps between pictures, metrics and reports; a multiple of --log-every. Default: a tenth of the run.",
            metavar="N",
            **RECORDS,
        ),
    ] = None,
    metric_samples: Annotated[
        int,
        typer.Option(
            min=0,
            help="Samples to compare with the data, in the features of a classifier trained on them; 0 for none.",
            metavar="N",
            **RECORDS,
        ),
    ] = 2000,
    inception: Annotated[
        Path | None,
        typer.Option(
            help="torch-fidelity's Inception weights: FID, KID and IS of as many samples after the last step. Needs "
            "retract[inception].",
            metavar="FILE",
            **RECORDS,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Run folder. Default: such as runs/gan-digits-digits-svdp-l-0.",
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
    """Train a GAN whose discriminator keeps its spectrum, and watch spectra and samples.

    The run folder holds config.json, metrics.jsonl, checkpoint.pt, samples/*.png and report.html, which is written anew
    with the pictures. Ctrl-C finishes the step and writes a checkpoint. --resume goes on as if nothing had happened, to
    the bit.

    For example:

    retract gan

    retract gan --data mnist --constraint sttp-l --rank 16

    retract gan --data cifar10 --network sngan32 --width 32 --constraint svdp-c --steps 100000 --device cuda

    retract gan --resume runs/gan-digits-digits-svdp-l-0
    """
    from ..experiment import plain
    from ..run_writing import writing_to
    from ..runs import Run
    from .experiment import GANConfig, build_gan, default_folder, load_data, read_config, resolve
    from .observer import remove_pictures

    options = plain({field.name: context.params[field.name] for field in fields(GANConfig)})
    if resume is None:
        config = resolve(options)
        folder = out or default_folder(config)
        Run.require_free(folder, overwrite=overwrite)
        images = load_data(config)
        trainer = build_gan(config, images)
        with writing_to(folder):
            run = Run.create(folder, asdict(config), overwrite=overwrite)
            remove_pictures(folder)
    else:
        if out is not None or overwrite:
            raise ValueError("--resume goes on in its own folder: leave out --out and --overwrite")
        run = Run.open(resume)
        given = {name: value for name, value in options.items() if _is_given(context, name)}
        moved = {name: given.pop(name) for name in MAY_CHANGE if name in given}
        run.require_same(given)
        config = read_config(run, moved)
        images = load_data(config)
        trainer = build_gan(config, images)
        if (state := run.load_checkpoint()) is not None:
            trainer.load_state_dict(state)
    _fit(trainer, run, config, images)


def _is_given(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def _fit(trainer: GANTrainer, run: Run, config: GANConfig, data: Dataset) -> None:
    """Train with a progress bar and a report that grows; after an interruption, say how to go on."""
    from rich.console import Console

    from ..run_writing import writing_to
    from ..runs import Interrupted
    from .observer import Observer
    from .progress import GANProgress
    from .report import REPORT, write_gan_report

    console = Console()
    observer = Observer(run.folder, data, trainer, config)

    def report() -> None:
        with writing_to(run.folder):
            write_gan_report(run, data)

    with GANProgress(trainer, console) as progress:

        def on_record(record: dict[str, Any]) -> None:
            progress.record(record)
            if observer.looks(trainer):
                report()

        if trainer.step == trainer.steps:  # of a run that ended between its last checkpoint and its page
            report()
        try:
            trainer.fit(run, measure=observer.measure, on_step=progress.step, on_record=on_record)
        except Interrupted as interruption:
            console.print(f"Stopped after step {trainer.step}. To go on:")
            console.print(f"  retract gan --resume {shlex.quote(str(run.folder))}", soft_wrap=True, highlight=False)
            raise typer.Exit(128 + interruption.signum) from None
    console.print(f"Report: {(run.folder / REPORT).resolve()}", soft_wrap=True, highlight=False)
