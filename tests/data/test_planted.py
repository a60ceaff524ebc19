from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from torch import Tensor
from torchrec.datasets.utils import Batch

from embsearch_plugin.budget import Budget
from embsearch_plugin.collection import Table
from embsearch_plugin.data.planted import DENSE_SHARE, Planted, PlantedDataset, _worths, interactions
from embsearch_plugin.errors import DataError
from embsearch_plugin.space import SearchSpace


def auc(labels: Tensor, scores: Tensor) -> float:
    """Return the chance that a positive scores above a negative (Mann and Whitney)."""
    positives = int(labels.sum())
    ranks = rankdata(scores)[labels.numpy() > 0].sum()
    return (ranks - positives * (positives + 1) / 2) / (positives * (len(labels) - positives))


@pytest.fixture(scope="module")
def data() -> PlantedDataset:
    return Planted(examples=50_000).load()


def test_shape_is_criteos(data: PlantedDataset) -> None:
    assert data.ids.shape == (50_000, 26)
    assert data.dense.shape == (50_000, 13)
    assert [len(x) for x in data.splits.values()] == [40_000, 5_000, 5_000]
    assert [field.rows for field in data.schema.fields] == [100] * 26
    assert (data.ids.dtype, data.dense.dtype, data.labels.dtype) == (torch.int32, torch.float32, torch.float32)
    assert data.ids.min() == 0
    assert data.ids.max() == 99


def test_ranks_and_rows_are_dealt_to_the_fields_in_turn() -> None:
    data = Planted(examples=10, fields=5, rows=(7, 9), ranks=(3, 0)).load()
    assert data.ranks == (3, 0, 3, 0, 3)
    assert [tuple(u.shape) for u in data.latents] == [(7, 3), (9, 0), (7, 3), (9, 0), (7, 3)]
    assert [field.rows for field in data.schema.fields] == [7, 9, 7, 9, 7]


@given(
    ranks=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    chunk=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_interactions_equal_the_sum_over_all_pairs(ranks: list[int], chunk: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    latents = [torch.from_numpy(rng.standard_normal((6, rank))) for rank in ranks]
    ids = torch.from_numpy(rng.integers(6, size=(10, len(ranks))))
    expected = [
        sum(
            float(latents[f][row[f]][:width] @ latents[g][row[g]][:width])
            for f in range(len(ranks))
            for g in range(f + 1, len(ranks))
            for width in [min(ranks[f], ranks[g])]
        )
        for row in ids
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embsearch_plugin.data.planted.CHUNK", chunk)
        np.testing.assert_allclose(interactions(latents, ids), expected, atol=1e-9)


def test_logits_are_interactions_and_a_linear_part(data: PlantedDataset) -> None:
    expected = interactions(data.latents, data.ids) + data.dense.double() @ data.dense_weights
    torch.testing.assert_close(data.logits, expected)


def frequencies(rows: int, ids: Tensor) -> np.ndarray:
    """Return zipf's probabilities, in the order of the ids' counts."""
    p = np.arange(1, rows + 1) ** -1.05
    return (p / p.sum())[rankdata(-np.bincount(ids, minlength=rows), method="ordinal") - 1]


def test_every_direction_of_every_field_carries_the_same_energy() -> None:
    # Few rows and many examples, so that the order of the counts is the order of the probabilities.
    data = Planted(examples=200_000, rows=(12,), ranks=(0, 1, 2, 4), signal=1.5).load()
    spread = []
    for rank, latent, ids in zip(data.ranks, data.latents, data.ids.t(), strict=True):
        p = frequencies(12, ids)
        np.testing.assert_allclose(p @ latent.numpy(), np.zeros(rank), atol=1e-9)
        covariance = latent.numpy().T @ (p[:, None] * latent.numpy())
        np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-9)
        spread.append(np.pad(np.diag(covariance), (0, 4 - rank)))
    total = np.array(spread)
    meets_others = total * (total.sum(0) - total)  # the variance of u_fk times the sum of all other u_gk
    nonzero = meets_others[total > 0]
    np.testing.assert_allclose(nonzero, nonzero[0])
    assert len(nonzero) == sum(data.ranks)
    assert np.isclose(meets_others.sum() / 2, 1.5**2 * (1 - DENSE_SHARE))


def test_logits_have_the_asked_for_spread() -> None:
    for signal in (0.5, 2.0):
        assert Planted(signal=signal, examples=50_000).load().logits.std().item() == pytest.approx(signal, rel=0.03)


def test_the_best_possible_auc_leaves_room_on_both_sides(data: PlantedDataset) -> None:
    assert 0.83 < auc(data.labels, data.logits) < 0.86


def test_labels_follow_the_logits(data: PlantedDataset) -> None:
    chance = data.logits.sigmoid()
    for low in np.arange(0, 1, 0.1):
        among = (chance >= low) & (chance < low + 0.1)
        assert data.labels[among].mean().item() == pytest.approx(chance[among].mean().item(), abs=0.03)


def test_ids_are_zipf_distributed_and_not_sorted_by_frequency(data: PlantedDataset) -> None:
    expected = np.arange(1, 101) ** -1.05
    expected = 50_000 * expected / expected.sum()
    for ids in data.ids.t():
        counts = np.bincount(ids, minlength=100)
        np.testing.assert_allclose(np.sort(counts)[::-1], expected, rtol=0.35)
        assert not np.array_equal(np.argsort(-counts), np.arange(100))


def test_a_field_of_rank_zero_says_nothing(data: PlantedDataset) -> None:
    changed = data.ids.clone()
    changed[:, [f for f, rank in enumerate(data.ranks) if rank == 0]] = 0
    assert torch.equal(interactions(data.latents, changed), interactions(data.latents, data.ids))


def test_equal_configs_give_equal_data_whatever_the_global_seed() -> None:
    first = Planted(examples=500, seed=5).load()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again, other = Planted(examples=500, seed=5).load(), Planted(examples=500, seed=6).load()
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("dense", "ids", "labels", "logits"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert torch.equal(first.splits["test"], again.splits["test"])
    assert not torch.equal(first.ids, other.ids)


def test_without_ranks_only_the_numbers_matter() -> None:
    data = Planted(examples=500, fields=3, ranks=(0,)).load()
    torch.testing.assert_close(data.logits, data.dense.double() @ data.dense_weights)


def test_a_largest_rank_of_one_field_alone_is_refused() -> None:
    with pytest.raises(DataError, match="at least two fields, got 4 once"):
        Planted(fields=4, ranks=(1, 2, 2, 4)).load()


def test_more_rank_than_rows_is_refused() -> None:
    with pytest.raises(DataError, match="'cat_1' must have more rows than its rank, got 4 and 4"):
        Planted(fields=4, rows=(5, 4), ranks=(4,)).load()


def learnt_auc(data: PlantedDataset, dims: Sequence[int]) -> float:
    """Train a factorization machine whose table of field f has dims[f] columns; return its AUC on validation."""
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(field.rows, max(dims), generator=generator).mul_(0.3) for field in data.schema.fields]
    kept = [(torch.arange(max(dims)) < dim).float() for dim in dims]
    optimizer = torch.optim.Adam([table.requires_grad_() for table in tables], lr=0.03)

    def logits(batch: Batch) -> Tensor:
        ids = batch.sparse_features.values().reshape(len(dims), -1).t()
        pairs = interactions([table * mask for table, mask in zip(tables, kept, strict=True)], ids)
        return pairs + batch.dense_features @ data.dense_weights.float()

    batches = data.batches("train", 500, seed=0)
    for _ in range(5):
        for batch in batches:
            optimizer.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(logits(batch), batch.labels).backward()
            optimizer.step()
    (held_out,) = data.batches("validation", len(data.labels))
    return auc(held_out.labels, logits(held_out).detach())


def test_the_planted_ranks_are_the_dims_that_are_needed() -> None:
    data = Planted(examples=30_000, fields=8, rows=(20,), ranks=(0, 1, 2, 4)).load()
    best = learnt_auc(data, data.ranks)
    assert best > auc(data.labels, data.logits) - 0.02
    assert best > learnt_auc(data, [4] * 8)
    for rank in (1, 2, 4):
        assert best > learnt_auc(data, [dim - (dim == rank) for dim in data.ranks]) + 0.02


def specs(data: PlantedDataset, dim: int) -> list[Table]:
    return [Table("", field.name, field.rows, dim, torch.float32, (field.name,)) for field in data.schema.fields]


def lost_variance(data: PlantedDataset, field: int, rows: Sequence[int], column: int) -> float:
    """The variance of what a logit loses when some rows of a field's column become zero."""
    cut = [latent.clone() for latent in data.latents]
    cut[field][rows, column] = 0
    return float((interactions(data.latents, data.ids) - interactions(cut, data.ids)).var())


def test_the_oracle_values_a_pair_by_the_variance_of_the_logit_that_it_carries() -> None:
    data = Planted(examples=100_000, fields=4, rows=(12,), ranks=(0, 2, 4, 4)).load()
    shares = [torch.bincount(column, minlength=12) / len(data.ids) for column in data.ids.t()]
    worths = _worths(data.latents, shares, width=6)
    assert [worth.shape for worth in worths] == [(12, 6)] * 4
    for field, rank in enumerate(data.ranks):
        assert not worths[field][:, rank:].any()
        for column in range(rank):
            expected = lost_variance(data, field, range(12), column)
            assert float(worths[field][:, column].sum()) == pytest.approx(expected, rel=0.05)
    expected = lost_variance(data, 2, [3, 7], 1)
    assert float(worths[2][[3, 7], 1].sum()) == pytest.approx(expected, rel=0.1)


def test_an_oracle_with_enough_bytes_keeps_the_ranks_and_no_more() -> None:
    data = Planted(examples=20_000, rows=(20,), ranks=(0, 1, 2, 4), fields=8).load()
    plan = data.oracle_plan(specs(data, 8), Budget.of("100%"), SearchSpace(align=1, column_chunks=8))
    assert tuple(table.width for table in plan.tables) == data.ranks
    assert plan.n_params == 20 * sum(data.ranks)


def test_an_oracle_with_fewer_bytes_keeps_the_frequent_rows() -> None:
    data = Planted(examples=20_000, fields=6, rows=(200,), ranks=(0, 4)).load()
    plan = data.oracle_plan(specs(data, 4), Budget.of("40%"), SearchSpace(row_blocks=2))
    assert plan.size_bytes <= 0.4 * plan.original_bytes
    assert any(table.order is not None for table in plan.tables)
    for table, ids in zip(plan.tables, data.ids.t(), strict=True):
        if table.order is not None:
            most = torch.bincount(ids, minlength=200).argsort(descending=True, stable=True)
            assert torch.equal(table.order.long(), most[:100])


def test_an_oracle_needs_room_for_the_largest_rank() -> None:
    data = Planted(examples=100, fields=2, rows=(9,), ranks=(4,)).load()
    with pytest.raises(DataError, match="at least as wide as the largest rank, got 3 and 4"):
        data.oracle_plan(specs(data, 3), Budget.of("100%"), SearchSpace(align=1))
    with pytest.raises(DataError, match="one table for each of the 2 fields, got 1"):
        data.oracle_plan(specs(data, 4)[:1], Budget.of("100%"), SearchSpace())
