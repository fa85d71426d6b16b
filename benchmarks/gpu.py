"""What a GPU can show, in parts that each take at most nine minutes; started by benchmarks/gpu.sh.

Every part writes OUT/PART.json: what it measured, whether all of it went well, and what it was made with
(device, versions, commit, seed, peak memory, wall time). The file is written anew after each measurement:
what is killed leaves what it had. What commands said stands in OUT/gpu.log.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.kit import open_kit
from benchmarks.part import ROOT, SEED, Failed, OutOfMemory, Part, reached
from benchmarks.study import scaling
from colada.files import write_text

# --- 1: tests ------------------------------------------------------------------------------------


def tests(part: Part) -> None:
    """Run tests/test_cuda.py, and parity on the device; what is skipped on a GPU is an error."""

    def run_tests() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "junit.xml"
            status, _ = part.command(
                "-m", "pytest", "-n", "0", "-q", f"--junitxml={file}", "tests/test_cuda.py", good=(0, 1)
            )
            cases = list(ElementTree.parse(file).getroot().iter("testcase"))
        ends: dict[str, dict[str, str]] = {"passed": {}, "failed": {}, "skipped": {}}
        for case in cases:
            kind, node = "passed", case
            for tag, name in (("skipped", "skipped"), ("error", "failed"), ("failure", "failed")):
                if (child := case.find(tag)) is not None:
                    kind, node = name, child
            ends[kind][case.attrib["name"]] = node.attrib.get("message", "")
        if status or (ends["skipped"] and not part.debug):
            part.errors.append(f"tests: {len(ends['failed'])} failed, {len(ends['skipped'])} skipped")
        return ends

    def parity() -> list[dict[str, Any]]:
        shared = Path("shared/fixtures/parity")
        places = [part.kit / "parity", ROOT.parent / shared, ROOT / shared]
        cases = [path.parent for where in places for path in sorted(where.glob("*/case.json"))]
        if not cases:
            raise Failed(f"no fixtures in {' or '.join(map(str, places))}")
        # A GPU adds up in another order.
        tolerance = "1e-5" if part.debug else "1e-4"
        arguments = ["-m", "colada", "parity", "--device", part.device.type, "--tolerance", tolerance]
        status, text = part.command(*arguments, *map(str, cases), good=(0, 1))
        if status:
            part.errors.append("parity: not every case holds")
        return [json.loads(line) for line in text.splitlines()]

    part.add("tests", run_tests)
    part.add("parity", parity)


# --- 2: generation -------------------------------------------------------------------------------


def generate(part: Part) -> None:
    """Measure generation beside the readable loop and an AR decoder of equal size, batch by batch."""
    job = ["--size", "2.3b", "--context", "128", "--steps", "16", "--new-tokens", "64", "--repeats", "3"]
    batches = ["1", "8", "64"]
    if part.debug:
        job = ["--size", "tiny", "--layers", "1", "--context", "16", "--steps", "2", "--new-tokens", "32"]
        job, batches = [*job, "--repeats", "1"], ["1", "2"]
    command = ["benchmarks.generation", "speed", *job, "--dtype", "bfloat16", "--seed", str(SEED)]
    for batch in batches:
        part.add(f"batch {batch}", partial(part.record, *command, "--batch", batch))


# --- 3: few evaluations --------------------------------------------------------------------------


def few(part: Part) -> None:
    """Measure four evaluations a block without guidance, as of a distilled model, beside an AR decoder."""
    job = ["--size", "2.3b", "--context", "128", "--steps", "4", "--new-tokens", "64", "--repeats", "3"]
    batches = ["1", "64"]
    if part.debug:
        job = ["--size", "tiny", "--layers", "1", "--context", "16", "--steps", "4", "--new-tokens", "32"]
        job, batches = [*job, "--repeats", "1"], ["1", "2"]
    command = ["benchmarks.generation", "speed", *job, "--guidance", "1", "--peers", "ar"]
    for batch in batches:
        words = [*command, "--dtype", "bfloat16", "--seed", str(SEED), "--batch", batch]
        part.add(f"batch {batch}", partial(part.record, *words))


# --- 4: training steps ---------------------------------------------------------------------------


def training(part: Part) -> None:
    """Measure training steps by size, compiled and not; where memory does not suffice, smaller ones too."""
    shapes = {"tiny": [(256, 128)], "small": [(64, 512), (32, 512)], "2.3b": [(8, 512), (4, 512)]}
    extra = ["--repeats", "10", "--warmup", "3"]
    if part.debug:
        shapes, extra = {"tiny": [(2, 64)]}, ["--layers", "1", "--repeats", "1", "--warmup", "1"]

    for size, tries in shapes.items():
        for compiled in ([], ["--compile", "yes"]):
            for number, (batch, length) in enumerate(tries):
                flags = [*compiled, *(["--checkpoint-activations"] if number else [])]
                name = " ".join([size, f"{batch} x {length}", *flags])
                shape = ["--size", size, "--batch", str(batch), "--length", str(length)]
                try:
                    part.add(
                        name, partial(part.record, "benchmarks.training", "steps", *shape, *extra, *flags)
                    )
                    break
                except OutOfMemory:
                    part.results[name] = "out of memory"
            else:
                part.errors.append(f"{size}: out of memory")
    part.write()


# --- 5: the bundled model ------------------------------------------------------------------------


def bundled(part: Part) -> None:
    """Train the bundled model for as long as there is time, and export the best so far; resumable."""
    recipe = ROOT / ("recipes/debug.yaml" if part.debug else "recipes/tiny-gpu.yaml")
    settings: list[str] = []
    if not part.debug and part.kit.is_dir():
        settings = open_kit(recipe, part.kit)
    settings += [f"run.device={part.device.type}", f"seed={SEED}", *part.overrides]
    model = part.run / "best-model"

    def train() -> dict[str, Any]:
        arguments = ["-m", "colada", "train", str(recipe), "--out", str(part.run)]
        words = [word for setting in settings for word in ("--set", setting)]
        # The last checkpoint, the export and the sample take time too.
        status, _ = part.command(*arguments, *words, good=(0, 130), stop_after=part.training_time)
        return {"finished": status == 0, **reached(part.run)}

    def export() -> dict[str, Any]:
        flow, best = part.results["training"]["validation_flow"], part.run / "best.json"
        before = json.loads(best.read_text()) if best.is_file() else None
        if before is not None and flow is not None and before["flow"] is not None and flow > before["flow"]:
            return {"kept": before, "validation_flow": flow}
        fresh = part.run / "best-model.partial"
        shutil.rmtree(fresh, ignore_errors=True)
        part.command("-m", "colada", "export", str(part.results["training"]["checkpoint"]), str(fresh))
        shutil.rmtree(model, ignore_errors=True)
        fresh.rename(model)
        exported = {"flow": flow, "step": part.results["training"]["step"]}
        write_text(best, json.dumps(exported))
        return exported

    def sample() -> str:
        prompt = ["Once upon a time", "-n", "64", "--seed", str(SEED), "--device", part.device.type]
        return part.command("-m", "colada", "generate", "--model", str(model), *prompt)[1]

    done = part.add("training", train)
    if done is not None and done["stage"] != "vae" and part.add("export", export) is not None:
        part.add("sample", sample)
        part.add("model", lambda: pack(model, part.out, part.pieces))


def pack(model: Path, out: Path, pieces: int | None) -> dict[str, Any]:
    """Copy a model to the results: as a folder, or as a tar in pieces of so many MiB."""
    if pieces is None:
        shutil.copytree(model, out / "model", dirs_exist_ok=True)
        return {"folder": "model"}
    for old in out.glob("model.tar.*"):
        old.unlink()
    split = (
        'set -o pipefail; tar c -C "$1" --transform "s,^\\.,model," . | split -b "$2m" -d - "$3/model.tar."'
    )
    subprocess.run(["bash", "-c", split, "pack", str(model), str(pieces), str(out)], check=True)
    names = sorted(path.name for path in out.glob("model.tar.*"))
    return {"pieces": names, "unpack": "cat model.tar.* | tar x"}


# --- the command ---------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Part], None]] = {
    "tests": tests,
    "generate": generate,
    "few": few,
    "training": training,
    "bundled": bundled,
    "scaling": scaling,
}


def main(
    which: Annotated[
        str, typer.Argument(metavar="PART", help=f"{', '.join(PARTS)}, a number from 1, or all.")
    ] = "all",
    out: Annotated[Path | None, typer.Argument(help="Folder of the results; $OUT or runs/gpu.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="At debug size, on a CPU.")] = False,
    kit: Annotated[Path, typer.Option(help="What benchmarks/gather.py has gathered.")] = Path("runs/kit"),
    minutes: Annotated[float, typer.Option(min=0.1, help="That a part may take.")] = 9.0,
    pieces: Annotated[
        int | None, typer.Option(min=1, help="Pack the trained model into files of so many MiB.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Directory of what is trained. Default: bundled/ or scaling/ in runs/gpu."),
    ] = None,
    train_for: Annotated[
        float | None,
        typer.Option(min=1, help="Seconds after which training stops, if the part may last longer."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Of the recipe of what is trained.")
    ] = None,
) -> None:
    """Run one part, or all of them in order; the exit status is 1 if any failed."""
    names = list(PARTS)
    if which.isdecimal() and 1 <= int(which) <= len(names):
        which = names[int(which) - 1]
    if which != "all" and which not in names:
        raise typer.BadParameter(f"{which!r}, expected {', '.join(names)}, 1 to {len(names)}, or all")
    if not debug and not torch.cuda.is_available():
        print("error: torch sees no CUDA device here; --debug runs on a CPU", file=sys.stderr)
        raise typer.Exit(2)
    home = ROOT / "runs" / ("gpu-debug" if debug else "gpu")
    out = out or Path(os.environ.get("OUT") or home)
    out.mkdir(parents=True, exist_ok=True)
    if which == "all":
        # Each in a process of its own: none takes another down, or counts its memory.
        words = [word for word in sys.argv[1:] if word != "all"]
        statuses = {
            name: subprocess.call([sys.executable, "-m", "benchmarks.gpu", name, *words]) for name in names
        }
        failed = [name for name, status in statuses.items() if status]
        if failed:
            print(f"failed: {', '.join(failed)}; see {out}", file=sys.stderr)
            raise typer.Exit(1)
        return
    part = Part(which, out, kit, debug, 60 * minutes, pieces, run or home / which, overrides or [], train_for)
    part.write()
    with part.watched():
        PARTS[which](part)
    part.over = True
    part.write()
    seconds = time.monotonic() - part.begin
    print(f"{which}: {'failed' if part.errors else 'done'} in {seconds:.0f} s", flush=True)
    raise typer.Exit(1 if part.errors else 0)


if __name__ == "__main__":
    typer.run(main)
