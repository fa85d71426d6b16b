import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from colada.errors import ColadaError
from colada.generate.noise import released_noise, sample_noise
from colada.generate.reference import BlockGenerator, TransportStep, encode
from colada.generate.settings import Settings
from colada.models.cola import ColaDLM
from helpers import tiny_dit, tiny_model, tiny_vae

PROMPTS: list[list[int]] = [
    [],
    [7, 3, 9],
    [4, 8, 15, 16],
    [23, 42, 1, 2, 3, 4, 5, 6, 7],
    [11, 12, 13, 14, 15, 16],
    [31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19],
]
SEEDS = [3, 1, 4, 15, 9, 2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> ColaDLM:
    return tiny_model()


def last_steps(model: ColaDLM, prompt: Sequence[int], tokens: int, **settings: object) -> list[Tensor]:
    """The finished latents of every block of one prompt."""
    finished: list[Tensor] = []

    def keep(step: TransportStep) -> None:
        if step.step == step.steps:
            finished.append(step.latents[0].clone())

    model.generate([list(prompt)], tokens, callback=keep, **settings)  # type: ignore[arg-type]
    return finished


# --- against the specification, spelled out -----------------------------------------------------


@torch.no_grad()
def plain_generation(
    model: ColaDLM,
    prompt: Sequence[int],
    noise: Callable[[int], Tensor],
    blocks: int,
    steps: int,
    guidance: float,
    penalty: float = 1.0,
    cap: float = math.inf,
    rescale: float = 0.0,
    end: float = 0.0,
    against: str = "block",
) -> tuple[list[Tensor], list[list[int]], int]:
    """Section 4 of the specification for one prompt, with whole passes and nothing kept between them.

    Returns: latents and ids per block, and how many of the first ids repeat the prompt's tail.
    """
    vae, dit = model.vae, model.dit
    size, patch = vae.config.block_size, vae.config.patch_size
    done = torch.zeros(0, vae.config.latent_dim)
    tail = done
    if prompt:
        padded = list(prompt)
        while len(padded) % (patch * size):
            padded.append(model.pad_id)
        mean = vae.encode(torch.tensor(padded), [len(padded)]).mean
        latents = (mean - vae.config.shifting_factor) * vae.config.scaling_factor
        kept = [z for i, z in enumerate(latents) if i * patch < len(prompt)]
        whole = len(kept) - len(kept) % size
        done, tail = latents[:whole], latents[whole : len(kept)]
    skip = len(tail) * patch

    def velocity(before: Tensor, z: Tensor, a: float, pins: int, guess: Tensor) -> Tensor:
        clean, noisy = [0.0] * (len(before) + pins), [1000 * a] * (len(z) - pins)
        times = torch.tensor(clean + noisy)
        guesses = torch.cat([0 * before, guess]) if dit.config.self_conditioning else None
        out = dit(torch.cat([before, z]), times, dit.layout([len(times)]), guess=guesses)[len(before) :]
        if dit.config.prediction == "z0":
            return (z - out) / a * (times[len(before) :, None] > 0)
        return out

    all_latents, all_ids, seen = [], [], set[int]()
    for b in range(blocks):
        z, pins = noise(b), len(tail)
        guess = torch.zeros_like(z)
        grid = [1 - i / steps for i in range(steps) if 1 - i / steps >= end] + [0.0]
        for a, a_next in itertools.pairwise(grid):
            z = torch.cat([tail, z[pins:]])
            v = c = velocity(done, z, a, pins, guess)
            if len(done) or against == "latents":
                step = dit.config.patch_size if against == "latents" else size
                parts = [slice(i, i + step) for i in range(0, size, step)]
                u = torch.cat(
                    [
                        velocity(done[:0], z[part], a, min(max(pins - part.start, 0), step), guess[part])
                        for part in parts
                    ]
                )
                v = u + guidance * (v - u)
                z0 = z - a * v
                if rescale:
                    sizes = [float(x[pins:].square().mean().sqrt()) for x in (z - a * c, z0)]
                    z0 = z0 * (rescale * sizes[0] / sizes[1] + 1 - rescale)
                lengths = z0.square().mean(-1, keepdim=True).sqrt()
                v = (z - torch.where(lengths > cap, z0 * cap / lengths, z0)) / a
            guess = torch.cat([tail, (z - a * c)[pins:]])
            z = z + (a_next - a) * v
            z = torch.cat([tail, z[len(tail) :]])
        everything = torch.cat([done, z])
        logits = vae.decode(everything, [len(everything)])[len(done) * patch :]
        for token in seen:
            own = logits[:, token]
            logits[:, token] = torch.where(own > 0, own / penalty, own * penalty)
        ids = logits.argmax(-1).tolist()
        seen |= set(ids)
        all_latents.append(z)
        all_ids.append(ids)
        done, tail = everything, tail[:0]
    return all_latents, all_ids, skip


BOUNDED = {"guidance_cap": 0.8, "guidance_rescale": 0.4, "early_end": 0.3}
AGAINST = {"guidance_against": "latents"}


@pytest.mark.parametrize(
    "settings", [{}, BOUNDED, AGAINST, {**BOUNDED, **AGAINST}], ids=["plain", "bounded", "latents", "both"]
)
@pytest.mark.parametrize(
    "dit", [{"self_conditioning": True}, {"prediction": "z0", "self_conditioning": True, "patch_size": 2}, {}]
)
def test_guesses_that_are_fed_back_and_bounded_equal_the_plain_loop(
    dit: dict[str, object], settings: dict[str, Any]
) -> None:
    model = tiny_model(dit=dit)
    bounds: dict[str, Any] = {"cap": 0.8, "rescale": 0.4, "end": 0.3} if "early_end" in settings else {}
    bounds["against"] = settings.get("guidance_against", "block")
    for number, prompt in enumerate([[], *PROMPTS[2:6]]):
        latents, _, _ = plain_generation(model, prompt, lambda b: released(66, b), 3, 5, 6.0, **bounds)
        common = {"steps": 5, "guidance": 6.0, "noise": "released", "seed": 66, **settings}
        made = last_steps(model, prompt, 9, **common)
        for ours, plain in zip(made, latents, strict=False):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4, msg=f"prompt {number}")
    other = last_steps(model, PROMPTS[4], 9, steps=5, guidance=6.0, noise="released", seed=66)
    same = last_steps(model, PROMPTS[4], 9, steps=5, guidance=6.0, noise="released", seed=66, **settings)
    assert torch.allclose(other[-1], same[-1]) == (not settings)


def test_a_schedule_may_be_its_values(model: ColaDLM) -> None:
    named = last_steps(model, PROMPTS[4], 9, steps=4, seed=1)
    given = last_steps(model, PROMPTS[4], 9, steps=9, schedule=[1, 0.75, 0.5, 0.25, 0], seed=1)
    for one, other in zip(named, given, strict=True):
        torch.testing.assert_close(one, other)


def test_an_early_end_saves_evaluations(model: ColaDLM) -> None:
    steps = []
    model.generate([PROMPTS[4]], 1, steps=10, early_end=0.55, callback=lambda step: steps.append(step.steps))
    assert steps == [5] * 5


@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS[4]], ids=["none", "with a tail"])
def test_of_several_candidates_the_one_with_the_surest_tokens_is_kept(
    model: ColaDLM, prompt: list[int]
) -> None:
    vae, chosen = model.vae, list[int]()
    for block in range(3):
        sureness = []
        for k in range(4):
            picks = [*chosen, k]
            noises = [block_noise(9, b, picks[b]) for b in range(block + 1)]
            latents, _, skip = plain_generation(model, prompt, noises.__getitem__, block + 1, 3, 4.0)
            before = list(prompt[: len(prompt) // 4 * 4])
            clean = encode(vae, [before], 0)[0]
            with torch.no_grad():
                logits = vae.decode(torch.cat([clean, *latents]), [len(before) + 4 * (block + 1)])
            likeliest = logits[-4:].double().softmax(-1).amax(-1)[skip if block == 0 else 0 :]
            sureness.append(float(likeliest.log().mean()))
        chosen.append(sureness.index(max(sureness)))
        expected = plain_generation(model, prompt, lambda b: block_noise(9, b, chosen[b]), block + 1, 3, 4.0)
    assert len(set(chosen)) > 1
    settings: Settings = {"steps": 3, "guidance": 4.0, "candidates": 4, "seed": 9}
    tokens = [token for ids in expected[1] for token in ids][expected[2] :]
    (made,) = model.generate([prompt], len(tokens), end_ids=(), **settings)
    assert list(made.tokens) == tokens
    # One candidate is what there is without any; the guess after the last step reads as the block does.
    assert model.generate([prompt], 9, seed=9, candidates=1) == model.generate([prompt], 9, seed=9)
    chunks = list(model.stream([prompt], len(tokens), guesses=True, end_ids=(), **settings))
    last = [chunk.tokens for chunk in chunks if chunk.step == 3]
    assert last == [chunk.tokens for chunk in chunks if chunk.step is None]


def test_candidates_of_a_hole_are_judged_by_its_own_tokens(model: ColaDLM) -> None:
    # Two tokens in the middle of a block.
    def log_confidence(seed: int, candidates: int) -> float:
        session = model.session(capacity=32)
        session.submit(
            [1, 2, 3, 4, 5], 2, suffix=[6, 7], confidence=True, steps=2, candidates=candidates, seed=seed
        )
        (last,) = [chunk for chunk in session.chunks() if chunk.completion is not None]
        assert last.confidence is not None
        return sum(map(math.log, last.confidence))

    gains = [log_confidence(seed, 6) - log_confidence(seed, 1) for seed in range(6)]
    assert min(gains) > -1e-4  # Rounding.
    assert max(gains) > 1e-3


def block_noise(seed: int, block: int, candidate: int) -> Tensor:
    state = np.random.SeedSequence([seed, block, 1 + candidate if candidate else 0]).generate_state(
        1, np.uint64
    )
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(int(state[0])))


def test_released_candidates_are_what_the_generator_draws_next() -> None:
    generator = torch.Generator().manual_seed(7 + 10_000_000 * 2)
    for k in range(3):
        expected = torch.randn(4, 8, generator=generator)
        assert torch.equal(released_noise(7, (4, 8), CPU)(2, k), expected)


def released(seed: int, block: int, shape: tuple[int, int] = (4, 8)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 10_000_000 * block))


@pytest.mark.parametrize(
    ("vae", "dit"),
    [
        ({}, {}),
        ({"patch_size": 2, "scaling_factor": 0.7, "shifting_factor": -0.3}, {}),
        ({}, {"prediction": "z0"}),
        ({"patch_size": 2}, {"patch_size": 2}),
        ({"use_variation": False, "block_size": 3}, {"block_size": 3}),
    ],
    ids=["released", "vae-patches", "z0", "both-patches", "blocks-of-3"],
)
def test_generation_equals_a_plain_loop_over_the_specification(
    vae: dict[str, object], dit: dict[str, object]
) -> None:
    model = tiny_model(vae=vae, dit=dit)
    shape = (model.vae.config.block_size, 8)
    # A guess of z0 becomes a velocity by division by a = 1/4 and more.
    tolerance = 5e-5 if dit.get("prediction") == "z0" else 1e-5
    distinct = set()
    for number, prompt in enumerate(PROMPTS):
        latents, ids, skip = plain_generation(model, prompt, lambda b: released(66, b, shape), 3, 4, 7.0)
        flat = list(itertools.chain(*ids))[skip:]
        settings = {"steps": 4, "guidance": 7.0, "noise": "released", "seed": 66}
        made = last_steps(model, prompt, len(flat), **settings)
        for ours, plain in zip(made, latents, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=tolerance, msg=f"prompt {number}")
        completion = model.generate([prompt], len(flat), **settings)[0]  # type: ignore[arg-type]
        assert list(completion.tokens) == flat
        distinct |= set(flat)
    assert len(distinct) > 5


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_guidance_moves_the_velocity_away_from_the_unconditional_one(model: ColaDLM, guidance: float) -> None:
    prompt = PROMPTS[3]
    plain, _, _ = plain_generation(model, prompt, lambda b: released(5, b), 2, 3, guidance)
    made = last_steps(model, prompt, 7, steps=3, guidance=guidance, noise="released", seed=5)
    for ours, expected in zip(made, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_guidance_of_one_runs_no_unconditional_pass(model: ColaDLM, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    real = model.dit.txt_out.forward

    def count(hidden: Tensor) -> Tensor:
        rows.append(len(hidden) // 4)
        return real(hidden)

    monkeypatch.setattr(model.dit.txt_out, "forward", count)
    model.generate([PROMPTS[2], PROMPTS[5]], 2, steps=2, guidance=1.0)
    assert rows == [2, 2]
    rows.clear()
    model.generate([PROMPTS[2], PROMPTS[5]], 2, steps=2, guidance=[1.0, 3.0])
    assert rows == [3, 3]


def test_a_first_block_without_a_prefix_ignores_guidance(model: ColaDLM) -> None:
    for prompt in (PROMPTS[0], PROMPTS[1]):
        weak, strong = (last_steps(model, prompt, 5, steps=3, guidance=s, seed=1) for s in (1.0, 9.0))
        assert torch.equal(weak[0], strong[0])
        assert not torch.allclose(weak[1], strong[1], atol=1e-3)


@pytest.mark.parametrize("penalty", [1.0, 1.8])
def test_the_repetition_penalty_counts_earlier_blocks_and_not_the_prompt(penalty: float) -> None:
    changed = 0
    for seed in range(4):
        model = tiny_model(seed)
        for prompt in (PROMPTS[1], PROMPTS[3]):
            _, ids, skip = plain_generation(model, prompt, lambda b: released(2, b), 4, 2, 3.0, penalty)
            _, free, _ = plain_generation(model, prompt, lambda b: released(2, b), 4, 2, 3.0)
            changed += ids != free
            assert ids[0] == free[0]
            flat = list(itertools.chain(*ids))[skip:]
            completion = model.generate(
                [prompt],
                len(flat),
                steps=2,
                guidance=3.0,
                noise="released",
                seed=2,
                repetition_penalty=penalty,
            )[0]
            assert list(completion.tokens) == flat
    assert (changed > 0) == (penalty != 1)


# --- batches ------------------------------------------------------------------------------------


def run_blocks(
    model: ColaDLM, which: Sequence[int], blocks: int = 3, temperature: float = 0.0
) -> dict[int, tuple[Tensor, list[int]]]:
    """Latents and ids of the chosen PROMPTS, run together."""
    engine = BlockGenerator(model.vae, model.dit, steps=4, temperature=temperature)
    noises = [sample_noise(SEEDS[i], (4, 8), CPU) for i in which]
    with torch.inference_mode():
        prompts, seeds = [PROMPTS[i] for i in which], [SEEDS[i] for i in which]
        samples = engine.start(prompts, noises, seeds, [7.0] * len(which), 0)
        latents: list[list[Tensor]] = [[] for _ in which]
        ids: list[list[int]] = [[] for _ in which]
        for _ in range(blocks):
            for _ in engine.next_block(samples):
                pass
            for number, sample in enumerate(samples):
                assert sample.block is not None
                latents[number].append(sample.block.latents)
                ids[number] += sample.block.ids
    return {i: (torch.cat(latents[n]), ids[n]) for n, i in enumerate(which)}


def groupings() -> list[list[list[int]]]:
    rng = random.Random(0)
    made = [[list(range(6))], [list(reversed(range(6)))]]
    for _ in range(4):
        order = rng.sample(range(6), 6)
        cut = rng.randrange(1, 6)
        made.append([order[:cut], order[cut:]])
    return made


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_sample_does_not_depend_on_the_batch_it_is_in(model: ColaDLM, temperature: float) -> None:
    alone: dict[int, tuple[Tensor, list[int]]] = {}
    for i in range(6):
        alone |= run_blocks(model, [i], temperature=temperature)
    assert len({token for _, ids in alone.values() for token in ids}) > 8
    for grouping in groupings():
        for group in grouping:
            for i, (latents, ids) in run_blocks(model, group, temperature=temperature).items():
                assert ids == alone[i][1]
                torch.testing.assert_close(latents, alone[i][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patch", [1, 2])
def test_generate_gives_each_prompt_what_it_gets_alone(patch: int) -> None:
    model = tiny_model(vae={"patch_size": patch})
    settings = {"steps": 3, "guidance": [7.0, 1.0, 3.0, 7.0, 2.0, 5.0], "seed": SEEDS}
    together = model.generate(PROMPTS, 11, **settings)  # type: ignore[arg-type]
    for i, prompt in enumerate(PROMPTS):
        own = {"steps": 3, "guidance": settings["guidance"][i], "seed": SEEDS[i]}  # type: ignore[index]
        assert model.generate([prompt], 11, **own)[0] == together[i]  # type: ignore[arg-type]
    order = [4, 0, 5, 2]
    some = {
        "steps": 3,
        "guidance": [settings["guidance"][i] for i in order],  # type: ignore[index]
        "seed": [SEEDS[i] for i in order],
    }
    again = model.generate([PROMPTS[i] for i in order], 11, **some)  # type: ignore[arg-type]
    assert again == [together[i] for i in order]


def test_samples_that_end_early_leave_the_others_alone(model: ColaDLM) -> None:
    free = model.generate(PROMPTS, 24, steps=3, seed=SEEDS)
    end = free[3].tokens[2]
    ended = model.generate(PROMPTS, 24, steps=3, seed=SEEDS, end_ids=[end])
    assert len({len(completion.tokens) for completion in ended}) > 1
    for before, after in zip(free, ended, strict=True):
        cut = before.tokens.index(end) if end in before.tokens else 24
        assert after.tokens == before.tokens[:cut]
        assert after.finish_reason == ("end" if cut < 24 else "length")


@pytest.mark.parametrize(("block", "patch"), [(1, 1), (4, 1), (3, 2), (4, 3), (5, 1)])
def test_max_new_tokens_is_exact(block: int, patch: int) -> None:
    model = tiny_model(vae={"block_size": block, "patch_size": patch}, dit={"block_size": block})
    prompts = [list(range(1, n + 1)) for n in range(2 * block * patch + 2)]
    for wanted in (1, 2, block * patch, block * patch + 1, 13):
        for completion in model.generate(prompts, wanted, steps=1):
            assert len(completion.tokens) == wanted
            assert completion.finish_reason == "length"


def test_more_tokens_extend_what_fewer_gave(model: ColaDLM) -> None:
    long = model.generate(PROMPTS, 17, steps=2, seed=SEEDS)
    for wanted in (1, 4, 9):
        short = model.generate(PROMPTS, wanted, steps=2, seed=SEEDS)
        assert [own.tokens for own in short] == [own.tokens[:wanted] for own in long]


# --- pinned latents -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "prediction"),
    [("euler", "velocity"), ("ab2", "velocity"), ("euler", "z0"), ("heun", "velocity"), ("heun", "z0")],
)
def test_the_prompts_tail_stays_pinned_at_every_step(solver: str, prediction: str) -> None:
    evaluations = 9 if solver == "heun" else 5
    model = tiny_model(dit={"prediction": prediction})
    for prompt in PROMPTS:
        tail = model.encode(prompt)[len(prompt) // 4 * 4 :]
        steps: list[TransportStep] = []
        model.generate([prompt], 4 - len(tail), steps=5, solver=solver, callback=steps.append)
        assert [step.step for step in steps] == list(range(1, evaluations + 1))
        for step in steps:
            assert step.steps == evaluations
            for z in (step.latents, step.z0):
                assert z.shape == (1, 4, 8)
                torch.testing.assert_close(z[0, : len(tail)], tail, rtol=0, atol=1e-6)
        free = [step.latents[0, len(tail) :] for step in steps]
        assert not any(torch.equal(one, other) for one, other in itertools.pairwise(free))


def test_the_last_velocity_points_at_the_result(model: ColaDLM) -> None:
    steps: list[TransportStep] = []
    model.generate([PROMPTS[5]], 3, steps=6, callback=steps.append)
    torch.testing.assert_close(steps[-1].z0, steps[-1].latents, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(steps[0].z0, steps[0].latents, atol=1e-2)


def test_encoding_is_the_normalised_posterior_mean_of_padded_ids() -> None:
    model = tiny_model(vae={"patch_size": 2, "scaling_factor": 2.0, "shifting_factor": 0.5})
    engine = BlockGenerator(model.vae, model.dit)
    prompts = [[], [1, 2, 3], list(range(1, 17))]
    made = engine.encode(prompts, 0)
    assert [len(latents) for latents in made] == [0, 4, 8]
    mean = model.vae.encode(torch.tensor([1, 2, 3, 0, 0, 0, 0, 0]), [8]).mean
    torch.testing.assert_close(made[1], (mean - 0.5) * 2)
    other = engine.encode([[1, 2, 3]], 9)[0]
    assert not torch.allclose(other, made[1], atol=1e-3)


# --- noise --------------------------------------------------------------------------------------


@pytest.fixture
def still(model: ColaDLM, monkeypatch: pytest.MonkeyPatch) -> ColaDLM:
    """A model whose DiT does not move the latents: they end as the noise they began with."""
    out = model.dit.txt_out
    monkeypatch.setattr(out, "forward", lambda hidden: hidden.new_zeros(len(hidden), out.proj.out_features))
    return model


def starting_noise(model: ColaDLM, **settings: object) -> list[Tensor]:
    """The noise (B, block, C) of every block."""
    made: list[Tensor] = []
    model.generate(
        [[], [], []],
        12,
        steps=1,
        callback=lambda step: made.append(step.latents.clone()),
        **settings,  # type: ignore[arg-type]
    )
    assert len(made) == 3
    return made


def test_released_noise_is_seeded_by_sample_and_block(still: ColaDLM) -> None:
    for b, noise in enumerate(starting_noise(still, seed=66, noise="released")):
        for i in range(3):
            generator = torch.Generator().manual_seed(66 + 1000 * i + 10_000_000 * b)
            assert torch.equal(noise[i], torch.randn(4, 8, generator=generator))
    assert torch.equal(released_noise(7, (4, 8), CPU)(2, 0), released(7, 2))


def test_per_sample_noise_is_independent_standard_normal(still: ColaDLM) -> None:
    blocks = starting_noise(still, seed=5)
    assert all(not torch.allclose(a, b) for a, b in itertools.combinations(torch.cat(blocks), 2))
    many = torch.cat(
        [sample_noise(seed, (4, 8), CPU)(b, 0) for seed in range(60) for b in range(10)]
    ).flatten()
    # 19,200 numbers: a standard error of 0.007 of the mean and 0.005 of the deviation.
    assert float(many.mean()) == pytest.approx(0, abs=0.03)
    assert float(many.std()) == pytest.approx(1, abs=0.02)


def test_token_draws_do_not_reuse_the_noise_stream(model: ColaDLM) -> None:
    draws = [model.generate([[]], 8, steps=1, temperature=5.0, seed=s)[0].tokens for s in range(6)]
    assert len(set(draws)) == 6
    assert draws[0] == model.generate([[]], 8, steps=1, temperature=5.0, seed=0)[0].tokens


@pytest.mark.parametrize(("rule", "stride"), [("per-sample", 1), ("released", 1000)])
def test_one_seed_stands_for_one_each(model: ColaDLM, rule: str, stride: int) -> None:
    one = model.generate(PROMPTS[:3], 6, steps=2, seed=5, noise=rule)
    each = model.generate(PROMPTS[:3], 6, steps=2, seed=[5, 5 + stride, 5 + 2 * stride], noise=rule)
    assert one == each
    assert [own.seed for own in one] == [5, 5 + stride, 5 + 2 * stride]
    assert one != model.generate(PROMPTS[:3], 6, steps=2, seed=6, noise=rule)


# --- solvers, schedules, settings ---------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "ab2", "heun"])
@pytest.mark.parametrize("schedule", ["uniform", "front-loaded", "logit-normal"])
def test_all_solvers_and_schedules_approach_the_same_latents(
    model: ColaDLM, solver: str, schedule: str
) -> None:
    fine = last_steps(model, PROMPTS[3], 3, steps=400, guidance=2.0)[0]
    settings = {"solver": solver, "schedule": schedule, "guidance": 2.0}
    near = last_steps(model, PROMPTS[3], 3, steps=60, **settings)[0]
    coarse = last_steps(model, PROMPTS[3], 3, steps=2, **settings)[0]
    assert float((near - fine).norm()) < 0.3 * float((coarse - fine).norm())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"solver": "eular"}, "solver='eular'.*did you mean 'euler'"),
        ({"schedule": "uniforn"}, "schedule='uniforn'.*did you mean 'uniform'"),
    ],
)
def test_the_engine_refuses_unknown_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ColadaError, match=message):
        BlockGenerator(tiny_vae(), tiny_dit(), **settings)  # type: ignore[arg-type]
