import itertools
import math

import pytest
import torch
from torch import Tensor

from colada.errors import ColadaError
from colada.evaluate.texts import summarise
from colada.flow import T, euler
from colada.models import cola_likelihood as room
from colada.models.cola import ColaDLM
from colada.models.likelihood import kind, measure
from colada.models.prior import BlockFlow, Passes, Velocity, divergence, log_prior
from helpers import tiny_model, unit_probes

AT = 0.01
TEXTS = [[7, 3, 9], [4, 8, 15, 16], [23, 42, 1, 2, 3, 4, 5, 6, 7], [11, 12], [31, 30, 29, 28, 27]]


@pytest.fixture(scope="module")
def model() -> ColaDLM:
    return tiny_model(vae={"vocab_size": 50, "scaling_factor": 1.7, "shifting_factor": 0.2})


# --- the prior, where its density is known ---------------------------------------------------------


def gaussian(mean: Tensor, deviation: Tensor) -> tuple[Velocity, Velocity]:
    """The exact velocity of the path from N(mean, deviation^2) to N(0, 1), and log p at time a."""

    def velocity(z: Tensor, a: float) -> Tensor:
        # E[z1 - z0 | z_a] for independent Gaussians z0, z1.
        variance = (1 - a) ** 2 * deviation**2 + a**2
        return (a - (1 - a) * deviation**2) / variance * (z - (1 - a) * mean) - mean

    def log_density(z: Tensor, a: float) -> Tensor:
        scale = ((1 - a) ** 2 * deviation**2 + a**2).sqrt()
        law = torch.distributions.Normal((1 - a) * mean, scale)
        return law.log_prob(z).sum((1, 2))

    return velocity, log_density


def flow_velocity(model: ColaDLM, clean: Tensor) -> Velocity:
    """Of all blocks at once, each under the clean ones (B, L, C) before it."""
    flow = BlockFlow(Passes(model.dit), *clean.shape[:2])
    flow.append(clean)
    return flow.velocity(0, clean.shape[1])


def test_the_prior_of_a_gaussian_is_its_density() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2, 6, 3, generator=generator)
    deviation = 0.05 + torch.rand(2, 6, 3, generator=generator)
    velocity, log_density = gaussian(mean, deviation)
    z = mean + deviation * torch.randn(2, 6, 3, generator=generator)
    found = log_prior(velocity, z, unit_probes(2, 3, 2, 3), steps=400, at=AT)
    torch.testing.assert_close(found.float(), log_density(z, AT), atol=5e-3, rtol=1e-4)


def test_the_solver_converges_at_second_order() -> None:
    velocity, log_density = gaussian(torch.full((1, 2, 2), 0.5), torch.full((1, 2, 2), 0.3))
    z = torch.tensor([[[0.3, 0.9], [0.1, 0.7]]])
    exact = log_density(z, AT).item()
    errors = [
        abs(log_prior(velocity, z, unit_probes(1, 1, 2, 2), steps, AT).item() - exact)
        for steps in (20, 40, 80)
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0


def test_the_divergence_is_the_trace_of_the_jacobian(model: ColaDLM) -> None:
    z = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(1))
    velocity = flow_velocity(model, torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(2)))
    v, trace = divergence(velocity, z, 0.4, unit_probes(2, 3, 4, 8))
    torch.testing.assert_close(v, velocity(z, 0.4))
    for row in range(2):

        def of_row(flat: Tensor, row: int = row) -> Tensor:
            moved = z.clone()
            moved[row] = flat.view(12, 8)
            return velocity(moved, 0.4)[row].flatten()

        jacobian = torch.autograd.functional.jacobian(of_row, z[row].flatten())
        torch.testing.assert_close(trace[row], jacobian.trace(), rtol=1e-4, atol=1e-4)


def test_random_signs_estimate_the_divergence_without_bias(model: ColaDLM) -> None:
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(1, 8, 8, generator=generator)
    velocity = flow_velocity(model, z)
    _, exact = divergence(velocity, z, 0.7, unit_probes(1, 2, 4, 8))
    signs = torch.randint(2, (300, 1, 8, 8), generator=generator) * 2.0 - 1
    estimates = torch.stack([divergence(velocity, z, 0.7, one[None])[1] for one in signs])
    error = estimates.std() / math.sqrt(len(signs))
    assert abs(estimates.mean() - exact.item()) < 4 * error
    assert estimates.std() > 0


def test_a_block_is_moved_under_its_clean_history(model: ColaDLM) -> None:
    """The velocity of all blocks at once is that of each alone, given the clean ones before it."""
    generator = torch.Generator().manual_seed(4)
    clean, z = torch.randn(2, 1, 12, 8, generator=generator)
    found = flow_velocity(model, clean)(z, 0.3)
    for block in range(3):
        start, end = 4 * block, 4 * block + 4
        packed = torch.cat([clean[0, :start], z[0, start:end]])
        times = torch.cat([torch.zeros(start), torch.full((4,), T * 0.3)])
        alone = model.dit.velocity(packed, times, model.dit.layout([end]))[start:]
        torch.testing.assert_close(found[0, start:end], alone, atol=1e-5, rtol=1e-5)


# --- the bound -------------------------------------------------------------------------------------


def test_the_terms_of_one_sample_add_up(model: ColaDLM) -> None:
    found = measure(model, TEXTS, samples=1, steps=4)
    for text, ids in zip(found, TEXTS, strict=True):
        assert text.log_likelihood == pytest.approx(sum(text.parts.values()), rel=1e-6)
        assert text.tokens == len(ids)
        assert text.parts["reconstruction"] < 0


def test_the_entropy_is_that_of_the_posterior_carried_along_the_path(model: ColaDLM) -> None:
    ids = TEXTS[1]
    found = measure(model, [ids], samples=64, steps=1, at=0.3)[0]
    q = model.vae.encode(torch.tensor(ids), [len(ids)])
    assert q.logvar is not None
    deviation = ((0.7 * (0.5 * q.logvar).exp() * 1.7) ** 2 + 0.3**2).sqrt()
    exact = torch.distributions.Normal(torch.zeros_like(deviation), deviation).entropy().sum().item()
    # The sampled one differs by the noise's own squares: variance 1/2 a number.
    assert found.parts["entropy"] == pytest.approx(exact, abs=4 * math.sqrt(0.5 * q.mean.numel() / 64))


def test_finishing_is_generation_from_where_the_latents_are(model: ColaDLM) -> None:
    """Blocks follow each other under finished ones, here without any KV cache kept."""
    z = torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found = BlockFlow(Passes(model.dit), 1, 12).finish(z, [0.5, 0.375, 0.25, 0.125, 0.0], euler)
        done = z[0, :0]
        for block in z[0].split(4):
            layout = model.dit.layout([len(done) + 4])
            for a, a_next in itertools.pairwise([0.5, 0.375, 0.25, 0.125, 0.0]):
                times = torch.cat([torch.zeros(len(done)), torch.full((4,), T * a)])
                velocity = model.dit.velocity(torch.cat([done, block]), times, layout)[-4:]
                block = block + (a_next - a) * velocity
            done = torch.cat([done, block])
    torch.testing.assert_close(found[0], done, atol=1e-4, rtol=1e-4)


def test_hutchinson_is_used_for_wide_blocks_and_agrees(
    model: ColaDLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = measure(model, [TEXTS[1]], samples=1, steps=3)[0]
    monkeypatch.setattr(room, "EXACT_NUMBERS", 0)
    estimates = torch.tensor(
        [measure(model, [TEXTS[1]], steps=3, seed=0)[0].parts["prior"] for _ in range(2)]
    )
    assert estimates[0] == estimates[1] != exact.parts["prior"]
    assert estimates[0].item() == pytest.approx(exact.parts["prior"], rel=0.5)
    # An estimate's noise would enter the weights of several samples: they take the trace itself.
    two = measure(model, [TEXTS[1]], samples=2, steps=3)
    monkeypatch.undo()
    assert two == measure(model, [TEXTS[1]], samples=2, steps=3)


def test_a_second_input_takes_no_part_in_a_likelihood() -> None:
    guessing = tiny_model(dit={"self_conditioning": True})
    first = measure(guessing, TEXTS[:2], steps=3)
    with torch.no_grad():
        guessing.dit.sc_in.proj.weight.add_(1)
    assert measure(guessing, TEXTS[:2], steps=3) == first


def test_bits_per_byte_of_the_bundled_model() -> None:
    import colada

    model = colada.load()
    texts = ["Once upon a time there was a little girl.", "The dog ran home."]
    scores = measure(model, texts, steps=4)
    found = summarise(scores, kind(model))
    total = sum(len(text) for text in texts)
    nats = -sum(score.log_likelihood for score in scores)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / total)
    assert found["kind"] == "bound"
    assert found["standard_error"] > 0
    shuffled = measure(model, [text[::-1] for text in texts], steps=4)
    assert nats < -sum(score.log_likelihood for score in shuffled)


@pytest.mark.parametrize(
    ("settings", "texts", "words"),
    [
        ({"samples": 0}, [[1]], "samples=0"),
        ({"steps": 0}, [[1]], "steps=0"),
        ({"at": 0.0}, [[1]], "at=0.0"),
        ({"batch": -1}, [[1]], "batch=-1"),
        ({}, [[1], []], "text 1 has no tokens"),
        ({}, [[99]], "prompt id 99"),
    ],
)
def test_bad_input(model: ColaDLM, settings: dict[str, int], texts: list[list[int]], words: str) -> None:
    with pytest.raises(ColadaError, match=words):
        measure(model, texts, **settings)


def test_a_deterministic_encoder_has_no_bound() -> None:
    with pytest.raises(ColadaError, match="use_variation"):
        measure(tiny_model(vae={"use_variation": False}), [[1, 2]])
