import torch
from torchrec.modules.embedding_configs import PoolingType

from embsearch_plugin.data.bags import Bags
from embsearch_plugin.data.dataset import Field, Schema, TabularDataset
from embsearch_plugin.models import DeepFm, Dlrm, NeuMf
from embsearch_plugin.models.common import collection_for

SCHEMA = Schema((Field("user", 4), Field("composer", 6, multiple=True)), (), ("composer",))


def data() -> TabularDataset:
    """Three examples; the first has two composers, the second none, the third one."""
    bags = Bags(torch.tensor([5, 2, 3], dtype=torch.int32), torch.tensor([0, 2, 2, 3]))
    ids = torch.tensor([[1, 0], [2, 1], [3, 2]], dtype=torch.int32)
    splits = {"train": torch.arange(3)}
    return TabularDataset(SCHEMA, torch.empty(3, 0), ids, torch.ones(3), splits, {"composer": bags})


def test_several_values_are_averaged_and_none_are_zero() -> None:
    collection = collection_for(SCHEMA, 4)
    assert [config.pooling for config in collection.embedding_bag_configs()] == [PoolingType.SUM, PoolingType.MEAN]
    rows = collection.state_dict()["embedding_bags.t_composer.weight"]
    looked_up = collection(next(iter(data().batches("train", 3))).sparse_features)["composer"]
    expected = torch.stack([(rows[5] + rows[2]) / 2, torch.zeros(4), rows[3]])
    torch.testing.assert_close(looked_up, expected)


def test_models_are_built_for_data_without_dense_numbers() -> None:
    batch = next(iter(data().batches("train", 3)))
    for config in (Dlrm(embedding_dim=4), DeepFm(embedding_dim=4), NeuMf(embedding_dim=4)):
        loss, (_, logits, _) = config.build(SCHEMA)(batch)
        loss.backward()
        assert logits.shape == (3,)
        assert logits.isfinite().all()
