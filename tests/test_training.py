import errno
import itertools
import json
import math
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import colada
import make_stories
from colada.errors import ColadaError
from colada.tokenizer import Tokenizer
from colada.training import trainer as trainer_module
from colada.training.display import Display
from colada.training.recipe import (
    OptimiserSection,
    Recipe,
    Stage1Section,
    difference,
    load_recipe,
    save_recipe,
)
from colada.training.trainer import (
    Interrupted,
    Trainer,
    average_weights,
    learning_rate,
    make_optimisers,
    step_generator,
)

ROOT = Path(__file__).resolve().parents[1]
DEBUG = ROOT / "recipes" / "debug.yaml"
STORIES = make_stories.STORIES.parent

# Both stages in a fraction of a second.
TINY = [
    f"data.path={STORIES}",
    "tokenizer.vocab_size=300",
    "model.vae.dim=16",
    "model.vae.ffn_dim=16",
    "model.vae.num_heads=2",
    "model.dit.txt_dim=16",
    "model.dit.emb_dim=16",
    "model.dit.head_dim=8",
    "model.dit.rope_dim=8",
    "model.dit.num_layers=1",
    *(f"{stage}.{setting}" for stage in ("stage1", "stage2") for setting in ("steps=6", "batch=3")),
    *(f"{stage}.{setting}" for stage in ("stage1", "stage2") for setting in ("length=16", "warmup=2")),
    "stage2.prefix_share=0.2",
    "run.log_every=1",
    "run.validate_every=3",
    "run.validation_rows=4",
    "run.save_every=2",
    "run.sample_every=3",
    "run.sample_tokens=5",
    "generation.steps=2",
]
JOINT = ["stage2.vae=joint", "stage2.vae_lr=0.1", "stage1.ema=0.9", "stage2.ema=0.95"]
VARIANTS = {
    "frozen": ["stage2.ema=0"],
    "joint": JOINT,
    "muon": [*JOINT, "stage1.optimiser=muon", "stage2.optimiser=muon"],
}


def recipe(*overrides: str) -> Recipe:
    return load_recipe(DEBUG, [*TINY, *overrides])


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class At(Display):
    """A display that acts after one step of a stage."""

    def __init__(self, stage: int, step: int) -> None:
        super().__init__()
        self.where, self.number = (stage, step), 0

    @contextmanager
    def stage(self, number: int, steps: int, start: int) -> Iterator[None]:
        self.number = number
        with super().stage(number, steps, start):
            yield

    def update(self, step: int, terms: Mapping[str, float]) -> None:
        super().update(step, terms)
        if (self.number, step) == self.where:
            self.act()

    def act(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


class CrashAt(At):
    def act(self) -> None:
        raise ZeroDivisionError("the machine was switched off")


# --- the corpus and the recipes -----------------------------------------------------------------


def test_the_corpus_is_what_its_script_writes() -> None:
    text = make_stories.STORIES.read_text(encoding="utf-8")
    assert text == make_stories.corpus()
    assert len(text.encode()) < 150_000


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_reads_back_the_same(path: Path, tmp_path: Path) -> None:
    loaded = load_recipe(path)
    save_recipe(loaded, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == loaded
    loaded.configs(loaded.tokenizer.vocab_size, 1)


def test_overrides_are_yaml_values(tmp_path: Path) -> None:
    made = load_recipe(DEBUG, ["stage1.lr=1e-3", "stage2.loc=null", "run.sample_prompts=[a, b]", "seed=7"])
    assert (made.stage1.lr, made.stage2.loc, made.run.sample_prompts, made.seed) == (
        0.001,
        None,
        ["a", "b"],
        7,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage1:\n  stpes: 3\n", r"unknown key 'stage1.stpes' \(did you mean 'steps'\?\)"),
        ("stag1:\n  steps: 3\n", r"unknown key 'stag1' \(did you mean 'stage1'\?\)"),
        ("stage1:\n  steps: many\n", r"stage1.steps='many'.*integer"),
        ("stage1:\n  steps: 2.5\n", r"stage1.steps=2.5.*integer"),
        ("stage2:\n  vae: thawed\n", r"stage2.vae='thawed'.*'frozen' or 'joint'"),
        ("stage1:\n  lr: -1\n", r"stage1.lr=-1.*greater than 0"),
        ("stage1:\n  betas: [0.9]\n", r"stage1.betas"),
        ("stage1: 3\n", r"stage1=3"),
        ("run:\n  log_every: 0\n", r"run.log_every=0"),
        ("stage1: [1, 2\n", r"not valid YAML"),
        ("a: b: c\n", r"not valid YAML"),
        ("\t- x\n", r"not valid YAML"),
        ("- stage1\n", r"holds a list"),
        ("just words\n", r"holds a str"),
    ],
)
def test_a_bad_recipe_is_refused_in_one_line_that_names_file_and_key(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ColadaError, match=message) as caught:
        load_recipe(path)
    assert "own.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ColadaError, match=r"absent\.yaml.*No such file"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"seed: \xff\n")
    with pytest.raises(ColadaError, match=r"latin\.yaml"):
        load_recipe(tmp_path / "latin.yaml")


@pytest.mark.parametrize("override", ["stage1.steps", "seed.x=1", "stage1.steps=[1", "stage1.stepz=1"])
def test_a_bad_override_is_refused(override: str) -> None:
    with pytest.raises(ColadaError) as caught:
        load_recipe(DEBUG, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.vae.dims=3"], r"model.vae.*'dims'.*did you mean 'dim'"),
        (["model.dit.rope_dim=7"], r"model.dit.*rope_dim=7"),
        (["model.dit.block_size=2"], r"block_size=2"),
        (["stage1.length=18"], r"stage1.length=18.*multiple.*4"),
        (["stage2.length=2"], r"stage2.length=2"),
        (["model.vae.vocab_size=17"], r"vocab_size"),
        (["tokenizer.vocab_size=9000"], r"9000"),
        (["run.device=gpu"], r"run.device='gpu'"),
        (["generation.stepz=4"], r"'stepz'.*did you mean 'steps'"),
        (["data.include=[nothing.txt]"], r"nothing.txt"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_trained(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ColadaError, match=message):
        Trainer(recipe(*overrides), tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


# --- formulas -----------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_follows_half_a_cosine() -> None:
    section = OptimiserSection(steps=12, warmup=4, final_lr=0.1)
    made = [learning_rate(step, section) for step in range(15)]
    quarter = 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2
    assert made[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert made[6] == pytest.approx(quarter)
    assert made[8] == pytest.approx(0.55)
    assert made[10] == pytest.approx(1.1 - quarter)
    assert made[12:] == pytest.approx([0.1] * 3)
    assert all(a > b for a, b in itertools.pairwise(made[4:13]))
    assert learning_rate(0, OptimiserSection(steps=5, warmup=0)) == 1.0


@pytest.mark.parametrize("variant", ["frozen", "joint"])
def test_every_step_uses_its_own_learning_rate(tmp_path: Path, variant: str) -> None:
    made = recipe(*VARIANTS[variant], "run.sample_every=0")
    used: list[list[float]] = []
    hook = register_optimizer_step_pre_hook(
        lambda optimiser, *_: used.append([group["lr"] for group in optimiser.param_groups])
    )
    try:
        Trainer(made, tmp_path).run()
    finally:
        hook.remove()
    first = [[made.stage1.lr * learning_rate(k, made.stage1)] * 2 for k in range(6)]
    second = []
    for k in range(6):
        rate = made.stage2.lr * learning_rate(k, made.stage2)
        second.append([rate] * 2)
        if variant == "joint":
            second.append([0.1 * rate] * 2)
    assert [x for rates in used for x in rates] == pytest.approx([x for r in first + second for x in r])


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_every_parameter_has_one_optimiser_and_vectors_are_not_decayed(
    tmp_path: Path, optimiser: str
) -> None:
    made = Trainer(recipe(), tmp_path)
    section = Stage1Section(optimiser=optimiser, weight_decay=0.3)
    for network in (made.vae, made.dit):
        groups = [g for opt in make_optimisers(network, section, 0.1) for g in opt.param_groups]
        held = [parameter for group in groups for parameter in group["params"]]
        assert len(held) == len({id(p) for p in held})
        assert {id(p) for p in held} == {id(p) for p in network.parameters()}
        for group in groups:
            for parameter in group["params"]:
                assert group["weight_decay"] == (0.3 if parameter.ndim > 1 else 0.0)


def test_averaged_weights_follow_their_recursion() -> None:
    network = nn.Linear(1, 1, bias=False)
    average = average_weights(network, 0.4)
    expected = None
    for n, weight in enumerate([1.0, -2.0, 5.0, 0.5, 3.0, 8.0, -1.0]):
        network.weight.data.fill_(weight)
        average.update_parameters(network)
        # The first weights are taken over, then the decay is 2/11, 3/12, 4/13, ... up to 0.4.
        decay = min(0.4, (1 + n) / (10 + n))
        expected = weight if expected is None else decay * expected + (1 - decay) * weight
        assert float(average.module.weight.detach()) == pytest.approx(expected, rel=1e-5)


def test_each_step_of_each_stage_has_its_own_noise() -> None:
    draws = {
        (seed, stage, step): float(torch.randn((), generator=step_generator(seed, stage, step)))
        for seed in range(3)
        for stage in (1, 2)
        for step in range(20)
    }
    assert len(set(draws.values())) == len(draws)
    assert float(torch.randn((), generator=step_generator(2, 1, 7))) == draws[2, 1, 7]


def test_an_unset_loc_follows_the_latent_width() -> None:
    assert recipe("stage2.loc=null").flow_settings(64).law.loc == pytest.approx(1 + 0.5 * math.log(4))
    assert recipe("stage2.loc=1.5").flow_settings(64).law.loc == 1.5
    assert recipe("stage2.timestep_per=row").flow_settings(16).per_block is False


# --- the whole debug recipe ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def debug_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of recipes/debug.yaml as it stands, started from the repository root."""
    out = tmp_path_factory.mktemp("debug") / "run"
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        Trainer(load_recipe(DEBUG), out).run()
    finally:
        os.chdir(before)
    return out


def validation(out: Path, stage: int, term: str) -> list[float]:
    return [
        record[term] for record in metrics(out) if (record["stage"], record["split"]) == (stage, "validation")
    ]


@pytest.mark.slow
def test_the_debug_recipe_learns_to_reconstruct(debug_run: Path) -> None:
    assert validation(debug_run, 1, "accuracy")[-1] > 0.9
    losses = validation(debug_run, 1, "nll")
    assert losses[-1] < 0.2
    trained = [record["nll"] for record in metrics(debug_run) if record["stage"] == 1 and "nll" in record]
    assert trained[-1] < 0.1 * trained[0]
    # The same through the saved model, on stories it has not seen.
    model = colada.load(debug_run / "model")
    unseen = "Cleo had a green hat, and now it was gone. Snow lay on the roof."
    assert model.reconstruct(unseen).accuracy > 0.9


@pytest.mark.slow
def test_the_debug_recipe_learns_the_prior(debug_run: Path) -> None:
    losses = validation(debug_run, 2, "flow")
    assert losses[-1] < losses[0]
    model = colada.load(debug_run / "model")
    stories = make_stories.STORIES.read_text().split(make_stories.SEPARATOR)[:40]
    latents = torch.cat([model.encode(story) for story in stories])
    # Predicting zero costs E(z1 - z0)^2 = 1 + E z0^2, of which the posterior's variance is left out here.
    zero = 1 + float(latents.square().mean())
    assert losses[-1] < 0.7 * zero
    # The best that can be done knowing only that latents have mean 0 and variance 1, over the timesteps' law.
    grid = torch.special.ndtri((torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000)
    a = torch.sigmoid(1 + grid)
    assert losses[-1] < 0.85 * float((1 / ((1 - a) ** 2 + a**2)).mean())


@pytest.mark.slow
def test_the_debug_recipes_model_generates(debug_run: Path) -> None:
    model = colada.load(debug_run / "model")
    assert model.generation == {"steps": 8, "guidance": 2.0}
    one, other = model.generate(["One morning", ""], 40, seed=1)
    assert one.text
    assert len(set(other.tokens)) > 5
    assert (debug_run / "samples.txt").read_text().count("--- step") == 2


@pytest.mark.slow
def test_running_a_finished_run_again_changes_nothing(
    debug_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (debug_run / "metrics.jsonl").read_bytes()
    old = colada.load(debug_run / "model")
    monkeypatch.chdir(ROOT)
    new = Trainer(load_recipe(DEBUG), debug_run).run()
    assert (debug_run / "metrics.jsonl").read_bytes() == before
    assert same(old.dit.state_dict(), new.dit.state_dict())
    assert same(old.vae.state_dict(), new.vae.state_dict())


# --- resuming -----------------------------------------------------------------------------------


def same(one: Any, other: Any) -> bool:
    """Whether two nested structures of tensors agree bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def final_state(out: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(out / "checkpoint.pt", weights_only=True)
    return state


def logged(out: Path) -> list[dict[str, Any]]:
    """What a run logged, without the clock."""
    return [
        {key: value for key, value in record.items() if key not in ("time", "tokens_per_s")}
        for record in metrics(out)
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    runs = {}
    for variant, overrides in VARIANTS.items():
        runs[variant] = tmp_path_factory.mktemp("runs") / variant
        Trainer(recipe(*overrides), runs[variant]).run()
    return runs


def assert_same_run(out: Path, other: Path) -> None:
    assert same(final_state(out), final_state(other))
    ours, theirs = colada.load(out / "model"), colada.load(other / "model")
    assert same(ours.vae.state_dict(), theirs.vae.state_dict())
    assert same(ours.dit.state_dict(), theirs.dit.state_dict())


@pytest.mark.parametrize(
    ("variant", "stage", "step"),
    [
        ("frozen", 1, 3),
        ("frozen", 1, 6),
        ("frozen", 2, 1),
        ("frozen", 2, 5),
        ("joint", 1, 3),
        ("joint", 1, 6),
        ("joint", 2, 3),
        ("joint", 2, 6),
        ("muon", 1, 1),
        ("muon", 2, 3),
    ],
)
def test_a_run_that_is_stopped_and_resumed_equals_one_that_was_not(
    tmp_path: Path, uninterrupted: dict[str, Path], variant: str, stage: int, step: int
) -> None:
    made = recipe(*VARIANTS[variant])
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=rf"stage {stage}, step {step}"):
        Trainer(made, tmp_path, At(stage, step)).run()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    state = final_state(tmp_path)
    assert (state["stage"], state["step"]) == (stage, step)
    assert not (tmp_path / "model").exists()
    Trainer(made, tmp_path).run()
    assert_same_run(tmp_path, uninterrupted[variant])
    assert logged(tmp_path) == logged(uninterrupted[variant])
    samples = (path / "samples.txt" for path in (tmp_path, uninterrupted[variant]))
    assert len({sample.read_text() for sample in samples}) == 1


@pytest.mark.parametrize(("variant", "stage", "step"), [("frozen", 1, 5), ("joint", 2, 1), ("joint", 2, 5)])
def test_a_run_that_crashed_goes_on_from_its_last_checkpoint(
    tmp_path: Path, uninterrupted: dict[str, Path], variant: str, stage: int, step: int
) -> None:
    made = recipe(*VARIANTS[variant])
    with pytest.raises(ZeroDivisionError):
        Trainer(made, tmp_path, CrashAt(stage, step)).run()
    Trainer(made, tmp_path).run()
    assert_same_run(tmp_path, uninterrupted[variant])


def test_the_variants_are_different_runs(uninterrupted: dict[str, Path]) -> None:
    models = [colada.load(out / "model") for out in uninterrupted.values()]
    for one, other in itertools.combinations(models, 2):
        assert not same(one.dit.state_dict(), other.dit.state_dict())
        assert not same(one.vae.state_dict(), other.vae.state_dict())


def test_a_frozen_vae_stays_that_of_stage_1_and_a_joint_one_moves(
    tmp_path: Path, uninterrupted: dict[str, Path]
) -> None:
    for variant in ("frozen", "joint"):
        out = tmp_path / variant
        Trainer(recipe(*VARIANTS[variant], "stage2.steps=0"), out).run()
        stage1 = colada.load(out / "model").vae.state_dict()
        after = colada.load(uninterrupted[variant] / "model").vae.state_dict()
        assert same(stage1, after) == (variant == "frozen")
        if variant == "joint":
            assert same(final_state(uninterrupted[variant])["reference"], stage1)


def test_another_recipe_in_the_same_directory_is_refused(
    tmp_path: Path, uninterrupted: dict[str, Path]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(uninterrupted["frozen"], out)
    before = (out / "recipe.yaml").read_bytes()
    with pytest.raises(ColadaError, match=r"stage2\.lr was 0\.008 and is now 0\.5"):
        Trainer(recipe(*VARIANTS["frozen"], "stage2.lr=0.5"), out)
    with pytest.raises(ColadaError, match=r"seed was 0 and is now 1"):
        Trainer(recipe(*VARIANTS["frozen"], "seed=1"), out)
    assert (out / "recipe.yaml").read_bytes() == before
    # What is only shown or saved more often is the same run.
    assert difference(recipe(), recipe("run.log_every=5", "generation.guidance=3")) is None
    Trainer(recipe(*VARIANTS["frozen"], "run.log_every=5"), out)


def test_a_directory_without_a_checkpoint_takes_the_recipe_it_is_given(tmp_path: Path) -> None:
    # A first try that stopped before its first checkpoint leaves a tokenizer behind.
    Trainer(recipe("tokenizer.vocab_size=280"), tmp_path)
    assert Trainer(recipe("tokenizer.vocab_size=300"), tmp_path).tokenizer.vocab_size == 300


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    made = recipe("stage2.steps=0")
    Trainer(made, tmp_path).run()
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ColadaError, match=r"checkpoint\.pt"):
        Trainer(made, tmp_path).run()


# --- logs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["frozen", "joint"])
def test_metrics_are_one_json_object_a_line(uninterrupted: dict[str, Path], variant: str) -> None:
    records = metrics(uninterrupted[variant])
    train = [(r["stage"], r["step"]) for r in records if r["split"] == "train"]
    assert train == [(stage, step) for stage in (1, 2) for step in range(1, 7)]
    checked = [(r["stage"], r["step"]) for r in records if r["split"] == "validation"]
    assert checked == [(1, 3), (1, 6), (2, 3), (2, 6)]
    times = [record["time"] for record in records]
    assert times == sorted(times)
    wanted = {1: {"nll", "kl", "masked", "accuracy", "log_snr"}, 2: {"flow", "log_snr"}}
    if variant == "joint":
        wanted[2] |= {"nll", "log_q", "kl_ref", "masked", "accuracy"}
    for record in records:
        terms = record.keys() - {"stage", "step", "split", "time"}
        extra = {"lr", "grad_norm", "tokens_per_s"} if record["split"] == "train" else set()
        assert terms == wanted[record["stage"]] | extra
        assert all(math.isfinite(record[term]) for term in terms)


def test_validation_is_the_same_measurement_every_time(tmp_path: Path) -> None:
    made = Trainer(recipe(), tmp_path)
    for stage in made.stages():
        rows = made._rows("validation", stage.section, 0)
        first = made._validate(stage, stage.networks, rows)
        torch.manual_seed(1)
        assert made._validate(stage, stage.networks, rows) == first


# --- other settings -----------------------------------------------------------------------------


def test_z0_prediction_wider_latents_and_joint_training_run(tmp_path: Path) -> None:
    made = recipe(
        *JOINT,
        "model.dit.prediction=z0",
        "model.vae.latent_dim=24",
        "model.vae.patch_size=2",
        "stage2.loc=null",
        "stage2.timestep_per=row",
        "stage1.log_snr=3.0",
    )
    Trainer(made, tmp_path).run()
    model = colada.load(tmp_path / "model")
    assert (model.dit.config.prediction, model.vae.config.latent_dim) == ("z0", 24)
    assert len(model.generate("One morning", 9, end_ids=())[0].tokens) == 9
    assert [r["log_snr"] for r in metrics(tmp_path)] == pytest.approx([3.0] * 16, abs=1e-3)


def test_bfloat16_trains_and_saves(tmp_path: Path) -> None:
    Trainer(recipe("run.precision=bfloat16", "run.save_dtype=bfloat16"), tmp_path).run()
    model = colada.load(tmp_path / "model")
    assert {parameter.dtype for parameter in model.dit.parameters()} == {torch.bfloat16}
    state = final_state(tmp_path)
    assert {tensor.dtype for tensor in state["networks"].values()} == {torch.float32}
    assert len(model.generate("One morning", 6, end_ids=())[0].tokens) == 6


def test_a_tokenizer_of_ones_own_is_used(tmp_path: Path) -> None:
    own = Tokenizer.train([make_stories.corpus()], 290)
    own.save(tmp_path / "own.json")
    made = recipe(f"tokenizer.file={tmp_path / 'own.json'}", "stage1.steps=1", "stage2.steps=0")
    model = Trainer(made, tmp_path / "run").run()
    assert model.tokenizer is not None
    assert model.vae.config.vocab_size == 290
    assert model.tokenizer.encode("One morning") == own.encode("One morning")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(ColadaError, match=r"stage 1, step \d: the loss is"):
        Trainer(recipe("stage1.lr=1e30", "stage1.warmup=0"), tmp_path).run()


# --- unusable data and full disks ---------------------------------------------------------------


def test_too_little_text_is_refused_by_how_much_there_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("few words\n<|endoftext|>\nfewer still\n<|endoftext|>\nand words again\n")
    made = ["data.validation_share=0.5", f"data.path={tmp_path / 'a.txt'}"]
    with pytest.raises(ColadaError, match=r"vocab_size is 300.*only \d+"):
        Trainer(recipe(*made), tmp_path / "run")
    made.append("tokenizer.vocab_size=260")
    with pytest.raises(ColadaError, match=r"(train|validation) has \d+ ids, expected at least 65"):
        Trainer(recipe(*made, "stage1.length=64"), tmp_path / "run").run()


def test_an_undecodable_file_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine\n" * 500)
    (tmp_path / "b.txt").write_bytes(b"fine\nfine too\nnot \xff fine\n")
    with pytest.raises(ColadaError, match=r"b\.txt:3.*0xff.*UTF-8"):
        Trainer(recipe(f"data.path={tmp_path}"), tmp_path / "run")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ColadaError, match=r"nowhere: no such file"):
        Trainer(recipe(f"data.path={tmp_path / 'nowhere'}"), tmp_path / "run")


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ColadaError, match="cannot write to"):
        Trainer(recipe(), tmp_path / "file" / "run")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let writes beyond a size fail, as they do on a full disk; the system reports "File too large"."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_while_saving_keeps_the_last_checkpoint(
    tmp_path: Path, uninterrupted: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    saves: list[Path] = []
    real = torch.save

    def save(state: object, path: Path) -> None:
        saves.append(path)
        if len(saves) == 3:
            path.write_bytes(b"half a checkpoint")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(state, path)

    made = recipe(*VARIANTS["joint"])
    monkeypatch.setattr(trainer_module.torch, "save", save)
    with pytest.raises(ColadaError, match=f"cannot write to .*{os.strerror(errno.ENOSPC)}"):
        Trainer(made, tmp_path).run()
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.glob("checkpoint*")) == ["checkpoint.pt"]
    assert final_state(tmp_path)["step"] == 4
    Trainer(made, tmp_path).run()
    assert_same_run(tmp_path, uninterrupted["joint"])


def test_a_write_that_the_system_refuses_keeps_the_last_checkpoint(
    tmp_path: Path, uninterrupted: dict[str, Path]
) -> None:
    made = recipe(*VARIANTS["frozen"])
    with pytest.raises(Interrupted):
        Trainer(made, tmp_path, At(1, 2)).run()
    size = (tmp_path / "checkpoint.pt").stat().st_size
    with files_of_at_most(size // 2), pytest.raises(ColadaError, match="cannot write to") as caught:
        Trainer(made, tmp_path).run()
    assert "\n" not in str(caught.value)
    assert final_state(tmp_path)["step"] == 2
    Trainer(made, tmp_path).run()
    assert_same_run(tmp_path, uninterrupted["frozen"])


def test_resuming_on_a_full_disk_harms_nothing(tmp_path: Path, uninterrupted: dict[str, Path]) -> None:
    made = recipe(*VARIANTS["frozen"])
    with pytest.raises(Interrupted):
        Trainer(made, tmp_path, At(2, 2)).run()
    with files_of_at_most(0), pytest.raises(ColadaError, match="cannot"):
        Trainer(made, tmp_path).run()
    Trainer(made, tmp_path).run()
    assert_same_run(tmp_path, uninterrupted["frozen"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt"])
def test_a_log_that_cannot_be_written_is_one_clear_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(ColadaError, match=f"cannot write to .*{os.strerror(errno.ENOSPC)}"):
        Trainer(recipe("stage1.steps=2", "stage2.steps=1"), tmp_path).run()


def test_the_written_recipe_says_every_key(uninterrupted: dict[str, Path]) -> None:
    out = uninterrupted["joint"]
    written = yaml.safe_load((out / "recipe.yaml").read_text())
    assert written.keys() == Recipe.model_fields.keys()
    for section in ("data", "stage1", "stage2", "run"):
        assert written[section].keys() == Recipe.model_fields[section].annotation.model_fields.keys()  # type: ignore[union-attr]
    assert load_recipe(out / "recipe.yaml") == recipe(*VARIANTS["joint"])
