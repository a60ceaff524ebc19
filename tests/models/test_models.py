"""The project's own models: each against a slow reference, trained, searched and rewritten."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import stored_bytes, train
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM, DLRMTrain, InteractionArch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

import embsearch_plugin as es
from embsearch_plugin.data.dataset import Collate, Field, Schema
from embsearch_plugin.data.ranking import RankingBatch, ranking_batch
from embsearch_plugin.errors import ModelError
from embsearch_plugin.models import CONFIGS
from embsearch_plugin.models.fm import Fm
from embsearch_plugin.models.mf import Mf
from embsearch_plugin.models.mlp import Mlp
from embsearch_plugin.models.neumf import NeuMf
from embsearch_plugin.models.torchrec_own import DeepFm, Dlrm
from embsearch_plugin.models.wide_deep import WideDeep
from embsearch_plugin.tasks import CLICK, RATING, TASKS, TOP_K, Task

FIELDS = (Field("user", 50), Field("age", 7), Field("movie", 40), Field("year", 9))
ITEMS = ("movie", "year")
DIM = 8
MODELS = {
    "mf": Mf(DIM),
    "mlp": Mlp(DIM, (12, 6)),
    "neumf": NeuMf(DIM),
    "neumf of one dim": NeuMf(DIM, mlp_factor=1),
    "fm": Fm(DIM),
    "wide_deep": WideDeep(DIM, (12, 6)),
}


def schema_of(task: Task) -> Schema:
    if task is TOP_K:
        return Schema((FIELDS[0], FIELDS[2]), (), ("movie",), task)
    return Schema(FIELDS, ("price", "hour"), ITEMS, task)


def batch_of(schema: Schema, size: int = 16) -> Batch:
    ids = torch.stack([torch.randint(field.rows, (size,)) for field in schema.fields], dim=1)
    if schema.task is TOP_K:
        return ranking_batch(schema, ids, torch.randperm(schema.fields[1].rows)[:4])
    labels = torch.randint(2, (size,)) if schema.task is CLICK else torch.randint(1, 6, (size,))
    return Collate(schema, size)(torch.randn(size, len(schema.dense)), ids, labels.float())


def build(config: Any, task: Task) -> nn.Module:
    """Build a model; what starts at zero is moved away from it, so that it counts."""
    model = config.build(schema_of(task))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


# References: one example at a time, by its ids and numbers, from the weights as saved.

Example = tuple[dict[str, int], Tensor]


def examples_of(schema: Schema, batch: Batch) -> list[list[Example]]:
    """Each example's pairs of user and item: one, or one for each candidate."""
    bags = {name: jagged.to_dense() for name, jagged in batch.sparse_features.to_dict().items()}
    if isinstance(batch, RankingBatch):
        rows = batch.candidates.clamp(min=0).tolist()
        return [
            [({"user": int(bags["user"][b]), "movie": int(bags["movie"][bag])}, torch.zeros(0)) for bag in row]
            for b, row in enumerate(rows)
        ]
    ids = [{field.name: int(bags[field.name][b]) for field in schema.fields} for b in range(len(batch.labels))]
    return [[pair] for pair in zip(ids, batch.dense_features, strict=True)]


class Weights:
    """A model's weights by name, and what can be read off them one example at a time."""

    def __init__(self, model: nn.Module, schema: Schema) -> None:
        self.state, self.schema = model.model.state_dict(), schema

    def row(self, where: str, field: str, ids: dict[str, int]) -> list[float]:
        table = self.state[f"{where}.collection.embedding_bags.t_{field}.weight"]
        return table[ids[field]].tolist()

    def side(self, where: str, ids: dict[str, int], item: bool) -> list[float]:
        names = [field.name for field in self.schema.fields if (field.name in self.schema.items) == item]
        joined = [entry for name in names for entry in self.row(f"{where}.lookup", name, ids)]
        if len(names) == 1:
            return joined
        return self.affine(f"{where}.map_{'item' if item else 'user'}", joined)

    def affine(self, where: str, inputs: list[float]) -> list[float]:
        weight, bias = self.state[f"{where}.weight"].tolist(), self.state.get(f"{where}.bias", torch.zeros(10_000)).tolist()
        return [sum(w * x for w, x in zip(row, inputs, strict=True)) + b for row, b in zip(weight, bias, strict=False)]

    def perceptron(self, where: str, inputs: list[float], layers: int) -> list[float]:
        for layer in range(layers):
            inputs = [max(x, 0) for x in self.affine(f"{where}.{2 * layer}", inputs)]
        return inputs

    def mf(self, ids: dict[str, int], _: Tensor) -> float:
        user, item = self.side("mf", ids, item=False), self.side("mf", ids, item=True)
        return sum(u * i for u, i in zip(user, item, strict=True)) + float(self.state["bias"])

    def neumf(self, ids: dict[str, int], _: Tensor) -> float:
        product = [u * i for u, i in zip(self.side("mf", ids, item=False), self.side("mf", ids, item=True), strict=True)]
        deep = self.perceptron("layers", self.side("mlp", ids, item=False) + self.side("mlp", ids, item=True), 3)
        return self.affine("output", product + deep)[0]

    def mlp(self, ids: dict[str, int], numbers: Tensor, where: str = "") -> float:
        inputs = [entry for field in self.schema.fields for entry in self.row(f"{where}lookup", field.name, ids)]
        return self.affine(f"{where}output", self.perceptron(f"{where}layers", inputs + numbers.tolist(), 2))[0]

    def linear(self, where: str, ids: dict[str, int], numbers: Tensor) -> float:
        weights = [self.row(f"{where}.lookup", field.name, ids)[0] for field in self.schema.fields]
        products = [float(w * x) for w, x in zip(self.state[f"{where}.numbers"], numbers, strict=True)]
        return float(self.state[f"{where}.bias"]) + sum(weights) + sum(products)

    def fm(self, ids: dict[str, int], numbers: Tensor) -> float:
        rows = [self.row("factors", field.name, ids) for field in self.schema.fields]
        pairs = [(f, g) for f in range(len(rows)) for g in range(f)]
        return self.linear("linear", ids, numbers) + sum(a * b for f, g in pairs for a, b in zip(rows[f], rows[g], strict=True))

    def wide_deep(self, ids: dict[str, int], numbers: Tensor) -> float:
        return self.linear("wide", ids, numbers) + self.mlp(ids, numbers, "deep.")


@pytest.mark.parametrize("task", [RATING, TOP_K], ids=lambda task: task.name)
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_logits_equal_a_slow_reference(config: Any, task: Task) -> None:
    schema, model = schema_of(task), build(config, task)
    batch = batch_of(schema)
    reference: Callable[[dict[str, int], Tensor], float] = getattr(Weights(model, schema), config.name)
    expected = torch.tensor([[reference(*pair) for pair in pairs] for pairs in examples_of(schema, batch)])
    loss, (_, logits, labels) = model(batch)
    if isinstance(batch, RankingBatch):
        expected[batch.candidates < 0] = torch.finfo(torch.float32).min
    torch.testing.assert_close(logits, expected.view(labels.shape), rtol=1e-4, atol=1e-4)
    assert float(loss.detach()) == pytest.approx(float(task.objective(expected.view(labels.shape), labels)), rel=1e-4)


def test_an_accidental_hit_trains_nothing() -> None:
    schema, model = schema_of(TOP_K), build(Mf(DIM), TOP_K)
    table = model.model.mf.lookup.collection.embedding_bags["t_user"].weight
    pairs = torch.tensor([[3, 5], [4, 6]])
    sums = []
    for negatives in ([5, 9], [9]):  # 5 is the positive of user 3; the loss is a mean over all pairs, hits included
        loss, (_, logits, _) = model(ranking_batch(schema, pairs, torch.tensor(negatives)))
        (gradient,) = torch.autograd.grad(loss * logits.numel(), table)
        sums.append(gradient[3])
    torch.testing.assert_close(*sums)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_a_step_lowers_the_loss(config: Any, task: Task) -> None:
    model = config.build(schema_of(task))
    batch = batch_of(schema_of(task), 64)
    before, after = train(model, torch.optim.SGD(model.parameters(), lr=0.01), [batch, batch])
    assert after < before


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_a_model_is_searched_and_rewritten_within_the_budget(config: Any, task: Task) -> None:
    schema, model = schema_of(task), build(config, task)
    session = es.prepare(model, algorithm=es.Dnis(warm_up=2, lr=0.1), budget="40%")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    session.attach(optimizer, validation=[batch_of(schema)])
    train(model, optimizer, (batch_of(schema) for _ in range(6)))
    plan = session.derive()
    assert {block.dim for table in plan.tables for block in table.blocks if table.table.dim == 1} <= {0, 1}
    session.compact(plan)
    assert stored_bytes(model) == plan.size_bytes <= 0.4 * plan.original_bytes
    batch = batch_of(schema, 64)
    first, *_, last = train(model, optimizer, [batch] * 30)
    assert last < first


QUALITY = {"click": "auc", "rating": "mse", "top-k": "recall@1"}


@pytest.mark.parametrize("algorithm", ["nis", "autodim", "sam"])
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_every_searcher_takes_every_model(config: Any, task: Task, algorithm: str) -> None:
    """Tables of dim 1, beside wider ones, and of one width for factorization machines."""
    schema, model = schema_of(task), build(config, task)
    own = es.Nis(warm_up=2, group=8, quality=QUALITY[task.name]) if algorithm == "nis" else None
    dims = {"candidates": (2, 4), "maps": True, "every": 1}
    session = es.prepare(model, algorithm=own or {"autodim": es.AutoDim, "sam": es.Sam}[algorithm](**dims), budget="90%")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    session.attach(optimizer, validation=[batch_of(schema)])
    train(model, optimizer, (batch_of(schema) for _ in range(6)))
    plan = session.derive()
    session.compact(plan)
    assert stored_bytes(model) == plan.size_bytes <= 0.9 * plan.original_bytes
    batch = batch_of(schema, 64)
    first, *_, last = train(model, optimizer, [batch] * 30)
    assert last < first


SIMPLE = {
    "uniform": es.Uniform(),
    "random": es.Random(),
    "random by block": es.Random(by="block"),
    "mde": es.Mde(),
    "magnitude": es.Magnitude(warm_up=2),
    "spectral": es.Spectral(),
}


@pytest.mark.parametrize("algorithm", SIMPLE.values(), ids=SIMPLE)
@pytest.mark.parametrize("name", ["fm", "wide_deep"])
def test_tables_of_dim_1_are_in_every_baselines_plan(name: str, algorithm: Any) -> None:
    model = build(MODELS[name], CLICK)
    session = es.prepare(model, algorithm=algorithm, budget="60%", space=es.SearchSpace(align=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    session.attach(optimizer, validation=[batch_of(schema_of(CLICK), 64)])
    train(model, optimizer, (batch_of(schema_of(CLICK)) for _ in range(6)))
    plan = session.derive()
    narrow = [block.dim for table in plan.tables if table.table.dim == 1 for block in table.blocks]
    assert narrow and set(narrow) <= {0, 1}
    session.compact(plan)
    assert stored_bytes(model) == plan.size_bytes <= 0.6 * plan.original_bytes
    batch = batch_of(schema_of(CLICK), 64)
    first, *_, last = train(model, optimizer, [batch] * 30)
    assert last < first


def tables(model: nn.Module) -> Iterator[nn.EmbeddingBag]:
    return (module for module in model.modules() if isinstance(module, nn.EmbeddingBag))


def test_the_papers_ncf_has_the_papers_parameters() -> None:
    """nis.txt, Table 2: a baseline of d = 16 has 780K embedding parameters, one of d = 8 has 390K."""
    schema = Schema((Field("user", 6040), Field("movie", 3706)), (), ("movie",), TOP_K)
    for dim, count in ((16, 780), (8, 390)):
        model = NeuMf(dim).build(schema)
        assert round(sum(table.weight.numel() for table in tables(model)) / 1000) == count
    assert [tuple(layer.weight.shape) for layer in model.model.layers[::2]] == [(32, 64), (16, 32), (8, 16)]
    for table in tables(model):
        assert float(table.weight.std()) == pytest.approx(table.embedding_dim**-0.5, rel=0.05)


@pytest.mark.parametrize("config", [Dlrm(), DeepFm()], ids=lambda config: config.name)
def test_torchrecs_own_models_are_for_clicks(config: Any) -> None:
    with pytest.raises(ModelError, match=f"the model '{config.name}' must be asked for clicks; the data's task is 'rating'"):
        config.build(schema_of(RATING))


@pytest.mark.parametrize("config", [Mf(), NeuMf()], ids=lambda config: config.name)
def test_models_of_users_and_items_say_what_they_lack(config: Any) -> None:
    with pytest.raises(ModelError, match="must know a user's fields from an item's; of 2 fields, those of the item are \\[\\]"):
        config.build(Schema(FIELDS[:2], ()))


def test_every_model_is_tested() -> None:
    assert {type(config) for config in MODELS.values()} == set(CONFIGS) - {Dlrm, DeepFm}


def plain_dlrm(model: nn.Module) -> nn.Module:
    """Return TorchRec's own DLRM with the parameters of the project's."""
    ours = model.model
    collection = copy.deepcopy(ours.sparse_arch.embedding_bag_collection)
    plain = DLRMTrain(DLRM(collection, 2, [64, DIM], [128, 64, 1]))
    plain.load_state_dict(model.state_dict())
    return plain


def test_dlrm_is_torchrecs() -> None:
    model, batch = build(Dlrm(DIM), CLICK), batch_of(schema_of(CLICK), 40)
    plain = plain_dlrm(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    results = [each(batch) for each in (model, plain)]
    torch.testing.assert_close(results[0][1][1], results[1][1][1])
    gradients = [
        torch.autograd.grad(loss, list(each.parameters())) for each, (loss, _) in zip((model, plain), results, strict=True)
    ]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_dlrm_trains_under_autocast_as_torchrecs() -> None:
    model, batch = build(Dlrm(DIM), CLICK), batch_of(schema_of(CLICK), 40)
    gradients = []
    for each in (model, plain_dlrm(model)):
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = each(batch)
        gradients.append(torch.autograd.grad(loss, list(each.parameters())))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.02)


def test_products_of_pairs_can_be_differentiated_twice() -> None:
    arch = Dlrm(DIM).build(schema_of(CLICK)).model.inter_arch
    dense, sparse = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 4, 2, dtype=torch.float64)
    inputs = (dense.requires_grad_(), sparse.requires_grad_())
    torch.testing.assert_close(arch(*inputs), InteractionArch(4)(*inputs))
    assert torch.autograd.gradcheck(arch, inputs) and torch.autograd.gradgradcheck(arch, inputs)


def test_dlrm_takes_features_in_any_order() -> None:
    """As those of sharded tables may come."""

    class Backwards(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
            columns = self.inner(features).to_dict()
            return KeyedTensor.from_tensor_list(list(columns)[::-1], list(columns.values())[::-1])

    model, batch = build(Dlrm(DIM), CLICK), batch_of(schema_of(CLICK))
    expected = model(batch)[1][1]
    model.model.sparse_arch.embedding_bag_collection = Backwards(model.model.sparse_arch.embedding_bag_collection)
    assert torch.equal(model(batch)[1][1], expected)
