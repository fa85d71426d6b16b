"""Pictures in a run: what a step draws of pairs, and the stages that learn from them.

A step of :class:`PicturesStage` has one task, the same on all ranks, which follows from the seed and its
number. B rows of G pairs each; L latents of a text, M of a picture, S pixels of its side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import takewhile

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colada.data.rows import Batch, RowTensors
from colada.flow import LOSS_SPACES, MIN_A, T, TimestepLaw
from colada.networks.dit import DiT
from colada.pictures.codec import Codec, ConvVAE
from colada.randomness import generator_of
from colada.train.cola import ColaSystem, PriorStage, codec_of
from colada.train.cost import Phase, Placement
from colada.train.kinds import PicturesSection, PictureVAESection
from colada.train.lora import is_of_pictures
from colada.train.losses import Loss
from colada.train.noise import Counts, StepNoise, timestep_law
from colada.train.pairs import Pairs, PairSplits, open_pairs
from colada.train.picture_cost import codec_phase, picture_phases
from colada.train.picture_flow import describing_errors, drawing_errors
from colada.train.recipe import Recipe
from colada.train.stages import VALIDATION_ROW, Configs, LayOut, Stage, System, network_of

CALIBRATED_ON = 1024
"""Pictures over which a trained codec's latents get mean 0 and mean square 1."""
_TASK = 2**43
"""Number of a task's generator, plus the step: a number that no row has."""


@dataclass(frozen=True)
class PictureNoise(RowTensors):
    """What a step draws of pairs, each (B, G, ...).

    Attributes:
        pictures: uint8 (B, G, S, S, 3).
        text: int64 (B, G, tokens), captions or answers, padded.
        lengths: int64 (B, G), latents of each, in whole blocks.
        noise: (B, G, L, C), of captions that are learnt, or answers.
        timestep: (B, G, L) in 0..1000, constant within a block, of the same.
        picture_noise: (B, G, M, P); None where pictures are clean.
        picture_timestep: (B, G), of noisy ones.
        alone: bool (B, G), noisy ones that do not see their caption.
        prompts: int64 (B, G, tokens), padded, before clean pictures.
        prompt_lengths: int64 (B, G), latents of each, in whole blocks.
    """

    pictures: Tensor
    text: Tensor | None = None
    lengths: Tensor | None = None
    noise: Tensor | None = None
    timestep: Tensor | None = None
    picture_noise: Tensor | None = None
    picture_timestep: Tensor | None = None
    alone: Tensor | None = None
    prompts: Tensor | None = None
    prompt_lengths: Tensor | None = None


@dataclass(frozen=True)
class TaskNoise(RowTensors):
    """What a step draws for its task; a validation has all of them."""

    text: StepNoise | None = None
    draw: PictureNoise | None = None
    describe: PictureNoise | None = None


class PicturesStage(PriorStage):
    """The DiT over latents of text and of pictures, of a frozen Text VAE and a frozen codec."""

    learns = ("dit",)
    uses = ("vae", "image")
    section: PicturesSection  # type: ignore[assignment]
    system: ColaSystem

    def __init__(self, system: System, name: str, lay_out: LayOut) -> None:
        super().__init__(system, name, lay_out)
        before = takewhile(lambda stage: stage[0] != name, self.recipe.trained.items())
        if any(isinstance(section, PictureVAESection) and section.steps for _, section in before):
            assert isinstance(self.codec, ConvVAE)
            self.codec.calibrate(_stacked(self.splits.training, CALIBRATED_ON))
        self._prompts = [self._ids(prompt) if prompt else [] for prompt in self.section.prompts]

    @property
    def codec(self) -> Codec:
        """The picture codec."""
        return codec_of(self.system)

    @cached_property
    def splits(self) -> PairSplits:
        """The recipe's pictures."""
        return _splits(self.recipe)

    # --- what is drawn ---------------------------------------------------------------------

    def task(self, step: int) -> str:
        """Return the task of a step: "text", "draw" or "describe"."""
        tasks = self.section.tasks
        generator = generator_of(self.recipe.seed, self.number, _TASK + step)
        place = float(torch.rand((), generator=generator, dtype=torch.float64)) * sum(tasks.values())
        for task, share in tasks.items():
            if place < share:
                return task
            place -= share
        return next(task for task, share in tasks.items() if share)  # Rounding alone leads here.

    def draw(self, rows: Sequence[int]) -> TaskNoise:  # type: ignore[override]
        validated = rows[0] >= VALIDATION_ROW
        tasks = [self.task(rows[0] // self.section.batch)]
        if validated:
            tasks = [task for task, share in self.section.tasks.items() if share]
        drawn: dict[str, RowTensors] = {}
        for task in tasks:
            if task == "text":
                drawn[task] = super().draw(rows)
            elif not validated or self.splits.validation is not None:
                drawn[task] = self._draw_pairs(rows, describes=task == "describe")
        return TaskNoise(**drawn)  # type: ignore[arg-type]

    def _draw_pairs(self, rows: Sequence[int], describes: bool) -> PictureNoise:
        """Draw the pairs of rows, each row from its own generator."""
        section, vae, tokenizer = self.section, self.vae.config, self.system.tokenizer
        law = timestep_law(section, vae.latent_dim)
        picture_law = TimestepLaw(section.picture_loc, section.picture_scale)
        pairs, first = _pairs_of(self.splits, rows)
        drawn: dict[str, list[Tensor]] = {field.name: [] for field in fields(PictureNoise)}
        texts, prompts, sizes = list[list[int]](), list[list[int]](), list[int]()
        learnt = describes or section.learns_captions
        for row, generator in zip(rows, self.generators(rows), strict=True):
            for number in range(section.pairs):
                pair = pairs.pair((row - first) * section.pairs + number)
                drawn["pictures"].append(torch.from_numpy(pair.picture))
                ids = self._ids(pair.answer if describes else pair.caption, 1 if describes else 0)
                ids += [tokenizer.eos_id] * describes
                latents = -(-len(ids) // vae.block_tokens) * vae.block_size
                texts.append(ids)
                sizes.append(latents)
                if learnt:
                    drawn["noise"].append(torch.randn(latents, vae.latent_dim, generator=generator))
                    times = law.sample((latents // vae.block_size,), generator)
                    drawn["timestep"].append(times.repeat_interleave(vae.block_size))
                if describes:
                    choice = torch.randint(len(self._prompts), (), generator=generator)
                    prompts.append(self._prompts[int(choice)])
                    continue
                shape = (self.codec.config.latents, self.codec.config.channels)
                drawn["picture_noise"].append(torch.randn(shape, generator=generator))
                drawn["picture_timestep"].append(picture_law.sample((1,), generator)[0])
                drawn["alone"].append(torch.rand((), generator=generator) < section.caption_dropout)
        drawn["lengths"] = list(torch.tensor(sizes))
        drawn["text"] = self._padded(texts)
        if describes:
            drawn["prompts"] = self._padded(prompts)
            before = [-(-len(ids) // vae.block_tokens) * vae.block_size for ids in prompts]
            drawn["prompt_lengths"] = list(torch.tensor(before))
        longest = max(sizes)
        drawn["noise"] = [nn.functional.pad(one, (0, 0, 0, longest - len(one))) for one in drawn["noise"]]
        drawn["timestep"] = [nn.functional.pad(one, (0, longest - len(one))) for one in drawn["timestep"]]
        stacked = {name: torch.stack(parts) for name, parts in drawn.items() if parts}
        return PictureNoise(**{name: one.unflatten(0, (len(rows), -1)) for name, one in stacked.items()})

    def _ids(self, text: str, reserved: int = 0) -> list[int]:
        """Return a text's tokens, at most the section's number less some that are kept for others."""
        ids = self.system.tokenizer.encode(text)[: self.section.caption_length - reserved]
        return ids or [self.system.pad_id]

    def _padded(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return tokens of equal length, whole blocks."""
        longest = max(map(len, texts))
        size = -(-longest // self.vae.config.block_tokens) * self.vae.config.block_tokens
        return [
            torch.tensor([*ids, *[self.system.pad_id] * (size - len(ids))], dtype=torch.int64)
            for ids in texts
        ]

    # --- what is minimised -----------------------------------------------------------------

    def count(self, rows: Batch, noise: TaskNoise) -> Counts:  # type: ignore[override]
        counts = Counts(0, 0, 0) if noise.text is None else super().count(rows, noise.text)
        if noise.draw is not None:
            assert noise.draw.lengths is not None
            assert noise.draw.picture_noise is not None
            captions = 0 if noise.draw.noise is None else int(noise.draw.lengths.sum())
            counts = replace(counts, captions=captions, pictures=noise.draw.picture_noise[..., 0].numel())
        if noise.describe is not None:
            assert noise.describe.lengths is not None
            counts = replace(counts, answers=int(noise.describe.lengths.sum()))
        return counts

    def loss(
        self,
        networks: nn.ModuleDict,
        rows: Batch,
        noise: TaskNoise,  # type: ignore[override]
        counts: Counts,
        step: int,
    ) -> Loss:
        dit = network_of(networks, "dit", DiT)
        total, terms = torch.zeros((), device=rows.ids.device), dict[str, Tensor]()
        if noise.text is not None:
            text = super().loss(networks, rows, noise.text, counts, step)
            total, terms = total + text.total + _nothing_of_pictures(dit), text.terms
        if noise.draw is not None:
            total = total + self._drawing(dit, noise.draw, counts, terms)
        if noise.describe is not None:
            total = total + self._describing(dit, noise.describe, counts, terms)
        return Loss(total, terms)

    def _drawing(self, dit: DiT, pairs: PictureNoise, counts: Counts, terms: dict[str, Tensor]) -> Tensor:
        """Return the loss of pictures and of captions that are learnt; its terms are added."""
        assert pairs.lengths is not None
        assert pairs.picture_noise is not None
        assert pairs.picture_timestep is not None
        assert pairs.alone is not None
        with torch.no_grad():
            captions, pictures = self._encode(pairs.text), self.codec.encode(pairs.pictures.flatten(0, 1))
        noise = None if pairs.noise is None else pairs.noise.flatten(0, 1)
        times = None if pairs.timestep is None else pairs.timestep.flatten(0, 1)
        picture_times = pairs.picture_timestep.flatten()
        picture, caption = drawing_errors(
            dit,
            captions,
            pairs.lengths.flatten(),
            pictures,
            noise,
            pairs.picture_noise.flatten(0, 1),
            times,
            picture_times,
            pairs.alone.flatten(),
        )
        terms["picture_flow"] = picture.detach().sum() / counts.pictures
        drawn = self._weighed(picture, picture_times[:, None]) / counts.pictures
        if caption is None or times is None:
            return drawn
        terms["caption_flow"] = caption.detach().sum() / counts.captions
        return drawn + self.section.caption_weight * self._weighed(caption, times) / counts.captions

    def _describing(self, dit: DiT, pairs: PictureNoise, counts: Counts, terms: dict[str, Tensor]) -> Tensor:
        """Return the loss of answers; its terms are added."""
        assert pairs.lengths is not None
        assert pairs.noise is not None
        assert pairs.timestep is not None
        assert pairs.prompt_lengths is not None
        with torch.no_grad():
            answers, prompts = self._encode(pairs.text), self._encode(pairs.prompts)
            pictures = self.codec.encode(pairs.pictures.flatten(0, 1))
        lengths, times = pairs.prompt_lengths.flatten(), pairs.timestep.flatten(0, 1)
        noise = pairs.noise.flatten(0, 1)
        errors = describing_errors(
            dit, prompts, lengths, pictures, answers, pairs.lengths.flatten(), noise, times
        )
        terms["answer_flow"] = errors.detach().sum() / counts.answers
        return self._weighed(errors, times) / counts.answers

    def _weighed(self, errors: Tensor, timestep: Tensor) -> Tensor:
        weight = (timestep / T).clamp_min(MIN_A) ** LOSS_SPACES[self.section.space]
        return (errors * weight).sum()

    def _encode(self, ids: Tensor | None) -> Tensor:
        """Return the normalised posterior means (B G, L, C) of texts (B, G, tokens)."""
        assert ids is not None
        flat, vae = ids.flatten(0, 1), self.vae
        if not flat.shape[1]:
            return torch.zeros(len(flat), 0, vae.config.latent_dim, device=ids.device)
        layout = vae.rows_layout(len(flat), flat.shape[1] // vae.config.patch_size, None)
        return vae.normalise(vae.encoder(flat.flatten(), layout).mean).view(
            len(flat), -1, vae.config.latent_dim
        )

    # --- what it costs ---------------------------------------------------------------------

    @classmethod
    def phases(
        cls, recipe: Recipe, name: str, section: PicturesSection, configs: Configs, placement: Placement
    ) -> list[Phase]:
        ((_, _, work),) = cls.works(recipe, name, section, configs["vae"])
        return picture_phases(name, section, configs, work, placement)

    def phase_of(self, step: int) -> int:
        """Return the number of a step's task."""
        return list(self.section.tasks).index(self.task(step))  # type: ignore[arg-type]


def _nothing_of_pictures(dit: DiT) -> Tensor:
    """Return 0, of which all parameters that text does not reach have the gradient 0.

    On all ranks then, and in a run that is resumed, every parameter has a gradient and a state in every step.
    """
    of_pictures = (parameter for name, parameter in dit.named_parameters() if is_of_pictures(name))
    parts = [
        (one.to_local() if isinstance(one, DTensor) else one).flatten()[:1].sum() * 0 for one in of_pictures
    ]
    return torch.stack(parts).sum()


class PictureVAEStage(Stage):
    """A convolutional picture codec alone."""

    learns = ("image",)
    writes = False
    section: PictureVAESection
    system: ColaSystem

    @cached_property
    def splits(self) -> PairSplits:
        """The recipe's pictures."""
        return _splits(self.recipe)

    def draw(self, rows: Sequence[int]) -> PictureNoise:
        pairs, first = _pairs_of(self.splits, rows)
        count, config = self.section.pairs, codec_of(self.system).config
        pictures, noise = [], []
        for row, generator in zip(rows, self.generators(rows), strict=True):
            numbers = range((row - first) * count, (row - first + 1) * count)
            pictures.append(torch.stack([torch.from_numpy(pairs.pair(n).picture) for n in numbers]))
            noise.append(torch.randn(count, config.latents, config.channels, generator=generator))
        return PictureNoise(torch.stack(pictures), picture_noise=torch.stack(noise))

    def count(self, rows: Batch, noise: PictureNoise) -> Counts:
        return Counts(0, 0, 0, pictures=noise.pictures.shape[0] * noise.pictures.shape[1])

    def loss(
        self, networks: nn.ModuleDict, rows: Batch, noise: PictureNoise, counts: Counts, step: int
    ) -> Loss:
        codec = network_of(networks, "image", ConvVAE)
        assert noise.picture_noise is not None
        pixels = noise.pictures.flatten(0, 1).float() / 255
        total, terms = codec.loss(pixels, noise.picture_noise.flatten(0, 1), self.section.kl)
        share = len(pixels) / counts.pictures
        return Loss(total * share, {name: term * share for name, term in terms.items()})

    @classmethod
    def phases(
        cls, recipe: Recipe, name: str, section: PictureVAESection, configs: Configs, placement: Placement
    ) -> list[Phase]:
        return [codec_phase(name, section, configs["image"], placement)]


def _splits(recipe: Recipe) -> PairSplits:
    splits = open_pairs(recipe)
    assert splits is not None  # The recipe has been checked.
    return splits


def _pairs_of(splits: PairSplits, rows: Sequence[int]) -> tuple[Pairs, int]:
    """Return the pairs that rows draw from, and the row of the first one.

    Where none are held out, a validation has those that training comes to last.
    """
    if rows[0] < VALIDATION_ROW or splits.validation is None:
        return splits.training, 0
    return splits.validation, VALIDATION_ROW


def _stacked(pairs: Pairs, count: int) -> Tensor:
    return torch.stack([torch.from_numpy(pair.picture) for pair in pairs.pairs(count)])
