"""A controller of independent softmax choices, trained by policy gradient with a learned baseline (nis.txt, 3.4 and 4.1.3)."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from embsearch_plugin import distributed


class Controller:
    """One vector of logits per choice, zero at first, and a baseline network of the same structure with its own variables.

    The baseline predicts the reward before the choice k of n, from the arms a_j that were chosen until then:

        b_k = c + 1/n * sum over j < k of v_j[a_j]

    c is what is expected before any choice. It starts at the mean reward of the first update: were it 0, the first advantages
    would be those of a reward of full size, and Adagrad would take small steps ever after. For the same reason the sum is
    divided by n: a first step of Adagrad moves every v_j at once. The baseline of a choice does not depend on the choice, so it
    leaves the expectation of the gradient as it is.

    Args:
        arms: the number of arms of each choice (n,).
        lr: learning rate of Adagrad, for both.
        device: where its variables are.
    """

    def __init__(self, arms: Sequence[int], lr: float, device: torch.device) -> None:
        self.arms, self.updates = list(arms), 0
        shape = len(arms), max(arms)
        self._absent = torch.arange(shape[1], device=device) >= torch.tensor(self.arms, device=device)[:, None]
        self.logits = torch.zeros(shape, device=device, requires_grad=True)
        self.values = torch.zeros(shape, device=device, requires_grad=True)
        self.first = torch.zeros((), device=device, requires_grad=True)
        self._optimizer = torch.optim.Adagrad(self._variables, lr=lr)

    @property
    def _variables(self) -> list[Tensor]:
        return [self.logits, self.values, self.first]

    def probabilities(self) -> Tensor:
        """Return the probability of each arm, (n, widest); zero where a choice has fewer."""
        return self._log_probabilities().detach().exp()

    def _log_probabilities(self) -> Tensor:
        return self.logits.masked_fill(self._absent, -torch.inf).log_softmax(1)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw every choice ``count`` times: int64 (count, n). The generator is the CPU's."""
        drawn = torch.multinomial(self.probabilities().cpu(), count, replacement=True, generator=generator)
        return drawn.t().to(self.logits.device)

    def most_likely(self) -> Tensor:
        """Return the arm of each choice with the highest probability, int64 (n,); of several the last, as none is proven."""
        probabilities = self.probabilities()
        return probabilities.shape[1] - 1 - probabilities.flip(1).argmax(1)

    def baseline(self, choices: Tensor) -> Tensor:
        """Return the reward expected before each choice, (N, n), of choices (N, n)."""
        values = self.values.gather(1, choices.t()).t()
        return self.first + (values.cumsum(1) - values) / len(self.arms)

    def learn(self, choices: Tensor, rewards: Tensor) -> None:
        """Take one step on choices (N, n) and their rewards (N,), over all processes; N may be 0."""
        total, count = distributed.total(torch.stack([rewards.sum(), rewards.new_tensor(len(rewards))]))
        if not count:
            return
        with torch.no_grad():
            if not self.updates:
                self.first.fill_(total / count)
        self._optimizer.zero_grad()
        (self._loss(choices, rewards) * (distributed.world_size() / count)).backward()
        for variable, gradient in zip(self._variables, distributed.mean(self._gradients()), strict=True):
            variable.grad = gradient
        self._optimizer.step()
        self.updates += 1

    def _loss(self, choices: Tensor, rewards: Tensor) -> Tensor:
        """Return the sum over groups and choices of - advantage * log p, and of the baseline's squared errors."""
        errors = rewards[:, None] - self.baseline(choices)
        log_p = self._log_probabilities().gather(1, choices.t()).t()
        return errors.square().sum() - (errors.detach() * log_p).sum()

    def _gradients(self) -> list[Tensor]:
        return [torch.zeros_like(v) if v.grad is None else v.grad for v in self._variables]

    def state_dict(self) -> dict[str, Any]:
        """Return the variables, Adagrad's state and the number of updates."""
        return {
            "arms": self.arms,
            "updates": self.updates,
            "variables": [variable.detach() for variable in self._variables],
            "optimizer": self._optimizer.state_dict(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], lr: float) -> "Controller":
        """Make the controller that ``state`` was taken of."""
        controller = cls(state["arms"], lr, state["variables"][0].device)
        with torch.no_grad():
            for variable, value in zip(controller._variables, state["variables"], strict=True):
                variable.copy_(value)
        controller._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it keeps the tensors
        controller.updates = state["updates"]
        return controller
