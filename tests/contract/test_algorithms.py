"""What must hold for every algorithm, in every world. A newly registered algorithm is tested here by itself."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import (
    DEVICE,
    PLAIN,
    SEARCHES,
    WORLDS,
    Task,
    random_state,
    relative_error,
    searched,
    set_random_state,
    stored_bytes,
    task,
    train,
)
from torch import Tensor
from torch.optim import Optimizer

import embsearch_plugin as es
from embsearch_plugin.errors import BudgetError
from embsearch_plugin.files import read_state, write_state
from embsearch_plugin.plan import SizePlan
from embsearch_plugin.plugins import algorithms
from embsearch_plugin.ranges import Range
from embsearch_plugin.search.objective import move
from embsearch_plugin.search.session import Session

everywhere = pytest.mark.parametrize(("algorithm", "world"), [(algorithm, world) for algorithm in SEARCHES for world in WORLDS])


def run(algorithm: str, world: str = "one id", steps: int = 12, **options: object) -> tuple[Task, Session, Optimizer]:
    options.setdefault("budget", "60%")
    return searched(WORLDS[world], steps, algorithm=algorithms()[algorithm](warm_up=3), **options)


def state_of(model: Task, session: Session, optimizer: Optimizer) -> list[Tensor]:
    tensors = [*model.state_dict().values(), *session.gates]
    return [t.clone() for t in tensors + [v for s in optimizer.state.values() for v in s.values()]]


@pytest.mark.parametrize("algorithm", sorted(algorithms()))
def test_declared_ranges_are_of_fields_and_hold_what_these_take(algorithm: str) -> None:
    config = algorithms()[algorithm]
    for name, declared in config.ranges.items():
        for value in declared.ends if isinstance(declared, Range) else declared:
            assert getattr(config(**{name: value}), name) == value


@pytest.mark.parametrize("algorithm", sorted(algorithms()))
def test_what_an_algorithm_has_can_be_read_before_it_begins(algorithm: str) -> None:
    """Older pluggys read all of it, properties too, where a plugin is registered."""
    plugin = algorithms()[algorithm]().build()
    for name in dir(plugin):
        getattr(plugin, name)


@everywhere
@pytest.mark.parametrize("budget", ["60%", "52%"])
def test_the_derived_plan_keeps_the_budget_and_changes_nothing(algorithm: str, world: str, budget: str) -> None:
    model, session, optimizer = run(algorithm, world)
    before = state_of(model, session, optimizer)
    plan = session.derive(budget)
    assert plan.size_bytes <= es.Budget.of(budget).limit(session.original_bytes)
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(model, session, optimizer), strict=True))
    assert str(session.derive(budget)) == str(plan)


@everywhere
def test_without_a_budget_the_algorithms_own_rule_makes_a_plan(algorithm: str, world: str) -> None:
    model, session, optimizer = run(algorithm, world)
    before = state_of(model, session, optimizer)
    plan = session.derive(strict=False)
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(model, session, optimizer), strict=True))
    assert str(session.derive(strict=False)) == str(plan)
    session.compact(plan)
    assert stored_bytes(model) == plan.size_bytes


def kept(plan: SizePlan, index: int, width: int) -> Tensor:
    """Which of the columns in plan order each row keeps, bool (V, width): read off the plan's definition."""
    table = plan.tables[index]
    mask = torch.zeros(table.table.rows, width, dtype=torch.bool)
    order = range(table.table.rows) if table.order is None else table.order.tolist()
    place = 0
    for block in table.blocks:
        for row in list(order)[place : place + block.rows]:
            mask[row, : int(block.dim)] = True
        place += block.rows
    return mask


def rows_under(session: Session, plan: SizePlan, index: int) -> tuple[Tensor, Tensor]:
    """A table's rows as the model sees them under the plan, (V, D), and what is added to every bag, (D,)."""
    table = plan.tables[index]
    fold, merged = move((session.folds(plan)[index], session.merged_weight(index)), torch.device("cpu"))
    rows, bias = torch.zeros(table.table.rows, table.table.dim), torch.zeros(table.table.dim)
    if table.mask is not None:
        return merged * table.mask, bias
    if not table.width:
        return rows, bias
    columns = torch.tensor(table.columns or range(merged.shape[1])) if fold.columns is None else fold.columns
    stored = merged[:, columns] if fold.rotation is None else merged @ fold.rotation
    stored = stored[:, : table.width] * kept(plan, index, table.width)
    if table.projection:
        assert fold.projection is not None
        rows = stored @ fold.projection[: table.width]
    else:
        rows[:, torch.tensor(table.columns or range(table.table.dim))[: table.width]] = stored
    return rows, bias if fold.bias is None else fold.bias


@everywhere
def test_the_compact_model_equals_the_gated_one_under_the_plan(algorithm: str, world: str) -> None:
    model, session, _ = run(algorithm, world)
    plan = session.derive("55%")
    original, bias = WORLDS[world].collection(), []
    for index, spec in enumerate(session.specs):
        rows, added = rows_under(session, plan, index)
        original.embedding_bags[spec.name].weight.data.copy_(rows)
        bias += [added] * len(spec.features)
    features = WORLDS[world].features(60, seed=500)
    session.compact(plan)
    for training in (True, False):
        model.train(training)
        got, expected = model.collection(features), original.train(training)(features)
        assert (got.keys(), got.length_per_key()) == (expected.keys(), expected.length_per_key())
        difference = relative_error(got.values(), expected.values() + torch.cat(bias).to(DEVICE))
        assert difference <= (1e-3 if world == "half" else 1e-5)


@everywhere
def test_the_compact_model_has_the_planned_bytes_and_trains_on(algorithm: str, world: str) -> None:
    model, session, optimizer = run(algorithm, world)
    plan = session.derive("55%")
    assert session.compact(plan) is model
    assert stored_bytes(model) == plan.size_bytes
    losses = train(model, optimizer, (WORLDS[world].batch(seed=i) for i in range(3)))
    assert all(map(math.isfinite, losses))
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(es.EmbsearchError, match="no search"):
        es.session(model)


@pytest.mark.parametrize("algorithm", SEARCHES)
def test_a_plan_applied_to_a_fresh_model_has_the_same_shape(algorithm: str, tmp_path: Path) -> None:
    model, session, _ = run(algorithm)
    plan = session.derive()
    session.compact(plan)
    es.save(model, plan, tmp_path)
    loaded = es.load(tmp_path, task(PLAIN, seed=9))
    batch = PLAIN.batch(seed=33)
    assert torch.equal(model.eval()(batch)[0], loaded.eval()(batch)[0])
    applied = es.apply(task(PLAIN, seed=9), SizePlan.load(tmp_path / "plan.json"))
    assert stored_bytes(applied) == plan.size_bytes


@pytest.mark.parametrize("algorithm", SEARCHES)
def test_a_search_goes_on_from_a_checkpoint_in_a_new_process(algorithm: str, tmp_path: Path) -> None:
    model, session, optimizer = run(algorithm, steps=8)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "session": session.state_dict()}
    write_state(tmp_path / "state", {**state, "random": random_state()})
    train(model, optimizer, (PLAIN.batch(seed=i) for i in range(8, 16)))
    session.derive().save(tmp_path / "expected.json")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, __file__, algorithm, str(tmp_path)], check=True, timeout=120, env=environment)
    assert (tmp_path / "expected.json").read_text().replace("expected", "resumed") == (tmp_path / "resumed.json").read_text()


def resume(algorithm: str, folder: Path) -> None:
    """The other process of the test above: the search is taken up at step 8 and taken to step 16."""
    torch.set_num_threads(1)
    state = read_state(folder / "state")
    model, session, optimizer = run(algorithm, steps=0)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    session.load_state_dict(state["session"])
    set_random_state(state["random"])
    train(model, optimizer, (PLAIN.batch(seed=i) for i in range(8, 16)))
    session.derive().save(folder / "resumed.json")


@pytest.mark.parametrize("algorithm", SEARCHES)
def test_derive_before_any_search_step_is_an_error_but_where_one_step_says_it_all(algorithm: str) -> None:
    _, session, _ = run(algorithm, steps=1)
    if not session.config.trains:
        assert session.derive().size_bytes <= session.budget.limit(session.original_bytes)
        return
    with pytest.raises(es.EmbsearchError, match="needs at least one search step; 1 weight steps"):
        session.derive()


@pytest.mark.parametrize("algorithm", SEARCHES)
def test_a_budget_that_nothing_fits_is_an_error_or_an_empty_plan(algorithm: str) -> None:
    _, session, _ = run(algorithm)
    try:
        assert session.derive(es.Budget(bytes=1)).size_bytes <= 1
    except BudgetError as error:
        assert "Possible solutions" in str(error)
    assert session.derive("100%").size_bytes <= session.original_bytes


if __name__ == "__main__":
    resume(sys.argv[1], Path(sys.argv[2]))
