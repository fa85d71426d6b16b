"""Few evaluations a block: teacher and students by steps and guidance, quality beside variety.

python -m experiments.few_step run FILE... --student MODEL --judge MODEL --out DIR    measure what is missing
python -m experiments.few_step table DIR                            print a table, draw the figure beside it

Each point continues the beginnings of documents. Beside the judge's perplexity, the cross-entropy of a
word-trigram model of the training text, and variety, there are: trigram nats by block (drift), the same after
prompts that end 1, 2 and 3 tokens into a block (pinned), and the share of a block's tokens that are the
teacher's, from the same noise after the same text (agreement). Points that are in the results are left out:
a stopped run goes on.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
import typer
from rich.console import Console

from colada.cli.main import run as run_app
from colada.data.documents import read_documents
from colada.data.listing import find_files
from colada.evaluate.generative import Judge, ModelJudge, Passage, continue_passages, figures, real_passages
from colada.evaluate.texts import Text, require_tokenizer
from colada.evaluate.variety import words
from colada.files import write_json
from colada.flow import evaluations_of
from colada.generate.settings import TextRequest
from colada.models.bound import LikelihoodKind, TextScore
from colada.models.cola import ColaDLM
from colada.models.load import load, load_cola
from colada.report.style import INK, SERIES, styled
from colada.report.table import Table
from experiments.common import append_result, numbers, read_results
from experiments.quality import Trigrams

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS, GUIDANCE, CAP = (1, 2, 4, 8, 16), (3.0, 5.0, 7.0), 1.25
TAILS = (1, 2, 3)
"""Tokens into a block after which a prompt ends, of patches of one token."""
NATS, DISTINCT = 0.1, 0.95
"""How much entropy, and which share of distinct-2, a student may lose and still count as as good."""

Point = dict[str, Any]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


class TrigramJudge:
    """The trigram model where there is no other judge; its tokens are words."""

    kind: LikelihoodKind = "exact"

    def __init__(self, trigrams: Trigrams) -> None:
        self.trigrams, self.origin = trigrams, "word trigrams"
        self.settings: dict[str, Any] = {"strength": trigrams.strength}

    def score(self, passages: Sequence[Passage], progress: Any = None) -> list[TextScore]:
        """See :class:`~colada.evaluate.generative.Judge`."""
        scores = []
        for passage in passages:
            nats = self.trigrams.nats(words(passage.text))
            scores.append(TextScore(max(1, len(nats)), len(passage.text.encode()), -sum(nats), {}))
        return scores


def teacher_points(steps: Sequence[int], guidance: Sequence[float], cap: float) -> list[dict[str, Any]]:
    """Return the teacher's settings: its own, and its guesses capped at every number of steps and scale."""
    capped = [
        {"steps": count, "guidance": scale, "guidance_cap": cap, "solver": "ab2"}
        for count in steps
        for scale in guidance
    ]
    return [{}, *capped]


def student_points(model: ColaDLM, steps: Sequence[int]) -> list[dict[str, Any]]:
    """Return a student's settings: each of its numbers of steps; of one that is only folded, all."""
    inside = model.dit.config.distilled or {}
    if not isinstance(model.chosen({})["solver"], str):
        return [{}]
    return [{"steps": count} for count in inside.get("steps") or steps]


def nats_by_block(
    trigrams: Trigrams, decode: Callable[[Sequence[int]], str], passages: Sequence[Passage], size: int
) -> list[float | None]:
    """Return the mean trigram nats of the words that end in each block of ``size`` tokens; None for none."""
    sums: list[list[float]] = []
    for passage in passages:
        nats = trigrams.nats(words(passage.text))
        begin = 0
        for number in range(-(-len(passage.ids) // size)):
            end = min(len(nats), len(words(decode(passage.ids[: (number + 1) * size]))))
            if number == len(sums):
                sums.append([])
            sums[number] += nats[begin:end]
            begin = max(begin, end)
    return [sum(own) / len(own) if own else None for own in sums]


def agreement(
    model: ColaDLM,
    settings: Mapping[str, Any],
    written: Sequence[Sequence[int]],
    requests: Sequence[TextRequest],
) -> float:
    """Return the share of tokens of one block each that are those in ``written``."""
    changed = [own._replace(settings=cast(Any, {**settings, **own.settings})) for own in requests]
    pairs = [
        (one, other)
        for done, expected in zip(model.generate(changed), written, strict=True)
        for one, other in zip(done.tokens, expected, strict=True)
    ]
    return sum(one == other for one, other in pairs) / max(1, len(pairs))


@app.command()
def run(
    files: Annotated[list[Path], typer.Argument(help="The training corpora: files with splits, or folders.")],
    teacher: Annotated[
        str | None, typer.Option(help="Directory or hub id; the bundled model if left out.")
    ] = None,
    student: Annotated[list[str] | None, typer.Option(help="A student of it; may be repeated.")] = None,
    judge: Annotated[str | None, typer.Option(help="A model; word trigrams if left out.")] = None,
    out: Annotated[Path, typer.Option(help="Directory of the results.")] = Path("runs/few-step"),
    documents: Annotated[int, typer.Option(help="Validation documents that are continued.")] = 200,
    prompt: Annotated[int, typer.Option(help="Tokens of each that are given, whole blocks.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens that are written.")] = 64,
    samples: Annotated[int, typer.Option(help="Of each prompt: how alike they are needs two.")] = 2,
    steps: Annotated[str, typer.Option(help="Numbers of steps.")] = ",".join(map(str, STEPS)),
    guidance: Annotated[str, typer.Option(help="The teacher's scales.")] = ",".join(map(str, GUIDANCE)),
    cap: Annotated[float, typer.Option(help="The teacher's cap: the data's root mean square.")] = CAP,
    seed: Annotated[int, typer.Option(help="Of the first sample of the first document.")] = 0,
) -> None:
    """Measure teacher and students; what is in the results already is left out."""
    counts, scales = numbers(steps, "--steps", int), numbers(guidance, "--guidance", float)
    master = load_cola(teacher, dtype=torch.float32)
    tokenizer = require_tokenizer(master, "texts are continued")
    read = list(read_documents([own for where in files for own in find_files(where)]))
    trigrams = Trigrams(words(document.text) for document in read if document.split == "train")
    vocabulary = {gram[0] for gram in trigrams.counts[0]}
    held_out = [Text(own.text, str(number)) for number, own in enumerate(read) if own.split == "validation"]
    real = real_passages(tokenizer, held_out, prompt, tokens)[:documents]
    judged: Judge = TrigramJudge(trigrams)
    if judge is not None:
        judged = ModelJudge(load(judge), tokenizer)

    out.mkdir(parents=True, exist_ok=True)
    common: Point = {
        "documents": len(real),
        "prompt": prompt,
        "new_tokens": tokens,
        "samples": samples,
        "seed": seed,
    }
    common |= {"judge": judged.origin}
    done = {_key(point) for point in read_results(out)}
    size = master.vae.config.block_tokens
    # One block each after some of the true text, with noise of its own.
    requests = [
        TextRequest([*own.prompt_ids, *own.ids[:given]], size, {"seed": seed + number, "end_ids": ()})
        for number, own in enumerate(real)
        for given in range(0, tokens, max(size, tokens // 4 // size * size))
    ]
    expected: list[Sequence[int]] = []

    def measure(model: ColaDLM, role: str, settings: dict[str, Any]) -> None:
        name = "bundled" if model is master and teacher is None else model.origin
        chosen = model.chosen(settings)
        own = {key: chosen[key] for key in ("solver", "schedule", "steps", "early_end")}
        evaluations = len(evaluations_of(**own))
        point: Point = {"role": role, "model": name, "asked": settings, **common}
        if _key(point) in done:
            return
        nonlocal expected
        if not expected:
            expected = [done.tokens for done in master.generate(requests)]
        (written,) = continue_passages(model, tokenizer, real, tokens, [settings], seed=seed, samples=samples)
        flat = [passage for row in written for passage in row if passage.ids]
        point |= {"guidance": chosen["guidance"], "evaluations": evaluations}
        point |= {"row_passes": evaluations * (1 if chosen["guidance"] == 1 else 2) + 1}
        point |= figures(written, judged.score(flat), vocabulary)
        point["trigram"] = trigrams.nats_per_word([words(passage.text) for passage in flat])
        point["by_block"] = nats_by_block(trigrams, tokenizer.decode, flat, size)
        point["agreement"] = agreement(model, settings, expected, requests)
        point["pinned"] = {
            tail: trigrams.nats_per_word(
                words(passage.text)
                for passage in continue_passages(
                    *(model, tokenizer, _longer(tokenizer.decode, real, tail), 4 * size, [settings]),
                    seed=seed,
                )[0][0]
            )
            for tail in TAILS
            if tail < size
        }
        append_result(out, point)

    for settings in teacher_points(counts, scales, cap):
        measure(master, "teacher", settings)
    for where in student or ():
        model = load_cola(where, dtype=torch.float32)
        for settings in student_points(model, counts):
            measure(model, "student", settings)
    flat = [passage for passage in real if passage.ids]
    row = {"role": "real", "model": "real text", "asked": {}, **common}
    if _key(row) not in done:
        nats = trigrams.nats_per_word([words(passage.text) for passage in flat])
        row |= {**figures([flat], judged.score(flat), vocabulary), "trigram": nats}
        append_result(out, row)


def _longer(decode: Callable[[Sequence[int]], str], real: Sequence[Passage], tail: int) -> list[Passage]:
    """Return passages whose prompts go on by some tokens of the text."""
    return [
        Passage(
            decode([*own.prompt_ids, *own.ids[:tail]]), own.text, (*own.prompt_ids, *own.ids[:tail]), own.ids
        )
        for own in real
    ]


def _key(point: Mapping[str, Any]) -> str:
    names = ("role", "model", "asked", "documents", "prompt", "new_tokens", "samples", "seed", "judge")
    return json.dumps([point[name] for name in names], sort_keys=True)


def is_varied(point: Mapping[str, Any], teacher: Mapping[str, Any]) -> bool:
    """Return whether a point is about as varied as the teacher's own."""
    entropy = (teacher["entropy"] - point["entropy"]) * math.log(2)
    return bool(entropy <= NATS and point["distinct_2"] >= DISTINCT * teacher["distinct_2"])


@app.command()
def table(out: Path) -> None:
    """Print the results as a Markdown table; write results.json and frontier.svg beside them."""
    points = read_results(out)
    first = next((own for own in points if own["role"] == "teacher" and not own["asked"]), None)
    measures = ("perplexity", "trigram", "known, %", "entropy", "distinct-2", "overlap")
    names = ("", "s", "evaluations", "passes", *measures, "agreement", "pinned 1/2/3", "varied")
    shown = Table(names)
    for own in points:
        cells = [own["model"] if own["role"] != "teacher" else "teacher"]
        cells += [f"{own['guidance']:g}" if "guidance" in own else "–"]
        cells += [str(own.get(name, "–")) for name in ("evaluations", "row_passes")]
        cells += [f"{own['perplexity']:.2f}", f"{own['trigram']:.3f}", f"{100 * own['known_words']:.1f}"]
        cells += [f"{own['entropy']:.3f}", f"{own['distinct_2']:.3f}"]
        cells += ["–" if own["overlap"] is None else f"{own['overlap']:.3f}"]
        cells += [f"{own['agreement']:.3f}" if "agreement" in own else "–"]
        cells += ["/".join(f"{nats:.2f}" for nats in own.get("pinned", {}).values()) or "–"]
        cells += ["–" if first is None else "yes" if is_varied(own, first) else "no"]
        shown.row(*cells)
    print(shown.markdown())
    write_json(out / "results.json", {"points": points})
    with styled():
        draw(points).savefig(out / "frontier.svg")
    Console(stderr=True).print(f"wrote {out / 'frontier.svg'} and results.json")


def draw(points: Sequence[Point]) -> Figure:
    """Return perplexity over entropy, a line for each number of evaluations, and trigram nats by block."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    axes, drift = figure.subplots(1, 2)
    axes.set(xlabel="entropy of a text, bits a token", ylabel="judge's perplexity (log)", yscale="log")
    drift.set(xlabel="block", ylabel="trigram nats a word")
    lines: dict[tuple[str, int], list[Point]] = {}
    for own in points:
        if own["role"] != "real":
            name = "teacher" if own["role"] == "teacher" else Path(own["model"]).name
            lines.setdefault((name, own["evaluations"]), []).append(own)
    for number, ((name, evaluations), line) in enumerate(lines.items()):
        line = sorted(line, key=lambda own: own["guidance"])
        color, mark = SERIES[number % len(SERIES)], "o" if name == "teacher" else "D"
        x, y = [own["entropy"] for own in line], [own["perplexity"] for own in line]
        axes.plot(x, y, color=color, marker=mark, markersize=4, label=f"{name}, {evaluations}")
        best = min(line, key=lambda own: own["perplexity"])
        drift.plot(range(1, len(best["by_block"]) + 1), best["by_block"], color=color, linewidth=1.2)
    for own in points:
        if own["role"] == "real":
            axes.plot(own["entropy"], own["perplexity"], "*", color=INK, markersize=9, label="real text")
    axes.yaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside upper left", ncols=5, fontsize=7)
    return figure


if __name__ == "__main__":
    sys.exit(run_app(app, None, "python -m experiments.few_step"))
