"""Distillation: what a teacher teaches, against a block at a time and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from colada.flow import T, guided, interpolate, rms, within_the_data
from colada.networks.dit import DiT
from colada.networks.layers import KVCache
from colada.train.distillation import Guided, distillation_errors, landing, target_of
from colada.train.flow_matching import Pinned, flow_errors, place
from helpers import tiny_dit

ROWS, COPIES, BLOCKS, SIZE, WIDTH = 2, 2, 3, 4, 8
LENGTH = BLOCKS * SIZE


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def example(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Clean latents (B, M, C), noisy ones (B, K, M, C) and timesteps (B, K, M)."""
    g = seeded(seed)
    clean = torch.randn(ROWS, LENGTH, WIDTH, generator=g)
    noisy = torch.randn(ROWS, COPIES, LENGTH, WIDTH, generator=g)
    timestep = 300 + 700 * torch.rand(ROWS, COPIES, BLOCKS, generator=g).repeat_interleave(SIZE, 2)
    return clean, noisy, timestep


def pins() -> Pinned:
    where = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    where[0, 4:6] = where[1, 8] = True
    return Pinned(where, torch.randn(ROWS, LENGTH, WIDTH, generator=seeded(5)))


def plain_guess(
    teacher: Guided, z: Tensor, timestep: Tensor, clean: Tensor, pinned: Pinned | None, row: int
) -> Tensor:
    """One copy (M, C) of a row, a block at a time, with loops over what guidance says."""
    dit, cache, found = teacher.dit, KVCache(), []
    for start in range(0, LENGTH, SIZE):
        block = slice(start, start + SIZE)
        where = torch.zeros(SIZE, dtype=torch.bool) if pinned is None else pinned.where[row, block]
        t = torch.where(where, 0.0, timestep[block])

        def z0(past: KVCache | None, block: slice = block, t: Tensor = t, where: Tensor = where) -> Tensor:
            layout = dit.layout([len(t)], [past])
            output = dit(z[block], t, layout, [past])
            if dit.config.prediction == "velocity":
                output = z[block] - t[:, None] / T * output
            return torch.where(where[:, None], z[block], output)

        c, u = z0(cache), z0(None)
        guess = c
        if teacher.against_latents:
            each = [slice(start + k, start + k + 1) for k in range(SIZE)]
            u = torch.cat([z0(None, one, t[k : k + 1], where[k : k + 1]) for k, one in enumerate(each)])
        if (start > 0 or teacher.against_latents) and teacher.guidance != 1:
            guess = u + teacher.guidance * (c - u)
            free = ~where
            share = c[free].square().mean().sqrt() / guess[free].square().mean().sqrt()
            guess = guess * (teacher.rescale * share + 1 - teacher.rescale)
            for latent in range(SIZE):
                size = float(guess[latent].square().mean().sqrt())
                guess[latent] *= min(1.0, teacher.cap / size)
            guess = torch.where(where[:, None], z[block], guess)
        found.append(guess)
        dit(clean[row, block], torch.zeros(()), dit.layout([SIZE], [cache]), [cache], appending=True)
    return torch.cat(found)


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["velocity", "z0"])
@pytest.mark.parametrize("pinned", [None, pins()], ids=["free", "pinned"])
@pytest.mark.parametrize(
    ("guidance", "cap", "rescale"),
    [(1.0, math.inf, 0.0), (5.0, math.inf, 0.0), (5.0, 0.9, 0.0), (3.0, 1.1, 0.7)],
)
@pytest.mark.parametrize("latents", [False, True], ids=["block", "latents"])
def test_the_teachers_guess_is_that_of_a_block_at_a_time(
    prediction: str, pinned: Pinned | None, guidance: float, cap: float, rescale: float, latents: bool
) -> None:
    teacher = Guided(
        tiny_dit(prediction=prediction), guidance, against_latents=latents, cap=cap, rescale=rescale
    )
    clean, z, timestep = example()
    z = place(z, pinned)
    guess = teacher.guess(z, timestep, clean, pinned)
    for row in range(ROWS):
        for copy in range(COPIES):
            plain = plain_guess(teacher, z[row, copy], timestep[row, copy], clean, pinned, row)
            torch.testing.assert_close(guess[row, copy], plain, rtol=1e-4, atol=1e-5)


def test_samples_of_a_row_are_guided_as_rows_of_their_own() -> None:
    teacher = Guided(tiny_dit(), 4.0, cap=0.8)
    clean, z, timestep = example()
    sample = torch.tensor([[0] * 4 + [1] * 8, [0] * 12])
    packed = teacher.guess(z, timestep, clean, sample=sample)
    alone = teacher.guess(z[:1, :, 4:], timestep[:1, :, 4:], clean[:1, 4:])
    torch.testing.assert_close(packed[:1, :, 4:], alone, rtol=1e-4, atol=1e-5)


def test_an_unbounded_guess_has_a_gradient() -> None:
    """Solvers learn through it: a cap of infinity divides by nothing."""
    clean, z, timestep = example()
    z.requires_grad_()
    Guided(tiny_dit(), 4.0).guess(z, timestep, clean).sum().backward()
    assert z.grad is not None
    assert bool(z.grad.isfinite().all())


class Straight(DiT):
    """A prior that points at the same z0 from everywhere: its steps land on a straight line."""

    def __init__(self, z0: Tensor) -> None:
        super().__init__(tiny_dit(prediction="z0").config)
        self.z0 = z0

    def forward(self, latents: Tensor, *_: object, **__: object) -> Tensor:
        return self.z0.expand(ROWS, COPIES, LENGTH, WIDTH).reshape(-1, WIDTH)


@pytest.mark.parametrize("substeps", [1, 3])
def test_a_straight_teacher_lands_on_the_line_and_teaches_its_end(substeps: int) -> None:
    clean, z, timestep = example()
    end = timestep / 3
    goal = torch.randn(WIDTH, generator=seeded(3))
    landed = landing(Guided(Straight(goal)), z, timestep, end, clean, substeps=substeps)
    part = (end / timestep)[..., None]
    torch.testing.assert_close(landed, part * z + (1 - part) * goal, rtol=1e-4, atol=1e-5)
    taught = target_of(z, landed, timestep, end)
    torch.testing.assert_close(taught, goal.expand_as(taught), rtol=1e-3, atol=1e-4)
    whole = landing(Guided(Straight(goal)), z, timestep, 0 * end, clean, substeps=substeps)
    torch.testing.assert_close(target_of(z, whole, timestep, 0 * end), whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["velocity", "z0"])
def test_two_steps_of_the_teacher_are_one_of_what_it_teaches(prediction: str) -> None:
    teacher, pinned = Guided(tiny_dit(prediction=prediction), 3.0, cap=1.2), pins()
    clean, z, timestep = example()
    z, end = place(z, pinned), timestep * 0.4
    landed = landing(teacher, z, timestep, end, clean, pinned, substeps=2)
    middle = (timestep + end) / 2
    a = [(x / T)[..., None] for x in (timestep, middle, end)]
    by_hand = z
    for now, then, t in ((a[0], a[1], timestep), (a[1], a[2], middle)):
        z0 = teacher.guess(by_hand, t, clean, pinned)
        by_hand = place(by_hand + (then - now) * (by_hand - z0) / now, pinned)
    torch.testing.assert_close(landed, by_hand, rtol=1e-4, atol=1e-5)
    taught = target_of(z, landed, timestep, end)
    one = z + (a[2] - a[0]) * (z - taught) / a[0]
    torch.testing.assert_close(place(one, pinned), landed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["velocity", "z0"])
def test_taught_the_data_a_student_has_the_loss_of_flow_matching(prediction: str) -> None:
    dit, pinned = tiny_dit(prediction=prediction), pins()
    clean, noise, timestep = example()
    z = place(interpolate(clean[:, None], noise, timestep / T), pinned)
    target = clean[:, None].expand_as(z)
    errors = distillation_errors(dit, z, target, timestep, clean, pinned)
    torch.testing.assert_close(errors, flow_errors(dit, clean, noise, timestep, pinned), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prediction", ["velocity", "z0"])
def test_a_student_that_guesses_what_it_is_taught_has_no_error(prediction: str) -> None:
    dit = tiny_dit(prediction=prediction)
    clean, z, timestep = example()
    target = Guided(dit).guess(z, timestep, clean)
    assert float(distillation_errors(dit, z, target, timestep, clean).detach().max()) < 1e-9


def test_guidance_in_parts() -> None:
    g = seeded(0)
    c, u = torch.randn(3, SIZE, WIDTH, generator=g), torch.randn(3, SIZE, WIDTH, generator=g)
    torch.testing.assert_close(guided(c, u, 1.0), c)
    torch.testing.assert_close(guided(c, u, 0.0), u)
    everywhere = torch.ones(3, SIZE, dtype=torch.bool)
    x = guided(c, u, 6.0)
    assert torch.equal(within_the_data(x, c, math.inf, 0.0, everywhere), x)
    capped = within_the_data(x, c, 1.25, 0.0, everywhere)
    assert float(rms(capped).max()) <= 1.25 + 1e-5
    small = 0.1 * x / rms(x)
    assert torch.equal(within_the_data(small, c, 1.25, 0.0, everywhere), small)
    whole = within_the_data(x, c, math.inf, 1.0, everywhere)
    torch.testing.assert_close(rms(whole, everywhere), rms(c, everywhere))
    torch.testing.assert_close(whole / rms(whole, everywhere), x / rms(x, everywhere))
    nowhere = within_the_data(x, c, math.inf, 1.0, torch.zeros_like(everywhere))
    assert torch.equal(nowhere, x)
