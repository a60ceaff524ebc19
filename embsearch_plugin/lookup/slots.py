"""Slots: what a collection looks up, in the order of its output's columns."""

from collections.abc import Sequence
from dataclasses import dataclass

from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table


@dataclass(frozen=True)
class Slot:
    """One feature looked up in one table: D columns of the output."""

    table: int
    feature: str
    key: str
    dim: int
    mean: bool


def slots_of(configs: Sequence[EmbeddingBagConfig]) -> tuple[Slot, ...]:
    """Return what a collection looks up, in the order of its output's columns."""
    keys = get_embedding_names_by_table(configs)
    return tuple(
        Slot(index, feature, key, config.embedding_dim, config.pooling == PoolingType.MEAN)
        for index, (config, names) in enumerate(zip(configs, keys, strict=True))
        for feature, key in zip(config.feature_names, names, strict=True)
    )
