"""The model of esapn.txt, 2.2: against the formula, an example at a time."""

import pytest
import torch
from support import train
from torchrec.modules.embedding_modules import EmbeddingBagCollection

import embsearch_plugin as es
from embsearch_plugin.data.dataset import Collate, Field, Schema
from embsearch_plugin.models.stream_mlp import StreamMlp, StreamNet
from embsearch_plugin.tasks import PREFERENCE, STARS, Task

FIELDS = (Field("user", 10**9), Field("item", 10**9))


def batch_of(task: Task, size: int = 9) -> object:
    random = torch.Generator().manual_seed(size)
    ids = torch.randint(30, (size, 2), generator=random)
    labels = torch.randint(5 if task is STARS else 2, (size,), generator=random).float()
    return Collate(Schema(FIELDS, (), ("item",), task), size)(torch.empty(size, 0), ids, labels)


def test_its_tables_are_on_the_meta_device() -> None:
    net = StreamNet(Schema(FIELDS, (), ("item",), PREFERENCE), 8, (6,))
    assert isinstance(net.collection, EmbeddingBagCollection)
    assert {weight.device.type for weight in net.collection.parameters()} == {"meta"}
    assert {p.device.type for name, p in net.named_parameters() if not name.startswith("collection")} == {"cpu"}


@pytest.mark.parametrize("task", [PREFERENCE, STARS])
@pytest.mark.parametrize("layers", [(6,), (6, 3)])
def test_logits_and_loss_are_those_of_the_formula(task: Task, layers: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = StreamMlp(4, layers).build(Schema(FIELDS, (), ("item",), task))
    es.prepare(model, algorithm=es.Fixed(init_std=1.0))
    batch = batch_of(task)
    train(model, torch.optim.Adam(model.parameters(), lr=0.01), [batch] * 3)
    loss, (_, logits, labels) = model.eval()(batch)
    (net,) = [module for module in model.modules() if isinstance(module, StreamNet)]
    rows = net.collection(batch.sparse_features).to_dict()
    losses = []
    for example in range(9):
        parts = []
        for name in ("user", "item"):
            norm = net.norms[name]
            normed = (rows[name][example] - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
            parts.append(torch.tanh(normed))
        hidden = torch.cat(parts)
        for layer in net.layers:
            hidden = torch.tanh(layer.weight @ hidden + layer.bias)
        expected = net.output.weight @ hidden + net.output.bias
        torch.testing.assert_close(logits[example], expected if task is STARS else expected[0], rtol=1e-4, atol=1e-5)
        if task is STARS:
            losses.append(-expected.log_softmax(0)[int(labels[example])])  # Eq. 4
        else:
            losses.append((labels[example] - expected[0].sigmoid()) ** 2)  # Eq. 3
    assert float(loss.detach()) == pytest.approx(float(torch.stack(losses).mean().detach()), rel=1e-4)
