"""The adapter for TorchRec's EmbeddingBagCollection: what it takes, and what it refuses by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import PLAIN, dlrm, searched
from torch import nn
from torchrec.models.dlrm import DLRM_DCN
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.embedding_tower import EmbeddingTower
from torchrec.modules.feature_processor_ import PositionWeightedModuleCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.modules.itep_embedding_modules import ITEPEmbeddingBagCollection
from torchrec.modules.itep_modules import GenericITEPModule
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)

import embsearch_plugin as es
from embsearch_plugin.errors import UnsupportedCollection


class Holder(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside


class Mine(EmbeddingBagCollection):
    """A subclass that the adapter cannot know."""


def managed_collision() -> nn.Module:
    collection = PLAIN.collection()
    modules = {
        config.name: MCHManagedCollisionModule(
            zch_size=config.num_embeddings,
            device=torch.device("cpu"),
            eviction_interval=2,
            eviction_policy=DistanceLFU_EvictionPolicy(),
        )
        for config in collection.embedding_bag_configs()
    }
    return ManagedCollisionEmbeddingBagCollection(
        collection, ManagedCollisionCollection(modules, collection.embedding_bag_configs())
    )


def itep() -> nn.Module:
    pruned = GenericITEPModule({"t0": 400, "t1": 600}, enable_pruning=False)
    return ITEPEmbeddingBagCollection(PLAIN.collection(), pruned)


def feature_processed() -> nn.Module:
    weighted = EmbeddingBagCollection(PLAIN.collection().embedding_bag_configs(), is_weighted=True)
    return FeatureProcessedEmbeddingBagCollection(weighted, PositionWeightedModuleCollection({"f0": 4, "f1": 4}))


def fused() -> nn.Module:
    return FusedEmbeddingBagCollection(PLAIN.collection().embedding_bag_configs(), torch.optim.SGD, {"lr": 0.1})


REFUSED = {
    "ManagedCollisionEmbeddingBagCollection": managed_collision,
    "ITEPEmbeddingBagCollection": itep,
    "FeatureProcessedEmbeddingBagCollection": feature_processed,
    "FusedEmbeddingBagCollection": fused,
    "EmbeddingTower": lambda: EmbeddingTower(PLAIN.collection(), nn.Linear(16, 4)),
    "Mine": lambda: Mine(PLAIN.collection().embedding_bag_configs()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_searched_is_refused_by_name(name: str) -> None:
    model = Holder(REFUSED[name]())
    before = dict(model.named_modules())
    with pytest.raises(UnsupportedCollection, match=rf"'inside' is a .*{name}"):
        es.prepare(model)
    assert dict(model.named_modules()) == before


def test_a_model_that_is_searched_or_compact_already_is_refused() -> None:
    model, session, _ = searched(PLAIN)
    with pytest.raises(UnsupportedCollection, match="being searched already"):
        es.prepare(model)
    compact = session.compact(session.derive())
    with pytest.raises(UnsupportedCollection, match="compact already"):
        es.prepare(compact)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda c: c.register_forward_hook(lambda *_: None), "'inside' has hooks"),
        (lambda c: c.embedding_bags["t1"].register_forward_hook(lambda *_: None), "'inside.embedding_bags.t1' has hooks"),
        (lambda c: setattr(c.embedding_bags["t1"], "padding_idx", 0), "'inside.embedding_bags.t1' sets padding_idx"),
        (lambda c: setattr(c.embedding_bags["t1"], "max_norm", 1.0), "'inside.embedding_bags.t1' sets max_norm"),
    ],
)
def test_what_a_rewrite_would_lose_is_refused(change: Callable[[Any], Any], what: str) -> None:
    model = Holder(PLAIN.collection())
    change(model.inside)
    with pytest.raises(UnsupportedCollection, match=what):
        es.prepare(model)


def test_a_bare_collection_cannot_be_replaced() -> None:
    with pytest.raises(UnsupportedCollection, match="nothing holds it"):
        es.prepare(PLAIN.collection())


def test_torchrecs_models_are_taken_unmodified() -> None:
    dcn = DLRM_DCN(PLAIN.collection(), 3, [8], [4, 1], dcn_num_layers=1, dcn_low_rank_dim=2)
    for model in (dlrm(), dcn):
        assert len(es.prepare(model).specs) == 2
