"""The commands that measure texts: ``colada eval likelihood`` and ``generative``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from colada.cli.evaluate import (
    BatchOption,
    LimitOption,
    PageOption,
    QuietOption,
    StepsOption,
    check_counts,
    existing_paths,
)
from colada.cli.options import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    RevisionOption,
    check_model_options,
    load_model,
    number,
    number_option,
)
from colada.errors import ColadaError
from colada.generate.settings import check_settings

if TYPE_CHECKING:
    from colada.models.base import LanguageModel

TextsArgument = Annotated[
    list[str], typer.Argument(metavar="FILE...", help="Texts: .txt, .jsonl or .parquet, or folders of them.")
]
FieldOption = Annotated[str, typer.Option(help="Key or column of the text.")]
BoundSamples = Annotated[
    int | None, typer.Option(help="K of a bound. Default: 1 for Cola DLM, 32 for LLaDA.")
]
BoundAt = Annotated[
    float | None, number_option(help="a = t / T of the latents that a bound is over. Default: 0.6.")
]
BoundSteps = Annotated[
    int | None,
    typer.Option(help="Of a bound: solver steps to the noise, and half as many to the data. Default: 16."),
]
ResultOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Write what was measured as JSON.")]


def likelihood(
    files: TextsArgument,
    model: ModelOption = None,
    revision: RevisionOption = None,
    field: FieldOption = "text",
    limit: LimitOption = None,
    samples: BoundSamples = None,
    at: BoundAt = None,
    steps: BoundSteps = None,
    seed: Annotated[int, typer.Option(min=0, help="Of noise and probes.")] = 0,
    batch: BatchOption = 8,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    out: ResultOption = None,
    quiet: QuietOption = False,
) -> None:
    """Measure texts in bits per byte; of Cola DLM an upper bound, from a lower bound on log p(x)."""
    from rich.console import Console

    from colada.evaluate.texts import read_texts, summarise
    from colada.models.bound import check_bound
    from colada.train.display import Display

    check_counts(limit=limit, batch=batch)
    check_bound(samples, at, steps)
    check_settings({"seed": seed})
    check_model_options(model, revision, dtype, device)
    display = Display(Console(stderr=True, quiet=quiet))
    texts = read_texts(existing_paths(files), field, limit, display.say)

    from dataclasses import asdict

    from colada.models.likelihood import bound_settings, kind, measure

    network = load_model(model, revision, dtype, device)
    bound = bound_settings(network, samples=samples, at=at, steps=steps)
    with display.task("likelihood", total=1, unit="tokens"):
        contents = [text.text for text in texts]
        scores = measure(network, contents, seed=seed, batch=batch, progress=display.advance, **bound)
    settings: dict[str, Any] = {**bound, "seed": seed, "dtype": dtype, "device": device}
    result = summarise(scores, kind(network))
    error = result["standard_error"]
    spread = f" ± {error:.3f}" if error is not None else " (one text, so no standard error)"
    first, last = ("at most ", ": a bound, not the likelihood") if result["kind"] == "bound" else ("", "")
    print(f"{first}{result['bits_per_byte']:.3f}{spread} bits per byte{last}")
    counted = "1 text" if result["texts"] == 1 else f"{result['texts']:,} texts"
    print(f"{counted}, {result['tokens']:,} tokens, {result['bytes']:,} bytes")
    if result["parts_per_token"]:
        print("nats per token: " + ", ".join(f"{k} {v:.3f}" for k, v in result["parts_per_token"].items()))
    print(_named(settings))
    records = [{"origin": text.origin, **asdict(score)} for text, score in zip(texts, scores, strict=True)]
    write_result(out, network, {**result, "settings": settings, "records": records})


def generative(
    files: TextsArgument,
    judge: Annotated[
        str,
        typer.Option(metavar="WHERE", help="The judge: a model directory or hub id; hf:ID of transformers."),
    ],
    models: Annotated[
        list[str] | None,
        typer.Option(
            *("--model", "-m"),
            metavar="WHERE",
            help="As of other commands; may be given several times. The first one's tokens are counted.",
        ),
    ] = None,
    field: FieldOption = "text",
    limit: LimitOption = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Texts whose words are known. Default: those of FILE..."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Of each text, as prompt; 0 writes from nothing.")] = 16,
    new_tokens: Annotated[int, typer.Option(help="Tokens of a continuation.")] = 64,
    samples: Annotated[int, typer.Option(help="Continuations of each prompt, by seeds of their own.")] = 1,
    temperature: Annotated[
        float | None, number_option(help="Of the tokens. Default: the model's own.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep so many tokens; 0 all.")] = None,
    top_p: Annotated[float | None, number_option(help="Keep the likeliest up to this share.")] = None,
    steps: StepsOption = None,
    guidance: Annotated[
        str | None,
        typer.Option(
            *("--guidance", "-g"),
            metavar="SCALE,...",
            help="Guidance scales, each a point of Cola DLM's line. Default: the model's own.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of continuations, and of the judge's noise.")] = 0,
    batch: BatchOption = 16,
    judge_samples: BoundSamples = None,
    judge_at: BoundAt = None,
    judge_steps: BoundSteps = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    out: ResultOption = None,
    html: PageOption = None,
    quiet: QuietOption = False,
) -> None:
    """Perplexity of generated text under a judge, over variety, at several guidance scales."""
    from rich.console import Console

    from colada.evaluate.texts import TRANSFORMERS, check_lengths, read_texts, require_tokenizer
    from colada.evaluate.variety import words
    from colada.models.bound import check_bound
    from colada.report.frontier import frontier_table, write_frontier_page
    from colada.report.style import require_matplotlib
    from colada.train.display import Display

    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "steps": steps}
    named: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    scales = _scales(guidance)
    places: list[str | None] = [*models] if models else [None]
    check_counts(limit=limit, batch=batch, samples=samples)
    check_lengths(prompt_tokens, new_tokens)
    check_settings({**named, "seed": seed})
    check_bound(judge_samples, judge_at, judge_steps)
    for where in places:
        check_model_options(where, None, dtype, device)
    if not judge.startswith(TRANSFORMERS):
        check_model_options(judge, None, dtype, device)
    elif find_spec("transformers") is None:
        raise ColadaError(f"judge {judge} needs transformers: pip install transformers")
    if html is not None:
        require_matplotlib("a page")
    display = Display(Console(stderr=True, quiet=quiet))
    texts = read_texts(existing_paths(files), field, limit, display.say)
    known = texts if reference is None else read_texts(existing_paths(reference), field, None, display.say)
    vocabulary = {word for text in known for word in words(text.text)}

    from colada.device import find_device
    from colada.evaluate import generative as room
    from colada.models.likelihood import bound_settings

    first = load_model(places[0], None, dtype, device)
    tokenizer = require_tokenizer(first, "judges read text")
    reader: room.Judge
    if judge.startswith(TRANSFORMERS):
        reader = room.TransformersJudge(judge.removeprefix(TRANSFORMERS), find_device(device))
    else:
        network = load_model(judge, None, dtype, device)
        bound = bound_settings(network, samples=judge_samples, at=judge_at, steps=judge_steps)
        reader = room.ModelJudge(network, tokenizer, **bound, seed=seed, batch=batch)

    def writers() -> Iterator[tuple[LanguageModel, list[dict[str, Any]]]]:
        for place, where in enumerate(places):
            model = load_model(where, None, dtype, device) if place else first
            # What has no guidance, such as an AR decoder, is one point beside the lines.
            guided = scales if "guidance" in model.defaults or len(places) == 1 else ()
            yield model, [{**named, "guidance": scale} for scale in guided] or [named]

    lengths = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    real = room.real_passages(tokenizer, texts, **lengths)
    with display.task("generative", total=len(texts), unit="texts"):
        result = room.frontier(
            *(writers(), real, reader, tokenizer, new_tokens),
            vocabulary=vocabulary,
            seed=seed,
            samples=samples,
            batch=batch,
            progress=display.advance,
        )
    print(f"perplexity under {reader.origin}; s: guidance; repeats and known: % of words")
    frontier_table(result).print(Console(highlight=False))
    if len(real) < len(texts):
        print(f"left out: {len(texts) - len(real)} texts with fewer than {sum(lengths.values())} tokens")
    settings = {**named, **lengths, "samples": samples, "seed": seed, "dtype": dtype, "device": device}
    print(_named(settings))
    facts = {
        "judge": reader.origin,
        "judge_settings": reader.settings,
        "settings": settings,
        "files": files,
        "reference": reference,
        "left_out": len(texts) - len(real),
    }
    write_result(out, first, {**facts, **result})
    if html is not None:
        write_frontier_page(html, result, reader.origin, facts)
        print(f"wrote {html}")


def _scales(guidance: str | None) -> list[float]:
    """Return the guidance scales that an option names, none by default."""
    scales = [number(part) for part in guidance.split(",")] if guidance is not None else []
    for scale in scales:
        check_settings({"guidance": scale})
    return scales


def _named(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def write_result(
    path: Path | None, model: LanguageModel, record: Mapping[str, Any], said: bool = True
) -> None:
    """Write what was measured of a model, if a file is named, and say so."""
    if path is None:
        return
    from colada.files import write_json
    from colada.train.provenance import provenance

    made_with = {"model": model.origin, "made_with": provenance(model.device)}
    write_json(path, {**made_with, **record}, sort=False)
    if said:
        print(f"wrote {path}")
