"""Losses after pretraining, against closed forms and fixed points."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from colada.train.flow_matching import flow_errors
from colada.train.posttraining import (
    calibrated_beta,
    follow,
    mean_error,
    preference_loss,
    reward_errors,
    rewards_to_shares,
)
from helpers import tiny_dit

SHAPE = (3, 2, 8, 4)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


def test_the_gradient_of_rewards_at_the_old_policy_is_the_closed_form() -> None:
    """2 beta (2 r - 1) (f_old - u), the paper's; with normalised errors divided by their mean size."""
    old, target, share = drawn(1), drawn(2), torch.rand(SHAPE[:3])
    for normalised in (False, True):
        policy = old.clone().requires_grad_()
        reward_errors(policy, old, target, share, 0.7, normalised).sum().backward()
        expected = 2 * 0.7 * (2 * share[..., None] - 1) * (old - target) / SHAPE[-1]
        if normalised:
            expected /= (old - target).abs().mean(-1, keepdim=True)
        torch.testing.assert_close(policy.grad, expected)


def test_an_even_share_holds_the_old_policy_where_it_is() -> None:
    old, target = drawn(1), drawn(2)
    policy = (old + 0.1 * drawn(3)).requires_grad_()
    optimiser = torch.optim.SGD([policy], lr=1.0)
    for _ in range(200):
        optimiser.zero_grad()
        reward_errors(policy, old, target, torch.tensor(0.5), 1.0, normalised=False).sum().backward()
        optimiser.step()
    torch.testing.assert_close(policy.detach(), old, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("share", "nearer"), [(1.0, True), (0.0, False)])
def test_good_answers_pull_and_bad_ones_push(share: float, nearer: bool) -> None:
    old, target = drawn(1), drawn(2)
    policy = old.clone().requires_grad_()
    reward_errors(policy, old, target, torch.tensor(share), 1.0).sum().backward()
    assert policy.grad is not None
    after = (policy - 0.01 * policy.grad).detach()
    distances = [(x - target).square().sum(-1) for x in (after, old)]
    assert bool(((distances[0] < distances[1]) == nearer).all())


def test_shares_of_groups_by_hand() -> None:
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.4]])
    shares = rewards_to_shares(rewards, 0.1)
    torch.testing.assert_close(shares[0], torch.tensor([0.0, 1.0, 1.0, 0.0]))
    torch.testing.assert_close(shares[1], torch.full((4,), 0.5))
    deviation = math.sqrt(3 * 0.01 + 0.09) / 2
    low = 0.5 - 0.5 * 0.1 / deviation
    torch.testing.assert_close(shares[2], torch.tensor([low, low, low, 1.0]))
    even = rewards_to_shares(torch.tensor([[0.0, 0.02]]), 0.1)
    torch.testing.assert_close(even, torch.tensor([[0.45, 0.55]]))


def test_preferences_equal_the_formula() -> None:
    values = [abs(drawn(seed, 5)) for seed in range(4)]
    loss, terms = preference_loss(*values, beta=3.0, anchor=0.3)
    expected, right = 0.0, 0
    for c, r, rc, rr in zip(*(value.tolist() for value in values), strict=True):
        difference = (c - rc) - (r - rr)
        expected += -math.log(1 / (1 + math.exp(1.5 * difference))) + 0.3 * c
        right += difference < 0
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert int(terms["preferred"]) == right
    assert float(terms["flow"]) == pytest.approx(float(values[0].sum()))


def errors_of(dit: Any, seed: int) -> Tensor:
    timestep = torch.tensor([200.0, 700.0]).repeat_interleave(4).expand(1, 1, 8)
    return mean_error(
        flow_errors(dit, drawn(seed, 1, 8, 8), drawn(7, 1, 1, 8, 8), timestep), torch.ones(1, 8).bool()
    )


def test_equal_answers_have_no_gradient_but_the_anchors() -> None:
    dit, reference = tiny_dit(), tiny_dit(1)
    of_reference = errors_of(reference, 3).detach()
    loss, _ = preference_loss(errors_of(dit, 3), errors_of(dit, 3), of_reference, of_reference, 2.0, 0.0)
    for gradient in torch.autograd.grad(loss, list(dit.parameters()), allow_unused=True):
        assert gradient is None or float(gradient.abs().max()) < 1e-6


def test_the_gradient_goes_down_for_the_chosen_and_up_for_the_rejected() -> None:
    dit = tiny_dit()
    with torch.no_grad():
        first = [float(errors_of(dit, seed)) for seed in (3, 4)]
    reference = [torch.tensor([value]) for value in first]
    optimiser = torch.optim.SGD(dit.parameters(), lr=1e-3)
    loss, _ = preference_loss(errors_of(dit, 3), errors_of(dit, 4), *reference, beta=5.0, anchor=0.0)
    loss.backward()
    optimiser.step()
    with torch.no_grad():
        after = [float(errors_of(dit, seed)) for seed in (3, 4)]
    assert after[1] - after[0] > first[1] - first[0]


def test_means_leave_out_pinned_latents_and_do_not_favour_length() -> None:
    errors = torch.arange(16.0).view(1, 2, 8)
    free = torch.tensor([[False, True, True, False, False, False, False, False]])
    assert mean_error(errors, free).tolist() == [(1 + 2 + 9 + 10) / 4]
    assert mean_error(errors, torch.zeros_like(free)).tolist() == [0]


def test_beta_is_set_by_the_spread_of_gains() -> None:
    assert calibrated_beta(torch.tensor([1.0, 3.0])) == pytest.approx(2 / math.sqrt(2))
    for gains in (torch.tensor([1.0]), torch.tensor([1.0, 1.0])):
        with pytest.raises(ValueError, match="expected two different ones"):
            calibrated_beta(gains)


def test_the_old_policy_follows_slowly() -> None:
    old, policy = tiny_dit(0), tiny_dit(1)
    before = [parameter.clone() for parameter in old.parameters()]
    follow(old, policy, 0.75)
    for was, now, other in zip(before, old.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(now, 0.75 * was + 0.25 * other)
