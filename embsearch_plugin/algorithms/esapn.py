"""ESAPN: rows that grow on a stream, as policy networks decide (Liu, Zhao, Wang, Liu, Tang, SIGIR 2020; esapn.txt).

Every id starts with a row of the smallest candidate size (2.2). Before a batch is learned from, its table's policy network
sees the state of each of its ids, which is the frequency and the size (2.3.2), and the likelier of its two actions,
*enlarge* and *unchange* (2.3.3), is carried out for good (Algorithm 1, lines 8 and 9). A larger row starts as the learned
linear map of the smaller one (Eq. 1), through which that would have gone anyway. The policy is trained by REINFORCE with one
sample (Eq. 5 to 7) on a batch of the past (lines 2 to 6): the reward is the mean of the id's last T losses minus the loss now
(Eq. 2).

Batch norm and tanh on the unified embedding (2.2) are the model's part, as its layers are: ``stream_mlp`` has them.

What follows from the paper's equations: since a larger row starts as the map of the smaller, both actions give the same
prediction. So line 4 (change the sizes for a moment) changes nothing and is not carried out, and the reward does not depend on
the action. The expectation of Eq. 6 is then zero: the policy moves by the noise of its samples, scaled by the rewards. In the
authors' code batch norm is applied to the ids of each size by themselves, which tells the actions apart a little.

Differences from the paper:
    * Rows learn at ``row_lr`` = 0.01, where the paper has 0.001 for all (3.2); see
      :class:`~embsearch_plugin.streaming.base.StreamConfig`.
    * Frequencies above ``frequencies`` count as that; each has an embedding of 32 numbers, as in the authors' code.
    * Ids of the largest size have no action, and teach nothing. With fewer than T losses, the mean is over those there are.
    * An id that comes several times in a batch is counted each time, grows once, and puts the mean of its losses in its queue.
    * The mean over a batch is what Adam ascends, for each table's network by itself.
    * Candidates at least as wide as the table fall away, and its own width is the largest, so that the network around it
      stays as it is.
    * Rows are stored in one width each, with their optimizer's state; the authors' code has a table for every size.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embsearch_plugin.algorithms.base import AlgorithmConfig
from embsearch_plugin.algorithms.parts.row_sizes import FREQUENCY_WIDTH, check_candidates, widths_within
from embsearch_plugin.collection import Table
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.limits import Limits, above, at_least
from embsearch_plugin.randomness import private_random
from embsearch_plugin.streaming.base import StreamAlgorithm, StreamConfig
from embsearch_plugin.streaming.collection import Lookup
from embsearch_plugin.streaming.forms import Chain, RowForm
from embsearch_plugin.streaming.table import GrowingTable
from embsearch_plugin.tasks import example_losses

if TYPE_CHECKING:
    from embsearch_plugin.streaming.session import StreamSession

UNCHANGE, ENLARGE = 0, 1


@dataclass(frozen=True, kw_only=True)
class Esapn(StreamConfig):
    """Settings of ESAPN; the defaults are those of 3.2.

    Args:
        candidates: the sizes that rows may have, ascending.
        hidden: width of the policy network's hidden layer.
        lr: learning rate of Adam for the policy networks.
        losses: T, how many losses of an id the reward looks back on.
        frequencies: the largest frequency that the policy tells apart.
    """

    name: ClassVar[str] = "esapn"
    limits: ClassVar[Limits] = {
        "hidden": at_least(1),
        "lr": above(0),
        "losses": at_least(1),
        "frequencies": at_least(1),
    }
    candidates: tuple[int, ...] = (2, 4, 8, 16, 64, 128)
    hidden: int = 512
    lr: float = 0.0001
    losses: int = 5
    frequencies: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_candidates(self.candidates)

    def extras(self, table: Table) -> dict[str, tuple[int, ...]]:
        """Return that of the last losses, the newest first, and of how many there are."""
        return {"losses": (self.losses,), "scored": ()}

    def row_form(self, table: Table) -> RowForm:
        """Return a chain of linear maps."""
        return Chain(widths_within(self.candidates, table.dim))

    def build(self) -> "EsapnSearch":
        """Return the algorithm of one session."""
        return EsapnSearch(self)


class EsapnSearch(StreamAlgorithm):
    """ESAPN in one session."""

    def __init__(self, config: Esapn) -> None:
        self.config = config
        self._policies: dict[str, Policy] = {}
        self._optimizers: dict[str, torch.optim.Adam] = {}

    def start(self, session: "StreamSession") -> None:
        """Make a policy network for each table."""
        self._random = torch.Generator().manual_seed(session.seed)
        for table in session.tables:
            with private_random(session.seed):
                policy = Policy(len(table.rows.widths), self.config)
            self._policies[str(table.spec)] = policy
            self._optimizers[str(table.spec)] = torch.optim.Adam(policy.parameters(), lr=self.config.lr, fused=True)

    @torch.no_grad()
    def grows(self, table: GrowingTable, entries: Tensor) -> Tensor:
        """Return for which ids *enlarge* is the likelier action."""
        sizes = table.rows.sizes(entries)
        logits = self._policies[str(table.spec)](table.counts(entries), sizes)
        return (logits[:, ENLARGE] > logits[:, UNCHANGE]) & (sizes < len(table.rows.widths) - 1)

    def scored(self, table: GrowingTable, lookup: Lookup, losses: Tensor) -> None:
        """Put each id's loss into its queue; the mean, where it is in several examples of the batch."""
        known = lookup.entries >= 0
        entries, inverse = lookup.entries[known].unique(return_inverse=True)
        sums = torch.zeros(len(entries)).index_add(0, inverse, losses[lookup.examples[known]])
        queue, scored = table.extras["losses"].values, table.extras["scored"].values
        newest = (sums / inverse.bincount(minlength=len(entries)))[:, None]
        queue[entries] = torch.cat([newest, queue[entries][:, :-1]], 1)
        scored[entries] = (scored[entries] + 1).clamp(max=self.config.losses)

    @property
    def searches(self) -> bool:
        """The policy learns from past batches."""
        return True

    def search_step(self, session: "StreamSession", batch: Any) -> Mapping[str, float]:
        """Train every policy network by one step (Eq. 7)."""
        outcome = session.evaluate(batch)
        losses = example_losses(outcome.logits, outcome.labels).cpu()
        looked_up = list(zip(session.tables, session.lookups, strict=True))
        rewards = [self._train(table, lookup, losses) for table, lookup in looked_up]
        if not session.knows_losses:  # the past is where losses can be seen
            for table, lookup in looked_up:
                self.scored(table, lookup, losses)
        return {"reward": sum(rewards) / len(rewards)}

    def _train(self, table: GrowingTable, lookup: Lookup, losses: Tensor) -> float:
        """Take a step for one table; return the mean reward."""
        entries, losses = lookup.entries, losses[lookup.examples]
        widest, scored = len(table.rows.widths) - 1, table.extras["scored"].values
        known = entries >= 0
        known[known.clone()] = (table.rows.sizes(entries[known]) < widest) & (scored[entries[known]] > 0)
        entries, losses = entries[known], losses[known]
        if not len(entries):
            return 0.0
        rewards = table.extras["losses"].values[entries].sum(1) / scored[entries] - losses  # Eq. 2
        logits = self._policies[str(table.spec)](table.counts(entries), table.rows.sizes(entries))
        log_probabilities = F.log_softmax(logits, 1)
        actions = torch.multinomial(log_probabilities.detach().exp(), 1, generator=self._random)
        objective = (rewards * log_probabilities.gather(1, actions).squeeze(1)).mean()  # Eq. 6, N = 1
        optimizer = self._optimizers[str(table.spec)]
        optimizer.zero_grad()
        (-objective).backward()
        optimizer.step()
        return float(rewards.mean())

    def state_dict(self) -> dict[str, Any]:
        """Return the networks, their optimizers' state, and that of the random numbers."""
        return {
            "policies": {name: policy.state_dict() for name, policy in self._policies.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()},
            "random": self._random.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        for name, policy in self._policies.items():
            policy.load_state_dict(state["policies"][name])
            self._optimizers[name].load_state_dict(copy.deepcopy(state["optimizers"][name]))  # it keeps the tensors
        self._random.set_state(state["random"])


class Policy(nn.Module):
    """From a state to the logits of both actions (2.3.3).

    Args:
        sizes: number of candidate sizes.
        config: ESAPN's.
    """

    def __init__(self, sizes: int, config: Esapn) -> None:
        super().__init__()
        self.sizes = sizes
        self.frequency = nn.Embedding(config.frequencies + 1, FREQUENCY_WIDTH)
        self.hidden = nn.Linear(FREQUENCY_WIDTH + sizes, config.hidden)
        self.actions = nn.Linear(config.hidden, 2)

    def forward(self, counts: Tensor, sizes: Tensor) -> Tensor:
        """Return the logits (n, 2) for frequencies and sizes, each int64 (n,)."""
        frequency = self.frequency(counts.clamp(max=self.frequency.num_embeddings - 1))
        state = torch.cat([frequency, F.one_hot(sizes, self.sizes).float()], 1)
        logits: Tensor = self.actions(torch.tanh(self.hidden(state)))
        return logits


@hookimpl
def embsearch_register_algorithms() -> Sequence[type[AlgorithmConfig]]:
    """Register ESAPN."""
    return [Esapn]
