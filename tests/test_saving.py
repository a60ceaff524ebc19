"""Plans on fresh models, and compact models in files: what else a model is stays as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from support import DEVICE, PLAIN, Task, searched, tables_of, task
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

import embsearch_plugin as es
from embsearch_plugin.errors import PlanError, UnsupportedCollection
from embsearch_plugin.plan import SizePlan, TablePlan
from embsearch_plugin.plugins import find_collections


class Tied(Task):
    """Two layers with one weight."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__(collection, 16)
        device = next(collection.parameters()).device
        self.a, self.b = nn.Linear(3, 3, device=device), nn.Linear(3, 3, device=device)
        self.b.weight = self.a.weight


@pytest.mark.parametrize("way", ["apply", "apply without gradients", "load", "load on meta"])
def test_tables_marked_for_an_optimizer_in_the_backward_go_on_being_trained(way: str, tmp_path: Path) -> None:
    _, session, _ = searched(PLAIN)
    plan = session.derive()
    es.save(session.compact(plan), plan, tmp_path)
    with torch.device("meta" if way == "load on meta" else DEVICE):
        model = Task(PLAIN.collection("meta"), 16) if way == "load on meta" else task(PLAIN)
    first, second = model.collection.parameters()
    apply_optimizer_in_backward(torch.optim.SGD, [first], {"lr": 0.1})
    apply_optimizer_in_backward(RowWiseAdagrad, [second], {"lr": 0.2})
    with torch.set_grad_enabled(way != "apply without gradients"):
        model = es.load(tmp_path, model) if "load" in way else es.apply(model, plan)
    marks = {name.rpartition("#")[0]: p for name, p in model.collection.chunks.embedding_bags.named_parameters()}
    assert {name: (p._optimizer_classes, p._optimizer_kwargs) for name, p in marks.items()} == {
        "t0": ([torch.optim.SGD], [{"lr": 0.1}]),
        "t1": ([RowWiseAdagrad], [{"lr": 0.2}]),
    }
    before = tables_of(model)
    model(PLAIN.batch())[0].backward()
    after = model.collection.parameters()
    assert all(not torch.equal(old, new) and new.grad is None for old, new in zip(before, after, strict=True))


def test_a_plan_is_not_applied_to_weights_that_are_tied_to_something_outside() -> None:
    plan = searched(PLAIN)[1].derive()
    model = task(PLAIN)
    model.out = nn.Linear(8, 300)
    model.out.weight = model.collection.embedding_bags["t1"].weight
    with pytest.raises(UnsupportedCollection, match=r"'out\.weight' is the same parameter as 'embedding_bags\.t1\.weight'"):
        es.apply(model, plan)
    assert type(model.collection) is EmbeddingBagCollection


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("device", ["meta", None])
def test_what_is_loaded_is_tied_and_frozen_as_the_model_was(device: str | None, fine: bool, tmp_path: Path) -> None:
    def build(device: str | None = None) -> Tied:
        with torch.device(device or DEVICE):
            model = Tied(PLAIN.collection(device))
        model.collection.embedding_bags["t0"].weight.requires_grad_(False)
        model.a.bias.requires_grad_(False)
        return model

    plan = searched(PLAIN, algorithm=es.Dnis(warm_up=2, fine_grained=fine))[1].derive()
    model = es.apply(build(), plan)
    es.save(model, plan, tmp_path)
    loaded = es.load(tmp_path, build(device))
    assert loaded.a.weight is loaded.b.weight
    expected = {name: (p.requires_grad, p.tolist()) for name, p in model.named_parameters(remove_duplicate=False)}
    got = {name: (p.requires_grad, p.tolist()) for name, p in loaded.named_parameters(remove_duplicate=False)}
    assert got == expected
    assert {trained for trained, _ in got.values()} == {True, False}


@pytest.mark.parametrize("fused", [None, {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.05}])
@pytest.mark.parametrize("other", ["20%", "100%"])
def test_a_model_is_saved_with_its_own_plan_only(other: str, fused: Any, tmp_path: Path) -> None:
    _, session, _ = searched(PLAIN, fused=fused)
    plan, another = session.derive("40%"), session.derive(other)
    model = session.compact(plan)
    with pytest.raises(PlanError, match="'collection' does not store the rows and columns of this plan"):
        es.save(model, another, tmp_path)
    assert not list(tmp_path.iterdir())
    es.save(model, plan, tmp_path)


def plans_of_as_many_rows() -> list[SizePlan]:
    specs = find_collections(task(PLAIN))[0].tables
    plans = []
    for seed in (1, 2):
        order = [torch.randperm(s.rows, generator=torch.Generator().manual_seed(seed)).int() for s in specs]
        tables = [TablePlan.nested(s, [8, 0], o.tensor_split(2)) for s, o in zip(specs, order, strict=True)]
        plans.append(SizePlan(tuple(tables)))
    return plans


def test_nor_with_a_plan_that_keeps_other_rows_of_as_many(tmp_path: Path) -> None:
    plans = plans_of_as_many_rows()
    with pytest.raises(PlanError, match="'collection' does not store"):
        es.save(es.apply(task(PLAIN), plans[0]), plans[1], tmp_path)


def test_a_save_that_ended_between_its_files_is_noticed(tmp_path: Path) -> None:
    """It was to replace an older one, of a plan that keeps as many rows."""
    older, newer = plans_of_as_many_rows()
    es.save(es.apply(task(PLAIN), newer), newer, tmp_path)
    older.save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="are of two plans, as where a save was interrupted"):
        es.load(tmp_path, task(PLAIN))


def test_a_compiled_model_is_saved_as_what_it_was_made_of(tmp_path: Path) -> None:
    plan = searched(PLAIN)[1].derive()
    model = es.apply(task(PLAIN), plan)
    es.save(torch.compile(model, backend="eager"), plan, tmp_path)
    assert torch.equal(es.load(tmp_path, task(PLAIN, seed=1)).eval()(PLAIN.batch())[0], model.eval()(PLAIN.batch())[0])


def test_a_model_in_a_wrapper_is_refused_with_the_way_out(tmp_path: Path) -> None:
    plan = searched(PLAIN)[1].derive()
    wrapper = nn.Module()
    wrapper.module = es.apply(task(PLAIN), plan)
    with pytest.raises(PlanError, match=r"'collection' of the plan is 'module\.collection' here.*\n.*es\.save\(model\.module"):
        es.save(wrapper, plan, tmp_path)


def test_a_weight_that_is_not_contiguous_is_saved(tmp_path: Path) -> None:
    plan = searched(PLAIN)[1].derive()
    models = []
    for seed in (0, 1):
        models.append(task(PLAIN, seed=seed))
        models[-1].extra = nn.Parameter(torch.randn(4, 3, device=DEVICE).t())
    es.save(es.apply(models[0], plan), plan, tmp_path)
    assert torch.equal(es.load(tmp_path, models[1]).extra, models[0].extra)


def test_a_load_that_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    plan = searched(PLAIN)[1].derive()
    saved = es.apply(task(PLAIN), plan)
    es.save(saved, plan, tmp_path)
    weights = (tmp_path / "model.safetensors").rename(tmp_path / "elsewhere")
    model = task(PLAIN, seed=1)
    with pytest.raises(PlanError, match="cannot read"):
        es.load(tmp_path, model)
    weights.rename(tmp_path / "model.safetensors")
    assert torch.equal(es.load(tmp_path, model).eval()(PLAIN.batch())[0], saved.eval()(PLAIN.batch())[0])
