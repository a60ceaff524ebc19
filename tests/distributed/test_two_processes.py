"""Searchable and compact models under DistributedModelParallel, on two gloo processes, against the unsharded run."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support import WORLDS, World, dlrm, train
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embsearch_plugin as es
from embsearch_plugin.files import read_state, write_state
from embsearch_plugin.plan import SizePlan

LR, STEPS, PROCESSES = 0.1, 8, 2
Loop = Callable[[nn.Module, Any, Iterator[Batch]], list[float]]


class RowWiseToo(EmbeddingBagCollectionSharder):
    """The stock sharder offers no row-wise sharding on a CPU, though it works."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [*super().sharding_types(compute_device_type), "row_wise"]


def part_of(batch: Batch, rank: int) -> Batch:
    """Return a process's half of a batch."""
    size = batch.labels.numel() // PROCESSES
    mine = slice(rank * size, (rank + 1) * size)
    bags = [bag.to_dense()[mine] for bag in batch.sparse_features.to_dict().values()]
    features = KeyedJaggedTensor(
        keys=batch.sparse_features.keys(),
        values=torch.cat([ids for feature in bags for ids in feature]).long(),
        lengths=torch.tensor([len(ids) for feature in bags for ids in feature]),
    )
    return Batch(batch.dense_features[mine], features, batch.labels[mine])


def batches(world: World, seeds: range, rank: int | None) -> Iterator[Batch]:
    for seed in seeds:
        batch = world.batch(32, seed=seed)
        yield batch if rank is None else part_of(batch, rank)


def built(world: World, form: str, folder: Path) -> tuple[nn.Module, Any]:
    """Build the model, searchable or compact; with it its session, if it has one."""
    model = dlrm(world)
    if form == "compact":
        return es.apply(model, SizePlan.load(folder / "plan.json")), None
    return model, es.prepare(model, algorithm=es.Dnis(warm_up=3, lr=0.05), budget="40%")


def pipelined(model: nn.Module, optimizer: Any, batches: Iterator[Batch]) -> list[float]:
    """Train by TorchRec's pipeline, which traces the model."""
    pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"))
    return [float(pipeline.progress(batches)[0]) for _ in range(STEPS)]


def train_and_derive(
    model: nn.Module, optimizer: Any, session: Any, world: World, rank: int | None, loop: Loop = train
) -> dict[str, Any]:
    if session is not None:
        session.attach(optimizer, validation=list(batches(world, range(900, 903), rank)))
    losses = loop(model, optimizer, batches(world, range(STEPS), rank))
    if session is None:
        return {"losses": losses}
    plan = session.derive()
    return {"losses": losses, "gates": session.gates, "plan": str(plan), "bytes": plan.size_bytes}


def sharded(model: nn.Module, sharding: str, weights: dict[str, torch.Tensor]) -> DistributedModelParallel:
    """Shard the collections inside and give them the unsharded run's weights: on a CPU, TorchRec draws new ones."""
    plan = {}
    for path, module in model.named_modules():
        if type(module) is EmbeddingBagCollection:
            ways = {
                config.name: table_wise(index % PROCESSES, compute_kernel="fused")
                if sharding == "table-wise"
                else row_wise(compute_kernel="fused")
                for index, config in enumerate(module.embedding_bag_configs())
            }
            plan[path] = construct_module_sharding_plan(
                module, ways, sharder=RowWiseToo(), world_size=PROCESSES, local_size=PROCESSES, device_type="cpu"
            )
            apply_optimizer_in_backward(torch.optim.SGD, module.parameters(), {"lr": LR})
    parallel = DistributedModelParallel(model, device=torch.device("cpu"), plan=ShardingPlan(plan), sharders=[RowWiseToo()])
    assert any(isinstance(module, ShardedEmbeddingBagCollection) for module in parallel.modules())
    state = parallel.state_dict()
    assert set(state) == set(weights)
    for key, value in state.items():
        for shard in value.local_shards() if hasattr(value, "local_shards") else ():
            (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            shard.tensor.copy_(weights[key][row : row + rows, column : column + columns])
    return parallel


def process(rank: int, world: str, form: str, sharding: str, loop: Loop, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(PROCESSES), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    model, session = built(WORLDS[world], form, folder)
    parallel = sharded(model, sharding, dict(model.state_dict()))
    dense = [p for name, p in parallel.named_parameters() if "embedding_bags" not in name]
    assert session is None or es.session(parallel) is session
    result = train_and_derive(parallel, torch.optim.SGD(dense, lr=LR), session, WORLDS[world], rank, loop)
    losses = torch.tensor(result["losses"])
    dist.all_reduce(losses)
    if rank == 0:
        write_state(folder / "result", {**result, "losses": (losses / PROCESSES).tolist()})
    if session is not None:
        with pytest.raises(es.EmbsearchError, match="a sharded model cannot be rewritten in place"):
            session.compact(session.derive())
        with pytest.raises(es.EmbsearchError, match="must be whole on every process, and they are sharded"):
            session.merged_weight(0)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive the interpreter and abort it


@pytest.mark.slow
@pytest.mark.parametrize("world", ["one id", "mean"])
@pytest.mark.parametrize("sharding", ["table-wise", "row-wise"])
def test_sharded_runs_agree_with_the_unsharded_run(world: str, sharding: str, tmp_path: Path) -> None:
    _agree(world, sharding, train, tmp_path)


@pytest.mark.slow
def test_pipelined_runs_agree_with_the_unsharded_run(tmp_path: Path) -> None:
    _agree("one id", "table-wise", pipelined, tmp_path)


def _agree(world: str, sharding: str, loop: Loop, folder: Path) -> None:
    plan = _agrees(world, "searchable", sharding, loop, folder / "searchable")
    (folder / "compact").mkdir()
    plan.save(folder / "compact" / "plan.json")
    _agrees(world, "compact", sharding, loop, folder / "compact")


def _agrees(world: str, form: str, sharding: str, loop: Loop, folder: Path) -> SizePlan | None:
    folder.mkdir(exist_ok=True)
    model, session = built(WORLDS[world], form, folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    expected = train_and_derive(model, optimizer, session, WORLDS[world], None)
    mp.spawn(process, (world, form, sharding, loop, folder), nprocs=PROCESSES)
    got = read_state(folder / "result")
    for name in ("losses", "gates") if session else ("losses",):
        torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-5)
    if session is None:
        return None
    assert got["plan"] == expected["plan"]
    return session.derive()
