"""The bound on log p(x | context): against closed forms, the readable generation loop, and plain code."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from colada.errors import ColadaError
from colada.flow import T, euler
from colada.generate.reference import BlockGenerator
from colada.models.cola import ColaDLM
from colada.models.likelihood import measure
from colada.models.prior import BlockFlow, Passes, Pins, log_prior
from colada.randomness import generator_of
from helpers import tiny_model, unit_probes

CONTEXTS = [[1, 2, 3], [], [4, 5, 6, 7, 8], [9, 8, 7, 6], [3] * 9]
TEXTS = [[7, 3, 9], [4, 8, 15, 16], [23, 42, 1, 2, 3, 4, 5], [11, 12], [31, 30, 29, 28]]


@pytest.fixture(scope="module")
def model() -> ColaDLM:
    return tiny_model(vae={"vocab_size": 50, "scaling_factor": 1.7, "shifting_factor": 0.2})


# --- the prior ------------------------------------------------------------------------------------


def test_pinned_latents_of_a_gaussian_give_the_conditional_density() -> None:
    """Two correlated numbers a channel: given the first, the second is N(m + r (p - n), s^2)."""
    generator = torch.Generator().manual_seed(0)
    slope, spread, at = torch.tensor([0.8, -0.5, 0.3]), torch.tensor([0.2, 0.5, 1.1]), 0.05
    pinned = torch.randn(4, 1, 3, generator=generator)
    mean = 0.3 + slope * (pinned - 0.1)

    def velocity(z: Tensor, a: float) -> Tensor:
        center = 0.3 + slope * (z[:, :1] - 0.1)  # of the pinned one as it is in z
        variance = (1 - a) ** 2 * spread**2 + a**2
        free = (a - (1 - a) * spread**2) / variance * (z[:, 1:] - (1 - a) * center) - center
        return torch.cat([torch.zeros_like(free), free], 1)

    scale = ((1 - at) ** 2 * spread**2 + at**2).sqrt()
    z = torch.cat([pinned, (1 - at) * mean + scale * torch.randn(4, 1, 3, generator=generator)], 1)
    pins = Pins(torch.tensor([[True, False]]).expand(4, 2), z)
    found = log_prior(velocity, z, unit_probes(4, 1, 2, 3), 300, at, pins)
    expected = torch.distributions.Normal((1 - at) * mean, scale).log_prob(z[:, 1:]).sum((1, 2))
    torch.testing.assert_close(found.float(), expected, atol=5e-3, rtol=1e-4)


def test_densities_of_blocks_multiply(model: ColaDLM) -> None:
    """log p(two blocks) = log p(first) + log p(second | first as prefix)."""
    generator = torch.Generator().manual_seed(1)
    clean, z = torch.randn(2, 2, 8, 8, generator=generator)
    flow, probes = BlockFlow(Passes(model.dit), 2, 8), unit_probes(2, 1, 4, 8)
    flow.append(clean)
    both = log_prior(flow.velocity(0, 8), z, unit_probes(2, 2, 4, 8), 3, 0.5)
    first = log_prior(flow.velocity(0, 4), z[:, :4], probes, 3, 0.5)
    after = log_prior(flow.velocity(4, 4), z[:, 4:], probes, 3, 0.5)
    torch.testing.assert_close(both, first + after, rtol=1e-5, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("length", [0, 3, 4, 6])
def test_finishing_from_noise_is_unguided_generation(model: ColaDLM, length: int) -> None:
    """Prefix, tail and noise as the readable loop has them."""
    ids = list(range(1, length + 1))
    noise = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(2))
    loop = BlockGenerator(model.vae, model.dit, steps=3)
    (sample,) = loop.start([ids], [lambda block, k: noise[block]], [0], [1.0], model.pad_id)
    expected = []
    for _ in range(2):
        list(loop.next_block([sample]))
        assert sample.block is not None
        expected.append(sample.block.latents)
    latents = model.encode(ids)
    prefix = length // 4 * 4
    where = torch.arange(8)[None] < length - prefix
    values = torch.zeros(1, 8, 8)
    values[0, : length - prefix] = latents[prefix:]
    pins = Pins(where, values)
    flow = BlockFlow(Passes(model.dit), 1, prefix + 8)
    flow.append(latents[None, :prefix])
    found = flow.finish(pins.put(noise.view(1, 8, 8)), [1.0, 2 / 3, 1 / 3, 0.0], euler, prefix, pins)
    torch.testing.assert_close(found[0], torch.cat(expected), atol=1e-4, rtol=1e-4)


# --- the bound ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "patch"), [([5, 6, 7, 8, 9], 1), ([5, 6, 7, 8, 9], 2), ([4] * 8, 1), ([2, 3, 4], 2)]
)
@pytest.mark.parametrize("prediction", ["velocity", "z0"])
def test_the_terms_are_those_of_plain_code(context: list[int], patch: int, prediction: str) -> None:
    """All of one sample's bound, without caches, packing of copies, or masks of pinned latents."""
    model = tiny_model(vae={"patch_size": patch}, dit={"prediction": prediction})
    text, at, steps, finishing = [7, 3, 9, 11, 12], 0.6, 3, 2
    found = measure(model, [text], [context], at=at, steps=steps, seed=3)[0]

    # Ids: the context filled to a whole latent, the text, and padding to whole blocks of 4 latents.
    first = -(-len(context) // patch)
    ids = context + [0] * (first * patch - len(context)) + text
    begin, total = first * patch, -(-len(ids) // (4 * patch)) * 4
    ids += [0] * (total * patch - len(ids))
    given = context + [0] * (-len(context) % (4 * patch))
    with torch.no_grad():
        known = model.vae.encode(torch.tensor(given), [len(given)]).mean[:first]
        q = model.vae.encode(torch.tensor(ids), [len(ids)])
    assert q.logvar is not None
    start = first // 4 * 4
    noise = torch.randn(total - start, 8, generator=generator_of(3, 0, 0))
    law = torch.distributions.Normal((1 - at) * q.mean, ((1 - at) ** 2 * q.logvar.exp() + at**2).sqrt())
    z = law.loc + law.scale * torch.cat([torch.zeros(start, 8), noise])
    entropy = -law.log_prob(z)[first:].sum()

    def velocity(free: Tensor, before: Tensor, pinned: Tensor, a: float) -> Tensor:
        """Of the free latents of a block, at the end of everything that is clean."""
        clean = torch.cat([before, pinned])
        times = torch.cat([torch.zeros(len(clean)), torch.full((len(free),), T * a)])
        latents = torch.cat([clean, free])
        return model.dit.velocity(latents, times, model.dit.layout([len(latents)]))[len(clean) :]

    done, prior = known[:start], torch.zeros(())
    for block in range(start, total, 4):
        pinned, free = known[block : block + 4], z[max(block, first) : block + 4]
        with torch.no_grad():
            own = free
            slopes: list[Tensor] = []
            for a, a_next in itertools.pairwise([at * (1 - n / finishing) for n in range(finishing + 1)]):
                slopes.append(velocity(own, done, pinned, a))
                # Adams–Bashforth of second order, on a grid of equal steps.
                ahead = 1.5 * slopes[-1] - 0.5 * slopes[-2] if len(slopes) > 1 else slopes[-1]
                own = own + (a_next - a) * ahead
        own_prior = torch.zeros(())
        for a, a_next in itertools.pairwise([at ** (1 - step / steps) for step in range(steps + 1)]):

            def at_a(x: Tensor, a: float, done: Tensor = done, pinned: Tensor = pinned) -> Tensor:
                return velocity(x.view(-1, 8), done, pinned, a).flatten()

            def slope(x: Tensor, a: float) -> tuple[Tensor, Tensor]:
                jacobian = torch.autograd.functional.jacobian(lambda flat: at_a(flat, a), x.flatten())
                return at_a(x.flatten(), a).detach().view_as(x), jacobian.trace()

            here, trace = slope(free, a)
            there, trace_there = slope(free + (a_next - a) * here, a_next)
            own_prior = own_prior + (a_next - a) / 2 * (trace + trace_there)
            free = free + (a_next - a) / 2 * (here + there)
        prior = prior + own_prior + torch.distributions.Normal(0.0, 1.0).log_prob(free).sum()
        done = torch.cat([done, pinned, own])
    with torch.no_grad():
        spelled = model.vae.decode(done, [total]).log_softmax(-1)
    reconstruction = sum(spelled[begin + n, token].item() for n, token in enumerate(text))
    assert found.parts["entropy"] == pytest.approx(entropy.item(), rel=1e-4)
    assert found.parts["reconstruction"] == pytest.approx(reconstruction, rel=1e-3)
    assert found.parts["prior"] == pytest.approx(prior.item(), rel=1e-3)
    assert found.log_likelihood == pytest.approx(sum(found.parts.values()), rel=1e-6)
    assert found.tokens == len(text)


def test_an_empty_context_is_none(model: ColaDLM) -> None:
    plain = measure(model, TEXTS, samples=2, steps=2)
    assert measure(model, TEXTS, [[]] * len(TEXTS), samples=2, steps=2) == plain
    mixed = measure(model, TEXTS, CONTEXTS, samples=2, steps=2)
    assert mixed[1].log_likelihood == pytest.approx(plain[1].log_likelihood, rel=1e-4)
    assert mixed[0].log_likelihood != pytest.approx(plain[0].log_likelihood, rel=1e-4)


def test_batches_do_not_matter(model: ColaDLM) -> None:
    together = measure(model, TEXTS, CONTEXTS, samples=2, steps=2, batch=8)
    apart = measure(model, TEXTS, CONTEXTS, samples=2, steps=2, batch=1)
    for a, b in zip(together, apart, strict=True):
        assert a.log_likelihood == pytest.approx(b.log_likelihood, rel=1e-4)


def test_with_a_seed_each_the_place_does_not_matter(model: ColaDLM) -> None:
    seeds = [11, 5, 7, 3, 2]
    found = measure(model, TEXTS, CONTEXTS, steps=2, seed=seeds)
    for number in (4, 0):
        alone = measure(model, [TEXTS[number]], [CONTEXTS[number]], steps=2, seed=[seeds[number]])[0]
        assert alone.log_likelihood == pytest.approx(found[number].log_likelihood, rel=1e-4)


def test_more_samples_do_not_loosen_the_bound(model: ColaDLM) -> None:
    """Of the same 32 single samples: means over groups of K rise with K, within their errors."""
    seeds = list(range(32))
    texts = measure(model, [TEXTS[0]] * 32, [CONTEXTS[0]] * 32, steps=2, seed=seeds, batch=32)
    single = torch.tensor([text.log_likelihood for text in texts], dtype=torch.float64)
    means = []
    for size in (1, 4, 8):
        bounds = single.view(-1, size).logsumexp(1) - math.log(size)
        means.append((bounds.mean().item(), bounds.std().item() / math.sqrt(len(bounds))))
    for (low, low_error), (high, high_error) in itertools.pairwise(means):
        assert high > low - 2 * math.hypot(low_error, high_error)
    text = measure(model, [TEXTS[0]], [CONTEXTS[0]], samples=3, steps=2)[0]
    assert text.log_likelihood >= sum(text.parts.values())


def test_the_right_context_helps_the_bundled_model() -> None:
    import colada

    model = colada.load()
    contexts = ["Once upon a time there was a little girl named", "The big dog ran after the red"]
    texts = [" Lily. She liked to play", " ball. He was happy"]
    right = measure(model, texts, contexts, steps=4)
    wrong = measure(model, texts, contexts[::-1], steps=4)
    assert sum(own.log_likelihood for own in right) > sum(own.log_likelihood for own in wrong)


@pytest.mark.parametrize(
    ("given", "settings", "words"),
    [
        ([[1], [2]], {}, "2 contexts for 1 texts"),
        ([[99]], {}, "prompt id 99"),
        ([[1]], {"seed": [1, 2]}, "2 values of seed for 1 texts"),
    ],
)
def test_bad_input(
    model: ColaDLM, given: list[list[int]], settings: dict[str, list[int]], words: str
) -> None:
    with pytest.raises(ColadaError, match=words):
        measure(model, [[1]], given, **settings)


def test_nothing_is_pinned_by_default() -> None:
    z = torch.ones(2, 4, 3)
    assert torch.equal(Pins.none(z).free_sum(z), torch.tensor([12.0, 12.0]))
