"""Data for top-k recommendation: each example is a user and one item she chose, its positive, beside others she might have.

Training and validation draw N negatives per batch from all items, uniformly, without repeats, and shared by the whole batch
(nis.txt, A.2.3), or N for each example where :meth:`RankingDataset.apart` asks for that. A negative that is an example's own
positive, an accidental hit, is removed for that example. On test every example has negatives of its own, always the same.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from math import ceil

import numpy as np
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embsearch_plugin.data.dataset import Batches, Dataset, Schema, Split

SAMPLED = 4  # N of training and validation; of both model and controller in nis.txt, A.2.3


@dataclass
class RankingBatch(Batch):
    """B examples with 1 + N candidates each; no row is looked up twice for it.

    The lookup has B + M bags per field. Bag b < B holds the user and the positive of example b; the M others hold negatives,
    and there the user's bag is empty. M is N where the examples share their negatives, B x N where each has its own.

    Args:
        dense_features: (B, 0).
        sparse_features: ids of all fields, stride B + M.
        labels: (B, 1 + N), one for the positive, which is first, else zero.
        candidates: int64 (B, 1 + N), the bag of each candidate; -1 where it is removed.
    """

    candidates: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "RankingBatch":
        """Move everything to ``device``."""
        moved = {f.name: getattr(self, f.name).to(device=device, non_blocking=non_blocking) for f in fields(self)}
        return replace(self, **moved)

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that ``stream`` uses the batch."""
        super().record_stream(stream)
        self.candidates.record_stream(stream)

    def pin_memory(self) -> "RankingBatch":
        """Move everything to pinned memory."""
        return replace(self, **{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})


def ranking_batch(schema: Schema, pairs: Tensor, negatives: Tensor) -> RankingBatch:
    """Make a batch.

    Args:
        schema: its two fields are the user and the item.
        pairs: int64 (B, 2), the users and their positives.
        negatives: int64, items: (N,), shared by all examples, or (B, N), their own.
    """
    (users, positives), size, bags = pairs.t(), len(pairs), torch.arange(len(pairs) + negatives.numel())
    own = bags[size:].view(negatives.shape).expand(size, -1).masked_fill(negatives == positives[:, None], -1)
    candidates = torch.cat([bags[:size, None], own], dim=1)
    sparse = KeyedJaggedTensor(
        keys=[field.name for field in schema.fields],
        values=torch.cat([users, positives, negatives.flatten()]),
        lengths=torch.cat([bags < size, torch.ones_like(bags, dtype=torch.bool)]).long(),
        stride=len(bags),
    )
    labels = (torch.arange(candidates.shape[1]) == 0).float().repeat(size, 1)
    return RankingBatch(torch.empty(size, 0), sparse, labels, candidates)


class RankingDataset(Dataset):
    """A data set of two fields, user and item, in memory.

    Shapes: pairs of each split int64 (n, 2), users and positives; negatives of the test split int64 (n_test, C).
    """

    def __init__(self, schema: Schema, pairs: Mapping[Split, Tensor], negatives: Tensor, shared: bool = True) -> None:
        self.schema = schema
        self.pairs = pairs
        self.negatives = negatives
        self.shared = shared

    def apart(self) -> "RankingDataset":
        """Return the same data in batches where each example has negatives of its own in every split."""
        return RankingDataset(self.schema, self.pairs, self.negatives, shared=False)

    def fingerprint(self) -> str:
        """Return a hash of everything."""
        digest = sha256(repr(self.schema).encode())
        for tensor in (self.negatives, *(self.pairs[split] for split in sorted(self.pairs))):
            digest.update(np.ascontiguousarray(tensor.numpy()).data)
        return digest.hexdigest()

    def batches(self, split: Split, batch_size: int, *, seed: int | None = None) -> "RankingBatches":
        """Return one split in batches; without a seed, validation has the same negatives each time."""
        return RankingBatches(self, split, batch_size, seed)


class RankingBatches(Batches):
    """Batches of a data set in memory."""

    def __init__(self, data: RankingDataset, split: Split, batch_size: int, seed: int | None) -> None:
        super().__init__(seed)
        self._data = data
        self._split: Split = split
        self._batch_size = batch_size

    def __len__(self) -> int:
        return ceil(len(self._data.pairs[self._split]) / self._batch_size)

    def _cut(self, shuffle: np.random.Generator | None) -> Iterator[RankingBatch]:
        pairs = self._data.pairs[self._split]
        order = torch.arange(len(pairs)) if shuffle is None else torch.from_numpy(shuffle.permutation(len(pairs)))
        random = shuffle or np.random.default_rng(0)
        for rows in order.split(self._batch_size):
            negatives = self._data.negatives[rows] if self._split == "test" else self._sample(random, len(rows))
            yield ranking_batch(self._data.schema, pairs[rows], negatives)

    def _sample(self, random: np.random.Generator, examples: int) -> Tensor:
        items = self._data.schema.fields[1].rows
        count = min(SAMPLED, items)
        if self._data.shared:
            return torch.from_numpy(random.choice(items, count, replace=False, shuffle=False))
        drawn = random.integers(items, size=(examples, count))
        while len(repeated := np.flatnonzero((np.diff(np.sort(drawn)) == 0).any(axis=1))):
            drawn[repeated] = random.integers(items, size=(len(repeated), count))
        return torch.from_numpy(drawn)
