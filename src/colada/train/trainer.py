"""The training run: text to rows, the stages of a recipe, a saved model.

What step k computes is a pure function of the recipe and k (rows, noise, learning rate), whatever
the number of ranks and the micro-batches. A resumed run needs the weights, their average and the
optimiser's state; there is no generator and no position in the data to restore.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.text import Text
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from colada.data.rows import Batch, Rows, RowTensors, batch
from colada.device import keep_freed_memory
from colada.errors import ColadaError
from colada.files import locked
from colada.locate import CHAT_TEMPLATE_FILE, TOKENIZER_FILE
from colada.models.base import LanguageModel
from colada.models.load import load
from colada.networks.checkpoint import check_replaceable
from colada.text.tokenizer import Tokenizer
from colada.train.checkpoints import (
    RECIPE,
    Checkpoints,
    Place,
    disk_errors,
    find,
    read_state,
    read_tensors,
)
from colada.train.display import Display
from colada.train.export import DTYPES, system_of, write_model
from colada.train.inputs import chat_template, make_tokenizer, prepare_inputs
from colada.train.logs import Monitors, Point, make_monitors, write_drawings
from colada.train.losses import Loss, add_terms, readable
from colada.train.noise import Counts
from colada.train.optimisation import average_weights, learning_rate, set_learning_rate
from colada.train.parallel import Ranks, allocate, lay_out, run_device
from colada.train.plan import Plan, check_memory, plan_run, planned, resolve
from colada.train.preflight import preflight
from colada.train.provenance import provenance
from colada.train.recipe import Recipe, commented, difference, load_recipe, save_recipe
from colada.train.stages import VALIDATION_ROW, Beginning, Stage, make_stage, modes_kept
from colada.train.watch import Meter, drawings, graceful_stop, samples

MODEL = "model"


@dataclass
class StageProgress:
    """How far a stage is: steps and tokens done, and steps skipped for non-finite losses or gradients."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0


class Interrupted(Exception):
    """The run was asked to stop, and has saved its state."""


class Trainer:
    """Runs a recipe in a directory.

    Args:
        recipe: what to run.
        out: the run's directory, made if need be.
        resume: which checkpoint to go on from, see :func:`checkpoints.find`; by default the last one.
        ranks: this process among those of the run; by default alone.

    Raises:
        ColadaError: for unusable data or settings, another run in ``out``, a full disk.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        display: Display | None = None,
        resume: str = "auto",
        ranks: Ranks | None = None,
    ) -> None:
        self.out = out
        self.ranks = ranks or Ranks(0, 1, run_device(recipe.run.device))
        self.device = self.ranks.device
        if self.device.type == "cpu":
            keep_freed_memory()
        self.display = display if display is not None and self.ranks.first else Display()
        self._stop, self._saved = False, time.monotonic()
        # What can be refused at once, before hours of tokenising.
        notes = preflight(recipe, out)
        self.recipe = recipe = resolve(recipe)
        plan = plan_run(recipe, self.ranks.size)
        check_memory(plan, self.device)
        check_replaceable(out / MODEL)
        self._resumable(resume)  # Refused before there is a directory, and looked up again once it is ours.
        for line in (*planned(self.recipe, plan, self.ranks, out), *notes):
            self.display.say(line)
        self._lock = self._locked()
        try:
            self._prepare(plan, resume)
        except BaseException:
            self._unlock()
            raise

    def _prepare(self, plan: Plan, resume: str) -> None:
        """Get data and networks ready in the directory, which is this run's alone."""
        recipe, out = self.recipe, self.out
        self.resumed = self._resumable(resume)
        if self.resumed is None and self.ranks.first:
            save_recipe(recipe, out / RECIPE)
        start = load(recipe.model.init) if recipe.model.init is not None else None
        self.generation = {**(start.generation if start is not None else {}), **recipe.own_generation}
        self.tokenizer = self._tokenizer(start)
        self.template = chat_template(recipe, self.tokenizer, start)
        cache = Path(recipe.data.cache) if recipe.data.cache is not None else out / "shards"
        with self.display.task("tokenising", 1, passing=True):
            self.inputs = prepare_inputs(
                recipe, self.tokenizer, self.template, cache, self.display.say, self.display.advance
            )
        self._check_data()
        self.system = system_of(recipe, self.tokenizer, start, whole=self.ranks.mesh is None)
        self.system.prepare()
        self.checkpoints = Checkpoints(
            out / "checkpoints", recipe.run.keep_last, recipe.run.keep_every, self.ranks.first
        )
        self.made_with = provenance(self.device) | {
            "parameters": ", ".join(f"{name} {number:,}" for name, number in plan.cost.parameters.items())
        }

    def _resumable(self, resume: str) -> Path | None:
        """Return the checkpoint to go on from; raises :class:`ColadaError` if it is of another recipe."""
        checkpoint = find(self.out, resume)
        if checkpoint is not None:
            changed = difference(load_recipe(checkpoint / RECIPE), self.recipe)
            if changed:
                raise ColadaError(f"{checkpoint} is of another recipe: {changed}; give another --out")
        return checkpoint

    def _locked(self) -> FileLock | None:
        """Keep other runs out of the directory, which is made if need be; the first rank does for all."""
        if not self.ranks.first:
            return None
        with disk_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        return locked(self.out / "lock", f"{self.out} is in use by another run: wait, or give another --out")

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _check_data(self) -> None:
        """Refuse to go on with other text than the checkpoint was trained on: the rows would be others."""
        if self.resumed is None:
            return
        pairs = zip(self.inputs.digests(), read_state(self.resumed)["data"], strict=False)
        for (data, now), then in pairs:
            if then != now:
                raise ColadaError(
                    f"the training {data} is not what {self.resumed} was trained on;"
                    " restore it, or start from its export: model.init"
                )

    def _tokenizer(self, start: LanguageModel | None) -> Tokenizer:
        """Return the tokenizer of the checkpoint or, made by the first rank for all, of a new run."""
        file = (self.resumed or self.out) / TOKENIZER_FILE
        if self.resumed is None:
            if self.ranks.first:
                tokenizer = make_tokenizer(self.recipe, start, self.display.say)
                with disk_errors(self.out):
                    tokenizer.save(file)
            self.ranks.wait()
        return Tokenizer.from_file(file)

    def _lay_out(self, networks: dict[str, nn.Module]) -> nn.ModuleDict:
        networks_read = nn.ModuleDict(networks)
        lay_out(networks_read, self.ranks, DTYPES[self.recipe.run.precision])
        if self.ranks.mesh is None:
            return networks_read.to(self.device)
        allocate(networks_read, self.device)
        return networks_read

    # --- the stages ------------------------------------------------------------------------

    def run(self) -> None:
        """Run all stages, or what is left of them, and save the model under ``out/model``.

        Raises:
            Interrupted: after SIGINT or SIGTERM, once the state is saved.
            ColadaError: as the class says, or when too many steps were skipped.
        """
        try:
            self._run()
        finally:
            self._unlock()

    def _run(self) -> None:
        saved = read_state(self.resumed) if self.resumed is not None else None
        names = [name for name, section in self.recipe.trained.items() if section.steps]
        resume_at = None
        if saved is not None:
            place = names.index(saved["stage"])
            resume_at, names = Point(tuple(names[: place + 1]), saved["step"]), names[place:]
        run, settings = self.recipe.run, self.recipe.model_dump(mode="json")
        monitors = make_monitors(run.monitors, self.out, settings, resume_at, self.ranks.first)
        try:
            with graceful_stop(self._ask_to_stop):
                for name in names:
                    self._run_stage(make_stage(self.system, name, self._lay_out), saved, monitors)
                    saved = None
                for name in self.system.networks:  # Those that no stage has needed.
                    self.system.ready(name, self._lay_out)
                self.checkpoints.finish()
        finally:
            monitors.close()
            if self.ranks.size == 1:  # Others may be gone.
                self.checkpoints.settle()
        self.save_model(self.out / MODEL)
        self.display.say(f"saved the model to {self.out / MODEL}")

    def _state(self, stage: Stage, average: AveragedModel | None) -> dict[str, Any]:
        """Return all tensors that a checkpoint holds, by name."""
        networks = {**stage.frozen, **dict(stage.networks.items())}
        state: dict[str, Any] = {name: network.state_dict() for name, network in networks.items()}
        state["optimisers"] = get_optimizer_state_dict(stage.networks, stage.optimisers)
        if average is not None:
            state["average"] = average.state_dict()
        if stage.memory:
            state["memory"] = stage.memory
        return state

    def _restore(self, stage: Stage, average: AveragedModel | None) -> None:
        assert self.resumed is not None
        state = self._state(stage, average)
        read_tensors(self.resumed, state)
        # Tensors were read in place; the rest of the optimisers' state is set here.
        set_optimizer_state_dict(stage.networks, stage.optimisers, optim_state_dict=state["optimisers"])

    def _run_stage(self, stage: Stage, saved: dict[str, Any] | None, monitors: Monitors) -> None:
        section, run, block = stage.section, self.recipe.run, self.system.block_tokens
        rows_from = partial(self.inputs.rows, "train", section, block=block)
        rows = rows_from(self.recipe.seed + stage.number)
        validation = None
        if run.validate_every:
            validation = self.inputs.validation_rows(section, self.recipe.seed, block, self.display.say)
        average = self._average(stage) if section.ema else None
        progress = StageProgress()
        if saved is not None:
            self._restore(stage, average)
            progress = StageProgress(saved["step"], saved["tokens"], saved["skipped"])
            self.display.say(f"resuming {stage.name} at step {progress.step}")
        text, stopped = [digest for _, digest in self.inputs.digests()], lambda: self._stop
        stage.begin(Beginning(rows_from, text, self._whole, self._model, self.ranks, self.display, stopped))
        if self.ranks.sum(torch.tensor([float(self._stop)])).item():
            raise Interrupted(f"stopped before step {progress.step + 1} of {stage.name}; run again to resume")
        best = average.module if average is not None else stage.networks
        assert isinstance(best, nn.ModuleDict)
        stage.best = best
        meter = Meter(self.ranks, DTYPES[run.precision])
        with self.display.task(stage.name, section.steps, progress.step):
            for step, (step_rows, noise) in self._ahead(stage, rows, progress.step):
                try:
                    step_rows, noise = stage.rollouts(step, step_rows, noise)
                except ColadaError as error:
                    self._save(stage, average, progress, wait=True)
                    raise ColadaError(f"{stage.name} step {step + 1}: {error}; saved") from None
                terms, norm = self._step(stage, step, step_rows, noise)
                if norm is None:
                    progress.skipped += 1
                    self.display.say(f"{stage.name} step {step + 1}: not finite, skipped")
                else:
                    stage.learnt(step, terms, self.ranks.sum)
                    if average is not None:
                        average.update_parameters(stage.networks)
                progress.step, progress.tokens = step + 1, progress.tokens + stage.tokens(step)
                self.display.move(step + 1, section.steps)
                meter.count(stage.tokens(step), stage.flops(step))
                done, last = step + 1, step + 1 == section.steps
                if done % run.log_every == 0 or last:
                    values = self._readable(terms) | {"grad_norm": norm}
                    values |= {"lr": section.lr * learning_rate(step, section)}
                    values |= {"skipped": progress.skipped, "tokens": progress.tokens, **meter.read()}
                    self._log(monitors, stage, done, "train", values)
                    self.display.update(done, values)
                if validation is not None and (done % run.validate_every == 0 or last):
                    losses = self._validate(stage, best, validation, step)
                    self._log(monitors, stage, done, "validation", {"tokens": progress.tokens, **losses})
                    meter.restart()
                if stage.writes and run.sample_every and (done % run.sample_every == 0 or last):
                    self._sample(monitors, stage, done, best)
                    meter.restart()
                (stop, due), spent = self._agreed(), progress.skipped > run.max_skipped
                if stop or due or spent or last or done % run.save_every == 0:
                    self._save(stage, average, progress, wait=stop or spent)
                if spent:
                    where = rows.describe(step * section.batch)
                    raise ColadaError(
                        f"{stage.name}: {progress.skipped} steps were not finite, run.max_skipped="
                        f"{run.max_skipped}; the last is step {done}, whose batch begins with {where}; saved"
                    )
                if stop:
                    raise Interrupted(f"stopped at step {done} of {stage.name}; run again to resume")
        if average is not None:
            stage.networks.load_state_dict(best.state_dict())

    def _average(self, stage: Stage) -> AveragedModel:
        """Return averaged weights, which begin as those of the stage."""
        fresh = {
            name: self.system.made(partial(type(network), network.config))
            for name, network in stage.networks.items()
        }
        average = average_weights(nn.ModuleDict(fresh), stage.section.ema)
        self._lay_out(dict(average.module.items()))  # type: ignore[operator]
        average.requires_grad_(False)
        average.module.load_state_dict(stage.networks.state_dict())
        return average

    def _ahead(self, stage: Stage, rows: Rows, start: int) -> Iterator[tuple[int, tuple[Batch, RowTensors]]]:
        """Yield each step with this rank's rows and noise, made while the step before computes."""
        size = stage.section.batch

        def make(step: int) -> tuple[Batch, RowTensors]:
            numbers = [step * size + i for i in self.ranks.share(size)]
            return batch(rows, numbers), stage.draw(numbers)

        with ThreadPoolExecutor(1) as worker:
            coming = worker.submit(make, start)
            for step in range(start, stage.section.steps):
                ready = coming.result()
                if step + 1 < stage.section.steps:
                    coming = worker.submit(make, step + 1)
                yield step, ready

    def _losses(
        self, stage: Stage, networks: nn.ModuleDict, step: int, rows: Batch, noise: RowTensors
    ) -> Iterator[Loss]:
        """Yield the losses of a step's micro-batches; they are divided by the counts of all, on all ranks."""
        counted = torch.tensor(astuple(stage.count(rows, noise)), dtype=torch.float64)
        counts = Counts(*(max(1.0, count) for count in self.ranks.sum(counted).tolist()))
        size = (stage.section.micro_batch or len(rows)) * (stage.section.group or 1)
        for begin in range(0, len(rows), size):
            part = rows.rows(begin, begin + size).to(self.device)
            drawn = noise.rows(begin, begin + size).to(self.device)
            with self.system.autocast(self.device):
                loss = stage.loss(networks, part, drawn, counts, step)
            yield loss

    def _step(
        self, stage: Stage, step: int, rows: Batch, noise: RowTensors
    ) -> tuple[dict[str, Tensor], float | None]:
        """Take one optimiser step.

        Returns: the loss terms, and the gradient's norm; None where the step was skipped because
            the loss or the norm is not finite.
        """
        stage.networks.zero_grad(set_to_none=True)
        terms: dict[str, Tensor] = {}
        total = torch.zeros((), device=self.device)
        for loss in self._losses(stage, stage.networks, step, rows, noise):
            # Gradients are averaged over the ranks, the losses are to be summed.
            (loss.total * self.ranks.size).backward()
            add_terms(terms, loss.terms)
            total += loss.total.detach()
        parameters = [p for p in stage.networks.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, stage.section.clip)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        terms["loss"] = total
        if not math.isfinite(float(self.ranks.sum(total.clone())) + float(norm)):
            return terms, None
        set_learning_rate(stage.optimisers, learning_rate(step, stage.section))
        for optimiser in stage.optimisers:
            optimiser.step()
        return terms, float(norm)

    # --- what happens besides training ------------------------------------------------------

    @torch.no_grad()
    def _validate(self, stage: Stage, networks: nn.ModuleDict, rows: Rows, step: int) -> dict[str, Any]:
        """Return the mean of each loss term over the same validation rows, noise and timesteps every time."""
        number = max(1, self.recipe.run.validation_rows // self.ranks.size) * self.ranks.size
        numbers = self.ranks.share(number)
        noise, terms = stage.draw([VALIDATION_ROW + row for row in numbers]), dict[str, Tensor]()
        for loss in self._losses(stage, networks, step, batch(rows, numbers), noise):
            add_terms(terms, loss.terms)
        values = self._readable(terms)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, float))
        self.display.say(f"{stage.name} validation: {shown}")
        return values

    def _readable(self, terms: dict[str, Tensor]) -> dict[str, Any]:
        return readable({name: self.ranks.sum(term.double()) for name, term in sorted(terms.items())})

    def save_model(self, directory: Path) -> None:
        """Write the networks as a model directory; all ranks must call it."""
        whole = self._whole(self.system.networks)
        if whole is not None:
            write_model(self._model(whole), self.recipe, directory)
        self.ranks.wait()

    def _whole(self, networks: Mapping[str, nn.Module]) -> dict[str, nn.Module] | None:
        """Gather copies of networks on the first rank's CPU; None on the others. All must call it."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        states = {name: get_model_state_dict(network, options=options) for name, network in networks.items()}
        if not self.ranks.first:
            return None
        whole = {name: type(network)(network.config) for name, network in networks.items()}
        for name, network in whole.items():
            network.load_state_dict(states[name])
        return whole

    def _model(self, networks: Mapping[str, nn.Module]) -> LanguageModel:
        return self.system.model(
            networks,
            tokenizer=self.tokenizer,
            origin=str(self.out),
            generation=self.generation,
            chat_template=self.template,
        )

    def _sample(self, monitors: Monitors, stage: Stage, step: int, networks: nn.ModuleDict) -> None:
        best = {**self.system.networks, **dict(networks.items())}
        # The engine reads weights where they are; sharded ones are not whole anywhere.
        parts = best if self.ranks.mesh is None else self._whole(best)
        if parts is None:
            self.ranks.wait()
            return
        with modes_kept(parts.values()):
            model = self._model(parts).to(self.ranks.device)
            texts, drawn = samples(self.recipe, model), drawings(self.recipe, model)
        for prompt, text in texts.items():
            monitors.text(stage.name, step, prompt, f"{prompt}|{text}")
            self.display.say(Text.assemble("sample: ", prompt, ("|", "bold"), text))
        if drawn is not None and self.ranks.first:
            write_drawings(self.out, stage.name, step, *drawn, monitors)
        if self.ranks.mesh is not None:
            self.ranks.wait()

    def _log(self, monitors: Monitors, stage: Stage, step: int, split: str, values: dict[str, Any]) -> None:
        with disk_errors(self.out):
            monitors.log({"stage": stage.name, "step": step, "split": split, "time": time.time(), **values})

    def _save(self, stage: Stage, average: AveragedModel | None, progress: StageProgress, wait: bool) -> None:
        state = {"stage": stage.name, **asdict(progress), "made_with": self.made_with}
        state |= self.system.configs()
        state |= {"data": [digest for _, digest in self.inputs.digests()], "generation": self.generation}
        files = {RECIPE: commented(self.recipe), TOKENIZER_FILE: self.tokenizer.to_json()}
        if self.template is not None:
            files[CHAT_TEMPLATE_FILE] = self.template
        place, self._saved = Place(stage.name, progress.step), time.monotonic()
        self.checkpoints.save(place, self._state(stage, average), state, files, wait)

    def _ask_to_stop(self) -> None:
        self._stop = True
        if self.ranks.first and not self.display.console.quiet:
            os.write(2, b"stopping after this step\n")  # The console may be in the middle of a line.

    def _agreed(self) -> tuple[bool, bool]:
        """Return whether any rank was asked to stop, and whether the first one's clock says to save.

        All ranks do the same after the same step.
        """
        minutes = self.recipe.run.checkpoint_minutes
        due = minutes is not None and time.monotonic() - self._saved >= 60 * minutes
        stop, due = self.ranks.sum(torch.tensor([self._stop, due and self.ranks.first]).float()).tolist()
        return bool(stop), bool(due)
