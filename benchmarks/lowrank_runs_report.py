"""What `retract bench lowrank` says of the networks that it trained: how they do, and how they differ."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .cells import mean_losses
from .lowrank_cell import FULL_RANK, LOOKS, METHODS, NETWORKS, WINDOW, Cell
from .lowrank_compression import INITIALIZATIONS, Compression
from .paired_statistics import Comparison, compare, mean_and_error
from .report import Table

__all__ = ["BASELINE", "compression_tables", "fraction", "training_tables"]

BASELINE = "spectral"
ORDER = (FULL_RANK, *dict.fromkeys((*METHODS, *INITIALIZATIONS)))

Record = Mapping[str, Any]
Key = tuple[float, str]  # size and method of runs that differ by seed alone
Groups = dict[Key, list[Record]]


class Measure(NamedTuple):
    """Something that runs are compared by: from a record to it, None of a run that diverged; digits shown."""

    of: Callable[[Record], float | None]
    digits: int
    higher_is_better: bool


def _early(index: int) -> Measure:
    return Measure(lambda record: record["early"][index], 3, False)


def _percent(name: str) -> Measure:
    return Measure(lambda record: None if record[name] is None else 100 * record[name], 2, True)


TRAINING = {
    **{f"loss, step {step}": _early(index) for index, step in enumerate(LOOKS)},
    "loss, last epoch": Measure(lambda record: record["train_loss"], 3, False),
    "accuracy %": _percent("accuracy"),
}
COMPRESSION = {
    "as made, %": _percent("accuracy_as_made"),
    "statistics measured, %": _percent("accuracy_before"),
    "after an epoch, %": _percent("accuracy"),
}


def fraction(value: float) -> str:
    """A sixteenth as 1/16."""
    return "1" if value == 1 else f"1/{1 / value:g}"


# -------------------------------------------------------------------------------------------------------- training


def training_tables(records: Sequence[Record]) -> list[Table]:
    """For each network the runs, and how they differ from the baseline's; what that comes to; the rates tried."""
    found, short = [], []
    for network in NETWORKS:
        chosen = [record for record in records if record["network"] == network and not record["tuning"]]
        groups = _groups(chosen, "fraction", "method")
        compared = _compared(groups, TRAINING)
        found += [_runs(network, groups), _differences(compared, TRAINING, "r/d", fraction, f"{network} perceptrons")]
        short += [[network, *row] for row in _in_short(compared, TRAINING)]
    caption = f"For how many ranks a method helps, ties or hurts, beside `{BASELINE}`, by the tables above."
    found.append(Table(("network", "method", *TRAINING), short, caption))
    return [*found, _tried(records)]


def _runs(network: str, groups: Groups) -> Table:
    rows = []
    for (part, method), records in groups.items():
        converged = sum(record["train_loss"] is not None for record in records)
        energy = f"{statistics.median(record['energy'] for record in records):.3g}"
        facts = [f"{records[0]['lr']:g}", f"{converged} of {len(records)}", energy]
        rows.append([fraction(part), method, *facts, *_spreads(records, TRAINING)])
    caption = (
        f"{network} perceptrons, mean ± standard error over seeds, each method at its best rate of the same few. "
        "Seeds: converged of all. Energy: mean square of the outputs before the first step over that at full rank, "
        f"median. Loss at a step: mean over the {WINDOW} batches up to it."
    )
    return Table(("r/d", "method", "lr", "seeds", "energy", *TRAINING), rows, caption)


def _tried(records: Sequence[Record]) -> Table:
    """Loss on the validation split at every learning rate."""
    tuned = {Cell.of(record): record for record in records if record["tuning"]}
    losses = mean_losses(tuned, lambda cell: ((cell.network, cell.fraction, cell.method), cell.lr))
    rates = _rates(losses)
    rows = [
        [network, fraction(part), method, *(_loss(found.get(rate)) for rate in rates)]
        for (network, part, method), found in losses.items()
    ]
    return Table(("network", "r/d", "method", *(f"lr {rate:g}" for rate in rates)), rows, _TRIED)


_TRIED = "Loss on the validation split after the tuning runs; –: diverged, or not tried yet."


def _rates(losses: Mapping[Any, Mapping[float, float]]) -> list[float]:
    return sorted({rate for found in losses.values() for rate in found})


def _loss(loss: float | None) -> str:
    return "–" if loss is None or loss == math.inf else f"{loss:.4g}"


# ----------------------------------------------------------------------------------------------------- compression


def compression_tables(records: Sequence[Record]) -> list[Table]:
    """Accuracies, how they differ from the baseline's, and the rates tried."""
    dense = {record["seed"]: record for record in records if record["stage"] == "dense"}
    groups = _groups([record for record in records if record["stage"] == "compressed"], "budget", "initialization")
    rows = []
    if dense:
        accuracy = _spread(_by_seed(list(dense.values()), _percent("accuracy")), 2)
        whole = next(iter(dense.values()))["parameters"]
        rows.append(["1", "dense", f"{whole:,}", "–", accuracy, "–", "–"])
    for (budget, name), found in groups.items():
        parameters = f"{statistics.mean(record['parameters'] for record in found):,.0f}"
        rows.append([f"{budget:g}", name, parameters, f"{found[0]['lr']:g}", *_spreads(found, COMPRESSION)])
    caption = (
        "Test accuracy, mean ± standard error over seeds, of the dense network and of what was made of it: as made, "
        "with BatchNorm statistics measured on training images, and after an epoch of training from there. Budget: "
        "part of the parameters of the layers that became low-rank. Ranks are the same for all initializations."
    )
    table = Table(("budget", "initialization", "parameters", "lr", *COMPRESSION), rows, caption)
    compared = _compared(groups, COMPRESSION)
    return [table, _differences(compared, COMPRESSION, "budget", lambda b: f"{b:g}", "Networks"), _fine_tuned(records)]


def _fine_tuned(records: Sequence[Record]) -> Table:
    """Loss on the validation split at every rate of fine-tuning."""
    tuned = {Compression.of(record): record for record in records if record["stage"] == "fine-tuning"}
    losses = mean_losses(tuned, lambda cell: ((cell.budget, cell.initialization), cell.lr))
    rates = _rates(losses)
    rows = [[f"{b:g}", name, *(_loss(found.get(rate)) for rate in rates)] for (b, name), found in losses.items()]
    return Table(("budget", "initialization", *(f"lr {rate:g}" for rate in rates)), rows, _TRIED)


# ----------------------------------------------------------------------------------------------------- comparisons


def _groups(records: Sequence[Record], size: str, method: str) -> Groups:
    """Records that differ by seed alone, the largest networks first."""
    groups: Groups = {}
    for record in records:
        groups.setdefault((record[size], record[method]), []).append(record)
    return {key: groups[key] for key in sorted(groups, key=lambda key: (-key[0], ORDER.index(key[1])))}


def _by_seed(records: Sequence[Record], measure: Measure) -> dict[int, float]:
    """Of the runs that converged."""
    return {record["seed"]: value for record in records if (value := measure.of(record)) is not None}


def _compared(groups: Groups, measures: Mapping[str, Measure]) -> dict[str, dict[Key, Comparison]]:
    """Every method beside the baseline of the same size; those of a measure are one family."""
    return {
        name: compare(
            {
                (size, method): (_by_seed(records, measure), _by_seed(groups[size, BASELINE], measure))
                for (size, method), records in groups.items()
                if method != BASELINE and (size, BASELINE) in groups
            }
        )
        for name, measure in measures.items()
    }


def _differences(
    compared: Mapping[str, Mapping[Key, Comparison]],
    measures: Mapping[str, Measure],
    size: str,
    shown: Callable[[float], str],
    what: str,
) -> Table:
    keys = dict.fromkeys(key for found in compared.values() for key in found)
    rows = [
        [shown(key[0]), key[1], *(_cell(compared[name].get(key), measure) for name, measure in measures.items())]
        for key in keys
    ]
    caption = (
        f"{what} less those from `{BASELINE}` of the same seed: mean ± half of its 95 % interval, and the p-value of a "
        "paired t-test, corrected by Holm for all of the column. Ties: it is not below 0.05."
    )
    return Table((size, "method", *measures), rows, caption)


def _cell(found: Comparison | None, measure: Measure) -> str:
    if found is None:
        return "–"
    numbers = f"{found.difference:+.{measure.digits}f} ± {found.half_width:.{measure.digits}f}, p {found.p:.2g}"
    return f"{numbers}: {found.worded(higher_is_better=measure.higher_is_better)}"


def _in_short(compared: Mapping[str, Mapping[Key, Comparison]], measures: Mapping[str, Measure]) -> list[list[str]]:
    """A row for each method: at how many sizes it helps, ties or hurts, for each measure."""
    rows = []
    for method in dict.fromkeys(method for found in compared.values() for _, method in found):
        row = [method]
        for name, measure in measures.items():
            own = [one for (_, other), one in compared[name].items() if other == method]
            words = Counter(one.worded(higher_is_better=measure.higher_is_better) for one in own)
            row.append(", ".join(f"{word} {words[word]}" for word in ("helps", "ties", "hurts") if words[word]) or "–")
        rows.append(row)
    return rows


def _spreads(records: Sequence[Record], measures: Mapping[str, Measure]) -> list[str]:
    return [_spread(_by_seed(records, measure), measure.digits) for measure in measures.values()]


def _spread(values: Mapping[int, float], digits: int) -> str:
    if not values:
        return "–"
    mean, error = mean_and_error(list(values.values()))
    return f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")
