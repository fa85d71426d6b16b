"""The training run: text to tokens, stage 1, stage 2, a saved model.

What step k computes is a pure function of the recipe and k (rows, noise, learning
rate), so a resumed run needs the weights, their average and the optimiser, and
nothing else.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from colada.checkpoint import TOKENIZER_FILE
from colada.data import Rows, Split, TokenStream, find_files, read_documents, tokenize
from colada.dit import DiT
from colada.errors import ColadaError
from colada.model import ColaDLM, check_settings
from colada.objectives import Loss, stage1_loss, stage2_frozen_loss, stage2_joint_loss
from colada.tokenizer import Tokenizer
from colada.training.display import Display
from colada.training.recipe import OptimiserSection, Recipe, difference, load_recipe, save_recipe
from colada.vae import TextVAE

CHECKPOINT, RECIPE, METRICS, SAMPLES, MODEL = (
    "checkpoint.pt",
    "recipe.yaml",
    "metrics.jsonl",
    "samples.txt",
    "model",
)
VALIDATION_STEP = 2**31  # Noise for validation: a step no training run reaches.


def step_generator(seed: int, stage: int, step: int) -> torch.Generator:
    """Return the CPU generator of one step: the same whether or not the run was interrupted before it."""
    state = np.random.SeedSequence([seed, stage, step]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def learning_rate(step: int, section: OptimiserSection) -> float:
    """Return the factor on the learning rate: linear warm-up, then a cosine down to ``final_lr``."""
    if step < section.warmup:
        return (step + 1) / section.warmup
    progress = min(1.0, (step - section.warmup) / max(1, section.steps - section.warmup))
    return section.final_lr + (1 - section.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def average_weights(network: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of a network; its decay grows to ``decay`` at first."""

    def update(averaged: Any, current: Any, count: Any) -> None:
        n = int(count)
        torch._foreach_lerp_(list(averaged), list(current), 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(network, multi_avg_fn=update)


@dataclass
class Stage:
    """One stage: its number, its section of the recipe, what it trains and how, and its loss on a batch."""

    number: int
    section: OptimiserSection
    networks: nn.ModuleDict
    optimisers: list[torch.optim.Optimizer]
    loss: Callable[[nn.ModuleDict, Tensor, torch.Generator], Loss]


class Interrupted(Exception):
    """The run was asked to stop, and has saved its state."""


class Trainer:
    """Runs a recipe in a directory.

    Args:
        recipe: what to run.
        out: the run's directory, made if need be; a run found there with the same recipe is resumed.

    Raises:
        ColadaError: for unusable data or settings, another run in ``out``, a full disk.
    """

    def __init__(self, recipe: Recipe, out: Path, display: Display | None = None) -> None:
        self.recipe, self.out = recipe, out
        self.display = display or Display()
        self.device = _device(recipe.run.device)
        self._stop = False
        check_settings(recipe.generation, "recipe: generation")
        self.saved = self._resume()
        if self.saved is None:
            with disk_errors(out):
                out.mkdir(parents=True, exist_ok=True)
                save_recipe(recipe, out / RECIPE)
        self.tokenizer, self.streams = self._prepare_data()
        vae_config, dit_config = recipe.configs(self.tokenizer.vocab_size, self.tokenizer.pad_id)
        self.vae, self.dit = TextVAE(vae_config), DiT(dit_config)
        self.vae.init_weights(step_generator(recipe.seed, 0, 0))
        self.dit.init_weights(step_generator(recipe.seed, 0, 1))
        self.vae.to(self.device), self.dit.to(self.device)
        self.reference: TextVAE | None = None
        if self.saved is not None:
            self.vae.load_state_dict(self.saved["vae"])

    def _resume(self) -> dict[str, Any] | None:
        """Return the state that an interrupted run of the same recipe left in ``out``, or None."""
        file = self.out / CHECKPOINT
        if not file.is_file():
            return None
        changed = difference(load_recipe(self.out / RECIPE), self.recipe)
        if changed:
            raise ColadaError(f"{self.out} holds a run of another recipe: {changed}; give another --out")
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ColadaError(f"{file} is damaged: {str(error).splitlines()[0]}") from None
        return state

    # --- data ------------------------------------------------------------------------------

    def _prepare_data(self) -> tuple[Tokenizer, dict[Split, TokenStream]]:
        data, section = self.recipe.data, self.recipe.tokenizer
        files = find_files(Path(data.path), data.include)

        def documents() -> Iterator[Any]:
            return read_documents(files, column=data.column, validation_share=data.validation_share)

        own = self.out / TOKENIZER_FILE
        if section.file is not None:
            tokenizer = Tokenizer.from_file(Path(section.file))
        elif self.saved is not None:
            tokenizer = Tokenizer.from_file(own)
        else:
            self.display.say(f"training a tokenizer of {section.vocab_size} entries")
            texts = (document.text for document in documents() if document.split == "train")
            tokenizer = Tokenizer.train(texts, section.vocab_size)
        if self.saved is None:
            with disk_errors(self.out):
                tokenizer.save(own)
        streams = tokenize(documents(), tokenizer)
        for name, stream in streams.items():
            tokens, count = len(stream), len(stream.starts)
            self.display.say(f"{name}: {tokens:,} tokens in {count:,} documents")
        return tokenizer, streams

    def _rows(self, split: Split, section: OptimiserSection, seed: int) -> Rows:
        stream = self.streams[split]
        return Rows(stream, section.length, seed=seed, align=self.recipe.data.align, name=split)

    # --- the two stages --------------------------------------------------------------------

    def stages(self) -> list[Stage]:
        """Return both stages over this trainer's networks."""
        recipe, weights = self.recipe, self.recipe.vae_weights()
        settings = recipe.flow_settings(self.vae.config.latent_dim)
        pad_id = self.tokenizer.pad_id

        def first(networks: nn.ModuleDict, ids: Tensor, generator: torch.Generator) -> Loss:
            return stage1_loss(_vae(networks), ids, weights, generator)

        def frozen(networks: nn.ModuleDict, ids: Tensor, generator: torch.Generator) -> Loss:
            return stage2_frozen_loss(self.vae, _dit(networks), ids, pad_id, settings, weights, generator)

        def joint(networks: nn.ModuleDict, ids: Tensor, generator: torch.Generator) -> Loss:
            assert self.reference is not None
            return stage2_joint_loss(
                _vae(networks),
                _dit(networks),
                self.reference,
                ids,
                pad_id,
                settings,
                weights,
                recipe.joint_weights(),
                generator,
            )

        one, two = recipe.stage1, recipe.stage2
        networks = nn.ModuleDict({"dit": self.dit})
        optimisers = make_optimisers(self.dit, two, two.lr)
        if two.vae == "joint":
            networks["vae"] = self.vae
            optimisers += make_optimisers(self.vae, two, two.lr * two.vae_lr)
        alone = nn.ModuleDict({"vae": self.vae})
        return [
            Stage(1, one, alone, make_optimisers(self.vae, one, one.lr), first),
            Stage(2, two, networks, optimisers, frozen if two.vae == "frozen" else joint),
        ]

    def run(self) -> ColaDLM:
        """Run both stages, or what is left of them, and save the model under ``out/model``.

        Raises:
            Interrupted: after SIGINT or SIGTERM, once the state is saved.
            ColadaError: as the class says, or when the loss is not finite.
        """
        saved, self.saved = self.saved, None
        with self._graceful_stop():
            for stage in self.stages():
                if saved is not None and stage.number < saved["stage"]:
                    continue
                if stage.number == 2:
                    self._freeze(saved)
                self._run_stage(stage, saved if saved and saved["stage"] == stage.number else None)
                saved = None
        model = self.model(self.vae, self.dit)
        with disk_errors(self.out):
            model.save(self.out / MODEL)
        self.display.say(f"saved the model to {self.out / MODEL}")
        return model

    def _freeze(self, saved: dict[str, Any] | None) -> None:
        """Keep the stage-1 encoder as q_ref, or stop training the whole Text VAE."""
        if self.recipe.stage2.vae == "frozen":
            self.vae.requires_grad_(False)
            return
        self.reference = TextVAE(self.vae.config).to(self.device).requires_grad_(False)
        stage1 = saved["reference"] if saved else self.vae.state_dict()
        self.reference.load_state_dict(stage1)

    def _run_stage(self, stage: Stage, saved: dict[str, Any] | None) -> None:
        section, run = stage.section, self.recipe.run
        if section.steps == 0:
            return
        rows = self._rows("train", section, self.recipe.seed + stage.number)
        validation = self._rows("validation", section, self.recipe.seed) if run.validate_every else None
        schedules = [
            LambdaLR(optimiser, lambda step: learning_rate(step, section)) for optimiser in stage.optimisers
        ]
        average = average_weights(stage.networks, section.ema) if section.ema else None
        start = 0
        if saved is not None:
            start = saved["step"]
            stage.networks.load_state_dict(saved["networks"])
            for optimiser, state in zip(stage.optimisers, saved["optimisers"], strict=True):
                optimiser.load_state_dict(state)
            for schedule, state in zip(schedules, saved["schedules"], strict=True):
                schedule.load_state_dict(state)
            if average is not None:
                average.load_state_dict(saved["average"])
            self.display.say(f"resuming stage {stage.number} at step {start}")

        def best() -> nn.ModuleDict:
            module = average.module if average is not None else stage.networks
            assert isinstance(module, nn.ModuleDict)
            return module

        def save(step: int) -> None:
            self._save(stage, step, schedules, average)

        watch, tokens = time.perf_counter(), 0
        with self.display.stage(stage.number, section.steps, start):
            for step in range(start, section.steps):
                ids = rows.batch(step, section.batch).to(self.device)
                generator = step_generator(self.recipe.seed, stage.number, step)
                with self._autocast():
                    loss = stage.loss(stage.networks, ids, generator)
                if not bool(loss.total.isfinite()):
                    raise ColadaError(f"stage {stage.number}, step {step}: the loss is {loss.total.item()}")
                stage.networks.zero_grad(set_to_none=True)
                loss.total.backward()
                norm = nn.utils.clip_grad_norm_(stage.networks.parameters(), section.clip)
                for optimiser, schedule in zip(stage.optimisers, schedules, strict=True):
                    optimiser.step()
                    schedule.step()
                if average is not None:
                    average.update_parameters(stage.networks)
                done, last = step + 1, step + 1 == section.steps
                tokens += ids.numel()
                if done % run.log_every == 0 or last:
                    now = time.perf_counter()
                    terms = {name: float(term) for name, term in loss.terms.items()}
                    terms |= {"grad_norm": float(norm), "lr": float(schedules[0].get_last_lr()[0])}
                    terms["tokens_per_s"] = tokens / (now - watch)
                    watch, tokens = now, 0
                    self._log(stage, done, "train", terms)
                    self.display.update(done, terms)
                if validation is not None and (done % run.validate_every == 0 or last):
                    self._log(stage, done, "validation", self._validate(stage, best(), validation))
                if stage.number == 2 and run.sample_every and (done % run.sample_every == 0 or last):
                    self._sample(done, best())
                if self._stop or done % run.save_every == 0 or last:
                    save(done)
                if self._stop:
                    raise Interrupted(f"stopped at stage {stage.number}, step {done}; run again to resume")
        if average is not None:
            stage.networks.load_state_dict(best().state_dict())

    # --- what happens besides training ------------------------------------------------------

    @torch.no_grad()
    def _validate(self, stage: Stage, networks: nn.ModuleDict, rows: Rows) -> dict[str, float]:
        """Return the mean of each loss term over the same validation rows, noise and timesteps every time."""
        batch = min(stage.section.batch, self.recipe.run.validation_rows)
        batches = max(1, self.recipe.run.validation_rows // batch)
        sums: dict[str, float] = {}
        for number in range(batches):
            ids = rows.batch(number, batch).to(self.device)
            generator = step_generator(self.recipe.seed, stage.number, VALIDATION_STEP + number)
            with self._autocast():
                loss = stage.loss(networks, ids, generator)
            for name, term in loss.terms.items():
                sums[name] = sums.get(name, 0.0) + float(term) / batches
        self.display.say(
            f"stage {stage.number} validation: "
            + ", ".join(f"{name} {value:.4g}" for name, value in sums.items())
        )
        return sums

    def model(self, vae: TextVAE, dit: DiT) -> ColaDLM:
        """Return a model of these networks in the recipe's ``save_dtype``."""
        dtype = torch.bfloat16 if self.recipe.run.save_dtype == "bfloat16" else torch.float32
        copies = TextVAE(vae.config), DiT(dit.config)
        for copy, network in zip(copies, (vae, dit), strict=True):
            copy.load_state_dict(network.state_dict())
            copy.to(dtype)
        return ColaDLM(*copies, self.tokenizer, origin=str(self.out), generation=self.recipe.generation)

    def _sample(self, step: int, networks: nn.ModuleDict) -> None:
        run = self.recipe.run
        vae = _vae(networks) if "vae" in networks else self.vae
        model = ColaDLM(vae, _dit(networks), self.tokenizer, generation=self.recipe.generation)
        completions = model.generate(run.sample_prompts, run.sample_tokens, seed=self.recipe.seed)
        with disk_errors(self.out), (self.out / SAMPLES).open("a", encoding="utf-8") as file:
            for prompt, completion in zip(run.sample_prompts, completions, strict=True):
                file.write(f"--- step {step}\n{prompt}{completion.text}\n")
                self.display.say(f"sample: {escape(prompt)}[bold]|[/bold]{escape(completion.text)}")

    def _log(self, stage: Stage, step: int, split: str, terms: dict[str, float]) -> None:
        with disk_errors(self.out), (self.out / METRICS).open("a", encoding="utf-8") as file:
            record = {"stage": stage.number, "step": step, "split": split, "time": time.time(), **terms}
            file.write(json.dumps(record) + "\n")

    def _save(
        self,
        stage: Stage,
        step: int,
        schedules: list[LambdaLR],
        average: AveragedModel | None,
    ) -> None:
        """Write the state, replacing the last one only once it is whole."""
        state = {
            "stage": stage.number,
            "step": step,
            "networks": stage.networks.state_dict(),
            "vae": self.vae.state_dict(),
            "reference": self.reference.state_dict() if self.reference is not None else None,
            "optimisers": [optimiser.state_dict() for optimiser in stage.optimisers],
            "schedules": [schedule.state_dict() for schedule in schedules],
            "average": average.state_dict() if average is not None else None,
        }
        partial = self.out / (CHECKPOINT + ".partial")
        try:
            with disk_errors(self.out):
                torch.save(state, partial)
                os.replace(partial, self.out / CHECKPOINT)
        except RuntimeError as error:
            # How torch.save reports a write that its zip writer could not do.
            raise ColadaError(f"cannot write to {partial}: {str(error).splitlines()[0]}") from None
        finally:
            partial.unlink(missing_ok=True)

    def _autocast(self) -> torch.autocast:
        enabled = self.recipe.run.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    @contextmanager
    def _graceful_stop(self) -> Iterator[None]:
        """Turn SIGINT and SIGTERM into a request to save and stop after the step."""

        def ask(signum: int, frame: object) -> None:
            self._stop = True
            self.display.say("stopping after this step")

        old = {which: signal.signal(which, ask) for which in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for which, handler in old.items():
                signal.signal(which, handler)


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn a failed write under ``out`` (no space, no permission) into a ColadaError."""
    try:
        yield
    except OSError as error:
        raise ColadaError(f"cannot write to {out}: {error.strerror or error}") from None


def make_optimisers(network: nn.Module, section: OptimiserSection, lr: float) -> list[torch.optim.Optimizer]:
    """Return a network's optimisers; weight decay is on matrices only, AdaLN and embeddings are AdamW's."""
    named = list(network.named_parameters())
    blocks = [p for name, p in named if p.ndim == 2 and "blocks." in name and ".ada." not in name]
    if section.optimiser == "adamw":
        blocks = []
    inside = {id(parameter) for parameter in blocks}
    matrices = [p for _, p in named if p.ndim > 1 and id(p) not in inside]
    vectors = [p for _, p in named if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=lr, betas=section.betas, weight_decay=section.weight_decay, fused=True)
    ]
    if blocks:
        muon = torch.optim.Muon(
            blocks, lr=lr, weight_decay=section.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimisers.append(muon)
    return optimisers


def _vae(networks: nn.ModuleDict) -> TextVAE:
    vae = networks["vae"]
    assert isinstance(vae, TextVAE)
    return vae


def _dit(networks: nn.ModuleDict) -> DiT:
    dit = networks["dit"]
    assert isinstance(dit, DiT)
    return dit


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ColadaError(f"run.device={name!r}, expected 'auto', 'cpu' or 'cuda'") from None
