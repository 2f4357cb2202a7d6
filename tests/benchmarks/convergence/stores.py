"""Made-up results of all protocols, in the form in which the benchmark stores them."""

import math
from pathlib import Path
from typing import Any

from retract.benchmarks.convergence.store import Store

METHODS = ("SGD", "AdamW", "PSISGD", "PSIAngular")
SEEDS = range(5)
EPOCHS = 10
SPEED = {"SGD": 0.5, "AdamW": 0.49, "Muon": 0.5, "PSISGD": 0.5, "PSIAngular": 1.0}  # of learning, per epoch
TOP = {"SGD": 0.95, "AdamW": 0.94, "Muon": 0.95, "PSISGD": 0.95, "PSIAngular": 0.96}

Record = dict[str, Any]


def cell(protocol: str, method: str, seed: int, **more: Any) -> Record:
    fields: Record = {
        "protocol": protocol,
        "method": method,
        "data": "digits",
        "model": "digitsnet",
        "seed": seed,
        "stage": "final",
        "lr": 0.1,
        "euclidean_lr": 0.3,
        "weight_decay": 5e-4,
        "start": 1.0,
        "seconds": 2.0,
        "status": "finished",
    }
    return {**fields, **more}


def wobble(seed: int, method: str = "") -> float:
    """A small number that differs by seed, and a little by method: seeds' noise, without random numbers."""
    return math.sin(7.3 * seed + len(method)) + 0.2 * math.sin(3.1 * seed * len(method))


def training(method: str, seed: int, **more: Any) -> Record:
    """Accuracy TOP (1 - exp(-SPEED epoch)) and a loss that falls as fast, an epoch in half a second."""
    top = TOP[method] + 0.002 * wobble(seed, method)
    accuracy = [(e, top * (1 - math.exp(-SPEED[method] * e)), 0.5 * e) for e in range(1, EPOCHS + 1)]
    loss = [(e, (2 + 0.02 * wobble(seed)) * math.exp(-SPEED[method] * e), 0.5 * e) for e in range(1, EPOCHS + 1)]
    numbers = {
        "accuracy": accuracy[-1][1],
        "best_accuracy": accuracy[-1][1],
        "area": sum(point[1] for point in accuracy) / EPOCHS,
        "train_loss": loss[-1][1],
        "unseen_loss": 2 * loss[-1][1],
        "reason": None,
        "epochs": EPOCHS,
    }
    return cell("training", method, seed, **{**numbers, "curves": {"accuracy": accuracy, "train_loss": loss}, **more})


def diverged(record: Record) -> Record:
    lost = dict.fromkeys(("accuracy", "best_accuracy", "area", "train_loss", "unseen_loss"))
    curves = {name: curve[:2] for name, curve in record.get("curves", {}).items()}
    return {**record, **lost, "status": "diverged", "reason": "loss is nan", "curves": curves}


def descent(method: str, seed: int, *, exponent: float, factor: float = 1.0, steps: int = 1000, **more: Any) -> Record:
    """A squared gradient norm of factor * T^exponent."""
    scale = factor * (1 + 0.1 * wobble(seed))
    grid = sorted({round(10 ** (k / 20)) for k in range(math.floor(20 * math.log10(steps)) + 1)})
    curve = [(t, scale * t**exponent, 1e-3 * t) for t in grid]
    names = ("min_gradient_squared", "min_euclidean_gradient_squared")
    numbers = dict.fromkeys(names, curve[-1][1]) | {"steps": steps, "mean_square_norm": 2.0, "start": "usual"}
    return {**cell("descent", method, seed), **numbers, "curves": dict.fromkeys(names, curve), **more}


def theorem(method: str, seed: int, factor: float) -> Record:
    found = descent(method, seed, exponent=-1.0, factor=factor, stage="theorem", step=0.1, euclidean_step=0.2)
    found["curves"]["smoothness"] = [(1, 10.0, 0.0), (500, 12.0, 0.5)]
    return {**found, "smoothness": 10.0, "bound": 100 * found["min_gradient_squared"]}


def robustness(method: str, start: float | str, lr: float, seed: int) -> Record:
    """Methods on the manifold do not see the start; the others train from the usual one and its neighbours."""
    blind = method.startswith("PSI")
    good = lr < 3 and (blind or (not isinstance(start, str) and abs(math.log10(start)) < 1.5))
    found = cell("robustness", method, seed, start=start, lr=lr, accuracy=0.95 if good else 0.5)
    return diverged(found) if lr > 5 and not blind else found


def equivariance(method: str, start: str, seed: int) -> Record:
    apart = 1e-13 if method.startswith("PSI") else 0.3
    curves = {name: [(step, math.exp(-step / 30), None) for step in range(100)] for name in ("usual", "rescaled")}
    equal = method.startswith("PSI") and start == "powers of two"
    numbers = {"max_difference": 0.0 if equal else apart, "equal": equal, "steps": 100}
    return cell("robustness", method, seed, start=start, stage="equivariance", curves=curves, **numbers)


def transfer(method: str, model: str, lr: float, seed: int, best: float) -> Record:
    loss = 0.1 + math.log10(lr / best) ** 2 + 0.001 * wobble(seed)
    return cell("transfer", method, seed, model=model, lr=lr, stage="transfer", unseen_loss=loss)


def all_records() -> list[Record]:
    found = [{**training(method, 1000), "stage": "tuning"} for method in METHODS for _ in range(3)]
    found += [training(method, seed) for seed in SEEDS for method in METHODS]
    found.append(diverged(training("AdamW", 5)))
    for seed in SEEDS:
        noise = 0.02 * wobble(seed, "GD")
        found += [descent("GD", seed, exponent=-1.0 + noise), descent("PSIGD", seed, exponent=-1.5 - 2 * noise)]
        found += [theorem("GD", seed, 1.5 + noise), theorem("PSIGD", seed, 1.0 - 2 * noise)]
        for steps in (128, 512, 2048):
            run = descent("PSISGD", seed, exponent=-0.3 + noise, steps=steps, protocol="stochastic")
            found.append(run)
    for method in METHODS:
        found += [
            robustness(method, start, lr, 0) for start in (0.01, 0.1, 1.0, 10.0, 100.0) for lr in (0.1, 1.0, 10.0)
        ]
        found += [
            robustness(method, start, 0.1, seed)
            for start in ("filters", 1.0)
            for seed in SEEDS
            if (start, seed) != (1.0, 0)
        ]
        found += [equivariance(method, start, seed) for start in ("powers of two", "filters") for seed in range(2)]
        for width, best in ((8, 0.1), (16, 0.1), (32, 0.1 if method.startswith("PSI") else 1.0)):
            name = f"cnn, width {width}, depth 2"
            found += [transfer(method, name, lr, seed, best) for lr in (0.01, 0.1, 1.0) for seed in range(3)]
    return found


def make_store(folder: Path, records: list[Record] | None = None) -> Store:
    store = Store.open_or_create(folder, {"data": "digits"})
    for record in all_records() if records is None else records:
        store.log(record)
    return store
