"""The controller: what it draws, its policy gradient and its baseline, against slow references and known optima."""

import itertools

import pytest
import torch
from torch import Tensor

from embsearch_plugin.algorithms.parts.controller import Controller

CPU = torch.device("cpu")


def controller(arms: list[int], seed: int = 0) -> Controller:
    """A controller somewhere on its way."""
    made = Controller(arms, 0.1, CPU)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made.logits.normal_(generator=random)
        made.values.normal_(generator=random)
        made.first.fill_(0.3)
    made.updates = 1
    return made


def test_draws_follow_the_softmax_of_the_logits_and_are_independent() -> None:
    made = controller([2, 4, 3])
    drawn = made.draw(40_000, torch.Generator().manual_seed(1))
    for choice, arms in enumerate(made.arms):
        weights = made.logits[choice, :arms].detach().double().exp()
        expected = weights / weights.sum()
        shares = torch.bincount(drawn[:, choice], minlength=arms).double() / len(drawn)
        torch.testing.assert_close(shares, expected, atol=0.01, rtol=0)
        torch.testing.assert_close(made.probabilities()[choice, :arms].double(), expected)
        assert not made.probabilities()[choice, arms:].any()
    both = ((drawn[:, 0] == 0) & (drawn[:, 1] == 0)).double().mean()
    assert float(both) == pytest.approx(float(made.probabilities()[0, 0] * made.probabilities()[1, 0]), abs=0.01)


def test_all_arms_are_equally_likely_at_first_and_ties_go_to_the_last() -> None:
    made = Controller([2, 5], 0.1, CPU)
    assert made.probabilities().tolist() == [[0.5, 0.5, 0, 0, 0], pytest.approx([0.2] * 5)]
    assert made.most_likely().tolist() == [1, 4]


def test_the_baseline_knows_the_choices_made_before_and_no_other() -> None:
    """3.4.2: one at a time."""
    made = controller([3, 2, 4])
    for arms in itertools.product(range(3), range(2), range(4)):
        (found,) = made.baseline(torch.tensor([arms])).tolist()
        for number in range(3):
            before = sum(float(made.values[j, arms[j]].detach()) for j in range(number))
            assert found[number] == pytest.approx(0.3 + before / 3, abs=1e-6)


def reward_of(arms: tuple[int, ...]) -> float:
    return 0.4 + 0.1 * arms[0] - 0.2 * (arms[1] == 1) + 0.05 * arms[0] * arms[1]


def expected_reward(logits: Tensor, arms: list[int]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for chosen in itertools.product(*map(range, arms)):
        p = torch.ones((), dtype=torch.float64)
        for choice, arm in enumerate(chosen):
            p = p * logits[choice, : arms[choice]].softmax(0)[arm]
        total = total + p * reward_of(chosen)
    return total


def test_the_policy_gradient_is_that_of_the_expected_reward() -> None:
    """Over every choice weighed by its probability, it is the gradient of the expectation, by finite differences."""
    arms = [3, 2]
    made = controller(arms)
    total = torch.zeros_like(made.logits)
    for chosen in itertools.product(*map(range, arms)):
        choices = torch.tensor([chosen])
        p = torch.stack([made.probabilities()[c, a] for c, a in enumerate(chosen)]).prod()
        made._optimizer.zero_grad()
        made._loss(choices, torch.tensor([reward_of(chosen)])).backward()
        total -= p * made.logits.grad
    logits, step = made.logits.detach().double(), 1e-5
    for choice, n in enumerate(arms):
        for arm in range(n):
            moved = [logits.clone(), logits.clone()]
            moved[0][choice, arm] += step
            moved[1][choice, arm] -= step
            slope = (expected_reward(moved[0], arms) - expected_reward(moved[1], arms)) / (2 * step)
            assert float(total[choice, arm]) == pytest.approx(float(slope), abs=1e-5)


@pytest.mark.parametrize("groups", [1, 8])
def test_it_finds_the_best_arms_and_the_baseline_the_reward(groups: int) -> None:
    """A bandit of four choices whose best arms are known, with noise as large as what is at stake."""
    best = torch.tensor([2, 0, 1, 3])
    made, random = Controller([3, 3, 2, 5], 0.1, CPU), torch.Generator().manual_seed(3)
    for _ in range(1500):
        drawn = made.draw(groups, random)
        rewards = 0.5 + 0.05 * (drawn == best).float().sum(1) + 0.05 * torch.randn(groups, generator=random)
        made.learn(drawn, rewards)
    assert made.most_likely().tolist() == best.tolist()
    assert float(made.probabilities().amax(1).min()) > 0.6
    drawn = made.draw(200, random)
    rewards = 0.5 + 0.05 * (drawn == best).float().sum(1)
    assert float((made.baseline(drawn)[:, -1] - rewards).abs().mean().detach()) < 0.06


def test_the_baseline_learns_what_an_arm_is_worth() -> None:
    """The reward is the first choice's alone; a constant misses it by 0.4."""
    made, random = Controller([2, 2], 0.1, CPU), torch.Generator().manual_seed(3)
    for _ in range(300):
        drawn = torch.randint(2, (8, 2), generator=random)
        made.learn(drawn, 0.1 + 0.8 * drawn[:, 0])
    low, high = made.baseline(torch.tensor([[0, 0], [1, 0]])).tolist()
    assert low == pytest.approx([0.5, 0.1], abs=0.05)
    assert high == pytest.approx([0.5, 0.9], abs=0.05)


def test_the_first_baseline_is_the_first_mean_reward_and_no_reward_teaches_nothing() -> None:
    made = Controller([2, 2], 0.1, CPU)
    made.learn(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0))
    assert made.updates == 0
    assert not made.logits.any()
    made.learn(torch.tensor([[0, 1], [1, 1]]), torch.tensor([5.0, 7.0]))
    assert float(made.first.detach()) == pytest.approx(6.0, abs=0.11)
    assert float(made.logits[0, 1]) > float(made.logits[0, 0])


def test_a_step_is_adagrads_and_gradients_are_not_clipped() -> None:
    """A.2.2. The slow reference: a logit moves by lr * g / sqrt(sum of g * g until now), however large g is."""
    made, squares = controller([2, 3]), torch.zeros(2, 3)
    for rewards in (torch.tensor([1e6, -3e6]), torch.tensor([0.2, 0.9])):
        drawn, before = torch.tensor([[0, 2], [1, 1]]), made.logits.detach().clone()
        advantages = (rewards[:, None] - made.baseline(drawn)).detach()
        gradient = torch.zeros(2, 3)
        for number, choice in itertools.product(range(2), range(2)):
            p = before[choice, : made.arms[choice]].softmax(0)
            gradient[choice, : len(p)] += advantages[number, choice] / 2 * p
            gradient[choice, drawn[number, choice]] -= advantages[number, choice] / 2
        made.learn(drawn, rewards)
        squares += gradient.square()
        moved = (before - made.logits.detach())[squares > 0]
        torch.testing.assert_close(moved, (0.1 * gradient / squares.sqrt())[squares > 0], rtol=1e-4, atol=1e-6)


def test_it_goes_on_from_its_state() -> None:
    made = controller([2, 3])
    drawn, rewards = torch.tensor([[0, 2], [1, 1]]), torch.tensor([0.2, 0.9])
    made.learn(drawn, rewards)
    again = Controller.from_state(made.state_dict(), 0.1)
    for each in (made, again):
        each.learn(drawn, rewards)
    for mine, its in zip(made._variables, again._variables, strict=True):
        assert torch.equal(mine, its)
