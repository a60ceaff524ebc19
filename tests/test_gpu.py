"""What a GPU must give: the CPU's answers, a run from a recipe, figures of the benchmark.

Most of what must hold on a GPU is what must hold on a CPU: ``pytest --device cuda tests/contract tests/supernet``.
"""

import copy
from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from support import SEARCHES, WORLDS, relative_error, searched, task
from torchrec.modules.embedding_modules import EmbeddingBagCollection

import embsearch_plugin as es
from embsearch_plugin.bench.memory import peak_bytes
from embsearch_plugin.bench.timing import model_steps
from embsearch_plugin.bench.workload import Workload
from embsearch_plugin.fused import FusedEmbeddingBags
from embsearch_plugin.plugins import algorithms
from embsearch_plugin.recipes import load_recipe
from embsearch_plugin.run import run
from embsearch_plugin.search.objective import move

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OPTIMIZERS = ["EXACT_SGD", "EXACT_ROWWISE_ADAGRAD", "EXACT_ADAGRAD"]  # the others run on a GPU only


def trained(plain: EmbeddingBagCollection, device: torch.device, optimizer: str, world: str) -> FusedEmbeddingBags:
    fused = {"optimizer": EmbOptimType[optimizer], "learning_rate": 0.05, "stochastic_rounding": False}
    bags = FusedEmbeddingBags(copy.deepcopy(plain).to(device), fused)
    for seed in range(3):
        bags(WORLDS[world].features(20, seed).to(device)).values().square().sum().backward()
    return bags


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("world", WORLDS)
def test_fused_tables_train_as_on_the_cpu(world: str, optimizer: str) -> None:
    plain = WORLDS[world].collection("cpu")
    here, there = (trained(plain, device, optimizer, world) for device in (CUDA, CPU))
    tolerance = 1e-2 if world == "half" else 1e-4
    for mine, theirs in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, atol=tolerance, rtol=tolerance)
    for table, state in there.optimizer_states().items():
        for name, tensor in state.items():
            mine = here.optimizer_states()[table][name].cpu()
            torch.testing.assert_close(mine, tensor, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("world", ["one id", "mean", "weighted", "shared feature", "unequal dims"])
@pytest.mark.parametrize("algorithm", SEARCHES)
def test_a_search_moved_to_a_gpu_yields_what_answers_alike_on_the_cpu(algorithm: str, world: str, tmp_path: Path) -> None:
    model, session, _ = searched(WORLDS[world], algorithm=algorithms()[algorithm](warm_up=3), budget="55%")
    model.to(CUDA)
    plan = session.derive()
    session.compact(plan)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"cuda"}
    es.save(model, plan, tmp_path)
    loaded = es.load(tmp_path, task(WORLDS[world], seed=9).to(CPU))
    batch = WORLDS[world].batch(seed=33)
    mine, theirs = (net.eval()(move(batch, device))[1][1].cpu() for net, device in ((model, CUDA), (loaded, CPU)))
    assert relative_error(mine, theirs) <= 1e-5


def test_a_recipe_runs_and_goes_on(tmp_path: Path) -> None:
    overrides = ["train.device=cuda", "train.epochs=2", "search.algorithm={name: dnis, warm_up: 2}", "data.examples=4000"]
    recipe = load_recipe(Path("recipes/demo.yaml"), overrides)
    metrics = run(recipe, tmp_path / "run")
    assert metrics["machine"]["gpu"] == torch.cuda.get_device_name()
    assert metrics["machine"]["clock"] == "wall clock"
    assert run(recipe, tmp_path / "run", resume=True)["cells"] == metrics["cells"]


def test_the_benchmark_measures_the_gpu() -> None:
    work = Workload(tables=3, rows=500, batch=32, device="cuda")
    assert all(0 < row.ratio < 1000 for row in model_steps(work, repeats=2))
    assert peak_bytes(work, search=True) > 0
