"""The spectral method: its bases and worths against slow references, and the plans that come of them."""

from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest
import torch
from support import PLAIN, WORLDS, Task, searched
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import embsearch_plugin as es
from embsearch_plugin.algorithms.spectral import SpectralSearch, _columns, _fisher
from embsearch_plugin.collection import Table
from embsearch_plugin.data.movielens import MovieLens1M, write_sample
from embsearch_plugin.data.ranking import ranking_batch
from embsearch_plugin.errors import AttachError
from embsearch_plugin.models.mf import Mf
from embsearch_plugin.models.neumf import NeuMf
from embsearch_plugin.plan import SizePlan
from embsearch_plugin.plugins import find_collections
from embsearch_plugin.run import row_frequencies
from embsearch_plugin.search.session import Session


def spectral(world: str = "one id", steps: int = 20, **options: Any) -> tuple[Task, Session]:
    model, session, _ = searched(WORLDS[world], steps, algorithm=es.Spectral(warm_up=3), **options)
    return model, session


def fisher(model: Task, session: Session, index: int) -> Tensor:
    """G of a table with one feature and bags of one id, example by example."""
    products = []
    for batch in session.validation_batches(16):
        output = model.collection(batch.sparse_features)
        values = output.values().detach().requires_grad_()
        logits = model.over(torch.cat([values, batch.dense_features], 1)).squeeze(-1)
        losses = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")
        for loss, example in zip(losses, range(len(losses)), strict=True):
            (gradient,) = torch.autograd.grad(loss, values, retain_graph=True)
            g = gradient[example, index * 8 : index * 8 + 8].double()
            products.append(torch.outer(g, g))
    return torch.stack(products).mean(0)


def quadratic_loss(session: Session, index: int, g: Tensor, kept: Tensor) -> float:
    """1/2 sum over i of p_i delta_i^T G delta_i, row by row, where ``kept`` (V, D) takes the place of the table."""
    counts = session.frequencies[index].double()
    total = 0.0
    for share, row, other in zip(counts / counts.sum(), session.merged_weight(index).double(), kept, strict=True):
        delta = row - other
        total += float(share * delta @ g @ delta) / 2
    return total


def kept_rows(session: Session, plan: SizePlan, index: int) -> Tensor:
    """A table's rows under a plan, float64 (V, D), from the fold and the plan's definition."""
    table, fold, weight = plan.tables[index], session.folds(plan)[index], session.merged_weight(index).double()
    dims = torch.zeros(table.table.rows, dtype=torch.int64)
    order = torch.arange(table.table.rows) if table.order is None else table.order.long()
    place = 0
    for block in table.blocks:
        dims[order[place : place + block.rows]] = int(block.dim)
        place += block.rows
    if fold.rotation is None or fold.projection is None:
        rank = torch.argsort(torch.tensor(table.columns or range(table.table.dim)))
        return weight * (rank[None] < dims[:, None])
    stored = weight @ fold.rotation.double() * (torch.arange(table.table.dim)[None] < dims[:, None])
    return stored @ fold.projection.double()


def test_the_new_basis_loses_nothing_by_itself() -> None:
    _, session = spectral()
    for fold in session.folds(session.derive(strict=False)):
        assert fold.rotation is not None and fold.projection is not None
        assert torch.allclose(fold.rotation @ fold.projection, torch.eye(8), atol=1e-4)
        assert torch.allclose(fold.projection.norm(dim=1), torch.ones(8), atol=1e-5)


def test_no_other_basis_of_the_same_dim_loses_less() -> None:
    """The quadratic loss is the least by Eckart and Young, and so below plain SVD's, the first columns', random directions'."""
    model, session = spectral(steps=60)
    torch.manual_seed(4)
    plan = session.derive(strict=False)
    for index in range(2):
        model.eval()
        g = fisher(model, session, index)
        values, vectors = torch.linalg.eigh(g)
        g = vectors * values.clamp(min=es.Spectral().floor * float(values[-1])) @ vectors.t()
        weight, fold = session.merged_weight(index).double(), session.folds(plan)[index]
        assert fold.rotation is not None and fold.projection is not None
        counts = session.frequencies[index].double()
        weighed = (counts / counts.sum()).sqrt()[:, None] * weight @ torch.linalg.cholesky(g)
        least = torch.linalg.svdvals(weighed).square() / 2
        for rank in (1, 2, 4):
            ours = weight @ fold.rotation[:, :rank].double() @ fold.projection[:rank].double()
            others = [torch.linalg.svd(weight, full_matrices=False).Vh[:rank], torch.eye(8, dtype=torch.float64)[:rank]]
            others += [torch.linalg.qr(torch.randn(8, rank, dtype=torch.float64)).Q.t() for _ in range(20)]
            losses = [quadratic_loss(session, index, g, weight @ q.t() @ q) for q in others]
            assert quadratic_loss(session, index, g, ours) == pytest.approx(float(least[rank:].sum()), rel=1e-3)
            assert float(least[rank:].sum()) <= min(losses)


def test_worth_is_what_the_quadratic_loss_says() -> None:
    """The worth that the knapsack saw, option by option: what a dim keeps is what the others would lose."""
    model, session = spectral()
    model.train()
    search = session.algorithm
    assert isinstance(search, SpectralSearch)
    for index, basis in enumerate(search._bases(session)):
        fold, weight, g = basis.fold, session.merged_weight(index).double(), basis.fisher
        assert fold.rotation is not None and fold.projection is not None
        for column in (0, 3, 7):
            kept = torch.ones(8, dtype=torch.float64)
            kept[column] = 0
            without = weight @ fold.rotation.double() * kept @ fold.projection.double()
            assert basis.rotated_worth.sum(0)[column] == pytest.approx(quadratic_loss(session, index, g, without), rel=1e-3)
            assert basis.own_worth.sum(0)[column] == pytest.approx(quadratic_loss(session, index, g, weight * kept), rel=1e-6)


def test_gradients_of_rows_give_the_fisher_matrix() -> None:
    """Batches of unequal sizes, one of a single example; the model in training mode, with batch norm and dropout."""
    model, session, optimizer = searched(PLAIN, 20, algorithm=es.Spectral(warm_up=3))
    session.detach()
    session.attach(optimizer, validation=[PLAIN.batch(size, seed=900 + size) for size in (32, 9, 1)])
    found = _fisher(session, 16)
    assert model.training
    model.eval()
    for index, matrix in enumerate(found):
        assert torch.allclose(matrix, fisher(model, session, index), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("config", [Mf(4), NeuMf(4)])
def test_the_fisher_matrix_of_candidates_is_that_of_examples_one_by_one(config: Mf | NeuMf, tmp_path: Path) -> None:
    write_sample(tmp_path, users=60, movies=40, ratings=2000)
    data = MovieLens1M(path=str(tmp_path), task="top-k").load()
    torch.manual_seed(0)
    model = config.build(data.schema)
    tables = {str(t): find_collections(model)[n].module.embedding_bags[t.name].weight for n, t in _tables(model)}
    for parameter in tables.values():
        torch.nn.init.normal_(parameter)
    session = es.prepare(model, algorithm=es.Spectral(), frequencies=row_frequencies(data, [t for _, t in _tables(model)], 64))
    batches = list(islice(data.apart().batches("validation", 16, seed=0), 2))
    session.attach(torch.optim.SGD(model.parameters(), lr=0.1), batches)
    session.derive("50%")
    found = dict(zip(map(str, session.specs), _fisher(session, 2), strict=True))
    expected, examples = {name: torch.zeros(p.shape[1], p.shape[1], dtype=torch.float64) for name, p in tables.items()}, 0
    model.eval()
    for batch in batches:
        users, items = (batch.sparse_features[key].values() for key in ("user", "movie"))
        for example in range(len(batch.labels)):
            bags = batch.candidates[example]
            mine = items[bags[bags >= 0]]
            alone = ranking_batch(data.schema, torch.stack([users[example], mine[0]])[None], mine[None, 1:])
            alone_loss = torch.nn.functional.binary_cross_entropy_with_logits(model.model(alone), alone.labels, reduction="sum")
            gradients = torch.autograd.grad(alone_loss / batch.labels.shape[1], list(tables.values()))
            for name, gradient in zip(tables, gradients, strict=True):  # no row is looked up twice
                expected[name] += gradient.double().t() @ gradient.double()
            examples += 1
    for name, g in found.items():
        assert torch.allclose(g, expected[name] / examples, rtol=1e-4, atol=1e-10), name


def _tables(model: nn.Module) -> list[tuple[int, Table]]:
    return [(number, table) for number, found in enumerate(find_collections(model)) for table in found.tables]


def test_the_mode_of_the_model_does_not_matter() -> None:
    model, session = spectral()
    plans, folds = [], []
    for mode in (True, False):
        model.train(mode)
        plans.append(session.derive().to_json())
        folds.append(session.folds(session.derive(strict=False)))
    assert plans[0] == plans[1]
    for one, other in zip(*folds, strict=True):
        assert one.rotation is not None and other.rotation is not None
        assert torch.equal(one.rotation, other.rotation)


def test_the_plan_is_the_best_there_is_within_the_budget() -> None:
    """Against every choice of basis and dims, for two tables of two blocks, by the worth they keep."""
    space = es.SearchSpace(row_blocks=(0.2, 0.8), column_chunks=2)
    _, session = spectral(space=space)
    search = session.algorithm
    assert isinstance(search, SpectralSearch)
    ways = [[_columns(basis, space, rotated=rotated) for rotated in (False, True)] for basis in search._bases(session)]
    every = [[(way, way.plan(dims)) for way in pair for dims in product((0, 4, 8), repeat=2)] for pair in ways]

    def worth(choice: Any) -> float:
        way, plan = choice
        sizes = dict(zip(range(2), way.table.blocks.sizes, strict=True))
        dims = [next(int(b.dim) for b in plan.blocks if b.rows == size or len(plan.blocks) == 1) for size in sizes.values()]
        return sum(float(row[:dim].sum()) for row, dim in zip(way.worth, dims, strict=True))

    for share in (0.2, 0.4, 0.7):
        limit = int(share * session.original_bytes)
        best = max(worth(a) + worth(b) for a in every[0] for b in every[1] if a[1].size_bytes + b[1].size_bytes <= limit)
        plan = session.derive(es.Budget(bytes=limit))
        chosen = [
            next(c for c in options if c[1].blocks == table.blocks and c[1].projection == table.projection)
            for options, table in zip(every, plan.tables, strict=True)
        ]
        assert sum(map(worth, chosen)) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_without_a_budget_little_is_lost(share: float) -> None:
    model, session, _ = searched(PLAIN, 20, algorithm=es.Spectral(warm_up=3, tolerance=share))
    plan = session.derive(strict=False)
    for index in range(2):
        g = fisher(model.eval(), session, index)
        lost = quadratic_loss(session, index, g, kept_rows(session, plan, index))
        everything = quadratic_loss(session, index, g, torch.zeros(session.specs[index].rows, 8))
        assert lost <= (share + 0.02) * everything
        assert everything > 0


@pytest.mark.parametrize(
    "settings", [{"batches": 0}, {"floor": 0.0}, {"floor": 2.0}, {"tolerance": 1.0}, {"tolerance": -0.1}, {"fine_tuning": 0.0}]
)
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(settings))} must be .*; got "):
        es.Spectral(**settings)


def test_fine_tuning_is_a_share_of_the_dense_training() -> None:
    assert [es.Spectral().fine_tuning_epochs(epochs) for epochs in (0, 3, 10)] == pytest.approx([0.0, 0.6, 2.0])
    assert es.Spectral(fine_tuning=100).fine_tuning_epochs(5) == 500


def test_an_empty_loader_is_named() -> None:
    _, session, _ = searched(PLAIN, algorithm=es.Spectral(warm_up=2))
    session.detach()
    session.attach([], validation=[])
    with pytest.raises(AttachError, match="no batch"):
        session.derive()


def test_a_batch_of_one_example_is_as_good_as_any() -> None:
    model, session, _ = searched(PLAIN, steps=4, algorithm=es.Spectral(warm_up=1))
    session.detach()
    session.attach([], validation=[PLAIN.batch(seed=1), PLAIN.batch(1, seed=2)])
    session.derive()
    assert all(module.training for module in model.modules())


def test_under_autocast_compact_tables_give_what_tables_give() -> None:
    model, session = spectral()
    batch = PLAIN.batch(seed=8).sparse_features
    model.eval()
    compact = session.compact(session.derive("30%"))
    assert any(table.projection is not None for table in compact.collection.index)
    plain = compact.collection(batch).values()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compact.collection(batch).values(), plain)


def test_gradient_checkpointing_changes_nothing() -> None:
    class Checkpointed(Task):
        def forward(self, batch: Any) -> Any:
            return checkpoint(super().forward, batch, use_reentrant=False)

    plain, plainly, _ = searched(PLAIN, algorithm=es.Spectral())
    model = Checkpointed(PLAIN.collection(), 16)
    session = es.prepare(model, algorithm=es.Spectral())
    model.eval().load_state_dict(plain.eval().state_dict())
    got, expected = (each.probe.row_gradients(PLAIN.batch(seed=5))[0] for each in (session, plainly))
    assert all(torch.allclose(a, b) for a, b in zip(got, expected, strict=True))


def test_rows_are_ranked_again_whenever_the_training_is_twice_as_long() -> None:
    _, session, _ = searched(PLAIN, steps=200, algorithm=es.Spectral())
    assert session.tables[0].blocks.order.equal(torch.argsort(session.frequencies[0], descending=True, stable=True).int())


def test_it_needs_validation_batches() -> None:
    session = es.prepare(Task(PLAIN.collection(), 16), algorithm=es.Spectral(), frequencies=[PLAIN.batch()])
    session.step(PLAIN.batch())
    with pytest.raises(es.EmbsearchError, match="spectral needs validation batches here: attach"):
        session.derive()


def test_a_trained_model_is_made_smaller_without_a_search_step() -> None:
    trained, _, _ = searched(PLAIN, steps=20, algorithm=es.Spectral())
    batches = [PLAIN.batch(seed=i) for i in range(3)]
    model = Task(PLAIN.collection(), 16)
    session = es.prepare(model, algorithm="spectral", budget="40%", frequencies=batches)
    model.load_state_dict(trained.state_dict())
    session.attach(torch.optim.Adam(model.parameters()), validation=batches)
    plan = session.derive()
    assert session.step_count == 0
    by_hand = es.prepare(Task(PLAIN.collection(), 16), algorithm="spectral", budget="40%", frequencies=batches)
    by_hand.model.load_state_dict(trained.state_dict())
    by_hand.attach([], validation=batches)
    by_hand.step(batches[0])
    assert plan.to_json() == by_hand.derive().to_json()
    assert sum(p.nbytes for p in session.compact(plan).collection.parameters()) <= plan.size_bytes


def test_where_nothing_was_trained_or_counted_there_is_no_plan() -> None:
    session = es.prepare(Task(PLAIN.collection(), 16), algorithm="spectral")
    session.attach([], validation=[PLAIN.batch()])
    with pytest.raises(es.EmbsearchError, match="no id was counted yet"):
        session.derive()
