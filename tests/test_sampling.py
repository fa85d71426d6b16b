"""From logits to tokens, against plain loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from colada.generate.sampling import pick, probabilities
from colada.generate.settings import RequestSettings


def _logits(rows: int = 4, vocab: int = 12, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def _penalised(row: Sequence[float], seen: set[int], penalty: float) -> list[float]:
    return [
        (value / penalty if value > 0 else value * penalty) if token in seen else value
        for token, value in enumerate(row)
    ]


def _distribution(row: Sequence[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Temperature, then the k likeliest, then the smallest set that reaches p."""
    order = sorted(range(len(row)), key=lambda token: -row[token])
    kept = order[:top_k] if top_k else order
    weights = {token: math.exp((row[token] - max(row)) / temperature) for token in kept}
    total = sum(weights.values())
    shares = {token: weight / total for token, weight in weights.items()}
    nucleus: list[int] = []
    for token in kept:
        nucleus.append(token)
        if sum(shares[own] for own in nucleus) >= top_p:
            break
    total = sum(shares[token] for token in nucleus)
    return [shares[token] / total if token in nucleus else 0.0 for token in range(len(row))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 3, 11, 12, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
def test_probabilities_are_temperature_then_top_k_then_top_p(
    temperature: float, top_k: int, top_p: float
) -> None:
    logits = _logits()
    ours = probabilities(logits, RequestSettings(temperature=temperature, top_k=top_k, top_p=top_p))
    for row, own in zip(logits.tolist(), ours.tolist(), strict=True):
        assert own == pytest.approx(_distribution(row, temperature, top_k, top_p), abs=1e-6)
        assert sum(own) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("penalty", [1.1, 3.0, 0.5])
def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_ids(
    penalty: float,
) -> None:
    logits, seen = _logits(40), {0, 3, 7, 8}
    picked = pick(logits, RequestSettings(repetition_penalty=penalty), seen, torch.Generator())
    plain = [_penalised(row, seen, penalty) for row in logits.tolist()]
    assert picked.tolist() == [row.index(max(row)) for row in plain]
    assert picked.tolist() != logits.argmax(-1).tolist()


def test_the_penalty_makes_a_seen_id_of_negative_logit_less_likely_too() -> None:
    logits = torch.tensor([[-1.0, -1.5, -9.0], [-2.0, -5.0, -9.0]])
    picked = pick(logits, RequestSettings(repetition_penalty=2.0), {0}, torch.Generator())
    assert picked.tolist() == [1, 0]  # -1 becomes -2, below -1.5; -2 becomes -4, above -5


def test_the_penalty_comes_before_the_temperature_and_the_cuts() -> None:
    # Three ids of equal logit, one seen: after the penalty it is no longer among the two likeliest.
    logits = torch.tensor([[2.0, 1.9, 1.8, -5.0]]).expand(200, -1)
    sampling = RequestSettings(temperature=1.0, top_k=2, repetition_penalty=4.0)
    picked = pick(logits, sampling, {0}, torch.Generator().manual_seed(0))
    assert set(picked.tolist()) == {1, 2}


def test_picking_leaves_the_logits_as_they_were() -> None:
    logits = _logits()
    before = logits.clone()
    pick(
        logits,
        RequestSettings(temperature=0.7, top_k=3, top_p=0.8, repetition_penalty=2.0),
        {1, 2},
        torch.Generator().manual_seed(0),
    )
    assert torch.equal(logits, before)


def test_temperature_0_picks_the_likeliest_and_draws_nothing() -> None:
    logits, generator = _logits(50), torch.Generator().manual_seed(3)
    state = generator.get_state()
    picked = pick(logits, RequestSettings(), (), generator)
    assert picked.dtype == torch.int64
    assert picked.tolist() == [row.index(max(row)) for row in logits.tolist()]
    assert torch.equal(generator.get_state(), state)


def test_picked_tokens_have_the_frequencies_of_the_distribution_and_follow_the_generator() -> None:
    row, count = _logits(1, 6, 2), 40_000
    sampling = RequestSettings(temperature=1.3, top_k=4)
    picked = pick(row.expand(count, -1), sampling, (), torch.Generator().manual_seed(0))
    again = pick(row.expand(count, -1), sampling, (), torch.Generator().manual_seed(0))
    assert torch.equal(picked, again)
    shares = (torch.bincount(picked, minlength=6) / count).tolist()
    expected = _distribution(row[0].tolist(), 1.3, 4, 1.0)
    assert shares == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(count))
    assert [share == 0 for share in shares] == [value == 0 for value in expected]


def test_top_p_keeps_the_likeliest_token_however_small_p_is() -> None:
    ours = probabilities(_logits(), RequestSettings(temperature=1.0, top_p=1e-9))
    assert ours.max(-1).values.tolist() == [1.0] * 4
    assert ours.argmax(-1).tolist() == _logits().argmax(-1).tolist()


def test_top_k_1_is_greedy_at_any_temperature() -> None:
    logits = _logits(30)
    picked = pick(logits, RequestSettings(temperature=5.0, top_k=1), (), torch.Generator().manual_seed(0))
    assert picked.tolist() == logits.argmax(-1).tolist()


def test_a_vanishing_temperature_approaches_the_likeliest_token() -> None:
    logits = _logits(30)
    for temperature in (1e-3, 1e-30, 1e-40):
        picked = pick(logits, RequestSettings(temperature=temperature), (), torch.Generator().manual_seed(0))
        assert picked.tolist() == logits.argmax(-1).tolist()
