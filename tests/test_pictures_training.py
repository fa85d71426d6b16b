"""Runs that learn pictures: tasks by step, losses against pairs one by one, exact resume, codecs, ranks."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import colada.train.pairs as pairs_of_runs
from colada.data.rows import Batch
from colada.errors import ColadaError
from colada.flow import MIN_A, T
from colada.models.load import load_cola
from colada.networks.dit import DiT
from colada.pictures.codec import ConvVAE, PatchPCA, fit, new_codec
from colada.pictures.config import CodecConfig
from colada.pictures.show import png
from colada.pictures.sources import Scenes, open_source
from colada.report.training import write_report
from colada.text.tokenizer import Tokenizer
from colada.train.cost import Placement, adaln_entries, block_causal_pairs, matrix_entries
from colada.train.display import Display
from colada.train.export import export, system_of
from colada.train.kinds import PictureVAESection
from colada.train.logs import read_samples
from colada.train.noise import Counts
from colada.train.pairs import LOOKED_AT, open_pairs
from colada.train.picture_cost import ANSWER, CAPTION, PROMPT, _codec_flops, codec_phase
from colada.train.pictures import PicturesStage, TaskNoise
from colada.train.plan import plan_run
from colada.train.recipe import Recipe, load_recipe
from colada.train.stages import VALIDATION_ROW, make_stage
from colada.train.trainer import Interrupted, Trainer
from runs import DEBUG, TINY, At, assert_same_run, logged, metrics, recipe

PICTURES = [
    "data.pictures=[{path: 'shapes:one,grid'}]",
    "data.fitted_on=60",
    "stages.vae.steps=0",
    "stages.prior.steps=0",
    "stages.pictures={kind: pictures, steps: 8, batch: 4, pairs: 2, length: 16, warmup: 2, ema: 0.9}",
]
BY_TASK = {"text": "flow", "draw": "picture_flow", "describe": "answer_flow"}


def run(out: Path, *overrides: str, display: Display | None = None) -> Path:
    Trainer(recipe(*PICTURES, *overrides), out, display).run()
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from beginning to end."""
    return run(tmp_path_factory.mktemp("pictures") / "run")


def forget_opened() -> None:
    """As another process has read nothing yet."""
    pairs_of_runs._opened.cache_clear()


def stage_of(made: Recipe, out: Path) -> PicturesStage:
    """A stage by itself, over the networks as they begin."""
    start = load_cola(Path(made.model.init)) if made.model.init else None
    system = system_of(made, Tokenizer.from_file(out / "tokenizer.json"), start)
    stage = make_stage(system, "pictures", nn.ModuleDict)
    assert isinstance(stage, PicturesStage)
    return stage


@pytest.fixture(scope="module")
def stage(whole: Path) -> PicturesStage:
    stage = stage_of(recipe(*PICTURES), whole)
    with torch.no_grad():  # Open gates and outputs: a fresh network draws nothing.
        generator = torch.Generator().manual_seed(1)
        for parameter in stage.networks.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return stage


def test_a_run_learns_all_tasks_and_leaves_a_model_with_pictures(whole: Path) -> None:
    made = recipe(*PICTURES)
    records = [record for record in metrics(whole) if record["split"] == "train"]
    stage = stage_of(made, whole)
    assert {stage.task(step) for step in range(8)} == {"text", "draw", "describe"}
    for record in records:
        task = stage.task(record["step"] - 1)
        assert [name for name in BY_TASK.values() if name in record] == [BY_TASK[task]]
    (first, *_) = [record for record in metrics(whole) if record["split"] == "validation"]
    assert {*BY_TASK.values(), "caption_flow"} <= first.keys()
    model = load_cola(whole / "model")
    assert model.dit.config.img_grid == [4, 4]
    assert model.image is not None
    pictures = [open_source("shapes:one,grid").pair(number).picture for number in range(60)]
    expected = fit([np.stack(pictures)], model.image.config)
    assert isinstance(model.image, PatchPCA)
    torch.testing.assert_close(model.image.state_dict(), expected.state_dict())


def test_drawings_through_training_are_kept_judged_and_shown(whole: Path) -> None:
    sheets = sorted((whole / "drawings").iterdir())
    assert [sheet.name for sheet in sheets] == [f"pictures-0000000{step}.png" for step in (3, 6, 8)]
    assert Image.open(sheets[0]).size == (3 * (8 * 32 + 7 * 2), 3 * (2 * 32 + 2))
    said = [one for one in read_samples(whole / "samples.jsonl") if one["title"].startswith("drawing ")]
    assert len(said) == 3 * 16
    assert said[0]["title"] == f"drawing 1: {open_pairs(recipe(*PICTURES)).validation.pair(0).caption}"  # type: ignore[union-attr]
    assert all(one["text"] for one in said)  # What is wrong with it, most likely.
    page = write_report(whole).read_text()
    assert page.count("data:image/png;base64,") == len(sheets)
    assert "pictures, step 8" in page


def test_tasks_have_their_shares_and_are_the_same_for_all_rows_of_a_step(stage: PicturesStage) -> None:
    tasks = [stage.task(step) for step in range(2000)]
    for task, share in stage.section.tasks.items():
        assert tasks.count(task) / len(tasks) == pytest.approx(share, abs=0.04)
    for step in range(6):
        drawn = [stage.draw([step * 4 + row]) for row in range(4)]
        for one in drawn:
            assert [task for task in BY_TASK if getattr(one, task) is not None] == [tasks[step]]
    validated = stage.draw([VALIDATION_ROW, VALIDATION_ROW + 1])
    assert all(getattr(validated, task) is not None for task in BY_TASK)


def test_draws_of_a_row_do_not_depend_on_its_batch(stage: PicturesStage) -> None:
    rows = range(VALIDATION_ROW, VALIDATION_ROW + 3)
    together, alone = stage.draw(rows), [stage.draw([row]) for row in rows]
    for task in ("draw", "describe"):
        for number, one in enumerate(alone):
            pairs, own = getattr(together, task), getattr(one, task)
            for name in ("pictures", "lengths", "picture_noise", "picture_timestep", "alone"):
                if getattr(own, name) is not None:
                    assert torch.equal(getattr(pairs, name)[number], getattr(own, name)[0])
            length = own.noise.shape[2]
            assert torch.equal(pairs.noise[number, :, :length], own.noise[0])
            assert torch.equal(pairs.text[number, :, : own.text.shape[2]], own.text[0])


@torch.no_grad()
@pytest.mark.parametrize("task", ["draw", "describe"])
def test_a_loss_is_the_mean_of_pairs_one_by_one(stage: PicturesStage, task: str) -> None:
    drawn = stage.draw(range(VALIDATION_ROW, VALIDATION_ROW + 2))
    noise = TaskNoise(**{task: getattr(drawn, task)})
    rows = Batch(torch.zeros(2, 16, dtype=torch.int64))
    counts = stage.count(rows, noise)
    loss = stage.loss(stage.networks, rows, noise, counts, 0)
    pairs = getattr(noise, task)
    totals = []
    for row in range(2):
        for pair in range(2):
            one = pairs.map(lambda x, row=row, pair=pair: x[row : row + 1, pair : pair + 1])
            own = TaskNoise(**{task: one})
            totals.append(
                float(stage.loss(stage.networks, rows.rows(0, 1), own, Counts(1, 1, 1, 1, 1, 1), 0).total)
            )
    lengths = pairs.lengths.flatten().tolist()
    if task == "describe":
        assert float(loss.total) == pytest.approx(sum(totals) / sum(lengths), rel=1e-5)
        return
    # Captions and pictures are means of their own: weights of the sums, one solved for the other.
    pictures, captions = loss.terms["picture_flow"], loss.terms["caption_flow"]
    weight = (pairs.picture_timestep / T).clamp_min(MIN_A)
    assert counts == Counts(0, 0, 0, pictures=4 * 16, captions=sum(lengths))
    assert weight.min() > 0
    assert float(loss.total) == pytest.approx(
        float(pictures + captions), rel=1e-5
    )  # In velocity: as they are.


def test_micro_batches_change_no_gradient(stage: PicturesStage) -> None:
    rows = Batch(torch.zeros(2, 16, dtype=torch.int64))
    drawn = stage.draw(range(VALIDATION_ROW, VALIDATION_ROW + 2))
    noise = TaskNoise(draw=drawn.draw, describe=drawn.describe)
    counts, gradients = stage.count(rows, noise), []
    for parts in ([(0, 2)], [(0, 1), (1, 2)]):
        stage.networks.zero_grad()
        for begin, end in parts:
            stage.loss(
                stage.networks, rows.rows(begin, end), noise.rows(begin, end), counts, 0
            ).total.backward()
        gradients.append([parameter.grad.clone() for parameter in stage.networks.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_steps_of_text_give_pictures_the_gradient_nothing(stage: PicturesStage) -> None:
    rows = Batch(torch.randint(4, 200, (2, 16), generator=torch.Generator().manual_seed(0)))
    noise = TaskNoise(text=stage.draw(range(VALIDATION_ROW, VALIDATION_ROW + 2)).text)
    stage.networks.zero_grad()
    stage.loss(stage.networks, rows, noise, stage.count(rows, noise), 0).total.backward()
    for name, parameter in stage.networks.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad == 0).all()) == (".img_" in name), name


@pytest.mark.parametrize("step", [3, 6])
def test_a_resumed_run_ends_in_the_same_bits(whole: Path, tmp_path: Path, step: int) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path / "run", display=At("pictures", step))
    run(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)
    assert logged(tmp_path / "run") == logged(whole)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of text alone."""
    out = tmp_path_factory.mktemp("text")
    Trainer(recipe("stages.vae.steps=1", "stages.prior.steps=2", "stages.prior.warmup=0"), out).run()
    return out / "model"


def test_other_pictures_are_no_continuation(whole: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "data", tmp_path / "run"
    folder.mkdir()

    def write(caption: str) -> None:
        for number in range(4):
            (folder / f"{number}.png").write_bytes(png(Scenes("").pair(number).picture))
        (folder / "captions.tsv").write_text("".join(f"{n}.png\t{caption} {n}\n" for n in range(4)))

    source = f"data.pictures=[{{path: {folder}}}]"
    write("a thing")
    with pytest.raises(Interrupted):
        run(out, source, "model.image={channels: 2}", display=At("pictures", 2))
    write("no thing")
    forget_opened()
    with pytest.raises(ColadaError, match=r"the training set of pictures .* is not what .* was trained on"):
        run(out, source, "model.image={channels: 2}")


def test_a_run_says_how_many_texts_of_a_source_lose_their_end(whole: Path, tmp_path: Path) -> None:
    folder, tokenizer = tmp_path / "data", Tokenizer.from_file(whole / "tokenizer.json")
    folder.mkdir()
    captions = ["a dog", "a dog and a cat and a cow", "a dog and a cat and a cow and a hen and a pig"]
    for number in range(9):
        (folder / f"{number}.png").write_bytes(png(Scenes("").pair(number).picture))
    lines = [f"{n}.png\t{captions[min(n, 2)]}\n" for n in range(9)]
    (folder / "captions.tsv").write_text("".join(lines))
    most = len(tokenizer.encode(captions[1]))  # It is just short enough, but not with an answer's end.
    assert len(tokenizer.encode(captions[0])) < most < len(tokenizer.encode(captions[2]))
    sources = f"data.pictures=[{{path: 'shapes:two'}}, {{path: {folder}}}]"
    made = [f"tokenizer.file={whole / 'tokenizer.json'}", "data.validation_share=0", sources]

    def said(*overrides: str) -> list[str]:
        file = io.StringIO()
        Trainer(
            recipe(*PICTURES, *made, *overrides), tmp_path / "run", Display(Console(file=file, width=200))
        )
        shutil.rmtree(tmp_path / "run")
        return [line.rstrip() for line in file.getvalue().splitlines() if "lose their end" in line]

    scenes = [open_source("shapes:two").pair(number) for number in range(LOOKED_AT)]
    cut = [
        sum(len(tokenizer.encode(getattr(scene, name))) > most - less for scene in scenes)
        for name, less in (("caption", 0), ("answer", 1))
    ]
    end = f" lose their end: stages.pictures.caption_length={most} tokens"
    assert said(f"stages.pictures.caption_length={most}") == [
        f"shapes:two: {cut[0]:,} captions and {cut[1]:,} answers of the first {LOOKED_AT:,}{end}",
        f"{folder}: 7 captions and 8 answers of 9{end}",
    ]
    of_one = said(f"stages.pictures.caption_length={most}", "stages.pictures.tasks={describe: 1}")
    assert of_one[1] == f"{folder}: 8 answers of 9{end}"
    assert said("stages.pictures.caption_length=200") == []


def test_a_checkpoint_is_exported_with_its_codec(whole: Path, tmp_path: Path) -> None:
    said = export(whole / "checkpoints" / "pictures-00000008", tmp_path / "model")
    assert said == "stage pictures, step 8"
    for file in sorted((whole / "model").rglob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "model" / file.relative_to(whole / "model")).read_bytes()


def test_a_model_of_text_learns_pictures_and_one_of_pictures_goes_on(text: Path, tmp_path: Path) -> None:
    start = ["model.vae={}", "model.dit={}", f"model.init={text}"]
    narrow = run(
        tmp_path / "narrow", *start, "model.image={patch: 4, channels: 6}", "stages.pictures.steps=1"
    )
    model = load_cola(narrow / "model")
    assert (model.dit.config.img_channels, model.dit.config.img_grid) == (6, [8, 8])
    start[-1] = f"model.init={narrow / 'model'}"
    plan_run(recipe(*PICTURES, *start, "stages.pictures.train=lora"))
    again = run(tmp_path / "again", *start, "stages.pictures.steps=2", "stages.pictures.tasks={draw: 1}")
    after = load_cola(again / "model")
    assert after.image is not None
    assert model.image is not None
    torch.testing.assert_close(after.image.state_dict(), model.image.state_dict(), rtol=0, atol=0)


def run_with_vae(out: Path, display: Display | None = None) -> Path:
    """A codec's stage, then one that learns pictures by it."""
    size = "batch: 4, pairs: 2, length: 16, warmup: 1, ema: 0.9"
    stages = f"picture_vae: {{steps: 8, {size}, lr: 2.0e-3}}, pictures: {{steps: 3, {size}}}"
    other = [one for one in TINY if not one.startswith("stages.")]
    made = [f"stages={{{stages}}}", *other, *PICTURES[:2], "model.image={kind: conv_vae, width: 8}"]
    Trainer(load_recipe(DEBUG, made), out, display).run()
    return out


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose codec is learnt."""
    return run_with_vae(tmp_path_factory.mktemp("coded") / "run")


def test_a_picture_vae_is_trained_and_its_latents_have_the_size_of_noise(coded: Path) -> None:
    model = load_cola(coded / "model")
    pairs = open_pairs(recipe(*PICTURES))
    assert pairs is not None
    assert model.image is not None
    pictures = torch.from_numpy(np.stack([pair.picture for pair in pairs.training.pairs(1024)]))
    with torch.no_grad():
        latents = model.image.encode(pictures)
    assert float(latents.mean()) == pytest.approx(0, abs=1e-3)
    assert float(latents.square().mean()) == pytest.approx(1, rel=1e-3)
    losses = [r["error"] for r in metrics(coded) if r["stage"] == "picture_vae" and r["split"] == "train"]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(("stage", "step"), [("picture_vae", 3), ("pictures", 1)])
def test_a_run_whose_codec_is_learnt_resumes_in_the_same_bits(
    coded: Path, tmp_path: Path, stage: str, step: int
) -> None:
    with pytest.raises(Interrupted):
        run_with_vae(tmp_path / "run", At(stage, step))
    forget_opened()
    run_with_vae(tmp_path / "run")
    assert_same_run(tmp_path / "run", coded)
    assert logged(tmp_path / "run") == logged(coded)


# --- what it costs -----------------------------------------------------------------------------


@pytest.mark.parametrize("dual", [0, 1])
@pytest.mark.parametrize("task", ["draw", "describe"])
def test_flops_of_a_task_are_those_that_run(whole: Path, task: str, dual: int) -> None:
    made = recipe(*PICTURES, f"stages.pictures.dual_layers={dual}")
    stage, describes = stage_of(made, whole), task == "describe"
    rows = Batch(torch.zeros(2, 16, dtype=torch.int64))
    pairs = getattr(stage.draw(range(VALIDATION_ROW, VALIDATION_ROW + 2)), task)
    # Texts of the nominal length, all with timesteps of their own.
    length = -(-(ANSWER if describes else CAPTION) // 4) * 4
    times = torch.rand(2, 2, length // 4, generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 2)
    text = {"text": torch.full((2, 2, length), 5), "lengths": torch.full((2, 2), length)}
    text |= {"noise": torch.zeros(2, 2, length, stage.vae.config.latent_dim), "timestep": 900 * times}
    if describes:
        text |= {"prompts": torch.full((2, 2, PROMPT), 5), "prompt_lengths": torch.full((2, 2), PROMPT)}
    noise = TaskNoise(**{task: replace(pairs, **text)})
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stage.loss(stage.networks, rows, noise, stage.count(rows, noise), 0).total.backward()
    phase = plan_run(made).phases[list(BY_TASK).index(task)]
    dit, vae = stage.system.networks["dit"], stage.vae.config
    assert isinstance(dit, DiT)
    assert phase.work["task"] == f"pictures, {task}"
    rows_of = 4
    assert phase.work["rows"] == 2 * rows_of
    # Clean: a caption; or a prompt, a picture, and all blocks of an answer but its last one.
    clean, noisy = (PROMPT + 16 + length - 4, length) if describes else (length, length + 16)
    config, cells, last = dit.config, clean + noisy, dit.blocks[-1]
    width = config.heads * config.head_dim
    # What runs beside is computed for nobody: pairs that cannot be seen,
    attention = (config.num_layers - 1) * cells**2 + noisy * cells
    dense = 3 * 4 * rows_of * width * (attention - config.num_layers * phase.work["pairs"])
    dense += rows_of * 4 * vae.dim * vae.encoder_num_blocks * (length**2 - block_causal_pairs(length // 4, 4))
    # pictures through the text's input and, where they are learnt, its output;
    both = 2 * rows_of * 16 * 2 * matrix_entries(dit.img_in)
    both += 2 * rows_of * 16 * 3 * matrix_entries(dit.img_out) * (not describes)
    # what does not: clean cells after the last layer's keys, and gradients of what is given.
    after = matrix_entries(last.msa.proj_out) + matrix_entries(last.mlp) + matrix_entries(dit.txt_out)
    skipped = 3 * 2 * rows_of * clean * after + 2 * rows_of * cells * matrix_entries(dit.txt_in)
    timesteps = rows_of * (length // 4 + (not describes)) + 1
    skipped += 2 * timesteps * matrix_entries(dit.emb_in.proj_in)
    # The timestep of clean cells is counted once a step, not once a half.
    once = 3 * adaln_entries(dit, pictures=True)
    expected = sum(phase.flops.values()) / 2 + dense + both - skipped + once
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "image",
    [
        CodecConfig(size=16, patch=4, channels=5),
        CodecConfig(kind="conv_vae", size=16, patch=4, channels=5, width=8),
        CodecConfig(kind="conv_vae", size=32, patch=16, channels=3, width=16),
    ],
    ids=["patch_pca", "conv_vae", "conv_vae of five resolutions"],
)
def test_flops_of_a_codec_are_those_that_run(image: CodecConfig) -> None:
    codec = new_codec(image)
    pictures = torch.zeros(3, image.size, image.size, 3, dtype=torch.uint8)
    with FlopCounterMode(display=False) as encoding:
        latents = codec.encode(pictures)
    with FlopCounterMode(display=False) as decoding:
        codec.decode(latents)
    counted = [counter.get_total_flops() for counter in (encoding, decoding)]
    assert counted == [3 * flops for flops in _codec_flops(image)]
    if not isinstance(codec, ConvVAE):
        return
    section = PictureVAESection(steps=7, batch=3, pairs=1, length=16)
    phase = codec_phase("picture_vae", section, image, Placement(3))
    with FlopCounterMode(display=False) as learning:
        codec.loss(pictures / 255, torch.randn(3, image.latents, image.channels))[0].backward()
    # Pixels need no gradient.
    given = 3 * 2 * codec.encoder[0].weight.numel() * image.size**2
    assert learning.get_total_flops() == sum(phase.flops.values()) - given


def test_a_plan_names_tasks_and_counts_all_parameters() -> None:
    plan = plan_run(recipe(*PICTURES, "stages.pictures.dual_layers=1"))
    assert [phase.name for phase in plan.phases] == ["pictures, text", "pictures, draw", "pictures, describe"]
    assert [phase.steps for phase in plan.phases] == [2, 3, 3]
    assert all(min(phase.flops.values()) > 0 for phase in plan.phases)
    text = plan_run(recipe()).cost.parameters["DiT"]
    assert plan.cost.parameters["DiT"] > text


def test_pictures_are_learnt_beside_a_text_that_stays_to_the_bit(text: Path, tmp_path: Path) -> None:
    start = ["model.vae={}", "model.dit={}", f"model.init={text}", "stages.pictures.steps=4"]
    dual = [*start, "stages.pictures.train=pictures", "stages.pictures.dual_layers=1"]
    apart = [*dual, "stages.pictures.tasks={draw: 1, describe: 1}", "stages.pictures.optimiser=muon"]
    whole_run = run(tmp_path / "whole", *apart)
    with pytest.raises(Interrupted):
        run(tmp_path / "run", *apart, display=At("pictures", 2))
    run(tmp_path / "run", *apart)
    assert_same_run(tmp_path / "run", whole_run)
    records = metrics(whole_run)
    assert all("caption_flow" not in record for record in records)
    assert {"picture_flow", "answer_flow"} <= set().union(*records)
    before, after = load_cola(text), load_cola(whole_run / "model")
    state, first = after.dit.state_dict(), before.dit.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in first.items())
    for name, tensor in state.items():  # Of pictures, all that has a gradient has moved.
        assert name in first or name.endswith("qkv.bias") or bool(tensor.any()), name
    assert not torch.equal(state["blocks.0.image.mlp.proj_in.weight"], first["blocks.0.mlp.proj_in.weight"])
    written = [model.generate(["Once"], 8, seed=1, steps=2)[0].tokens for model in (before, after)]
    assert written[0] == written[1]
    memory_all, memory_pictures = (
        plan_run(recipe(*PICTURES, *made)).phases[-1].memory
        for made in ([*apart, "stages.pictures.train=all"], apart)
    )
    assert memory_pictures["gradients"] < memory_all["gradients"]
    assert memory_pictures["optimiser"] < memory_all["optimiser"]
    with pytest.raises(ColadaError, match="train='pictures' with steps of text, expected no share"):
        recipe(*PICTURES, *dual)


def test_captions_without_weight_are_not_computed(stage: PicturesStage, whole: Path) -> None:
    without = stage_of(recipe(*PICTURES, "stages.pictures.caption_weight=0"), whole)
    rows, counts = range(VALIDATION_ROW, VALIDATION_ROW + 2), []
    for each in (stage, without):
        pairs = each.draw(rows).draw
        assert pairs is not None
        assert (pairs.noise is None) == (each is without)
        counts.append(each.count(Batch(torch.zeros(2, 16, dtype=torch.int64)), TaskNoise(draw=pairs)))
    assert counts[0].captions > counts[1].captions == 0
    assert counts[0].pictures == counts[1].pictures


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.pictures=[]"], "stages.pictures learns pictures, expected some in data.pictures"),
        (["data.pictures=[{path: 'shapes:onne'}]"], "'onne' \\(did you mean 'one'"),
        (["data.pictures=[{path: /nowhere}]"], "/nowhere"),
        (["data.pictures=[{pth: x}]"], "data.pictures.0.path=.*: field required"),
        (["stages.pictures.tasks={draw: 0}"], "expected a share above 0"),
        (["stages.pictures.tasks={paint: 1}"], "tasks"),
        (["model.image={channels: 99}"], "model.image.channels=99, expected at most 8"),
        (["model.image={patch: 5}"], "patch=5, expected a divisor of size=32"),
        (["model.image={size: big}"], "size='big'"),
        (["stages.picture_vae={}"], "stages.picture_vae with model.image.kind='patch_pca'"),
        (
            ["stages.picture_vae={}", "model.image={kind: conv_vae, width: 8}"],
            "stages.picture_vae is the last of pictures, expected one of kind 'pictures' after it",
        ),
        (["stages.pictures.dual_layers=9"], "dual_layers=9"),
        (
            ["stages.pictures.train=lora"],
            "stages.pictures.train='lora', but the DiT has not learnt pictures before: new layers would stay",
        ),
    ],
)
def test_what_a_run_with_pictures_is_refused_for(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ColadaError, match=message) as raised:
        Trainer(recipe(*PICTURES, *overrides), tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()
