"""Learning rates that are taken over from one network to others."""

from retract.benchmarks.convergence.networks import BASE
from retract.benchmarks.convergence.transfer import Transferred, transferred


def test_the_rate_taken_over_is_the_best_of_the_base():
    """Means over seeds; the wider network would rather have another rate, and a diverged run is infinitely bad."""
    losses = {(BASE, 0.1): (1.0, 3.0), (BASE, 0.3): (1.0, 1.5), ("wide", 0.1): (0.5, 0.7), ("wide", 0.3): (0.9, None)}
    records = [
        {"protocol": "transfer", "stage": "transfer", "method": "SGD", "model": model, "lr": lr, "unseen_loss": loss}
        for (model, lr), pair in losses.items()
        for loss in pair
    ]
    records.append({**records[0], "stage": "tuning", "unseen_loss": 0.0})
    found = transferred(records)
    assert found["SGD", BASE] == Transferred(0.3, 1.25, 0.3, 1.25)
    assert found["SGD", "wide"] == Transferred(0.1, 0.6, 0.3, float("inf"))
