"""Distillation as stages of a run: rounds, trajectories that are kept, what is refused, what is exported."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import colada
from colada.cli.main import main
from colada.data.rows import Batch
from colada.errors import ColadaError
from colada.flow import evaluations_of
from colada.generate.reference import transport
from colada.generate.settings import RequestSettings
from colada.models.likelihood import measure
from colada.networks.config import DiTConfig, TextVAEConfig
from colada.networks.layers import KVCache
from colada.networks.solver import LearntSolver
from colada.train import trajectories as kept_files
from colada.train.cost import Placement, training_flops
from colada.train.distil_cost import with_teacher
from colada.train.distillation import Guided, landing
from colada.train.export import export, system_of
from colada.train.flow_matching import pin
from colada.train.kinds import FlowTerms
from colada.train.losses import draw, encode, rows_layout
from colada.train.noise import draw_noise
from colada.train.plan import plan_run
from colada.train.recipe import Recipe, load_recipe
from colada.train.solver import integrate
from colada.train.stages import make_stage
from colada.train.trainer import Interrupted, Trainer
from colada.train.trajectories import fine_grid, roll_out, sampler
from helpers import tiny_dit, tiny_model
from runs import DEBUG, TINY, At, assert_same_run, final_state, metrics, recipe, same

pytest.importorskip("pydantic")

ROUND = (
    "{kind: distil, teacher: same, guidance: 3, guidance_cap: 1.2, trajectory: 1, steps: 4, batch: 4,"
    " length: 16, warmup: 0, prefix_share: 0.3, ema: 0.5, grids: GRIDS, MORE trajectories:"
    " {path: PATH, rows: 40, grid: [1, 0.8, 0.6, 0], substeps: 2}}"
)
FOLD = (
    "{kind: distil, guidance: 3, guidance_cap: 1.2, guidance_against: latents, steps: 3, batch: 4,"
    " length: 16, warmup: 0, copies: 2, prefix_share: 0.3, ema: 0.5, rollout: 2, teacher_steps: 4,"
    " grids: GRIDS}"
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few steps of both stages."""
    out = tmp_path_factory.mktemp("teacher")
    Trainer(recipe("run.validate_every=0", "run.sample_every=0"), out).run()
    return out / "model"


def made(start: Path, path: Path, stages: dict[str, str], *overrides: str) -> Recipe:
    """A recipe of these stages over a model."""
    yaml = path / "own.yaml"
    path.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"  {name}: {words}\n" for name, words in stages.items())
    yaml.write_text(f"model: {{init: {start}}}\nstages:\n{lines}")
    common = [own for own in TINY if own.startswith(("data.", "run."))]
    return load_recipe(yaml, [*common, "run.save_every=1", "run.keep_last=20", *overrides])


def rounds(path: Path, grids: str = "[[1, 0.6, 0]]", more: str = "") -> dict[str, str]:
    """The fold, and a round from the same teacher's trajectories."""
    second = ROUND.replace("GRIDS", grids).replace("PATH", str(path / "kept")).replace("MORE", more)
    return {"fold": FOLD.replace("GRIDS", "null"), "few": second}


@pytest.mark.parametrize("grids", ["null", "[[1, 0.6, 0]]"])
def test_a_prior_is_distilled_under_its_own_guidance_and_resumes(
    tmp_path: Path, teacher: Path, grids: str
) -> None:
    own = made(teacher, tmp_path, {"distil": FOLD.replace("GRIDS", grids)})
    Trainer(own, tmp_path / "whole").run()
    with pytest.raises(Interrupted):
        Trainer(own, tmp_path / "resumed", At("distil", 2)).run()
    Trainer(own, tmp_path / "resumed").run()
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    before, after = colada.load(teacher), colada.load(tmp_path / "whole" / "model")
    assert same(before.vae.state_dict(), after.vae.state_dict())
    assert not same(before.dit.state_dict(), after.dit.state_dict())
    assert main(["info", str(tmp_path / "whole" / "model")]) == 0
    inside = after.dit.config.distilled
    assert inside is not None
    assert (inside["guidance"], inside["guidance_against"], inside["guidance_cap"]) == (3, "latents", 1.2)
    assert (inside["steps"], inside["grids"]) == ((None, None) if grids == "null" else ([2], [[1, 0.6, 0]]))
    # The teacher had guidance 2 stored; what goes with the student is what it is used with.
    assert (before.generation["guidance"], after.generation["guidance"]) == (2, 1)
    assert after.generation.get("schedule", "uniform") == ("uniform" if grids == "null" else [1, 0.6, 0])
    assert len(after.generate(["One"], 4)[0].tokens) == 4
    for scale in (2.0, 0.0):
        with pytest.raises(ColadaError, match=rf"guidance={scale}: this model has 3 built in, expected 1"):
            after.generate(["One"], 4, guidance=scale)
    with pytest.raises(ColadaError, match="this model is distilled"):
        measure(after, ["One"])
    if grids != "null":
        with pytest.raises(ColadaError, match=r"steps=3: this model makes 2 steps along a"):
            after.generate(["One"], 4, steps=3)
        with pytest.raises(ColadaError, match=r"solver='ab2', .*this model makes Euler steps"):
            after.generate(["One"], 4, solver="ab2")


def test_the_modulation_alone_may_learn(tmp_path: Path, teacher: Path) -> None:
    own = made(teacher, tmp_path, {"distil": FOLD.replace("GRIDS", "null")}, "stages.distil.train=adaln")
    Trainer(own, tmp_path / "run").run()
    before = dict(colada.load(teacher).dit.named_parameters())
    after = colada.load(tmp_path / "run" / "model")
    changed = {name for name, own in after.dit.named_parameters() if not torch.equal(own, before[name])}
    assert changed
    assert all("ada." in name for name in changed)
    assert after.dit.config.distilled is not None


class StopsAfter(At):
    """Asks a run to stop once so many rows of trajectories are made."""

    def advance(self, done: int, total: int) -> None:
        if "trajectories" in self.title and done == self.where[1]:
            os.kill(os.getpid(), signal.SIGTERM)


def test_rounds_learn_from_one_teacher_and_resume_anywhere(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_files, "PART", 16)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    Trainer(made(teacher, whole, rounds(whole)), whole / "run").run()
    own = made(teacher, stopped, rounds(stopped))
    with pytest.raises(Interrupted, match="stopped before step 1 of few"):
        Trainer(own, stopped / "run", StopsAfter("few", 16)).run()
    assert len(list((stopped / "kept").glob("part-*"))) == 1
    with pytest.raises(Interrupted):
        Trainer(own, stopped / "run", At("few", 2)).run()
    Trainer(own, stopped / "run").run()
    assert_same_run(whole / "run", stopped / "run")
    parts = [sorted((path / "kept").glob("part-*")) for path in (whole, stopped)]
    assert [file.read_bytes() for file in parts[0]] == [file.read_bytes() for file in parts[1]]
    assert len(parts[0]) == 3
    # The round's teacher is the fold's, the model itself, not the weights that the fold has made.
    state, start = final_state(whole / "run"), colada.load(teacher).dit.state_dict()
    assert all(torch.equal(state["teacher"][name], value) for name, value in start.items())
    assert not all(torch.equal(state["dit"][name], value) for name, value in start.items())
    inside = colada.load(whole / "run" / "model").dit.config.distilled
    assert inside is not None
    assert (inside["guidance"], inside["steps"], inside["teacher_steps"]) == (3, [2], 6)


def test_the_same_teacher_is_not_what_a_stage_between_is_held_near(tmp_path: Path, teacher: Path) -> None:
    fold, few = rounds(tmp_path).values()
    stages = {"fold": fold, "reward": "{kind: reward, length: 16}", "few": few}
    tasks = ("data.sources=[{path: x, format: tasks}]", "data.packing=samples")
    own = made(teacher, tmp_path, stages, *tasks)
    start = colada.load(teacher)
    assert start.tokenizer is not None
    system = system_of(own, start.tokenizer, start)
    first, _, last = (make_stage(system, name, torch.nn.ModuleDict).frozen for name in stages)
    assert last["teacher"] is first["teacher"]


def test_trajectories_of_another_teacher_are_refused_by_name(tmp_path: Path, teacher: Path) -> None:
    stages = {"few": rounds(tmp_path)["few"].replace("teacher: same, ", "").replace("steps: 4", "steps: 1")}
    quick = ["run.validate_every=0", "run.sample_every=0"]
    Trainer(made(teacher, tmp_path, stages, *quick), tmp_path / "run").run()
    for words, override in {
        "guidance 3.0, this stage's are of 4.0": ["few.guidance=4"],
        "substeps 2, this stage's are of 3": ["few.trajectories.substeps=3"],
        "prefix_share 0.3, this stage's are of 0.1": ["few.prefix_share=0.1"],
    }.items():
        other = made(teacher, tmp_path, stages, *quick, *(f"stages.{own}" for own in override))
        with pytest.raises(ColadaError, match=f"kept holds trajectories of {words}: give another path"):
            Trainer(other, tmp_path / f"run-{override[0]}").run()
    other = made(
        tmp_path / "run" / "model", tmp_path, {"few": stages["few"].replace("guidance: 3", "guidance: 1")}
    )
    with pytest.raises(ColadaError, match=r"kept holds trajectories of teacher '\w+', this stage's are of"):
        Trainer(other, tmp_path / "other").run()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "own.txt").write_text("mine")
    own = made(teacher, tmp_path, stages, f"stages.few.trajectories.path={tmp_path / 'text'}")
    with pytest.raises(ColadaError, match=r"holds no trajectories\.json, expected trajectories, or nothing"):
        Trainer(own, tmp_path / "last").run()


def test_what_undoes_a_distillation_is_refused(tmp_path: Path, teacher: Path) -> None:
    fold = FOLD.replace("GRIDS", "null")
    prior = "{kind: prior, steps: 1, length: 16}"
    for stages, words in (
        ({"fold": fold, "prior": prior}, "stages.prior trains the flow of data, which undoes"),
        ({"fold": fold, "again": fold}, r"stages.again.guidance=3: its teacher has 3 built in, expected 1"),
        ({"few": rounds(tmp_path)["few"]}, "teacher=same, but no stage with one is before it"),
        (
            {"four": "{kind: solver, evaluations: 4}", "six": "{kind: solver, evaluations: 6}"},
            r"stages.four.evaluations=4, stages.six.evaluations=6: a model has one learnt solver",
        ),
        (
            {"prior": "{kind: prior, length: 16, train: adaln, self_conditioning: 0.5}"},
            r"stages.prior.train='adaln', but the DiT has not learnt its own guess as an input before",
        ),
    ):
        with pytest.raises(ColadaError, match=words):
            plan_run(made(teacher, tmp_path, stages))
    plan_run(made(teacher, tmp_path, {"prior": prior, "fold": fold}))
    stages = {"fold": fold, "reward": "{kind: reward}"}
    tasks = ("data.sources=[{path: x, format: tasks}]", "data.packing=samples")
    plan_run(made(teacher, tmp_path, stages, *tasks))
    with pytest.raises(ColadaError, match=r"stages.reward trains the flow of data, which undoes"):
        plan_run(made(teacher, tmp_path, stages, *tasks, "stages.reward.replay_of=data"))
    with pytest.raises(
        ColadaError, match=r"stages.fold of a DiT with self_conditioning, expected one without"
    ):
        plan_run(made(teacher, tmp_path, {"prior": prior, "fold": fold}, "stages.prior.self_conditioning=1"))
    pairs = (tasks[0].replace("}]", "}, {path: x, format: preferences}]"), tasks[1])
    with pytest.raises(ColadaError, match=r"stages.preferences trains the flow of data, which undoes"):
        plan_run(made(teacher, tmp_path, {"fold": fold, "preferences": "{kind: preferences}"}, *pairs))
    few = {"few": FOLD.replace("GRIDS", "[[1, 0.5, 0]]"), "reward": "{kind: reward}"}
    with pytest.raises(
        ColadaError, match=r"stages.reward learns at any time, but the model before it makes a"
    ):
        plan_run(made(teacher, tmp_path, few, *tasks))
    plan_run(made(teacher, tmp_path, {"fold": fold, "again": fold.replace("guidance: 3", "guidance: 1")}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("grids=[[1, 0.6, 0.6, 0]]", "expected values that fall from 1 to 0"),
        ("grids=[[1, 0.7, 0]]", r"0.7 in a grid, expected values of trajectories.grid"),
        ("grids=[[1, 0], [1, 0.6, 0]]", "2 grids without landing_time"),
        ("landing_time=true", None),
        ("shares=[1, 2]", r"shares \[1.0, 2.0\], expected one a grid"),
        ("grids=null", "no grids, expected values of trajectories.grid"),
    ],
)
def test_sections_are_checked(tmp_path: Path, teacher: Path, change: str, words: str | None) -> None:
    if words is None:
        made(teacher, tmp_path, rounds(tmp_path), f"stages.few.{change}")
        return
    with pytest.raises(ColadaError, match=words):
        made(teacher, tmp_path, rounds(tmp_path), f"stages.few.{change}")


# --- trajectories ----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "ab2", "heun"])
@pytest.mark.parametrize("prediction", ["velocity", "z0"])
def test_trajectories_are_those_of_the_readable_loop(prediction: str, solver: str) -> None:
    """A block at a time, after the row's own latents, prefixes pinned; samples do not see each other."""
    model = tiny_model(dit={"prediction": prediction}, vae={"scaling_factor": 1.3})
    vae, dit, size = model.vae, model.dit, 4
    taken = torch.randint(1, 50, (3, 16), generator=torch.Generator().manual_seed(1))
    sample = torch.tensor([[0] * 4 + [1] * 8 + [-1] * 4, [0] * 16, [0] * 16])
    trained = torch.ones(3, 16, dtype=torch.bool)
    trained[0, 12:] = trained[1, :6] = False
    rows = Batch(taken, sample, trained)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    noise = draw_noise(generators, vae.config, 16, flow=FlowTerms(prefix_share=0.25))
    section = kept_files.TrajectorySection(path="", grid=(1.0, 0.6, 0.3, 0.0), substeps=2, solver=solver)
    settings = sampler(section, {"guidance": 3.0, "guidance_cap": 1.1, "guidance_rescale": 0.5})
    states = roll_out(vae, dit, rows, noise, settings, section.grid, 0)
    grid = fine_grid(section)
    assert len(grid) == 7
    assert set(section.grid) < set(grid)
    evaluations = evaluations_of(solver, grid, 6)
    layout = rows_layout(vae, rows)
    clean = vae.normalise(draw(encode(vae, rows.ids, layout), noise.posterior)).view(3, 16, -1)
    pinned = pin(vae, rows, noise, layout, 0)
    assert noise.z1 is not None
    assert pinned is not None
    with torch.inference_mode():
        for row, begin, end in ((0, 0, 4), (0, 4, 12), (1, 0, 16), (2, 0, 16)):
            cache = KVCache()
            for start in range(begin, end, size):
                block = slice(start, start + size)
                arguments = (pinned.where[row : row + 1, block], pinned.latents[row : row + 1, block], [3.0])
                z1 = noise.z1[row : row + 1, 0, block]
                steps = transport(dit, z1, [cache], *arguments, evaluations, settings)
                reached = [z for z, _ in steps]
                # Where the path is after both steps of an interval.
                each = len(reached) / 3 if solver != "heun" else None
                at = [1, 3, 5] if each == 2 else [3, 7, 10]
                for column, number in enumerate(at, start=1):
                    torch.testing.assert_close(
                        states[row, block, column], reached[number][0], rtol=1e-5, atol=1e-5
                    )
                assert torch.equal(states[row, block, 0], z1[0])
                layout = dit.layout([size], [cache])
                dit(clean[row, block], torch.zeros(()), layout, [cache], appending=True)
    assert not states[0, 12:].any()


def test_the_states_of_a_round_are_those_that_are_kept(tmp_path: Path, teacher: Path) -> None:
    """In 16-bit numbers: a student step begins and lands where the teacher's trajectory did."""
    own = made(teacher, tmp_path, rounds(tmp_path), "stages.fold.steps=1", "stages.few.steps=1")
    trainer = Trainer(own, tmp_path / "run")
    trainer.run()
    files = kept_files.Trajectories(tmp_path / "kept", 40, {})
    rows, states = files.read([3, 41])
    again, _ = files.read([1])
    assert torch.equal(rows.ids[1], again.ids[0])
    stage: Any = make_stage(trainer.system, "few", trainer._lay_out)
    timestep = torch.tensor([[[1000.0] * 8 + [600.0] * 8], [[600.0] * 4 + [0.0] * 12]])
    z = stage._at(states.float(), timestep)
    assert torch.equal(z[0, 0, :8], states[0, :8, 0].float())
    assert torch.equal(z[0, 0, 8:], states[0, 8:, 2].float())
    assert torch.equal(z[1, 0, 4:], states[1, 4:, 3].float())
    uniform = torch.linspace(0.01, 0.99, 99)
    law = stage.section.loc, stage.section.scale
    assert law[0] is None
    counts = stage._drawn(1000 * torch.sigmoid(1 + torch.special.ndtri(uniform)))[0].unique(
        return_counts=True
    )
    assert counts[0].tolist() == [600.0, 1000.0]


# --- cost ------------------------------------------------------------------------------------------


def test_a_step_from_kept_trajectories_costs_a_step_of_the_prior(tmp_path: Path, teacher: Path) -> None:
    stages = {"prior": "{kind: prior, steps: 4, batch: 4, length: 16, prefix_share: 0.3}"}
    (prior,) = plan_run(made(teacher, tmp_path, stages)).phases
    fold, few, kept = plan_run(made(teacher, tmp_path, rounds(tmp_path))).phases
    assert few.flops == prior.flops
    assert "teacher" in fold.flops
    assert kept.steps == 40
    assert few.memory["teacher"] == 4 * sum(p.numel() for p in colada.load(teacher).dit.parameters())
    # A second round finds them made.
    both = {**rounds(tmp_path), "less": rounds(tmp_path, "[[1, 0]]")["few"]}
    assert [phase.name for phase in plan_run(made(teacher, tmp_path, both)).phases] == [
        *("fold", "few", "few, trajectories", "less")
    ]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_teachers_pass_is_counted(guidance: float) -> None:
    """Against torch's counter, which counts attention as if all saw all: without it, to the last product."""
    from colada.train.kinds import DistilSection

    model = tiny_model()
    section = DistilSection(batch=2, length=12, copies=2, guidance=guidance)
    vae, dit = model.vae.config, model.dit.config
    from colada.train.cost import Work, cola_phase

    work = Work("dit", 2, 12, copies=2)
    phase = with_teacher(cola_phase("", 1, vae, dit, work, Placement(2)), vae, dit, section, 1.0)
    clean, z = torch.randn(2, 12, 8), torch.randn(2, 2, 12, 8)
    timestep = 1000 * torch.rand(2, 2, 3).repeat_interleave(4, 2)
    with FlopCounterMode(display=False) as counter:
        Guided(model.dit, guidance).guess(z, timestep, clean)
    counted = sum(
        flops
        for own in counter.get_flop_counts()["Global"].items()
        for name, flops in [own]
        if "attention" not in str(name) and "bmm" not in str(name)
    )
    blocks, copies = 3, 2 * (1 if guidance == 1 else 2)
    pairs = 16 * (blocks * (blocks - 1) + 2 * blocks * (blocks + 1)) // 2
    pairs += (copies - 2) * blocks * 16
    attention = 2 * 4 * dit.num_layers * dit.heads * dit.head_dim * pairs
    # The last layer of the clean copy computes keys and values only, which counting ignores.
    assert counted <= phase.flops["teacher"] - attention <= 1.3 * counted
    assert training_flops(vae, dit, work).keys() == phase.flops.keys() - {"teacher"}


def test_the_command_is_training_from_a_model(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(DEBUG).parents[1] / "tests" / "data"
    own = ["distil", str(DEBUG.parent / "distil.yaml"), "--data", str(data), "--dry-run"]
    own += ["--set", "stages.four.steps=800"]
    assert main(own) == 0
    shown = capsys.readouterr().out
    for words in ("fold", "four", "four, trajectories", "one 80 GB H100 at 40% MFU"):
        assert words in shown
    assert max(len(line) for line in shown.splitlines() if str(data) not in line) <= 80
    # The released size is planned from its configurations alone.
    for part, config in (("cola_dit", DiTConfig(block_size=16)), ("cola_vae", TextVAEConfig(block_size=16))):
        (tmp_path / "released" / part).mkdir(parents=True)
        (tmp_path / "released" / part / "config.json").write_text(json.dumps(config.to_dict()))
    assert main([*own, "--model", str(tmp_path / "released"), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["parameters"]["DiT"] == pytest.approx(1.84e9, rel=0.01)
    assert max(phase["memory_per_rank"]["total"] for phase in planned["phases"]) < 80e9
    small = made(teacher, tmp_path, rounds(tmp_path))
    assert small.model.init == str(teacher)
    run = [
        "distil",
        str(tmp_path / "own.yaml"),
        "--model",
        str(teacher),
        "--out",
        str(tmp_path / "run"),
        "-q",
    ]
    common = [word for own in TINY if own.startswith(("data.", "run.")) for word in ("--set", own)]
    assert main([*run, *common]) == 0
    assert main(["generate", "--model", str(tmp_path / "run" / "model"), "-n", "4", "One"]) == 0


# --- one student of several lengths, and a learnt solver ---------------------------------------------


@pytest.mark.slow
def test_a_student_of_several_lengths_learns_and_resumes(tmp_path: Path, teacher: Path) -> None:
    more = "landing_time: true, shares: [1, 2],"
    paths = tmp_path / "whole", tmp_path / "stopped"
    whole, stopped = (made(teacher, path, rounds(path, "[[1, 0.6, 0], [1, 0]]", more)) for path in paths)
    Trainer(whole, paths[0] / "run").run()
    with pytest.raises(Interrupted):
        Trainer(stopped, paths[1] / "run", At("few", 3)).run()
    Trainer(stopped, paths[1] / "run").run()
    assert_same_run(paths[0] / "run", paths[1] / "run")
    model = colada.load(paths[0] / "run" / "model")
    assert bool(model.dit.emb_in2.proj_out.weight.any())
    assert [model.chosen({"steps": steps})["schedule"] for steps in (1, 2)] == [(1, 0), (1, 0.6, 0)]
    assert len(model.generate(["One"], 4, steps=1)[0].tokens) == 4
    # The stage before it tells no ends, and leaves what listens silent; without the stage there is none.
    export(paths[0] / "run" / "checkpoints" / "fold-00000003", tmp_path / "folded")
    assert not bool(colada.load(tmp_path / "folded").dit.emb_in2.proj_out.weight.any())
    none = made(teacher, tmp_path, rounds(tmp_path, "[[1, 0.6, 0], [1, 0]]", more), "stages.few.steps=0")
    assert "emb_in2" not in dict(Trainer(none, tmp_path / "none").system.networks["dit"].named_children())


def test_what_a_solver_learns_brings_it_nearer() -> None:
    dit, g = tiny_dit(prediction="z0"), torch.Generator().manual_seed(0)
    with torch.no_grad():  # A path that is far from straight.
        dit.txt_out.proj.weight.mul_(4)
    guided, solver = Guided(dit.requires_grad_(False), 3.0, cap=1.2), LearntSolver(3)
    with torch.no_grad():
        for name, parameter in solver.named_parameters():
            solver.first_value(name, parameter)
    clean, noise = torch.randn(16, 8, 8, generator=g), torch.randn(16, 1, 8, 8, generator=g)
    begin = torch.full((16, 1, 8), 1000.0)
    goal = landing(guided, noise, begin, 0 * begin, clean, substeps=32)
    optimiser = torch.optim.Adam(solver.parameters(), lr=0.01)
    distances = []
    for _ in range(40):
        distance = (integrate(solver, guided, noise, clean) - goal).square().mean()
        distances.append(float(distance.detach()))
        optimiser.zero_grad()
        distance.backward()
        optimiser.step()
    assert distances[-1] < 0.7 * distances[0]
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in solver.parameters())


@pytest.mark.parametrize("folded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_solver_is_learnt_resumes_and_is_stored(tmp_path: Path, teacher: Path, folded: bool) -> None:
    words = (
        "{kind: solver, evaluations: 2, guidance: 3, guidance_cap: 1.2, guidance_against: latents, steps: 30,"
        " batch: 4, length: 16, prefix_share: 0.3, lr: 0.02, warmup: 1, trajectories:"
        " {path: PATH, rows: 40, grid: [1, 0], substeps: 8}}"
    )
    models = []
    for name in ("whole", "stopped"):
        path = tmp_path / name
        stages = {"fold": FOLD.replace("GRIDS", "null")} if folded else {}
        own = words.replace("PATH", str(path / "kept"))
        stages["solver"] = own.replace("guidance: 3", "teacher: same, guidance: 3") if folded else own
        run = made(teacher, path, stages, "run.sample_every=10", "run.validate_every=10")
        if name == "stopped":
            with pytest.raises(Interrupted):
                Trainer(run, path / "run", At("solver", 17)).run()
        Trainer(run, path / "run").run()
        models.append(colada.load(path / "run" / "model"))
    assert_same_run(tmp_path / "whole" / "run", tmp_path / "stopped" / "run")
    assert models[0].generation == models[1].generation
    solver, start = models[0].generation["solver"], colada.load(teacher)
    assert len(solver["beta"]) == 2
    assert models[0].generation["guidance"] == (1 if folded else 3)
    guided = {"guidance_against": "latents", "guidance_cap": 1.2} if not folded else {}
    assert {name: models[0].generation.get(name) for name in guided} == guided
    assert (models[0].dit.config.distilled is not None) == folded
    assert same(start.dit.state_dict(), models[0].dit.state_dict()) != folded
    distances = [own["distance"] for own in metrics(tmp_path / "whole" / "run") if "distance" in own]
    assert len(distances) == 30 + 3
    # Which is what the readable loop makes of the same numbers.
    vae, dit = models[0].vae, models[0].dit
    module = LearntSolver(2)
    with torch.no_grad():
        lengths = torch.tensor([1 - solver["grid"][1], solver["grid"][1]])
        module.steps.copy_(lengths.log())
        module.alpha.copy_(torch.tensor(solver["alpha"]))
        module.beta.copy_(torch.tensor([own for row in solver["beta"] for own in row]))
        scale = models[0].generation["guidance"]
        width = vae.config.latent_dim
        noise, clean = torch.randn(1, 1, 8, width), torch.randn(1, 8, width)
        cache, settings = KVCache(), RequestSettings(guidance=scale, **guided)
        found = integrate(module, Guided.of(dit, {"guidance": scale, **guided}), noise, clean)
        dit(clean[0, :4], torch.zeros(()), dit.layout([4]), [cache], appending=True)
        nothing = torch.zeros(1, 4, dtype=torch.bool), torch.zeros(1, 4, width)
        evaluations = evaluations_of(solver, "uniform", 2)
        *_, (z, _) = transport(dit, noise[0, :, 4:], [cache], *nothing, [scale], evaluations, settings)
    torch.testing.assert_close(found[0, :, 4:], z, rtol=1e-4, atol=1e-5)


# --- the experiment ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_experiment_measures_what_is_missing_and_draws(tmp_path: Path, teacher: Path) -> None:
    from typer.testing import CliRunner

    from experiments.few_step import app

    data = tmp_path / "text.jsonl"
    lines = [f"One day the {word} went to the sea and found a small red boat there." for word in "abcdefgh"]
    splits = ["train"] * 5 + ["validation"] * 3
    data.write_text(
        "".join(
            json.dumps({"text": f"{own} {own}", "split": split}) + "\n"
            for own, split in zip(lines, splits, strict=True)
        )
    )
    own = made(teacher, tmp_path, {"distil": FOLD.replace("GRIDS", "[[1, 0.6, 0]]")}, "run.validate_every=0")
    Trainer(own, tmp_path / "run").run()
    student = str(tmp_path / "run" / "model")
    out = tmp_path / "out"
    words = ["run", str(data), "--teacher", str(teacher), "--student", student, "--out", str(out)]
    words += ["--documents", "3", "--prompt", "4", "--tokens", "8", "--steps", "1,2", "--guidance", "3"]
    for _ in range(2):  # The second time, nothing is missing.
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        points = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        assert [point["role"] for point in points] == ["teacher"] * 3 + ["student", "real"]
    stored, one, two, few, real = points
    assert stored["agreement"] == 1.0
    assert (one["row_passes"], two["row_passes"], few["row_passes"]) == (3, 5, 3)
    assert len(few["by_block"]) == 2
    assert few["pinned"].keys() == {"1", "2", "3"}
    assert real["perplexity"] == pytest.approx(math.exp(real["trigram"]))
    result = CliRunner().invoke(app, ["table", str(out)])
    assert result.exit_code == 0, result.output
    assert "| teacher | 3 | 1 | 3 |" in result.stdout
    assert (out / "frontier.svg").exists()
