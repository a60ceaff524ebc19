"""Whether a search finds the truth: on planted data, a table's dim in the plan must follow its field's latent rank."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import embsearch_plugin as es
from embsearch_plugin.collection import Table
from embsearch_plugin.data.planted import Planted, PlantedDataset
from embsearch_plugin.recipes import load_recipe
from embsearch_plugin.training import decayed

RECIPE = load_recipe(Path(__file__).parents[2] / "recipes" / "planted_dlrm_dnis.yaml")
SPACE = RECIPE.search.algorithm.space(RECIPE.search.space)
SEEDS = (0, 1, 2)
EPOCHS = 3


@dataclass(frozen=True)
class Found:
    """What a plan says of the fields' ranks.

    Args:
        correlation: Spearman's, between the tables' dims (means over their rows) and the planted ranks.
        on_nothing: the largest dim of a field of rank zero.
    """

    correlation: float
    on_nothing: float

    @property
    def the_truth(self) -> bool:
        smallest = SPACE.dims(RECIPE.model.embedding_dim)[1]
        return self.correlation >= 0.8 and self.on_nothing <= smallest


def found(plan: es.SizePlan, data: PlantedDataset) -> Found:
    dims = np.array([table.n_params / table.table.rows for table in plan.tables])
    ranks = np.array(data.ranks)
    return Found(float(spearmanr(dims, ranks).statistic), float(dims[ranks == 0].max()))


def planted(seed: int) -> PlantedDataset:
    assert isinstance(RECIPE.data, Planted)
    return replace(RECIPE.data, seed=seed).load()


def searched(data: PlantedDataset, seed: int, epochs: int = EPOCHS) -> es.SizePlan:
    """Search as the recipe says, in a plain loop with its L2; ``seed`` is the model's and the batches'."""
    torch.manual_seed(seed)
    model, train = RECIPE.model.build(data.schema), RECIPE.train
    session = es.prepare(model, algorithm=RECIPE.search.algorithm, budget=RECIPE.search.budgets[0], space=SPACE, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=train.lr)
    session.attach(optimizer, data.batches("validation", train.batch_size, seed=seed))
    batches = data.batches("train", train.batch_size, seed=seed)
    with decayed(model, train.l2) as forward:
        for _ in range(epochs):
            for batch in batches:
                optimizer.zero_grad()
                loss, _ = forward(batch)
                loss.backward()
                optimizer.step()
    return session.derive()


def tables(data: PlantedDataset) -> list[Table]:
    dim = RECIPE.model.embedding_dim
    return [Table("", field.name, field.rows, dim, torch.float32, (field.name,)) for field in data.schema.fields]


def oracle(data: PlantedDataset, budget: str) -> es.SizePlan:
    return data.oracle_plan(tables(data), es.Budget.of(budget), SPACE)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_oracle_finds_the_planted_ranks_and_half_of_the_bytes_are_just_enough(seed: int) -> None:
    data = planted(seed)
    plan = oracle(data, RECIPE.search.budgets[0])
    assert found(plan, data).correlation > 0.9
    assert found(plan, data).on_nothing == 0
    assert 0.97 < plan.size_bytes / es.Budget.of(RECIPE.search.budgets[0]).limit(plan.original_bytes) <= 1


@pytest.mark.parametrize("seed", SEEDS)
def test_the_oracle_still_finds_them_where_a_quarter_of_the_bytes_cuts_the_ranks_themselves(seed: int) -> None:
    data = planted(seed)
    assert found(oracle(data, "25%"), data).correlation > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_dnis_finds_the_planted_ranks(seed: int) -> None:
    data = planted(seed)
    assert found(searched(data, seed), data).the_truth


@pytest.mark.slow
def test_dnis_finds_no_ranks_in_labels_that_say_nothing() -> None:
    """The same search on labels dealt anew: what finds the ranks is in the labels, and the test above can fail."""
    data = planted(0)
    data.labels = data.labels[torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(0))]
    assert not found(searched(data, 0, epochs=1), data).the_truth
