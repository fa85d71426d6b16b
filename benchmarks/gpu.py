"""What a GPU can show, in parts that each take at most nine minutes; started by benchmarks/gpu.sh.

Every part writes OUT/PART.json: what it measured, whether all of it went well, and what it was made with
(device, versions, commit, seed, peak memory, wall time). The file is written anew after each measurement:
what is killed leaves what it had. What commands said stands in OUT/gpu.log.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.measure import made_with
from colada.files import write_json, write_text
from colada.train.checkpoints import find
from colada.train.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
SEED = 0
KIT_TIME = 10**9  # The modification time of a kit's corpora, by which prepared shards know them.


class Failed(Exception):
    """A command of a part did not end as it should."""


class OutOfMemory(Exception):
    """A command wanted more memory than the GPU has."""


@dataclass
class Part:
    """One part under way.

    Attributes:
        name: of the part, and of its file.
        out, kit: folders of the results and of what was gathered.
        debug: at debug size, on a CPU.
        seconds: that the part may take.
        pieces: MiB of the files that a model is packed into; None leaves it a folder.
        run: directory of the training run.
        overrides: further settings of the training run.
        train_for: seconds after which training stops; as many as there are if None.
        results: what was measured so far.
        errors: what went wrong so far.
        over: whether it came to its end.
    """

    name: str
    out: Path
    kit: Path
    debug: bool
    seconds: float
    pieces: int | None
    run: Path
    overrides: Sequence[str]
    train_for: float | None = None
    results: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    over: bool = False

    def __post_init__(self) -> None:
        self.begin = time.monotonic()
        self.started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.device = torch.device("cpu" if self.debug else "cuda")
        self.memory = 0

    @property
    def left(self) -> float:
        """Seconds until the part has to be over."""
        return self.seconds - (time.monotonic() - self.begin)

    def write(self) -> None:
        """Write what there is."""
        record = {
            "part": self.name,
            "ok": self.over and not self.errors,
            "over": self.over,
            "errors": self.errors,
            "debug": self.debug,
            "made_with": made_with(self.device),
            "seed": SEED,
            "started": self.started,
            "wall_s": time.monotonic() - self.begin,
            "peak_memory_bytes": self.memory,
            "results": self.results,
        }
        write_json(self.out / f"{self.name}.json", record, sort=False)

    def add(self, name: str, measure: Callable[[], Any]) -> Any:
        """Measure something and write it down; what fails is an error of the part, and the next goes on."""
        print(f"{self.name}: {name}", flush=True)
        result = None
        try:
            result = self.results[name] = measure()
        except (
            Failed,
            OSError,
            ValueError,
            KeyError,
            subprocess.SubprocessError,
            ElementTree.ParseError,
        ) as error:
            self.errors.append(f"{name}: {error}")
            print(f"{self.name}: {name} failed: {error}", file=sys.stderr, flush=True)
        self.write()
        return result

    def command(
        self, *words: str, good: Sequence[int] = (0,), stop_after: float | None = None
    ) -> tuple[int, str]:
        """Run Python with these arguments, and return its exit status and what it printed.

        Args:
            good: exit statuses that are no failure.
            stop_after: ask it to stop (SIGINT) after so many seconds; otherwise it is ended with the part.

        Raises:
            Failed: if it ends otherwise, or is not over in time.
            OutOfMemory: if that is why.
        """
        line = [sys.executable, *words]
        with (self.out / "gpu.log").open("a") as log, tempfile.TemporaryFile("w+") as printed:
            log.write(f"$ {' '.join(words)}\n")
            log.flush()
            start = log.tell()
            process = subprocess.Popen(line, stdout=printed, stderr=log, start_new_session=True, cwd=ROOT)
            try:
                if stop_after is not None:
                    try:
                        process.wait(max(1.0, stop_after))
                    except subprocess.TimeoutExpired:
                        process.send_signal(signal.SIGINT)
                status = process.wait(max(1.0, self.left))
            except subprocess.TimeoutExpired:
                raise Failed("not over in time") from None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            printed.seek(0)
            text = printed.read()
            log.write(text)
        if status not in good:
            said = (self.out / "gpu.log").read_bytes()[start:].decode(errors="replace").removesuffix(text)
            lines = (said.strip() or text.strip()).splitlines()
            if any("OutOfMemoryError" in line for line in lines):
                raise OutOfMemory
            raise Failed(f"exit status {status}: {lines[-1] if lines else 'it said nothing'}")
        return status, text

    def record(self, *words: str) -> Any:
        """Run a benchmark on the part's device, and return the record that it writes; see :meth:`command`."""
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "record.json"
            self.command("-m", *words, "--device", self.device.type, "--json", str(file))
            return json.loads(file.read_text())

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Keep the most memory in use: of the whole GPU, or of the largest process on a CPU."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(0.2):
                free, total = torch.cuda.mem_get_info()
                self.memory = max(self.memory, total - free)

        watcher = threading.Thread(target=look, daemon=True)
        if self.device.type == "cuda":
            watcher.start()
        try:
            yield
        finally:
            over.set()
            if self.device.type == "cpu":
                self.memory = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


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


def place_in(corpora: Path, path: str | Path) -> Path:
    """Return where in a folder of corpora a source's files are: its one file, or the folder itself."""
    return corpora / (Path(path).name if Path(path).suffix else "")


def kit_overrides(sources: Sequence[Any], kit: Path) -> list[str]:
    """Return the settings with which a recipe takes its text, tokenizer and shards from a kit."""
    settings = [source.model_dump(mode="json", exclude_defaults=True) for source in sources]
    moved = [{**source, "path": str(place_in(kit / "corpora", source["path"]))} for source in settings]
    files = {"data.sources": moved, "data.cache": str(kit / "shards")}
    files["tokenizer.file"] = str(kit / "tokenizer.json")
    return [f"{name}={json.dumps(value)}" for name, value in files.items()]


def open_kit(recipe: Path, kit: Path) -> list[str]:
    """Return :func:`kit_overrides` of a recipe, for a kit that was carried here."""
    for path in (kit / "corpora").iterdir():
        os.utime(path, (KIT_TIME, KIT_TIME))
    return kit_overrides(load_recipe(recipe).data.sources, kit)


def bundled(part: Part) -> None:
    """Train the bundled model for as long as there is time, and export the best so far; resumable."""
    recipe = ROOT / ("recipes/debug.yaml" if part.debug else "recipes/tiny-gpu.yaml")
    settings: list[str] = []
    if not part.debug and part.kit.is_dir():
        settings = open_kit(recipe, part.kit)
    settings += [f"run.device={part.device.type}", f"seed={SEED}", *part.overrides]
    model = part.run / "best-model"
    reserve = min(75.0, part.seconds / 4)  # For the last checkpoint, the export and the sample.

    def train() -> dict[str, Any]:
        arguments = ["-m", "colada", "train", str(recipe), "--out", str(part.run)]
        words = [word for setting in settings for word in ("--set", setting)]
        seconds = min(part.left - reserve, part.train_for or part.seconds)
        status, _ = part.command(*arguments, *words, good=(0, 130), stop_after=seconds)
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


def reached(run: Path) -> dict[str, Any]:
    """Return where a run stands: its last checkpoint, last validation and speed.

    Raises:
        Failed: if it has no checkpoint.
    """
    checkpoint = find(run, "auto")
    if checkpoint is None:
        raise Failed(f"no checkpoint in {run}")
    state = json.loads((checkpoint / "state.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    stage = state["stage"]
    last: dict[str, dict[str, Any]] = {"validation": {}, "train": {}}
    for record in records:
        if record["stage"] == stage and record["split"] in last:
            last[record["split"]] = record
    speed = {name: last["train"].get(name) for name in ("tokens_per_s", "mfu", "memory_gb")}
    where = {name: state[name] for name in ("stage", "step", "tokens")}
    return {
        **where,
        "checkpoint": str(checkpoint),
        "validation_flow": last["validation"].get("flow"),
        **speed,
    }


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
        Path | None, typer.Option(help="Directory of the training run. Default: bundled/ in runs/gpu.")
    ] = None,
    train_for: Annotated[
        float | None,
        typer.Option(min=1, help="Seconds after which training stops, if the part may last longer."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Of the training run's recipe.")
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
    part = Part(
        which, out, kit, debug, 60 * minutes, pieces, run or home / "bundled", overrides or [], train_for
    )
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
