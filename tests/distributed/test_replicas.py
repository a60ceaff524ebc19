"""Replicas of a model on two gloo processes, each with examples of its own: all must come to the same plan."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support import SEARCHES, WORLDS, task, train
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import embsearch_plugin as es
from embsearch_plugin.plugins import algorithms
from embsearch_plugin.search.session import Session

PROCESSES = 2
SETTINGS: dict[str, dict[str, Any]] = {"dnis": {"window": 1, "patience": 1}}  # soon stops, by a loss that is all processes'


def searched_replica(algorithm: str, rank: int) -> Session:
    """Search on a process's replica, which trains and is validated on other batches than the others'."""
    world, config = WORLDS["mean"], algorithms()[algorithm](warm_up=3, **SETTINGS.get(algorithm, {}))
    model = task(world)
    session = es.prepare(model, algorithm=config, budget="60%", space=es.SearchSpace(row_blocks=(0.1, 0.3, 0.6)))
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(replica.parameters(), lr=0.01)
    session.attach(optimizer, validation=[world.batch(16 + 9 * rank, seed=900 + 2 * i + rank) for i in range(3)])
    train(replica, optimizer, (world.batch(seed=2 * i + rank) for i in range(12)))
    return session


def alike(value: Tensor) -> bool:
    """Whether all processes have the same tensor."""
    others = [torch.empty_like(value) for _ in range(PROCESSES)]
    dist.all_gather(others, value.contiguous())
    return all(torch.equal(value, other) for other in others)


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    for algorithm in SEARCHES:
        session = searched_replica(algorithm, rank)
        for strict in (True, False):
            plan = session.derive(strict=strict)
            plan.save(folder / f"{algorithm}-{strict}-{rank}.json")
        assert all(alike(gate) for gate in session.gates), algorithm
        if algorithm == "spectral":
            assert all(f.rotation is not None and alike(f.rotation) for f in session.folds(plan))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive the interpreter and abort it


@pytest.mark.slow
def test_every_process_derives_the_same_plan(tmp_path: Path) -> None:
    mp.spawn(process, (tmp_path,), nprocs=PROCESSES)
    for algorithm in SEARCHES:
        for strict in (True, False):
            first, second = (tmp_path / f"{algorithm}-{strict}-{rank}.json" for rank in range(PROCESSES))
            # The file beside a plan, its row orders and masks, is named by its hash.
            assert first.read_text().replace(f"{strict}-0-", "") == second.read_text().replace(f"{strict}-1-", "")
