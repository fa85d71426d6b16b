"""Training on several ranks: gloo on the CPU.

The reference is one process: same global batch, same losses.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import colada
from colada.errors import ColadaError
from colada.train.checkpoints import places
from colada.train.parallel import Ranks, joined
from colada.train.recipe import commented
from colada.train.trainer import Trainer
from on_ranks import Done, on_ranks, started
from runs import metrics, recipe

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32",
    reason="needs torch.distributed with gloo",
)

JOINT = ["stages.prior.kind=joint", "stages.prior.vae_lr=0.1", "stages.vae.ema=0.9", "stages.prior.ema=0.95"]
MICRO = ["stages.vae.micro_batch=1", "stages.prior.micro_batch=1"]
# Each stage's trajectories are its own: another teacher's.
KEPT = "trajectories: {path: KEPT, rows: 40, grid: [1, 0.6, 0]}"
TAUGHT = f"batch: 4, length: 16, guidance_cap: 1.2, warmup: 1, {KEPT}"
VARIANTS = {
    "frozen": [
        "stages.prior.copies=2",
        "stages.low={kind: prior, batch: 4, length: 16, steps: 4, warmup: 1, train: lora, rank: 2,"
        " weight_decay: 0.1}",
    ],
    "joint": [
        *JOINT,
        "stages.vae.micro_batch=1",
        "stages.prior.micro_batch=1",
        "run.checkpoint_activations=true",
    ],
    "replicated": [*JOINT, "run.shard=false"],
    "muon": ["stages.vae.optimiser=muon", "stages.prior.optimiser=muon"],
    "bfloat16": [*JOINT, "run.precision=bfloat16"],
    "distilled": [
        "stages.vae.steps=1",
        "stages.prior.steps=2",
        f"stages.few={{{TAUGHT}, kind: distil, steps: 4, grids: [[1, 0.6, 0], [1, 0]], landing_time: true}}",
        f"stages.solver={{{TAUGHT}, kind: solver, steps: 3, evaluations: 2, guidance: 1}}",
    ],
    "pictures": [
        "data.pictures=[{path: 'shapes:one'}]",
        "data.fitted_on=40",
        "stages.vae.steps=1",
        "stages.prior.steps=1",
        "stages.pictures={kind: pictures, steps: 6, batch: 4, pairs: 2, length: 16, dual_layers: 1}",
        "stages.beside={kind: pictures, steps: 3, batch: 4, pairs: 2, length: 16, train: pictures,"
        " tasks: {draw: 1, describe: 1}}",
    ],
}
# Muon orthogonalises in bfloat16, where the order of a sum shows; sharded, weights are gathered in it.
ROUNDING = {"muon": 1e-3, "bfloat16": 1e-2}


def command(made: list[str], out: Path) -> list[str]:
    file = out.with_suffix(".yaml")
    file.write_text(commented(recipe(*placed(made, out), "run.keep_last=20")))
    return ["train", str(file), "--out", str(out)]


def start(ranks: int, made: list[str], out: Path) -> Done:
    return on_ranks(ranks, command(made, out), out.with_suffix(".log"))


def placed(made: list[str], out: Path) -> list[str]:
    """Overrides with a place for what a run keeps beside its own directory, one a stage."""
    return [own.replace("KEPT", f"{out}-kept-{number}") for number, own in enumerate(made)]


def losses(out: Path) -> list[float]:
    """Every loss that was logged, in training and validation."""
    names = ("loss", "flow", "nll", "distance", "picture_flow")
    return [next(record[name] for name in names if name in record) for record in metrics(out)]


def assert_close_models(out: Path, other: Path) -> None:
    one, two = colada.load(out / "model"), colada.load(other / "model")
    for network, reference in ((one.vae, two.vae), (one.dit, two.dit)):
        for (name, value), expected in zip(network.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(
                value, expected, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every variant on one rank, in this process."""
    runs = {}
    for variant, made in VARIANTS.items():
        runs[variant] = tmp_path_factory.mktemp("alone") / variant
        Trainer(recipe(*placed(made, runs[variant])), runs[variant]).run()
    return runs


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The joint variant on two ranks, started by torchrun itself."""
    out = tmp_path_factory.mktemp("together") / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "colada", *command(VARIANTS["joint"], out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the model is in") == 1
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "ranks", "replicas"),
    [
        ("frozen", 2, 1),
        ("distilled", 2, 1),
        ("replicated", 2, 1),
        ("muon", 2, 1),
        ("bfloat16", 2, 1),
        ("pictures", 2, 1),
        ("joint", 4, 2),
    ],
)
def test_the_losses_of_several_ranks_are_those_of_one(
    tmp_path: Path, alone: dict[str, Path], variant: str, ranks: int, replicas: int
) -> None:
    done = start(ranks, [*VARIANTS[variant], f"run.replicas={replicas}"], tmp_path / "run")
    assert done.returncode == 0, done.output
    assert done.output.count("the model is in") == 1
    rounding = ROUNDING.get(variant, 1e-5)
    assert losses(tmp_path / "run") == pytest.approx(losses(alone[variant]), rel=rounding)
    if variant not in ROUNDING:
        assert_close_models(tmp_path / "run", alone[variant])


@pytest.mark.slow
def test_the_joint_losses_of_two_ranks_are_those_of_one(alone: dict[str, Path], together: Path) -> None:
    assert losses(together) == pytest.approx(losses(alone["joint"]), rel=1e-5)
    assert_close_models(together, alone["joint"])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_checkpoint_of_two_ranks_resumes_on_one_and_on_four(
    tmp_path: Path, alone: dict[str, Path], together: Path, ranks: int
) -> None:
    out = tmp_path / "run"
    shutil.copytree(together, out)
    shutil.rmtree(out / "model")
    # As if it had stopped after its second step of the prior.
    for place in places(out / "checkpoints"):
        if place.stage == "prior" and place.step > 2:
            shutil.rmtree(out / "checkpoints" / place.name)
    done = start(ranks, VARIANTS["joint"], out)
    assert done.returncode == 0, done.output
    assert losses(out) == pytest.approx(losses(alone["joint"]), rel=1e-5)
    assert_close_models(out, alone["joint"])


@pytest.mark.slow
def test_rows_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    done = start(2, ["stages.vae.batch=3"], tmp_path / "rows")
    assert done.returncode != 0
    assert "error: a batch of 3 rows, expected a multiple of the 2 ranks" in done.output


def test_replicas_that_do_not_divide_the_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ColadaError, match="replicas=3, expected a divisor of the 2 ranks"),
        joined("cpu", True, 3),
    ):
        pytest.fail("the ranks have joined")


def test_ranks_share_the_rows_of_a_step_without_gaps() -> None:
    shares = [list(Ranks(rank, 4, torch.device("cpu")).share(12)) for rank in range(4)]
    assert [row for share in shares for row in share] == list(range(12))
    with pytest.raises(ColadaError, match="a batch of 10 rows, expected a multiple of the 4 ranks"):
        Ranks(0, 4, torch.device("cpu")).share(10)


@pytest.mark.slow
def test_ranks_started_without_torchrun_stop_and_save_together(
    tmp_path: Path, alone: dict[str, Path]
) -> None:
    """As under Slurm: one process a rank, and SIGTERM for one of them."""
    out, file = tmp_path / "run", tmp_path / "run.yaml"
    file.write_text(commented(recipe(*VARIANTS["joint"])))
    train = ["train", str(file), "--out", str(out), "-q"]
    ranks = started(2, train, tmp_path / "log")
    end = time.monotonic() + 60
    while not (out / "metrics.jsonl").is_file() and time.monotonic() < end:
        time.sleep(0.05)
    ranks[1].terminate()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [130, 130]
    assert places(out / "checkpoints")
    assert not (out / "model").exists()
    assert on_ranks(2, train, tmp_path / "log").returncode == 0
    assert losses(out) == pytest.approx(losses(alone["joint"]), rel=1e-5)
