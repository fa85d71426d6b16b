"""Losses after pretraining: preferences between answers (Flow-DPO), and rewards of answers (DiffusionNFT).

Both are made of flow matching's errors at the same noise under two or three networks: the one that learns, a
frozen reference, and for rewards the policy that wrote the answers. Latents that are pinned (prompts) have no
error and take no part. In the notation of the papers f is a network's prediction, here as a velocity, and u
the velocity of the data.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_error(errors: Tensor, free: Tensor) -> Tensor:
    """Return each row's mean error (B,) over copies and free latents.

    Means, not sums: a preference must not be one for short answers.

    Args:
        errors: (B, K, M), see :func:`colada.train.flow_matching.flow_errors`.
        free: bool (B, M), latents that are not pinned and not filling.
    """
    where = free[:, None].expand_as(errors)
    return (errors * where).sum((1, 2)) / where.sum((1, 2)).clamp_min(1)


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    anchor: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of Flow-DPO (arXiv:2501.13918) of pairs, summed, and its terms summed.

    L = -log sigmoid(-beta / 2 [D(chosen) - D(rejected)]) + anchor e(chosen), D the mean error (P,) less that
    of the reference at the same noise. The anchor keeps the model from learning only to unlearn.

    Args:
        chosen, rejected: :func:`mean_error` of the network that learns, (P,).
        reference_chosen, reference_rejected: of the frozen one, (P,).
        beta: how sharply pairs are told apart; 0 leaves the anchor alone.
        anchor: weight of the chosen answers' own error.
    """
    gain = (rejected - reference_rejected) - (chosen - reference_chosen)
    loss = -F.logsigmoid(0.5 * beta * gain) + anchor * chosen
    terms = {
        "preferred": (gain > 0).float().sum(),
        "margin": gain.sum(),
        "chosen": (chosen - reference_chosen).sum(),
        "rejected": (rejected - reference_rejected).sum(),
        "flow": chosen.sum(),
    }
    return loss.sum(), {name: term.detach() for name, term in terms.items()}


def calibrated_beta(gains: Tensor) -> float:
    """Return the beta at which a usual gain moves the sigmoid by as much as it can: 2 / its deviation.

    Raises:
        ValueError: for fewer than two gains, or all the same.
    """
    deviation = float(gains.std()) if len(gains) > 1 else 0.0
    if not deviation > 0:
        raise ValueError(f"{len(gains)} gains with a deviation of {deviation}, expected two different ones")
    return 2 / deviation


def rewards_to_shares(rewards: Tensor, least_spread: float) -> Tensor:
    """Return r = 1/2 + clip(A / Z) / 2 in 0..1 for rewards (G, n) of n answers to each of G prompts.

    A is an answer's reward less its group's mean, Z the group's deviation, or ``least_spread`` if that is
    more. A group of equal rewards has r = 1/2, which teaches nothing but to stay.
    """
    advantage = rewards - rewards.mean(1, keepdim=True)
    spread = rewards.std(1, correction=0, keepdim=True).clamp_min(least_spread)
    return 0.5 + 0.5 * (advantage / spread).clamp(-1, 1)


def reward_errors(
    policy: Tensor, old: Tensor, target: Tensor, share: Tensor, beta: float, normalised: bool = True
) -> Tensor:
    """Return DiffusionNFT's error (arXiv:2509.16117) per latent number, (B, K, M).

    r ||f+ - u||^2 + (1 - r) ||f- - u||^2, f+ = f_old + beta (f - f_old) and f- = f_old - beta (f - f_old):
    good answers pull the policy towards them by f+, bad ones push it away by f-, and no error is negative.

    Args:
        policy, old, target: velocities (B, K, M, C) of the network that learns, of the one that wrote the
            answers (no gradient), and of the answers' latents themselves.
        share: r in 0..1, broadcast over (B, K, M).
        beta: how far the two lie apart.
        normalised: divide each of the two by its detached mean absolute error, so that no noise level
            outweighs the others.
    """
    move = beta * (policy - old.detach())

    def error(prediction: Tensor) -> Tensor:
        difference = prediction - target
        squared = difference.square().mean(-1)
        if normalised:
            squared = squared / difference.detach().abs().mean(-1).clamp_min(1e-5)
        return squared

    return share * error(old.detach() + move) + (1 - share) * error(old.detach() - move)


@torch.no_grad()
def follow(old: torch.nn.Module, policy: torch.nn.Module, keep: float) -> None:
    """Move the policy that writes towards the one that learns: old <- keep old + (1 - keep) policy."""
    for slow, fast in zip(old.parameters(), policy.parameters(), strict=True):
        slow.lerp_(fast.to(slow.dtype), 1 - keep)
