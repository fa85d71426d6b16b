"""Rewards of what the model writes, as stages: DiffusionNFT, and RAFT, which it must beat.

A round begins with answers of the old weights to prompts of the data, several to each, by the engine. They
are rewarded by a rule, less what a judge does not expect, and the steps of the round learn from their latents
as they were written: text encoded again would be other latents than the model comes to. What is random
follows from the seeds of recipe, round and answer; so a run that is resumed in a round writes its answers
again, and they are the same.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from colada.data.instructions import reward_of
from colada.data.rows import FILLING, Batch, Rows, joined
from colada.data.rules import met_in, rewarded
from colada.errors import ColadaError
from colada.flow import PREDICTIONS, T, evaluations_of, interpolate
from colada.generate.settings import TextRequest
from colada.locate import locate
from colada.models.base import LanguageModel
from colada.models.cola import ColaDLM
from colada.models.likelihood import nats_per_token
from colada.models.load import load
from colada.models.rollouts import roll_out
from colada.networks.dit import DiT
from colada.randomness import seed_of
from colada.text.chat import render
from colada.text.transcript import Completion
from colada.train.answers import REPLAY
from colada.train.cola import ColaStage
from colada.train.cost import Phase, Placement, networks
from colada.train.distil_cost import judge_cost, writing_flops
from colada.train.flow_matching import place, predict
from colada.train.kinds import RaftSection, RewardSection, RolloutSection
from colada.train.losses import Loss, frozen_latents
from colada.train.noise import (
    Counts,
    StepNoise,
    given_tokens,
    pinned_latents,
)
from colada.train.parallel import gathered, of_all
from colada.train.posttraining import follow, reward_errors, rewards_to_shares
from colada.train.recipe import Recipe
from colada.train.stages import Beginning, Configs, LayOut, System, modes_kept, network_of

_ANSWERS = 2**43  # Rows of answers, in the seeds of noise: rows that no data has.
_MARK = "\x00"


@dataclass(frozen=True)
class AnswerNoise(StepNoise):
    """Noise of a step's rows: answers, and rows of the data.

    Attributes:
        written: bool (B,), which rows are answers.
        latents: (B, M, C), theirs.
        share: (B, M), r: how good an answer is among those to its prompt; NaN where nothing is to be learnt.
        reward: (B,).
    """

    written: Tensor | None = None
    latents: Tensor | None = None
    share: Tensor | None = None
    reward: Tensor | None = None


@dataclass(frozen=True)
class Answer:
    """An answer of a round, to be learnt.

    Attributes:
        row: (1, L).
        latents: (M, C).
        reward: as the rule says, less what an end that is missing and a judge take off.
        nats: -log p a token under the judge; 0 without one.
        ended: by an end token.
        credited: how many of the latents, the first ones, the reward is credited to.
        share: r in 0..1 of these; NaN if nothing is to be learnt.
    """

    row: Batch
    latents: Tensor
    reward: float
    nats: float
    ended: bool
    credited: int
    share: float = 0.5

    @property
    def shares(self) -> Tensor:
        """Return r of each latent (M,): even where nothing is credited."""
        shares = torch.full((len(self.latents),), 0.5 if self.share == self.share else self.share)
        shares[: self.credited] = self.share
        return shares


class RolloutStage(ColaStage):
    """The DiT on answers of its own."""

    learns, uses = ("dit",), ("vae",)
    teachers = {"old": "dit", "reference": "dit"}  # noqa: RUF012 - the base class says that it is the class's
    section: RewardSection | RaftSection

    def __init__(self, system: System, name: str, lay_out: LayOut) -> None:
        super().__init__(system, name, lay_out)
        self.memory["round"] = torch.zeros((), dtype=torch.int64)
        questions = self.section.questions
        self._reward = reward_of(self.section.reward, None if questions is None else Path(questions))
        self._written: tuple[int, list[Answer]] | None = None
        self._writer: ColaDLM | None = None

    def begin(self, beginning: Beginning) -> None:
        """Take what writes answers, and the prompts."""
        self._beginning = beginning
        self._prompts: Rows = beginning.rows(self.recipe.seed + self.number)
        beginning.ranks.share(self.section.prompts)  # Groups are not divided.
        self._judge: LanguageModel | None = None
        if self.section.judge is not None:
            device = beginning.ranks.device
            self._judge = load(self.section.judge, device=device, dtype=torch.float32)

    @abstractmethod
    def keep(self, number: int) -> float:
        """Return how much of the old weights stays as a round begins."""

    @abstractmethod
    def chosen(self, answers: Sequence[Sequence[Answer]]) -> list[Answer]:
        """Return what is learnt of the groups of a round, with its share."""

    @abstractmethod
    def errors(self, policy: Tensor, old: Tensor | None, share: Tensor) -> Tensor:
        """Return the loss (B, K, M) of answers by errors of velocities (B, K, M, C) and shares (B, M)."""

    # --- rounds ----------------------------------------------------------------------------------

    def rollouts(self, step: int, rows: Batch, noise: StepNoise) -> tuple[Batch, AnswerNoise]:
        """Return this rank's answers of a step, and a quarter of its rows of the data."""
        section, ranks = self.section, self._beginning.ranks
        number, update = divmod(step, section.updates)
        if number > int(self.memory["round"]):
            follow(self.frozen["old"], self.networks["dit"], self.keep(number))
            self.memory["round"].fill_(number)
        if self._written is None or self._written[0] != number:
            self._written = number, self._round(number)
        answers = self._written[1]
        span = ranks.share(section.batch)
        places = [update * section.batch + at for at in span]
        some = [answers[self._order(number, place, len(answers))] for place in places]
        first_number = _ANSWERS + number * section.updates * section.batch
        drawn = self.draw([first_number + place // self.together for place in places])
        # Of the step's rows, whoever has them; every rank has as many, some of no weight.
        first, end = -span.start % REPLAY, len(span)
        parts = [(first, end, REPLAY), (0, -(-end // REPLAY) - len(range(first, end, REPLAY)), 1)]
        replayed, without = (rows.rows(*part) for part in parts)
        values: dict[str, Any] = {}
        for field in fields(StepNoise):
            one, others = (
                getattr(drawn, field.name),
                [getattr(noise.rows(*part), field.name) for part in parts],
            )
            values[field.name] = None if one is None else torch.cat([one, *others])
        latents = torch.stack([answer.latents for answer in some])
        share = torch.stack([answer.shares for answer in some])
        count, weightless = len(replayed), len(without)
        return joined([*(answer.row for answer in some), replayed, without]), AnswerNoise(
            **values,
            written=torch.cat([torch.ones(end), torch.zeros(count), torch.ones(weightless)]).bool(),
            latents=torch.cat([latents, latents.new_zeros(count + weightless, *latents.shape[1:])]),
            share=torch.cat([share, share.new_full((count + weightless, share.shape[1]), torch.nan)]),
            reward=torch.cat(
                [torch.tensor([answer.reward for answer in some]), torch.zeros(count + weightless)]
            ),
        )

    def _order(self, number: int, place: int, answers: int) -> int:
        """Return which answer is at a place of a round: all groups in an order of the seed, and again."""
        turn, at = divmod(place, answers)
        group, member = divmod(at, self.together)
        seeds = (self.recipe.seed, self.number, number, turn)
        order = np.random.default_rng(seeds).permutation(answers // self.together)
        return int(order[group]) * self.together + member

    def _round(self, number: int) -> list[Answer]:
        """Write a round's answers with the old weights, on all ranks together, and reward them."""
        section, ranks = self.section, self._beginning.ranks
        prompts = [number * section.prompts + at for at in ranks.share(section.prompts)]
        groups, error = list[list[Answer]](), None
        with modes_kept([self.frozen["old"], self.vae]):
            model = self._writing()
            try:
                groups = self._groups(model, number, prompts)
            except ColadaError as failed:  # The others wait for this rank's answers.
                error = str(failed)
        brought = of_all((groups, error))
        for _, said in brought:
            if said is not None:
                raise ColadaError(said)
        every = [group for groups, _ in brought for group in groups]
        flat = [answer for group in every for answer in group]
        rewards = [answer.reward for answer in flat]
        learnt = self.chosen(every)
        ended = sum(answer.ended for answer in flat) / len(flat)
        best = np.mean([max(answer.reward for answer in group) for group in every])
        judged = ""
        if self._judge is not None:
            judged = f" {np.mean([answer.nats for answer in flat]):.3f} nats a token,"
        self._beginning.display.say(
            f"{self.name} round {number + 1}: reward {np.mean(rewards):.3f}, best of each prompt {best:.3f},"
            f"{judged} {100 * ended:.0f}% ended, {len(learnt)} of {len(flat)} answers to learn from"
        )
        # Where there is nothing to learn, the rows are there and have no weight.
        return learnt or [replace(answer, share=float("nan")) for answer in flat]

    def _writing(self) -> ColaDLM:
        """Return the model of the old weights: one for all rounds, whose engine is kept where that pays."""
        old = self.frozen["old"]
        if self._writer is None:
            networks = {**self.system.networks, "dit": gathered(old), "vae": gathered(self.vae)}
            model = self._beginning.model(networks)
            assert isinstance(model, ColaDLM)
            self._writer = model
        gathered(old, self._writer.dit)
        self._writer.dit.eval()
        self._writer.vae.eval()
        return self._writer

    def _groups(self, model: ColaDLM, number: int, prompts: Sequence[int]) -> list[list[Answer]]:
        """Return the answers of a model to prompts, several to each."""
        section, stretch = self.section, model.vae.config.patch_size
        rows = [self._prompts.row(prompt) for prompt in prompts]
        starts, requests = list[list[int]](), list[TextRequest]()
        for prompt, row in zip(prompts, rows, strict=True):
            assert row.trained is not None
            prompt_length = int(row.trained[0].int().argmax())
            starts.append(row.ids[0, :prompt_length].tolist())
            room = section.length - -(-prompt_length // stretch) * stretch
            for sample in range(section.samples):
                seed = seed_of(self.recipe.seed, self.number, number, prompt, sample) >> 2
                settings: Any = {**section.sampler, "seed": seed}
                requests.append(TextRequest(starts[-1], min(section.new_tokens, room), settings))
        answers = roll_out(model, requests)
        texts = [answer.text for answer in answers]
        judged = [0.0] * len(answers) if self._judge is None else nats_per_token(self._judge, texts)
        groups = []
        for at, start in enumerate(starts):
            asked = plain_prompt(model, start)
            group = []
            samples = slice(at * section.samples, (at + 1) * section.samples)
            for answer, nats in zip(answers[samples], judged[samples], strict=True):
                assert answer.latents is not None
                value = rewarded(self._reward, section.reward, asked, answer.text)
                ended = answer.finish_reason == "end"
                value -= section.judge_weight * nats + (0.0 if ended else section.unended)
                row, latents = self._row(start, answer.ids, answer.latents)
                credited = self._credited(model, asked, len(start), answer) or len(latents)
                group.append(Answer(row, latents, value, nats, ended, credited))
            groups.append(group)
        return groups

    def _credited(self, model: ColaDLM, asked: str, prompt: int, answer: Completion) -> int | None:
        """Return the latents of a row up to the block that met the rule; None if all are credited."""
        section, config = self.section, model.vae.config
        if not isinstance(section, RewardSection) or section.credit == "answer" or not answer.tokens:
            return None
        if section.unended and answer.finish_reason != "end":  # What all blocks have part in.
            return None
        assert model.tokenizer is not None
        pinned = -(-prompt // config.patch_size)
        first = (pinned // config.block_size + 1) * config.block_size  # Where the answer's first block ends.
        ends = range(
            (first - pinned) * config.patch_size,
            len(answer.tokens) + config.block_tokens,
            config.block_tokens,
        )
        texts = [model.tokenizer.decode(answer.tokens[:end]) for end in ends]
        met = met_in(lambda text: rewarded(self._reward, section.reward, asked, text), texts)
        return None if met is None else first + met * config.block_size

    def _row(self, prompt: Sequence[int], ids: Sequence[int], latents: Tensor) -> tuple[Batch, Tensor]:
        """Return an answer as a row of the stage's length, and its latents."""
        length, patch = self.section.length, self.vae.config.patch_size
        shape = (1, length)
        row, sample = torch.full(shape, self.system.pad_id), torch.full(shape, FILLING)
        trained = torch.zeros(shape, dtype=torch.bool)
        end = len(latents) * patch
        whole = [*prompt, *ids]
        row[0, : len(whole)] = torch.tensor(whole)
        sample[0, :end] = 0
        trained[0, len(prompt) : end] = True
        filled = latents.new_zeros(length // patch, latents.shape[-1])
        filled[: len(latents)] = latents
        return Batch(row, sample, trained), filled

    # --- the loss --------------------------------------------------------------------------------

    def _parts(self, rows: Batch, noise: StepNoise) -> tuple[Tensor, Tensor]:
        """Return which latents are learnt of answers, and which of rows of the data: bool (B, M) each."""
        patch = self.vae.config.patch_size
        free = ~pinned_latents(given_tokens(rows, noise, patch), patch)
        if not isinstance(noise, AnswerNoise) or noise.written is None or noise.share is None:
            return torch.zeros_like(free), free
        return free & noise.written[:, None] & ~noise.share.isnan(), free & ~noise.written[:, None]

    def count(self, rows: Batch, noise: StepNoise) -> Counts:
        """Return tokens; in place of latents the noisy ones of rows of the data; and those of answers."""
        copies = 1 if noise.timestep is None else noise.timestep.shape[1]
        answers, others = (int(part.sum()) * copies for part in self._parts(rows, noise))
        tokens = rows.ids.numel() if rows.sample is None else int((rows.sample >= 0).sum())
        return Counts(tokens, others, answers)

    def loss(self, networks: nn.ModuleDict, rows: Batch, noise: StepNoise, counts: Counts, step: int) -> Loss:
        """Return the loss of answers and rows of the data in a step, with what learns or its average."""
        section = self.section
        assert noise.timestep is not None
        assert noise.z1 is not None
        answers, others = (part[:, None].float() for part in self._parts(rows, noise))
        _, (z0, pinned, sample) = frozen_latents(self.vae, rows, noise, self.system.pad_id)
        if section.latents == "written" and isinstance(noise, AnswerNoise) and noise.written is not None:
            assert noise.latents is not None
            z0 = torch.where(noise.written[:, None, None], noise.latents, z0)
        timestep, z1 = noise.timestep, noise.z1
        z = place(interpolate(z0[:, None], z1, timestep / T), pinned)

        def velocity_errors(networks: Any, name: str) -> Tensor:
            dit = network_of(networks, name, DiT)
            output = predict(dit, z, timestep, z0, pinned, sample, noise.alone)
            return PREDICTIONS[dit.config.prediction].error(output, z0[:, None], z1, timestep / T)

        policy = velocity_errors(networks, "dit")
        with torch.no_grad():
            reference = velocity_errors(self.frozen, "reference")
        pull = (policy - reference).square().mean(-1)
        flow = policy.square().mean(-1)
        held = pull if section.replay_of == "reference" else flow
        total = section.replay * (held * others).sum() / counts.latents
        terms = {
            "flow": (flow * others).sum() / counts.latents,
            "drift": (pull * others).sum() / counts.latents,
        }
        if isinstance(noise, AnswerNoise) and noise.share is not None and noise.reward is not None:
            with torch.no_grad():
                old = velocity_errors(self.frozen, "old") if self.needs_old else None
            push = self.errors(policy, old, noise.share.nan_to_num(0.5))
            terms["push"] = (push * answers).sum() / counts.noisy
            terms["pull"] = (pull * answers).sum() / counts.noisy
            terms["reward"] = noise.reward.sum() / section.batch
            total = total + terms["push"] + section.pull * terms["pull"]
        return Loss(total, {name: term.detach() for name, term in terms.items()})

    needs_old = True

    @property
    def together(self) -> int:
        """How many answers of a prompt follow each other, with one noise: what they share cancels out."""
        return 1

    @classmethod
    def phases(
        cls, recipe: Recipe, name: str, section: RolloutSection, configs: Configs, placement: Placement
    ) -> list[Phase]:
        """Return the steps, with what the answers of a round cost in each, and two frozen copies.

        Where weights lie over ranks, each has all of those that write.
        """
        vae, dit = configs["vae"], configs["dit"]
        (phase,) = super().phases(recipe, name, section, configs, placement)
        forward = (phase.flops["DiT"] + phase.flops["AdaLN"]) / 3
        chosen = {**ColaDLM.defaults, **recipe.generation, **section.sampler}
        evaluations = len(evaluations_of(chosen["solver"], chosen["schedule"], chosen["steps"]))
        blocks = -(-section.new_tokens // vae.block_tokens)
        prompt = max(0, section.length // vae.block_tokens - blocks)  # Rows count as full.
        answer = writing_flops(networks(vae, dit)[1], blocks, evaluations, chosen["guidance"] != 1, prompt)
        written = float(section.prompts * section.samples * answer) / section.updates
        flops = {**phase.flops, "frozen passes": (1 + cls.needs_old) * forward, "answers": written}
        memory = {**phase.memory, "copies": 2 * phase.memory["weights"]}
        if section.judge is not None:
            texts = section.prompts * section.samples
            judged, memory["judge"] = judge_cost(locate(section.judge), texts, section.new_tokens)
            flops["judge"] = judged / section.updates
        if placement.shards > 1:
            network_bytes = phase.memory["weights"] + phase.memory["frozen networks"]
            memory["whole networks"] = placement.shards * network_bytes
        return [replace(phase, flops=flops, memory=memory)]


class RewardStage(RolloutStage):
    """DiffusionNFT: towards good answers and away from bad ones, of each prompt's."""

    section: RewardSection

    @property
    def together(self) -> int:
        """Return the size of a group: at one noise, good and bad answers differ in themselves alone."""
        return self.section.samples

    def keep(self, number: int) -> float:
        """Return how much of the old weights stays, which rises with the rounds."""
        return min(self.section.keep_rise * number, self.section.keep)

    def chosen(self, answers: Sequence[Sequence[Answer]]) -> list[Answer]:
        """Return the answers of groups whose rewards differ, with r."""
        rewards = torch.tensor([[answer.reward for answer in group] for group in answers])
        shares = rewards_to_shares(rewards, self.section.least_spread)
        return [
            replace(answer, share=float(share))
            for group, of_group in zip(answers, shares, strict=True)
            for answer, share in zip(group, of_group, strict=True)
            if len({one.reward for one in group}) > 1
        ]

    def errors(self, policy: Tensor, old: Tensor | None, share: Tensor) -> Tensor:
        """Return ``posttraining.reward_errors`` of predictions whose target is no error."""
        assert old is not None
        nothing = torch.zeros_like(policy)
        beta, adaptive = self.section.beta, self.section.adaptive
        return reward_errors(policy, old, nothing, share[:, None], beta, adaptive)


class RaftStage(RolloutStage):
    """RAFT: the best answer of each prompt, where it is better than its group by a margin."""

    section: RaftSection
    needs_old = False

    def keep(self, number: int) -> float:
        """Return 0: answers are those of the weights as the round begins."""
        return 0.0

    def chosen(self, answers: Sequence[Sequence[Answer]]) -> list[Answer]:
        """Return the best of each group that has one."""
        best = []
        for group in answers:
            rewards = np.array([answer.reward for answer in group])
            best_answer = group[int(rewards.argmax())]
            if (
                best_answer.reward > rewards.mean()
                and best_answer.reward >= rewards.mean() + self.section.margin * rewards.std()
            ):
                best.append(replace(best_answer, share=1.0))
        return best

    def errors(self, policy: Tensor, old: Tensor | None, share: Tensor) -> Tensor:
        """Return the flow's error."""
        return policy.square().mean(-1)


def plain_prompt(model: LanguageModel, ids: Sequence[int]) -> str:
    """Return what a user has asked last, where the chat template shows it; else the whole prompt."""
    assert model.tokenizer is not None
    text = model.tokenizer.decode(ids, skip_special=False)
    if model.chat_template is None:
        return text
    turns = [{"role": "user", "content": _MARK}]
    before, _, after = render(turns, model.tokenizer, model.chat_template, "a prompt", True).partition(_MARK)
    if before and before in text and text.endswith(after):
        return text[text.rindex(before) + len(before) : len(text) - len(after)]
    return text
