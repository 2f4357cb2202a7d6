"""Two processes on one machine: data parallel and fully sharded training take the single process's steps."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from retract.manifolds import PSI
from retract.optim import PSISGD, PSIAdam, PSIAngular

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
MAKERS = {
    "PSISGD": lambda groups: PSISGD(groups, lr=0.1, momentum=0.9),
    "PSIAngular": lambda groups: PSIAngular(groups, lr=0.05, euclidean_lr=0.1),
    "PSIAdam": lambda groups: PSIAdam(groups, lr=0.1, euclidean_lr=0.1),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, bias=False), nn.GroupNorm(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 4)
    ).double()


def train(model: nn.Module, conv: Tensor, rank: int, size: int, name: str) -> None:
    """Four steps; each process sees its share of the batch."""
    others = [p for p in model.parameters() if p is not conv]
    optimizer = MAKERS[name]([{"params": [conv], "manifold": PSI()}, {"params": others}])
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        images = torch.randn(8, 2, 6, 6, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 4, (8,), generator=generator)
        optimizer.zero_grad()
        share = slice(rank * 8 // size, (rank + 1) * 8 // size)
        nn.functional.cross_entropy(model(images[share]), labels[share]).backward()
        optimizer.step()


def work(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    from torch.distributed.fsdp import fully_shard

    results: dict[str, Any] = {}
    for name in MAKERS:
        replica = nn.parallel.DistributedDataParallel(network())
        train(replica, replica.module[0].weight, rank, 2, name)
        results[f"{name} ddp"] = replica.module[0].weight.detach().clone()
        sharded = network()
        fully_shard(sharded)
        train(sharded, sharded[0].weight, rank, 2, name)
        results[f"{name} fsdp"] = sharded[0].weight.full_tensor().detach().clone()
    try:
        PSISGD([{"params": [sharded[0].weight], "manifold": PSI(1)}], lr=0.1)
    except ValueError as error:
        results["refused"] = str(error)
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    dist.destroy_process_group()


def test_data_parallel_and_fully_sharded_training_equal_one_process(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(port, str(tmp_path)), nprocs=2)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for name in MAKERS:
        alone = network()
        train(alone, alone[0].weight, 0, 1, name)
        for kind in ("ddp", "fsdp"):
            torch.testing.assert_close(results[f"{name} {kind}"], alone[0].weight.detach(), rtol=1e-10, atol=1e-12)
    assert "sharded across its scale groups" in results["refused"]
