"""The flow term against one block at a time, closed forms and rows of their own."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from colada.flow import T
from colada.networks.dit import DiT, Timesteps
from colada.train.flow_matching import FlowStep, Pinned, flow_errors
from colada.train.kinds import FlowTerms
from colada.train.losses import (
    prior_loss,
)
from colada.train.noise import draw_noise
from helpers import tiny_dit, tiny_dit_config, tiny_vae, tiny_vae_config
from rows import (
    PAD,
    SETTINGS,
    WEIGHTS,
    block_by_block,
    brute_force_flow,
    gradients,
    packed_draws,
    packed_rows,
    same,
    same_gradients,
    seeded,
)


def flow_example(
    rows: int = 2, blocks: int = 3, copies: int = 1, size: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (B, M, C), noise (B, K, M, C) and timesteps (B, K, M)."""
    g = seeded(seed)
    timestep = 100 + 900 * torch.rand(rows, copies, blocks, generator=g).repeat_interleave(size, 2)
    z0 = torch.randn(rows, blocks * size, 8, generator=g)
    return z0, torch.randn(rows, copies, blocks * size, 8, generator=g), timestep


def example_pins(where: list[tuple[int, int]], shape: torch.Size) -> Pinned:
    mask = torch.zeros(shape[:2], dtype=torch.bool)
    for row, position in where:
        mask[row, position] = True
    return Pinned(mask, torch.randn(shape, generator=seeded(9)))


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("dit_patch", [1, 2])
@pytest.mark.parametrize("pins", [[], [(0, 0), (1, 4), (1, 5), (1, 6)], [(0, 8), (0, 9)]])
@pytest.mark.parametrize("prediction", ["velocity", "z0"])
def test_all_blocks_at_once_equal_one_block_at_a_time(
    prediction: str, pins: list[tuple[int, int]], dit_patch: int, copies: int
) -> None:
    dit = tiny_dit(prediction=prediction, patch_size=dit_patch)
    z0, noise, timestep = flow_example(copies=copies)
    pinned = example_pins(pins, z0.shape)
    with torch.no_grad():
        errors = flow_errors(dit, z0, noise, timestep, pinned if pins else None)
        plain = [
            block_by_block(dit, z0[r], noise[r, k], timestep[r, k], pinned.where[r], pinned.latents[r])
            for r in range(2)
            for k in range(copies)
        ]
    same(errors, torch.stack(plain).view(2, copies, 12))


@pytest.mark.parametrize("dit_patch", [1, 2])
@pytest.mark.parametrize("prediction", ["velocity", "z0"])
def test_self_conditioning_is_a_second_pass_that_is_given_the_guess_of_the_first(
    dit_patch: int, prediction: str
) -> None:
    dit = tiny_dit(patch_size=dit_patch, prediction=prediction, self_conditioning=True)
    z0, noise, timestep = flow_example(copies=2)
    pinned = example_pins([(0, 0), (1, 4), (1, 5), (1, 6)], z0.shape)
    errors = flow_errors(dit, z0, noise, timestep, pinned, self_conditioned=True)
    plain = [
        block_by_block(dit, z0[r], noise[r, k], timestep[r, k], pinned.where[r], pinned.latents[r], True)
        for r in range(2)
        for k in range(2)
    ]
    same(errors, torch.stack(plain).view(2, 2, 12))
    same_gradients(gradients(errors.sum(), dit), gradients(torch.cat(plain).sum(), dit))
    assert not torch.allclose(errors, flow_errors(dit, z0, noise, timestep, pinned), rtol=1e-2)


def test_a_new_networks_second_input_changes_nothing_and_learns() -> None:
    dit = tiny_dit(self_conditioning=True)
    torch.nn.init.zeros_(dit.sc_in.proj.weight)  # as in a new network
    plain = tiny_dit()
    plain.load_state_dict({name: value for name, value in dit.state_dict().items() if "sc_in" not in name})
    z0, noise, timestep = flow_example()
    errors = flow_errors(dit, z0, noise, timestep, self_conditioned=True)
    assert torch.equal(errors, flow_errors(plain, z0, noise, timestep))
    errors.sum().backward()
    assert float(dit.sc_in.proj.weight.grad.abs().max()) > 0
    fresh = DiT(tiny_dit_config(self_conditioning=True))
    fresh.init_weights(seeded(0))
    assert not bool(fresh.sc_in.proj.weight.any())


@pytest.mark.parametrize(("space", "power"), [("velocity", 0), ("half", 1), ("z0", 2)])
def test_a_loss_space_weighs_the_errors_of_the_velocity_by_a_power_of_a(space: str, power: int) -> None:
    vae, dit = tiny_vae(), tiny_dit()
    batch, pieces = packed_rows()
    noise = packed_draws(vae, batch, SETTINGS.model_copy(update={"loc": -1.0, "scale": 2.0}))
    loss = prior_loss(vae, dit, batch, noise, PAD, step=FlowStep(space))
    times, errors = brute_force_flow(vae, dit, batch, noise, pieces)
    a = times.numpy() / 1000
    assert (a < 0.1).any()
    weights = np.where(a < 0.1, 0.1, a) ** power
    assert float(loss.total.detach()) == pytest.approx(
        float((errors.detach().numpy() * weights).mean()), rel=1e-5
    )
    assert float(loss.terms["flow"]) == pytest.approx(float(errors.detach().mean()), rel=1e-5)


@pytest.mark.parametrize("dit_patch", [1, 2])
def test_samples_of_a_row_have_the_errors_of_rows_of_their_own(dit_patch: int) -> None:
    dit = tiny_dit(patch_size=dit_patch)
    z0, noise, timestep = flow_example(blocks=5, copies=2)
    # Neither the order of the numbers nor -1 means anything to the DiT.
    sizes = [[(0, 4, 7), (4, 16, 2), (16, 20, -1)], [(0, 20, 0)]]
    sample = torch.stack([torch.cat([torch.full((e - b,), n) for b, e, n in row]) for row in sizes])
    with torch.no_grad():
        errors = flow_errors(dit, z0, noise, timestep, sample=sample)
        for r, row in enumerate(sizes):
            for begin, end, _ in row:
                at = slice(begin, end)
                for k in range(2):
                    plain = block_by_block(dit, z0[r, at], noise[r, k, at], timestep[r, k, at])
                    same(errors[r, k, at], plain)


def test_a_row_of_a_single_block_has_no_history() -> None:
    dit = tiny_dit()
    z0, noise, timestep = flow_example(rows=1, blocks=1)
    plain = block_by_block(dit, z0[0], noise[0, 0], timestep[0, 0])
    same(flow_errors(dit, z0, noise, timestep)[0, 0], plain)


def test_below_a_tenth_the_z0_error_is_divided_by_a_tenth() -> None:
    dit = tiny_dit(prediction="z0")
    z0, noise, _ = flow_example(rows=1, blocks=1)
    for a, divisor in ((0.02, 0.1), (0.1, 0.1), (0.4, 0.4)):
        timestep = torch.full((1, 1, 4), a * T)
        z_t = (1 - a) * z0[0] + a * noise[0, 0]
        guess = dit(z_t, timestep[0, 0], dit.layout([4]))
        expected = ((guess - z0[0]) / divisor).square().mean(-1)
        torch.testing.assert_close(flow_errors(dit, z0, noise, timestep)[0, 0], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction", ["velocity", "z0"])
def test_the_gradient_reaches_z0_through_the_noisy_copies_alone(prediction: str) -> None:
    dit = tiny_dit(prediction=prediction)
    z0, noise, timestep = flow_example(copies=2)
    leaf, by_hand = z0.clone().requires_grad_(), z0.clone().requires_grad_()
    flow_errors(dit, leaf, noise, timestep).sum().backward()
    for r in range(2):
        for k in range(2):
            block_by_block(dit, by_hand[r], noise[r, k], timestep[r, k]).sum().backward()
    assert leaf.grad is not None
    assert by_hand.grad is not None
    assert float(leaf.grad.abs().min()) > 0
    torch.testing.assert_close(leaf.grad, by_hand.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["velocity", "z0"])
def test_at_pure_noise_z0_gets_no_gradient_as_history_or_target(prediction: str) -> None:
    dit = tiny_dit(prediction=prediction)
    z0, noise, timestep = flow_example(copies=2)
    leaf, pure = z0.requires_grad_(), torch.full_like(timestep, T)
    loss = flow_errors(dit, leaf, noise, pure).sum()
    loss.backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))
    # Yet the loss does depend on it, as history and as target.
    assert not torch.equal(flow_errors(dit, z0 + 1, noise, pure).sum(), loss)


def test_pinned_positions_have_no_loss() -> None:
    dit = tiny_dit()
    z0, noise, timestep = flow_example(copies=2)
    # In the last block, which is nobody's history: neither z0 nor noise of pinned positions may matter.
    pinned = example_pins([(0, 8), (0, 9), (1, 8)], z0.shape)
    errors = flow_errors(dit, z0, noise, timestep, pinned)
    assert torch.equal(errors == 0, pinned.where[:, None].expand(2, 2, 12))
    where = pinned.where[..., None]
    elsewhere, redrawn = torch.where(where, z0 + 3, z0), torch.where(where[:, None], noise - 5, noise)
    assert torch.equal(errors, flow_errors(dit, elsewhere, redrawn, timestep, pinned))
    assert not torch.equal(errors, flow_errors(dit, z0, noise, timestep))
    others = Pinned(pinned.where, torch.where(where, pinned.latents + 1, pinned.latents))
    assert not torch.equal(errors, flow_errors(dit, z0, noise, timestep, others))


@pytest.mark.parametrize("packed", [False, True])
def test_blocks_that_lose_sight_of_their_history_have_the_errors_of_isolated_blocks(packed: bool) -> None:
    dit, g = tiny_dit(), seeded(3)
    rows, copies, blocks, size = 2, 2, 3, dit.config.block_size
    length, width = blocks * size, dit.config.txt_in_channels
    z0 = torch.randn(rows, length, width, generator=g)
    noise = torch.randn(rows, copies, length, width, generator=g)
    timestep = (1000 * torch.rand(rows, copies, blocks, generator=g)).repeat_interleave(size, 2)
    sample = (torch.arange(length) // (2 * size)).expand(rows, -1) if packed else None
    alone = torch.rand(rows, copies, blocks, generator=g) < 0.5
    alone[:, 0, 1], alone[:, 1, 1] = True, False
    some = flow_errors(dit, z0, noise, timestep, None, sample, alone)
    seeing = flow_errors(dit, z0, noise, timestep, None, sample)
    # Each block as a row of its own: nothing before it, at its own positions.
    isolated = torch.empty_like(some)
    for block in range(blocks):
        at = slice(block * size, (block + 1) * size)
        part = flow_errors_at(dit, z0[:, at], noise[:, :, at], timestep[:, :, at], block * size)
        isolated[:, :, at] = part
    expected = torch.where(alone.repeat_interleave(size, 2), isolated, seeing)
    torch.testing.assert_close(some, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(seeing, expected, rtol=1e-3)


def flow_errors_at(dit: DiT, z0: Tensor, noise: Tensor, timestep: Tensor, start: int) -> Tensor:
    """Errors (B, K, block) of one block without history at positions from ``start`` on, written plainly."""
    rows, copies, size, width = noise.shape
    a = (timestep / T)[..., None]
    z_t = (1 - a) * z0[:, None] + a * noise
    layout = dit.layout([size] * (rows * copies))
    layout.positions = layout.positions + start
    velocity = dit.velocity(z_t.view(-1, width), timestep.flatten(), layout).view_as(noise)
    error = velocity - (noise - z0[:, None])
    if dit.config.prediction == "z0":
        error = error * a / a.clamp_min(0.1)
    return error.square().mean(-1)


def test_history_dropout_is_drawn_block_by_block_and_leaves_the_other_draws_alone() -> None:
    config = tiny_vae_config()
    without, dropped = (
        draw_noise(
            [seeded(row) for row in range(200)],
            config,
            64,
            WEIGHTS,
            FlowTerms(copies=2, history_dropout=probability),
        )
        for probability in (0.0, 0.25)
    )
    assert without.alone is None
    assert dropped.alone is not None
    assert dropped.alone.shape == (200, 2, 64 // config.block_tokens)
    assert float(dropped.alone.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert torch.equal(without.z1, dropped.z1)  # type: ignore[arg-type]
    assert torch.equal(without.timestep, dropped.timestep)  # type: ignore[arg-type]


class ExactPrior:
    """The conditional expectation where z0^1 ~ N(0, 1) and then z0^b ~ N(rho z0^(b-1), 1 - rho^2)."""

    def __init__(self, prediction: str, rho: float, blocks: int, size: int) -> None:
        self.config = SimpleNamespace(block_size=size, prediction=prediction)
        self.rho, self.blocks, self.size = rho, blocks, size

    def two_copy_layout(
        self, rows: int, length: int, copies: int, sample: Tensor | None, alone: Tensor | None
    ) -> tuple[int, int]:
        return rows, copies

    def moments(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the share of the history (blocks, 1, 1), and variances of z0 and z_t given it."""
        share = torch.full((self.blocks, 1, 1), self.rho)
        share[0] = 0.0
        variance = 1 - share**2
        return share, variance, (1 - a) ** 2 * variance + a**2

    def __call__(
        self,
        packed: Tensor,
        timesteps: Timesteps,
        shape: tuple[int, int],
        noisy_only: bool,
        guess: None,
        dropout: None,
    ) -> Tensor:
        assert noisy_only
        assert guess is None
        assert dropout is None
        rows, copies = shape
        clean = (self.blocks - 1) * self.size
        packed = packed.view(rows, -1, packed.shape[-1])
        times = timesteps.values[timesteps.row].view(rows, -1)
        assert not bool(times[:, :clean].any())
        blocks = (rows, copies, self.blocks, self.size, -1)
        history = F.pad(packed[:, :clean], (0, 0, self.size, 0)).view(rows, 1, *blocks[2:])
        z_t, a = packed[:, clean:].view(blocks), times[:, clean:].view(blocks) / T
        share, variance, spread = self.moments(a)
        surprise = (z_t - (1 - a) * share * history) / spread
        z0 = share * history + (1 - a) * variance * surprise
        z1 = a * surprise
        answer = (z1 - z0 if self.config.prediction == "velocity" else z0).expand(blocks).flatten(1, 3)
        return answer.flatten(0, 1)


@pytest.mark.parametrize("prediction", ["velocity", "z0"])
def test_the_exact_prior_of_a_gaussian_chain_has_its_closed_form_loss(prediction: str) -> None:
    rows, copies, blocks, size, width, rho = 64, 2, 4, 4, 64, 0.9
    g = seeded(0)
    z0 = torch.randn(rows, blocks, size, width, generator=g)
    for b in range(1, blocks):
        z0[:, b] = rho * z0[:, b - 1] + math.sqrt(1 - rho**2) * z0[:, b]
    noise = torch.randn(rows, copies, blocks, size, width, generator=g)
    timestep = 150 + 850 * torch.rand(rows, copies, blocks, 1, generator=g).expand(-1, -1, -1, size)
    prior = ExactPrior(prediction, rho, blocks, size)
    errors = flow_errors(
        prior,  # type: ignore[arg-type]
        z0.flatten(1, 2),
        noise.flatten(2, 3),
        timestep.flatten(2),
    )
    a = timestep[..., None] / T
    _, variance, spread = prior.moments(a)
    # What z_t and the history leave of the variance of z1 - z0: 1 + s^2 - (a - (1 - a) s^2)^2 / Var(z_t).
    expected = (1 + variance - (a - (1 - a) * variance) ** 2 / spread).mean()
    assert float(errors.mean()) == pytest.approx(float(expected), rel=0.02)
    # Without the history it could do no better than 1 / ((1 - a)^2 + a^2), which is well above.
    assert float((1 / ((1 - a) ** 2 + a**2)).mean()) > 1.2 * float(expected)
