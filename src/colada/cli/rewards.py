"""``colada eval reward`` and ``colada pairs``: how well chat models do what rules ask, and better by them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from colada.checks import MOST_TOKENS, require_count
from colada.cli.evaluate import (
    BatchOption,
    PageOption,
    QuietOption,
    StepsOption,
    check_counts,
    existing_paths,
)
from colada.cli.measure import ResultOption, write_result
from colada.cli.options import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    RevisionOption,
    check_model_options,
    load_model,
    number_option,
)
from colada.errors import ColadaError
from colada.generate.settings import check_settings

StoriesArgument = Annotated[
    Path, typer.Argument(help="Texts that samples of tasks are cut from, as in training: a file or folder.")
]
TasksOption = Annotated[
    str | None, typer.Option(metavar="NAME,...", help="Which tasks. Default: all that need no questions.")
]
QuestionsOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Questions on stories, for the task story_questions.")
]


def reward(
    stories: StoriesArgument,
    models: Annotated[
        list[str] | None,
        typer.Option(
            *("--model", "-m"),
            metavar="WHERE",
            help="As of other commands; may be given several times. One without a chat template is asked by"
            " that of another.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="WHERE", help="The model that the others are to win against, one of them or not."
        ),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="WHERE", help="A model that says how likely the answers are.")
    ] = None,
    tasks: TasksOption = None,
    questions: QuestionsOption = None,
    prompts: Annotated[int, typer.Option(help="Of each task, as far as there are any.")] = 300,
    seeds: Annotated[int, typer.Option(help="Answers to each prompt.")] = 3,
    samples: Annotated[
        int, typer.Option(help="Answers to each of 20 prompts, for the best of K and for variety; 1: none.")
    ] = 16,
    new_tokens: Annotated[int, typer.Option(help="Of an answer at most.")] = 40,
    batch: BatchOption = 64,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    out: ResultOption = None,
    html: PageOption = None,
    quiet: QuietOption = False,
) -> None:
    """Ask chat models what rules can check, on prompts kept from training: rewards, wins, drift, variety."""
    from rich.console import Console

    from colada.report.style import require_matplotlib
    from colada.train.display import Display

    names = _tasks(tasks, questions)
    check_counts(prompts=prompts, seeds=seeds, samples=samples, batch=batch)
    require_count("new_tokens", new_tokens, MOST_TOKENS)
    if against is not None and seeds < 2:
        raise ColadaError(f"seeds={seeds} with --against, expected at least 2: wins are over other seeds")
    existing_paths([str(stories)])
    listed = models or ["bundled"]
    places = listed if against is None or against in listed else [against, *listed]
    if len(set(places)) < len(places):
        raise ColadaError(f"models {', '.join(places)}: one is there twice")
    for where in (*places, judge):
        check_model_options(where, None, dtype, device)
    if html is not None:
        require_matplotlib("a page")

    from colada.data.sources import stories as read
    from colada.evaluate import rewards as measures
    from colada.evaluate.generative import ModelJudge
    from colada.evaluate.texts import require_tokenizer
    from colada.models.cola import ColaDLM
    from colada.models.likelihood import bound_settings
    from colada.report.rewards import flow_table, rewards_table, variety_table, write_rewards_page

    display = Display(Console(stderr=True, quiet=quiet))
    texts = read(stories)
    named = dict(
        zip(_names(places), (load_model(where, None, dtype, device) for where in places), strict=True)
    )
    reference = None if against is None else list(named)[places.index(against)]
    first = next(iter(named.values()))
    templates = [model.chat_template for model in named.values() if model.chat_template is not None]
    if not templates:
        raise ColadaError(f"{first.origin} has no chat template, expected a model of conversations")
    asked_by_another = [name for name, model in named.items() if model.chat_template is None]
    for name in asked_by_another:
        named[name].chat_template = templates[0]
    tokenizer = require_tokenizer(first, "a chat is text")
    asked = measures.held_out_prompts(texts, names, prompts, questions)
    fields, flows = measures.with_fields(named), dict[str, Any]()
    if len(fields) > 1:
        field = next(iter(fields.values()))
        answered = measures.answered_samples(field, texts, names, max(1, 200 // len(names)), questions)
        flows["answers"] = measures.compare_flows(fields, answered)
        flows["plain stories"] = measures.compare_flows(fields, measures.plain_samples(field, texts, 100))
    reader = None
    if judge is not None:
        judging = load_model(judge, None, dtype, device)
        reader = ModelJudge(judging, tokenizer, **bound_settings(judging), batch=batch)
    settings: dict[str, Any] = {"seeds": seeds, "samples": samples, "new_tokens": new_tokens}
    facts = {
        "models": {name: model.origin for name, model in named.items()},
        "reference": reference,
        "asked_by_the_template_of_another": asked_by_another,
        "judge": judge,
        "stories": str(stories),
        "prompts": prompts,
        "generation": {name: model.chosen({}) for name, model in named.items()},
        **settings,
    }
    with display.task(
        "answers", total=sum(len(held_out.prompts) for held_out in asked) * len(named), unit="prompts"
    ):
        result = measures.evaluate_rewards(
            named,
            asked,
            reference=reference,
            judge=reader,
            questions=questions,
            batch=batch,
            progress=display.advance,
            keep=lambda far: write_result(out, first, {**facts, **far, "flows": flows}, said=False),
            **settings,
        )
    facts["latents_encoded_again"] = {
        name: measures.encoded_again(model, [held_out.prompts[0] for held_out in asked], new_tokens, batch)
        for name, model in named.items()
        if isinstance(model, ColaDLM)
    }
    console = Console(highlight=False)
    rewards_table(result).print(console)
    if result["best_of"]:
        variety_table(result).print(console)
    if flows:
        flow_table(flows).print(console)
    write_result(out, first, {**facts, **result, "flows": flows})
    if html is not None:
        write_rewards_page(html, ", ".join(named), result, flows, facts)
        print(f"wrote {html}")


def _tasks(tasks: str | None, questions: Path | None) -> tuple[str, ...]:
    """Return the tasks that options name; raises ColadaError if they cannot be."""
    from colada.data.instructions import check_tasks, default_tasks

    names = tuple(name.strip() for name in tasks.split(",")) if tasks else default_tasks(questions)
    check_tasks(names, questions)
    return names


def _names(places: Sequence[str]) -> list[str]:
    """Return what models are called in tables: the ends of their paths, where that tells them apart."""
    short = [Path(where).parent.name if Path(where).name == "model" else Path(where).name for where in places]
    return short if len(set(short)) == len(short) and all(short) else list(places)


def pairs(
    stories: StoriesArgument,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The .jsonl of pairs; gone on with if it is there.")
    ],
    model: ModelOption = None,
    revision: RevisionOption = None,
    tasks: TasksOption = None,
    questions: QuestionsOption = None,
    reward: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION", help="A rule in place of the tasks' own, of prompt and answer."
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="WHERE",
            help="A model that reads the answers: no pair's best one is then less likely than its worst.",
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(help="Of each task, as far as there are any.")] = 500,
    samples: Annotated[int, typer.Option(min=2, help="Answers to each prompt.")] = 8,
    new_tokens: Annotated[int, typer.Option(help="Of an answer at most.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts and answers.")] = 0,
    steps: StepsOption = None,
    guidance: Annotated[
        float | None, number_option("--guidance", "-g", help="Guidance scale. Default: the model's own.")
    ] = None,
    batch: BatchOption = 64,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    quiet: QuietOption = False,
) -> None:
    """Make preferences of a chat model's own answers: to each prompt the best one and the worst, by a rule.

    Stopped at any moment, the same command goes on where it was.
    """
    from rich.console import Console

    from colada.data.rules import imported
    from colada.train.display import Display

    names = _tasks(tasks, questions)
    check_counts(prompts=prompts, samples=samples, batch=batch)
    require_count("new_tokens", new_tokens, MOST_TOKENS)
    check_settings({"steps": steps, "guidance": guidance, "seed": seed})
    existing_paths([str(stories)])
    check_model_options(model, revision, dtype, device)
    check_model_options(judge, None, dtype, device)
    if reward is not None:
        imported(reward)

    from colada.data.sources import stories as read
    from colada.evaluate.preferences import taught_prompts, write_pairs
    from colada.locate import locate
    from colada.train.lineage import check_judge

    if judge is not None:
        check_judge(f"judge {judge}", locate(judge))
    display = Display(Console(stderr=True, quiet=quiet))
    asked = taught_prompts(read(stories), names, prompts, seed, questions)
    settings = {
        name: value for name, value in (("steps", steps), ("guidance", guidance)) if value is not None
    }
    network = load_model(model, revision, dtype, device)
    with display.task("pairs", total=len(asked), unit="prompts"):
        count = write_pairs(
            *(out, network, asked),
            questions=questions,
            reward=reward,
            judge=None if judge is None else load_model(judge, None, dtype, device),
            progress=display.advance,
            samples=samples,
            new_tokens=new_tokens,
            seed=seed,
            settings=settings,
            batch=batch,
        )
    likely = "" if judge is None else ", the best no less likely than the worst"
    if not count:
        raise ColadaError(
            f"{network.origin}: to none of {len(asked)} prompts two answers end by themselves and differ in"
            f" reward{likely}, expected a model that has learnt to answer"
        )
    print(
        f"wrote {out}: {count:,} pairs of {len(asked):,} prompts; to the others no two answers that end"
        f" differ in reward{likely}"
    )
